/* SPDX-License-Identifier: MIT */
/*
 * evict — one batch: choose, MOVE to staging, read, store, settle, release.
 *
 *   gate     1 choose resident pages on probation (order.h), else from the hand on (PAGEMAP_SCAN); skip
 *              what may not go
 *            2 record the batch: INTENT, slots STAGED — before the MOVE is posted, so that whatever
 *              happens now, no fill mistakes these pages for untouched ones
 *            3 post MOVE, wait for the agent's answer
 *            4 verify with PAGEMAP_SCAN what really is in staging; what is not goes back to what it was
 *   no gate  5 read staging, compare with kept copies, compress, store
 *   gate     6 settle every page that is still STAGED by this batch; free what was stored for others
 *            7 post RELEASE
 *   no gate  8 wait for it: only then is the RAM free and the budget credited
 *
 * Mapped zero pages are moved out too: they cost nothing, but a write to one would allocate memory
 * without a fault of ours. In staging they are not resident, so step 4 makes them untouched pages again.
 *
 * A page can leave the batch at any time between 4 and 6: faulted (served from staging or from our
 * buffer), unmapped, removed, or moved elsewhere by mremap.
 */
#define _GNU_SOURCE
#include "evict.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base.h"
#include "cow.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "fault_point.h"
#include "sys.h"

#define ANSWER_MS 100 /* an agent that takes longer has its batch parked */
#define READ_TRIES 1000
#define GATE_SPIN_NS 20000 /* a fault takes less; what takes longer has an agent wait for this CPU, maybe */

#define SCAN_BYTES_MAX (1ULL << 30) /* address space looked at in one scan */

int evictor_create(struct evictor *ret_evictor)
{
	size_t bytes = (BATCH_PAGES_MAX + 1) * PAGE_BYTES;
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct codec_scratch *codec = codec_scratch_create();

	if (memory == MAP_FAILED || !codec) {
		codec_scratch_destroy(codec);
		if (memory != MAP_FAILED)
			munmap(memory, bytes);
		return -ENOMEM;
	}
	*ret_evictor = (struct evictor){
		.buffer = memory,
		.object = (uint8_t *)memory + BATCH_PAGES_MAX * PAGE_BYTES,
		.codec = codec,
	};
	return 0;
}

void evictor_destroy(struct evictor *evictor)
{
	if (evictor->buffer)
		munmap(evictor->buffer, (BATCH_PAGES_MAX + 1) * PAGE_BYTES);
	codec_scratch_destroy(evictor->codec);
}

/* ---- 1 choose ---- */

static bool was_filled_just_now(const struct client *client, uint64_t page)
{
	for (unsigned i = 0; i < RECENT_FILLS; i++)
		if (client->recent[i] == page)
			return true;
	return false;
}

static bool is_quarantined(struct client *client, uint64_t address, uint64_t now)
{
	const struct range *range;

	while (client->quarantine.count) {
		range = range_set_at(&client->quarantine, address);
		if (!range || range->start > address)
			return false;
		if (now - range->value < QUARANTINE_NS)
			return true;
		(void)range_set_remove(&client->quarantine, range->start, range->end, QUARANTINE_MAX);
	}
	return false;
}

/* Pages of a removed range that are seen missing have been zapped: what comes there later is new. */
static void quarantine_review(struct client *client, uint64_t now)
{
	for (size_t i = 0; i < client->quarantine.count;) {
		struct range range = client->quarantine.ranges[i];
		struct page_range resident;
		uint64_t walk_end = range.end;
		int count = sys_resident_ranges(client->pagemap_fd, range.start, range.end, &resident, 1,
						1, &walk_end);

		if (count == 0 || now - range.value >= QUARANTINE_NS)
			(void)range_set_remove(&client->quarantine, range.start, range.end,
					       QUARANTINE_MAX);
		else if (count == 1 && resident.start > range.start)
			(void)range_set_remove(&client->quarantine, range.start, resident.start,
					       QUARANTINE_MAX);
		if (i < client->quarantine.count && client->quarantine.ranges[i].start == range.start)
			i++;
		else if (count == 1)
			i++;
	}
}

struct choice {
	unsigned window;
	uint32_t protection;
	unsigned page_count;
	bool wrapped, on_probation;
	uint64_t pages[BATCH_PAGES_MAX]; /* as they were chosen; mremap changes those of the record */
	struct slot before[BATCH_PAGES_MAX];
	struct vswap_command command; /* empty in a successor */
};

/* A batch whose MOVE is posted and not answered. The gate is shut while it exists. */
struct parked_batch {
	struct choice choice;
	uint32_t number;
};

static int find_window(struct client *client)
{
	for (int i = 0; i < VSWAP_WINDOWS; i++)
		if (client->record->batches[i].phase == BATCH_FREE && !client->batches[i].releasing)
			return i;
	return -EAGAIN;
}

