/* SPDX-License-Identifier: MIT */
/*
 * reclaim — make room: which group, which client, when to stop, when to give up.
 *
 * An evictor takes any group that is short (room below its reserve, or faults waiting) and evicts from
 * its clients, largest first, one batch at a time, until there is twice the reserve; then it has a turn at
 * what somebody asked for (pageout.h). Within a client
 * what is on probation goes first (order.h), then what its hand finds: once around the address space,
 * which for memory that was filled in order is first in, first out.
 *
 * When a pool is at its cap, room comes from the writers (writeback.c) if the group may spill, else
 * from kept copies. So it does below the cap when the evictors find nothing that can go: what is locked, pinned or
 * unmanaged takes of the limit what the cap would leave to the pool. When nothing gives room for OUT_OF_MEMORY_NS
 * while faults wait, or metadata takes nearly all of the limit, the group is out of memory: its largest member is
 * killed, and nobody else's.
 *
 * A group that is pressed (host.h) has less room, and is short earlier: copies of resident pages in its pool go first. When
 * nothing comes of it, it is let off; it is never out of memory for that.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "cow.h"
#include "engine_internal.h"
#include "evict.h"
#include "sys.h"

#define IDLE_MS 100
#define TORTURE_PAUSE_MS 1
#define PARKED_PAUSE_MS 10 /* while an agent does not answer, a stopped one, say, which may be for hours */
#define EVENT_PAUSE_US 100 /* an event is read in this, if the gate is open */
#define BATCHES_A_TURN 16
#define BATCHES_A_TURN_SHARED 2 /* one makes pages the client's own, the next takes them */
#define DROP_PAGES 64 /* kept copies given up in one go */
#define CLIENTS_A_TURN 16
#define HOST_STUCK_NS 1000000000ULL /* as long a pressed group may give nothing */
#define CROWDED_PARTS 8 /* metadata may take all of these parts of a limit but one */

/* ---- choosing ---- */

static bool is_short(const struct group *group)
{
	return !group_has_room(group, 1) || READ_ONCE(group->waiting) > 0;
}

/* A group with work to do, round robin, as one of its users; NULL when none. */
static struct group *pick_group(struct engine *engine, unsigned *cursor)
{
	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		struct group *group = engine->groups[(*cursor + i) % GROUPS_MAX];

		if (!group || group->client_count == 0 || group->flags & ENGINE_GROUP_REGIONS)
			continue;
		if (is_short(group) || group_is_to_give(group) || group->flags & ENGINE_GROUP_TORTURE ||
		    READ_ONCE(group->parked) > 0) {
			group->users++;
			*cursor = (*cursor + i + 1) % GROUPS_MAX;
			return group;
		}
	}
	return NULL;
}

/* The group's clients that can be evicted from, largest first, with a reference each. */
static unsigned pick_clients(struct engine *engine, struct group *group,
			     struct client *clients[static CLIENTS_A_TURN])
{
	int64_t sizes[CLIENTS_A_TURN], resident;
	unsigned count = 0;

	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++) {
		struct client *client = engine->clients[i];
		unsigned at;

		if (!client || client->group != group || !READ_ONCE(client->registered) ||
		    READ_ONCE(client->dead) || READ_ONCE(client->agent_gone) || READ_ONCE(client->leaving) ||
		    READ_ONCE(client->evict_error) ||
		    !__atomic_load_n(&client->ring, __ATOMIC_ACQUIRE))
			continue;
		resident = READ_ONCE(client->resident_pages);
		if (count == CLIENTS_A_TURN && sizes[count - 1] >= resident)
			continue;
		if (count == CLIENTS_A_TURN)
			clients[--count]->references--;
		for (at = count; at > 0 && sizes[at - 1] < resident; at--) {
			clients[at] = clients[at - 1];
			sizes[at] = sizes[at - 1];
		}
		sizes[at] = resident;
		clients[at] = client;
		client->references++;
		count++;
	}
	return count;
}

/* ---- out of memory ---- */

static struct client *largest_client(struct engine *engine, struct group *group)
{
	struct client *largest = NULL;
	int64_t most = 0, resident;

	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++) {
		struct client *client = engine->clients[i];

		if (!client || client->group != group || READ_ONCE(client->pid) <= 0 ||
		    READ_ONCE(client->dead) || READ_ONCE(client->leaving))
			continue;
		resident = READ_ONCE(client->resident_pages);
		if (!largest || resident > most) {
			largest = client;
			most = resident;
		}
	}
	if (largest)
		largest->references++;
	return largest;
}

void reclaim_kill_largest(struct engine *engine, struct group *group)
{
	struct client *client = largest_client(engine, group);
	struct engine_event event = { .kind = ENGINE_EVENT_OUT_OF_MEMORY, .group = group->number };

	if (!client)
		return;
	event.pid = client->pid;
	event.a = group_usage_bytes(group);
	event.b = group->limit_bytes;
	event.c = (uint64_t)max_of(READ_ONCE(client->resident_pages), 0) * PAGE_BYTES;
	counter_add(engine, out_of_memory_kills, 1);
	engine_event_push(engine, &event);
	sys_pidfd_kill(client->pidfd);
	client_put(client);
}

