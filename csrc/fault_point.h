/* SPDX-License-Identifier: MIT */
/*
 * fault_point — make the n-th call of a named operation fail, or come late, for tests.
 *
 * fault_point("io/read") stands beside a system call that can fail and gives 0, or the errno to be
 * simulated in its stead. Without -DVSWAP_FAULT_POINTS it is the constant 0 and leaves no code. A call that is
 * late has made its decision: what it was decided by may change meanwhile, where nothing forbids it.
 *
 * Names       io/submit, io/read, io/write: io.c, io_threads.c
 *             evict/post: evict.c, before a MOVE is posted; only to be late
 *             fill/open: fill_open.c, before a run is expanded; only to be late
 *             look/register: look.c, before a region is registered; only to be late
 *             spill/allocate, spill/punch: spill.c; seal/encrypt, seal/decrypt: seal.c
 *             pool/grow: pool.c; client/create: client.c; fault/read: fault.c; block/map: block_cache.c
 *             sys/...: one for each kind of call in sys.c
 * Threads     any; calls of one name are counted over all threads.
 */
#ifndef VSWAP_FAULT_POINT_H
#define VSWAP_FAULT_POINT_H

#include <stdbool.h>
#include <stdint.h>

#define FAULT_POINTS_MAX 32

#ifdef VSWAP_FAULT_POINTS

int fault_point(const char *name);

/*
 * Fail the at_call_n-th call from now (1: the next) with errno_value, and if `persistent` all later
 * ones too. Replaces what was set for `name`, which must be a literal. errno_value 0 only counts.
 */
void fault_point_set(const char *name, uint64_t at_call_n, int errno_value, bool persistent);

/* Have that call, or all from it on, be late by so much; beside what fault_point_set says. */
void fault_point_delay(const char *name, uint64_t at_call_n, unsigned delay_ms, bool persistent);

/* Calls since fault_point_set; how many of them were made to fail. */
uint64_t fault_point_calls(const char *name);
uint64_t fault_point_hits(const char *name);

void fault_point_clear(void);

#else

static inline int fault_point(const char *name)
{
	(void)name;
	return 0;
}

#endif
#endif
