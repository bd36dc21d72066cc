/* SPDX-License-Identifier: MIT */
/*
 * cold — clusters of a client with something in the pool, in the order in which that was stored.
 *
 * Writers take the coldest (writeback.c); before them the recompressor looks at each once and leaves it (recompress.c).
 * Entries are hints: whoever gets a cluster looks at its slots. One may be listed again, and one that is
 * gone stays listed for a while. What is not listed (a forked child's, what mremap moved) is found by a walk over the slots.
 *
 * Room        a ring. Before it grows beyond twice as many entries as the map has clusters, of each cluster but the last
 *             entry goes, and so do those of clusters that are gone. Without memory an entry is lost.
 * Times       milliseconds of a monotonic clock, modulo 2^35: a year.
 * Invariants  1 examined <= count <= capacity
 *             2 the first `examined` are those that the recompressor has seen
 * Locking     the gate of its client; `count` may be read by anybody.
 */
#ifndef VSWAP_COLD_H
#define VSWAP_COLD_H

#include <stdbool.h>
#include <stdint.h>

#include "slot_table.h"

struct cold_list {
	uint64_t *entries; /* milliseconds above, a cluster's number below */
	unsigned capacity, first, count;
	unsigned examined;
};

void cold_destroy(struct cold_list *list);

/* Something was stored in this cluster of the map just now. */
void cold_push(struct cold_list *list, const struct slot_space *space, const struct slot_map *map, uint64_t number,
	       uint64_t now_ms);

/* Take the coldest. False: there is none. */
bool cold_pop(struct cold_list *list, uint64_t *ret_number);

/* The coldest that was not asked for so yet, if it was stored that long ago. It stays where it is. */
bool cold_examine(struct cold_list *list, uint64_t now_ms, uint64_t age_ms, uint64_t *ret_number);

#endif
