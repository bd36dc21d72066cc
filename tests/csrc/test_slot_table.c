/* SPDX-License-Identifier: MIT */
/*
 * Slot table against a model: random slots set, cleared, moved and shared between up to FAMILY maps; each
 * copy (a unique location) must be freed exactly once, when the last map has let go of it. Now and then the
 * space is opened anew from its memory alone.
 *
 * Then a child does the same with two maps and is killed, hundreds of times: whatever instruction it was at,
 * each page must have what it had or what it was being given.
 *
 * Build: this file, csrc/slot_table.c, csrc/slot_heap.c, csrc/sys.c, csrc/base.c. Argument: seed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base.h"
#include "fault_point.h"
#include "slot_heap.h"
#include "slot_table.h"

#define SPACE_BYTES (1ULL << 32)
#define DEATHS 400
#define DEATH_PAGES 1024u
#define PAGES 4096u
#define FAMILY 4
#define COPIES 400000u
#define DISCARDS_GRANTED 50

#define CHECK(condition)                                                                     \
	do {                                                                                 \
		if (!(condition)) {                                                          \
			fprintf(stderr, "%s:%d: failed: %s (seed %lu)\n", __FILE__, __LINE__, \
				#condition, seed);                                           \
			exit(1);                                                             \
		}                                                                            \
	} while (0)

static unsigned long seed = 1, state;
static struct slot_space *space;
static void *memory;
static int memfd;
static struct slot_map maps[FAMILY];
static int alive[FAMILY];
static struct slot model[FAMILY][PAGES]; /* INDIRECT never stands here: what is behind it does */
static uint8_t freed[COPIES];
static int32_t holders[COPIES]; /* maps whose model names this copy */
static uint64_t next_copy = 1;
static uint64_t base_page = (0x7f1234500000ULL >> 12) + 13;

static uint32_t rnd(uint32_t bound)
{
	state = state * 6364136223846793005UL + 1442695040888963407UL;
	return (uint32_t)(state >> 33) % bound;
}

static void free_copy(void *context, struct slot slot)
{
	(void)context;
	CHECK(slot.location < COPIES && !freed[slot.location]);
	freed[slot.location] = 1;
}

static void no_staged(void *context, uint64_t page, struct slot slot)
{
	(void)context, (void)page, (void)slot;
	CHECK(!"nothing is staged in this test");
}

/* Both ways there are: at leisure as far as that goes. */
static void clear_range(struct slot_map *map, uint64_t start, uint64_t end, slot_free_fn free_one)
{
	uint32_t list = 0;

	slot_map_detach(space, map, start, end, &list);
	CHECK(slot_map_is_valid(space, map));
	slot_map_clear(space, map, start, end, no_staged, free_one, NULL);
	while (list != 0)
		list = slot_clusters_free(space, list, 1, free_one, NULL);
}

static int has_copy(struct slot slot)
{
	return slot.tag == SLOT_POOL || slot.tag == SLOT_SPILL || slot_is_kept(slot.tag);
}

static struct slot random_slot(void)
{
	static const enum slot_tag tags[] = { SLOT_ZERO, SLOT_SAME, SLOT_POOL, SLOT_SPILL,
					      SLOT_KEPT_POOL, SLOT_KEPT_SPILL, SLOT_POISONED };
	struct slot slot = { .tag = tags[rnd(7)] };

	if (slot.tag == SLOT_SAME)
		slot.check = (uint64_t)rnd(1u << 31) << 33 | rnd(1u << 31);
	if (has_copy(slot)) {
		slot.units = (uint8_t)(rnd(64) + 1);
		slot.backend = slot.tag == SLOT_SPILL || slot.tag == SLOT_KEPT_SPILL ? (uint8_t)rnd(15) : 0;
		slot.location = next_copy++;
		slot.check = ((uint64_t)rnd(1u << 31) << 31 | rnd(1u << 31)) & ((1ULL << 58) - 1);
		CHECK(next_copy < COPIES);
	}
	return slot;
}

