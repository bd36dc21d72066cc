/* SPDX-License-Identifier: MIT */
#include "evacuate.h"

#include <string.h>

#include "base.h"
#include "crash_point.h"
#include "sys.h"

#define CLUSTERS_A_TURN 16u
#define MOVES_A_TURN 32u /* a turn ends with the cluster in which there were so many */
#define WORK_NS 1000000ULL
#define SLACK_PART 4u /* of a pool: with less of it unused it is left alone */

/* ---- one page; the gate is held ---- */

/* The object that a page's slot, or the shared one behind it, names in the pool: into `object`. False: there is none to move. */
static bool object_of(struct client *client, struct slot word, struct slot *ret_copy, uint8_t object[static PAGE_BYTES])
{
	struct engine *engine = client->engine;
	bool shared = word.tag == SLOT_INDIRECT, found;

	if (!shared && word.tag != SLOT_POOL && word.tag != SLOT_KEPT_POOL)
		return false;
	if (shared)
		slot_share_lock(engine->slots);
	*ret_copy = shared ? slot_shared_peek(engine->slots, word.location)
			   : word.tag == SLOT_KEPT_POOL ? slot_unkept(word) : word;
	found = ret_copy->tag == SLOT_POOL && pool_is_evacuating(client->group->pool, ret_copy->location);
	if (found)
		memcpy(object, pool_object(engine->pool_space, ret_copy->location), ret_copy->units * POOL_UNIT_BYTES);
	if (shared)
		slot_share_unlock(engine->slots);
	return found;
}

/* Only then is the slot worth having: that of a cluster which relatives share would become the client's own by it. */
static bool may_be_moved(const struct client *client, uint64_t page)
{
	struct slot word = slot_peek(client->engine->slots, &client->record->map, page);

	return word.tag == SLOT_INDIRECT || ((word.tag == SLOT_POOL || word.tag == SLOT_KEPT_POOL) &&
					     pool_is_evacuating(client->group->pool, word.location));
}

/* Was it moved? */
static bool move_page(struct client *client, uint64_t page)
{
	struct engine *engine = client->engine;
	struct slot_map *map = &client->record->map;
	struct pool *pool = client->group->pool;
	uint8_t object[PAGE_BYTES];
	struct slot word, copy, to;
	uint64_t handle;
	bool done;

	if (!may_be_moved(client, page) || slot_get(engine->slots, map, page, &word) < 0 ||
	    !object_of(client, word, &copy, object) ||
	    pool_growth_bytes(pool, copy.units) > 0 || pool_store(pool, object, copy.units, &handle) < 0)
		return false; /* where others took the place that there was, it stays */
	to = copy;
	to.location = handle;
	crash_point(CRASH_EVACUATE_STORED);
	if (word.tag == SLOT_INDIRECT)
		done = slot_shared_migrate(engine->slots, word.location, copy, to);
	else
		done = slot_set(engine->slots, map, page, word.tag == SLOT_KEPT_POOL ? slot_kept(to) : to) == 0;
	crash_point(CRASH_EVACUATE_SETTLED_ONE);
	pool_free(pool, done ? copy.location : handle, copy.units);
	return done;
}

/* ---- a walk ---- */

/* From cluster *cursor on. False: that was the last turn. */
static bool move_clusters(struct client *client, uint64_t *cursor)
{
	struct slot_space *space = client->engine->slots;
	unsigned moved = 0;
	uint64_t first;
	bool more = true;
	SCOPED_LOCK(&client->gate);

	for (unsigned k = 0; more && k < CLUSTERS_A_TURN && moved < MOVES_A_TURN; k++) {
		more = !client->dead && !client_is_shut(client) &&
		       slot_map_next(space, &client->record->map, cursor, &first);
		for (unsigned i = 0; more && i < CLUSTER_PAGES; i++)
			moved += move_page(client, first + i);
	}
	client_metadata_changed(client); /* a shared cluster may have become its own */
	return more;
}

static void evacuate_client(struct client *client)
{
	uint64_t cursor = 0, rested_ns = sys_now_ns();

	while (move_clusters(client, &cursor) && !READ_ONCE(client->engine->stopping)) {
		if (sys_now_ns() - rested_ns < WORK_NS)
			continue;
		sys_sleep_ms(1);
		rested_ns = sys_now_ns();
	}
}

/* Bytes of slabs that could do with less; 0: it is not worth it. */
static uint64_t surplus_bytes(const struct pool *pool)
{
	uint64_t bytes = pool_bytes(pool), unused = bytes - min_of(pool_live_bytes(pool), bytes);

	return unused >= EVACUATE_BYTES_MIN && unused >= bytes / SLACK_PART ? unused : 0;
}

void evacuate_pool(struct engine *engine, struct group *group)
{
	uint64_t bytes = surplus_bytes(group->pool);

	if (bytes == 0)
		return;
	if (pool_evacuate(group->pool, bytes) > 0)
		for (unsigned i = 0; i < READ_ONCE(engine->clients_end); i++) {
			struct client *client = client_get_index(engine, i);

			if (client && client->group == group)
				evacuate_client(client);
			if (client)
				client_put(client);
		}
	pool_evacuate_end(group->pool);
	group_pool_changed(group);
	engine_room_made(engine, group);
}
