/* SPDX-License-Identifier: MIT */
/*
 * fill — answering a fault: find where the page's bytes are, bring them back in one run.
 *
 * A run starts at the faulting page. Its length comes from the faulting thread's stream: 1 for a
 * lone fault, doubling to FILL_PAGES_MAX while the thread goes forward through memory. Three kinds:
 *
 *   untouched  NONE and ZERO: zero page for a read, zeroed memory for a write (a write to the zero
 *              page would fault a second time in the kernel and escape the budget)
 *   expanded   SAME, POOL, STAGED, INDIRECT, and a few ZERO between them: expanded into the thread's buffer, one COPY
 *   read       SPILL: asynchronous reads that cover the run's extents, then as the one above (fill_read.c)
 *
 * and faults for which nothing is missing: writes to zero pages from before the region was registered, and to what
 * forked relatives share (cow.c). Of a stream's long runs those from the pool are expanded with the gate open (fill_open.c).
 *
 * The order that makes a fill right, all of it under the gate: state check, expansion, COPY, slot. The
 * kernel refuses the COPY (EAGAIN) if an event is unread by then; what was expanded is thrown away
 * and the slot is looked up again after the event. A read from a device does not hold the gate, nor does an open
 * run: the slots are compared, whole, when it is back.
 */
#define _GNU_SOURCE
#include "fill_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "codec.h"
#include "cow.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "remap.h"
#include "sys.h"

#define STREAM_GAP_PAGES 4
#define STREAM_BACK_PAGES 64 /* behind where it goes on: what it skipped, or has lost again */
#define STREAM_RUNS_LET_IN 4 /* one in so many */

/* Never written to. Not const: that would be in the file, and in RAM, where this is one zero page mapped everywhere. */
static uint8_t zero_pages[FILL_PAGES_MAX * PAGE_BYTES];

/* ---- streams ---- */

static unsigned stream_window(struct client *client, const struct fault *fault)
{
	struct stream *oldest = &client->streams[0];

	client->stream_clock++;
	for (unsigned i = 0; i < STREAMS_MAX; i++) {
		struct stream *stream = &client->streams[i];

		if (stream->window && stream->thread == fault->thread &&
		    fault->page + STREAM_BACK_PAGES > stream->next_page &&
		    fault->page <= stream->next_page + STREAM_GAP_PAGES) {
			if (fault->page >= stream->next_page)
				stream->window = min_of(stream->window * 2, (uint32_t)FILL_PAGES_MAX);
			stream->next_page = fault->page + stream->window;
			stream->used = client->stream_clock;
			group_note_stream(client->group, true);
			return stream->window;
		}
		if (stream->used < oldest->used)
			oldest = stream;
	}
	*oldest = (struct stream){ fault->thread, 1, fault->page + 1, client->stream_clock };
	group_note_stream(client->group, false);
	return 1;
}

void fill_stream_ends(struct client *client, const struct fault *fault, uint64_t end_page)
{
	for (unsigned i = 0; i < STREAMS_MAX && !fault->synthetic; i++)
		if (client->streams[i].used == client->stream_clock)
			client->streams[i].next_page = end_page;
}

/* Its instruction may need several pages at once: none of the last few may go before it has run. */
static void note_recent(struct client *client, uint64_t page)
{
	client->recent[client->recent_next] = page;
	client->recent_next = (client->recent_next + 1) % RECENT_FILLS;
}

/* ---- the outcome of a fill ---- */

/* Of what was charged so many are there, or will not come. */
static void note_filled(struct client *client, uint64_t pages)
{
	__atomic_fetch_sub(&client->filling_pages, (int64_t)pages, __ATOMIC_SEQ_CST);
}

/* Pages [page, page + count) were filled: they may be evicted again, even if once removed. */
static void filled(struct client *client, uint64_t page, uint64_t count)
{
	counter_add(client->engine, fill_calls, 1);
	counter_add(client->engine, fill_pages, count);
	note_filled(client, count);
	note_recent(client, page);
	if (client->quarantine.count)
		(void)range_set_remove(&client->quarantine, address_of(page),
				       address_of(page + count), QUARANTINE_MAX);
}

