/* SPDX-License-Identifier: MIT */
/* fork — see fork.h. */
#define _GNU_SOURCE
#include "fork.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base.h"
#include "checkpoint.h"
#include "cow.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "evict.h"
#include "remap.h"
#include "sys.h"
#include "worker.h"

#define CHILD_DEATH_MS 1000
#define CHILD_FIND_TRIES 100
#define CHANGING_TRIES 3u    /* a millisecond apart */
#define WIPED_RANGES_MAX 16u /* of a mapping, to be tried */
#define WIPED_TRIES 16u      /* in each of them */

/* Its process, found by the token on its beacon page: a PID, -EAGAIN while an event of its own is unread, -ESRCH. */
static pid_t find_child(int child_fd, uint64_t beacon, uint64_t token)
{
	uint8_t page[PAGE_BYTES] = { 0 };
	enum fill_outcome outcome;
	uint64_t done;

	memcpy(page, &token, sizeof token);
	outcome = sys_userfaultfd_copy(child_fd, beacon, page, PAGE_BYTES, &done);
	if (outcome == FILL_AGAIN)
		return -EAGAIN;
	return outcome == FILL_DONE || outcome == FILL_PRESENT ? sys_find_page(beacon, token) : -ESRCH;
}

/* ---- a child that cannot be served ---- */

/* Let a process that will be killed get through what it waits for. Nothing is served, so nothing is lost; a child
 * of its own is not served either, and its descriptor stays open for the same reason. */
static void discard_events(int fd)
{
	struct uffd_msg message;

	while (read(fd, &message, sizeof message) > 0)
		;
}

/*
 * A child whose memory cannot be served: what is out in its parent is missing in it, and would read as zeros once
 * the last userfaultfd is closed. So it is killed; and if it cannot be found the descriptor stays open, that it
 * wait instead.
 */
static void refuse_child(struct client *parent, int child_fd, uint64_t token, int error)
{
	struct engine_event event = { .kind = ENGINE_EVENT_CHILD_REFUSED, .pid = parent->pid,
				      .group = parent->group->number, .a = (uint64_t)(int64_t)error };
	uint64_t beacon = parent->record->beacon;
	struct pollfd death = { .fd = -1, .events = POLLIN };
	pid_t pid = -EAGAIN;

	for (unsigned tries = 0; pid == -EAGAIN && tries < CHILD_FIND_TRIES; tries++) {
		discard_events(child_fd);
		pid = find_child(child_fd, beacon, token);
	}
	if (pid > 0)
		death.fd = sys_pidfd(pid);
	if (death.fd >= 0 && sys_find_page(beacon, token) == pid) { /* that PID is still this process */
		sys_pidfd_kill(death.fd);
		(void)poll(&death, 1, CHILD_DEATH_MS);
		event.b = (uint64_t)pid;
	}
	if (death.fd >= 0)
		close(death.fd);
	if (sys_userfaultfd_is_gone(child_fd))
		close(child_fd);
	counter_add(parent->engine, children_refused, 1);
	engine_event_push(parent->engine, &event);
}

/* ---- memory that was wiped ---- */

static void forget_range(void *context, struct page_range range)
{
	struct client *child = context;

	slot_map_clear(child->engine->slots, &child->record->map, page_of(range.start), page_of(range.end),
		       client_staged_gone, client_free_copy, child);
}

/* Has the child anything to lose in this mapping of its parent's? A cluster may be of several mappings. */
static bool has_slots(const struct client *child, const struct mapping *mapping)
{
	struct slot_space *space = child->engine->slots;
	const struct slot_map *map = &child->record->map;
	uint64_t page = page_of(mapping->start), end = page_of(mapping->end), next;

	for (; page < end; page = next) {
		next = min_of(end, (page / CLUSTER_PAGES + 1) * CLUSTER_PAGES);
		if (slot_map_has(space, map, page >> CLUSTER_SHIFT))
			for (uint64_t i = page; i < next; i++)
				if (slot_peek(space, map, i).tag != SLOT_NONE)
					return true;
	}
	return false;
}

