/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "evict.h"
#include "fill.h"
#include "io.h"
#include "sys.h"

#define PAGES_END (2 * ADDRESS_PAGES_MAX)
#define WORD_BYTES 8

static_assert(ENGINE_REGION_BYTES_MAX == ADDRESS_PAGES_MAX * PAGE_BYTES, "a region is no larger than an address space");

/* ---- scratch memory: as many as there are calls at once ---- */

struct region_scratch {
	struct evictor evictor;
	struct region_scratch *next;
};

static struct region_scratch *scratch_take(struct engine *engine)
{
	struct region_scratch *scratch;

	pthread_mutex_lock(&engine->region_scratch_lock);
	scratch = engine->region_scratch;
	if (scratch)
		engine->region_scratch = scratch->next;
	pthread_mutex_unlock(&engine->region_scratch_lock);
	if (scratch)
		return scratch;
	scratch = calloc(1, sizeof *scratch);
	if (scratch && evictor_create(&scratch->evictor) < 0) {
		free(scratch);
		scratch = NULL;
	}
	return scratch;
}

static void scratch_give(struct engine *engine, struct region_scratch *scratch)
{
	SCOPED_LOCK(&engine->region_scratch_lock);
	scratch->next = engine->region_scratch;
	engine->region_scratch = scratch;
}

void region_scratch_destroy(struct engine *engine)
{
	while (engine->region_scratch) {
		struct region_scratch *scratch = engine->region_scratch;

		engine->region_scratch = scratch->next;
		evictor_destroy(&scratch->evictor);
		free(scratch);
	}
}

/* ---- registry ---- */

/* With a reference; NULL when there is none. */
static struct client *region_get(struct engine *engine, uint64_t number)
{
	struct client *client = client_get(engine, number);

	if (client && client_is_region(client) && !READ_ONCE(client->dead))
		return client;
	if (client)
		client_put(client);
	return NULL;
}

static struct slot slot_of(struct client *client, uint64_t page)
{
	struct slot slot;

	/* Only what fork shares could be -ENOMEM. */
	VS_CHECK(slot_get(client->engine->slots, &client->record->map, page, &slot) == 0);
	return slot;
}

/* ---- calls that move bytes ---- */

struct call {
	struct client *client;
	struct region_scratch *scratch;
};

/* 0: call_end follows; or -ENOENT, -ENOMEM. */
static int call_begin(struct engine *engine, uint64_t number, struct call *ret_call)
{
	struct client *client = region_get(engine, number);

	if (!client)
		return -ENOENT;
	*ret_call = (struct call){ client, scratch_take(engine) };
	if (ret_call->scratch)
		return 0;
	client_put(client);
	return -ENOMEM;
}

static void call_end(const struct call *call)
{
	scratch_give(call->client->engine, call->scratch);
	client_put(call->client);
}

/* ---- reading ---- */

/* The extents of the slots of [page, page + max) that one read covers; how many pages. The gate is held. */
static unsigned plan_read(struct client *client, uint64_t page, unsigned max, struct slot *slots,
			  struct fill_span *span)
{
	unsigned count = 0;

	for (; count < max; count++) {
		slots[count] = slot_of(client, page + count);
		if (!fill_span_add(span, slots[count], FILL_READ_BYTES_MAX))
			break;
	}
	return count;
}

/* Read a span without the gate, which is held before and after. 0 or -errno. */
static int read_span(struct client *client, const struct fill_span *span, uint8_t **ret_bytes)
{
	size_t length = span->end_bytes - span->start_bytes;
	int result;

	pthread_mutex_unlock(&client->gate);
	result = -posix_memalign((void **)ret_bytes, PAGE_BYTES, length);
	if (result == 0) {
		result = io_read_wait(spill_fd(span->spill), *ret_bytes, length, span->start_bytes);
		spill_count_read(span->spill, length, result);
		if (result < 0)
			free(*ret_bytes);
	}
	pthread_mutex_lock(&client->gate);
	return result;
}

/* Expand what was read of the pages whose slots are what they were: how many, or -errno of the first. */
static int expand_span(struct client *client, const struct fill_span *span, const uint8_t *bytes, uint64_t page,
		       const struct slot *slots, unsigned count, uint8_t *pages)
{
	unsigned done = 0;
	int result = 0;

	for (; done < count && slot_is_equal(slot_of(client, page + done), slots[done]); done++) {
		result = fill_expand_read(client, span, bytes, slots[done], pages + done * PAGE_BYTES);
		if (result < 0)
			break;
	}
	counter_add(client->engine, spill_read_pages, done);
	return result < 0 && done == 0 ? result : (int)done;
}

