/* SPDX-License-Identifier: MIT */
/*
 * writeback — cold objects leave the pool for a backend, as they are.
 *
 * A writer thread for each backend, so that a device that hangs keeps nobody else from writing. It works while a pool
 * that may spill is near its cap, or its group finds nothing else that gives room (reclaim.c) or is pressed (host.h),
 * and no backend of a higher priority can take what leaves it: it takes the clusters that were stored longest ago, packs
 * their objects into a segment, writes the segment, and only when the write has returned changes the slots and frees the
 * objects. Neighbours in memory become neighbours in the segment, so a run of faults is one read. When there is nothing to
 * write it compacts (drain.c).
 * Backends of one priority are written to at the same time, each as fast as it is, or as its rate allows.
 * A group may be without writeback, or have a budget of bytes on backends; a file whose file system is full is left alone
 * until there is room for a segment.
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
#include "tier.h"

#define RECORDS_MAX 8192
#define IDLE_MS 100
#define REST_MS 50 /* between two looks for its end */
#define STACK_BYTES (256 * 1024)
#define RELIST_NS 1000000000ULL /* between two walks over a client's slots */
#define RELIST_CLUSTER_NS 20000ULL /* ... and five times as long as it takes to look at what they found */

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
	pthread_t thread;
	bool has_begun, stopping;
	unsigned backend; /* once it has begun */
	struct spill_segment *segment;
	struct moved_object *objects;
	unsigned object_count;
	struct client *clients[CLIENTS_MAX];
	unsigned client_count;
	unsigned next; /* index of the client whose turn it is */
};

static uint64_t margin_bytes(const struct group *group)
{
	return max_of(group_pool_cap_bytes(group) / 32, 2ULL << 20);
}

/* Once it has begun it goes on until the pool is below the accept threshold, so that it does not begin all the time. */
static bool needs_writeback(struct engine *engine, struct group *group)
{
	uint64_t cap = group_pool_cap_bytes(group), begin = cap - min_of(cap, margin_bytes(group));
	uint64_t end = min_of(begin, cap / 100 * engine->accept_percent);
	bool needs;

	if (READ_ONCE(group->stuck_since_ns) || group_is_to_give(group))
		return pool_bytes(group->pool) > 0 && writeback_is_possible(engine, group);
	/* Under random access kept copies go first (reclaim.c). */
	if (group_gives_up_copies(group) && !READ_ONCE(group->kept_exhausted))
		return false;
	needs = group_pool_taken_bytes(group) > (READ_ONCE(group->writes_back) ? end : begin);
	WRITE_ONCE(group->writes_back, needs);
	return needs && writeback_is_possible(engine, group);
}

bool writeback_is_possible(struct engine *engine, const struct group *group)
{
	int backend;

	if (READ_ONCE(group->flags) & ENGINE_GROUP_NO_SPILL || group_spill_room_bytes(group) < SEGMENT_BYTES)
		return false;
	backend = backend_pick(engine);
	if (backend >= 0)
		backend_unpin(engine, (unsigned)backend);
	return backend >= 0;
}

/* ---- collecting; the client's gate is held ---- */

/* Put one page's object into the segment, if it is, or is not, an incompressible one: 0, -ENOSPC when the segment is
 * full, 1: nothing to write. */
static int collect_page(struct writer *writer, struct client *client, uint64_t page, bool is_raw)
{
	struct engine *engine = writer->engine;
	struct moved_object *object = &writer->objects[writer->object_count];
	int64_t extent;
	bool shared, wanted;

	if (slot_get(engine->slots, &client->record->map, page, &object->word) < 0)
		return 1;
	shared = object->word.tag == SLOT_INDIRECT;
	if (!shared && object->word.tag != SLOT_POOL)
		return 1;
	if (shared)
		slot_share_lock(engine->slots);
	object->copy = shared ? slot_shared_peek(engine->slots, object->word.location) : object->word;
	extent = 1;
	wanted = object->copy.tag == SLOT_POOL && (object->copy.units == POOL_UNITS_MAX) == is_raw;
	if (wanted) {
		const void *bytes = pool_object(engine->pool_space, object->copy.location);

		object->is_recompressed = codec_is_zstd(bytes, object->copy.units);
		extent = spill_segment_add(writer->segment, (uint64_t)client->index << 40 | page, bytes,
					   object->copy.units);
	}
	if (shared)
		slot_share_unlock(engine->slots);
	if (!wanted)
		return 1;
	if (extent < 0)
		return (int)extent;
	object->page = page;
	object->extent = (uint64_t)extent;
	object->client = writer->client_count - 1;
	writer->object_count++;
	return 0;
}

