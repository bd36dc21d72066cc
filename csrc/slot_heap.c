/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "slot_heap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "sys.h"

#define POPULATE_WRITE 23 /* MADV_POPULATE_WRITE */
static_assert(SLOT_CHUNK_BYTES % PAGE_BYTES == 0 && SLOT_GRANULE_BYTES % sizeof(uint64_t) == 0,
	      "chunks are whole pages, and granules hold words");
static_assert(SLOT_CHUNK_GRANULES < 1 << SLOT_CHUNK_SHIFT, "a granule's number fits in its bits of a name");

/* ---- memory behind addresses ---- */

/* An error here, no SIGBUS later. */
static int memory_populate(struct slot_heap *heap, char *at, uint64_t bytes)
{
	if (madvise(at, bytes, POPULATE_WRITE) != 0)
		return -ENOMEM;
	WRITE_ONCE(heap->bytes, heap->bytes + bytes);
	return 0;
}

void slot_heap_discard(const struct slot_heap *heap, char *at, uint64_t bytes)
{
	if (bytes > 0)
		sys_discard(heap->memfd, heap->offset + (uint64_t)(at - heap->blocks), at, bytes);
}

static void memory_return(struct slot_heap *heap, char *at, uint64_t bytes)
{
	slot_heap_discard(heap, at, bytes);
	WRITE_ONCE(heap->bytes, heap->bytes - bytes);
}

/* ---- chunks ---- */

static char *chunk_memory(const struct slot_heap *heap, uint64_t chunk)
{
	return heap->blocks + chunk * SLOT_CHUNK_BYTES;
}

/* The first granule from here on whose bit is `value`, or SLOT_CHUNK_GRANULES. */
static unsigned granule_find(const uint64_t *bits, unsigned from, bool value)
{
	for (; from < SLOT_CHUNK_GRANULES; from = (from | 63) + 1) {
		uint64_t word = (value ? bits[from / 64] : ~bits[from / 64]) >> (from % 64);

		if (word)
			return min_of(from + (unsigned)__builtin_ctzll(word), (unsigned)SLOT_CHUNK_GRANULES);
	}
	return (unsigned)SLOT_CHUNK_GRANULES;
}

static void granules_change(uint64_t *bits, unsigned first, unsigned count, bool value)
{
	while (count > 0) {
		unsigned n = min_of(count, 64 - first % 64);

		if (value)
			bits[first / 64] |= mask_of(first % 64, n);
		else
			bits[first / 64] &= ~mask_of(first % 64, n);
		first += n;
		count -= n;
	}
}

static bool granule_get(const uint64_t *bits, unsigned granule)
{
	return bits[granule / 64] >> (granule % 64) & 1;
}

/* The shortest free stretch of at least this many granules. */
static bool stretch_find(const struct slot_chunk *chunk, unsigned granules, unsigned *ret_first)
{
	unsigned best = 0;

	for (unsigned first = 0, end; best != granules; first = end) {
		first = granule_find(chunk->used, first, false);
		if (first == SLOT_CHUNK_GRANULES)
			break;
		end = granule_find(chunk->used, first, true);
		if (end - first >= granules && (best == 0 || end - first < best)) {
			best = end - first;
			*ret_first = first;
		}
	}
	return best > 0;
}

static unsigned stretch_longest(const struct slot_chunk *chunk)
{
	unsigned longest = 0;

	for (unsigned first = 0, end; longest < SLOT_BLOCK_GRANULES_MAX; first = end) {
		first = granule_find(chunk->used, first, false);
		if (first == SLOT_CHUNK_GRANULES)
			break;
		end = granule_find(chunk->used, first, true);
		longest = max_of(longest, end - first);
	}
	return min_of(longest, (unsigned)SLOT_BLOCK_GRANULES_MAX);
}

static void list_insert(struct slot_heap *heap, uint32_t at)
{
	struct slot_chunk *chunk = &heap->chunks[at];
	uint32_t *list = &heap->lists[chunk->longest];

	if (chunk->longest == 0)
		return;
	chunk->previous = 0;
	chunk->next = *list;
	if (*list)
		heap->chunks[*list - 1].previous = at + 1;
	*list = at + 1;
}

