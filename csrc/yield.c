/* SPDX-License-Identifier: MIT */
#include "yield.h"

#include <errno.h>
#include <pthread.h>

#include "base.h"
#include "checkpoint.h"
#include "client.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "evict.h"
#include "fill.h"
#include "remap.h"
#include "sys.h"

#define STACK_BYTES (128 * 1024)
#define WAIT_MS 1
#define PAGES_AT_ONCE 64 /* room for so many is wanted before more are asked for */
#define STARVED_NS (OUT_OF_MEMORY_NS / 3) /* before the group is out of memory: others may be waiting as well */
#define RESIDENT_RANGES 64

struct yield {
	struct client *client;
	uint32_t number;
	uint64_t start, end;
	bool is_surveyed;
	uint64_t asked, stock;     /* cursors of slot_map_next: pages asked for, pages seen to be here */
	uint64_t starved_since_ns; /* 0: there is room */
	uint64_t progress;         /* the group's, then */
};

/* ---- the request; the client writes it, so it is read once ---- */

bool yield_holds(const struct client *client, uint64_t *ret_start, uint64_t *ret_end)
{
	const struct vswap_ring *ring = __atomic_load_n(&client->ring, __ATOMIC_ACQUIRE);

	if (!ring || __atomic_load_n(&ring->yield_asked, __ATOMIC_SEQ_CST) == READ_ONCE(ring->yield_over))
		return false;
	*ret_start = READ_ONCE(ring->yield_start);
	*ret_end = *ret_start + READ_ONCE(ring->yield_bytes);
	return *ret_start < *ret_end;
}

/* Whole pages of an address space, and none of the agent's: its staging stays registered. */
static bool is_sane(const struct client_record *record, uint64_t start, uint64_t end)
{
	return start < end && end <= address_of(ADDRESS_PAGES_MAX) && (start | end) % PAGE_BYTES == 0 &&
	       (end <= record->arena || start >= record->arena + record->arena_bytes);
}

/* ---- one look; the gate is held ---- */

/* The next part of the range, from `at` on, that is one mapping or none. Returns its end; 0: it cannot be seen now. */
static uint64_t next_part(const struct yield *yield, uint64_t at, bool *ret_is_anonymous)
{
	struct mapping mapping;
	int result = sys_mapping_next(yield->client->maps_fd, at, &mapping);

	*ret_is_anonymous = false;
	if (result < 0)
		return 0;
	if (result == 0 || mapping.start >= yield->end)
		return yield->end;
	if (mapping.start > at)
		return mapping.start;
	*ret_is_anonymous = mapping.anonymous && !mapping.shared;
	return min_of(mapping.end, yield->end);
}

/*
 * What is not ours has no slots: there are old ones in a forked child, where its parent had what it did not pass on. They
 * would be waited for, and filled into what is the program's. 0, -EAGAIN, or -errno: what is ours is not known.
 */
static int survey(const struct yield *yield)
{
	struct client *client = yield->client;
	bool is_anonymous;

	for (uint64_t at = yield->start, end; at < yield->end; at = end) {
		int result;

		end = next_part(yield, at, &is_anonymous);
		result = is_anonymous ? sys_userfaultfd_covers(client->events_fd, at) : 0;
		if (end == 0 || result < 0)
			return -EAGAIN;
		/* Another descriptor's is covered, too, but cannot be had. */
		result = result ? sys_userfaultfd_register(client->events_fd, at, end - at) : -EBUSY;
		/* A part of ours that was unmapped since would make all of it look like the program's. */
		if (result == -EBUSY && sys_userfaultfd_is_changing(client->events_fd))
			return -EAGAIN;
		if (result == -EBUSY)
			client_forget_slots(client, page_of(at), page_of(end - at));
		else if (result < 0)
			return result;
	}
	return 0;
}

static uint64_t pages_out(const struct yield *yield)
{
	struct slot_map *map = &yield->client->record->map;
	uint64_t cursor = 0, first, pages = 0;

	while (slot_map_next(yield->client->engine->slots, map, &cursor, &first))
		for (uint64_t page = max_of(first, page_of(yield->start));
		     page < min_of(first + CLUSTER_PAGES, page_of(yield->end)); page++) {
			struct slot slot;

			pages += slot_get(yield->client->engine->slots, map, page, &slot) == 0 && slot_is_swapped(slot.tag);
		}
	return pages;
}

