/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "block_cache.h"

#include <sys/mman.h>

#include "base.h"
#include "fault_point.h"

void block_cache_init(struct block_cache *cache, size_t block_bytes)
{
	*cache = (struct block_cache){ .block_bytes = block_bytes };
	pthread_mutex_init(&cache->lock, NULL);
}

void block_cache_destroy(struct block_cache *cache)
{
	while (cache->count)
		munmap(cache->blocks[--cache->count], cache->block_bytes);
	pthread_mutex_destroy(&cache->lock);
}

static void *block_map(size_t bytes)
{
	void *block = fault_point("block/map") ? MAP_FAILED :
						 mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (block == MAP_FAILED)
		return NULL;
	(void)madvise(block, bytes, MADV_NOHUGEPAGE); /* as much of it as is used */
	return block;
}

void *block_take(struct block_cache *cache)
{
	void *block = NULL;

	pthread_mutex_lock(&cache->lock);
	if (cache->count)
		block = cache->blocks[--cache->count];
	pthread_mutex_unlock(&cache->lock);
	return block ? block : block_map(cache->block_bytes);
}

void block_give(struct block_cache *cache, void *block)
{
	if (!block)
		return;
	pthread_mutex_lock(&cache->lock);
	if (cache->count < BLOCKS_KEPT) {
		cache->blocks[cache->count++] = block;
		block = NULL;
	}
	pthread_mutex_unlock(&cache->lock);
	if (block)
		munmap(block, cache->block_bytes);
}