static void list_remove(struct slot_heap *heap, uint32_t at)
{
	struct slot_chunk *chunk = &heap->chunks[at];

	if (chunk->longest == 0)
		return;
	if (chunk->next)
		heap->chunks[chunk->next - 1].previous = chunk->previous;
	if (chunk->previous)
		heap->chunks[chunk->previous - 1].next = chunk->next;
	else
		heap->lists[chunk->longest] = chunk->next;
}

/* Blocks of it came or went. */
static void chunk_changed(struct slot_heap *heap, uint32_t at)
{
	unsigned longest = stretch_longest(&heap->chunks[at]);

	if (longest == heap->chunks[at].longest)
		return;
	list_remove(heap, at);
	heap->chunks[at].longest = (uint8_t)longest;
	list_insert(heap, at);
}

/* One more chunk in use. False: no memory. */
static bool chunk_take(struct slot_heap *heap)
{
	uint64_t at = heap->chunk_hint;

	if (heap->spare_count > 0) {
		at = heap->spare[--heap->spare_count];
	} else {
		while (at < heap->chunk_count && heap->chunks[at].state != SLOT_CHUNK_EMPTY)
			at++;
		heap->chunk_hint = at;
		if (at == heap->chunk_count ||
		    memory_populate(heap, chunk_memory(heap, at), SLOT_CHUNK_BYTES) != 0)
			return false;
	}
	heap->chunks[at].state = SLOT_CHUNK_IN_USE;
	heap->chunk_end = max_of(heap->chunk_end, at + 1);
	chunk_changed(heap, (uint32_t)at);
	return true;
}

static void chunk_give(struct slot_heap *heap, uint32_t at)
{
	list_remove(heap, at);
	heap->chunks[at].longest = 0;
	if (heap->spare_count < SLOT_SPARE_CHUNKS) {
		heap->chunks[at].state = SLOT_CHUNK_SPARE;
		heap->spare[heap->spare_count++] = at;
	} else {
		heap->chunks[at].state = SLOT_CHUNK_EMPTY;
		heap->chunk_hint = min_of(heap->chunk_hint, at);
		memory_return(heap, chunk_memory(heap, at), SLOT_CHUNK_BYTES);
	}
}

/* ---- blocks ---- */

uint32_t slot_heap_alloc(struct slot_heap *heap, unsigned granules)
{
	unsigned list = granules, first = 0;
	struct slot_chunk *chunk;
	uint32_t at;

	VS_CHECK(list >= 1 && list <= SLOT_BLOCK_GRANULES_MAX);
	SCOPED_LOCK(&heap->lock);
	while (list < SLOT_BLOCK_GRANULES_MAX && heap->lists[list] == 0)
		list++;
	if (heap->lists[list] == 0 && !chunk_take(heap))
		return 0;
	at = heap->lists[list] - 1;
	chunk = &heap->chunks[at];
	VS_CHECK(stretch_find(chunk, granules, &first));
	granules_change(chunk->used, first, granules, true);
	granules_change(chunk->starts, first, 1, true);
	chunk_changed(heap, at);
	return (at << SLOT_CHUNK_SHIFT | first) + 1;
}

void slot_heap_free(struct slot_heap *heap, uint32_t block, unsigned granules)
{
	SCOPED_LOCK(&heap->lock);
	uint32_t at = slot_block_chunk(block);
	unsigned first = slot_block_granule(block);
	struct slot_chunk *chunk = &heap->chunks[at];

	VS_CHECK(slot_heap_has(heap, block, granules) && granule_get(chunk->starts, first));
	granules_change(chunk->used, first, granules, false);
	granules_change(chunk->starts, first, 1, false);
	if (granule_find(chunk->used, 0, true) == SLOT_CHUNK_GRANULES)
		chunk_give(heap, at);
	else
		chunk_changed(heap, at);
}

/* ---- runs ---- */

