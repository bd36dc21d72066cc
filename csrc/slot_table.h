/* SPDX-License-Identifier: MIT */
/*
 * slot_table — where the bytes of each page of each client are.
 *
 * A client's pages are grouped in clusters of 128, aligned in its address space. A cluster holds an entry of
 * 14 bytes for each page that has a slot, and for few others: a bitmap says for which, an entry's place is the
 * number of bits before its page's. A page that was never swapped costs nothing, whatever its neighbours are.
 *
 * Backing of a page (tag of its slot)
 *   NONE        no slot: the page is resident, or was never touched (then it reads as zeros)
 *   ZERO        all zero; no bytes anywhere
 *   SAME        one 64-bit word repeated; the word is in the slot
 *   POOL        an object in the group's pool
 *   SPILL       an extent of a backend
 *   STAGED      on its way out: in window location / 64 of the client's staging, or in the evictor's
 *               buffer; the batch record (state.h) holds what the slot was before
 *   KEPT_POOL   resident, and the pool still has the copy it was filled from
 *   KEPT_SPILL  resident, and a backend still has it
 *   INDIRECT    shared with forked relatives: location is the index of a counted shared slot
 *   POISONED    its bytes are lost; a touch gets SIGBUS
 *
 * Transitions (each is one store of the 64-bit word, after everything it names is in place)
 *   NONE, KEPT_* -> STAGED            evict.c, after the MOVE was verified
 *   STAGED -> ZERO, SAME, POOL        evict.c, stored; -> POOL, SPILL when equal to the kept copy,
 *                                     -> INDIRECT when a forked relative has it already
 *   STAGED -> NONE, KEPT_*            fill.c, faulted meanwhile
 *   ZERO, SAME -> NONE                fill.c
 *   POOL, SPILL -> KEPT_*, NONE       fill.c; migration only within the same content:
 *   POOL, SPILL -> INDIRECT           evict.c, a forked relative evicted the same page
 *   POOL -> SPILL                     writeback.c
 *   SPILL -> SPILL, POOL              drain.c; KEPT_SPILL -> KEPT_SPILL, NONE
 *   INDIRECT -> NONE                  fill.c, one reference less
 *   any -> NONE                       munmap, madvise, exit; any -> POISONED fill.c
 *
 * Sharing     fork shares whole clusters by count. Whoever wants to look into a shared cluster first
 *             makes it his own: every POOL and SPILL slot in it moves to a counted shared slot, and
 *             both copies become INDIRECT. A store of new content never goes into a shared slot.
 * Entries     A page whose slot goes leaves a hole, an entry that is NONE; it is taken again by the same page,
 *             or by another when the entries between make way. A cluster without a hole is copied to a larger
 *             block of slot_heap.h, one with many to a smaller one. A shared cluster keeps its size.
 * Invariants  1 `entries` is the number of bits in a cluster's `pages`, and fits in its `granules`
 *             2 a cluster's `live` is the number of its words that are not NONE; with live == 0 it is in no index
 *             3 the count of a shared slot is the number of INDIRECT words that name it, and of slot_share() calls
 *               whose reference is in no word yet
 *             4 counts[tag] of a map is the number of its words with that tag (shared clusters are
 *               counted in every map that has them)
 *             5 a cluster that more than one map has is marked `was_shared`
 *             6 an entry of an index is where a search for its number ends; three quarters are used at most
 *             slot_map_is_valid() checks all but 3, which the model in tests/models does.
 * Crash order A daemon may be killed between any two stores; what its successor finds is the state before or
 *             after each change of a slot.
 *             slot      the check first, the word last. A check changes only under a word without one.
 *             appended  the entry first, then its page's bit.
 *             inserted  what is about to move is saved in map->undo and that is marked; then entries and bitmap
 *                       change; then the mark goes. A successor that finds the mark puts everything back.
 *             resized   the new cluster is complete before the one store that puts it into the index.
 *             index     an entry is one word; a grown index is complete before the one store to map->root.
 *             shared    a counted slot is complete before the word that names it; a copy of a cluster before
 *                       the index entry; `was_shared` is set before a second map has the cluster.
 *             freed     nothing names a cluster, index or copy any more when it is given back.
 * Recovery    slot_space_open(), slot_space_adopt() for each map, slot_space_ready(). Truth are the roots, the
 *             indexes, bitmaps, words and checks that they lead to, and the words of shared slots. All counts,
 *             of clusters, shared slots and maps, are made anew from them, and what no map leads to is free: half
 *             made clusters and indexes, slots whose last reference had just gone. What no order of stores could
 *             have left behind is -EUCLEAN. One thing is the caller's: a daemon that dies in slot_map_move() may
 *             leave one slot at both pages, until the move is done again (recover.c).
 * Locking     a map, and the clusters only it has, are protected by the gate of its client; those on a list of
 *             slot_map_detach() are its owner's alone. Shared
 *             clusters and shared slots are protected by space->share_lock, taken inside the gate.
 * Cost        14 bytes an entry; 28 bytes and 1.5 entries a cluster; 10.7 to 13.3 bytes for its index entry; the
 *             chunks of slot_heap.h that are not full. docs/decisions/0007-packed-clusters.md has the sums.
 */
