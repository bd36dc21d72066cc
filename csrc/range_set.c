/* SPDX-License-Identifier: MIT */
#include "range_set.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"

/* Index of the first range that ends after `address`. */
static size_t position(const struct range_set *set, uint64_t address)
{
	size_t low = 0, high = set->count;

	while (low < high) {
		size_t middle = (low + high) / 2;

		if (set->ranges[middle].end > address)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

static int reserve(struct range_set *set, size_t count, size_t max)
{
	struct range *ranges;
	size_t capacity = set->capacity ? set->capacity : 16;

	if (count > max)
		return -ENOSPC;
	while (capacity < count)
		capacity *= 2;
	if (capacity == set->capacity)
		return 0;
	ranges = realloc(set->ranges, capacity * sizeof *ranges);
	if (!ranges)
		return -ENOMEM;
	set->ranges = ranges;
	set->capacity = capacity;
	return 0;
}

/* Replace `old_count` ranges at `at` by `replacement[0..new_count)`. Room is reserved. */
static void splice(struct range_set *set, size_t at, size_t old_count,
		   const struct range *replacement, size_t new_count)
{
	struct range *hole = set->ranges + at;

	set->changes++;
	memmove(hole + new_count, hole + old_count,
		(set->count - at - old_count) * sizeof *set->ranges);
	if (new_count)
		memcpy(hole, replacement, new_count * sizeof *hole);
	set->count += new_count;
	set->count -= old_count;
}

int range_set_remove(struct range_set *set, uint64_t start, uint64_t end, size_t max)
{
	size_t first = position(set, start), last = first, kept = 0;
	struct range edges[2];
	int result;

	while (last < set->count && set->ranges[last].start < end)
		last++;
	if (first == last)
		return 0;
	if (set->ranges[first].start < start)
		edges[kept++] = (struct range){ set->ranges[first].start, start,
						set->ranges[first].value };
	if (set->ranges[last - 1].end > end)
		edges[kept++] = (struct range){ end, set->ranges[last - 1].end,
						set->ranges[last - 1].value };
	result = reserve(set, set->count - (last - first) + kept, max);
	if (result < 0)
		return result;
	splice(set, first, last - first, edges, kept);
	return 0;
}

int range_set_add(struct range_set *set, uint64_t start, uint64_t end, uint64_t value, size_t max)
{
	struct range range = { start, end, value };
	size_t at;
	int result;

	VS_CHECK(start < end);
	result = reserve(set, set->count + 2, max + 2);
	if (result < 0)
		return result;
	result = range_set_remove(set, start, end, max + 1);
	if (result < 0)
		return result;
	at = position(set, start);
	/* Merge with neighbours of the same value that touch. */
	if (at < set->count && set->ranges[at].start == end && set->ranges[at].value == value) {
		range.end = set->ranges[at].end;
		splice(set, at, 1, NULL, 0);
	}
	if (at > 0 && set->ranges[at - 1].end == start && set->ranges[at - 1].value == value) {
		set->ranges[at - 1].end = range.end;
		set->changes++;
		return 0;
	}
	if (set->count + 1 > max)
		return -ENOSPC;
	splice(set, at, 0, &range, 1);
	return 0;
}

const struct range *range_set_at(const struct range_set *set, uint64_t address)
{
	size_t at = position(set, address);

	return at < set->count ? &set->ranges[at] : NULL;
}

bool range_set_has(const struct range_set *set, uint64_t address)
{
	const struct range *range = range_set_at(set, address);

	return range && range->start <= address;
}

void range_set_clear(struct range_set *set)
{
	free(set->ranges);
	*set = (struct range_set){ .changes = set->changes + 1 };
}

bool range_set_is_valid(const struct range_set *set)
{
	for (size_t i = 0; i < set->count; i++) {
		if (set->ranges[i].start >= set->ranges[i].end)
			return false;
		if (i && set->ranges[i - 1].end > set->ranges[i].start)
			return false;
	}
	return true;
}