static void wake(struct client *client, uint64_t page)
{
	(void)sys_userfaultfd_wake(client->events_fd, address_of(page), PAGE_BYTES);
}

void fill_defer(struct client *client, const struct fault *fault)
{
	if (client->deferred_count < DEFERRED_MAX)
		client->deferred[client->deferred_count++] = *fault;
	else
		wake(client, fault->page); /* it will fault again */
}

enum fill_result fill_try_again(struct client *client)
{
	WRITE_ONCE(client->retry_soon, true);
	return FILL_DEFER;
}

enum fill_result fill_unfilled(struct client *client, enum fill_outcome outcome, uint64_t page)
{
	switch (outcome) {
	case FILL_PRESENT:
		counter_add(client->engine, faults_spurious, 1);
		wake(client, page);
		return FILL_ANSWERED;
	case FILL_MOVED:
		wake(client, page);
		return FILL_ANSWERED;
	case FILL_GONE:
		return FILL_ANSWERED;
	case FILL_AGAIN:
		counter_add(client->engine, fill_retries, 1);
		return fill_try_again(client);
	default:
		/* ENOMEM: the client's cgroup or the machine. BROKEN: nothing known; trying again
		 * loses nothing, and the thread waits rather than reads a wrong byte. */
		return fill_try_again(client);
	}
}

enum fill_result fill_poison(struct client *client, uint64_t page, struct slot slot, int cause)
{
	struct engine_event event = {
		.kind = ENGINE_EVENT_POISONED,
		.pid = client->pid,
		.group = client->group->number,
		.a = address_of(page),
		.b = (uint64_t)(int64_t)cause,
		.c = slot.tag,
	};

	if (slot.tag != SLOT_POISONED) {
		if (slot_set(client->engine->slots, &client->record->map, page,
			     (struct slot){ .tag = SLOT_POISONED }) < 0)
			return FILL_DEFER;
		if (slot.tag == SLOT_INDIRECT)
			slot_shared_put(client->engine->slots, slot.location, client_free_copy, client);
		else if (slot.tag == SLOT_POOL || slot.tag == SLOT_SPILL)
			client_free_copy(client, slot);
		counter_add(client->engine, poisoned_pages, 1);
		engine_event_push(client->engine, &event);
	}
	(void)sys_userfaultfd_poison(client->events_fd, address_of(page), PAGE_BYTES);
	wake(client, page);
	return FILL_ANSWERED;
}

static bool charge(struct client *client, uint64_t page, uint64_t pages)
{
	/* First, so that no look at its size comes in between and sees neither. */
	__atomic_fetch_add(&client->filling_pages, (int64_t)pages, __ATOMIC_SEQ_CST);
	if (client->leaving)
		return true;
	if (!group_charge(client->group, pages)) {
		/* A fault of the agent's own while it makes room (POPULATE) cannot wait for room. No other goes before. */
		if (pages > 1 || !client_is_populated(client, page)) {
			note_filled(client, pages);
			return false;
		}
		group_charge_anyway(client->group, pages);
	}
	__atomic_fetch_add(&client->resident_pages, (int64_t)pages, __ATOMIC_RELAXED);
	return true;
}

void fill_uncharge(struct client *client, uint64_t pages)
{
	note_filled(client, pages);
	if (client->leaving)
		return;
	group_uncharge(client->group, pages);
	__atomic_fetch_sub(&client->resident_pages, (int64_t)pages, __ATOMIC_RELAXED);
}

unsigned fill_charge_some(struct client *client, uint64_t page, unsigned want)
{
	for (; want > 0; want /= 2)
		if (charge(client, page, want))
			return want;
	return 0;
}

/* ---- untouched and zero pages ---- */

/* Outside of what we know (grown by mremap, or discovered between two looks): one page. */
static unsigned window_in_region(const struct client *client, uint64_t page, unsigned window)
{
	const struct range *region = range_set_at(&client->regions, address_of(page));

	if (!region || region->start > address_of(page))
		return 1;
	return (unsigned)min_of((uint64_t)window, page_of(region->end) - page);
}

