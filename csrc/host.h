/* SPDX-License-Identifier: MIT */
/*
 * host — the groups give memory up, below their limits, while the host has too little left.
 *
 * Limits are promises to programs, not to the machine: together they may be more than it has, and others live on it,
 * too. So a thread looks at what is available (available.h), of the machine and of the memory cgroups with a limit
 * that the daemon is in: nothing else tells soon enough, as the pools are locked. Below the reserve groups are
 * *pressed* until there is a margin above it: a pressed group has a lower limit for a while (group.h:
 * host_limit_bytes), and the evictors and writers do the rest, as under any limit, oldest first; what is in its pool
 * goes to backends at once. Then limits rise again, no faster than the host has room, until they are what they were.
 *
 * Who gives    The group that has most above its floor, down to what the next one has, then both, and so on: small
 *              ones keep all they have while a large one can give. No group below FLOOR_PART of its limit, which is
 *              some use to a program that is swapping anyway. One that faults back half of what is taken is hot: it
 *              gives only what no other can, and slowly, and what it gave others give in its place. One that has no
 *              backend with room and does not compress would burn CPU for nothing: it gives nothing. Nor does one from
 *              which nothing comes (group_relieve).
 * Steps        STEP_BYTES each TICK_MS: no more than evictors can follow, so that its programs hardly wait. A fault of
 *              a pressed group may go beyond the lower limit by a step and a sixteenth of the limit: only what grows
 *              faster than eviction waits. Nobody is killed for it: out of memory is a matter of the group's own
 *              limit.
 * Cgroup       In the daemon's own cgroup there are the pools, and the programs only if they were started inside of
 *              it. Of groups whose programs were not, the pool alone is brought down: evicting would fill what is
 *              short.
 * No shortage  a read of /proc/meminfo, and of two files for each cgroup, once a second; more often the nearer, by
 *              engine_fill_bytes_per_ms().
 * Crash order  Nothing of this is in the state: a successor has the groups' own limits, and looks within a tick.
 * Threads      one of its own, without the GIL; reserve and cgroups are set under the host's lock. Takes the registry
 *              lock.
 */
#ifndef VSWAP_HOST_H
#define VSWAP_HOST_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "limits.h"

#define HOST_CGROUPS_MAX 16 /* a cgroup and those above it */

struct host_cgroup {
	char *directory, *path;
	unsigned version;
};

/* The thread's own, but where it says otherwise. */
struct host {
	pthread_t thread;
	pthread_mutex_t lock; /* of the next three */
	uint64_t reserve_bytes; /* as engine_set_host_reserve; 0: never */
	struct host_cgroup cgroups[HOST_CGROUPS_MAX];
	unsigned cgroup_count;

	bool is_reclaiming;      /* from below the reserve until above the margin */
	bool is_short;           /* as it was told: until SHORT_NS after the last time it was reclaiming */
	uint64_t since_ns, reclaiming_ns, window_ns;
	bool is_outside[GROUPS_MAX]; /* of the place that is short, */
	int outside_place;           /* which is this one, */
	uint64_t outside_ns;         /* as was found out then */
	uint64_t reclaimed_before; /* reclaimed_pages when it began */

	/* For engine_statistics: of the place that is nearest to its reserve. */
	uint64_t available_bytes, available_reserve_bytes;
	uint64_t shortages, reclaimed_pages, written_pages;
};

struct engine;
struct group;

/* Would what is moved out of its programs take as much room in its pool, and stay there? Any thread, any lock. */
bool host_is_useless(struct engine *engine, const struct group *group);

void host_create(struct host *host);
void host_destroy(struct host *host);
void *host_thread_main(void *engine);

#endif
