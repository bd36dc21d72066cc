/* SPDX-License-Identifier: MIT */
/*
 * evacuate — a pool gives back the slabs that its objects do not need.
 *
 * Objects of one slab were stored one after the other, and are freed in any order: when many leave at once, to a disk or
 * with memory that is freed, what stays is scattered over slabs that are half empty. A quarter of a pool at least, and
 * EVACUATE_BYTES_MIN, is emptied into the rest of it: pool_evacuate (pool.h) chooses the slabs, a walk over the slots of the
 * group's clients moves what is in them. The thread of recompress.c does it, while the group uses most of its limit: else nobody needs the room.
 *
 * Life of one move, all of it under the gate of its client: the object is copied to another slab, its slot names the copy, in
 * one store, and the old one is freed. A daemon that dies in between leaves the slot naming one of the two, both whole.
 * What is on its way out (the copy behind a STAGED page), or of a client whose gate is shut, stays where it is.
 *
 * Locking     a gate for a few clusters and moves, else nothing. The caller holds the group by `users`; clients by reference.
 */
#ifndef VSWAP_EVACUATE_H
#define VSWAP_EVACUATE_H

#include "engine_internal.h"

#define EVACUATE_BYTES_MIN (2ULL << 20)

/* Where that is worth it. For a thread in the background: it rests as often as it has worked for a millisecond. */
void evacuate_pool(struct engine *engine, struct group *group);

#endif
