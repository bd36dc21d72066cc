/* SPDX-License-Identifier: MIT */
/*
 * fault — read the userfaultfd of a client, apply events, answer faults.
 *
 * What the kernel promises, and what follows
 *   - A thread that forks, remaps, unmaps or madvises waits until its event is *read*; from before the
 *     change until the read, COPY, ZEROPAGE and MOVE say EAGAIN. So: reading is what lets the change
 *     become visible, it happens only under the gate, and the effect on the slot map is applied
 *     before the gate opens.
 *   - read() returns faults before older events. So: of what was read, events are applied first,
 *     in order, then faults are answered by what the map says then.
 *   - A fault may be read before its event is even queued. Then the fill says EAGAIN, the fault is
 *     deferred, and tried again after the next read.
 *   - read() consumes a message for good, so it targets the state memfd, and what is in the map is
 *     said by the checkpoint: a successor applies the others (state.h, checkpoint.h).
 *   - REMOVE comes before the zap, and is never followed by a message that says the zap is over: see
 *     the quarantine in client.h.
 *   - A fork's child is a new userfaultfd that exists only in our descriptor table.
 *
 * Threads     worker.h
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base.h"
#include "checkpoint.h"
#include "cow.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "evict.h"
#include "fault_point.h"
#include "fill.h"
#include "remap.h"
#include "sys.h"
#include "worker.h"

#define CHILD_DEATH_MS 1000
#define CHILD_FIND_TRIES 100

/* ---- freed memory; the gate is held ---- */

static void apply_remove(struct client *client, uint64_t start, uint64_t end)
{
	uint64_t now = sys_now_ns();

	counter_add(client->engine, events_remove, 1);
	client_forget_slots(client, page_of(start), page_of(end - start));
	/* When the list is full, one range over everything: nothing is evicted for a while. */
	if (range_set_add(&client->quarantine, start, end, now, QUARANTINE_MAX) < 0) {
		range_set_clear(&client->quarantine);
		(void)range_set_add(&client->quarantine, 0, UINT64_MAX & ~(PAGE_BYTES - 1), now,
				    QUARANTINE_MAX);
	}
}

/* ---- a forked child; the parent's gate is held ---- */

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

static void forget_range(void *context, struct page_range range)
{
	struct client *child = context;

	slot_map_clear(child->engine->slots, &child->record->map, page_of(range.start), page_of(range.end),
		       client_staged_gone, client_free_copy, child);
}

/*
 * What the parent has advised WIPEONFORK for is zeros in the child: it has no slots there. The kernel tells of
 * no such advice, so it is looked up, where there is anything to lose. A parent that has ended since, or executes
 * something else, says nothing: then the child is asked, and until it has answered gets none of its pages.
 */
static bool forget_wiped(const struct client *parent, struct client *child)
{
	struct address_space_name now;

	return child->record->map.cluster_count == 0 ||
	       (parent->pid > 0 && sys_visit_wiped(parent->pid, forget_range, child) == 0 &&
		sys_name_address_space(parent->pid, &now) == 0 &&
		memcmp(&now, &parent->address_space, sizeof now) == 0);
}

static void ask_child_for_wiped(struct client *child)
{
	pid_t pid = child->pid > 0 ? child->pid
				   : find_child(child->events_fd, child->record->beacon, child->record->token);

	if (pid > 0 && sys_visit_wiped(pid, forget_range, child) == 0)
		child->wiped_unknown = false;
}

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
static void apply_fork(struct client *parent, int child_fd)
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
	cow_note_fork(parent);
	cow_note_fork(child);
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

/* ---- events; the gate is held ---- */

static void apply_event(struct client *client, const struct uffd_msg *message)
{
	switch (message->event) {
	case UFFD_EVENT_FORK:
		apply_fork(client, (int)message->arg.fork.ufd);
		break;
	case UFFD_EVENT_REMAP:
		counter_add(client->engine, events_remap, 1);
		remap_move(client, message->arg.remap.from, message->arg.remap.to,
			   message->arg.remap.len);
		break;
	case UFFD_EVENT_REMOVE:
		apply_remove(client, message->arg.remove.start, message->arg.remove.end);
		break;
	case UFFD_EVENT_UNMAP:
		counter_add(client->engine, events_unmap, 1);
		remap_unmap(client, message->arg.remove.start, message->arg.remove.end);
		break;
	default:
		break;
	}
}

/* ---- faults; the gate is held ---- */

static void answer(struct client *client, struct fill_scratch *scratch, const struct fault *fault)
{
	if (fill_fault(client, scratch, fault) != FILL_DEFER)
		return;
	if (client->deferred_count < DEFERRED_MAX) {
		client->deferred[client->deferred_count++] = *fault;
		return;
	}
	(void)sys_userfaultfd_wake(client->events_fd, address_of(fault->page), PAGE_BYTES);
}

static void answer_deferred(struct client *client, struct fill_scratch *scratch)
{
	struct fault faults[DEFERRED_MAX];
	unsigned count = client->deferred_count;

	if (count == 0)
		return;
	memcpy(faults, client->deferred, count * sizeof *faults);
	client->deferred_count = 0;
	WRITE_ONCE(client->retry_soon, false);
	for (unsigned i = 0; i < count; i++)
		answer(client, scratch, &faults[i]);
}