static unsigned run_of_zeros(struct client *client, uint64_t page, unsigned window)
{
	unsigned count = 1;

	window = window_in_region(client, page, window);
	while (count < window) {
		struct slot slot;

		if (slot_get(client->engine->slots, &client->record->map, page + count, &slot) < 0 ||
		    (slot.tag != SLOT_NONE && slot.tag != SLOT_ZERO))
			break;
		count++;
	}
	return count;
}

/* A write to a mapped zero page allocates without a fault of ours, unseen until the next look: so no
 * more of them than the reserve covers. Beyond that a read gets memory of its own, and pays for it. */
static bool may_map_zero_page(struct client *client, const struct fault *fault, unsigned count)
{
	uint64_t most = group_reserve_bytes(client->group) / PAGE_BYTES;

	if (fault->write || client->zero_mapped_pages + count > most)
		return false;
	client->zero_mapped_pages += count;
	return true;
}

static enum fill_result fill_zeros(struct client *client, const struct fault *fault, unsigned window)
{
	unsigned count = fill_charge_some(client, fault->page, run_of_zeros(client, fault->page, window));
	bool zero_page = may_map_zero_page(client, fault, count);
	enum fill_outcome outcome;
	uint64_t bytes, done;

	if (count == 0)
		return FILL_DEFER;
retry:
	bytes = count * PAGE_BYTES;
	if (!zero_page)
		outcome = sys_userfaultfd_copy(client->events_fd, address_of(fault->page), zero_pages,
					       bytes, &done);
	else
		outcome = sys_userfaultfd_zero(client->events_fd, address_of(fault->page), bytes, &done);
	if (outcome == FILL_MOVED && count > 1) { /* the run crosses a mapping's end */
		fill_uncharge(client, count - 1);
		count = 1;
		goto retry;
	}
	done /= PAGE_BYTES;
	fill_uncharge(client, count - done);
	if (done == 0)
		return fill_unfilled(client, outcome, fault->page);
	for (uint64_t i = 0; i < done; i++)
		(void)slot_set(client->engine->slots, &client->record->map, fault->page + i,
			       (struct slot){ .tag = SLOT_NONE });
	filled(client, fault->page, done);
	if (zero_page)
		counter_add(client->engine, zeropage_pages, done);
	return FILL_ANSWERED;
}

/* A page is written to that is there: a zero page, or one that the kernel will copy. The slot map knows nothing of it. */
static enum fill_result fill_protected(struct client *client, const struct fault *fault)
{
	unsigned window = window_in_region(client, fault->page, stream_window(client, fault));
	unsigned count = fill_charge_some(client, fault->page, window);
	enum fill_outcome outcome;

	if (count == 0)
		return FILL_DEFER;
	outcome = sys_userfaultfd_unprotect(client->events_fd, address_of(fault->page), count * PAGE_BYTES);
	if (outcome == FILL_MOVED && count > 1) { /* the run crosses a mapping's end */
		fill_uncharge(client, count - 1);
		count = 1;
		outcome = sys_userfaultfd_unprotect(client->events_fd, address_of(fault->page), PAGE_BYTES);
	}
	if (outcome == FILL_DONE) {
		cow_note_copied(client, count);
		note_filled(client, count);
		note_recent(client, fault->page);
		return FILL_ANSWERED;
	}
	fill_uncharge(client, count);
	return fill_unfilled(client, outcome, fault->page);
}

/* ---- expanded pages ---- */

int fill_expand_object(struct client *client, const void *object, struct slot slot, void *page)
{
	int result = codec_expand(object, slot.units, page);

	if (result == 0 && codec_check(page, client->engine->state->secret) != slot.check)
		result = -EBADMSG;
	if (result == -EBADMSG)
		counter_add(client->engine, check_failures, 1);
	return result;
}

int fill_expand_read(struct client *client, const struct fill_span *span, const uint8_t *bytes, struct slot slot,
		     void *page)
{
	const uint8_t *object = bytes + slot.location * POOL_UNIT_BYTES - span->start_bytes;
	uint8_t room[PAGE_BYTES];
	int result = spill_object_open(span->spill, slot.location, slot.units, object, room, &object);

	if (result == 0)
		return fill_expand_object(client, object, slot, page);
	if (result == -EBADMSG)
		counter_add(client->engine, check_failures, 1);
	return result;
}

