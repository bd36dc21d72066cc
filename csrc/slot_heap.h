/* SPDX-License-Identifier: MIT */
/*
 * slot_heap — memory for the clusters and indexes of the slot table, in the state memfd.
 *
 * Blocks      A block is 1 .. SLOT_BLOCK_GRANULES_MAX granules of one chunk. Best fit: out of a chunk whose longest
 *             stretch of free granules is the shortest that will do, the shortest such stretch. What one size gives
 *             back every other can use. A chunk whose last block is freed goes back to the system, but for
 *             SLOT_SPARE_CHUNKS of them. The chunks' own memory is not touched to find or free a block.
 * Runs        whole pages, for indexes: few and rare. First fit; a freed run goes back to the system at once.
 * Giving back is done through the memfd: the mapping may be locked, and MADV_REMOVE refuses that (sys_discard).
 * Truth       Nothing in here is. Only what is reachable from a client's map exists; which memory is free is
 *             known to the process alone and rebuilt by a successor from what the maps reach.
 * Invariants  1 `used` has the bits of a chunk's granules that are in a block, `starts` those of their first ones
 *             2 a chunk in use has a block, and is in the list of its longest free stretch, if that is not 0
 *             3 no chunk below chunk_hint is EMPTY, and all from chunk_end on are
 *             4 runs are sorted and apart
 *             slot_heap_is_valid() checks all four.
 * Locking     `lock`; memory that was handed out is its owner's business.
 */
#ifndef VSWAP_SLOT_HEAP_H
#define VSWAP_SLOT_HEAP_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base.h"

#define SLOT_GRANULE_BYTES 56UL
#define SLOT_CHUNK_BYTES 20480UL /* 11 of the largest blocks */
#define SLOT_CHUNK_GRANULES (SLOT_CHUNK_BYTES / SLOT_GRANULE_BYTES)
#define SLOT_CHUNK_SHIFT 9 /* of the names of blocks */
#define SLOT_BLOCK_GRANULES_MAX 33
#define SLOT_SPARE_CHUNKS 1

enum slot_chunk_state { SLOT_CHUNK_EMPTY, SLOT_CHUNK_SPARE, SLOT_CHUNK_IN_USE }; /* SPARE: with memory, not used */

#define SLOT_CHUNK_WORDS (SLOT_CHUNK_GRANULES / 64 + 1)

/* What the process knows of a chunk. */
struct slot_chunk {
	uint8_t state;
	uint8_t longest; /* free stretch, or SLOT_BLOCK_GRANULES_MAX when it is longer: its list */
	uint32_t next, previous; /* in that list: chunk + 1, 0: none */
	uint64_t used[SLOT_CHUNK_WORDS], starts[SLOT_CHUNK_WORDS];
};

struct slot_run {
	uint64_t page, pages;
};

struct slot_heap {
	pthread_mutex_t lock;
	char *blocks, *runs; /* the two parts of the memory */
	int memfd;           /* it is mapped from, .. */
	uint64_t offset;     /* .. the blocks from here on */
	uint64_t chunk_count, run_pages;
	struct slot_chunk *chunks;
	uint64_t chunk_hint, chunk_end;
	uint32_t spare[SLOT_SPARE_CHUNKS];
	unsigned spare_count;
	uint32_t lists[SLOT_BLOCK_GRANULES_MAX + 1]; /* by longest free stretch: chunk + 1 */
	struct slot_run *run;
	size_t run_count, run_capacity;
	uint64_t bytes; /* with memory behind them; read from anywhere */
};

/* Take two parts of one mapping of `memfd`, of which the blocks begin at `offset`, with nothing in them or with what a
 * dead daemon left there. The descriptor stays the caller's, open until slot_heap_destroy(). */
int slot_heap_create(struct slot_heap *heap, int memfd, uint64_t offset, char *blocks, uint64_t block_bytes,
		     char *runs, uint64_t run_bytes);
void slot_heap_destroy(struct slot_heap *heap);

/* A block is named by its chunk << SLOT_CHUNK_SHIFT | its first granule, + 1. 0: no memory. Content is undefined. */
uint32_t slot_heap_alloc(struct slot_heap *heap, unsigned granules);
void slot_heap_free(struct slot_heap *heap, uint32_t block, unsigned granules);

static inline uint32_t slot_block_chunk(uint32_t block) { return (block - 1) >> SLOT_CHUNK_SHIFT; }

static inline unsigned slot_block_granule(uint32_t block)
{
	return (block - 1) & ((1u << SLOT_CHUNK_SHIFT) - 1);
}

static inline void *slot_heap_at(const struct slot_heap *heap, uint32_t block)
{
	VS_CHECK(block != 0 && slot_block_chunk(block) < heap->chunk_count);
	return heap->blocks + slot_block_chunk(block) * SLOT_CHUNK_BYTES +
	       slot_block_granule(block) * SLOT_GRANULE_BYTES;
}

/* There can be such a block. */
static inline bool slot_heap_has(const struct slot_heap *heap, uint32_t block, unsigned granules)
{
	return block != 0 && slot_block_chunk(block) < heap->chunk_count && granules >= 1 &&
	       granules <= SLOT_BLOCK_GRANULES_MAX &&
	       slot_block_granule(block) + granules <= SLOT_CHUNK_GRANULES;
}

/* Give the memory behind these pages, anywhere in that mapping, back to the system: they read as zeros. */
void slot_heap_discard(const struct slot_heap *heap, char *at, uint64_t bytes);

/* Zeroed pages. Returns 0 or -ENOMEM. */
int slot_heap_run_alloc(struct slot_heap *heap, uint64_t pages, uint64_t *ret_page);
void slot_heap_run_free(struct slot_heap *heap, uint64_t page);

static inline void *slot_heap_run_at(const struct slot_heap *heap, uint64_t page)
{
	return heap->runs + page * PAGE_BYTES;
}

/* Bytes with memory behind them, whatever they are used for; any thread. */
static inline uint64_t slot_heap_bytes(const struct slot_heap *heap) { return READ_ONCE(heap->bytes); }

/*
 * Before anything is allocated, what the maps of a dead daemon reach is named here. Returns 0, 1 for a block named
 * before, or -EUCLEAN: it cannot be there beside the others.
 */
int slot_heap_adopt(struct slot_heap *heap, uint32_t block, unsigned granules);
int slot_heap_adopt_run(struct slot_heap *heap, uint64_t page, uint64_t pages);
/* All others are free. Returns 0 or -ENOMEM. */
int slot_heap_ready(struct slot_heap *heap);

bool slot_heap_is_valid(struct slot_heap *heap);

#endif