/* Expand pages that a backend has, up to `max`: how many, 0 when the slots have changed meanwhile, or -errno. */
static int read_from_backend(struct client *client, uint64_t page, unsigned max, uint8_t *pages)
{
	struct slot slots[FILL_PAGES_MAX];
	struct fill_span span = { .backend = slot_of(client, page).backend };
	unsigned count;
	uint8_t *bytes = NULL;
	int result;

	span.spill = backend_pin(client->engine, span.backend);
	if (!span.spill)
		return 0; /* there is no such backend any more */
	count = plan_read(client, page, min_of(max, (unsigned)FILL_PAGES_MAX), slots, &span);
	result = read_span(client, &span, &bytes);
	if (result == 0) {
		result = expand_span(client, &span, bytes, page, slots, count, pages);
		free(bytes);
		backend_unpin(client->engine, span.backend);
		return result;
	}
	backend_unpin(client->engine, span.backend);
	/* A drain may have moved the first one while the gate was open: that place says nothing about it. */
	if (!slot_is_equal(slot_of(client, page), slots[0]))
		return 0;
	/* An error says nothing about which of the pages is concerned. */
	return count > 1 ? read_from_backend(client, page, 1, pages) : result;
}

/* Whole pages. 0, -EIO: one of them is lost; -ENOENT. */
static int read_pages(struct client *client, uint64_t page, unsigned count, uint8_t *pages)
{
	int result = READ_ONCE(client->record->region.is_damaged) ? -EIO : 0;

	SCOPED_LOCK(&client->gate);
	for (unsigned done = 0; result >= 0 && done < count; done += (unsigned)result) {
		struct slot slot = slot_of(client, page + done);
		uint8_t *at = pages + done * PAGE_BYTES;

		if (client->dead)
			return -ENOENT;
		if (slot.tag == SLOT_SPILL) {
			result = read_from_backend(client, page + done, count - done, at);
			continue;
		}
		result = 1;
		if (slot.tag == SLOT_NONE)
			memset(at, 0, PAGE_BYTES);
		else if (fill_expand(client, slot, at) != 0)
			result = -EIO;
	}
	return result < 0 ? -EIO : 0;
}

static int read_bytes(struct client *client, struct evictor *evictor, uint64_t offset, uint8_t *bytes, uint64_t count)
{
	int result = 0;

	for (uint64_t done = 0, step; result == 0 && done < count; done += step) {
		uint64_t at = offset + done, in_page = at % PAGE_BYTES, left = count - done;
		unsigned pages = (unsigned)min_of(div_ceil(in_page + left, PAGE_BYTES), BATCH_PAGES_MAX);
		bool direct = in_page == 0 && left >= pages * PAGE_BYTES && (uintptr_t)(bytes + done) % WORD_BYTES == 0;

		step = min_of(left, pages * PAGE_BYTES - in_page);
		result = read_pages(client, page_of(at), pages, direct ? bytes + done : evictor->buffer);
		if (result == 0 && !direct)
			memcpy(bytes + done, evictor->buffer + in_page, step);
	}
	return result;
}

int engine_region_read(struct engine *engine, uint64_t number, uint64_t offset, void *buffer, uint32_t bytes)
{
	struct call call;
	int result = call_begin(engine, number, &call);
	uint64_t size;

	if (result < 0)
		return result;
	size = READ_ONCE(call.client->record->region.size_bytes);
	bytes = (uint32_t)min_of((uint64_t)min_of(bytes, (uint32_t)INT32_MAX), offset < size ? size - offset : 0);
	result = read_bytes(call.client, &call.scratch->evictor, offset, buffer, bytes);
	call_end(&call);
	return result < 0 ? result : (int)bytes;
}

/* ---- writing ---- */

/* Until a batch fits: 0, or -ENOSPC when nothing has left the pool for a while, or nothing can. */
static int wait_for_room(struct client *client)
{
	struct group *group = client->group;
	uint64_t progress = READ_ONCE(group->progress), since = sys_now_ns();

	while (pool_bytes(group->pool) + BATCH_PAGES_MAX * PAGE_BYTES > group_pool_cap_bytes(group)) {
		if (!writeback_is_possible(client->engine, group) || sys_now_ns() - since > OUT_OF_MEMORY_NS)
			return -ENOSPC;
		if (progress != READ_ONCE(group->progress)) {
			progress = READ_ONCE(group->progress);
			since = sys_now_ns();
		}
		work_ask(&client->engine->writing);
		sys_sleep_ms(1);
	}
	return 0;
}

