/* SPDX-License-Identifier: MIT */
/*
 * look — see what clients really hold, and bring their regions under management in time.
 *
 * While a group is far from its limit its processes are native: nothing is registered, a look is one
 * read of /proc/PID/statm. Between two looks programs can fill engine_fill_bytes_per_ms(), so the interval
 * is half the group's distance to its register mark divided by that, between LOOK_MS_MIN and LOOK_MS_MAX.
 * At the mark, or where it would be passed AHEAD_NS from now if the group went on growing as since the
 * last look, every large anonymous private writable mapping of every client is registered; from then
 * on first touches come to the fault threads, and a change of the process's size means new mappings
 * to discover.
 *
 * Whoever registers waits for the program's page faults that are under way, and on a busy machine one may have lost its
 * CPU for tens of milliseconds, in which all the other programs grow. So each client's regions are registered, and what
 * it leaves is freed, by a thread of its own (worker.c), and the look thread waits for nobody.
 *
 * Never registered: stacks (the main one, and what looks like a thread's: directly above a small
 * inaccessible guard), the agent's arena, shared, file and special mappings, and what is smaller
 * than REGION_BYTES_MIN. What registration refuses (another userfaultfd, mlocked later) stays native.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "base.h"
#include "checkpoint.h"
#include "cow.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "fault_point.h"
#include "remap.h"
#include "sys.h"
#include "yield.h"

#define LOOK_MS_MIN 1
#define LOOK_MS_MAX 50
#define AHEAD_NS 2000000LL             /* a look that comes late, and what it takes to register */
#define REGION_BYTES_MIN (256UL << 10)
#define GUARD_BYTES_MAX (64UL << 10)
#define THREAD_STACK_BYTES (8UL << 20)
#define ZERO_RANGES 64
#define ZERO_CALLS_MAX 64 /* of a region in scraps the rest is left as it is: each range is a system call */
#define DISCOVER_NS 20000000ULL
#define ASKED_COST_FACTOR 4 /* between discoveries that were asked for: so many times what the last one took */
#define SHARED_LIMIT_PART 4u /* so large a part of the limit is worth a line */
#define SHARED_BYTES_MIN (16UL << 20)
#define SHARED_NS 200000000ULL /* what is not private is of files, most often: not to be asked at each look */
#define ASKED_DISCOVER 1u
#define ASKED_ADAPT 2u
#define ASKED_BURY 4u
#define DISCOVER_MAX 100000 /* mappings looked at in one discovery */

/* ---- discovery; the gate is held ---- */

static bool is_candidate(const struct client *client, const struct mapping *mapping)
{
	const struct client_record *record = client->record;

	return mapping->anonymous && !mapping->shared && mapping->readable && mapping->writable &&
	       (mapping->name[0] != '[' || strcmp(mapping->name, "[heap]") == 0 ||
		strncmp(mapping->name, "[anon", 5) == 0) &&
	       mapping->name[0] != '/' &&
	       (mapping->end <= record->arena || mapping->start >= record->arena + record->arena_bytes);
}

/* Part of a mapping that may be registered: all of it, less a thread's stack at its start. */
static uint64_t registrable_start(const struct client *client, const struct mapping *before,
				  const struct mapping *mapping)
{
	/* The arena ends in a guard as well, and what lies behind it may be anything. */
	bool guarded = mapping->start != client->record->arena + client->record->arena_bytes &&
		       before->end == mapping->start && !before->readable && !before->writable &&
		       before->anonymous && before->end - before->start <= GUARD_BYTES_MAX;

	return guarded ? min_of(mapping->end, mapping->start + THREAD_STACK_BYTES) : mapping->start;
}

/*
 * Zero pages that are mapped already (memory that was only read so far, MADV_POPULATE_READ) become memory when they
 * are written to, and nothing is missing then: no fault would tell, for as much as the region is large. Protected,
 * they fault. What cannot be protected, for an event is unread, is seen at the looks.
 */
void look_protect_zero_pages(const struct client *client, uint64_t start, uint64_t end)
{
	struct page_range ranges[ZERO_RANGES];
	int count = ZERO_RANGES;

	for (unsigned calls = 0; calls < ZERO_CALLS_MAX && start < end && count > 0; calls++) {
		count = sys_zero_ranges(client->pagemap_fd, start, end, ranges, ZERO_RANGES, &start);
		for (int i = 0; i < count; i++)
			(void)sys_userfaultfd_protect(client->events_fd, ranges[i].start,
						      ranges[i].end - ranges[i].start);
	}
}

/*
 * After REGISTER: what is there now? The mapping may have been replaced since it was read. Anonymous
 * pieces join the regions; a piece that is not (registration takes shared memory too) is let go. Never
 * more than such a piece: an UNREGISTER of anonymous memory would make swapped pages read as zeros.
 */
