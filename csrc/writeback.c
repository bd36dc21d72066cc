/* SPDX-License-Identifier: MIT */
/*
 * writeback — cold objects leave the pool for a backend, as they are.
 *
 * One writer thread. It works while a pool that may spill is near its cap: it takes the clusters that
 * were stored longest ago, packs their objects into a segment, writes the segment, and only when the
 * write has returned changes the slots and frees the objects. Neighbours in memory become neighbours
 * in the segment, so a run of faults is one read. When there is nothing to write it compacts (drain.c).
 *
 * A slot may change while its object is being written. It is compared whole (place and check) before
 * it is changed; if it is not what it was, the new extent is freed and nothing else happens.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "codec.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "sys.h"

#define RECORDS_MAX 8192
#define IDLE_MS 100

struct moved_object {
	uint64_t page;
	struct slot word; /* in the map: POOL or INDIRECT */
	struct slot copy; /* behind it: POOL */
	uint64_t extent;
	unsigned client; /* index in writer.clients */
	bool is_recompressed;
};

struct writer {
	struct engine *engine;
	unsigned backend;
	struct spill_segment *segment;
	struct moved_object *objects;
	unsigned object_count;
	struct client *clients[CLIENTS_MAX];
	unsigned client_count;
};

static uint64_t margin_bytes(const struct group *group)
{
	return max_of(group_pool_cap_bytes(group) / 32, 2ULL << 20);
}

static bool needs_writeback(struct engine *engine, const struct group *group)
{
	uint64_t cap = group_pool_cap_bytes(group), margin = margin_bytes(group);

	/* Under random access kept copies go first (reclaim.c). */
	if (group_gives_up_copies(group) && !READ_ONCE(group->kept_exhausted))
		return false;
	return pool_bytes(group->pool) + margin > cap && writeback_is_possible(engine, group);
}

bool writeback_is_possible(struct engine *engine, const struct group *group)
{
	int backend;

	if (group->flags & ENGINE_GROUP_NO_SPILL)
		return false;
	backend = backend_pick(engine);
	if (backend >= 0)
		backend_unpin(engine, (unsigned)backend);
	return backend >= 0;
}

/* ---- collecting; the client's gate is held ---- */

/* Put one page's object into the segment: 0, -ENOSPC when the segment is full, 1: nothing to write. */
static int collect_page(struct writer *writer, struct client *client, uint64_t page)
{
	struct engine *engine = writer->engine;
	struct moved_object *object = &writer->objects[writer->object_count];
	int64_t extent;
	bool shared;

	if (slot_get(engine->slots, &client->record->map, page, &object->word) < 0)
		return 1;
	shared = object->word.tag == SLOT_INDIRECT;
	if (!shared && object->word.tag != SLOT_POOL)
		return 1;
	if (shared)
		slot_share_lock(engine->slots);
	object->copy = shared ? slot_shared_peek(engine->slots, object->word.location) : object->word;
	extent = 1;
	if (object->copy.tag == SLOT_POOL) {
		const void *bytes = pool_object(engine->pool_space, object->copy.location);

		object->is_recompressed = codec_is_zstd(bytes, object->copy.units);
		extent = spill_segment_add(writer->segment, (uint64_t)client->index << 40 | page, bytes,
					   object->copy.units);
	}
	if (shared)
		slot_share_unlock(engine->slots);
	if (object->copy.tag != SLOT_POOL)
		return 1;
	if (extent < 0)
		return (int)extent;
	object->page = page;
	object->extent = (uint64_t)extent;
	object->client = writer->client_count - 1;
	writer->object_count++;
	return 0;
}

/* All of one cluster. -ENOSPC: segment full, the cluster goes back to the front later. */
static int collect_cluster(struct writer *writer, struct client *client)
{
	uint64_t number;
	int result = 1;

	SCOPED_LOCK(&client->gate);
	if (client->dead || client_is_shut(client) || !client_cold_pop(client, &number))
		return 1;
	for (unsigned i = 0; i < CLUSTER_PAGES; i++) {
		if (writer->object_count == RECORDS_MAX)
			result = -ENOSPC;
		else
			result = collect_page(writer, client, number * CLUSTER_PAGES + i);
		if (result == -ENOSPC) {
			client_cold_push(client, number);
			return -ENOSPC;
		}
	}
	return 0;
}

static void collect(struct writer *writer, struct group *group)
{
	struct client *clients[64];
	unsigned count = client_list_cold(writer->engine, group, clients, 64);
	bool full = false;

	for (unsigned i = 0; i < count; i++) {
		writer->clients[writer->client_count++] = clients[i];
		/* A turn of 16 MiB of address space each, so that several clients age alike. */
		for (unsigned k = 0; !full && k < (count > 1 ? 32 : RECORDS_MAX); k++) {
			int result = collect_cluster(writer, clients[i]);

			full = result == -ENOSPC;
			if (result != 0)
				break;
		}
	}
}

