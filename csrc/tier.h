/* SPDX-License-Identifier: MIT */
/*
 * tier — pages move between backends of different priority by themselves: what is cold down, what is used up.
 *
 * A tier is the backends of one priority; the pool is above all of them. The control plane switches all of this on and off
 * at any time (engine_set_tiering); off is how it begins. Clients take no part in it.
 *
 * Demotion    A backend with less than 1/16 of its segments free, below which one of a lower priority can be written to, is
 *             brought to 1/8. Its writer (writeback.c) does that, DEMOTE_SEGMENTS at a time between the segments that it
 *             writes: so writing to it goes on, and demotion is bounded by what is written. A hand goes around in
 *             device order; as the lowest free segment is always filled first, what it meets was written longest ago. What is in a
 *             segment moves as by swapoff (drain.c has the states, the locks, and what a death leaves): an object goes to the
 *             backend below as it is; a copy of a page that is resident is given up, for it was needed since.
 *             What an encrypted backend holds goes to an encrypted one only.
 * Promotion   A page that a lone fault reads from a backend, fewer evictions after it went out than the limit of its group has
 *             pages (the ghosts of order.h know), gives up its place there, while a backend of a higher priority can
 *             be written to. So when it goes out again it is stored in the pool, and written back to the highest tier that
 *             has room. Its neighbours, which are read with it, stay. So does what a stream reads, and what is asked for at
 *             random all over the memory: they would displace each other. It takes no reading and no writing of its own.
 * Off         nothing of it is begun; a turn under way ends.
 */
#ifndef VSWAP_TIER_H
#define VSWAP_TIER_H

#include <stdbool.h>

#include "engine_internal.h"

/* A few segments of this backend go down, if that is to be. For its writer, with nothing held. False: it was not. */
bool tier_demote(struct engine *engine, unsigned number);

/* Is a page that somebody waited for, on this backend, to leave it? Nothing but the gate is held. */
bool tier_promotes(const struct client *client, uint64_t page, unsigned number);

#endif
