/* SPDX-License-Identifier: MIT */
/*
 * Slot table against a model: random slots set, cleared, moved and shared between up to FAMILY maps; each
 * copy (a unique location) must be freed exactly once, when the last map has let go of it.
 *
 * Build: this file, csrc/slot_table.c, csrc/base.c. Argument: seed.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base.h"
#include "slot_table.h"

#define SPACE_BYTES (1ULL << 32)
#define PAGES 4096u
#define FAMILY 4
#define COPIES 400000u

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

static void check_page(int m, unsigned p)
{
	struct slot have = resolved(m, p);

	if (slot_is_kept(model[m][p].tag) && have.tag == SLOT_NONE) {
		CHECK(holders[model[m][p].location] > 1 || freed[model[m][p].location]); /* a relative had it */
		forget(m, p);
	}
	CHECK(slot_is_equal(have, model[m][p]));
	if (has_copy(have))
		CHECK(!freed[have.location]);
}

/* Replace a page's slot as fill and evict do: the old copy is dropped by whoever replaces it. */
static void set_page(int m, unsigned p, struct slot slot)
{
	struct slot old;

	check_page(m, p);
	CHECK(slot_get(space, &maps[m], base_page + p, &old) == 0);
	CHECK(slot_set(space, &maps[m], base_page + p, slot) == 0);
	if (old.tag == SLOT_INDIRECT)
		slot_shared_put(space, old.location, free_copy, NULL);
	else if (has_copy(old))
		free_copy(NULL, old);
	forget(m, p);
	model[m][p] = slot;
	if (has_copy(slot))
		holders[slot.location]++;
}

static void clear(int m, unsigned first, unsigned count)
{
	slot_map_clear(space, &maps[m], base_page + first, base_page + first + count, no_staged, free_copy,
		       NULL);
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
	CHECK(slot_map_move(space, &maps[m], base_page + from, base_page + to, count, no_staged, free_copy,
			    NULL) == 0);
	for (unsigned i = 0; i < count; i++) {
		forget(m, to + i);
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

int main(int argc, char **argv)
{
	void *base = mmap(NULL, SPACE_BYTES, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	seed = argc > 1 ? strtoul(argv[1], NULL, 0) : 1;
	state = seed * 2654435761u;
	CHECK(base != MAP_FAILED && slot_space_create(base, SPACE_BYTES, &space) == 0);
	alive[0] = 1;
	for (int step = 0; step < 60000; step++) {
		int m = (int)rnd(FAMILY);
		uint32_t what = rnd(1000);

		if (!alive[m])
			continue;
		if (what < 700)
			set_page(m, rnd(PAGES), rnd(4) ? random_slot() : (struct slot){ .tag = SLOT_NONE });
		else if (what < 900)
			check_page(m, rnd(PAGES));
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
	CHECK(slot_space_metadata_bytes(space) == 0 && slot_space_shared_spill_pages(space) == 0);
	slot_space_destroy(space);
	printf("test_slot_table: passed, seed %lu, %lu copies\n", seed, (unsigned long)next_copy);
	return 0;
}