static uint64_t pages_resident(const struct yield *yield)
{
	struct page_range ranges[RESIDENT_RANGES];
	uint64_t at = yield->start, pages = 0;
	int count = RESIDENT_RANGES;

	while (at < yield->end && count > 0) {
		count = sys_resident_ranges(yield->client->pagemap_fd, at, yield->end, ranges, RESIDENT_RANGES, 0, &at);
		for (int i = 0; i < count; i++)
			pages += page_of(ranges[i].end - ranges[i].start);
	}
	return pages;
}

/* What the program registers cannot be evicted: none of it is brought back for nothing. */
static bool is_too_large(const struct yield *yield)
{
	uint64_t pages = pages_out(yield);

	return pages > 0 && (pages + pages_resident(yield)) * PAGE_BYTES +
				    group_reserve_bytes(yield->client->group) > READ_ONCE(yield->client->group->limit_bytes);
}

/* Pages of a cluster that are out: 1; 0; or -EAGAIN. Poison that waits for its fault is put there now. */
static int look_at_cluster(const struct yield *yield, uint64_t first)
{
	struct client *client = yield->client;
	uint64_t page = max_of(first, page_of(yield->start)), end = min_of(first + CLUSTER_PAGES, page_of(yield->end));

	for (; page < end; page++) {
		struct slot slot;

		if (slot_get(client->engine->slots, &client->record->map, page, &slot) < 0 || slot_is_swapped(slot.tag))
			return 1;
		if (slot.tag == SLOT_POISONED &&
		    sys_userfaultfd_poison(client->events_fd, address_of(page), PAGE_BYTES) == -EAGAIN)
			return -EAGAIN;
	}
	return 0;
}

/* Nothing of the range is out: 0; 1 when something is; -EAGAIN. From where the last look ended, and then all of it once more. */
static int take_stock(struct yield *yield)
{
	struct client *client = yield->client;

	for (;;) {
		uint64_t cursor = yield->stock, first;
		bool is_whole = cursor == 0;

		while (slot_map_next(client->engine->slots, &client->record->map, &cursor, &first)) {
			int result = look_at_cluster(yield, first);

			if (result != 0)
				return result;
			yield->stock = cursor;
		}
		yield->stock = 0;
		if (is_whole)
			return 0;
	}
}

/* Something that was begun before may still touch the range, or say something about it. */
static bool is_busy(struct client *client, const struct yield *yield)
{
	if (client->populating && client_is_answered(client, client->populate_number))
		client->populating = false;
	return client_is_shut(client) || client->fork_pending || client->populating || client->resyncing ||
	       client->wiped_unknown || client->remap_count > 0 ||
	       fill_is_under_way(client, page_of(yield->start), page_of(yield->end)) ||
	       sys_userfaultfd_is_changing(client->events_fd);
}

static void forget_faults(struct client *client, const struct yield *yield)
{
	unsigned kept = 0;

	for (unsigned i = 0; i < client->deferred_count; i++) {
		uint64_t page = client->deferred[i].page;

		if (page < page_of(yield->start) || page >= page_of(yield->end))
			client->deferred[kept++] = client->deferred[i];
	}
	client->deferred_count = kept;
	(void)sys_userfaultfd_wake(client->events_fd, yield->start, yield->end - yield->start);
}

/* Every mapping of the range that is ours, or nobody's: the program's own stays as it is, though older kernels would let
 * us have that unregistered, too. 0 or -errno. */
static int unregister(const struct yield *yield)
{
	int events_fd = yield->client->events_fd, result = 0;
	bool is_anonymous;

	for (uint64_t at = yield->start, end; at < yield->end && (result == 0 || result == -EBUSY); at = end) {
		end = next_part(yield, at, &is_anonymous);
		if (end == 0)
			return -EAGAIN;
		result = is_anonymous ? sys_userfaultfd_register(events_fd, at, end - at) : 0;
		if (is_anonymous && result == 0)
			result = sys_userfaultfd_unregister(events_fd, at, end - at);
	}
	return result == -EBUSY ? 0 : result;
}

/* Steps 4 and 5. 0, -EAGAIN: it is ours again, for its mappings were changing; or -errno. */
static int let_go(struct yield *yield)
{
	struct client *client = yield->client;
	int result;

	forget_faults(client, yield);
	result = unregister(yield);
	crash_point(CRASH_YIELD_UNREGISTERED);
	if (result < 0)
		return result;
	if (sys_userfaultfd_is_changing(client->events_fd)) {
		/* What came there may have pages that are out. */
		(void)sys_userfaultfd_register(client->events_fd, yield->start, yield->end - yield->start);
		return -EAGAIN;
	}
	client_forget_slots(client, page_of(yield->start), page_of(yield->end - yield->start));
	remap_disarmed(client, yield->start, yield->end);
	checkpoint_write(client, 0);
	crash_point(CRASH_YIELD_LET_GO);
	return 0;
}

