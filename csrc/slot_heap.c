/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "slot_heap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

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

void slot_memory_discard(void *at, uint64_t bytes)
{
	/* Private memory (tests) knows no REMOVE. */
	if (bytes > 0 && madvise(at, bytes, MADV_REMOVE) != 0)
		(void)madvise(at, bytes, MADV_DONTNEED);
}

static void memory_return(struct slot_heap *heap, char *at, uint64_t bytes)
{
	slot_memory_discard(at, bytes);
	WRITE_ONCE(heap->bytes, heap->bytes - bytes);
}

/* ---- chunks ---- */

static char *chunk_memory(const struct slot_heap *heap, uint64_t chunk)
{
	return heap->blocks + chunk * SLOT_CHUNK_BYTES;
}

static unsigned chunk_room(const struct slot_chunk *chunk)
{
	return (unsigned)SLOT_CHUNK_GRANULES / chunk->granules;
}

/* The list it belongs in, or NULL when it is full. */
static uint32_t *list_of(struct slot_heap *heap, const struct slot_chunk *chunk)
{
	return chunk->used_count < chunk_room(chunk) ? &heap->lists[chunk->granules] : NULL;
}

static void list_insert(struct slot_heap *heap, uint32_t *list, uint32_t at)
{
	struct slot_chunk *chunk = &heap->chunks[at];

	if (!list)
		return;
	chunk->previous = 0;
	chunk->next = *list;
	if (*list)
		heap->chunks[*list - 1].previous = at + 1;
	*list = at + 1;
}

static void list_remove(struct slot_heap *heap, uint32_t *list, uint32_t at)
{
	struct slot_chunk *chunk = &heap->chunks[at];

	if (!list)
		return;
	if (chunk->next)
		heap->chunks[chunk->next - 1].previous = chunk->previous;
	if (chunk->previous)
		heap->chunks[chunk->previous - 1].next = chunk->next;
	else
		*list = chunk->next;
}

/* One block more or less is used. */
static void chunk_count(struct slot_heap *heap, uint32_t at, int change)
{
	struct slot_chunk *chunk = &heap->chunks[at];
	uint32_t *before = list_of(heap, chunk), *after;

	chunk->used_count = (uint16_t)(chunk->used_count + change);
	after = list_of(heap, chunk);
	if (before != after) {
		list_remove(heap, before, at);
		list_insert(heap, after, at);
	}
}

/* One more chunk, for blocks of this size. False: no memory. */
static bool chunk_take(struct slot_heap *heap, unsigned granules)
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
	heap->chunks[at].granules = (uint8_t)granules;
	heap->chunk_end = max_of(heap->chunk_end, at + 1);
	list_insert(heap, list_of(heap, &heap->chunks[at]), (uint32_t)at);
	return true;
}

