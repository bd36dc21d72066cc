/* SPDX-License-Identifier: MIT */
/*
 * fill_read — a fault on a page that is on a backend: read it, and with it what else its run needs.
 *
 * A run is planned page by page. A page whose extent lies close behind one that is to be read anyway widens that
 * range; any other starts a range of its own, on whichever backend. Pages between them that are in memory
 * (ZERO, SAME, POOL, STAGED) are remembered as such, and looked up only when all ranges are back. So the
 * run of a stream is one COPY wherever its pages are. A lone fault reads one range, with such of its neighbours
 * there as are likely to be wanted, and waits for nothing else.
 *
 * No gate is held while the device works. When the last range is back each page is looked up again: one that
 * was on a backend must have the same slot, whole; one in memory is taken as it is now. A page that is
 * neither is left out, and those behind it get a COPY of their own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "base.h"
#include "engine_internal.h"
#include "fill_internal.h"
#include "io.h"
#include "sys.h"
#include "tier.h"

#define READ_AROUND_PAGES 8   /* at most */
#define READ_AROUND_READS 128 /* of so many lone faults ... */
#define READ_AROUND_NEAR 8    /* ... so many were near a recent one: worth it */
#define READ_GAP_BYTES 32768u /* is read in less time than another request takes */
#define IN_MEMORY 255 /* instead of a range */
#define COOKIE_RANGE_SHIFT 8

static_assert(READS_MAX <= 1 << COOKIE_RANGE_SHIFT, "a cookie names a read and its range");
static_assert(FILL_RANGES_MAX <= IO_DEPTH_MAX / 2, "a run leaves room in the queue for others");

struct read_range {
	struct fill_span span; /* its backend is pinned until the read is freed */
	uint32_t buffer_at;
	unsigned first_page;  /* of the run */
	int error;
};

struct spill_read {
	struct fault fault;
	unsigned page_count;
	unsigned range_count, pending; /* of these: on their way */
	struct read_range ranges[FILL_RANGES_MAX];
	uint8_t range_of[FILL_PAGES_MAX];   /* or IN_MEMORY; of the first page: 0 */
	struct slot words[FILL_PAGES_MAX];  /* as in the map: SPILL or INDIRECT */
	struct slot copies[FILL_PAGES_MAX]; /* behind them: SPILL */
	uint32_t buffer_bytes;
};

static_assert(sizeof(struct spill_read) <= READ_HEADER_BYTES, "a read and its buffer are one block");
static_assert(READ_BUFFER_BYTES >= FILL_READ_BYTES_MAX, "any range fits");

static uint8_t *buffer_of(const struct spill_read *read)
{
	return (uint8_t *)(uintptr_t)read + READ_HEADER_BYTES;
}

/* ---- ranges ---- */

static uint64_t span_bytes(const struct fill_span *span)
{
	return span->end_bytes - span->start_bytes;
}

bool fill_span_add(struct fill_span *span, struct slot copy, uint64_t gap_bytes_max)
{
	struct spill_range range;
	uint64_t end;

	if (copy.tag != SLOT_SPILL || copy.backend != span->backend)
		return false;
	range = spill_range_of(span->spill, copy.location, copy.units);
	end = range.offset_bytes + range.length_bytes;
	if (span->end_bytes == 0)
		span->start_bytes = range.offset_bytes;
	else if (copy.location < span->last_location ||
		 range.offset_bytes > span->end_bytes + gap_bytes_max ||
		 end - span->start_bytes > FILL_READ_BYTES_MAX)
		return false;
	span->last_location = copy.location;
	span->end_bytes = max_of(span->end_bytes, end);
	return true;
}

static bool range_add(struct spill_read *read, unsigned r, struct slot copy)
{
	struct fill_span *span = &read->ranges[r].span, wider = *span;
	uint64_t more_bytes;

	if (!fill_span_add(&wider, copy, READ_GAP_BYTES))
		return false;
	more_bytes = span_bytes(&wider) - span_bytes(span);
	if (read->buffer_bytes + more_bytes > READ_BUFFER_BYTES)
		return false;
	read->buffer_bytes += (uint32_t)more_bytes;
	*span = wider;
	return true;
}

static void range_unpin(struct client *client, struct read_range *range)
{
	if (range->span.spill)
		backend_unpin(client->engine, range->span.backend);
	range->span.spill = NULL;
}