/* Bytes of a page on its way out: from the evictor's buffer, or from staging itself. */
static int read_staged(struct client *client, struct slot slot, void *page)
{
	unsigned window = (unsigned)(slot.location / BATCH_PAGES_MAX);
	unsigned i = slot.location % BATCH_PAGES_MAX;
	const struct batch *batch = &client->batches[window];
	const struct batch_record *record = &client->record->batches[window];
	ssize_t count;

	if (__atomic_load_n(&batch->copied, __ATOMIC_ACQUIRE)) {
		memcpy(page, batch->buffer + i * PAGE_BYTES, PAGE_BYTES);
		return 0;
	}
	count = sys_read_client(client->mem_fd,
				client->record->staging[record->protection] +
					(window * BATCH_PAGES_MAX + i) * PAGE_BYTES,
				page, PAGE_BYTES);
	return count == (ssize_t)PAGE_BYTES ? 0 : count == -ENOMEM ? -ENOMEM : -EIO;
}

int fill_expand(struct client *client, struct slot slot, void *page)
{
	struct slot_space *space = client->engine->slots;
	int result;

	switch (slot.tag) {
	case SLOT_SAME:
		codec_fill(page, slot.check);
		return 0;
	case SLOT_POOL:
		return fill_expand_object(client, pool_object(client->engine->pool_space, slot.location),
				     slot, page);
	case SLOT_STAGED:
		return read_staged(client, slot, page);
	case SLOT_INDIRECT:
		slot_share_lock(space);
		slot = slot_shared_peek(space, slot.location);
		result = slot.tag != SLOT_POOL
				 ? 1
				 : fill_expand_object(client,
						      pool_object(client->engine->pool_space, slot.location),
						      slot, page);
		slot_share_unlock(space);
		return result;
	default:
		return 1;
	}
}

/* The page is back: what its slot becomes, and what becomes of the copy. */
static void settle(struct client *client, uint64_t page, struct slot word, bool keep)
{
	struct slot_space *space = client->engine->slots;
	struct slot_map *map = &client->record->map;
	struct slot next = { .tag = SLOT_NONE };

	if (word.tag == SLOT_STAGED) {
		unsigned window = (unsigned)(word.location / BATCH_PAGES_MAX);
		unsigned i = word.location % BATCH_PAGES_MAX;

		next = client->record->batches[window].before[i];
		client->record->batches[window].pages[i] = BATCH_PAGE_GONE;
		client->batches[window].staged &= ~(1ULL << i);
		counter_add(client->engine, evict_refaulted, 1);
	} else if (keep && (word.tag == SLOT_POOL || word.tag == SLOT_SPILL) &&
		   !recompress_is_regretted(client, page, word)) {
		next = slot_kept(word);
	}
	VS_CHECK(slot_set(space, map, page, next) == 0);
	if (word.tag == SLOT_INDIRECT)
		slot_shared_put(space, word.location, client_free_copy, client);
	else if (!slot_is_kept(next.tag) && (word.tag == SLOT_POOL || word.tag == SLOT_SPILL))
		client_free_copy(client, word);
}

uint64_t fill_copy_run(struct client *client, const uint8_t *pages, uint64_t page, const struct fill_run *run,
		       bool on_probation, enum fill_outcome *ret_outcome)
{
	uint64_t done;

	*ret_outcome = sys_userfaultfd_copy(client->events_fd, address_of(page), pages, run->count * PAGE_BYTES, &done);
	if (*ret_outcome == FILL_MOVED && run->count > 1)
		*ret_outcome = sys_userfaultfd_copy(client->events_fd, address_of(page), pages, PAGE_BYTES, &done);
	done /= PAGE_BYTES;
	fill_uncharge(client, run->count - done);
	if (done == 0)
		return 0;
	crash_point(CRASH_FILL_COPIED);
	for (unsigned i = 0; i < done; i++) {
		settle(client, page + i, run->words[i], run->keep[i]);
		crash_point(CRASH_FILL_SETTLED_ONE);
	}
	filled(client, page, done);
	__atomic_fetch_add(&client->group->refilled_pages, done, __ATOMIC_RELAXED);
	if (on_probation)
		probation_push(&client->probation, page, done);
	return done;
}