/* All of one cluster, of the kind that its list is of. -ENOSPC: the segment is full, the rest of the cluster is for later. */
static int collect_cluster(struct writer *writer, struct client *client, bool is_raw)
{
	uint64_t number;
	int result = 1;

	SCOPED_LOCK(&client->gate);
	if (client->dead || client_is_shut(client) ||
	    !cold_pop(is_raw ? &client->cold_raw : &client->cold, &number))
		return 1;
	for (unsigned i = 0; i < CLUSTER_PAGES; i++) {
		if (writer->object_count == RECORDS_MAX)
			result = -ENOSPC;
		else
			result = collect_page(writer, client, number * CLUSTER_PAGES + i, is_raw);
		if (result == -ENOSPC) {
			client_cold_push(client, number, is_raw);
			return -ENOSPC;
		}
	}
	return 0;
}

/* False: the segment is full. */
static bool collect_clusters(struct writer *writer, struct client *client, unsigned max, bool is_raw)
{
	int result = 0;

	for (unsigned k = 0; k < max && result == 0; k++)
		result = collect_cluster(writer, client, is_raw);
	return result != -ENOSPC;
}

static void collect(struct writer *writer, struct group *group)
{
	struct client *clients[64];
	unsigned count = client_list_cold(writer->engine, group, writer->next, clients, 64);
	/* A turn of 16 MiB of address space each, so that several clients age alike. */
	unsigned max = count > 1 ? 32 : RECORDS_MAX;
	bool has_room = true;

	for (unsigned i = 0; i < count; i++) {
		writer->clients[writer->client_count++] = clients[i];
		if (!has_room)
			continue;
		writer->next = clients[i]->index + 1;
		/* In the pool an incompressible page takes what it would as a resident one: it goes first. */
		has_room = collect_clusters(writer, clients[i], max, true) &&
			   collect_clusters(writer, clients[i], max, false);
	}
}

/*
 * Clusters of the map with something in the pool that no list has: a forked child shares its parent's pages, mremap moves
 * them, and memory for an entry may be lacking. They are found when nothing else is left, not often, for all of the map is
 * listed.
 */
static void list_anew(struct writer *writer, struct client *client)
{
	struct slot_map *map = &client->record->map;
	uint64_t now_ns = sys_now_ns(), cursor = 0, first;

	SCOPED_LOCK(&client->gate);
	if (client->dead || client_is_shut(client) || now_ns < client->relist_ns || !client_is_warm(client) ||
	    slot_map_count(map, SLOT_POOL) + slot_map_count(map, SLOT_INDIRECT) == 0)
		return;
	client->relist_ns = now_ns + RELIST_NS + map->cluster_count * RELIST_CLUSTER_NS;
	while (slot_map_next(writer->engine->slots, map, &cursor, &first)) {
		client_cold_push(client, first >> CLUSTER_SHIFT, true);
		counter_add(writer->engine, writeback_relisted, 1);
	}
}

static void list_group_anew(struct writer *writer, const struct group *group)
{
	for (unsigned i = 0; i < READ_ONCE(writer->engine->clients_end); i++) {
		struct client *client = client_get_index(writer->engine, i);

		if (!client)
			continue;
		if (client->group == group)
			list_anew(writer, client);
		client_put(client);
	}
}

/* ---- settling ---- */

static void settle_object(struct writer *writer, struct client *client,
			  const struct moved_object *object)
{
	struct engine *engine = writer->engine;
	struct slot to = object->copy, word = { .tag = SLOT_NONE };
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
		if (word.tag == SLOT_POOL || word.tag == SLOT_INDIRECT) /* compressed again meanwhile, or out again */
			client_cold_push(client, object->page >> CLUSTER_SHIFT, object->copy.units == POOL_UNITS_MAX);
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
				client_cold_push(client, writer->objects[n].page >> CLUSTER_SHIFT,
						 writer->objects[n].copy.units == POOL_UNITS_MAX);
			n++;
		}
		pthread_mutex_unlock(&client->gate);
		client_put(client);
	}
	writer->object_count = writer->client_count = 0;
}

/* ---- a writer ---- */

/* Write one segment of the group's coldest objects to the backend, which is pinned. False: there was nothing to write,
 * or it could not be. */
