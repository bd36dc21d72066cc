/* SPDX-License-Identifier: MIT */
/*
 * remap — mremap and munmap events, applied in the order in which the mappings changed.
 *
 * The kernel changes the mappings first and queues the event afterwards, without the lock. So events
 * of two threads can be read in the wrong order, for programs that do nothing wrong: thread 1
 * unmaps (or moves away) X; the kernel gives the address to thread 2, which moves B there; REMAP B -> X
 * is read before UNMAP X, or before REMAP X -> Y. Applied as read, UNMAP X would drop B's slots, and
 * B -> X would take Y's. (Found by churn with three threads; see docs/decisions.)
 *
 * `armed` is what we hold to be registered: made by REGISTER, given up by UNMAP. An address that is
 * armed has not been vacated by an event yet. So:
 *   REMAP A -> B  detaches A's slots. B not armed: they are attached to B, which is now armed. B still
 *                 armed: they wait, until the event that vacates B has been read.
 *   UNMAP X       X armed: its slots are dropped, X is vacated, waiting slots are attached. X not
 *                 armed: what waits for X is dropped.
 * A move's source is vacated by the UNMAP that follows its REMAP (none after MREMAP_DONTUNMAP, where it
 * stays registered). Fills meanwhile are safe: the kernel refuses them (EAGAIN) while the vacating
 * event is unread.
 *
 * Detached slots live in the same map, at page numbers that no address space has.
 * All functions: the gate is held.
 */
#ifndef VSWAP_REMAP_H
#define VSWAP_REMAP_H

#include "client.h"

void remap_unmap(struct client *client, uint64_t start, uint64_t end);
void remap_move(struct client *client, uint64_t from, uint64_t to, uint64_t bytes);
void remap_armed(struct client *client, uint64_t start, uint64_t end);
/* It is registered no more, and there was no event: its slots are gone already. */
void remap_disarmed(struct client *client, uint64_t start, uint64_t end);
/* Nothing of it may be evicted. */
void remap_withdraw(struct client *client, uint64_t start, uint64_t end);

/* True when slots wait for this page's address. */
bool remap_is_waiting(const struct client *client, uint64_t page);

/* Nothing is unread any more: whoever still waits was waiting for nothing. */
void remap_settle(struct client *client);

#endif
