/* SPDX-License-Identifier: MIT */
/*
 * fill_open — the long run of a stream is expanded with the gate open.
 *
 * To expand 128 pages takes longer than anything else that is done under a gate, and evictors have to make room for the
 * next run meanwhile. So the slots of a run are noted and its objects copied under the gate, and when they are expanded the gate
 * is taken again: each page that still has the same slot, whole, is given back. From the first on that has not the run ends, and who
 * waits there faults again. As for a read from a backend (fill_read.c), whoever faults on a page of the run meanwhile
 * waits for its COPY.
 *
 * The objects are copied to the end of the buffer in which their pages are to be, one behind the other. No object is
 * larger than a page, so those that follow a page lie behind it; its own is moved out of its way.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "base.h"
#include "codec.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "fault_point.h"
#include "fill_internal.h"
#include "sys.h"

#define OPEN_PAGES_MIN 16u /* fewer are expanded sooner than the gate is taken again */

/* ---- under the gate ---- */

bool fill_is_open(const struct client *client, uint64_t first_page, uint64_t end_page)
{
	for (const struct fill_open *open = client->opens; open; open = open->next)
		if (first_page < open->fault.page + open->run.count && open->fault.page < end_page)
			return true;
	return false;
}

bool fill_waits_for_open(struct client *client, uint64_t page)
{
	for (struct fill_open *open = client->opens; open; open = open->next)
		if (page >= open->fault.page && page < open->fault.page + open->run.count) {
			open->is_awaited = true;
			return true;
		}
	return false;
}

uint64_t fill_open_pages(const struct client *client)
{
	uint64_t pages = 0;

	for (const struct fill_open *open = client->opens; open; open = open->next)
		pages += open->run.count;
	return pages;
}

/* Pages from this one on that are of no other open run. */
static unsigned window_before_opens(const struct client *client, uint64_t page, unsigned window)
{
	for (const struct fill_open *open = client->opens; open; open = open->next)
		if (open->fault.page > page)
			window = (unsigned)min_of((uint64_t)window, open->fault.page - page);
	return window;
}

static void unlink_open(struct client *client, const struct fill_open *open)
{
	struct fill_open **at = &client->opens;

	while (*at != open)
		at = &(*at)->next;
	*at = open->next;
}

static unsigned object_bytes(struct slot word)
{
	return word.tag == SLOT_POOL ? word.units * (unsigned)POOL_UNIT_BYTES : 0;
}

/* How far the run goes: what is SAME or in the pool by itself, and a few ZERO between them. */
static void plan(struct client *client, struct fill_open *open, unsigned window)
{
	struct fill_run *run = &open->run;

	for (unsigned i = 1; i < window && i <= run->count + FILL_ZERO_GAP_PAGES; i++) {
		struct slot *word = &run->words[i];

		if (slot_get(client->engine->slots, &client->record->map, open->fault.page + i, word) < 0 ||
		    (word->tag != SLOT_POOL && word->tag != SLOT_SAME && word->tag != SLOT_ZERO))
			break;
		if (word->tag != SLOT_ZERO)
			run->count = i + 1;
	}
}

static void copy_objects(const struct client *client, const struct fill_open *open)
{
	uint8_t *at = open->pages + open->run.count * PAGE_BYTES;

	for (unsigned i = open->run.count; i-- > 0;) {
		struct slot word = open->run.words[i];

		at -= object_bytes(word);
		if (word.tag == SLOT_POOL)
			memcpy(at, pool_object(client->engine->pool_space, word.location), object_bytes(word));
	}
}

/* Is it this one that evictors take from? Where there are many, they are at others meanwhile, and the CPUs have no time to lose. */
static bool is_waited_for(const struct client *client)
{
	return 2 * READ_ONCE(client->resident_pages) >= READ_ONCE(client->group->resident_pages);
}