struct stored_pages {
	uint64_t first;
	unsigned count;
	uint64_t unchanged; /* a mask: their slots stay, whatever they are by now */
	struct slot slots[BATCH_PAGES_MAX];
};

/* No store of ours fails but for want of memory for a page without a slot. False: not even poison was stored. */
static bool settle_page(struct client *client, uint64_t page, struct slot slot)
{
	struct slot before = slot_of(client, page);

	if (slot.tag == SLOT_ZERO)
		slot.tag = SLOT_NONE;
	if (client->dead || slot_set(client->engine->slots, &client->record->map, page, slot) < 0) {
		if (slot.tag == SLOT_POOL)
			client_free_copy(client, slot);
		return client->dead;
	}
	if (before.tag == SLOT_POOL || before.tag == SLOT_SPILL)
		client_free_copy(client, before);
	if (slot.tag == SLOT_POOL)
		client_cold_push(client, page >> CLUSTER_SHIFT, slot.units == POOL_UNITS_MAX);
	return true;
}

/* What the page cache takes for written and is not must not be read as what it was before. */
static int settle(struct client *client, const struct stored_pages *stored)
{
	int result = 0;

	crash_point(CRASH_REGION_STORED);
	SCOPED_LOCK(&client->gate);
	for (unsigned i = 0; i < stored->count; i++) {
		if (stored->unchanged >> i & 1)
			continue;
		if (!settle_page(client, stored->first + i, stored->slots[i])) {
			WRITE_ONCE(client->record->region.is_damaged, 1);
			result = -ENOSPC;
		} else if (stored->slots[i].tag == SLOT_POISONED) {
			counter_add(client->engine, poisoned_pages, 1);
			result = -ENOSPC;
		}
		crash_point(CRASH_REGION_SETTLED_ONE);
	}
	client_metadata_changed(client);
	return result;
}

/* Whole pages, at most a batch, aligned to words; NULL: they are lost. 0 or -ENOSPC. */
static int write_pages(struct client *client, struct evictor *evictor, uint64_t page, unsigned count,
		       const uint8_t *pages)
{
	struct stored_pages stored = { .first = page, .count = count };
	struct slot before[BATCH_PAGES_MAX];
	int result = pages ? wait_for_room(client) : -EDQUOT;

	pthread_mutex_lock(&client->gate);
	for (unsigned i = 0; i < count; i++) {
		before[i] = slot_of(client, page + i);
		before[i] = before[i].tag == SLOT_POOL || before[i].tag == SLOT_SPILL
				    ? slot_kept(before[i]) : (struct slot){ .tag = SLOT_NONE };
	}
	pthread_mutex_unlock(&client->gate);
	for (unsigned i = 0; i < count; i++) {
		int kept = result < 0 ? result : evict_store_page(client, evictor, pages + i * PAGE_BYTES, before[i],
								  &stored.slots[i]);

		if (kept < 0)
			stored.slots[i] = (struct slot){ .tag = SLOT_POISONED };
		else if (kept == 1)
			stored.unchanged |= 1ULL << i;
	}
	result = settle(client, &stored);
	group_pool_changed(client->group);
	counter_add(client->engine, evicted_pages, count);
	return result;
}

/* A part of one page, zeros without `bytes`; nobody else writes. An error of reading changes nothing. */
static int write_part(struct client *client, struct evictor *evictor, uint64_t offset, const uint8_t *bytes,
		      uint64_t count)
{
	int result = read_pages(client, page_of(offset), 1, evictor->buffer);

	if (result < 0)
		return result;
	if (bytes)
		memcpy(evictor->buffer + offset % PAGE_BYTES, bytes, count);
	else
		memset(evictor->buffer + offset % PAGE_BYTES, 0, count);
	return write_pages(client, evictor, page_of(offset), 1, evictor->buffer);
}

static int write_bytes(struct client *client, struct evictor *evictor, uint64_t offset, const uint8_t *bytes,
		       uint64_t count)
{
	int result = 0;

	for (uint64_t done = 0, step; done < count; done += step) {
		uint64_t at = offset + done, in_page = at % PAGE_BYTES, left = count - done;
		unsigned pages = (unsigned)min_of(left / PAGE_BYTES, BATCH_PAGES_MAX);
		const uint8_t *from = bytes ? bytes + done : NULL;
		int error;

		if (in_page > 0 || pages == 0) {
			step = min_of(left, PAGE_BYTES - in_page);
			error = bytes ? write_part(client, evictor, at, from, step) : -EIO;
			if (error < 0)
				(void)write_pages(client, evictor, page_of(at), 1, NULL);
		} else if (!bytes) {
			step = pages * PAGE_BYTES;
			error = write_pages(client, evictor, page_of(at), pages, NULL);
		} else {
			step = pages * PAGE_BYTES;
			if ((uintptr_t)from % WORD_BYTES)
				from = memcpy(evictor->buffer, from, step);
			error = write_pages(client, evictor, page_of(at), pages, from);
		}
		result = result ? result : error; /* the others are to be stored nevertheless */
	}
	return result;
}