/* What its metadata leaves for pages is so little that they only change places: that goes on for ever. */
static bool is_crowded(const struct group *group)
{
	uint64_t metadata = (uint64_t)max_of(READ_ONCE(group->metadata_bytes), (int64_t)0);

	return metadata > READ_ONCE(group->limit_bytes) / CROWDED_PARTS * (CROWDED_PARTS - 1);
}

/* Nothing gave room in a whole turn: remember since when, and end it after a while. What writers gave counts, whenever
 * they gave it. */
static void note_stuck(struct engine *engine, struct group *group, bool progress)
{
	uint64_t now = sys_now_ns(), made = READ_ONCE(group->progress);
	bool starving = READ_ONCE(group->waiting) > 0 &&
			group_charge_room_bytes(group) < (int64_t)PAGE_BYTES;

	uint64_t since = READ_ONCE(group->stuck_since_ns);

	progress |= __atomic_exchange_n(&group->progress_seen, made, __ATOMIC_RELAXED) != made;
	if (!is_crowded(group) && (progress || !starving)) {
		WRITE_ONCE(group->stuck_since_ns, 0);
	} else if (since == 0) {
		WRITE_ONCE(group->stuck_since_ns, now);
		work_ask(&engine->writing);
	} else if (now > since + OUT_OF_MEMORY_NS &&
		   /* one of the evictors, not each of them */
		   __atomic_compare_exchange_n(&group->stuck_since_ns, &since, now, false,
					       __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
		reclaim_kill_largest(engine, group);
	}
}

/* A pressed group of which nothing can go, all of it is pinned, say, is let off: evictors would look for ever, and faults
 * that wait would end it, below its own limit. */
static void note_host_stuck(struct group *group, bool progress)
{
	uint64_t now = sys_now_ns(), since = READ_ONCE(group->host_stuck_since_ns);

	if (progress || !group_is_to_give(group))
		WRITE_ONCE(group->host_stuck_since_ns, 0);
	else if (since == 0)
		WRITE_ONCE(group->host_stuck_since_ns, now);
	else if (now > since + HOST_STUCK_NS)
		group_relieve(group, now);
}

/* ---- evicting ---- */

/* The group's budget of disk is used up, by copies of resident pages maybe: they take the room of what is to be written. */
static void give_up_spilled_copies(struct engine *engine, const struct group *group)
{
	if (READ_ONCE(group->flags) & ENGINE_GROUP_NO_SPILL)
		return;
	for (unsigned i = 0; i < READ_ONCE(engine->clients_end) && group_spill_room_bytes(group) < SEGMENT_BYTES; i++) {
		struct client *client = client_get_index(engine, i);

		if (!client)
			continue;
		if (client->group == group)
			(void)evict_drop_kept(client, SLOT_KEPT_SPILL, DROP_PAGES);
		client_put(client);
	}
}

/* Give up some of a client's copies of resident pages in the pool. False: it has none. */
static bool drop_copies(struct group *group, struct client *client)
{
	bool dropped = evict_drop_kept(client, SLOT_KEPT_POOL, DROP_PAGES) > 0;

	if (dropped)
		group_pool_changed(group);
	return dropped;
}

bool reclaim_pool_has_room(struct engine *engine, struct group *group, struct client *client)
{
	uint64_t cap = group_pool_cap_bytes(group);

	if (group_pool_taken_bytes(group) + POOL_SLAB_BYTES <= cap)
		return true;
	/* What is on the disk instead of a copy that saves nothing costs most. */
	if (group_gives_up_copies(group)) {
		bool dropped = drop_copies(group, client);

		WRITE_ONCE(group->kept_exhausted, !dropped);
		if (dropped)
			return true;
	}
	give_up_spilled_copies(engine, group);
	if (writeback_is_possible(engine, group)) {
		work_ask(&engine->writing);
		sys_sleep_ms(1);
		/* Only copies of resident pages are left: the cap was lowered, or they are all over its slabs. */
		if (client_is_warm(client))
			(void)drop_copies(group, client);
		return group_pool_taken_bytes(group) + POOL_SLAB_BYTES <= cap;
	}
	if (!drop_copies(group, client))
		group_pool_changed(group); /* by faults, maybe: the cap follows what is in it */
	/* Nothing to spill to: the cap only divides the budget; the limit itself is what counts,
	 * unless the user set a limit of the pool's own. */
	return group->pool_limit_bytes == 0 || group_pool_taken_bytes(group) + POOL_SLAB_BYTES <= cap;
}

static uint64_t torture_hand(const struct client *client)
{
	uint64_t random = sys_now_ns() * 0x9E3779B97F4A7C15ULL;
	const struct range *region;

	if (client->regions.count == 0)
		return 0;
	region = &client->regions.ranges[(random >> 33) % client->regions.count];
	return region->start + (random >> 7) % (region->end - region->start) / PAGE_BYTES * PAGE_BYTES;
}

/* Relatives let go what they share in turns, for it takes room in the pool, and in memory until all of them have. */
static unsigned batches_a_turn(const struct client *client)
{
	return READ_ONCE(client->pss) && !cow_is_alone(client) ? BATCHES_A_TURN_SHARED : BATCHES_A_TURN;
}

/* The host will see it, but a moment later. */
static bool is_pressed_for_nothing(struct engine *engine, const struct group *group)
{
	return group_is_pressed(group) && group_has_own_room(group) && host_is_useless(engine, group);
}

/* A turn of batches from one client. Returns pages evicted. */
static uint64_t evict_from(struct engine *engine, struct group *group, struct client *client,
			   struct evictor *evictor, bool desperate, uint64_t end_ns)
{
	uint64_t pages = 0;
	unsigned wraps = 0, batches = batches_a_turn(client);

	for (unsigned i = 0; i < batches && wraps < 2 && sys_now_ns() < end_ns; i++) {
		struct evict_result result;
		int error;
		bool torture = group->flags & ENGINE_GROUP_TORTURE;

		if (!reclaim_pool_has_room(engine, group, client) || is_pressed_for_nothing(engine, group))
			break;
		if (torture && !is_short(group)) {
			pthread_mutex_lock(&client->gate);
			client->hand = torture_hand(client);
			pthread_mutex_unlock(&client->gate);
			i = batches - 1;
		}
		error = evict_batch(client, evictor, desperate, &result);
		if (error == 0 || result.event_unread)
			pages += result.pages + result.untouched;
		if (error < 0) {
			if (result.event_unread && result.pages == 0)
				sys_sleep_us(EVENT_PAUSE_US);
			break;
		}
		wraps += result.wrapped;
		if (!torture && group_has_room(group, 2))
			break;
	}
	return pages;
}

/* Batches that were parked, of whatever client, small ones and such as nothing more is evicted from: its faults wait. */
static void resume_parked(struct engine *engine, const struct group *group, struct evictor *evictor)
{
	for (unsigned i = 0; i < READ_ONCE(engine->clients_end) && READ_ONCE(group->parked) > 0; i++) {
		struct client *client = client_get_index(engine, i);

		if (!client)
			continue;
		if (client->group == group && READ_ONCE(client->parked))
			(void)evict_resume(client, evictor);
		client_put(client);
	}
}

static void reclaim_group(struct engine *engine, struct group *group, struct evictor *evictor)
{
	struct client *clients[CLIENTS_A_TURN];
	unsigned count;
	uint64_t pages = 0, made = READ_ONCE(group->progress_seen);
	bool dropped = false;
	/* After a second without room even pages filled a moment ago must go. */
	uint64_t stuck_since_ns = READ_ONCE(group->stuck_since_ns);
	uint64_t now;
	bool desperate;

	resume_parked(engine, group, evictor);
	count = pick_clients(engine, group, clients);
	now = sys_now_ns();
	desperate = stuck_since_ns && now - stuck_since_ns > OUT_OF_MEMORY_NS / 3;
	for (unsigned i = 0; i < count; i++) {
		/* When nothing that is resident can go, copies of it are the first thing that does. */
		if ((stuck_since_ns || group_is_to_give(group)) && drop_copies(group, clients[i]))
			dropped = true;
		if (is_short(group) || group->flags & ENGINE_GROUP_TORTURE)
			pages += evict_from(engine, group, clients[i], evictor, desperate, now + EVICTOR_TURN_NS);
		client_put(clients[i]);
	}
	note_host_stuck(group, pages > 0 || dropped || READ_ONCE(group->progress) != made);
	note_stuck(engine, group, pages > 0);
	engine_room_made(engine, group);
	if (pages == 0 || group->flags & ENGINE_GROUP_TORTURE)
		sys_sleep_ms(pages == 0 && READ_ONCE(group->parked) > 0 ? PARKED_PAUSE_MS : TORTURE_PAUSE_MS);
}

void *evictor_main(void *argument)
{
	struct engine *engine = argument;
	struct evictor evictor = { 0 };
	unsigned cursor = 0;
	uint64_t seen = 0;

	VS_CHECK(evictor_create(&evictor) == 0);
	name_this_thread("vswap-evict");
	while (!__atomic_load_n(&engine->stopping, __ATOMIC_ACQUIRE)) {
		struct group *group = pick_group(engine, &cursor);

		sys_keep_off_cpus(awake_busy_cpus(&engine->awake, sys_now_ns()));
		if (group) {
			reclaim_group(engine, group, &evictor);
			pthread_mutex_lock(&engine->registry);
			group->users--;
			pthread_mutex_unlock(&engine->registry);
		}
		if (!pageout_turn(engine, &evictor) && !group)
			work_wait(&engine->evicting, &seen, &engine->stopping, IDLE_MS);
	}
	evictor_destroy(&evictor);
	return NULL;
}