/* Put a run in at its place. -EUCLEAN when it overlaps its neighbours. */
static int run_insert(struct slot_heap *heap, size_t i, struct slot_run run)
{
	if ((i > 0 && heap->run[i - 1].page + heap->run[i - 1].pages > run.page) ||
	    (i < heap->run_count && run.page + run.pages > heap->run[i].page))
		return -EUCLEAN;
	if (heap->run_count == heap->run_capacity) {
		size_t capacity = max_of(2 * heap->run_capacity, (size_t)64);
		struct slot_run *grown = realloc(heap->run, capacity * sizeof *grown);

		if (!grown)
			return -ENOMEM;
		heap->run = grown;
		heap->run_capacity = capacity;
	}
	memmove(&heap->run[i + 1], &heap->run[i], (heap->run_count - i) * sizeof run);
	heap->run[i] = run;
	heap->run_count++;
	return 0;
}

static void run_remove(struct slot_heap *heap, size_t i)
{
	heap->run_count--;
	memmove(&heap->run[i], &heap->run[i + 1], (heap->run_count - i) * sizeof heap->run[0]);
}

int slot_heap_run_alloc(struct slot_heap *heap, uint64_t pages, uint64_t *ret_page)
{
	uint64_t page = 0;
	size_t i = 0;
	int result;

	SCOPED_LOCK(&heap->lock);
	while (i < heap->run_count && heap->run[i].page - page < pages) {
		page = heap->run[i].page + heap->run[i].pages;
		i++;
	}
	if (pages > heap->run_pages - page)
		return -ENOMEM;
	result = run_insert(heap, i, (struct slot_run){ page, pages });
	if (result < 0)
		return result;
	if (memory_populate(heap, slot_heap_run_at(heap, page), pages * PAGE_BYTES) != 0) {
		slot_heap_discard(heap, slot_heap_run_at(heap, page), pages * PAGE_BYTES);
		run_remove(heap, i);
		return -ENOMEM;
	}
	*ret_page = page;
	return 0;
}

void slot_heap_run_free(struct slot_heap *heap, uint64_t page)
{
	SCOPED_LOCK(&heap->lock);
	size_t i = 0;

	while (i < heap->run_count && heap->run[i].page != page)
		i++;
	VS_CHECK(i < heap->run_count);
	memory_return(heap, slot_heap_run_at(heap, page), heap->run[i].pages * PAGE_BYTES);
	run_remove(heap, i);
}

/* ---- create ---- */

