/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "order.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base.h"

#define GHOSTS_MIN (1ULL << 10)
#define GHOSTS_MAX (1ULL << 24)
#define GHOST_TAG_BITS 12
#define GHOST_TIME_BITS 20
#define GHOST_TIME_PAGES 16 /* unit of time: so many pages evicted */

#define PROBATION_PART 128 /* one in so many resident pages */
#define PROBATION_PAGES_MIN 512

static uint64_t hash_of(unsigned client, uint64_t page)
{
	uint64_t hash = (page ^ (uint64_t)client << 40) * 0x9E3779B97F4A7C15ULL;

	return hash ^ hash >> 32;
}

static uint32_t time_of(uint64_t clock)
{
	return (uint32_t)(clock / GHOST_TIME_PAGES) & ((1U << GHOST_TIME_BITS) - 1);
}

/* Never 0, which is an empty entry. */
static uint32_t tag_of(uint64_t hash) { return (uint32_t)(hash >> (64 - GHOST_TAG_BITS)) | 1; }

int ghosts_create(struct ghosts *ghosts, uint64_t limit_bytes)
{
	uint64_t count = GHOSTS_MIN;
	void *entries;

	while (count < GHOSTS_MAX && count < limit_bytes / PAGE_BYTES)
		count *= 2;
	entries = mmap(NULL, count * sizeof *ghosts->entries, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (entries == MAP_FAILED)
		return -ENOMEM;
	*ghosts = (struct ghosts){ .entries = entries, .mask = count - 1 };
	return 0;
}

void ghosts_destroy(struct ghosts *ghosts)
{
	if (ghosts->entries)
		munmap(ghosts->entries, (ghosts->mask + 1) * sizeof *ghosts->entries);
	*ghosts = (struct ghosts){ 0 };
}

void ghosts_note(struct ghosts *ghosts, unsigned client, uint64_t page)
{
	uint64_t hash = hash_of(client, page);
	uint64_t clock = __atomic_fetch_add(&ghosts->clock, 1, __ATOMIC_RELAXED);

	WRITE_ONCE(ghosts->entries[hash & ghosts->mask],
		   tag_of(hash) << GHOST_TIME_BITS | time_of(clock));
}

bool ghosts_is_recent(const struct ghosts *ghosts, unsigned client, uint64_t page, uint64_t pages)
{
	uint64_t hash = hash_of(client, page);
	uint32_t entry = READ_ONCE(ghosts->entries[hash & ghosts->mask]);
	uint32_t since = time_of(READ_ONCE(ghosts->clock)) - entry;

	return entry >> GHOST_TIME_BITS == tag_of(hash) &&
	       (since & ((1U << GHOST_TIME_BITS) - 1)) < pages / GHOST_TIME_PAGES;
}

void probation_push(struct probation *probation, uint64_t page, uint64_t count)
{
	struct probation_run *last;

	if (!probation->runs)
		probation->runs = malloc(PROBATION_RUNS_MAX * sizeof *probation->runs);
	if (!probation->runs)
		return; /* then the hand finds them */
	last = &probation->runs[(probation->first + probation->count - 1) % PROBATION_RUNS_MAX];
	if (probation->count && last->page + last->count == page) {
		last->count += count;
	} else {
		if (probation->count == PROBATION_RUNS_MAX)
			probation_take(probation, probation->runs[probation->first].count);
		probation->runs[(probation->first + probation->count++) % PROBATION_RUNS_MAX] =
			(struct probation_run){ page, count };
	}
	probation->page_count += count;
}

void probation_return(struct probation *probation, uint64_t page, uint64_t count)
{
	if (!probation->runs || probation->count == PROBATION_RUNS_MAX)
		return; /* then the hand finds them */
	probation->first = (probation->first + PROBATION_RUNS_MAX - 1) % PROBATION_RUNS_MAX;
	probation->runs[probation->first] = (struct probation_run){ page, count };
	probation->count++;
	probation->page_count += count;
}

void probation_copy(const struct probation *probation, struct probation *child)
{
	for (unsigned i = 0; i < probation->count; i++) {
		const struct probation_run *run = &probation->runs[(probation->first + i) % PROBATION_RUNS_MAX];

		probation_push(child, run->page, run->count);
	}
}

bool probation_is_full(const struct probation *probation, int64_t resident_pages)
{
	uint64_t part = (uint64_t)max_of(resident_pages, 0) / PROBATION_PART;

	return probation->page_count >
	       max_of(min_of(part, PROBATION_PAGES_MAX), (uint64_t)PROBATION_PAGES_MIN);
}

bool probation_peek(const struct probation *probation, struct probation_run *ret_run)
{
	if (probation->count == 0)
		return false;
	*ret_run = probation->runs[probation->first];
	return true;
}

void probation_take(struct probation *probation, uint64_t pages)
{
	struct probation_run *run = &probation->runs[probation->first];

	VS_CHECK(probation->count > 0 && pages <= run->count);
	run->page += pages;
	run->count -= pages;
	probation->page_count -= pages;
	if (run->count > 0)
		return;
	probation->first = (probation->first + 1) % PROBATION_RUNS_MAX;
	probation->count--;
}

void probation_clear(struct probation *probation)
{
	free(probation->runs);
	*probation = (struct probation){ 0 };
}