/* Page i of the run is at `copy`: read it with a range that there is, or with one more. */
static bool plan_extent(struct client *client, struct spill_read *read, unsigned i, struct slot copy,
			unsigned ranges_max)
{
	unsigned r = read->range_count;

	while (r-- > 0)
		if (range_add(read, r, copy)) {
			read->range_of[i] = (uint8_t)r;
			return true;
		}
	r = read->range_count;
	if (r == ranges_max)
		return false;
	read->ranges[r].first_page = i;
	read->ranges[r].span = (struct fill_span){ .spill = backend_pin(client->engine, copy.backend),
						   .backend = copy.backend };
	/* A shared slot may have been migrated since it was looked at, and the backend be gone. */
	if (!read->ranges[r].span.spill || !range_add(read, r, copy)) {
		range_unpin(client, &read->ranges[r]);
		return false;
	}
	read->range_of[i] = (uint8_t)r;
	read->range_count++;
	return true;
}

/* ---- the plan ---- */

static bool is_reading(const struct client *client, uint64_t first_page, uint64_t end_page)
{
	for (unsigned i = 0; i < READS_MAX; i++) {
		const struct spill_read *read = client->reads[i];

		if (read && first_page < read->fault.page + read->page_count && read->fault.page < end_page)
			return true;
	}
	return false;
}

bool fill_is_under_way(const struct client *client, uint64_t first_page, uint64_t end_page)
{
	return is_reading(client, first_page, end_page) || fill_is_open(client, first_page, end_page);
}

/* Pages from this one on that no other read brings. */
static unsigned window_before_reads(const struct client *client, uint64_t page, unsigned window)
{
	for (unsigned i = 0; i < READS_MAX; i++) {
		const struct spill_read *read = client->reads[i];

		if (read && read->fault.page > page)
			window = (unsigned)min_of((uint64_t)window, read->fault.page - page);
	}
	return window;
}

/* How many ranges a read may have: a lone fault one, a stream half of what the queue has left. */
static unsigned ranges_allowed(const struct client *client, bool is_stream)
{
	unsigned left = IO_DEPTH_MAX - client->io_requests;

	return is_stream ? min_of(max_of(left / 2, 1u), (unsigned)FILL_RANGES_MAX) : 1;
}

/*
 * Widen the read over the following pages. What is in memory at its end needs no read and waits for none. No page: the
 * backend of the first is gone.
 */
static void read_plan(struct client *client, struct spill_read *read, unsigned window, bool is_stream)
{
	unsigned ranges_max = ranges_allowed(client, is_stream);

	if (!plan_extent(client, read, 0, read->copies[0], 1))
		return;
	read->page_count = 1;
	for (unsigned i = 1; i < window; i++) {
		struct slot *word = &read->words[i], *copy = &read->copies[i];

		if (slot_get(client->engine->slots, &client->record->map, read->fault.page + i, word) < 0 ||
		    !slot_is_swapped(word->tag))
			break;
		*copy = fill_copy_of(client, *word);
		read->range_of[i] = IN_MEMORY;
		if (copy->tag != SLOT_SPILL && !is_stream)
			break;
		if (copy->tag != SLOT_SPILL)
			continue;
		if (!plan_extent(client, read, i, *copy, ranges_max))
			break;
		read->page_count = i + 1;
	}
}

/* ---- on its way ---- */

static void read_free(struct client *client, unsigned i)
{
	struct spill_read *read = client->reads[i];

	for (unsigned r = 0; r < read->range_count; r++)
		range_unpin(client, &read->ranges[r]);
	block_give(&client->engine->read_blocks, read);
	client->reads[i] = NULL;
}

/* The client's queue, made at its first read. Other fault threads poll it without the gate: one that is polling already
 * knows of none, and it may be the only one soon, when the thread that makes the read was just about to stand by. */
static struct io_queue *io_queue_of(struct client *client)
{
	struct io_queue *queue = client->io;

	if (!queue && io_queue_create(IO_DEPTH_MAX, IO_AUTOMATIC, &queue) == 0) {
		__atomic_store_n(&client->io, queue, __ATOMIC_RELEASE);
		client_wake(client);
	}
	return client->io;
}

static int range_submit(struct client *client, unsigned i, unsigned r)
{
	struct spill_read *read = client->reads[i];
	struct read_range *range = &read->ranges[r];
	int result = io_read(client->io, spill_fd(range->span.spill), buffer_of(read) + range->buffer_at,
			     span_bytes(&range->span), range->span.start_bytes, i | (uint64_t)r << COOKIE_RANGE_SHIFT);

	if (result < 0)
		return result;
	client->io_requests++;
	client->device_reads++;
	read->pending++;
	counter_add(client->engine, spill_read_ranges, 1);
	return 0;
}