/* Take a page into the batch: INTENT and STAGED. False when it may not be evicted. */
static bool choose_page(struct client *client, struct choice *choice, uint64_t page, bool desperate,
			uint64_t now)
{
	struct batch_record *record = &client->record->batches[choice->window];
	struct slot_space *space = client->engine->slots;
	unsigned i = choice->page_count;
	struct slot slot;

	if (is_quarantined(client, address_of(page), now) ||
	    (!desperate && was_filled_just_now(client, page)))
		return false;
	if (slot_get(space, &client->record->map, page, &slot) < 0 ||
	    (slot.tag != SLOT_NONE && !slot_is_kept(slot.tag)))
		return false;
	record->pages[i] = choice->pages[i] = page;
	record->before[i] = slot;
	record->page_count = i + 1;
	slot = (struct slot){ .tag = SLOT_STAGED, .location = choice->window * BATCH_PAGES_MAX + i };
	if (slot_set(space, &client->record->map, page, slot) < 0) {
		record->page_count = i;
		return false;
	}
	choice->page_count++;
	return true;
}

static void add_to_runs(struct choice *choice, uint64_t page)
{
	struct vswap_command *command = &choice->command;
	struct vswap_run *run = command->run_count ? &command->runs[command->run_count - 1] : NULL;

	if (run && run->address + run->pages * PAGE_BYTES == address_of(page)) {
		run->pages++;
		return;
	}
	VS_CHECK(command->run_count < VSWAP_RUNS_MAX);
	command->runs[command->run_count++] = (struct vswap_run){ .address = address_of(page), .pages = 1 };
}

/* Pages on probation, oldest first. */
static void choose_on_probation(struct client *client, struct choice *choice)
{
	uint64_t now = sys_now_ns(), again[BATCH_PAGES_MAX];
	unsigned left = BATCH_PAGES_MAX, again_count = 0;
	struct probation_run run;

	choice->on_probation = true;
	while (left > 0 && probation_peek(&client->probation, &run)) {
		const struct range *region = range_set_at(&client->regions, address_of(run.page));
		uint64_t pages;

		if (!region || region->start > address_of(run.page)) { /* unmapped meanwhile */
			probation_take(&client->probation, 1);
			continue;
		}
		if (choice->page_count > 0 && region->value != choice->protection)
			break;
		choice->protection = (uint32_t)region->value;
		pages = min_of(run.count, page_of(region->end) - run.page);
		pages = min_of(pages, (uint64_t)left);
		for (uint64_t page = run.page; page < run.page + pages; page++)
			if (choose_page(client, choice, page, false, now))
				add_to_runs(choice, page);
			else if (was_filled_just_now(client, page))
				again[again_count++] = page;
		probation_take(&client->probation, pages);
		left -= (unsigned)pages;
	}
	for (unsigned i = 0; i < again_count; i++)
		probation_push(&client->probation, again[i], 1);
}

/* Look for resident pages from the hand on, within one region, at most SCAN_BYTES_MAX of it. */
static void choose_by_hand(struct client *client, struct choice *choice, bool desperate)
{
	struct page_range ranges[BATCH_PAGES_MAX];
	const struct range *region = range_set_at(&client->regions, client->hand);
	uint64_t start, end, walk_end, now = sys_now_ns();
	int count;

	if (!region) {
		choice->wrapped = true;
		client->hand = 0;
		region = range_set_at(&client->regions, 0);
		if (!region)
			return;
	}
	if (client->quarantine.count)
		quarantine_review(client, now);
	start = max_of(client->hand, region->start);
	end = min_of(region->end, start + SCAN_BYTES_MAX);
	choice->protection = (uint32_t)region->value;
	count = sys_mapped_ranges(client->pagemap_fd, start, end, ranges, BATCH_PAGES_MAX,
				  BATCH_PAGES_MAX, &walk_end);
	if (count < 0) {
		client->hand = end;
		return;
	}
	for (int i = 0; i < count; i++)
		for (uint64_t at = ranges[i].start; at < ranges[i].end; at += PAGE_BYTES)
			if (choice->page_count < BATCH_PAGES_MAX &&
			    choose_page(client, choice, page_of(at), desperate, now))
				add_to_runs(choice, page_of(at));
	client->hand = walk_end;
}

/* ---- 3, 4 move and verify ---- */

static uint64_t window_address(const struct client *client, unsigned window, uint32_t protection)
{
	return client->record->staging[protection] + window * BATCH_PAGES_MAX * PAGE_BYTES;
}

/* Pages of the window that are in staging now. */
static int staged_mask(struct client *client, const struct choice *choice, uint64_t *ret_mask)
{
	struct page_range ranges[BATCH_PAGES_MAX];
	uint64_t base = window_address(client, choice->window, choice->protection), walk_end, mask = 0;
	int count = sys_resident_ranges(client->pagemap_fd, base, base + BATCH_PAGES_MAX * PAGE_BYTES,
					ranges, BATCH_PAGES_MAX, 0, &walk_end);

	if (count < 0)
		return count;
	for (int i = 0; i < count; i++)
		mask |= mask_of((unsigned)((ranges[i].start - base) / PAGE_BYTES),
				(unsigned)((ranges[i].end - ranges[i].start) / PAGE_BYTES));
	*ret_mask = mask & mask_of(0, choice->page_count);
	return 0;
}