/*
 * A page of the parent's that is there and has no slot: it is there in the child as well, unless it was wiped. A zero page
 * put in its place says which, for then the kernel refuses it; and where it does not, zeros are what the child is to find, as what
 * has no slot and is not there is zeros, whatever else happened to it. The second time it would be refused, too.
 */
static enum fill_outcome try_page(struct client *child, uint64_t address)
{
	enum fill_outcome outcome = sys_userfaultfd_zero(child->events_fd, address, PAGE_BYTES, &(uint64_t){ 0 });

	if (outcome == FILL_DONE)
		child->zero_mapped_pages++;
	return outcome;
}

static bool has_no_slot(const struct client *child, uint64_t address)
{
	return slot_peek(child->engine->slots, &child->record->map, page_of(address)).tag == SLOT_NONE;
}

static bool mapping_was_copied(const struct client *parent, struct client *child, const struct mapping *mapping)
{
	struct page_range ranges[WIPED_RANGES_MAX];
	uint64_t end, step;
	int count = sys_mapped_ranges(parent->pagemap_fd, mapping->start, mapping->end, ranges, WIPED_RANGES_MAX, 0, &end);

	for (int i = 0; i < count; i++) {
		step = max_of(page_of(ranges[i].end - ranges[i].start) / WIPED_TRIES, 1UL) * PAGE_BYTES;
		for (uint64_t at = ranges[i].start; at < ranges[i].end; at += step)
			if (has_no_slot(child, at))
				return try_page(child, at) == FILL_PRESENT;
	}
	return false;
}

/* Whether that can be seen of all that the child has slots in. */
static bool all_was_copied(const struct client *parent, struct client *child)
{
	struct mapping mapping;
	int result;

	for (uint64_t at = 0; (result = sys_mapping_next(parent->maps_fd, at, &mapping)) == 1; at = mapping.end)
		if (mapping.anonymous && !mapping.shared && has_slots(child, &mapping) &&
		    !mapping_was_copied(parent, child, &mapping))
			return false;
	return result == 0;
}

/* The same by smaps, whose walk is over all of the parent's page tables; what was wiped is forgotten. */
static bool forget_advised(const struct client *parent, struct client *child)
{
	return parent->pid > 0 && sys_visit_wiped(parent->pid, forget_range, child) == 0 &&
	       sys_has_address_space(parent->pid, &parent->address_space);
}

/* Was an unmapping or a move read together with the fork, behind it? */
static bool is_changed_behind(const struct client *parent, int child_fd)
{
	const struct uffd_msg *messages = parent->record->messages;
	uint32_t count = fault_message_count(parent->record), i = 0;

	while (i < count && (messages[i].event != UFFD_EVENT_FORK || (int)messages[i].arg.fork.ufd != child_fd))
		i++;
	for (; i < count; i++)
		if (messages[i].event == UFFD_EVENT_UNMAP || messages[i].event == UFFD_EVENT_REMAP)
			return true;
	return false;
}

/* The parent's mappings are no more what they were when it forked, or may not be: an event is unread. Its own fork counts as one
 * until the thread that forked has run again. */
static bool has_changed(const struct client *parent, int child_fd)
{
	if (is_changed_behind(parent, child_fd))
		return true;
	for (unsigned tries = 0; sys_userfaultfd_is_changing(parent->events_fd); tries++) {
		if (tries == CHANGING_TRIES)
			return true;
		sys_sleep_ms(1);
	}
	return false;
}

/*
 * What the parent has advised WIPEONFORK for is zeros in the child: it has no slots there. The kernel tells of
 * no such advice but in smaps, so that is read only where there is anything to lose, and where a look at the child does not
 * say that nothing was wiped. A parent that has ended since, or executes something else, says nothing, nor does one that has
 * unmapped or moved something since. Then the child is asked, and until it has
 * answered gets none of its pages.
 */
static bool forget_wiped(const struct client *parent, struct client *child)
{
	if (child->record->map.cluster_count == 0)
		return true;
	/* A predecessor may have looked at this child. */
	return ((!parent->recovering && all_was_copied(parent, child)) || forget_advised(parent, child)) &&
	       !has_changed(parent, child->events_fd);
}