#ifndef VSWAP_SLOT_TABLE_H
#define VSWAP_SLOT_TABLE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base.h"
#include "limits.h"

enum slot_tag {
	SLOT_NONE,
	SLOT_ZERO,
	SLOT_SAME,
	SLOT_POOL,
	SLOT_SPILL,
	SLOT_STAGED,
	SLOT_KEPT_POOL,
	SLOT_KEPT_SPILL,
	SLOT_INDIRECT,
	SLOT_POISONED,
	SLOT_TAG_COUNT
};

/* A slot, decoded. Two slots are the same copy of the same content when all fields are equal. */
struct slot {
	enum slot_tag tag;
	uint8_t units;     /* POOL, SPILL, KEPT_*: size of the object, 1..64 */
	uint8_t backend;   /* SPILL, KEPT_SPILL */
	uint64_t location; /* POOL: handle; SPILL: extent; STAGED: window * 64 + page; INDIRECT: index */
	uint64_t check;    /* POOL, SPILL, KEPT_*: codec_check of the page; SAME: the word */
};

static inline bool slot_is_equal(struct slot a, struct slot b)
{
	return a.tag == b.tag && a.units == b.units && a.backend == b.backend &&
	       a.location == b.location && a.check == b.check;
}

/* The page's bytes are not in the client. */
static inline bool slot_is_swapped(enum slot_tag tag)
{
	return (tag >= SLOT_ZERO && tag <= SLOT_STAGED) || tag == SLOT_INDIRECT;
}

static inline bool slot_is_kept(enum slot_tag tag)
{
	return tag == SLOT_KEPT_POOL || tag == SLOT_KEPT_SPILL;
}

/* Same copy, page resident / page swapped. */
static inline struct slot slot_kept(struct slot slot)
{
	slot.tag = slot.tag == SLOT_POOL ? SLOT_KEPT_POOL : SLOT_KEPT_SPILL;
	return slot;
}

static inline struct slot slot_unkept(struct slot slot)
{
	slot.tag = slot.tag == SLOT_KEPT_POOL ? SLOT_POOL : SLOT_SPILL;
	return slot;
}

struct slot_space; /* clusters, shared slots and indexes of all clients, in the state memfd */

/* What entries of a cluster were, while they make way for one more (see Crash order). */
struct slot_undo {
	uint64_t what; /* entries << 48 | first entry << 32 | cluster; 0: nothing is on its way */
	uint64_t pages[2];
	uint64_t word[CLUSTER_PAGES];
	uint32_t check_middle[CLUSTER_PAGES];
	uint16_t check_low[CLUSTER_PAGES];
};

/* One client's map. Lives in its record in the state memfd; zeroed means empty. */
struct slot_map {
	uint64_t root;           /* index: offset in the space << 8 | log2 of its capacity; 0: none */
	uint64_t cluster_count;  /* clusters in the index */
	uint64_t cluster_bytes;  /* of those */
	uint64_t index_used;     /* index entries not empty, tombstones included */
	uint64_t counts[SLOT_TAG_COUNT]; /* written inside the gate, read from anywhere */
	struct slot_undo undo;
};

/* Pages of a map whose slot has this tag. Any thread. */
static inline uint64_t slot_map_count(const struct slot_map *map, enum slot_tag tag)
{
	return READ_ONCE(map->counts[tag]);
}

/* Pages of a map whose bytes are not in the client. Any thread. */
static inline uint64_t slot_map_swapped_pages(const struct slot_map *map)
{
	uint64_t pages = 0;

	for (int tag = 0; tag < SLOT_TAG_COUNT; tag++)
		if (slot_is_swapped((enum slot_tag)tag))
			pages += slot_map_count(map, (enum slot_tag)tag);
	return pages;
}

/* What is done with a copy that no slot names any more: frees the pool object or spill extent. */
typedef void (*slot_free_fn)(void *context, struct slot slot);

/* Take [offset, offset + bytes) of the state memfd, mapped at `base`. The descriptor stays the caller's, open until
 * slot_space_destroy(). Returns 0 or -ENOMEM. */
int slot_space_create(int memfd, uint64_t offset, void *base, uint64_t bytes, struct slot_space **ret_space);
/* The same memory, with what a dead daemon left in it: see Recovery. Returns 0 or -ENOMEM. */
int slot_space_open(int memfd, uint64_t offset, void *base, uint64_t bytes, struct slot_space **ret_space);
/* Take over one of its maps: all counts are made anew. Returns 0, -ENOMEM, or -EUCLEAN: it cannot be. */
int slot_space_adopt(struct slot_space *space, struct slot_map *map);
/* All maps are adopted; what they do not reach is free memory. Returns 0 or -ENOMEM. */
int slot_space_ready(struct slot_space *space);
void slot_space_destroy(struct slot_space *space);

/*
 * Then, before anything else: call claim(page, slot) for every slot of the map, those that are shared only
 * if they did not come up in another map before (INDIRECT ones as what they stand for). When a claim says
 * -EINVAL its slot becomes POISONED, if no other map has it; else, and after any other error, the walk ends and
 * returns it (-EUCLEAN for the former).
 */