/* As staged_mask, but waits out a shortage of memory: without it nobody knows where the pages are. */
static int staged_mask_wait(struct client *client, const struct choice *choice, uint64_t *ret_mask)
{
	int result = staged_mask(client, choice, ret_mask);

	for (unsigned tries = 1; result == -ENOMEM && tries < READ_TRIES; tries++) {
		sys_sleep_ms(1);
		result = staged_mask(client, choice, ret_mask);
	}
	return result;
}

/* Pages of a window that were not moved are again what they were. */
static void take_back(struct client *client, unsigned window, uint64_t mask)
{
	struct batch_record *record = &client->record->batches[window];

	for (unsigned i = 0; i < record->page_count; i++) {
		if (!(mask >> i & 1))
			continue;
		VS_CHECK(slot_set(client->engine->slots, &client->record->map, record->pages[i],
				  record->before[i]) == 0);
		record->pages[i] = BATCH_PAGE_GONE;
	}
}

/* Pages of `asked` that the agent says it has dealt with; beyond an error, what lies in staging may not be the page
 * (which_moved). The answer is the client's, and for a successor the question too: a lie loses it pages of its own. */
static uint64_t answered_mask(const struct vswap_command *asked, const struct vswap_command *answer)
{
	uint32_t run_count = min_of(READ_ONCE(asked->run_count), (uint32_t)VSWAP_RUNS_MAX);
	uint64_t mask = 0;

	for (uint32_t i = 0, first = 0; i < run_count && first < BATCH_PAGES_MAX; i++) {
		uint32_t pages = min_of(READ_ONCE(asked->runs[i].pages), BATCH_PAGES_MAX - first);
		uint64_t dealt = (uint64_t)READ_ONCE(answer->runs[i].moved) + READ_ONCE(answer->runs[i].busy);

		if (dealt > 0)
			mask |= mask_of(first, (unsigned)min_of(dealt, (uint64_t)pages));
		first += pages;
	}
	return mask;
}

/*
 * Pages of `staged`, what is in the window, that are those of the batch; `dealt` as answered_mask. Beyond an error it
 * may be what mlockall put there, and then the page is where it was. But where it is there no more, it is what is in the
 * window: Linux 6.18 moves a page that it has swapped itself, and then says EEXIST. One that was unmapped meanwhile takes
 * no harm by it: its event, unread so far, will say so.
 */
static uint64_t which_moved(const struct client *client, unsigned window, uint64_t staged, uint64_t dealt)
{
	const struct batch_record *record = &client->record->batches[window];
	uint64_t moved = staged & dealt;

	for (unsigned i = 0; i < record->page_count; i++)
		if ((staged & ~dealt) >> i & 1 && record->pages[i] != BATCH_PAGE_GONE &&
		    !sys_page_is_present(client->pagemap_fd, address_of(record->pages[i])))
			moved |= 1ULL << i;
	return moved;
}

static const struct vswap_command *command_at(const struct client *client, uint32_t number)
{
	return &client->ring->commands[number % VSWAP_RING_COMMANDS];
}

static void note_answer(struct client *client, const struct choice *choice, uint32_t number,
			struct evict_result *result)
{
	const struct vswap_command *answer = command_at(client, number);

	for (unsigned i = 0; i < choice->command.run_count; i++) {
		uint32_t busy = READ_ONCE(answer->runs[i].busy);
		uint32_t error = READ_ONCE(answer->runs[i].error);

		result->busy += min_of(busy, choice->command.runs[i].pages);
		result->event_unread |= error == EAGAIN;
		if (error && error != EAGAIN)
			WRITE_ONCE(client->size_pages_seen, 0); /* mappings are not as we know: discover again */
	}
	counter_add(client->engine, evict_busy, result->busy);
	if (result->event_unread)
		counter_add(client->engine, evict_again, 1);
}

/* What was not moved, for an event was unread, is for the next batch. Hints: what is out by then is passed over. */
static void choose_again(struct client *client, const struct choice *choice, uint64_t moved)
{
	for (unsigned i = choice->page_count; i-- > 0;) {
		if (moved >> i & 1)
			continue;
		if (choice->on_probation)
			probation_return(&client->probation, choice->pages[i], 1);
		else
			client->hand = address_of(choice->pages[i]);
	}
}

/* Step 3: post the MOVE. */
static uint32_t post_move(struct client *client, struct choice *choice)
{
	client->record->batches[choice->window].protection = choice->protection;
	choice->command.operation = VSWAP_MOVE_OUT;
	choice->command.window = choice->window;
	choice->command.protection = choice->protection;
	(void)fault_point("evict/post");
	return client_post(client, &choice->command);
}