bool fill_open_begin(struct client *client, struct fill_scratch *scratch, const struct fault *fault, struct slot first,
		     unsigned window)
{
	struct fill_open *open = &scratch->open;

	if (window < OPEN_PAGES_MIN || fault->synthetic || first.tag != SLOT_POOL || open->run.count > 0 ||
	    !is_waited_for(client))
		return false;
	window = fill_charge_some(client, fault->page, window_before_opens(client, fault->page, window));
	if (window < OPEN_PAGES_MIN) {
		fill_uncharge(client, window);
		return false;
	}
	open->pages = scratch->pages; /* its own from now on */
	scratch->pages = NULL;
	open->fault = *fault;
	open->window = window;
	open->is_awaited = false;
	open->error = 0;
	open->run.count = 1;
	open->run.words[0] = first;
	plan(client, open, window);
	fill_uncharge(client, window - open->run.count);
	copy_objects(client, open);
	fill_stream_ends(client, fault, fault->page + open->run.count);
	open->next = client->opens;
	client->opens = open;
	counter_add(client->engine, fill_open_runs, 1);
	return true;
}

/* ---- without it ---- */

void fill_open_expand(struct client *client, struct fill_open *open)
{
	const uint8_t *object = open->pages + open->run.count * PAGE_BYTES;
	uint8_t room[PAGE_BYTES];

	crash_point(CRASH_FILL_OPEN);
	(void)fault_point("fill/open");
	for (unsigned i = 0; i < open->run.count; i++)
		object -= object_bytes(open->run.words[i]);
	for (open->expanded = 0; open->expanded < open->run.count; open->expanded++) {
		uint8_t *page = open->pages + open->expanded * PAGE_BYTES;
		struct slot word = open->run.words[open->expanded];
		const uint8_t *from = object;

		if (word.tag != SLOT_POOL) {
			codec_fill(page, word.tag == SLOT_SAME ? word.check : 0);
			continue;
		}
		if (object < page + PAGE_BYTES)
			from = memcpy(room, object, object_bytes(word));
		open->error = fill_expand_object(client, from, word, page);
		if (open->error != 0)
			return;
		object += object_bytes(word);
	}
}

/* ---- under the gate again ---- */

/* Pages of the run, from the first on, that are expanded and still where they were. */
static unsigned unchanged_pages(struct client *client, const struct fill_open *open)
{
	struct slot word;
	unsigned i = 0;

	while (i < open->expanded &&
	       slot_get(client->engine->slots, &client->record->map, open->fault.page + i, &word) == 0 &&
	       slot_is_equal(word, open->run.words[i]))
		i++;
	return i;
}

/* The first page is not expanded: it is another by now, or there is no memory, or its object is broken. */
static enum fill_result open_failed(struct client *client, const struct fill_open *open)
{
	struct slot word;

	if (open->expanded > 0 || slot_get(client->engine->slots, &client->record->map, open->fault.page, &word) < 0 ||
	    !slot_is_equal(word, open->run.words[0]))
		return FILL_DEFER; /* look it up again */
	return open->error == -ENOMEM ? fill_try_again(client) : fill_poison(client, open->fault.page, word, open->error);
}

static enum fill_result deliver(struct client *client, struct fill_open *open)
{
	bool on_probation = fill_goes_on_probation(client, &open->fault, open->window);
	unsigned count = unchanged_pages(client, open);

	fill_uncharge(client, open->run.count - count);
	counter_add(client->engine, fill_open_left, open->run.count - count);
	if (count == 0)
		return open_failed(client, open);
	open->run.count = count;
	return fill_give_back(client, &open->fault, open->pages, &open->run, on_probation);
}

static void answer(struct client *client, struct fill_open *open)
{
	uint64_t bytes = open->run.count * PAGE_BYTES;
	enum fill_result result = deliver(client, open);

	if (result == FILL_DEFER) {
		fill_defer(client, &open->fault);
		client_wake(client); /* whoever waits for a fault next does not know of this one */
	} else {
		fill_note_answered(client, &open->fault, open->run.words[0].tag);
	}
	/* What others wait for and was not delivered is to be asked for again. */
	if (open->is_awaited)
		(void)sys_userfaultfd_wake(client->events_fd, address_of(open->fault.page), bytes);
	client_metadata_changed(client);
}

void fill_open_finish(struct client *client, struct fill_open *open)
{
	unlink_open(client, open);
	if (!client->dead) /* else nobody will look, and nothing of it is charged any more */
		answer(client, open);
	block_give(&client->engine->expand_blocks, open->pages);
	open->run.count = 0;
}
