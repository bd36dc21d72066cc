/* SPDX-License-Identifier: MIT */
/*
 * pool — compressed pages in RAM.
 *
 * A pool_space is one memfd cut into slabs of POOL_SLAB_BYTES; each group has a pool, which owns
 * slabs and cuts each into objects of one size class (see POOL_CLASSES). Objects are opaque bytes;
 * an object is named by its handle: offset in the memfd / POOL_UNIT_BYTES. There is no object
 * header and no back link: owners are found by walking the slot table, which is 14 bytes a page and
 * therefore cheap to walk (see slot_table.h), so an object costs its bytes and nothing else. A free
 * object holds the link to the next one; a slab has a header of 16 bytes outside the memfd.
 *
 * States of a slab  FREE (not in any pool; its memory is given back to the system, but for a small
 *                   reserve), PARTIAL, FULL, EVACUATING (no new objects; being emptied)
 * Invariants        1 the handle of a live object is within a slab of its class and its pool
 *                   2 slab.used == number of live objects == capacity - length of its free list
 *                   3 a slab of a pool is on exactly one list: PARTIAL in its class by fullness,
 *                     FULL and EVACUATING on one list each; none is empty
 *                   4 pool.bytes == slabs of the pool * POOL_SLAB_BYTES
 *                   5 pool.object_bytes == sum over live objects of class units * 64
 *                   pool_is_valid() checks 2-5, pool_free and pool_adopt check 1.
 * Memory            slab memory is populated (MADV_POPULATE_WRITE) before use, so that a shortage
 *                   is an error here and never a SIGBUS later; a freed slab beyond the reserve is
 *                   punched out of the memfd.
 * Locking           one mutex per pool, innermost: nothing is called under it. Slabs are handed out
 *                   and taken back under the space's mutex, without the pool's; memory is populated
 *                   and punched under neither. pool_is_evacuating and pool_object take no lock.
 * Recovery          slab headers and free lists live outside the memfd and are rebuilt: a
 *                   successor calls pool_adopt() for every object the slot table names. This phase
 *                   ends for all pools of the space with pool_space_adopt_end(), or with the first
 *                   call that stores, frees, evacuates, validates or destroys a pool; slabs that
 *                   nobody adopted lose their memory then. Ending a pool (pool_destroy) punches its
 *                   slabs; to leave them to a successor, exit without it.
 */
#ifndef VSWAP_POOL_H
#define VSWAP_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "limits.h"

/*
 * Size classes: even units up to 32, then the largest size of which 31, 30, .. 16 fit into a slab.
 * Above 32 units nothing is lost to rounding up, for between two such sizes the slab's tail would
 * be the loss; odd sizes below would save 0.5 % of a large pool, and cost a half-empty slab each in
 * a small one.
 */
#define POOL_CLASSES 32

struct pool_space;
struct pool;

struct pool_statistics {
	uint64_t bytes;          /* RAM held: slabs of the pool, whole */
	uint64_t object_bytes;   /* in live objects, rounded up to their classes */
	uint64_t object_count;
	uint64_t slab_count;
	uint64_t metadata_bytes; /* slab headers and struct pool; free lists cost nothing */
};

/*
 * Take over a memfd (owned by the caller, kept open while the space lives): its content is kept,
 * and it is made capacity_bytes long if it is shorter. Returns 0 or -errno.
 */
int pool_space_create(int memfd, uint64_t capacity_bytes, struct pool_space **ret_space);
void pool_space_destroy(struct pool_space *space); /* all pools must be gone */

/* Returns 0, -ENOMEM, or -ENOSPC when the space has GROUPS_MAX pools. */
int pool_create(struct pool_space *space, struct pool **ret_pool);
void pool_destroy(struct pool *pool); /* gives all its slabs back, live objects or not; NULL ok */

/*
 * Store an object of `units` units. Returns 0 and its handle, -ENOSPC when the space is exhausted,
 * -ENOMEM when the system has no memory for a slab. Copies `object`.
 */
int pool_store(struct pool *pool, const void *object, unsigned units, uint64_t *ret_handle);

/* Bytes of a live object; valid until pool_free of it. No lock is taken. */
const void *pool_object(const struct pool_space *space, uint64_t handle);

/* Free an object; `units` as it was stored. */
void pool_free(struct pool *pool, uint64_t handle, unsigned units);

/* What an object of this size takes: it is rounded up to its class. */
unsigned pool_object_bytes(unsigned units);

/* How many bytes would RAM use grow if an object of this size were stored now: 0, or a slab. */
uint64_t pool_growth_bytes(struct pool *pool, unsigned units);

/*
 * Compaction. pool_evacuate marks the emptiest slabs EVACUATING, as many as would free at least
 * `bytes` if their objects were moved elsewhere in the pool, but none whose objects would need a
 * new slab; returns how many. The caller then walks the slot table, and for every object for which
 * pool_is_evacuating() is true stores a copy, updates the slot and frees the old one.
 * pool_evacuate_end makes what is left PARTIAL again.
 */
unsigned pool_evacuate(struct pool *pool, uint64_t bytes);
bool pool_is_evacuating(const struct pool *pool, uint64_t handle);
void pool_evacuate_end(struct pool *pool);

/*
 * Recovery: this object is live. Call for each, in all pools, before any store (see Recovery).
 * Returns 0, -EINVAL (overlap, wrong class, another pool's slab, outside the memfd, or too late:
 * nothing is changed) or -ENOMEM (for the tables).
 */
int pool_adopt(struct pool *pool, uint64_t handle, unsigned units);

/* All live objects are adopted: gives back the memory of all other slabs. May be called again. */
void pool_space_adopt_end(struct pool_space *space);

/* RAM that it takes now, whole slabs. No lock is taken. */
uint64_t pool_bytes(const struct pool *pool);

/* What live objects take of it, rounded up to their classes. No lock is taken. */
uint64_t pool_live_bytes(const struct pool *pool);

void pool_statistics(struct pool *pool, struct pool_statistics *ret_statistics);
bool pool_is_valid(struct pool *pool);

#endif