/* Step 7: have the window emptied; it is free once that is answered (client_reap_releases). The agent is still to be woken. */
static void enqueue_release(struct client *client, const struct choice *choice)
{
	struct vswap_command command = { .operation = VSWAP_RELEASE, .window = choice->window,
					 .protection = choice->protection };
	struct batch *batch = &client->batches[choice->window];

	__atomic_store_n(&client->record->batches[choice->window].phase, BATCH_RELEASING,
			 __ATOMIC_RELEASE);
	crash_point(CRASH_EVICT_RELEASING);
	batch->release_number = client_enqueue(client, &command);
	batch->releasing = true;
	crash_point(CRASH_EVICT_RELEASED);
}

static void release(struct client *client, const struct choice *choice)
{
	enqueue_release(client, choice);
	client_wake_agent(client);
}

/* What is in staging stays there, and is served from there. */
static void stop_eviction(struct client *client, int error)
{
	struct engine_event event = { .kind = ENGINE_EVENT_CLIENT_ERROR, .pid = client->pid,
				      .group = client->group->number, .a = (uint64_t)(int64_t)-error };

	WRITE_ONCE(client->evict_error, error);
	pthread_cond_broadcast(&client->batches_changed);
	if (!sys_userfaultfd_is_gone(client->events_fd))
		engine_event_push(client->engine, &event);
}

/* Step 4, once the MOVE was answered or its agent is gone (then its last command has ended too, one way
 * or the other). *ret_moved: pages of the window that are ours to store. */
static int finish_move(struct client *client, struct choice *choice, uint32_t number,
		       uint64_t *ret_moved)
{
	struct batch_record *record = &client->record->batches[choice->window];
	uint64_t moved = 0;

	if (staged_mask_wait(client, choice, &moved) < 0) {
		stop_eviction(client, ESRCH);
		return -ESRCH; /* /proc is gone: so is the client; bury will settle the batch */
	}
	if (client_is_answered(client, number))
		moved = which_moved(client, choice->window, moved,
				    answered_mask(&choice->command, command_at(client, number)));
	take_back(client, choice->window, ~moved);
	for (unsigned i = 0; i < choice->page_count; i++)
		choice->before[i] = record->before[i];
	__atomic_store_n(&record->phase, BATCH_STAGED, __ATOMIC_RELEASE);
	client->batches[choice->window] = (struct batch){
		.staged = moved,
		.resident_pages = (uint32_t)__builtin_popcountll(moved),
	};
	crash_point(CRASH_EVICT_STAGED);
	if (moved == 0)
		release(client, choice); /* nothing to store; zero pages may lie there */
	*ret_moved = moved;
	return 0;
}

static int park(struct client *client, const struct choice *choice, uint32_t number)
{
	struct parked_batch *parked = malloc(sizeof *parked);

	VS_CHECK(parked);
	*parked = (struct parked_batch){ *choice, number };
	WRITE_ONCE(client->parked, parked);
	__atomic_fetch_add(&client->group->parked, 1, __ATOMIC_RELAXED);
	return -EAGAIN;
}

/* ---- 5 store ---- */

struct stored {
	struct slot slots[BATCH_PAGES_MAX];
	uint64_t reused;  /* pages whose kept copy is used again */
	uint64_t created; /* pages for which a pool object was stored */
	uint64_t shared;  /* pages for which a reference was taken to a relative's copy */
};

/* A pool object for a page: 0, or as pool_store. */
static int store_object(struct client *client, struct evictor *evictor, const void *page, uint64_t check,
			struct slot *ret_slot)
{
	unsigned units = codec_compress(evictor->codec, CODEC_LZ4, page, evictor->object);
	uint64_t handle;
	int result = pool_store(client->group->pool, evictor->object, units, &handle);

	if (result < 0) {
		counter_add(client->engine, evict_failed, 1);
		return result;
	}
	if (units == POOL_UNITS_MAX)
		counter_add(client->engine, evicted_raw, 1);
	counter_add(client->engine, evicted_stored, 1);
	*ret_slot = (struct slot){ .tag = SLOT_POOL, .units = (uint8_t)units, .location = handle, .check = check };
	return 0;
}

/*
 * What forked relatives have in common is in memory once while it is resident. One of them has evicted this page
 * already, and it was the same (as for kept copies, the check says so): one copy serves both.
 */
static bool share_with(struct client *relative, uint64_t page, uint64_t check, struct slot *ret_slot)
{
	struct slot_space *slots = relative->engine->slots;
	struct slot_map *map = &relative->record->map;
	struct slot slot;
	uint64_t index;
	bool shared = false;

	if (pthread_mutex_trylock(&relative->gate) != 0)
		return false; /* it is only worth a try */
	if (!relative->dead && !client_is_shut(relative) && !relative->wiped_unknown &&
	    slot_get(slots, map, page, &slot) == 0) {
		struct slot copy = slot.tag == SLOT_INDIRECT ? slot_shared_get(slots, slot.location) : slot;

		shared = (copy.tag == SLOT_POOL || copy.tag == SLOT_SPILL) && copy.check == check &&
			 slot_share(slots, map, page, &index) == 0;
		if (shared)
			*ret_slot = (struct slot){ .tag = SLOT_INDIRECT, .location = index };
	}
	pthread_mutex_unlock(&relative->gate);
	return shared;
}

