/* SPDX-License-Identifier: MIT */
/*
 * recompress — old pages of a pool are compressed again, with zstd, before they would go to a disk.
 *
 * LZ4 is what eviction and faults can afford. A page that has been out for a while pays for a slower method: text takes
 * a quarter less, on the disk too, as objects are written as they are. One thread, while a group uses most of its limit:
 * it follows the order in which clusters were stored (cold.h), so that it is ahead of the writer, and
 * looks at each once for every time that something was stored there. It takes at most a quarter of a CPU. Where a pool has many
 * slabs that are hardly used it has them emptied first (evacuate.h); with an age of 0 that is all it does.
 *
 * Old        a cluster is in which something was stored last engine->recompress_age_ms ago, and a page of it that was
 *            not evicted again in the latter half of that, unchanged perhaps: the ghosts (order.h) know, by the group's
 *            clock of evictions, which is noted twice an age. So pages that fault often stay LZ4; and one that was taken
 *            for old wrongly has its copy given up when it comes back soon (recompress_is_regretted): LZ4 is next.
 * Room       what is old together was stored together, and so leaves whole slabs in the end; meanwhile the pool does not
 *            grow where there is no room below the limit (may_store).
 * Life       1 gate      the slots of some pages are remembered, whole, and the objects' bytes copied
 *            2 no gate   each is expanded and checked against its slot, compressed, and stored if that saves an eighth
 *            3 gate      if the slot is still what it was, it now names the smaller object, in one store, and the old
 *                        one is freed; else the new one is
 *            A daemon that dies in between leaves every slot naming an object that is there.
 *
 * Locking     a gate for at most PAGES_A_TURN slots. The group is held by `users`, its clients by reference.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "codec.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "evacuate.h"
#include "fill.h"
#include "sys.h"

#define PAGES_A_TURN 16u
#define CLIENTS_A_TURN 64u
#define IDLE_MS 250u
#define REST 3u /* times as long as it has worked */
#define PRESSURE_PART 4u /* of the limit: with that much room left there is no need */

struct candidate {
	uint64_t page;
	struct slot word; /* in the map: POOL or INDIRECT */
	struct slot copy; /* behind it: POOL */
	struct slot to;   /* POOL; NONE: it is to stay */
	uint8_t object[PAGE_BYTES];
};

struct recompressor {
	struct engine *engine;
	struct codec_scratch *codec;
	uint64_t page[PAGE_BYTES / 8];
	uint8_t object[PAGE_BYTES];
	struct candidate candidates[PAGES_A_TURN];
	unsigned count;
	unsigned next; /* index of the client whose turn it is */
};

/* ---- what is old ---- */

/* Evictions that the group has seen since a time between half an age and a whole one ago. */
static uint64_t evictions_within_age(const struct group *group)
{
	return READ_ONCE(group->ghosts.clock) - READ_ONCE(group->recompress_marks[0]);
}

static bool is_old(const struct client *client, uint64_t page)
{
	return !ghosts_is_recent(&client->group->ghosts, client->index, page, evictions_within_age(client->group));
}

bool recompress_is_regretted(const struct client *client, uint64_t page, struct slot copy)
{
	return client->engine->recompress_age_ms > 0 && copy.tag == SLOT_POOL &&
	       codec_is_zstd(pool_object(client->engine->pool_space, copy.location), copy.units) &&
	       !is_old(client, page);
}

static void note_clock(const struct engine *engine, struct group *group, uint64_t now_ns)
{
	if (now_ns - group->recompress_mark_ns < engine->recompress_age_ms * 500000ULL)
		return;
	WRITE_ONCE(group->recompress_marks[0], group->recompress_marks[1]);
	group->recompress_marks[1] = READ_ONCE(group->ghosts.clock);
	group->recompress_mark_ns = now_ns;
}

/* ---- 1 collect; the gate is held ---- */