int slot_heap_create(struct slot_heap *heap, int memfd, uint64_t offset, char *blocks, uint64_t block_bytes,
		     char *runs, uint64_t run_bytes)
{
	*heap = (struct slot_heap){ .blocks = blocks, .runs = runs, .memfd = memfd, .offset = offset,
				    .chunk_count = block_bytes / SLOT_CHUNK_BYTES,
				    .run_pages = run_bytes / PAGE_BYTES };
	VS_CHECK(heap->chunk_count > 0 && heap->chunk_count < UINT32_MAX >> SLOT_CHUNK_SHIFT);
	heap->chunks = mmap(NULL, heap->chunk_count * sizeof *heap->chunks, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (heap->chunks == MAP_FAILED)
		return -ENOMEM;
	pthread_mutex_init(&heap->lock, NULL);
	return 0;
}

void slot_heap_destroy(struct slot_heap *heap)
{
	munmap(heap->chunks, heap->chunk_count * sizeof *heap->chunks);
	free(heap->run);
	pthread_mutex_destroy(&heap->lock);
}

/* ---- a successor ---- */

int slot_heap_adopt(struct slot_heap *heap, uint32_t block, unsigned granules)
{
	uint32_t at = slot_block_chunk(block);
	unsigned first = slot_block_granule(block);
	struct slot_chunk *chunk;

	if (!slot_heap_has(heap, block, granules))
		return -EUCLEAN;
	chunk = &heap->chunks[at];
	if (granule_get(chunk->starts, first))
		return 1;
	if (granule_find(chunk->used, first, true) < first + granules)
		return -EUCLEAN;
	granules_change(chunk->used, first, granules, true);
	granules_change(chunk->starts, first, 1, true);
	chunk->state = SLOT_CHUNK_IN_USE;
	heap->chunk_end = max_of(heap->chunk_end, at + 1ULL);
	return 0;
}

int slot_heap_adopt_run(struct slot_heap *heap, uint64_t page, uint64_t pages)
{
	size_t i = 0;
	int result;

	if (pages == 0 || page >= heap->run_pages || pages > heap->run_pages - page)
		return -EUCLEAN;
	while (i < heap->run_count && heap->run[i].page < page)
		i++;
	result = run_insert(heap, i, (struct slot_run){ page, pages });
	return result < 0 ? result
			  : memory_populate(heap, slot_heap_run_at(heap, page), pages * PAGE_BYTES);
}

int slot_heap_ready(struct slot_heap *heap)
{
	uint64_t page = 0;

	slot_heap_discard(heap, chunk_memory(heap, heap->chunk_end),
			  (heap->chunk_count - heap->chunk_end) * SLOT_CHUNK_BYTES);
	for (uint32_t at = 0; at < heap->chunk_end; at++) {
		if (heap->chunks[at].state == SLOT_CHUNK_EMPTY)
			slot_heap_discard(heap, chunk_memory(heap, at), SLOT_CHUNK_BYTES);
		else if (memory_populate(heap, chunk_memory(heap, at), SLOT_CHUNK_BYTES) != 0)
			return -ENOMEM;
		else
			chunk_changed(heap, at);
	}
	for (size_t i = 0; i <= heap->run_count; i++) {
		uint64_t end = i < heap->run_count ? heap->run[i].page : heap->run_pages;

		slot_heap_discard(heap, slot_heap_run_at(heap, page), (end - page) * PAGE_BYTES);
		page = i < heap->run_count ? end + heap->run[i].pages : end;
	}
	return 0;
}

/* ---- check ---- */

static bool chunk_is_valid(const struct slot_chunk *chunk)
{
	bool is_used = granule_find(chunk->used, 0, true) < SLOT_CHUNK_GRANULES;

	for (unsigned i = 0; i < SLOT_CHUNK_GRANULES; i++) {
		bool begins = granule_get(chunk->used, i) && (i == 0 || !granule_get(chunk->used, i - 1));

		if ((granule_get(chunk->starts, i) && !granule_get(chunk->used, i)) ||
		    (begins && !granule_get(chunk->starts, i)))
			return false;
	}
	return is_used == (chunk->state == SLOT_CHUNK_IN_USE) &&
	       chunk->longest == (is_used ? stretch_longest(chunk) : 0);
}

static bool lists_are_valid(const struct slot_heap *heap, uint64_t listed)
{
	for (unsigned longest = 1; longest <= SLOT_BLOCK_GRANULES_MAX; longest++) {
		uint32_t previous = 0;

		for (uint32_t at = heap->lists[longest]; at; at = heap->chunks[at - 1].next) {
			const struct slot_chunk *chunk = &heap->chunks[at - 1];

			if (listed-- == 0 || chunk->longest != longest || chunk->previous != previous)
				return false;
			previous = at;
		}
	}
	return listed == 0;
}

bool slot_heap_is_valid(struct slot_heap *heap)
{
	uint64_t listed = 0, bytes = 0;
	unsigned spare = 0;

	SCOPED_LOCK(&heap->lock);
	for (uint64_t at = 0; at < heap->chunk_end; at++) {
		const struct slot_chunk *chunk = &heap->chunks[at];

		spare += chunk->state == SLOT_CHUNK_SPARE;
		listed += chunk->longest > 0;
		if (chunk->state != SLOT_CHUNK_EMPTY)
			bytes += SLOT_CHUNK_BYTES;
		if (!chunk_is_valid(chunk) || (chunk->state == SLOT_CHUNK_EMPTY && at < heap->chunk_hint))
			return false;
	}
	for (size_t i = 0; i < heap->run_count; i++) {
		uint64_t end = heap->run[i].page + heap->run[i].pages;

		bytes += heap->run[i].pages * PAGE_BYTES;
		if (end > (i + 1 < heap->run_count ? heap->run[i + 1].page : heap->run_pages))
			return false;
	}
	return spare == heap->spare_count && bytes == heap->bytes && lists_are_valid(heap, listed);
}
