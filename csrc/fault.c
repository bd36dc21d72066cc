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
#include "crash_point.h"
#include "engine_internal.h"
#include "evict.h"
#include "fault_point.h"
#include "fill.h"
#include "fork.h"
#include "remap.h"
#include "sys.h"
#include "worker.h"

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

/* ---- events; the gate is held ---- */

static void apply_event(struct client *client, const struct uffd_msg *message)
{
	switch (message->event) {
	case UFFD_EVENT_FORK:
		fork_apply(client, (int)message->arg.fork.ufd);
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
	if (fill_fault(client, scratch, fault) == FILL_DEFER)
		fill_defer(client, fault);
}

static void answer_deferred(struct client *client, struct fill_scratch *scratch)
{
	struct fault faults[DEFERRED_MAX];
	unsigned count = client->deferred_count;

	WRITE_ONCE(client->retry_soon, false);
	if (count == 0)
		return;
	memcpy(faults, client->deferred, count * sizeof *faults);
	client->deferred_count = 0;
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
		fork_ask_child(client);
	serve(client, scratch);
	if (client->resyncing)
		recover_resync(client);
	answer_deferred(client, scratch);
	set_waiting(client);
	client_metadata_changed(client);
	if (!group_has_room(client->group, 1))
		engine_want_room(client);
}