enum fill_result fill_give_back(struct client *client, const struct fault *fault, const uint8_t *pages, struct fill_run *run,
				bool on_probation)
{
	enum fill_outcome outcome;

	/* Who writes to the first of them will write to the others of a stream, too. */
	memset(run->keep, on_probation && !fault->write && group_keeps_copies(client->group), run->count);
	if (fill_copy_run(client, pages, fault->page, run, on_probation, &outcome) == 0)
		return fill_unfilled(client, outcome, fault->page);
	return FILL_ANSWERED;
}

/*
 * Pages that come back go on probation, but those that were evicted too soon. A scan over a little more than
 * fits would have all of its pages change places for nothing: of a stream's runs only some are let in, enough
 * for the main part to become another one in time.
 */
bool fill_goes_on_probation(struct client *client, const struct fault *fault, unsigned window)
{
	struct group *group = client->group;

	if (fault->synthetic)
		return false;
	if (window > 1 && client->stream_clock % STREAM_RUNS_LET_IN != 0)
		return true;
	return !ghosts_is_recent(&group->ghosts, client->index, fault->page,
				 (uint64_t)max_of(READ_ONCE(group->resident_pages), 0) / 2);
}

/* Go on with a run whose first page is expanded, up to `window` pages. What is ZERO at its end is left for a fill of zeros. */
static void expand_more(struct client *client, uint64_t page, unsigned window, uint8_t *pages, struct fill_run *run)
{
	for (unsigned i = 1; i < window && i <= run->count + FILL_ZERO_GAP_PAGES; i++) {
		struct slot *word = &run->words[i];

		if (slot_get(client->engine->slots, &client->record->map, page + i, word) < 0 ||
		    !slot_is_swapped(word->tag))
			break;
		if (word->tag == SLOT_ZERO)
			continue;
		if (fill_expand(client, *word, pages + i * PAGE_BYTES) != 0)
			break;
		memset(pages + run->count * PAGE_BYTES, 0, (i - run->count) * PAGE_BYTES);
		run->count = i + 1;
	}
}

static enum fill_result fill_expanded(struct client *client, struct fill_scratch *scratch,
				      const struct fault *fault, struct slot first, unsigned window)
{
	bool on_probation = fill_goes_on_probation(client, fault, window);
	struct fill_run run;
	int result;

	window = fill_charge_some(client, fault->page, window);
	if (window == 0)
		return FILL_DEFER;
	run.count = 1;
	run.words[0] = first;
	result = fill_expand(client, first, scratch->pages);
	if (result == -EIO && client->dead)
		result = 0; /* nobody will look */
	/* Above 0: relatives share it, and the writer has moved it to a backend since it was looked at. */
	VS_CHECK(result <= 0 || first.tag == SLOT_INDIRECT);
	if (result != 0)
		fill_uncharge(client, window);
	if (result == -ENOMEM || result > 0)
		return fill_try_again(client);
	if (result < 0)
		return fill_poison(client, fault->page, first, result);
	expand_more(client, fault->page, window, scratch->pages, &run);
	fill_uncharge(client, window - run.count);
	fill_stream_ends(client, fault, fault->page + run.count);
	return fill_give_back(client, fault, scratch->pages, &run, on_probation);
}

struct slot fill_copy_of(struct client *client, struct slot word)
{
	return word.tag == SLOT_INDIRECT ? slot_shared_get(client->engine->slots, word.location) : word;
}

/* ---- one fault ---- */

/* A forked child asks who it is: the beacon page holds its token (wire.h). */
static enum fill_result fill_beacon(struct client *client, struct fill_scratch *scratch)
{
	enum fill_outcome outcome;
	uint64_t done;

	memset(scratch->pages, 0, PAGE_BYTES);
	memcpy(scratch->pages, &client->record->token, sizeof client->record->token);
	outcome = sys_userfaultfd_copy(client->events_fd, client->record->beacon, scratch->pages,
				       PAGE_BYTES, &done);
	return done ? FILL_ANSWERED : fill_unfilled(client, outcome, page_of(client->record->beacon));
}