/* Ask for all ranges of a planned read. A later one that is refused ends the run before its first page. */
static int read_submit(struct client *client, unsigned i)
{
	struct spill_read *read = client->reads[i];
	uint32_t at = 0;
	int result = 0;

	for (unsigned r = 0; result == 0 && r < read->range_count; r++) {
		read->ranges[r].buffer_at = at;
		at += (uint32_t)span_bytes(&read->ranges[r].span);
		result = range_submit(client, i, r);
		if (result < 0 && r > 0) {
			fill_uncharge(client, read->page_count - read->ranges[r].first_page);
			read->page_count = read->ranges[r].first_page;
			while (read->range_count > r)
				range_unpin(client, &read->ranges[--read->range_count]);
			return 0;
		}
	}
	return result;
}

static bool is_near_recent(const struct client *client, uint64_t page)
{
	for (unsigned i = 0; i < RECENT_FILLS; i++) {
		uint64_t recent = client->recent[i];

		if (recent != page && recent < page + READ_AROUND_PAGES && page < recent + READ_AROUND_PAGES)
			return true;
	}
	return false;
}

/*
 * Pages that a lone fault reads, after one more fault on a backend. Neighbours are worth it where faults come near to each
 * other; where not, they are read, expanded and push out others for nothing. Whether those that came were touched nobody
 * tells. So twice as many when a part of the faults was near a recent one, which neighbours would have saved; and half as
 * many after a while without, for they do save them, or there are none. docs/decisions/0023
 */
static unsigned read_around(struct client *client, uint64_t page, bool is_lone)
{
	unsigned pages = max_of(client->around_pages, 1u);

	client->around_reads += is_lone;
	client->around_near += is_near_recent(client, page);
	if (client->around_near >= READ_AROUND_NEAR)
		pages = min_of(2 * pages, (unsigned)READ_AROUND_PAGES);
	else if (client->around_reads >= READ_AROUND_READS)
		pages = max_of(pages / 2, 1u);
	else
		return pages;
	client->around_reads = client->around_near = 0;
	client->around_pages = pages;
	return pages;
}

enum fill_result fill_from_spill(struct client *client, const struct fault *fault, struct slot word, unsigned window)
{
	bool is_stream = window > 1 && !fault->alone;
	struct slot copy = fill_copy_of(client, word);
	unsigned slot = 0, around = 1;
	struct spill_read *read;

	if (is_reading(client, fault->page, fault->page + 1))
		return FILL_PENDING; /* its COPY will wake this waiter too */
	if (copy.tag != SLOT_SPILL)
		return fill_try_again(client); /* a shared slot: a drain has brought it into the pool since it was looked at */
	if (!fault->alone)
		around = read_around(client, fault->page, !is_stream);
	/* A device takes hardly longer for eight pages than for two. */
	window = is_stream ? max_of(window, (unsigned)READ_AROUND_PAGES) : around;
	while (slot < READS_MAX && client->reads[slot])
		slot++;
	if (slot == READS_MAX || !io_queue_of(client))
		return fill_try_again(client);
	window = fill_charge_some(client, fault->page, window_before_reads(client, fault->page, window));
	if (window == 0)
		return FILL_DEFER;
	read = block_take(&client->engine->read_blocks);
	if (!read) {
		fill_uncharge(client, window);
		return fill_try_again(client);
	}
	*read = (struct spill_read){ .fault = *fault };
	read->words[0] = word;
	read->copies[0] = copy;
	read_plan(client, read, window, is_stream);
	fill_uncharge(client, window - read->page_count);
	client->reads[slot] = read;
	if (read->page_count == 0 || read_submit(client, slot) != 0) {
		fill_uncharge(client, read->page_count);
		read_free(client, slot);
		return fill_try_again(client);
	}
	fill_stream_ends(client, fault, fault->page + read->page_count);
	return FILL_PENDING;
}

/* ---- it is back ---- */

static bool word_is_unchanged(struct client *client, const struct spill_read *read, unsigned i)
{
	struct slot word;

	return slot_get(client->engine->slots, &client->record->map, read->fault.page + i, &word) == 0 &&
	       slot_is_equal(word, read->words[i]) && slot_is_equal(fill_copy_of(client, word), read->copies[i]);
}