static uint64_t adopt_pieces(struct client *client, uint64_t start, uint64_t end, bool is_new)
{
	struct mapping mapping;
	uint64_t bytes = 0;

	for (uint64_t at = start; at < end; at = mapping.end) {
		uint64_t first, last;

		if (sys_mapping_next(client->maps_fd, at, &mapping) != 1 || mapping.start >= end)
			break;
		first = max_of(at, mapping.start);
		last = min_of(end, mapping.end);
		if (!mapping.anonymous || mapping.shared)
			(void)sys_userfaultfd_unregister(client->events_fd, first, last - first);
		else {
			remap_armed(client, first, last);
			look_protect_zero_pages(client, first, last);
			if (is_new)
				cow_note_registered(client, first, last);
			if (range_set_add(&client->regions, first, last, mapping.executable ? 1 : 0,
					  REGIONS_MAX) == 0)
				bytes += last - first;
		}
	}
	return bytes;
}

static uint64_t register_region(struct client *client, uint64_t start, uint64_t end, uint64_t protection)
{
	const struct range *known = range_set_at(&client->regions, start);
	int covered;

	if (end - start < REGION_BYTES_MIN)
		return 0;
	if (known && known->start <= start && known->end >= end && known->value == protection)
		return 0;
	covered = sys_userfaultfd_covers(client->events_fd, start);
	if (covered < 0)
		return 0;
	/* New here, so nothing that is known of these addresses is about it: a forked child has its parent's
	 * slots, but not the mappings with MADV_DONTFORK, in whose place it may map something. Before
	 * REGISTER: once registered, what is left there would be taken for its own, by a successor too. */
	if (!covered)
		slot_map_clear(client->engine->slots, &client->record->map, page_of(start), page_of(end),
			       client_staged_gone, client_free_copy, client);
	crash_point(CRASH_REGISTER_CLEARED);
	(void)fault_point("look/register");
	if (sys_userfaultfd_register(client->events_fd, start, end - start) < 0)
		return 0;
	crash_point(CRASH_REGISTERED);
	return adopt_pieces(client, start, end, !covered);
}

/* But for what is being given up (yield.h). */
static uint64_t register_around(struct client *client, uint64_t start, uint64_t end, uint64_t protection)
{
	uint64_t held_start, held_end, bytes = 0;

	if (!yield_holds(client, &held_start, &held_end) || held_start >= end || held_end <= start)
		return register_region(client, start, end, protection);
	if (start < held_start)
		bytes += register_region(client, start, held_start & ~(PAGE_BYTES - 1), protection);
	if (held_end < end)
		bytes += register_region(client, (held_end + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1), end, protection);
	return bytes;
}

void look_discover(struct client *client)
{
	struct mapping before = { 0 }, mapping = { 0 };
	uint64_t bytes = 0;
	bool first = !client->registered;
	int count = 0;

	/* A forked child has its parent's regions, and some may not be registered here: a page moved out of
	 * such a one would read as zeros. Only what this registers counts. */
	if (first)
		range_set_clear(&client->regions);
	for (uint64_t at = 0; count < DISCOVER_MAX; at = mapping.end, before = mapping, count++) {
		uint64_t start;

		if (sys_mapping_next(client->maps_fd, at, &mapping) != 1)
			break;
		if (!is_candidate(client, &mapping))
			continue;
		start = registrable_start(client, &before, &mapping);
		if (start < mapping.end)
			bytes += register_around(client, start, mapping.end, mapping.executable ? 1 : 0);
	}
	WRITE_ONCE(client->registered, true);
	checkpoint_write(client, 0);
	if (first) {
		struct engine_event event = { .kind = ENGINE_EVENT_REGISTERED, .pid = client->pid,
					      .group = client->group->number,
					      .a = client->regions.count, .b = bytes };

		engine_event_push(client->engine, &event);
	}
}

/* What the group would grow by in AHEAD_NS, going on as since the last look. */
static int64_t ahead_bytes(const struct group *group, int64_t room)
{
	int64_t grown = READ_ONCE(group->looked_room_bytes) - room;
	int64_t since = (int64_t)(sys_now_ns() - READ_ONCE(group->looked_ns));

	return grown > 0 ? grown * AHEAD_NS / max_of(since, AHEAD_NS / 2) : 0;
}

static bool is_near(const struct group *group)
{
	int64_t room = group_room_bytes(group);

	return group->flags & ENGINE_GROUP_TORTURE ||
	       room < (int64_t)group_register_bytes(group) + ahead_bytes(group, room);
}

void look_at_new(struct client *client)
{
	if (is_near(client->group) && !client->dead && !client_is_shut(client))
		look_discover(client);
}

/* ---- sizes ---- */

