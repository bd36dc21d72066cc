/* SPDX-License-Identifier: MIT */
/*
 * range_set — a sorted array of disjoint address ranges: a client's registered regions, and the
 * ranges that madvise removed (see quarantine in client.h).
 *
 * Invariants  start < end; ranges ascend and neither overlap nor touch, except that ranges with
 *             different values may touch. range_set_is_valid() checks it.
 * Locking     none of its own.
 * Limits      `max` given at use; adding beyond it fails with -ENOSPC and changes nothing.
 */
#ifndef VSWAP_RANGE_SET_H
#define VSWAP_RANGE_SET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct range {
	uint64_t start, end; /* bytes */
	uint64_t value;
};

struct range_set {
	struct range *ranges;
	size_t count, capacity;
	uint64_t changes; /* goes up with each */
};

/* Add [start, end) with `value`, replacing what was there. 0, -ENOMEM or -ENOSPC. */
int range_set_add(struct range_set *set, uint64_t start, uint64_t end, uint64_t value, size_t max);
/* Remove [start, end); may split a range: 0, -ENOMEM or -ENOSPC. */
int range_set_remove(struct range_set *set, uint64_t start, uint64_t end, size_t max);
/* The first range that ends after `address` (it may start after it), or NULL. */
const struct range *range_set_at(const struct range_set *set, uint64_t address);
/* True when `address` is in a range. */
bool range_set_has(const struct range_set *set, uint64_t address);
void range_set_clear(struct range_set *set);
bool range_set_is_valid(const struct range_set *set);

#endif