/*
 * The first page of a read is not there. A device's error says nothing about which of its pages is concerned, and a
 * want of memory nothing about any: those are read again, the page alone. `error` 0: it is another slot by now.
 */
static enum fill_result read_failed(struct client *client, struct spill_read *read, int error)
{
	if (error == -ENOMEM || error == -EAGAIN)
		return fill_try_again(client);
	if (error == 0 || !word_is_unchanged(client, read, 0))
		return FILL_DEFER; /* look it up again */
	if (error != -EBADMSG && read->page_count > 1) {
		read->fault.alone = true;
		return FILL_DEFER;
	}
	return fill_poison(client, read->fault.page, read->words[0], error);
}

/* Expand page i, which was read: 0; 1 when it is another slot by now; or -errno. */
static int expand_extent(struct client *client, const struct spill_read *read, unsigned i, uint8_t *page)
{
	const struct read_range *range = &read->ranges[read->range_of[i]];
	struct slot copy = read->copies[i];
	const uint8_t *bytes = buffer_of(read) + range->buffer_at;

	if (range->error < 0)
		return range->error;
	return word_is_unchanged(client, read, i) ? fill_expand_read(client, &range->span, bytes, copy, page) : 1;
}

/* Expand page i, which was in memory, from wherever in memory it is now: 0, or it is not to be had. */
static int expand_memory(struct client *client, const struct spill_read *read, unsigned i, uint8_t *page,
			 struct slot *ret_word)
{
	if (slot_get(client->engine->slots, &client->record->map, read->fault.page + i, ret_word) < 0)
		return -ENOMEM;
	if (ret_word->tag == SLOT_ZERO)
		memset(page, 0, PAGE_BYTES);
	return ret_word->tag == SLOT_ZERO ? 0 : fill_expand(client, *ret_word, page);
}

/* What is worth keeping of each range's copies once their pages are back. */
static uint32_t ranges_kept(struct client *client, const struct spill_read *read)
{
	uint32_t kept = 0;

	for (unsigned r = 0; r < read->range_count && group_keeps_spilled_copies(client->group); r++) {
		const struct read_range *range = &read->ranges[r];
		struct spill_statistics statistics;

		spill_statistics(range->span.spill, &statistics);
		if ((statistics.used_bytes < statistics.size_bytes / 4 * 3 ||
		     tier_makes_room(client->engine, range->span.backend)) &&
		    READ_ONCE(client->engine->backends[range->span.backend].state) == BACKEND_ACTIVE)
			kept |= 1u << r;
	}
	return kept;
}

/* A part of a run that one COPY gives back. */
struct piece {
	struct fill_run run;
	uint64_t sources;    /* bit r: range r, bit FILL_RANGES_MAX: memory */
	unsigned read_pages; /* from ranges */
	int error;           /* why it ends: 1 another slot by now, or -errno; 0: the run does */
};

/* Expand pages from page `first` of a completed read on, until one is not to be had. */
static void expand_piece(struct client *client, const struct spill_read *read, unsigned first, uint32_t kept,
			 uint8_t *pages, struct piece *piece)
{
	bool keeps_pool = group_keeps_copies(client->group);
	struct fill_run *run = &piece->run;

	piece->sources = piece->read_pages = run->count = 0;
	piece->error = 0;
	while (first + run->count < read->page_count) {
		unsigned i = first + run->count, n = run->count, r = read->range_of[i];
		uint8_t *page = pages + n * PAGE_BYTES;

		run->words[n] = read->words[i];
		run->keep[n] = r == IN_MEMORY ? keeps_pool : kept >> r & 1;
		piece->error = r == IN_MEMORY ? expand_memory(client, read, i, page, &run->words[n])
					      : expand_extent(client, read, i, page);
		if (piece->error != 0)
			return;
		piece->sources |= 1ULL << min_of(r, (unsigned)FILL_RANGES_MAX);
		piece->read_pages += r != IN_MEMORY;
		run->count++;
	}
}

/* Does the page that faulted leave its backend for one of a higher priority? */
static bool is_promoted(const struct client *client, const struct spill_read *read)
{
	return read->page_count <= READ_AROUND_PAGES && !read->fault.synthetic && read->words[0].tag == SLOT_SPILL &&
	       tier_promotes(client, read->fault.page, read->copies[0].backend);
}

