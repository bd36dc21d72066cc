/* SPDX-License-Identifier: MIT */
/*
 * fork — a client has forked: its child is a client, too, and shares the parent's slots by count.
 *
 * Order      the event is read, so the parent goes on, and the child begins. No fault of the child is answered before its client
 *            has all: slots, without those of memory that was wiped (MADV_WIPEONFORK), regions, protection (cow.h). Then it is
 *            LIVE in the state, and a successor has it like any other; before that, the fork's message is still there.
 * Failures   a child whose memory cannot be served is killed: what is out in the parent would read as zeros in it.
 * Locking    the parent's gate is held, and the child's from when there is one.
 */
#ifndef VSWAP_FORK_H
#define VSWAP_FORK_H

struct client;

/* A message said so: `child_fd` is the child's userfaultfd, and now the child's client's. */
void fork_apply(struct client *parent, int child_fd);

/* A child that gets no pages, for nobody knows what of its memory was wiped (client->wiped_unknown): it may say so itself by
 * now. Its gate is held. */
void fork_ask_child(struct client *child);

#endif