static void forget(int m, unsigned p)
{
	if (has_copy(model[m][p]))
		holders[model[m][p].location]--;
	model[m][p] = (struct slot){ .tag = SLOT_NONE };
}

/* A kept copy belongs to one map only once a shared cluster is copied: which one is not specified. */
static struct slot resolved(int m, unsigned p)
{
	struct slot slot;

	CHECK(slot_get(space, &maps[m], base_page + p, &slot) == 0);
	return slot.tag == SLOT_INDIRECT ? slot_shared_get(space, slot.location) : slot;
}

/* To look at a page is to change nothing, and to see what it has. */
static void check_peek(int m, unsigned p)
{
	uint64_t bytes = slot_map_metadata_bytes(&maps[m]);
	uint64_t indirect = slot_map_count(&maps[m], SLOT_INDIRECT);
	struct slot seen = slot_peek(space, &maps[m], base_page + p);

	if (seen.tag == SLOT_INDIRECT)
		seen = slot_shared_get(space, seen.location);
	CHECK(slot_map_metadata_bytes(&maps[m]) == bytes && slot_map_count(&maps[m], SLOT_INDIRECT) == indirect);
	CHECK(slot_is_kept(model[m][p].tag) || slot_is_equal(seen, model[m][p]));
}

static void check_page(int m, unsigned p)
{
	struct slot have;

	check_peek(m, p);
	have = resolved(m, p);

	if (slot_is_kept(model[m][p].tag) && have.tag == SLOT_NONE) {
		CHECK(holders[model[m][p].location] > 1 || freed[model[m][p].location]); /* a relative had it */
		forget(m, p);
	}
	CHECK(slot_is_equal(have, model[m][p]));
	if (has_copy(have))
		CHECK(!freed[have.location]);
}

/* Replace a page's slot as fill and evict do: the old copy is dropped by whoever replaces it. `meaning`: what the word
 * stands for. */
static void set_word(int m, unsigned p, struct slot word, struct slot meaning)
{
	struct slot old;

	check_page(m, p);
	CHECK(slot_get(space, &maps[m], base_page + p, &old) == 0);
	CHECK(slot_set(space, &maps[m], base_page + p, word) == 0);
	if (old.tag == SLOT_INDIRECT)
		slot_shared_put(space, old.location, free_copy, NULL);
	else if (has_copy(old))
		free_copy(NULL, old);
	forget(m, p);
	model[m][p] = meaning;
	if (has_copy(meaning))
		holders[meaning.location]++;
}

static void set_page(int m, unsigned p, struct slot slot) { set_word(m, p, slot, slot); }

static void clear(int m, unsigned first, unsigned count)
{
	clear_range(&maps[m], base_page + first, base_page + first + count, free_copy);
	for (unsigned p = first; p < first + count; p++)
		forget(m, p);
}

static void move(int m)
{
	unsigned count = rnd(200) + 1, from = rnd(PAGES / 2 - count), to = PAGES / 2 + rnd(PAGES / 2 - count);

	for (unsigned i = 0; i < count; i++) {
		check_page(m, from + i);
		check_page(m, to + i);
	}
	clear(m, to, count);
	CHECK(slot_map_move(space, &maps[m], base_page + from, base_page + to, count, no_staged, NULL) == 0);
	for (unsigned i = 0; i < count; i++) {
		model[m][to + i] = model[m][from + i];
		model[m][from + i] = (struct slot){ .tag = SLOT_NONE };
	}
}

static void migrate(int m)
{
	unsigned p = rnd(PAGES);
	struct slot word, from, to = random_slot();

	check_page(m, p);
	CHECK(slot_get(space, &maps[m], base_page + p, &word) == 0);
	if (word.tag != SLOT_INDIRECT)
		return;
	from = slot_shared_get(space, word.location);
	to.tag = SLOT_SPILL;
	to.units = from.units;
	to.check = from.check;
	to.location = next_copy++;
	CHECK(slot_shared_migrate(space, word.location, from, to));
	CHECK(!slot_shared_migrate(space, word.location, from, to));
	free_copy(NULL, from);
	for (int k = 0; k < FAMILY; k++)
		for (unsigned i = 0; i < PAGES; i++)
			if (alive[k] && has_copy(model[k][i]) && model[k][i].location == from.location) {
				model[k][i] = to;
				holders[to.location]++;
				holders[from.location]--;
			}
}

