/* SPDX-License-Identifier: MIT */
/*
 * spill — compressed pages on disk.
 *
 * A backend is one file or block device, cut into segments of SEGMENT_BYTES. A segment is filled in
 * memory, written once, whole and sequentially (O_DIRECT), and read in extents. Objects keep the
 * form they had in the pool (codec.h); an extent is an object's place: offset in the backend in
 * units of 64 bytes. Extents are freed one by one; a segment without live extents is punched
 * (file) or discarded (device), then free again.
 *
 * Segment format (byte offsets, little endian)
 *     0  u64  magic "VSWPSEG1"
 *     8  u64  generation: one more for every segment ever written by this backend
 *    16  u32  extent count
 *    20  u32  bytes used, header included
 *    24  u64  XXH3-64 of the header and table with this field zero
 *    32  u64  backend identity (random, same in all segments)
 *    40       zero up to 64
 *    64  count * { u64 owner; u32 unit offset in the segment; u16 units; u16 reserved }
 *    then, at the next multiple of 64, the objects, each at a multiple of 64
 * `owner` is opaque to this file (the slot table's name of the page); it lets a drain and an offline
 * check know whose extent it is.
 *
 * Segment states  FREE, FILLING (in memory, one per writer), WRITING, LIVE, QUARANTINED (a write of
 *                 a dead daemon may still land), DRAINING (LIVE, being emptied)
 * Invariants      1 an extent of a LIVE segment lies wholly inside its used bytes
 *                 2 live_units of a segment == sum over its live extents; a segment with none is FREE
 *                 3 nothing is written to a segment that is not FREE before it becomes FILLING
 *                 4 backend.used_bytes == segments not FREE * SEGMENT_BYTES
 * Locking         one mutex per backend, innermost; never held across a system call.
 */
#ifndef VSWAP_SPILL_H
#define VSWAP_SPILL_H

#include <stdbool.h>
#include <stdint.h>

#include "limits.h"

struct spill; /* one backend */

struct spill_statistics {
	uint64_t size_bytes;       /* capacity: whole segments */
	uint64_t used_bytes;       /* segments not FREE, whole */
	uint64_t live_bytes;       /* in live extents */
	uint64_t extent_count;     /* live extents */
	uint64_t written_bytes;    /* ever written */
	uint64_t read_bytes;       /* ever read */
	uint64_t write_errors;
	uint64_t read_errors;
	uint64_t metadata_bytes;   /* RAM for segment tables */
};

/*
 * Open a backend on descriptor `fd` (regular file or block device; ownership passes). The file is
 * grown lazily up to size_bytes. O_DIRECT is used when the descriptor has it and the file system
 * takes it. Returns 0 or -errno: -EINVAL when smaller than one segment.
 */
int spill_create(int fd, uint64_t size_bytes, struct spill **ret_spill);
void spill_destroy(struct spill *spill); /* closes the descriptor; no I/O may be in flight; NULL ok */

/* ---- writing: one writer fills a segment, then writes it ---- */

struct spill_segment; /* a FILLING segment, owned by one thread */

/* 0, or -ENOSPC when no segment is free. */
int spill_segment_begin(struct spill *spill, struct spill_segment **ret_segment);

/*
 * Put an object into the segment. Returns its extent (unit offset in the backend), or -ENOSPC
 * when it does not fit any more: write this segment and begin another.
 */
int64_t spill_segment_add(struct spill_segment *segment, uint64_t owner, const void *object,
			  unsigned units);

unsigned spill_segment_count(const struct spill_segment *segment);

/*
 * Write the segment, wait for the completion, make it LIVE and consume it. On error all its extents
 * are void, the segment is consumed and quarantined, and the error is returned: the caller still has
 * every object (nothing may be dropped before this returns 0).
 */
int spill_segment_write(struct spill_segment *segment);

/* Give up without writing. */
void spill_segment_abandon(struct spill_segment *segment);

void spill_free(struct spill *spill, uint64_t extent, unsigned units);

/* ---- reading ---- */

/*
 * Smallest aligned range that covers `units` units at `extent`, as needed for O_DIRECT: offset and
 * length in bytes, and where the object starts in it.
 */
struct spill_range {
	uint64_t offset_bytes;
	uint32_t length_bytes;
	uint32_t object_bytes_in; /* offset of the object inside the range */
};
struct spill_range spill_range_of(uint64_t extent, unsigned units);

int spill_fd(const struct spill *spill);
void spill_count_read(struct spill *spill, uint64_t bytes, int result);

/* Compaction and drain: the live segment with the fewest live bytes, or -ENOENT. */
int64_t spill_emptiest_segment(struct spill *spill, uint64_t *ret_live_bytes);

void spill_statistics(struct spill *spill, struct spill_statistics *ret_statistics);
bool spill_is_valid(struct spill *spill);

#endif