/* A page that we hold to be resident faulted: it was filled between the fault and now, or it went
 * without an event, which must not be: then its bytes are not known. */
static enum fill_result fill_resident(struct client *client, const struct fault *fault,
				      struct slot slot)
{
	if (client->pagemap_fd < 0 ||
	    sys_page_is_present(client->pagemap_fd, address_of(fault->page))) {
		counter_add(client->engine, faults_spurious, 1);
		wake(client, fault->page);
		return FILL_ANSWERED;
	}
	return fill_poison(client, fault->page, slot, -ENODATA);
}

void fill_note_answered(struct client *client, const struct fault *fault, enum slot_tag tag)
{
	static const enum engine_backing backings[SLOT_TAG_COUNT] = {
		[SLOT_NONE] = ENGINE_BACKING_ZERO,   [SLOT_ZERO] = ENGINE_BACKING_ZERO,
		[SLOT_SAME] = ENGINE_BACKING_SAME,   [SLOT_POOL] = ENGINE_BACKING_POOL,
		[SLOT_INDIRECT] = ENGINE_BACKING_POOL, [SLOT_STAGED] = ENGINE_BACKING_STAGED,
	};
	struct engine *engine = client->engine;

	switch (backings[tag]) {
	case ENGINE_BACKING_ZERO:
		counter_add(engine, faults_zero, 1);
		break;
	case ENGINE_BACKING_SAME:
		counter_add(engine, faults_same, 1);
		break;
	case ENGINE_BACKING_STAGED:
		counter_add(engine, faults_staged, 1);
		break;
	default:
		counter_add(engine, faults_pool, 1);
	}
	engine_latency_add(engine, backings[tag], sys_now_ns() - fault->since_ns);
}

enum fill_result fill_fault(struct client *client, struct fill_scratch *scratch,
			    const struct fault *fault)
{
	const struct client_record *record = client->record;
	enum fill_result result;
	struct slot slot;
	unsigned window;

	if (!scratch->pages) /* an open run has them */
		scratch->pages = block_take(&client->engine->expand_blocks);
	if (!scratch->pages)
		return fill_try_again(client);
	if (fault->page == page_of(record->beacon))
		return fill_beacon(client, scratch);
	if (client->remap_count > 0 && remap_is_waiting(client, fault->page))
		return fill_try_again(client);
	if (fault->is_protected) {
		result = fill_protected(client, fault);
		if (result == FILL_ANSWERED)
			fill_note_answered(client, fault, SLOT_NONE);
		return result;
	}
	if (slot_get(client->engine->slots, &client->record->map, fault->page, &slot) < 0)
		return FILL_DEFER;
	if (fault->synthetic && !slot_is_swapped(slot.tag))
		return FILL_ANSWERED;
	if (client->wiped_unknown && slot.tag != SLOT_NONE && slot.tag != SLOT_ZERO)
		return fill_try_again(client);
	if (fill_waits_for_open(client, fault->page))
		return FILL_PENDING; /* its COPY will wake this waiter too */
	window = fault->synthetic ? FILL_PAGES_MAX : stream_window(client, fault);
	switch (slot.tag) {
	case SLOT_NONE:
	case SLOT_ZERO:
		result = fill_zeros(client, fault, window);
		break;
	case SLOT_KEPT_POOL:
	case SLOT_KEPT_SPILL:
		return fill_resident(client, fault, slot);
	case SLOT_POISONED:
		return fill_poison(client, fault->page, slot, 0);
	default:
		if (fill_copy_of(client, slot).tag == SLOT_SPILL) {
			result = fill_from_spill(client, fault, slot, window);
			if (result == FILL_PENDING)
				counter_add(client->engine, faults_spill, 1);
			return result;
		}
		if (fill_open_begin(client, scratch, fault, slot, window))
			return FILL_PENDING;
		result = fill_expanded(client, scratch, fault, slot, window);
	}
	if (result == FILL_ANSWERED)
		fill_note_answered(client, fault, slot.tag);
	return result;
}