/* A relative evicts what this one has out already. */
static void share_page(int m)
{
	int to = (int)rnd(FAMILY);
	unsigned p = rnd(PAGES);
	uint64_t index;

	if (to == m || !alive[to])
		return;
	check_page(m, p);
	if (model[m][p].tag != SLOT_POOL && model[m][p].tag != SLOT_SPILL)
		return;
	CHECK(slot_share(space, &maps[m], base_page + p, &index) == 0);
	CHECK(slot_is_equal(slot_shared_get(space, index), model[m][p]));
	set_word(to, p, (struct slot){ .tag = SLOT_INDIRECT, .location = index }, model[m][p]);
}

static void share(int parent)
{
	for (int m = 0; m < FAMILY; m++) {
		if (alive[m])
			continue;
		memset(&maps[m], 0, sizeof maps[m]);
		CHECK(slot_map_share(space, &maps[parent], &maps[m]) == 0);
		alive[m] = 1;
		memcpy(model[m], model[parent], sizeof model[m]);
		for (unsigned p = 0; p < PAGES; p++)
			if (has_copy(model[m][p]))
				holders[model[m][p].location]++;
		return;
	}
}

static void leaks(void)
{
	for (uint64_t c = 1; c < next_copy; c++)
		CHECK((holders[c] > 0) == !freed[c] || holders[c] == 0);
}

/* What a successor does: everything but the memory and the maps is lost, and the counts are in doubt. */
static void reopen(struct slot_map *all, int count)
{
	slot_space_destroy(space);
	CHECK(slot_space_open(memfd, 0, memory, SPACE_BYTES, &space) == 0);
	for (int m = 0; m < count; m++) {
		memset(all[m].counts, 0xff, sizeof all[m].counts);
		all[m].cluster_count = all[m].cluster_bytes = all[m].index_used = 99;
		CHECK(slot_space_adopt(space, &all[m]) == 0);
	}
	CHECK(slot_space_ready(space) == 0);
	CHECK(slot_space_is_valid(space));
	for (int m = 0; m < count; m++)
		CHECK(slot_map_is_valid(space, &all[m]));
}

static void test_model(void)
{
	alive[0] = 1;
	for (int step = 0; step < 60000; step++) {
		int m = (int)rnd(FAMILY);
		uint32_t what = rnd(1000);

		if (!alive[m])
			continue;
		if (what < 700)
			set_page(m, rnd(PAGES), rnd(4) ? random_slot() : (struct slot){ .tag = SLOT_NONE });
		else if (what < 800)
			check_page(m, rnd(PAGES));
		else if (what < 900)
			share_page(m);
		else if (what < 940)
			clear(m, rnd(PAGES - 200), rnd(200) + 1);
		else if (what < 960)
			migrate(m);
		else if (what < 980)
			move(m);
		else if (what < 990)
			share(m);
		else if (what < 993 && m != 0) {
			clear(m, 0, PAGES);
			CHECK(maps[m].root == 0 && maps[m].cluster_count == 0);
			alive[m] = 0;
		}
		if (step % 1000 == 999)
			reopen(maps, FAMILY);
		if (step % 500 == 0)
			for (int k = 0; k < FAMILY; k++)
				CHECK(!alive[k] || slot_map_is_valid(space, &maps[k]));
	}
	for (int m = 0; m < FAMILY; m++)
		for (unsigned p = 0; alive[m] && p < PAGES; p++)
			check_page(m, p);
	leaks();
	for (int m = 0; m < FAMILY; m++)
		if (alive[m])
			clear(m, 0, PAGES);
	for (uint64_t c = 1; c < next_copy; c++)
		CHECK(holders[c] == 0);
	CHECK(slot_space_metadata_bytes(space) <= SLOT_SPARE_CHUNKS * SLOT_CHUNK_BYTES);
	CHECK(slot_space_shared_spill_pages(space) == 0 && slot_space_is_valid(space));
}