void look_set_resident(struct client *client, int64_t pages, int64_t growth_pages)
{
	client_set_resident(client, pages, growth_pages);
	/* Buried since its size was read: what was just added would stay with the group for ever. */
	if (__atomic_load_n(&client->dead, __ATOMIC_SEQ_CST))
		client_set_resident(client, 0, 0);
}

/* Its first thread has ended, or all of it. */
static bool look_through_another_thread(struct client *client)
{
	pid_t thread = sys_live_thread(client->pid);
	int fd = thread > 0 ? sys_open_proc(thread, "statm") : -1;

	if (fd < 0)
		return false;
	client->thread = thread;
	(void)dup3(fd, client->statm_fd, O_CLOEXEC);
	close(fd);
	return true;
}

/* Shared memory is not ours to swap, and whoever has much of it should know. Said of a group again when it has grown
 * fourfold. */
static void tell_of_shared(struct client *client, uint64_t other_pages)
{
	struct group *group = client->group;
	uint64_t least_bytes = max_of(max_of(READ_ONCE(group->limit_bytes) / SHARED_LIMIT_PART, SHARED_BYTES_MIN),
				      4 * group->shared_bytes_told);
	struct engine_event event = { .kind = ENGINE_EVENT_SHARED, .pid = client->pid, .group = group->number };

	if (client->pid <= 0 || other_pages * PAGE_BYTES < least_bytes || sys_now_ns() < client->shared_next_ns)
		return;
	client->shared_next_ns = sys_now_ns() + SHARED_NS;
	if (sys_shared_bytes(client->thread ? client->thread : client->pid, &event.a) < 0 || event.a < least_bytes)
		return;
	group->shared_bytes_told = event.a;
	engine_event_push(client->engine, &event);
}

/* One look at one client. Returns its VmSize in pages, 0 when it cannot be seen. */
static uint64_t look_at_size(struct client *client)
{
	struct process_size size;
	int statm_fd = __atomic_load_n(&client->statm_fd, __ATOMIC_ACQUIRE);

	if (statm_fd < 0 || sys_statm(statm_fd, &size) < 0)
		return 0;
	if (size.pages == 0 && look_through_another_thread(client) && sys_statm(client->statm_fd, &size) < 0)
		return 0;
	if (READ_ONCE(client->pss))
		cow_look(client, size.anonymous_pages);
	else
		look_set_resident(client, (int64_t)size.anonymous_pages, 0);
	tell_of_shared(client, size.other_pages);
	return size.pages;
}

/* Whoever asks again and again costs this thread, which looks at others too, no more than a part of its time. */
static bool discovery_is_asked(const struct client *client, uint64_t now)
{
	return READ_ONCE(client->ring->discovery_asked) && now >= READ_ONCE(client->discover_asked_ns);
}

/* Those who wait for one know by its number which began after they had made their mapping. */
static void discover_counted(struct client *client)
{
	struct vswap_ring *ring = client->ring;

	WRITE_ONCE(ring->discovery_asked, 0);
	__atomic_store_n(&ring->discoveries, ++client->discoveries, __ATOMIC_SEQ_CST);
	look_discover(client);
	__atomic_store_n(&ring->discoveries, ++client->discoveries, __ATOMIC_SEQ_CST);
	sys_futex_wake(&ring->discoveries);
}

/* What may take long, or has to wait, is for a fault thread of the client; what it cannot do now is asked for again. */
static void ask(struct client *client, unsigned what)
{
	__atomic_fetch_or(&client->look_asked, what, __ATOMIC_RELEASE);
	client_wake(client);
}

static void look_at_client(struct client *client, uint64_t now)
{
	bool serving = __atomic_load_n(&client->serving, __ATOMIC_ACQUIRE);
	uint64_t size = READ_ONCE(client->dead) ? 0 : look_at_size(client);
	bool near = is_near(client->group), discover, adapt;

	/* Not to be seen, or nobody would tell us: is its address space still there? */
	if ((size == 0 || READ_ONCE(client->agent_gone)) && serving && !READ_ONCE(client->dead) &&
	    sys_userfaultfd_is_gone(client->events_fd))
		ask(client, ASKED_BURY);
	if (size == 0 || READ_ONCE(client->dead) || !serving ||
	    !__atomic_load_n(&client->ring, __ATOMIC_ACQUIRE))
		return;
	WRITE_ONCE(client->ring->beat, (uint32_t)(now / 1000000));
	yield_look(client);
	if (READ_ONCE(client->ring->is_near) != near)
		WRITE_ONCE(client->ring->is_near, near);
	adapt = cow_is_due(client);
	if (!READ_ONCE(client->registered) && !near && !adapt)
		return;
	discover = !READ_ONCE(client->registered) || size != READ_ONCE(client->size_pages_seen) ||
		   now >= READ_ONCE(client->discover_next_ns) || discovery_is_asked(client, now);
	if (!discover && !adapt)
		return;
	WRITE_ONCE(client->size_pages, size);
	ask(client, (discover ? ASKED_DISCOVER : 0) | (adapt ? ASKED_ADAPT : 0));
}

