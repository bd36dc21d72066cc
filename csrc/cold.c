/* SPDX-License-Identifier: MIT */
#include "cold.h"

#include <stdlib.h>

#include "base.h"

#define ENTRIES_MIN 64u
#define NUMBER_BITS 29
#define TIME_MASK ((1ULL << (64 - NUMBER_BITS)) - 1)

/* Pages that wait for their place after an mremap are beyond every address space (remap.c). */
static_assert(2 * ADDRESS_PAGES_MAX >> CLUSTER_SHIFT == 1ULL << NUMBER_BITS, "numbers of clusters fit");

static uint64_t number_of(uint64_t entry) { return entry & ((1ULL << NUMBER_BITS) - 1); }

static uint64_t *entry_at(const struct cold_list *list, unsigned i)
{
	return &list->entries[(list->first + i) % list->capacity];
}

/* The first `count` are of no use any more. */
static void forget(struct cold_list *list, unsigned count)
{
	VS_CHECK(count <= list->count && list->examined <= list->count);
	list->first = (list->first + count) % list->capacity;
	list->examined -= min_of(list->examined, count);
	WRITE_ONCE(list->count, list->count - count);
}

void cold_destroy(struct cold_list *list)
{
	free(list->entries);
	*list = (struct cold_list){ 0 };
}

/* Add a number to a set of them, whose room is a power of two; 0 marks what is free. False: it is in there. */
static bool set_add(uint32_t *set, uint64_t room, uint64_t number)
{
	uint64_t i = number * 0x9E3779B97F4A7C15ULL >> 32;

	for (;; i++) {
		uint32_t *place = &set[i & (room - 1)];

		if (*place == number + 1)
			return false;
		if (*place == 0) {
			*place = (uint32_t)number + 1;
			return true;
		}
	}
}

/* Of each cluster that is there the last entry alone stays. Nothing changes when there is no memory for that. */
static void compact(struct cold_list *list, const struct slot_space *space, const struct slot_map *map)
{
	uint64_t room = 2 * ENTRIES_MIN;
	unsigned kept = 0, examined = 0;
	uint32_t *set;

	while (room < 2ULL * list->count)
		room *= 2;
	set = calloc(room, sizeof *set);
	if (!set)
		return;
	for (unsigned i = list->count; i-- > 0;) {
		uint64_t entry = *entry_at(list, i);

		if (!set_add(set, room, number_of(entry)) || !slot_map_has(space, map, number_of(entry)))
			continue;
		kept++;
		examined += i < list->examined;
		*entry_at(list, list->count - kept) = entry;
	}
	free(set);
	list->first = (list->first + list->count - kept) % list->capacity;
	list->examined = examined;
	WRITE_ONCE(list->count, kept);
}

/* Room for one more. False: there is no memory for that. */
static bool reserve(struct cold_list *list, const struct slot_space *space, const struct slot_map *map)
{
	unsigned capacity = max_of(list->capacity * 2, ENTRIES_MIN);
	uint64_t *entries;

	if (list->count == list->capacity && list->count > 2 * map->cluster_count + ENTRIES_MIN)
		compact(list, space, map);
	if (list->count < list->capacity)
		return true;
	entries = malloc(capacity * sizeof *entries);
	if (!entries)
		return false;
	for (unsigned i = 0; i < list->count; i++)
		entries[i] = *entry_at(list, i);
	free(list->entries);
	list->entries = entries;
	list->first = 0;
	list->capacity = capacity;
	return true;
}

void cold_push(struct cold_list *list, const struct slot_space *space, const struct slot_map *map, uint64_t number,
	       uint64_t now_ms)
{
	uint64_t entry = now_ms << NUMBER_BITS | number;

	VS_CHECK(number == number_of(number));
	if (list->examined < list->count && number_of(*entry_at(list, list->count - 1)) == number) {
		*entry_at(list, list->count - 1) = entry;
		return;
	}
	if (!reserve(list, space, map))
		return; /* then this cluster is written back late: slow, not wrong */
	*entry_at(list, list->count) = entry;
	WRITE_ONCE(list->count, list->count + 1);
}

bool cold_pop(struct cold_list *list, uint64_t *ret_number)
{
	if (list->count == 0)
		return false;
	*ret_number = number_of(*entry_at(list, 0));
	forget(list, 1);
	return true;
}

bool cold_examine(struct cold_list *list, uint64_t now_ms, uint64_t age_ms, uint64_t *ret_number)
{
	uint64_t entry;

	if (list->examined >= list->count)
		return false;
	entry = *entry_at(list, list->examined);
	if (((now_ms - (entry >> NUMBER_BITS)) & TIME_MASK) < age_ms)
		return false;
	list->examined++;
	*ret_number = number_of(entry);
	return true;
}