/* ---- what it costs ---- */

#define SLACK_BYTES (8 * SLOT_CHUNK_BYTES) /* chunks being filled */

static void test_cost_of(double density, double bytes_max)
{
	enum { COST_PAGES = 1 << 20 };
	uint8_t *has = calloc(COST_PAGES, 1);
	uint64_t slots = 0;
	double settled, churned;

	CHECK(has);
	for (uint64_t p = 0; p < COST_PAGES; p++)
		if (rnd(1000) < density * 1000) {
			CHECK(slot_set(space, &maps[0], p, (struct slot){ .tag = SLOT_ZERO }) == 0);
			has[p] = 1;
			slots++;
		}
	settled = (double)slot_map_metadata_bytes(&maps[0]) / (double)slots;
	/* One page comes in, another one goes out: all have moved twice. */
	for (uint64_t i = 0; density < 1 && i < 2 * slots; i++) {
		uint32_t in = rnd(COST_PAGES), out = rnd(COST_PAGES);

		while (!has[in])
			in = rnd(COST_PAGES);
		while (has[out])
			out = rnd(COST_PAGES);
		CHECK(slot_set(space, &maps[0], in, (struct slot){ .tag = SLOT_NONE }) == 0);
		CHECK(slot_set(space, &maps[0], out, (struct slot){ .tag = SLOT_ZERO }) == 0);
		has[in] = 0;
		has[out] = 1;
	}
	churned = (double)slot_map_metadata_bytes(&maps[0]) / (double)slots;
	printf("test_slot_table: %3.0f %% with a slot: %.2f bytes each, %.2f after churn, %.2f with free memory\n",
	       100 * density, settled, churned, (double)slot_space_metadata_bytes(space) / (double)slots);
	CHECK(settled <= bytes_max && churned <= bytes_max);
	CHECK((double)slot_space_metadata_bytes(space) <= bytes_max * (double)slots + SLACK_BYTES);
	slot_map_clear(space, &maps[0], 0, COST_PAGES, no_staged, free_copy, NULL);
	CHECK(slot_space_metadata_bytes(space) <= SLOT_SPARE_CHUNKS * SLOT_CHUNK_BYTES);
	free(has);
}

static void test_cost(void)
{
	test_cost_of(0.1, 22);
	test_cost_of(0.25, 17.5);
	test_cost_of(0.5, 16);
	test_cost_of(0.75, 16);
	test_cost_of(1, 16);
}

/* ---- what cannot be is refused ---- */

static void expect_unclean(uint64_t *word, uint64_t value)
{
	uint64_t good = *word;
	struct slot_map map = maps[0];

	slot_space_destroy(space);
	*word = value;
	CHECK(slot_space_open(memfd, 0, memory, SPACE_BYTES, &space) == 0);
	if (word == &maps[0].root)
		map.root = value;
	CHECK(slot_space_adopt(space, &map) == -EUCLEAN);
	*word = good;
}