/* With a reference; NULL when there is none that its copies could be shared with. */
static struct client *relative_get(struct client *client)
{
	uint64_t token = READ_ONCE(client->relative);
	struct client *relative = token ? client_get(client->engine, token) : NULL;

	if (relative && (relative->group != client->group || READ_ONCE(relative->dead))) {
		client_put(relative);
		relative = NULL;
	}
	if (token && !relative)
		WRITE_ONCE(client->relative, 0);
	return relative;
}

/* `relative`: a client that may have the same page out already, or NULL. */
static int store_page_once(struct client *client, struct client *relative, struct evictor *evictor, const void *page,
			   uint64_t page_number, struct slot before, struct slot *ret_slot)
{
	uint64_t word, check;

	if (codec_same_filled(page, &word)) {
		*ret_slot = (struct slot){ .tag = word ? SLOT_SAME : SLOT_ZERO, .check = word };
		if (word)
			counter_add(client->engine, evicted_same, 1);
		else
			counter_add(client->engine, evicted_zero, 1);
		return EVICT_STORED;
	}
	check = codec_check(page, client->engine->state->secret);
	if (relative && share_with(relative, page_number, check, ret_slot)) {
		crash_point(CRASH_EVICT_SHARED);
		counter_add(client->engine, evicted_shared, 1);
		return EVICT_SHARED;
	}
	if (slot_is_kept(before.tag) && before.check == check) {
		*ret_slot = slot_unkept(before);
		counter_add(client->engine, evicted_unchanged, 1);
		return EVICT_REUSED;
	}
	return store_object(client, evictor, page, check, ret_slot);
}

int evict_store_page(struct client *client, struct evictor *evictor, const void *page, struct slot before,
		     struct slot *ret_slot)
{
	return store_page_once(client, NULL, evictor, page, 0, before, ret_slot);
}

/* Waits out a shortage of memory: the bytes are safe in staging. When it lasts, the group that brought the page is out
 * of memory. */
static void store_page(struct client *client, struct client *relative, struct evictor *evictor, uint64_t page_number,
		       struct slot before, unsigned i, struct stored *stored)
{
	const uint8_t *page = evictor->buffer + i * PAGE_BYTES;
	uint64_t since = 0;
	int result;

	stored->slots[i] = (struct slot){ .tag = SLOT_NONE };
	while ((result = store_page_once(client, relative, evictor, page, page_number, before, &stored->slots[i])) < 0) {
		if (READ_ONCE(client->dead) || sys_userfaultfd_is_gone(client->events_fd))
			return;
		since = since ? since : sys_now_ns();
		if (sys_now_ns() - since > OUT_OF_MEMORY_NS) {
			reclaim_kill_largest(client->engine, client->group);
			since = 0;
		}
		sys_sleep_ms(1);
	}
	if (result == EVICT_REUSED)
		stored->reused |= 1ULL << i;
	else if (result == EVICT_SHARED)
		stored->shared |= 1ULL << i;
	else if (stored->slots[i].tag == SLOT_POOL)
		stored->created |= 1ULL << i;
}

/* By the addresses that they were moved from: mremap may have changed them, then a relative has nothing, or the same
 * after all. */
static void store_pages(struct client *client, struct evictor *evictor, const struct choice *choice, uint64_t moved,
			struct stored *stored)
{
	struct client *relative = relative_get(client);

	for (unsigned i = 0; i < choice->page_count; i++)
		if (moved >> i & 1)
			store_page(client, relative, evictor, choice->pages[i], choice->before[i], i, stored);
	if (relative)
		client_put(relative);
}

/* ---- 6 settle; the gate is held ---- */

static void settle_batch(struct client *client, const struct choice *choice, const struct stored *stored)
{
	struct batch_record *record = &client->record->batches[choice->window];
	struct batch *batch = &client->batches[choice->window];

	for (unsigned i = 0; i < choice->page_count; i++) {
		if (batch->staged >> i & 1) {
			uint64_t page = record->pages[i];

			VS_CHECK(slot_set(client->engine->slots, &client->record->map, page,
					  stored->slots[i]) == 0);
			ghosts_note(&client->group->ghosts, client->index, page);
			if (slot_is_kept(record->before[i].tag) && !(stored->reused >> i & 1))
				client_free_copy(client, record->before[i]);
			/* Unchanged ones, too: when the writer came by, they were resident. */
			if (stored->slots[i].tag == SLOT_POOL)
				client_cold_push(client, page >> CLUSTER_SHIFT,
						 stored->slots[i].units == POOL_UNITS_MAX);
			crash_point(CRASH_EVICT_SETTLED_ONE);
		} else if (stored->created >> i & 1) {
			client_free_copy(client, stored->slots[i]);
		} else if (stored->shared >> i & 1) {
			slot_shared_put(client->engine->slots, stored->slots[i].location, client_free_copy, client);
		}
	}
	batch->staged = 0;
	__atomic_store_n(&batch->copied, false, __ATOMIC_RELEASE);
	batch->buffer = NULL;
	crash_point(CRASH_EVICT_SETTLED);
	pthread_cond_broadcast(&client->batches_changed);
}