static bool write_segment(struct writer *writer, struct spill *spill, struct group *group)
{
	struct engine *engine = writer->engine;
	unsigned count;
	int result;

	if (spill_segment_begin(spill, false, &writer->segment) < 0)
		return false;
	collect(writer, group);
	count = writer->object_count;
	if (count == 0) {
		spill_segment_abandon(writer->segment);
		settle(writer, false);
		list_group_anew(writer, group);
		return false;
	}
	crash_point(CRASH_WRITEBACK_COLLECTED);
	result = backend_write_segment(engine, writer->backend, writer->segment);
	crash_point(CRASH_WRITEBACK_WRITTEN);
	settle(writer, result == 0);
	group_pool_changed(group);
	__atomic_fetch_add(&group->progress, result == 0 ? count : 0, __ATOMIC_RELAXED);
	__atomic_fetch_add(&group->written_pages, result == 0 ? count : 0, __ATOMIC_RELAXED);
	engine_room_made(engine, group);
	return result == 0;
}

static struct group *pick_group(struct engine *engine, unsigned *cursor)
{
	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		struct group *group = engine->groups[(*cursor + i) % GROUPS_MAX];

		if (group && group->client_count && needs_writeback(engine, group)) {
			group->users++;
			WRITE_ONCE(group->segments_under_way, group->segments_under_way + 1);
			*cursor = (*cursor + i + 1) % GROUPS_MAX;
			return group;
		}
	}
	return NULL;
}

static bool is_stopping(const struct writer *writer)
{
	return __atomic_load_n(&writer->stopping, __ATOMIC_ACQUIRE) ||
	       __atomic_load_n(&writer->engine->stopping, __ATOMIC_ACQUIRE);
}

/* Until its rate allows another segment. It is not pinned meanwhile. */
static void rest(struct writer *writer)
{
	const struct backend *backend = &writer->engine->backends[writer->backend];
	uint64_t now_ns, end_ns;

	while ((now_ns = sys_now_ns()) < (end_ns = READ_ONCE(backend->write_next_ns)) && !is_stopping(writer))
		sys_sleep_ms((unsigned)min_of((end_ns - now_ns) / 1000000 + 1, (uint64_t)REST_MS));
}

/* False: no pool is to be written from, or the backend is not to be written to. */
static bool write_one(struct writer *writer, unsigned *cursor)
{
	struct engine *engine = writer->engine;
	struct spill *spill;
	struct group *group;
	bool wrote = false;

	rest(writer);
	spill = backend_pin_to_write(engine, writer->backend);
	group = spill ? pick_group(engine, cursor) : NULL;
	if (group) {
		WRITE_ONCE(engine->backend_turn, writer->backend);
		wrote = write_segment(writer, spill, group);
		pthread_mutex_lock(&engine->registry);
		WRITE_ONCE(group->segments_under_way, group->segments_under_way - 1);
		group->users--;
		pthread_mutex_unlock(&engine->registry);
	}
	if (spill)
		backend_unpin(engine, writer->backend);
	if (group && !wrote)
		sys_sleep_ms(5);
	return group != NULL;
}

static void *writer_main(void *argument)
{
	struct writer *writer = argument;
	struct engine *engine = writer->engine;
	unsigned cursor = 0;
	uint64_t seen = 0;

	name_this_thread("vswap-write");
	while (!is_stopping(writer)) {
		if (__atomic_load_n(&writer->has_begun, __ATOMIC_ACQUIRE)) {
			bool wrote, moved;

			do {
				wrote = write_one(writer, &cursor);
				moved = tier_demote(engine, writer->backend);
			} while (!is_stopping(writer) && (wrote || moved));
			(void)drain_in_background(engine, writer->backend);
		}
		work_wait(&engine->writing, &seen, &engine->stopping, IDLE_MS);
	}
	return NULL;
}

int writer_create(struct engine *engine, struct writer **ret_writer)
{
	struct writer *writer = calloc(1, sizeof *writer);
	pthread_attr_t attributes;
	int error = ENOMEM;

	if (!writer)
		return -ENOMEM;
	writer->engine = engine;
	writer->objects = malloc(RECORDS_MAX * sizeof *writer->objects);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	if (writer->objects)
		error = pthread_create(&writer->thread, &attributes, writer_main, writer);
	pthread_attr_destroy(&attributes);
	if (error) {
		free(writer->objects);
		free(writer);
		return -error;
	}
	*ret_writer = writer;
	return 0;
}

void writer_begin(struct writer *writer, unsigned number)
{
	writer->backend = number;
	writer->engine->backends[number].writer = writer;
	__atomic_store_n(&writer->has_begun, true, __ATOMIC_RELEASE);
}

void writer_destroy(struct writer *writer)
{
	if (!writer)
		return;
	__atomic_store_n(&writer->stopping, true, __ATOMIC_RELEASE);
	work_ask(&writer->engine->writing);
	pthread_join(writer->thread, NULL);
	free(writer->objects);
	free(writer);
}