/* Whether pages may be asked for: 0, -EAGAIN, or -ENOMEM when for a while evictors have found no room beside what is
 * here already. A fault without room would count as one of the program's, and end it. */
static int want_room(struct yield *yield)
{
	struct group *group = yield->client->group;
	uint64_t now = sys_now_ns(), progress = READ_ONCE(group->progress);

	if (group_room_bytes(group) >= (int64_t)(PAGES_AT_ONCE * PAGE_BYTES)) {
		yield->starved_since_ns = 0;
		return 0;
	}
	if (yield->starved_since_ns == 0 || progress != yield->progress)
		yield->starved_since_ns = now;
	yield->progress = progress;
	work_ask(&yield->client->engine->evicting);
	return now - yield->starved_since_ns > STARVED_NS ? -ENOMEM : -EAGAIN;
}

/* 0: the range is let go. -EAGAIN: not yet. Or -errno. */
static int advance(struct yield *yield)
{
	struct client *client = yield->client;
	int result;

	if (READ_ONCE(client->dead))
		return -ESRCH;
	/* Again and again: memory that is moved into it would be evicted from. */
	remap_withdraw(client, yield->start, yield->end);
	checkpoint_write(client, 0);
	crash_point(CRASH_YIELD_WITHDRAWN);
	if (is_busy(client, yield))
		return -EAGAIN;
	result = yield->is_surveyed ? 0 : survey(yield);
	if (result == 0 && !yield->is_surveyed && is_too_large(yield))
		return -ENOMEM;
	yield->is_surveyed = result == 0;
	if (result == 0)
		result = take_stock(yield);
	if (result == 0)
		return let_go(yield);
	if (result > 0)
		result = want_room(yield);
	if (result < 0)
		return result;
	engine_ask_for_range(client, &yield->asked, page_of(yield->start), page_of(yield->end));
	return -EAGAIN;
}

/* ---- the thread ---- */

static void answer(const struct yield *yield, int result)
{
	struct vswap_ring *ring = yield->client->ring;

	WRITE_ONCE(ring->yield_error, (uint32_t)-result);
	__atomic_store_n(&ring->yield_answered, yield->number, __ATOMIC_SEQ_CST);
	sys_futex_wake(&ring->yield_answered);
}

static void note_refused(const struct yield *yield)
{
	struct client *client = yield->client;
	struct engine_event event = { .kind = ENGINE_EVENT_YIELD_REFUSED, .pid = client->pid,
				      .group = client->group->number, .a = yield->end - yield->start };

	engine_event_push(client->engine, &event);
}

static void *yield_main(void *argument)
{
	struct client *client = argument;
	struct yield yield = { .client = client, .number = READ_ONCE(client->ring->yield_asked) };
	int result = -EBUSY;

	name_this_thread("vswap-yield");
	if (yield_holds(client, &yield.start, &yield.end) && is_sane(client->record, yield.start, yield.end))
		do {
			pthread_mutex_lock(&client->gate);
			result = client_is_shut(client) ? -EAGAIN : advance(&yield);
			pthread_mutex_unlock(&client->gate);
			if (result != -EAGAIN)
				break;
			client_wake(client);
			sys_sleep_ms(WAIT_MS);
		} while (!READ_ONCE(client->engine->stopping));
	if (result == -ENOMEM)
		note_refused(&yield);
	if (result != -EAGAIN) /* of a daemon that stops: its successor answers */
		answer(&yield, result);
	__atomic_store_n(&client->yielding, false, __ATOMIC_RELEASE);
	client_put(client);
	return NULL;
}

void yield_look(struct client *client)
{
	pthread_attr_t attributes;
	pthread_t thread;

	if (READ_ONCE(client->ring->yield_asked) == READ_ONCE(client->ring->yield_answered) ||
	    __atomic_load_n(&client->yielding, __ATOMIC_ACQUIRE))
		return;
	if (!client_get_index(client->engine, client->index))
		return; /* buried */
	client->yielding = true;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	if (pthread_create(&thread, &attributes, yield_main, client) != 0) { /* at the next look again */
		client->yielding = false;
		client_put(client);
	}
	pthread_attr_destroy(&attributes);
}