static void chunk_give(struct slot_heap *heap, uint32_t at)
{
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

uint32_t slot_heap_alloc(struct slot_heap *heap, unsigned *granules, unsigned most)
{
	struct slot_chunk *chunk;
	unsigned size = *granules, i = 0;
	uint32_t at;

	VS_CHECK(size >= 1 && size <= SLOT_BLOCK_GRANULES_MAX);
	SCOPED_LOCK(&heap->lock);
	while (size < min_of(most, SLOT_BLOCK_GRANULES_MAX) && heap->lists[size] == 0)
		size++;
	if (heap->lists[size] == 0) {
		size = *granules;
		if (!chunk_take(heap, size))
			return 0;
	}
	at = heap->lists[size] - 1;
	chunk = &heap->chunks[at];
	while (chunk->used[i / 64] == ~0ULL)
		i += 64;
	i += (unsigned)__builtin_ctzll(~chunk->used[i / 64]);
	VS_CHECK(i < chunk_room(chunk));
	chunk->used[i / 64] |= 1ULL << (i % 64);
	chunk_count(heap, at, 1);
	*granules = size;
	return (at << SLOT_CHUNK_SHIFT | i * size) + 1;
}

void slot_heap_free(struct slot_heap *heap, uint32_t block, unsigned granules)
{
	SCOPED_LOCK(&heap->lock);
	uint32_t at = slot_block_chunk(block);
	unsigned i = slot_block_granule(block) / granules;
	struct slot_chunk *chunk = &heap->chunks[at];

	VS_CHECK(chunk->granules == granules && chunk->used[i / 64] >> (i % 64) & 1);
	chunk->used[i / 64] &= ~(1ULL << (i % 64));
	chunk_count(heap, at, -1);
	if (chunk->used_count == 0) {
		list_remove(heap, list_of(heap, chunk), at);
		chunk_give(heap, at);
	}
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
		slot_memory_discard(slot_heap_run_at(heap, page), pages * PAGE_BYTES);
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

int slot_heap_create(struct slot_heap *heap, char *blocks, uint64_t block_bytes, char *runs,
		     uint64_t run_bytes)
{
	*heap = (struct slot_heap){ .blocks = blocks, .runs = runs,
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
	struct slot_chunk *chunk;
	unsigned i;

	if (!slot_heap_has(heap, block, granules))
		return -EUCLEAN;
	chunk = &heap->chunks[at];
	i = slot_block_granule(block) / granules;
	if (chunk->state == SLOT_CHUNK_EMPTY) {
		chunk->state = SLOT_CHUNK_IN_USE;
		chunk->granules = (uint8_t)granules;
		heap->chunk_end = max_of(heap->chunk_end, at + 1ULL);
	}
	if (chunk->granules != granules)
		return -EUCLEAN;
	if (chunk->used[i / 64] >> (i % 64) & 1)
		return 1;
	chunk->used[i / 64] |= 1ULL << (i % 64);
	chunk->used_count++;
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

	slot_memory_discard(chunk_memory(heap, heap->chunk_end),
			    (heap->chunk_count - heap->chunk_end) * SLOT_CHUNK_BYTES);
	for (uint32_t at = 0; at < heap->chunk_end; at++) {
		const struct slot_chunk *chunk = &heap->chunks[at];

		if (chunk->state == SLOT_CHUNK_EMPTY)
			slot_memory_discard(chunk_memory(heap, at), SLOT_CHUNK_BYTES);
		else if (memory_populate(heap, chunk_memory(heap, at), SLOT_CHUNK_BYTES) != 0)
			return -ENOMEM;
		else
			list_insert(heap, list_of(heap, chunk), at);
	}
	for (size_t i = 0; i <= heap->run_count; i++) {
		uint64_t end = i < heap->run_count ? heap->run[i].page : heap->run_pages;

		slot_memory_discard(slot_heap_run_at(heap, page), (end - page) * PAGE_BYTES);
		page = i < heap->run_count ? end + heap->run[i].pages : end;
	}
	return 0;
}

/* ---- check ---- */

static bool chunk_is_valid(const struct slot_chunk *chunk)
{
	unsigned used = 0;

	for (unsigned i = 0; i < SLOT_CHUNK_GRANULES; i++)
		if (chunk->used[i / 64] >> (i % 64) & 1) {
			used++;
			if (chunk->state != SLOT_CHUNK_IN_USE || i >= chunk_room(chunk))
				return false;
		}
	return used == chunk->used_count && (used > 0) == (chunk->state == SLOT_CHUNK_IN_USE);
}

static bool list_is_valid(struct slot_heap *heap, uint32_t *list, uint64_t *partial)
{
	uint32_t previous = 0;

	for (uint32_t at = *list; at; at = heap->chunks[at - 1].next) {
		const struct slot_chunk *chunk = &heap->chunks[at - 1];

		if (*partial == 0 || chunk->state != SLOT_CHUNK_IN_USE || list_of(heap, chunk) != list ||
		    chunk->previous != previous)
			return false;
		--*partial;
		previous = at;
	}
	return true;
}

static bool lists_are_valid(struct slot_heap *heap, uint64_t partial)
{
	for (unsigned granules = 1; granules <= SLOT_BLOCK_GRANULES_MAX; granules++)
		if (!list_is_valid(heap, &heap->lists[granules], &partial))
			return false;
	return partial == 0;
}

bool slot_heap_is_valid(struct slot_heap *heap)
{
	uint64_t partial = 0, bytes = 0;
	unsigned spare = 0;

	SCOPED_LOCK(&heap->lock);
	for (uint64_t at = 0; at < heap->chunk_end; at++) {
		const struct slot_chunk *chunk = &heap->chunks[at];

		spare += chunk->state == SLOT_CHUNK_SPARE;
		partial += chunk->state == SLOT_CHUNK_IN_USE && chunk->used_count < chunk_room(chunk);
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
	return spare == heap->spare_count && bytes == heap->bytes && lists_are_valid(heap, partial);
}
