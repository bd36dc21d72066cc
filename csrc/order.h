/* SPDX-License-Identifier: MIT */
/*
 * order — which of a client's resident pages go first.
 *
 * There are no access bits to look at: that a page is used is seen only when it faults. So pages that
 * came back are on probation first, a small queue, and are evicted from it in the order in which they came; they
 * keep their copy meanwhile, for they will mostly be evicted unchanged. What is not on probation is the
 * main part, evicted by the clock hand (evict.c), and only when probation is short. A page
 * that faults again soon after it was evicted has shown that it deserves better: it joins the main part, its
 * copy is given up. So a scan, or reads of cold pages, pass through probation and leave the main part
 * alone (the shape of 2Q and S3-FIFO).
 *
 * Soon         fewer pages of the group were evicted since than its main part holds: with that much more
 *              memory the page would have been there.
 * Ghosts       when pages were evicted: 4 bytes for each page of the group's limit, direct mapped,
 *              by a hash of client and page. Forgetting, or a wrong guess once in 2,048 times,
 *              costs time, nothing else. Relaxed atomics, no lock.
 * Probation    runs of pages, a ring in the client, under its gate. Entries are hints: whoever takes a page looks
 *              at its slot and its region.
 */
#ifndef VSWAP_ORDER_H
#define VSWAP_ORDER_H

#include <stdbool.h>
#include <stdint.h>

#include "limits.h"

struct ghosts {
	uint32_t *entries; /* hash tag and time; 0: none */
	uint64_t mask;
	uint64_t clock;    /* pages evicted, ever */
};

/* For a group of this limit. Takes memory only where it is used. 0 or -ENOMEM. */
int ghosts_create(struct ghosts *ghosts, uint64_t limit_bytes);
void ghosts_destroy(struct ghosts *ghosts);

void ghosts_note(struct ghosts *ghosts, unsigned client, uint64_t page);

/* Was the page evicted, and fewer than `pages` others since? */
bool ghosts_is_recent(const struct ghosts *ghosts, unsigned client, uint64_t page, uint64_t pages);

struct probation_run {
	uint64_t page;
	uint64_t count;
};

struct probation {
	struct probation_run *runs; /* PROBATION_RUNS_MAX of them, made at first use */
	unsigned first, count;
	uint64_t page_count;
};

/* Pages came back. The oldest run is forgotten when there are too many. */
void probation_push(struct probation *probation, uint64_t page, uint64_t count);

/* A run that was taken goes to the front again: it is the next. Not when there are too many. */
void probation_return(struct probation *probation, uint64_t page, uint64_t count);

/* The same pages in the same order for a forked child, whose own is empty. */
void probation_copy(const struct probation *probation, struct probation *child);

/* Are there more on probation than its part of this many resident pages? */
bool probation_is_full(const struct probation *probation, int64_t resident_pages);

/* The oldest run; false when there is none. */
bool probation_peek(const struct probation *probation, struct probation_run *ret_run);

/* The first `pages` pages of the oldest run are on probation no more. */
void probation_take(struct probation *probation, uint64_t pages);

void probation_clear(struct probation *probation);

#endif