/* What of this was asked for. */
static unsigned take_asked(struct client *client, unsigned what)
{
	return READ_ONCE(client->look_asked) & what
		       ? __atomic_fetch_and(&client->look_asked, ~what, __ATOMIC_ACQUIRE) & what
		       : 0;
}

void look_serve(struct client *client)
{
	unsigned asked = take_asked(client, ASKED_DISCOVER | ASKED_ADAPT);
	uint64_t began_ns, cost_ns, size;

	if (asked == 0 || client->dead)
		return;
	size = READ_ONCE(client->size_pages);
	began_ns = sys_now_ns();
	if (asked & ASKED_DISCOVER) {
		discover_counted(client);
		cost_ns = sys_now_ns() - began_ns;
		WRITE_ONCE(client->size_pages_seen, size);
		WRITE_ONCE(client->discover_next_ns, began_ns + max_of(DISCOVER_NS, 50 * cost_ns));
		WRITE_ONCE(client->discover_asked_ns, began_ns + ASKED_COST_FACTOR * cost_ns);
	}
	if (asked & ASKED_ADAPT)
		cow_adapt(client);
}

void look_serve_end(struct client *client)
{
	if (take_asked(client, ASKED_BURY))
		client_bury(client);
}

/* ---- the loop ---- */

/* Milliseconds until this group must be looked at again. */
static uint64_t interval_ms(const struct engine *engine, const struct group *group)
{
	int64_t distance = group_room_bytes(group) - (int64_t)group_register_bytes(group);
	uint64_t ms = distance > 0 ? (uint64_t)distance / engine_fill_bytes_per_ms(engine) / 2 : 0;

	return max_of(min_of(ms, (uint64_t)LOOK_MS_MAX), (uint64_t)LOOK_MS_MIN);
}

/* Once over the clients, once over the groups: there may be a thousand of either, and this is done at every look. */
static void note_sums(struct engine *engine)
{
	uint64_t now = sys_now_ns();
	uint64_t swapped[GROUPS_MAX] = { 0 };
	uint32_t unregistered[GROUPS_MAX] = { 0 };

	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++) {
		const struct client *client = engine->clients[i];

		if (!client)
			continue;
		swapped[client->group->number] += slot_map_swapped_pages(&client->record->map);
		if (!READ_ONCE(client->registered) && !READ_ONCE(client->dead) && !client_is_region(client))
			unregistered[client->group->number]++;
	}
	for (unsigned g = 0; g < GROUPS_MAX; g++) {
		struct group *group = engine->groups[g];

		if (!group)
			continue;
		WRITE_ONCE(group->unregistered, unregistered[g]);
		WRITE_ONCE(group->looked_room_bytes, group_room_bytes(group));
		WRITE_ONCE(group->looked_ns, now);
		group->swapped_pages_max = max_of(group->swapped_pages_max, swapped[g]);
		engine->state->groups[g].swapped_pages_max = group->swapped_pages_max;
		engine->state->groups[g].usage_bytes_max = READ_ONCE(group->usage_bytes_max);
		engine->state->groups[g].faults = READ_ONCE(group->faults);
	}
}

static uint64_t look_at_all(struct engine *engine)
{
	uint64_t now = sys_now_ns(), next_ms = LOOK_MS_MAX;

	sys_keep_off_cpus(awake_busy_cpus(&engine->awake, now));
	for (unsigned i = 0; i < READ_ONCE(engine->clients_end); i++) {
		struct client *client = client_get_index(engine, i);

		if (!client)
			continue;
		if (client_is_region(client)) { /* nothing of it is resident, and no evictor could help its group */
			client_put(client);
			continue;
		}
		look_at_client(client, now);
		if (READ_ONCE(client->parked))
			work_ask(&engine->evicting);
		next_ms = min_of(next_ms, interval_ms(engine, client->group));
		if (!group_has_room(client->group, 1))
			engine_want_room(client);
		client_put(client);
	}
	note_sums(engine);
	return next_ms;
}

void *look_thread_main(void *argument)
{
	struct engine *engine = argument;
	uint64_t seen = 0;

	name_this_thread("vswap-look");
	/* Programs that fill all CPUs must not make it late: so much more is beyond the limit then. */
	sys_hurry_this_thread();
	while (!__atomic_load_n(&engine->stopping, __ATOMIC_ACQUIRE))
		work_wait(&engine->looking, &seen, &engine->stopping, (unsigned)look_at_all(engine));
	return NULL;
}