void fork_ask_child(struct client *child)
{
	pid_t pid = child->pid > 0 ? child->pid
				   : find_child(child->events_fd, child->record->beacon, child->record->token);

	if (pid > 0 && sys_visit_wiped(pid, forget_range, child) == 0)
		child->wiped_unknown = false;
}

/* ---- its client ---- */

/* What is known of the parent's mappings, for its child. What the parent registered between the fork and now is
 * not registered in the child: until its own first discovery these are hints for fills, and nothing is evicted
 * (`registered` is false). */
static void inherit_ranges(const struct client *parent, struct client *child)
{
	for (size_t i = 0; i < parent->regions.count; i++) {
		const struct range *region = &parent->regions.ranges[i];

		(void)range_set_add(&child->regions, region->start, region->end, region->value,
				    REGIONS_MAX);
	}
	for (size_t i = 0; i < parent->quarantine.count; i++) {
		const struct range *range = &parent->quarantine.ranges[i];

		(void)range_set_add(&child->quarantine, range->start, range->end, range->value,
				    QUARANTINE_MAX);
	}
	for (size_t i = 0; i < parent->armed.count; i++)
		remap_armed(child, parent->armed.ranges[i].start, parent->armed.ranges[i].end);
	memcpy(child->remaps, parent->remaps, sizeof child->remaps);
	child->remap_count = parent->remap_count;
	remap_settle(child);
}

/* A client for the child, that shares its parent's slots by count; its gate is held. On failure it is not there. */
static int make_child(struct client *parent, int child_fd, struct client **ret_child)
{
	struct engine *engine = parent->engine;
	struct client *child;
	int result = client_create(engine, 0, parent->group, &child);

	if (result < 0) {
		refuse_child(parent, child_fd, sys_now_ns() | 1, result);
		return result;
	}
	crash_point(CRASH_FORK_CREATED);
	/* Others may look at it from now on: a drain, by what a segment says of who had this number before. */
	pthread_mutex_lock(&child->gate);
	child->events_fd = child->record->events_fd = child_fd;
	child->record->beacon = parent->record->beacon;
	child->record->arena = parent->record->arena;
	child->record->arena_bytes = parent->record->arena_bytes;
	result = slot_map_share(engine->slots, &parent->record->map, &child->record->map);
	crash_point(CRASH_FORK_SHARED);
	if (result == 0) {
		child->wiped_unknown = !forget_wiped(parent, child);
		*ret_child = child;
		return 0;
	}
	pthread_mutex_unlock(&child->gate);
	child->events_fd = child->record->events_fd = -1;
	refuse_child(parent, child_fd, child->record->token, result);
	client_bury(child);
	client_put(child);
	return result;
}

/*
 * The child's address space is a copy of the parent's, so it shares the parent's slots by count. Pages
 * on their way out of the parent must be settled first, in a place that both can reach: staging is not
 * inherited. No new MOVE starts meanwhile and no message is read (fork_pending).
 */
void fork_apply(struct client *parent, int child_fd)
{
	struct client *child = NULL;
	int result;

	counter_add(parent->engine, events_fork, 1);
	parent->fork_pending = true;
	while (slot_map_count(&parent->record->map, SLOT_STAGED) > 0 && !parent->evict_error)
		pthread_cond_wait(&parent->batches_changed, &parent->gate);
	if (parent->evict_error)
		evict_abandon(parent);
	result = make_child(parent, child_fd, &child);
	parent->fork_pending = false; /* from here on the parent may be buried */
	if (result < 0)
		return;
	inherit_ranges(parent, child);
	/* What one of them lets go takes room until the other has, too: they go on from the same place. */
	child->hand = parent->hand;
	probation_copy(&parent->probation, &child->probation);
	cow_note_fork(parent, child);
	WRITE_ONCE(parent->relative, child->record->token);
	WRITE_ONCE(child->relative, parent->record->token);
	child->resyncing = parent->resyncing;
	checkpoint_write(child, 0);
	crash_point(CRASH_FORK_COMPLETE);
	client_set_phase(child, CLIENT_LIVE);
	crash_point(CRASH_FORK_LIVE);
	client_metadata_changed(child);
	(void)worker_start_all(child);
	pthread_mutex_unlock(&child->gate);
	client_put(child);
}