static void test_refusals(void)
{
	struct slot_map *map = &maps[0];
	uint64_t *entries, *cluster, at = 0;

	for (uint64_t p = 0; p < 100; p += 2)
		CHECK(slot_set(space, map, p, (struct slot){ .tag = SLOT_POOL, .units = 1, .location = p }) == 0);
	entries = (uint64_t *)((char *)memory + SPACE_BYTES / 4 / (4 * SLOT_CHUNK_BYTES) * (4 * SLOT_CHUNK_BYTES) * 3 +
			       (map->root >> 32) * PAGE_BYTES);
	while ((uint32_t)entries[at] == 0)
		at++;
	cluster = (uint64_t *)((char *)memory + ((uint32_t)entries[at] - 1) / 512 * SLOT_CHUNK_BYTES +
			       ((uint32_t)entries[at] - 1) % 512 * SLOT_GRANULE_BYTES);
	expect_unclean(&map->root, map->root | UINT32_MAX);                      /* an index of 16 TiB */
	expect_unclean(&entries[at], entries[at] | UINT32_MAX);                  /* a cluster outside */
	expect_unclean(&entries[at], entries[at] + 1);                           /* one that is in none's place */
	expect_unclean(&entries[at], entries[at] + (5ULL << 32));                /* another's place in the index */
	expect_unclean(&entries[at + 1], (7ULL << 32) | 1);                      /* an entry nobody would find */
	expect_unclean(&cluster[1], ~0ULL);                                      /* more entries than room */
	expect_unclean(&cluster[2], 15);                                         /* a tag there is not */
	expect_unclean(&cluster[2], SLOT_INDIRECT | 1ULL << 12);                 /* a shared slot there is not */
	expect_unclean(&cluster[2], cluster[2] | 0x30);                          /* reserved bits */
	slot_space_destroy(space);
	memset(map, 0, sizeof *map);
	CHECK(slot_space_open(memfd, 0, memory, SPACE_BYTES, &space) == 0 && slot_space_ready(space) == 0);
	CHECK(slot_space_metadata_bytes(space) == 0); /* nobody reaches anything: all of it is free */
}

/* ---- deaths ---- */

/* In memory that outlives the child. */
struct life {
	uint64_t done; /* operations */
	struct slot_map maps[2];
	struct slot model[2][DEATH_PAGES];
};

/* Operation `k`, the same each time: what pages [first, first + count) of a map get. */
struct operation {
	unsigned map, first, count;
	struct slot slot;
	int fork;
};

static struct operation operation_of(uint64_t k)
{
	struct operation operation = { 0 };

	state = (seed + k) * 0x9E3779B97F4A7C15UL;
	(void)rnd(2);
	operation.map = rnd(2);
	operation.first = rnd(DEATH_PAGES);
	operation.count = rnd(20) ? 1 : rnd(300) + 1;
	operation.count = min_of(operation.count, DEATH_PAGES - operation.first);
	operation.fork = rnd(300) == 0;
	if (operation.count == 1 && rnd(3))
		operation.slot = (struct slot){ .tag = rnd(2) ? SLOT_POOL : SLOT_SPILL, .units = (uint8_t)(k % 64 + 1),
						.location = k, .check = (k * 0x9E3779B97F4A7C15UL) >> 6 };
	return operation;
}

static void drop_nothing(void *context, struct slot slot) { (void)context, (void)slot; }

static void do_operation(struct life *life, struct operation operation)
{
	struct slot_map *map = &life->maps[operation.map];
	uint64_t page = base_page + operation.first;
	struct slot old;

	if (operation.fork) {
		slot_map_clear(space, &life->maps[1], base_page, base_page + DEATH_PAGES, no_staged, drop_nothing,
			       NULL);
		CHECK(slot_map_share(space, &life->maps[0], &life->maps[1]) == 0);
	} else if (operation.count > 1) {
		clear_range(map, page, page + operation.count, drop_nothing);
	} else {
		CHECK(slot_get(space, map, page, &old) == 0);
		CHECK(slot_set(space, map, page, (struct slot){ .tag = SLOT_NONE }) == 0);
		if (old.tag == SLOT_INDIRECT)
			slot_shared_put(space, old.location, drop_nothing, NULL);
		CHECK(slot_set(space, map, page, operation.slot) == 0);
	}
}

static int is_touched(struct operation operation, unsigned m, unsigned p)
{
	return operation.fork ? m == 1 : m == operation.map && p - operation.first < operation.count;
}