typedef int (*slot_claim_fn)(void *context, uint64_t page, struct slot slot);
int slot_map_claim(struct slot_space *space, struct slot_map *map, slot_claim_fn claim, void *context);
/* All maps are claimed. */
void slot_space_claimed(struct slot_space *space);

/* Bytes of all clusters, shared slots and indexes; any thread. */
uint64_t slot_space_metadata_bytes(const struct slot_space *space);
/* INDIRECT pages whose shared slot is in a backend (the others are in the pool). */
uint64_t slot_space_shared_spill_pages(const struct slot_space *space);
/* Bytes of the clusters and the index of one map; any thread. */
uint64_t slot_map_metadata_bytes(const struct slot_map *map);

/* Has any page of this cluster a slot? */
bool slot_map_has(const struct slot_space *space, const struct slot_map *map, uint64_t cluster_number);

/* The slot of a page; NONE when it has none, or -ENOMEM when a shared cluster could not be unshared. */
int slot_get(struct slot_space *space, struct slot_map *map, uint64_t page, struct slot *ret_slot);
/* The same to look at only: a shared cluster stays shared, and its POOL or SPILL word may be relatives', too. */
struct slot slot_peek(struct slot_space *space, const struct slot_map *map, uint64_t page);

/*
 * Replace the slot of a page. The old copy is not freed: the caller has it and decides. Returns 0 or
 * -ENOMEM (nothing changed); never fails when the page has a slot already.
 */
int slot_set(struct slot_space *space, struct slot_map *map, uint64_t page, struct slot slot);

/* Read the counted slot behind an INDIRECT one. */
struct slot slot_shared_get(struct slot_space *space, uint64_t index);
/* Between these two no shared slot changes: its copy may be read. */
void slot_share_lock(struct slot_space *space);
void slot_share_unlock(struct slot_space *space);
/* As slot_shared_get, with the lock held. */
struct slot slot_shared_peek(struct slot_space *space, uint64_t index);
/* Drop one reference; frees the copy through `free_copy` when it was the last. */
void slot_shared_put(struct slot_space *space, uint64_t index, slot_free_fn free_copy,
		     void *context);
/*
 * A page of this map and one of another were found to be the same: the slot, POOL, SPILL or INDIRECT, becomes shared,
 * with one reference more, for the caller. Returns 0 and the index, or -ENOMEM (nothing changed).
 */
int slot_share(struct slot_space *space, struct slot_map *map, uint64_t page, uint64_t *ret_index);
/* Migration: replace `from` by `to` if the shared slot still is `from`. True when done. */
bool slot_shared_migrate(struct slot_space *space, uint64_t index, struct slot from,
			 struct slot to);

/* Called for every page with a slot in a range, ascending order within a cluster. */
typedef void (*slot_visit_fn)(void *context, uint64_t page, struct slot slot);

/* Forget all slots of [start, end) pages: visit(page, slot) is called for STAGED ones before they go;
 * copies are freed. Shared clusters wholly inside are given up without being unshared. */
void slot_map_clear(struct slot_space *space, struct slot_map *map, uint64_t start_page,
		    uint64_t end_page, slot_visit_fn staged, slot_free_fn free_copy, void *context);

/*
 * The same in little time, for most of a large range: what is wholly inside, was never shared, and has nothing STAGED is taken
 * out of the map and put in front of the list *list (0: none), which slot_clusters_free() gives back at leisure, without
 * the gate. The rest of the range stays, for slot_map_clear(). To a successor what is on a list is free.
 */
void slot_map_detach(struct slot_space *space, struct slot_map *map, uint64_t start_page, uint64_t end_page,
		     uint32_t *list);
/* Free up to `max` clusters of a list, and all copies that they name. Returns what is left of it. */
uint32_t slot_clusters_free(struct slot_space *space, uint32_t list, unsigned max, slot_free_fn free_copy, void *context);

/*
 * mremap: the slots of `pages` pages at `from` now belong to `to`, which has none: clear it first.
 * moved(page, slot) is called for STAGED ones with the new page. Returns 0 or -ENOMEM: then the pages not moved yet are lost to the
 * caller's care (poison).
 */
int slot_map_move(struct slot_space *space, struct slot_map *map, uint64_t from, uint64_t to,
		  uint64_t pages, slot_visit_fn moved, void *context);

/* fork: `child` (empty) gets the same pages. No slot of the parent may be STAGED. 0 or -ENOMEM. */
int slot_map_share(struct slot_space *space, struct slot_map *parent, struct slot_map *child);

/*
 * Walk clusters for writeback and checks: from cluster number *cursor of the index on, the first page
 * of the next cluster, or false at the end. The index must not grow meanwhile.
 */
bool slot_map_next(struct slot_space *space, const struct slot_map *map, uint64_t *cursor,
		   uint64_t *ret_first_page);

bool slot_map_is_valid(struct slot_space *space, const struct slot_map *map);
bool slot_space_is_valid(struct slot_space *space);

#endif
