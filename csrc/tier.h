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
 * Promotion   A page that a lone fault reads from a backend while one of a higher priority can be written to gives up its
 *             place there, when it is one of these: it went out fewer evictions ago than the limit of its group has pages (the
 *             ghosts of order.h know); or somebody waited for it there before, and since then for fewer others than that
 *             higher backend has pages (ghosts of such faults, TIER_GHOSTS of them in 4 MiB). So when it goes out again it is
 *             stored in the pool, and written back to the highest tier that has room. Its neighbours, which are read with it,
 *             stay. So does what a stream reads, and what is asked for at random all over more memory than the higher tier
 *             holds: they would displace each other. It takes no reading and no writing of its own.
 * Off         nothing of it is begun; a turn under way ends.
 */
#ifndef VSWAP_TIER_H
#define VSWAP_TIER_H

#include <stdbool.h>

#include "engine_internal.h"

#define TIER_GHOSTS (1ULL << 20)

/* A few segments of this backend go down, if that is to be. For its writer, with nothing held. False: it was not. */
bool tier_demote(struct engine *engine, unsigned number);

/* Does demotion keep room on this backend? Then copies of pages that come back may stay there however full it is: they are
 * the first that it gives up. */
bool tier_makes_room(struct engine *engine, unsigned number);

/* Is a page that somebody waited for, on this backend, to leave it? Nothing but the gate is held. */
bool tier_promotes(const struct client *client, uint64_t page, unsigned number);

#endif
