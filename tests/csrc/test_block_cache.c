/* SPDX-License-Identifier: MIT */
/*
 * test_block_cache — blocks are nobody else's while they are in use, the last one given back is taken first, and few are kept.
 *
 * Build: this file, csrc/block_cache.c, csrc/fault_point.c, csrc/base.c; -Icsrc; threads. That a block cannot be had is
 * tried with -DVSWAP_FAULT_POINTS.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>

#include "block_cache.h"
#include "check.h"
#include "fault_point.h"

#define BLOCK_BYTES (64UL << 10)
#define THREADS 4
#define TURNS 20000

static bool is_mapped(void *block)
{
	unsigned char present;

	return mincore(block, BLOCK_BYTES, &present) == 0;
}

static void test_order_and_bound(void)
{
	struct block_cache cache;
	void *blocks[BLOCKS_KEPT + 2], *last;

	block_cache_init(&cache, BLOCK_BYTES);
	for (unsigned i = 0; i < BLOCKS_KEPT + 2; i++) {
		blocks[i] = block_take(&cache);
		CHECK(blocks[i] && (uintptr_t)blocks[i] % 4096 == 0);
		memset(blocks[i], (int)i + 1, BLOCK_BYTES);
		for (unsigned k = 0; k < i; k++)
			CHECK(blocks[k] != blocks[i] && *(unsigned char *)blocks[k] == k + 1);
	}
	for (unsigned i = 0; i < BLOCKS_KEPT + 2; i++)
		block_give(&cache, blocks[i]);
	CHECK(cache.count == BLOCKS_KEPT);
	CHECK(!is_mapped(blocks[BLOCKS_KEPT]) && !is_mapped(blocks[BLOCKS_KEPT + 1]));
	last = blocks[BLOCKS_KEPT - 1];
	CHECK(block_take(&cache) == last && *(unsigned char *)last == BLOCKS_KEPT);
	block_give(&cache, last);
	block_give(&cache, NULL);
	CHECK(cache.count == BLOCKS_KEPT);
	block_cache_destroy(&cache);
	CHECK(!is_mapped(blocks[0]) && !is_mapped(last));
}

static void *turns(void *argument)
{
	struct block_cache *cache = argument;

	for (uint64_t turn = 0; turn < TURNS; turn++) {
		uint64_t *held[2] = { block_take(cache), block_take(cache) };

		for (unsigned i = 0; i < 2; i++) {
			CHECK(held[i]);
			held[i][0] = held[i][BLOCK_BYTES / 8 - 1] = (uintptr_t)&held ^ turn << 1 ^ i;
		}
		for (unsigned i = 0; i < 2; i++) {
			CHECK(held[i][0] == ((uintptr_t)&held ^ turn << 1 ^ i) && held[i][0] == held[i][BLOCK_BYTES / 8 - 1]);
			block_give(cache, held[i]);
		}
	}
	return NULL;
}

static void test_threads(void)
{
	struct block_cache cache;
	pthread_t threads[THREADS];

	block_cache_init(&cache, BLOCK_BYTES);
	for (unsigned i = 0; i < THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, turns, &cache) == 0);
	for (unsigned i = 0; i < THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK(cache.count <= BLOCKS_KEPT);
	block_cache_destroy(&cache);
}

#ifdef VSWAP_FAULT_POINTS
static void test_no_memory(void)
{
	struct block_cache cache;
	void *block;

	block_cache_init(&cache, BLOCK_BYTES);
	fault_point_set("block/map", 1, ENOMEM, true);
	CHECK(block_take(&cache) == NULL);
	fault_point_clear();
	block = block_take(&cache);
	CHECK(block);
	block_give(&cache, block);
	fault_point_set("block/map", 1, ENOMEM, true);
	CHECK(block_take(&cache) == block); /* one that lies there can be had */
	CHECK(block_take(&cache) == NULL);
	fault_point_clear();
	block_give(&cache, block);
	block_cache_destroy(&cache);
}
#endif

int main(int argc, char **argv)
{
	(void)test_seed(argc, argv);
	test_order_and_bound();
	test_threads();
#ifdef VSWAP_FAULT_POINTS
	test_no_memory();
#endif
	return 0;
}
