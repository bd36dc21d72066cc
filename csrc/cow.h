/* SPDX-License-Identifier: MIT */
/*
 * cow — memory that forked relatives share: counted once, and not copied beyond the limit.
 *
 * Counting    a page shared with relatives counts in parts, what the kernel calls Pss: the resident pages of a client
 *             that has relatives are Pss, read now and then (it costs a walk over the page table), and as much more
 *             as statm and the faults below have shown since. After a fork nothing need be read: what is shared counts
 *             with the parent. Nor where all relatives have ended, who are known (a family): all that is there is its own.
 * Copying     a write to a page that is shared and present allocates, and nothing is missing then: no fault of ours,
 *             as fast as memory can be copied. So where there is no room for copies of all that is shared, what is
 *             present is write-protected: each such write is a fault then (fill.c), charged and made to
 *             wait like any other. A fork shares anew what was copied before, and a child has its parent's protection: what the
 *             page table says is not protected is protected again, in both.
 * No more     once nothing is shared any longer all is unprotected, in one walk over the page table. Who forks once forks again:
 *             that waits for some time, or until the faults of writes meanwhile have taken as long.
 * Locking     cow_look and cow_is_due are the look thread's, without the gate; cow_is_alone is anybody's, and cow_forget that of who
 *             has the last reference. The others are called with the gate held, or both gates.
 */
#ifndef VSWAP_COW_H
#define VSWAP_COW_H

#include <stdbool.h>
#include <stdint.h>

struct client;

/* What the client's resident pages count, if its address space has `resident` of them (statm). The look thread. */
void cow_look(struct client *client, uint64_t resident);
/* Whether cow_adapt has something to do. */
bool cow_is_due(const struct client *client);
/* Protect, or end it. */
void cow_adapt(struct client *client);

/* That is registered from now on: some of it may have been shared before. */
void cow_note_registered(struct client *client, uint64_t start, uint64_t end);

/* One has forked the other, whose regions are known. */
void cow_note_fork(struct client *parent, struct client *child);
/* It has ended: whoever is left of its family may be alone. */
void cow_note_end(struct client *client);
/* It is freed. */
void cow_forget(struct client *client);
/* Whether nothing of it is shared. */
bool cow_is_alone(const struct client *client);
/* Writes to `count` pages from `page` on are let through, and were charged. */
void cow_note_copied(struct client *client, uint64_t count);
/* They are to be copied anyway: without a fault. */
void cow_let_through(struct client *client, uint64_t page, uint64_t count);

#endif