/* What follows the size in its page is nobody's; what of it comes before `end` is about to be the region's. Nobody
 * else writes. */
static int zero_gap(struct client *client, struct evictor *evictor, uint64_t end)
{
	uint64_t size = client->record->region.size_bytes, rest = size % PAGE_BYTES;

	if (rest == 0 || end <= size)
		return 0;
	return write_part(client, evictor, size, NULL, min_of(end - size, PAGE_BYTES - rest));
}

/* The region grows to hold what was written. */
static void grow(struct client *client, uint64_t end)
{
	SCOPED_LOCK(&client->gate);
	crash_point(CRASH_REGION_WRITTEN);
	if (end > client->record->region.size_bytes)
		__atomic_store_n(&client->record->region.size_bytes, end, __ATOMIC_RELEASE);
}

/* Alone if parts of pages are written. Other writers of whole pages leave a size that is whole pages so. */
static void lock_to_write(struct client *client, uint64_t offset, uint32_t bytes)
{
	uint64_t size;

	pthread_rwlock_rdlock(&client->region_lock);
	size = READ_ONCE(client->record->region.size_bytes);
	if (offset % PAGE_BYTES == 0 && bytes % PAGE_BYTES == 0 && (offset <= size || size % PAGE_BYTES == 0))
		return;
	pthread_rwlock_unlock(&client->region_lock);
	pthread_rwlock_wrlock(&client->region_lock);
}

static int write_locked(struct client *client, struct evictor *evictor, uint64_t offset, const void *buffer,
			uint32_t bytes)
{
	uint64_t size = client->record->region.size_bytes;
	int error = bytes ? zero_gap(client, evictor, offset) : 0, result;

	if (error < 0) /* nobody is told what follows the size: that page is lost */
		(void)write_pages(client, evictor, page_of(size), 1, NULL);
	result = write_bytes(client, evictor, offset, buffer, bytes);
	if (bytes)
		grow(client, offset + bytes);
	return error < 0 ? error : result;
}

int engine_region_write(struct engine *engine, uint64_t number, uint64_t offset, const void *buffer, uint32_t bytes)
{
	struct call call;
	int result = call_begin(engine, number, &call);

	if (result < 0)
		return result;
	if (offset > ENGINE_REGION_BYTES_MAX || bytes > ENGINE_REGION_BYTES_MAX - offset) {
		result = -EFBIG;
	} else {
		lock_to_write(call.client, offset, bytes);
		result = write_locked(call.client, &call.scratch->evictor, offset, buffer, bytes);
		pthread_rwlock_unlock(&call.client->region_lock);
	}
	call_end(&call);
	return result;
}

/* ---- size ---- */

/* Free the pages beyond the size. The gate is held. */
static void trim(struct client *client)
{
	slot_map_clear(client->engine->slots, &client->record->map,
		       div_ceil(client->record->region.size_bytes, PAGE_BYTES), PAGES_END, client_staged_gone,
		       client_free_copy, client);
	client_metadata_changed(client);
	group_pool_changed(client->group);
}

static int resize(struct client *client, struct evictor *evictor, uint64_t size_bytes)
{
	uint64_t old_bytes = client->record->region.size_bytes;
	int result = zero_gap(client, evictor, size_bytes);

	if (result < 0)
		return result;
	SCOPED_LOCK(&client->gate);
	__atomic_store_n(&client->record->region.size_bytes, size_bytes, __ATOMIC_RELEASE);
	crash_point(CRASH_REGION_RESIZED);
	if (size_bytes < old_bytes)
		trim(client);
	if (size_bytes == 0)
		WRITE_ONCE(client->record->region.is_damaged, 0);
	return 0;
}

int engine_region_truncate(struct engine *engine, uint64_t number, uint64_t size_bytes)
{
	struct call call;
	int result = call_begin(engine, number, &call);

	if (result < 0)
		return result;
	if (size_bytes > ENGINE_REGION_BYTES_MAX) {
		result = -EFBIG;
	} else {
		pthread_rwlock_wrlock(&call.client->region_lock);
		result = resize(call.client, &call.scratch->evictor, size_bytes);
		pthread_rwlock_unlock(&call.client->region_lock);
	}
	call_end(&call);
	return result;
}