static void answer_message(struct client *client, struct fill_scratch *scratch,
			   const struct uffd_msg *message, uint64_t now)
{
	struct fault fault = {
		.page = page_of(message->arg.pagefault.address),
		.since_ns = now,
		.thread = message->arg.pagefault.feat.ptid,
		.write = message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE,
		.is_protected = message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP,
	};

	client->faults++;
	counter_add(client->engine, faults, 1);
	__atomic_fetch_add(&client->group->faults, 1, __ATOMIC_RELAXED);
	answer(client, scratch, &fault);
}

/* ---- the loop ---- */

static void set_waiting(struct client *client)
{
	bool waiting = client->deferred_count > 0 && !client->retry_soon;

	if (waiting == client->waiting)
		return;
	WRITE_ONCE(client->waiting, waiting);
	__atomic_fetch_add(&client->group->waiting, waiting ? 1 : -1, __ATOMIC_RELAXED);
	if (waiting) {
		counter_add(client->engine, faults_deferred, client->deferred_count);
		work_ask(&client->engine->evicting);
	}
}

/* Without a descriptor for its child a fork stays unread, and the process waits for it. */
static void note_unread(struct client *client, int error)
{
	struct engine_event event = { .kind = ENGINE_EVENT_FORK_WAITS, .pid = client->pid,
				      .group = client->group->number, .a = (uint64_t)(int64_t)-error };

	if ((error == EMFILE || error == ENFILE || error == ENOMEM) && !client->fork_waits)
		engine_event_push(client->engine, &event);
	client->fork_waits = error != EAGAIN;
}

/* Apply the events among messages [first, count); after each the checkpoint says so. */
static void apply_events(struct client *client, uint32_t first, uint32_t count)
{
	const struct uffd_msg *messages = client->record->messages;

	for (uint32_t i = first; i < count; i++) {
		if (messages[i].event == UFFD_EVENT_PAGEFAULT)
			continue;
		crash_point(CRASH_EVENT_BEGUN);
		apply_event(client, &messages[i]);
		crash_point(CRASH_EVENT_APPLIED);
		checkpoint_write(client, i + 1);
		crash_point(CRASH_EVENT_CHECKPOINT);
	}
}

/* All messages are dealt with: `count` of them are in the record. */
static void forget_messages(struct client *client, uint32_t count)
{
	for (uint32_t i = count; i-- > 0;) /* so that after a death the first ones are still seen as such */
		WRITE_ONCE(client->record->messages[i].event, 0);
	crash_point(CRASH_EVENT_FORGOTTEN);
	checkpoint_write(client, 0);
}

static ssize_t messages_read(struct client *client)
{
	errno = fault_point("fault/read");
	return errno ? -1 : read(client->events_fd, client->record->messages, sizeof client->record->messages);
}

/* Read what there is and deal with it. */
static void serve(struct client *client, struct fill_scratch *scratch)
{
	struct uffd_msg *messages = client->record->messages;
	ssize_t bytes = messages_read(client);
	uint32_t count = bytes > 0 ? (uint32_t)((size_t)bytes / sizeof *messages) : 0;
	uint64_t now;

	if (bytes < 0)
		note_unread(client, errno);
	crash_point(CRASH_EVENT_READ);
	apply_events(client, 0, count);
	now = count ? sys_now_ns() : 0;
	worker_note_faults(client, messages, count, now);
	for (uint32_t i = 0; i < count; i++)
		if (messages[i].event == UFFD_EVENT_PAGEFAULT)
			answer_message(client, scratch, &messages[i], now);
	worker_decide(client);
	forget_messages(client, count);
	if (client->remap_count > 0 && !sys_userfaultfd_is_changing(client->events_fd)) {
		remap_settle(client);
		checkpoint_write(client, 0);
	}
}

uint32_t fault_message_count(const struct client_record *record)
{
	uint32_t count = 0;

	while (count < MESSAGES_MAX && record->messages[count].event != 0)
		count++;
	return count;
}

void fault_replay(struct client *client, uint32_t applied, fault_settle_fn settle, void *context)
{
	const struct uffd_msg *messages = client->record->messages;
	uint32_t count = fault_message_count(client->record);

	if (count == 0 && checkpoint_is_interrupted(client))
		remap_settle(client);
	for (uint32_t i = applied; i < count; i++) {
		if (messages[i].event == UFFD_EVENT_FORK)
			settle(context);
		apply_events(client, i, i + 1);
	}
	forget_messages(client, MESSAGES_MAX);
}

void fault_serve(struct client *client, struct fill_scratch *scratch)
{
	fill_reap_reads(client, scratch);
	if (client->wiped_unknown)
		ask_child_for_wiped(client);
	serve(client, scratch);
	if (client->resyncing)
		recover_resync(client);
	answer_deferred(client, scratch);
	set_waiting(client);
	client_metadata_changed(client);
	if (!group_has_room(client->group, 1))
		engine_want_room(client);
}
