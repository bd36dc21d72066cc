/* SPDX-License-Identifier: MIT */
/*
 * pageout — all that a client has between two addresses is to go out, because somebody asked: `vswapctl pageout`,
 * vswapd.cold, the watchdog.
 *
 * Who asks waits. The evictors do it, all of them at once, in turns between what groups that are short want of them: they
 * share the client's hand, so each takes the next batch, and of one client a request waits for the one before. One alone is at it
 * where pages are shared with forked relatives, which have to be made the client's own before they can go, while nothing can go at
 * all, and where the agent is slow.
 *
 * Invariants  1 a request is in the list while its asker waits, and no longer
 *             2 an evictor that is at it is among its `users`; the asker leaves when there are none and it is over
 * Locking     `lock`; only that of work.h is taken under it
 */
#ifndef VSWAP_PAGEOUT_H
#define VSWAP_PAGEOUT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct client;
struct engine;
struct evictor;
struct pageout;

struct pageouts {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct pageout *first; /* whose turn is next */
	uint64_t asked;        /* so many until now */
};

void pageouts_init(struct pageouts *pageouts);

/* Evict everything evictable of one client between two addresses, once; some pages behind `end` may be among them. 0 when
 * that is done, or the client or its agent is gone; -ETIMEDOUT, most often for want of room. The caller has a reference. */
int pageout_range(struct client *client, uint64_t start, uint64_t end, int timeout_ms);

/* For an evictor: a turn at what was asked for. False: there is nothing. */
bool pageout_turn(struct engine *engine, struct evictor *evictor);

#endif