/* ---- life ---- */

int engine_region_create(struct engine *engine, const struct engine_region *region, uint64_t *ret_number)
{
	struct group *group;
	struct client *client;
	int result;

	if (region->group < 0 || region->group >= GROUPS_MAX || region->mode & ~07777u ||
	    strnlen(region->name, sizeof region->name) == sizeof region->name)
		return -EINVAL;
	pthread_mutex_lock(&engine->registry);
	group = engine->groups[region->group];
	if (group && group->flags & ENGINE_GROUP_REGIONS)
		group->users++;
	else
		group = NULL;
	pthread_mutex_unlock(&engine->registry);
	if (!group)
		return -ENOENT;
	result = client_create(engine, 0, group, &client);
	if (result == 0) {
		client->record->region = (struct region_record){
			.mode = region->mode, .uid = region->uid, .gid = region->gid,
			.modified_ns = region->modified_ns,
		};
		strcpy(client->record->region.name, region->name);
		crash_point(CRASH_REGION_CREATED);
		client_set_phase(client, CLIENT_LIVE);
		*ret_number = client->record->token;
		client_put(client);
	}
	pthread_mutex_lock(&engine->registry);
	group->users--;
	pthread_mutex_unlock(&engine->registry);
	return result;
}

int engine_region_change(struct engine *engine, uint64_t number, uint32_t mode, uint32_t gid, int64_t modified_ns)
{
	struct client *client = region_get(engine, number);

	if (!client)
		return -ENOENT;
	WRITE_ONCE(client->record->region.mode, mode & 07777u);
	WRITE_ONCE(client->record->region.gid, gid);
	WRITE_ONCE(client->record->region.modified_ns, modified_ns);
	client_put(client);
	return 0;
}

int engine_region_unlink(struct engine *engine, uint64_t number)
{
	struct client *client = region_get(engine, number);

	if (!client)
		return -ENOENT;
	WRITE_ONCE(client->record->region.is_unlinked, 1);
	crash_point(CRASH_REGION_UNLINKED);
	client_put(client);
	return 0;
}

int engine_region_destroy(struct engine *engine, uint64_t number)
{
	struct client *client = region_get(engine, number);

	if (!client)
		return -ENOENT;
	client_bury(client);
	client_put(client);
	return 0;
}

void region_recover(struct client *client)
{
	bool is_unlinked = client->record->region.is_unlinked;

	pthread_mutex_lock(&client->gate);
	trim(client);
	client->recovering = false;
	pthread_mutex_unlock(&client->gate);
	if (is_unlinked)
		client_bury(client);
	client_put(client);
}

/* ---- statistics ---- */

static struct engine_region describe(const struct client *client)
{
	const struct region_record *record = &client->record->region;
	const struct slot_map *map = &client->record->map;
	struct engine_region region = {
		.number = client->record->token,
		.group = client->group->number,
		.mode = READ_ONCE(record->mode),
		.uid = record->uid,
		.gid = READ_ONCE(record->gid),
		.is_unlinked = READ_ONCE(record->is_unlinked),
		.is_damaged = READ_ONCE(record->is_damaged),
		.size_bytes = READ_ONCE(record->size_bytes),
		.modified_ns = READ_ONCE(record->modified_ns),
		.same_pages = slot_map_count(map, SLOT_SAME),
		.pool_pages = slot_map_count(map, SLOT_POOL),
		.spill_pages = slot_map_count(map, SLOT_SPILL),
		.poisoned_pages = slot_map_count(map, SLOT_POISONED),
		.metadata_bytes = slot_map_metadata_bytes(map),
	};

	memcpy(region.name, record->name, sizeof region.name);
	return region;
}

int engine_region_get(struct engine *engine, uint64_t number, struct engine_region *ret_region)
{
	struct client *client = region_get(engine, number);

	if (!client)
		return -ENOENT;
	*ret_region = describe(client);
	client_put(client);
	return 0;
}

int engine_region_list(struct engine *engine, struct engine_region *records, int max)
{
	int count = 0;

	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++) {
		const struct client *client = engine->clients[i];

		/* Not one that is being made (its record is not complete) */
		if (!client || !client_is_region(client) ||
		    __atomic_load_n(&client->record->phase, __ATOMIC_ACQUIRE) != CLIENT_LIVE)
			continue;
		if (count++ < max)
			records[count - 1] = describe(client);
	}
	return count;
}