/* Expand and COPY the pages of a completed read that are still where they were, each piece that hangs together. */
static enum fill_result read_deliver(struct client *client, struct fill_scratch *scratch, struct spill_read *read)
{
	bool on_probation = fill_goes_on_probation(client, &read->fault, read->page_count);
	bool promoted = is_promoted(client, read);
	uint32_t kept = ranges_kept(client, read);
	enum fill_result result = FILL_ANSWERED;
	uint64_t done = 1;

	for (unsigned first = 0; first < read->page_count && done > 0;) {
		enum fill_outcome outcome;
		struct piece piece;
		unsigned count;

		expand_piece(client, read, first, kept, scratch->pages, &piece);
		count = piece.run.count;
		if (first == 0 && count == 0) {
			fill_uncharge(client, read->page_count);
			return read_failed(client, read, min_of(piece.error, 0));
		}
		if (first == 0 && (promoted || read->fault.write))
			piece.run.keep[0] = false;
		if (count > 0)
			done = fill_copy_run(client, scratch->pages, read->fault.page + first, &piece.run, on_probation,
					     &outcome);
		if (first == 0 && done == 0)
			result = fill_unfilled(client, outcome, read->fault.page);
		counter_add(client->engine, spill_read_pages, piece.read_pages);
		counter_add(client->engine, promoted_pages, first == 0 && done > 0 && promoted);
		counter_add(client->engine, fill_mixed, done > 0 && __builtin_popcountll(piece.sources) > 1);
		first += count;
		if (first < read->page_count && done > 0) { /* what ended the piece is left out */
			fill_uncharge(client, 1);
			first++;
		}
		if (done == 0)
			fill_uncharge(client, read->page_count - first);
	}
	return result;
}

/* All ranges of a read are back. */
static void read_finish(struct client *client, struct fill_scratch *scratch, unsigned i)
{
	struct spill_read *read = client->reads[i];
	enum fill_result result;

	if (read->ranges[0].error < 0) {
		fill_uncharge(client, read->page_count);
		result = read_failed(client, read, read->ranges[0].error);
	} else {
		result = read_deliver(client, scratch, read);
	}
	if (result == FILL_DEFER)
		fill_defer(client, &read->fault);
	else
		engine_latency_add(client->engine, ENGINE_BACKING_SPILL, sys_now_ns() - read->fault.since_ns);
	/* Faults that found this read under way wait for its pages; those that it did not
	 * bring must be raised again. */
	(void)sys_userfaultfd_wake(client->events_fd, address_of(read->fault.page), read->page_count * PAGE_BYTES);
	read_free(client, i);
}

/* One range is back. True when it was the last of its read, whose number is *ret_i. */
static bool range_completed(struct client *client, const struct io_completion *completion, unsigned *ret_i)
{
	unsigned i = completion->cookie & ((1u << COOKIE_RANGE_SHIFT) - 1);
	struct spill_read *read = client->reads[i];
	struct read_range *range = &read->ranges[completion->cookie >> COOKIE_RANGE_SHIFT];

	range->error = (int)min_of(completion->result, 0);
	spill_count_read(range->span.spill, span_bytes(&range->span), range->error);
	client->io_requests--;
	*ret_i = i;
	return --read->pending == 0;
}

void fill_reap_reads(struct client *client, struct fill_scratch *scratch)
{
	struct io_completion completions[8];
	unsigned count, number;

	while (client->io && (count = io_reap(client->io, completions, 8)) > 0)
		for (unsigned i = 0; i < count; i++)
			if (range_completed(client, &completions[i], &number))
				read_finish(client, scratch, number);
}

bool fill_drop_reads(struct client *client)
{
	struct io_completion completion;
	unsigned number;

	while (client->io && io_reap(client->io, &completion, 1) > 0)
		if (range_completed(client, &completion, &number))
			read_free(client, number);
	for (unsigned i = 0; i < READS_MAX; i++)
		if (client->reads[i])
			return false;
	return true;
}

bool fill_is_charged_right(const struct client *client)
{
	int64_t pages = (int64_t)fill_open_pages(client);

	for (unsigned i = 0; i < READS_MAX; i++)
		if (client->reads[i])
			pages += client->reads[i]->page_count;
	return READ_ONCE(client->filling_pages) == pages;
}

void fill_free_reads(struct client *client)
{
	for (unsigned i = 0; i < READS_MAX; i++)
		if (client->reads[i])
			read_free(client, i);
}