/* Pages shared with forked relatives cannot be moved until they are exclusive: have the agent write to
 * them, gate open, for the copy may need room and raise faults. The next batch takes them at
 * once, so that no more than a batch is ever doubled. */
static void make_exclusive(struct client *client, const struct choice *choice, uint64_t moved)
{
	struct choice left = { .command = { .operation = VSWAP_POPULATE } };
	unsigned i = 0;

	SCOPED_LOCK(&client->gate);
	/* What was moved is missing now: to populate that would be to fault it in again. And the gate was open: what was
	 * given up meanwhile (yield.h) is none of ours. */
	for (unsigned r = 0; r < choice->command.run_count; r++)
		for (unsigned k = 0; k < choice->command.runs[r].pages; k++, i++)
			if (!(moved >> i & 1) &&
			    range_set_has(&client->regions, choice->command.runs[r].address + k * PAGE_BYTES))
				add_to_runs(&left, page_of(choice->command.runs[r].address) + k);
	if (client->dead || client->populating || client_is_shut(client) || left.command.run_count == 0)
		return;
	/* Once for a place: what is still busy the second time is pinned. */
	if (client->populated_address == left.command.runs[0].address)
		return;
	client->populated_address = left.command.runs[0].address;
	if (choice->on_probation)
		for (unsigned r = left.command.run_count; r-- > 0;)
			probation_return(&client->probation, page_of(left.command.runs[r].address),
					 left.command.runs[r].pages);
	else
		client->hand = client->populated_address;
	WRITE_ONCE(client->pss, true); /* a fork that we did not see, before we managed it */
	for (unsigned r = 0; r < left.command.run_count; r++)
		cow_let_through(client, page_of(left.command.runs[r].address), left.command.runs[r].pages);
	client_populates(client, client_post(client, &left.command), &left.command);
	counter_add(client->engine, populated_pages, choice->page_count);
}

/* Steps 5 to 8 for the pages of `moved`. */
static void store_and_release(struct client *client, struct evictor *evictor,
			      const struct choice *choice, uint64_t moved)
{
	struct batch *batch = &client->batches[choice->window];
	struct stored stored = { 0 };
	uint32_t number = 0;
	bool posted = false;
	uint64_t window = window_address(client, choice->window, choice->protection);
	int result = sys_read_client_pages(client->mem_fd, window, evictor->buffer, moved);

	/* For want of memory: it may pass. */
	for (unsigned tries = 1; result == -ENOMEM && tries < READ_TRIES; tries++) {
		sys_sleep_ms(1);
		result = sys_read_client_pages(client->mem_fd, window, evictor->buffer, moved);
	}

	if (result == 0) {
		batch->buffer = evictor->buffer;
		__atomic_store_n(&batch->copied, true, __ATOMIC_RELEASE);
		store_pages(client, evictor, choice, moved, &stored);
	}
	crash_point(CRASH_EVICT_STORED);
	client_lock_gate(client, GATE_SPIN_NS);
	if (result < 0 && !client->dead) {
		/* Still in staging, served from there if at all possible; never touched again by us. */
		stop_eviction(client, -result);
	} else if (!client->dead) {
		settle_batch(client, choice, &stored);
		enqueue_release(client, choice);
		number = batch->release_number;
		posted = true;
	} else {
		settle_batch(client, choice, &stored); /* frees what was stored */
	}
	client->evicted_pages += (unsigned)__builtin_popcountll(moved);
	client_metadata_changed(client);
	pthread_mutex_unlock(&client->gate);
	group_pool_changed(client->group);
	counter_add(client->engine, evicted_pages, __builtin_popcountll(moved));
	__atomic_fetch_add(&client->group->evicted_pages, (uint64_t)__builtin_popcountll(moved), __ATOMIC_RELAXED);
	if (posted)
		client_wake_agent(client);
	if (posted && client_wait(client, number, ANSWER_MS) == 0) {
		client_lock_gate(client, GATE_SPIN_NS);
		client_reap_releases(client);
		pthread_mutex_unlock(&client->gate);
		engine_room_made(client->engine, client->group);
	}
}

/* May a batch of this client be started? The gate is held. */
static int may_evict(struct client *client)
{
	if (client->dead)
		return -ESRCH;
	if (READ_ONCE(client->agent_gone) || client->evict_error || !client->ring || client->leaving)
		return -EPIPE;
	/* A forked child is served from its fork on and has a ring from its HELLO on. Not before its ARM may
	 * anything be in that: an agent whose daemon dies meanwhile takes itself for armed, and would move
	 * pages to a staging that no record names. */
	if (client->trash_fd < 0)
		return -EPIPE;
	if (client->populating && client_is_answered(client, client->populate_number))
		client->populating = false;
	if (client->fork_pending || client_is_shut(client) || client->populating || client->wiped_unknown)
		return -EAGAIN;
	return 0;
}