static void collect_page(struct recompressor *recompressor, struct client *client, uint64_t page)
{
	struct engine *engine = recompressor->engine;
	struct candidate *candidate = &recompressor->candidates[recompressor->count];
	bool shared;

	if (slot_get(engine->slots, &client->record->map, page, &candidate->word) < 0)
		return;
	shared = candidate->word.tag == SLOT_INDIRECT;
	if ((!shared && candidate->word.tag != SLOT_POOL) || !is_old(client, page))
		return;
	if (shared)
		slot_share_lock(engine->slots);
	candidate->copy = shared ? slot_shared_peek(engine->slots, candidate->word.location) : candidate->word;
	if (candidate->copy.tag == SLOT_POOL) {
		const void *object = pool_object(engine->pool_space, candidate->copy.location);

		if (!codec_is_zstd(object, candidate->copy.units)) {
			memcpy(candidate->object, object, candidate->copy.units * POOL_UNIT_BYTES);
			candidate->page = page;
			recompressor->count++;
		}
	}
	if (shared)
		slot_share_unlock(engine->slots);
}

static void collect(struct recompressor *recompressor, struct client *client, uint64_t first)
{
	SCOPED_LOCK(&client->gate);
	recompressor->count = 0;
	for (unsigned i = 0; i < PAGES_A_TURN && !client->dead && !client_is_shut(client); i++)
		collect_page(recompressor, client, first + i);
	client_metadata_changed(client); /* a shared cluster may have become its own */
}

/* ---- 2 compress ---- */

static bool may_store(const struct group *group, unsigned units)
{
	return group_room_bytes(group) >= (int64_t)(2 * POOL_SLAB_BYTES) ||
	       pool_growth_bytes(group->pool, units) == 0;
}

static void compress(struct recompressor *recompressor, struct client *client, struct candidate *candidate)
{
	unsigned bytes = pool_object_bytes(candidate->copy.units), units;
	uint64_t handle;

	candidate->to = (struct slot){ .tag = SLOT_NONE };
	counter_add(recompressor->engine, recompress_examined, 1);
	/* What fails its check stays as it is, for whoever needs it to find. */
	if (codec_expand(candidate->object, candidate->copy.units, recompressor->page) != 0 ||
	    codec_check(recompressor->page, recompressor->engine->state->secret) != candidate->copy.check)
		return;
	units = codec_compress(recompressor->codec, CODEC_ZSTD, recompressor->page, recompressor->object);
	if (pool_object_bytes(units) > bytes - bytes / 8 || !may_store(client->group, units) ||
	    pool_store(client->group->pool, recompressor->object, units, &handle) < 0)
		return;
	candidate->to = (struct slot){ .tag = SLOT_POOL, .units = (uint8_t)units, .location = handle,
				       .check = candidate->copy.check };
}

/* ---- 3 settle; the gate is held ---- */

static void settle_one(struct recompressor *recompressor, struct client *client, const struct candidate *candidate)
{
	struct engine *engine = recompressor->engine;
	struct slot_map *map = &client->record->map;
	struct slot word;
	bool done = false;

	if (candidate->to.tag == SLOT_NONE)
		return;
	if (!client->dead && slot_get(engine->slots, map, candidate->page, &word) == 0 &&
	    slot_is_equal(word, candidate->word)) {
		if (word.tag == SLOT_INDIRECT)
			done = slot_shared_migrate(engine->slots, word.location, candidate->copy, candidate->to);
		else
			done = slot_set(engine->slots, map, candidate->page, candidate->to) == 0;
	}
	if (!done) {
		pool_free(client->group->pool, candidate->to.location, candidate->to.units);
		return;
	}
	crash_point(CRASH_RECOMPRESS_SETTLED_ONE);
	pool_free(client->group->pool, candidate->copy.location, candidate->copy.units);
	counter_add(engine, recompressed_pages, 1);
	counter_add(engine, recompress_saved_bytes,
		    pool_object_bytes(candidate->copy.units) - pool_object_bytes(candidate->to.units));
}

static void settle(struct recompressor *recompressor, struct client *client)
{
	pthread_mutex_lock(&client->gate);
	for (unsigned i = 0; i < recompressor->count; i++)
		settle_one(recompressor, client, &recompressor->candidates[i]);
	pthread_mutex_unlock(&client->gate);
	group_pool_changed(client->group);
	engine_room_made(recompressor->engine, client->group);
}

/* ---- the thread ---- */

/* As long as it takes to leave programs most of the CPU. */
static void rest(struct recompressor *recompressor, uint64_t *since_cpu_ns)
{
	uint64_t now_ns = sys_thread_cpu_ns(), used_ns = now_ns - *since_cpu_ns;

	counter_add(recompressor->engine, recompress_cpu_us, used_ns / 1000);
	*since_cpu_ns = now_ns - used_ns % 1000;
	sys_sleep_ms((unsigned)max_of(used_ns * REST / 1000000, (uint64_t)1));
}

