/* SPDX-License-Identifier: MIT */
/*
 * group — one budget: what the processes that share it may cost in RAM, and what they do cost.
 *
 * usage = resident (managed clients) + unmanaged + pool + metadata      (all of it in bytes)
 *
 * Resident pages are counted by every fill and release between two looks, and set to what the kernel
 * says at each look (look.c), so an error never lives longer than a look.
 *
 * Marks, distances below the limit:
 *   register_bytes   usage closer than this: regions are registered, first touches come to us
 *   reserve_bytes    usage closer than this: evictors run until there is twice as much room; more while
 *                    clients grow by writing to what they share with forked relatives
 * A fill is refused (group_charge false) when it would pass the limit: the fault waits for room.
 *
 * A group that is pressed, as the host is short (host.h), has a lower limit for a while. Evictors keep to that, and
 * writers empty its pool; a fill may go beyond it by a step of those and GROUP_HOST_SLACK_PART of the limit, so that only
 * what grows faster than eviction waits.
 *
 * Locking   counters are atomics; the list of clients is protected by the engine's registry lock.
 */
#ifndef VSWAP_GROUP_H
#define VSWAP_GROUP_H

#include <stdbool.h>
#include <stdint.h>

#include "order.h"
#include "pool.h"

#define GROUP_HOST_STEP_BYTES (64ULL << 20)
#define GROUP_HOST_SLACK_PART 16
#define GROUP_HOST_HOLD_NS 30000000000ULL /* so long one from which nothing came gives nothing */

struct members;

struct group {
	int number;
	char name[32];
	uint32_t flags;
	uint64_t limit_bytes;
	uint64_t pool_limit_bytes; /* 0: no limit of its own */
	uint64_t spill_limit_bytes; /* of spill_bytes; 0: none */
	struct pool *pool;
	struct ghosts ghosts;

	int64_t resident_pages;    /* sum over clients */
	int64_t growth_pages;      /* what they are expected to grow by until the next look, unseen */
	uint64_t unmanaged_bytes;
	uint32_t pool_percent;     /* mean size of its objects, percent of a page */
	int64_t metadata_bytes;
	int64_t spill_bytes;       /* in live extents that its clients' slots name */
	uint64_t usage_bytes_max;
	uint64_t swapped_pages_max;
	uint64_t faults;

	struct members *members;   /* NULL: its clients alone; registry lock */
	uint32_t client_count;     /* registry lock */
	uint32_t users;            /* whoever is at work on it, and its clients until they are freed; registry lock */
	uint32_t unregistered;     /* clients whose memory is not registered yet, at the last look */
	int64_t looked_room_bytes; /* room at the end of the last look, */
	uint64_t looked_ns;        /* and when that was */
	uint64_t shared_bytes_told; /* of a client's shared memory, when that was told of; the look thread */
	uint32_t parked;           /* clients with a parked batch */
	uint32_t waiting;          /* clients with faults that wait for room */
	uint64_t progress;         /* pages released or objects written back, ever */
	uint64_t progress_seen;    /* of it, at the end of the last turn of an evictor */
	uint64_t stuck_since_ns;   /* reclaim finds nothing since then; 0: it does */
	uint64_t evicted_pages, written_pages, refilled_pages; /* ever: moved out, written back, given back from where they were */
	uint64_t host_limit_bytes; /* pressed: instead of its limit; 0: not */
	uint64_t host_pool_bytes;  /* pressed: of its pool; 0: not */
	uint64_t host_hold_ns;     /* not to be pressed before */
	uint64_t host_stuck_since_ns; /* pressed, and evictors find nothing since then; 0: they do */
	/* host.c: the counters above, at its last look and at the begin of its window, and until when the group is hot. */
	uint64_t host_evicted, host_written, host_window_evicted, host_window_refilled, host_hot_ns;
	uint32_t segments_under_way; /* that writers fill and write for it; registry lock */
	bool writes_back;          /* its pool is being brought below the accept threshold */
	/* Of readings of Pss (cow.c); the look thread's. A round is one reading of each client that has relatives. */
	uint64_t pss_round;
	uint64_t pss_costs_ns; /* what the last readings of all clients took */
	uint64_t pss_round_ns, pss_round_before_ns; /* what this round took so far, and the one before */
	bool kept_exhausted;       /* the last evictor at the cap found no kept copy to give up */
	uint64_t recompress_marks[2]; /* ghosts.clock half an age ago or more, and later (recompress.c) */
	uint64_t recompress_mark_ns;  /* when the later one was */
	uint32_t stream_percent;   /* recent faults that were part of a stream, smoothed, 0..100 */
};

uint64_t group_usage_bytes(const struct group *group);

/* Room below the limit, which is a lower one while the group is pressed; negative when over it. */
int64_t group_room_bytes(const struct group *group);
/* The same for what comes back or is new. */
int64_t group_charge_room_bytes(const struct group *group);

/* Is it to take less, for the host's sake? */
bool group_is_pressed(const struct group *group);
/* ... and does it have more than that? */
bool group_is_to_give(const struct group *group);
/* Is that all the reason to take something from it: its own limit has room? */
bool group_has_own_room(const struct group *group);
/* It has its limit back. */
void group_lift(struct group *group);
/* It was pressed, and nothing came: not for a while again. */
void group_relieve(struct group *group, uint64_t now_ns);

/* Account `pages` pages that are about to become resident. False when they do not fit. */
bool group_charge(struct group *group, uint64_t pages);
/* The same beyond the limit: for the few pages without which no room could be made. */
void group_charge_anyway(struct group *group, uint64_t pages);
void group_uncharge(struct group *group, uint64_t pages);

/*
 * Below this much room its clients' memory is registered. They are registered one after the other, and meanwhile those
 * that are not fill unseen: the more of them, the earlier.
 */
uint64_t group_register_bytes(const struct group *group);
uint64_t group_reserve_bytes(const struct group *group);
/* Room for so many reserves; below its own limit also for what its clients are expected to grow by unseen. */
bool group_has_room(const struct group *group, unsigned reserves);

/*
 * RAM that the pool may take: most of the limit for pages that compress well, little for pages that do
 * not, since a raw page in the pool takes as much as a resident one and costs a fault.
 */
uint64_t group_pool_cap_bytes(const struct group *group);

/*
 * What counts against that cap: what is in use of the pool's slabs, and a quarter more. Slabs that are emptier than that are given back
 * by evacuation (evacuate.h), and writing more to a disk would not have them back any sooner. Under a limit of the pool's own:
 * its slabs, whole.
 */
uint64_t group_pool_taken_bytes(const struct group *group);

/* Objects came or went: note their mean size, and the most that was used. */
void group_pool_changed(struct group *group);
/* So many units more, or less, are its own in backends. */
void group_spill_changed(struct group *group, int units);

/* What may still be written to backends. */
uint64_t group_spill_room_bytes(const struct group *group);
/* May copies of resident pages stay on backends? Not when they would take the room of what is to be written. */
bool group_keeps_spilled_copies(const struct group *group);

/* Are its faults mostly scans? Then copies are worth keeping; under random access they only take memory from
 * resident pages. */
bool group_is_streaming(const struct group *group);

/* At the cap, do kept copies go before anything is written to a backend? Not under a limit of the pool's own:
 * what a copy leaves behind in its slab is not room below that. */
bool group_gives_up_copies(const struct group *group);

/* Keep the copies of pages on probation, or is the pool at its cap? */
bool group_keeps_copies(const struct group *group);
/* One more fault, part of a stream or not. */
void group_note_stream(struct group *group, bool streaming);

#endif