int evict_batch(struct client *client, struct evictor *evictor, bool desperate,
		struct evict_result *ret_result)
{
	struct choice choice = { 0 };
	uint64_t moved = 0;
	int window, result;

	*ret_result = (struct evict_result){ 0 };
	client_lock_gate(client, GATE_SPIN_NS);
	client_reap_releases(client);
	result = may_evict(client);
	window = find_window(client);
	if (result < 0 || window < 0) {
		pthread_mutex_unlock(&client->gate);
		return result < 0 ? result : window;
	}
	choice.window = (unsigned)window;
	client->record->batches[window].page_count = 0;
	__atomic_store_n(&client->record->batches[window].phase, BATCH_INTENT, __ATOMIC_RELEASE);
	if (!desperate && !(client->group->flags & ENGINE_GROUP_TORTURE) &&
	    probation_is_full(&client->probation, READ_ONCE(client->resident_pages)))
		choose_on_probation(client, &choice);
	else
		choose_by_hand(client, &choice, desperate);
	ret_result->wrapped = choice.wrapped;
	if (choice.page_count > 0 && staged_mask(client, &choice, &moved) == 0 && moved) {
		/* The program has had its whole address space populated (mlockall): what lies there now
		 * would be taken for pages that are busy. */
		moved = 0;
		take_back(client, choice.window, ~moved);
		release(client, &choice);
		result = -EAGAIN;
	} else if (choice.page_count > 0) {
		uint32_t number;

		crash_point(CRASH_EVICT_INTENT);
		number = post_move(client, &choice);
		crash_point(CRASH_EVICT_POSTED);
		result = client_wait(client, number, ANSWER_MS);
		crash_point(CRASH_EVICT_ANSWERED);
		if (result == -ETIMEDOUT) {
			result = park(client, &choice, number);
			choose_again(client, &choice, 0); /* what it will not have moved */
		} else if (result == 0) {
			note_answer(client, &choice, number, ret_result);
		}
		if (!client->parked && finish_move(client, &choice, number, &moved) < 0)
			result = -ESRCH;
		if (result == 0 && ret_result->event_unread) {
			choose_again(client, &choice, moved);
			result = -EAGAIN;
		}
	} else {
		client->record->batches[window].phase = BATCH_FREE;
	}
	pthread_mutex_unlock(&client->gate);
	if (moved)
		store_and_release(client, evictor, &choice, moved);
	if (ret_result->busy && result == 0)
		make_exclusive(client, &choice, moved);
	ret_result->pages = (unsigned)__builtin_popcountll(moved);
	ret_result->untouched = choice.page_count - min_of(choice.page_count, ret_result->pages +
							   ret_result->busy);
	return result;
}

bool evict_resume(struct client *client, struct evictor *evictor)
{
	struct parked_batch *parked;
	uint64_t moved = 0;

	pthread_mutex_lock(&client->gate);
	parked = client->parked;
	if (!parked || client->dead ||
	    client_answer(client, parked->number) == -ETIMEDOUT) {
		pthread_mutex_unlock(&client->gate);
		return false;
	}
	WRITE_ONCE(client->parked, NULL);
	__atomic_fetch_sub(&client->group->parked, 1, __ATOMIC_RELAXED);
	(void)finish_move(client, &parked->choice, parked->number, &moved);
	pthread_mutex_unlock(&client->gate);
	client_wake(client);
	if (moved)
		store_and_release(client, evictor, &parked->choice, moved);
	free(parked);
	return true;
}

void evict_abandon(struct client *client)
{
	for (unsigned w = 0; w < VSWAP_WINDOWS; w++) {
		struct batch_record *record = &client->record->batches[w];

		if (record->phase == BATCH_FREE || record->phase == BATCH_RELEASING)
			continue;
		for (unsigned i = 0; i < record->page_count; i++) {
			uint64_t page = record->pages[i];
			struct slot slot;

			if (page == BATCH_PAGE_GONE ||
			    slot_get(client->engine->slots, &client->record->map, page, &slot) < 0 ||
			    slot.tag != SLOT_STAGED)
				continue;
			client_staged_gone(client, page, slot);
			VS_CHECK(slot_set(client->engine->slots, &client->record->map, page,
					  (struct slot){ .tag = SLOT_POISONED }) == 0);
			counter_add(client->engine, poisoned_pages, 1);
		}
	}
}

/* ---- what a dead daemon left ---- */

/* The pages of a window whose slots say that they are in it. */
static uint64_t slots_mask(struct client *client, unsigned window)
{
	const struct batch_record *record = &client->record->batches[window];
	uint64_t mask = 0;

	for (unsigned i = 0; i < record->page_count; i++) {
		struct slot slot;

		if (record->pages[i] != BATCH_PAGE_GONE &&
		    slot_get(client->engine->slots, &client->record->map, record->pages[i], &slot) == 0 &&
		    slot.tag == SLOT_STAGED && slot.location == window * BATCH_PAGES_MAX + i)
			mask |= 1ULL << i;
	}
	return mask;
}