static bool lacks_room(const struct group *group)
{
	return group_room_bytes(group) < (int64_t)(READ_ONCE(group->limit_bytes) / PRESSURE_PART);
}

static bool is_wanted(const struct engine *engine, const struct group *group)
{
	return engine->recompress_age_ms > 0 && !(READ_ONCE(group->flags) & ENGINE_GROUP_NO_RECOMPRESS) &&
	       lacks_room(group);
}

/* The next old cluster of a client. False: it has none. */
static bool examine_cluster(struct recompressor *recompressor, struct client *client, uint64_t *since_cpu_ns)
{
	uint64_t number;
	bool found;

	pthread_mutex_lock(&client->gate);
	found = !client->dead && cold_examine(&client->cold, sys_now_coarse_ms(),
					      recompressor->engine->recompress_age_ms, &number);
	pthread_mutex_unlock(&client->gate);
	for (unsigned i = 0; found && i < CLUSTER_PAGES; i += PAGES_A_TURN) {
		collect(recompressor, client, number * CLUSTER_PAGES + i);
		for (unsigned k = 0; k < recompressor->count; k++)
			compress(recompressor, client, &recompressor->candidates[k]);
		if (recompressor->count == 0)
			continue;
		crash_point(CRASH_RECOMPRESS_STORED);
		settle(recompressor, client);
	}
	if (found)
		rest(recompressor, since_cpu_ns);
	return found;
}

/* One cluster of each of a group's clients. False: they have nothing old. */
static bool examine_group(struct recompressor *recompressor, struct group *group, uint64_t *since_cpu_ns)
{
	struct client *clients[CLIENTS_A_TURN];
	unsigned count = client_list_cold(recompressor->engine, group, recompressor->next, clients, CLIENTS_A_TURN);
	bool found = false;

	for (unsigned i = 0; i < count; i++) {
		recompressor->next = clients[i]->index + 1;
		if (is_wanted(recompressor->engine, group) && !READ_ONCE(recompressor->engine->stopping))
			found = examine_cluster(recompressor, clients[i], since_cpu_ns) || found;
		client_put(clients[i]);
	}
	return found;
}

/* The next group from *number on that lacks room, as one of its users; NULL: no more of them. */
static struct group *use_next_group(struct engine *engine, unsigned *number)
{
	uint64_t now_ns = sys_now_ns();

	SCOPED_LOCK(&engine->registry);
	while (*number < GROUPS_MAX) {
		struct group *group = engine->groups[(*number)++];

		if (!group)
			continue;
		note_clock(engine, group, now_ns);
		if (group->client_count > 0 && lacks_room(group)) {
			group->users++;
			return group;
		}
	}
	return NULL;
}

static bool examine_all(struct recompressor *recompressor, uint64_t *since_cpu_ns)
{
	struct engine *engine = recompressor->engine;
	struct group *group;
	unsigned number = 0;
	bool found = false;

	while (!READ_ONCE(engine->stopping) && (group = use_next_group(engine, &number))) {
		evacuate_pool(engine, group);
		found = examine_group(recompressor, group, since_cpu_ns) || found;
		pthread_mutex_lock(&engine->registry);
		group->users--;
		pthread_mutex_unlock(&engine->registry);
	}
	return found;
}

void *recompressor_main(void *argument)
{
	struct engine *engine = argument;
	struct recompressor *recompressor;
	uint64_t seen = 0, since_cpu_ns = 0;

	recompressor = calloc(1, sizeof *recompressor);
	VS_CHECK(recompressor);
	recompressor->engine = engine;
	recompressor->codec = codec_scratch_create();
	VS_CHECK(recompressor->codec);
	(void)sys_nice(0); /* faults and eviction go first */
	name_this_thread("vswap-compress");
	while (!__atomic_load_n(&engine->stopping, __ATOMIC_ACQUIRE)) {
		unsigned idle_ms = engine->recompress_age_ms ? min_of(IDLE_MS, engine->recompress_age_ms) : IDLE_MS;

		if (!examine_all(recompressor, &since_cpu_ns))
			work_wait(&engine->recompressing, &seen, &engine->stopping, idle_ms);
	}
	codec_scratch_destroy(recompressor->codec);
	free(recompressor);
	return NULL;
}