/* ---- settling ---- */

static void settle_object(struct writer *writer, struct client *client,
			  const struct moved_object *object)
{
	struct engine *engine = writer->engine;
	struct slot to = object->copy, word;
	bool done = false;

	to.tag = SLOT_SPILL;
	to.backend = (uint8_t)writer->backend;
	to.location = object->extent;
	if (!client->dead && slot_get(engine->slots, &client->record->map, object->page, &word) == 0 &&
	    slot_is_equal(word, object->word)) {
		if (word.tag == SLOT_INDIRECT)
			done = slot_shared_migrate(engine->slots, word.location, object->copy, to);
		else
			done = slot_set(engine->slots, &client->record->map, object->page, to) == 0;
	}
	if (done) {
		crash_point(CRASH_WRITEBACK_SETTLED_ONE);
		group_spill_changed(client->group, object->copy.units);
		pool_free(client->group->pool, object->copy.location, object->copy.units);
		counter_add(engine, spill_written_pages, 1);
		if (object->is_recompressed)
			counter_add(engine, spill_written_recompressed, 1);
	} else {
		spill_free(engine->backends[writer->backend].spill, object->extent, object->copy.units);
	}
}

static void settle(struct writer *writer, bool written)
{
	for (unsigned i = 0, n = 0; i < writer->client_count; i++) {
		struct client *client = writer->clients[i];

		pthread_mutex_lock(&client->gate);
		while (n < writer->object_count && writer->objects[n].client == i) {
			if (written)
				settle_object(writer, client, &writer->objects[n]);
			else if (!client->dead)
				client_cold_push(client, writer->objects[n].page >> CLUSTER_SHIFT);
			n++;
		}
		pthread_mutex_unlock(&client->gate);
		client_put(client);
	}
	writer->object_count = writer->client_count = 0;
}

/* ---- the writer ---- */

/* Write one segment of the group's coldest objects to writer->backend. False: there was nothing to write. */
static bool write_segment(struct writer *writer, struct group *group)
{
	struct engine *engine = writer->engine;
	unsigned count;
	int result;

	if (spill_segment_begin(engine->backends[writer->backend].spill, false, &writer->segment) < 0)
		return false;
	collect(writer, group);
	count = writer->object_count;
	if (count == 0) {
		spill_segment_abandon(writer->segment);
		settle(writer, false);
		return false;
	}
	crash_point(CRASH_WRITEBACK_COLLECTED);
	result = spill_segment_write(writer->segment);
	crash_point(CRASH_WRITEBACK_WRITTEN);
	if (result < 0)
		backend_write_failed(engine, writer->backend, result);
	settle(writer, result == 0);
	group_pool_changed(group);
	__atomic_fetch_add(&group->progress, result == 0 ? count : 0, __ATOMIC_RELAXED);
	engine_room_made(engine, group);
	return result == 0;
}

static bool write_one(struct writer *writer, struct group *group)
{
	struct engine *engine = writer->engine;
	int backend = backend_pick(engine);
	bool wrote;

	if (backend < 0)
		return false;
	writer->backend = (unsigned)backend;
	WRITE_ONCE(engine->backend_turn, writer->backend);
	wrote = write_segment(writer, group);
	backend_unpin(engine, writer->backend);
	return wrote;
}

static struct group *pick_group(struct engine *engine, unsigned *cursor)
{
	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		struct group *group = engine->groups[(*cursor + i) % GROUPS_MAX];

		if (group && group->client_count && needs_writeback(engine, group)) {
			group->users++;
			*cursor = (*cursor + i + 1) % GROUPS_MAX;
			return group;
		}
	}
	return NULL;
}

void *writer_main(void *argument)
{
	struct writer *writer = calloc(1, sizeof *writer);
	unsigned cursor = 0;
	uint64_t seen = 0;

	VS_CHECK(writer);
	writer->engine = argument;
	writer->objects = malloc(RECORDS_MAX * sizeof *writer->objects);
	VS_CHECK(writer->objects);
	while (!__atomic_load_n(&writer->engine->stopping, __ATOMIC_ACQUIRE)) {
		struct group *group = pick_group(writer->engine, &cursor);
		bool wrote;

		if (!group) {
			(void)drain_in_background(writer->engine);
			engine_wait_for_requests(writer->engine, &writer->engine->write_work, &writer->engine->write_requests,
						 &seen, IDLE_MS);
			continue;
		}
		wrote = write_one(writer, group);
		pthread_mutex_lock(&writer->engine->registry);
		group->users--;
		pthread_mutex_unlock(&writer->engine->registry);
		if (!wrote)
			sys_sleep_ms(5);
	}
	free(writer->objects);
	free(writer);
	return NULL;
}