/*
 * Pages that the MOVE of a batch in INTENT was answered for; all when its agent ended over it, none when it was not
 * posted. It need not be the last command: while it was parked other windows may have been released.
 */
static uint64_t dealt_mask(const struct client *client, unsigned window)
{
	for (uint32_t back = 1; back <= VSWAP_RING_COMMANDS; back++) {
		uint32_t number = client->posted - back, operation;
		const struct vswap_command *command = command_at(client, number);

		operation = READ_ONCE(command->operation);
		if (READ_ONCE(command->window) != window ||
		    (operation != VSWAP_MOVE_OUT && operation != VSWAP_RELEASE))
			continue;
		if (operation == VSWAP_RELEASE) /* of the batch before */
			return 0;
		return client_is_answered(client, number) ? answered_mask(command, command) : ~0ULL;
	}
	return 0;
}

static struct choice choice_of(const struct client *client, unsigned window)
{
	const struct batch_record *record = &client->record->batches[window];
	struct choice choice = { .window = window, .protection = record->protection,
				 .page_count = record->page_count };

	for (unsigned i = 0; i < record->page_count; i++) {
		choice.pages[i] = record->pages[i];
		choice.before[i] = record->before[i];
	}
	return choice;
}

void evict_recover_batches(struct client *client, unsigned *ret_windows)
{
	*ret_windows = 0;
	for (unsigned w = 0; w < VSWAP_WINDOWS; w++) {
		struct batch_record *record = &client->record->batches[w];
		uint64_t resident = 0, mask = slots_mask(client, w);
		struct choice choice = choice_of(client, w);

		if (record->phase != BATCH_FREE)
			*ret_windows |= 1u << w;
		if (record->phase != BATCH_INTENT && record->phase != BATCH_STAGED)
			continue;
		if (staged_mask_wait(client, &choice, &resident) < 0) {
			/* Nothing may be released of what may be the only copy. */
			*ret_windows = 0;
			stop_eviction(client, ESRCH);
			return;
		}
		/* Mostly only staging is asked: what lies at the pages' own addresses may be another mapping by now, whose
		 * event is unread. A page that is back already and was not settled is stored as it was;
		 * resync finds it (recover.c). */
		if (record->phase == BATCH_INTENT)
			resident = which_moved(client, w, resident, dealt_mask(client, w));
		take_back(client, w, mask & ~resident);
		mask &= resident;
		__atomic_store_n(&record->phase, BATCH_STAGED, __ATOMIC_RELEASE);
		client->batches[w] = (struct batch){
			.staged = mask, .resident_pages = (uint32_t)__builtin_popcountll(resident) };
	}
}

void evict_recover_store(struct client *client, struct evictor *evictor, unsigned *windows)
{
	for (unsigned w = 0; w < VSWAP_WINDOWS; w++) {
		struct choice choice;
		uint64_t staged;

		if (!(*windows >> w & 1))
			continue;
		pthread_mutex_lock(&client->gate);
		choice = choice_of(client, w);
		staged = client->batches[w].staged;
		pthread_mutex_unlock(&client->gate);
		if (staged == 0)
			continue;
		store_and_release(client, evictor, &choice, staged);
		*windows &= ~(1u << w); /* somebody else's from now on */
	}
}

void evict_recover_release(struct client *client, unsigned windows)
{
	SCOPED_LOCK(&client->gate);
	for (unsigned w = 0; w < VSWAP_WINDOWS && !client->dead; w++) {
		if (windows >> w & 1) {
			struct choice choice = choice_of(client, w);

			release(client, &choice);
		}
	}
}

/* ---- kept copies ---- */

unsigned evict_drop_kept(struct client *client, enum slot_tag kept, unsigned pages)
{
	uint64_t *hand = kept == SLOT_KEPT_POOL ? &client->kept_pool_hand : &client->kept_spill_hand;
	struct slot_space *space = client->engine->slots;
	struct slot_map *map = &client->record->map;
	unsigned dropped = 0, wraps = 0;
	uint64_t first;

	SCOPED_LOCK(&client->gate);
	VS_CHECK(slot_is_kept(kept));
	while (dropped < pages && slot_map_count(map, kept) > 0 && wraps < 2) {
		if (!slot_map_next(space, map, hand, &first)) {
			*hand = 0;
			wraps++;
			continue;
		}
		for (unsigned i = 0; i < CLUSTER_PAGES; i++) {
			struct slot slot;

			if (slot_get(space, map, first + i, &slot) < 0 || slot.tag != kept)
				continue;
			VS_CHECK(slot_set(space, map, first + i, (struct slot){ .tag = SLOT_NONE }) == 0);
			client_free_copy(client, slot);
			dropped++;
		}
	}
	if (dropped) {
		counter_add(client->engine, kept_dropped, dropped);
		client_metadata_changed(client);
	}
	return dropped;
}
