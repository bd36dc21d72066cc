/* SPDX-License-Identifier: MIT */
/*
 * limits — every bound of the data plane, related to each other by static_assert.
 *
 * A number that bounds a loop, a queue or a table lives here and nowhere else. Units are in the
 * names. Defaults that a user may change are in vswapd/config.py, not here.
 */
#ifndef VSWAP_LIMITS_H
#define VSWAP_LIMITS_H

#include <assert.h>

#define PAGE_SHIFT 12
#define PAGE_BYTES 4096UL

/* A cluster is 128 pages of one client's address space, aligned: the unit in which slots are allocated,
 * shared and written back. */
#define CLUSTER_SHIFT 7
#define CLUSTER_PAGES 128UL

/* Highest user page number of a 47-bit address space. */
#define ADDRESS_PAGES_MAX (1ULL << (47 - PAGE_SHIFT))

#define GROUPS_MAX 1024
#define CLIENTS_MAX 4096
#define DESCRIPTORS_RESERVED_MAX 4096 /* for forked children, about ten each; at most a quarter of all */
#define BACKENDS_MAX 15 /* 4 bits of a slot word; the value 15 is reserved */

#define REGIONS_MAX 65536    /* registered ranges of one client */
/* Ranges that one checkpoint of a client holds: with the rest of it, whole pages. */
#define CHECKPOINT_RANGES_MAX 130847
#define QUARANTINE_MAX 1024  /* removed ranges not yet requalified, of one client */
#define REMAPS_MAX 32         /* mremaps of one client that wait for an older event */
#define STREAMS_MAX 8        /* fault streams watched in one client */
#define PROBATION_RUNS_MAX 8192 /* runs of pages of one client that came back and may go first */
#define PROBATION_PAGES_MAX 4096UL
#define MESSAGES_MAX 64      /* userfaultfd messages read at once */
#define DEFERRED_MAX 256     /* faults of one client waiting for room or for a device */
#define FILL_PAGES_MAX 128   /* pages given back by one fault */
#define FILL_RANGES_MAX 32   /* ranges of backends that are read for it */
#define BATCH_PAGES_MAX 64   /* pages moved out under one closing of the gate */

/* Pool: objects are multiples of a unit, cut from slabs of one size class. */
#define POOL_UNIT_SHIFT 6
#define POOL_UNIT_BYTES 64UL
#define POOL_UNITS_MAX 64 /* an object of 64 units is a page stored raw */
#define POOL_SLAB_BYTES 65536UL

/* Spill: extents are multiples of the pool's unit, packed into segments. */
#define SEGMENT_BYTES (1UL << 20)
#define SEGMENTS_MAX (1UL << 24) /* 16 TiB of one backend */

static_assert(CLUSTER_PAGES == 1UL << CLUSTER_SHIFT, "cluster is a power of two");
static_assert(BATCH_PAGES_MAX <= 64, "a batch is described by 64-bit masks");
static_assert(POOL_UNIT_BYTES * POOL_UNITS_MAX == PAGE_BYTES, "raw object is one page");
static_assert(POOL_SLAB_BYTES % PAGE_BYTES == 0, "slabs are whole pages");
static_assert(SEGMENT_BYTES % PAGE_BYTES == 0, "segments are whole pages");
static_assert(FILL_PAGES_MAX >= 1 && FILL_RANGES_MAX < 255, "a byte names the range of a page");

#endif
