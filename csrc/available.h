/* SPDX-License-Identifier: MIT */
/*
 * available — how much memory can still be had, of the machine and of a memory cgroup.
 *
 * What the kernel can drop at once, its caches of files, counts as available: MemAvailable of /proc/meminfo says so
 * for the machine; of a cgroup it is what its limit leaves, and the caches charged to it, those in use to a half.
 * Versions 1 and 2 of cgroups are told apart by their files. Limits may come and go at any time, so nothing is
 * remembered.
 *
 * Threads     any; nothing is shared.
 */
#ifndef VSWAP_AVAILABLE_H
#define VSWAP_AVAILABLE_H

#include <stdbool.h>
#include <stdint.h>

struct available {
	uint64_t total_bytes; /* RAM, or the limit */
	uint64_t bytes;
};

/* By a file like /proc/meminfo. 0 or -errno. */
int available_of_machine(const char *path, struct available *ret_available);

/* Of the cgroup with this directory, all below it included. 0; -ENODATA: it has no limit; or -errno. */
int available_of_cgroup(const char *directory, struct available *ret_available);

/* Does a text like /proc/PID/cgroup name this group, or one below it, in the hierarchy of this version (1, 2)? */
bool available_is_member(const char *text, unsigned version, const char *group);

/* What of `total_bytes` is to stay available: as wanted, or if that is ENGINE_HOST_RESERVE_AUTO a small part. */
uint64_t available_reserve(uint64_t wanted_bytes, uint64_t total_bytes);

#endif