static struct slot model_after(const struct life *life, struct operation operation, unsigned m, unsigned p)
{
	if (!is_touched(operation, m, p))
		return life->model[m][p];
	return operation.fork ? life->model[0][p] : operation.slot;
}

static void apply_to_model(struct life *life, struct operation operation)
{
	for (unsigned p = 0; p < DEATH_PAGES; p++)
		for (unsigned m = 2; m-- > 0;)
			life->model[m][p] = model_after(life, operation, m, p);
}

/* Each page is as it was; one that was being changed may be as it was to be, or without a slot: the way there. */
static void check_after_death(struct life *life, struct operation interrupted)
{
	struct slot next[2][DEATH_PAGES];

	for (unsigned m = 0; m < 2; m++)
		for (unsigned p = 0; p < DEATH_PAGES; p++) {
			struct slot before = life->model[m][p], after = model_after(life, interrupted, m, p), have;

			CHECK(slot_get(space, &life->maps[m], base_page + p, &have) == 0);
			if (have.tag == SLOT_INDIRECT)
				have = slot_shared_get(space, have.location);
			CHECK(slot_is_equal(have, before) || slot_is_equal(have, after) ||
			      (have.tag == SLOT_NONE && is_touched(interrupted, m, p)));
			next[m][p] = have;
		}
	memcpy(life->model, next, sizeof next);
}

static void test_deaths(void)
{
	struct life *life = mmap(NULL, sizeof *life, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	uint64_t known = 0, total = 0;

	CHECK(life != MAP_FAILED);
	for (int death = 0; death < DEATHS; death++) {
		int status;
		pid_t child = fork();

		CHECK(child >= 0);
		if (child == 0)
			for (;; __atomic_store_n(&life->done, life->done + 1, __ATOMIC_SEQ_CST))
				do_operation(life, operation_of(life->done));
		while (__atomic_load_n(&life->done, __ATOMIC_SEQ_CST) < known + 20)
			usleep(10);
		usleep((useconds_t)(death * 7 % 400));
		CHECK(kill(child, SIGKILL) == 0 && waitpid(child, &status, 0) == child && WIFSIGNALED(status) &&
		      WTERMSIG(status) == SIGKILL);
		for (; known < life->done; known++)
			apply_to_model(life, operation_of(known));
		reopen(life->maps, 2);
		check_after_death(life, operation_of(known));
		total = ++known;
		life->done = known;
	}
	for (unsigned m = 0; m < 2; m++)
		slot_map_clear(space, &life->maps[m], base_page, base_page + DEATH_PAGES, no_staged, drop_nothing, NULL);
	CHECK(slot_space_metadata_bytes(space) <= SLOT_SPARE_CHUNKS * SLOT_CHUNK_BYTES);
	CHECK(slot_space_is_valid(space));
	munmap(life, sizeof *life);
	printf("test_slot_table: %d deaths in %lu operations\n", DEATHS, (unsigned long)total);
}

int main(int argc, char **argv)
{
	seed = argc > 1 ? strtoul(argv[1], NULL, 0) : 1;
	state = seed * 2654435761u;
	memfd = memfd_create("slots", MFD_CLOEXEC);
	CHECK(memfd >= 0 && ftruncate(memfd, SPACE_BYTES) == 0);
	memory = mmap(NULL, SPACE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memfd, 0);
	CHECK(memory != MAP_FAILED && slot_space_create(memfd, 0, memory, SPACE_BYTES, &space) == 0);
#ifdef VSWAP_FAULT_POINTS
	fault_point_set("sys/discard", DISCARDS_GRANTED, EPERM, true); /* zeroed instead, and nothing is noticed */
#endif
	test_model();
#ifdef VSWAP_FAULT_POINTS
	CHECK(fault_point_hits("sys/discard") > 0);
	fault_point_clear();
#endif
	test_cost();
	test_refusals();
	test_deaths();
	slot_space_destroy(space);
	printf("test_slot_table: passed, seed %lu, %lu copies\n", seed, (unsigned long)next_copy);
	return 0;
}
