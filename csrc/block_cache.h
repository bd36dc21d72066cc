/* SPDX-License-Identifier: MIT */
/*
 * block_cache — blocks of memory of one size, which many threads need now and then and few at once.
 *
 * A fault thread needs half a MiB to expand pages in, a read from a backend up to 1 MiB, each for some microseconds.
 * There are two fault threads for each client and more: with blocks of their own, or from malloc's arenas, which keep
 * what was once in use, a hundred MiB lie there for sixteen clients. Here the block that was given back last is taken
 * first, and what lies here unused is bounded. Blocks are mapped: page-aligned for O_DIRECT, and no others' memory that
 * may be elsewhere (shelve.h).
 */
#ifndef VSWAP_BLOCK_CACHE_H
#define VSWAP_BLOCK_CACHE_H

#include <pthread.h>
#include <stddef.h>

#define BLOCKS_KEPT 4

struct block_cache {
	pthread_mutex_t lock;
	size_t block_bytes;
	unsigned count;
	void *blocks[BLOCKS_KEPT]; /* unused; the last is the one that was given back last */
};

void block_cache_init(struct block_cache *cache, size_t block_bytes);
/* Unmaps what lies in it; blocks in use must have been given back. */
void block_cache_destroy(struct block_cache *cache);

/* A block of whoever had it before: its content is anything. NULL when there is no memory. */
void *block_take(struct block_cache *cache);
/* `block` NULL: nothing. */
void block_give(struct block_cache *cache, void *block);

#endif
