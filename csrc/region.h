/* SPDX-License-Identifier: MIT */
/*
 * region — a file of memory: a page map as a client's, and no process.
 *
 * A region is a client (client.h) in a group made with ENGINE_GROUP_REGIONS: so the writer, drains, recovery and
 * statistics treat its pages as any others. It has no userfaultfd, no agent and no threads; all of its pages are out,
 * all the time, and what is resident of it is the page cache of the file system that shows it (vswapd/fs.py).
 *
 * Page       its page number is its place in the file. NONE: reads as zeros; a page of zeros is stored as that, so it
 *            costs nothing. SAME, POOL, SPILL: as anywhere. POISONED: what was to be stored there found no room.
 * Locking    region_lock outside of the gate. Writers of whole pages share it; who writes a part of a page (and
 *            so reads it before) or changes the size has it alone. Reads take the gate only.
 * Invariants 1 no page beyond the size has a slot
 *            2 what follows the size in its page is nobody's: whatever grows the region zeroes it first
 * Crash order A page is its old or its new slot, the size its old or its new one: each is one store. A write that grows
 *            the region stores pages before the size, a truncation the size before it frees pages: either way a successor
 *            frees what is beyond the size (region_recover). An unlinked region is freed by it.
 */
#ifndef VSWAP_REGION_H
#define VSWAP_REGION_H

#include "client.h"

/* In a successor (with the caller's reference, which it takes over), once all slots are claimed: make the invariants true. */
void region_recover(struct client *client);

/* Of all scratch memory of reads and writes. */
void region_scratch_destroy(struct engine *engine);

#endif
