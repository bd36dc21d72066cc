/* SPDX-License-Identifier: MIT */
/*
 * spill — compressed pages on disk.
 *
 * A backend is one file or block device, cut into segments of SEGMENT_BYTES. A segment is filled in
 * memory, written once, whole and sequentially (O_DIRECT), and read in extents. Objects keep the
 * form they had in the pool (codec.h); an extent is an object's place: offset in the backend in
 * units of 64 bytes. Extents are freed one by one. A segment without live extents can be filled
 * again at once; meanwhile a thread of the backend punches (file) or discards (device) it.
 *
 * Segment format (byte offsets, little endian)
 *     0  u64  magic "VSWPSEG2", of a sealed one "VSWPSEAL"
 *     8  u64  generation: one more for every segment ever begun by this backend
 *    16  u32  extent count, at least 1
 *    20  u32  bytes used: header, objects and table; what follows up to 4096 is zero, then anything
 *    24  u64  XXH3-64 of the header with this field zero, followed by the table; of a sealed one by the
 *             objects, too
 *    32  u64  backend identity (random, same in all segments)
 *    40  u32  offset of the table, a multiple of 64
 *    44  u32  number of this segment in the backend: a misdirected write is seen
 *    48       zero up to 64; of a sealed one the tag of its table
 *    64       the objects, one behind the other, each a multiple of 64 long, up to the table
 *     T  count * { u64 owner; u16 unit offset in the segment; u16 units; u32 lower half of the extent's
 *        XXH3-64, of a sealed one 0 }, last object first: the table grows from the buffer's end and is
 *        moved down once, so no room is set aside and 16 bytes an extent is all it costs
 * `owner` is opaque to this file (the slot table's name of the page); it lets a drain and an
 * offline check know whose extent it is. The table says what was written; which of it is still live
 * only the owner knows. An extent's checksum is for that check alone: who reads a page has its slot's.
 *
 * Sealed backends (seal.h)  The table, and each object by itself, are encrypted under the backend's key. An
 * extent is one unit longer than its object; that unit holds { u64 generation; tag; zero up to 64 }. The nonce
 * is generation and unit offset in the segment, that of the table generation and 0. What is authenticated
 * beside the bytes is { u64 extent; u32 units of the object; u32 zero }, with the table the header (checksum and
 * tag zero): so bytes of another place, another backend or another time do not open, but for what was in
 * this very place once. That has another check (slot_table.h), or the same content.
 * Crash order: the generation is advanced in the lineage before anything is encrypted under it, so whatever
 * of a dead daemon's segment reached the disk, or still does, no other daemon writes under its number.
 *
 * Segment states
 *     FREE         nothing on disk
 *     EMPTY        no live extent; its blocks may still be there
 *     TRIMMING     EMPTY, being punched or discarded right now
 *     FILLING      in memory, one per writer
 *     WRITING
 *     LIVE         at least one live extent
 *     QUARANTINED  a write failed: never used again by this daemon
 * Transitions     FREE, EMPTY -> FILLING -> WRITING -> LIVE -> EMPTY -> TRIMMING -> FREE;
 *                 FILLING -> where it came from (abandoned); WRITING -> QUARANTINED (error), or
 *                 EMPTY when only room was missing (ENOSPC, EDQUOT, ENOMEM): the medium is sound
 * Invariants      1 a live extent lies wholly inside the objects of a LIVE segment
 *                 2 live_units and live_count of a segment are the sums over its live extents; they
 *                   are both zero or both not; not zero exactly when LIVE
 *                 3 nothing is written to a segment but WRITING, nothing is trimmed but TRIMMING, and
 *                   what nobody claimed before it may be filled for the first time
 *                 4 used_bytes == SEGMENT_BYTES * segments that are FILLING, WRITING, LIVE or
 *                   QUARANTINED
 *                 spill_is_valid() checks 2 and 4 and the free lists; each free checks 1.
 * Locking         one mutex per backend, innermost; never held across a system call. spill_free
 *                 makes none but a wake-up: it may be called on the fault path.
 */
#ifndef VSWAP_SPILL_H
#define VSWAP_SPILL_H

#include <stdbool.h>
#include <stdint.h>

#include "limits.h"
#include "seal.h"

struct spill; /* one backend */

struct spill_statistics {
	uint64_t size_bytes;       /* capacity: whole segments */
	uint64_t used_bytes;       /* FILLING, WRITING, LIVE and QUARANTINED segments, whole */
	uint64_t quarantined_bytes; /* of these: QUARANTINED */
	uint64_t untrimmed_bytes;  /* EMPTY and TRIMMING segments: free, but still on disk */
	uint64_t live_bytes;       /* in live extents */
	uint64_t extent_count;     /* live extents */
	uint64_t written_bytes;    /* ever written */
	uint64_t read_bytes;       /* ever read */
	uint64_t write_errors;
	uint64_t read_errors;
	uint64_t trimmed_bytes;    /* ever punched or discarded */
	uint64_t trim_errors;
	uint64_t metadata_bytes;   /* RAM for segment tables */
};

/* What of a backend outlives its daemon: it lies in the state memfd, and nowhere else. */
struct spill_lineage {
	uint64_t identity;   /* random, in all its segments; 0: it has none yet, and no key */
	uint64_t generation; /* of the segment that was begun last */
	uint32_t is_sealed;
	uint32_t reserved;
	uint8_t key[SEAL_KEY_BYTES]; /* random, when sealed */
};

/*
 * Open a backend on descriptor `fd`: a regular file or block device, open for reading and writing;
 * ownership passes on success. A file is made size_bytes long at once, but sparse: a segment gets
 * its blocks when it is written. Of a device at most its own size is used. O_DIRECT is switched on
 * where the file system takes it. Starts the trimming thread. The lineage is completed if it is new, and stays
 * the caller's, in its place; NULL: one that ends with the backend. Returns 0 or -errno: -EINVAL when
 * smaller than one segment or neither file nor device; -ENOTSUP: it is to be sealed, and cannot be.
 */
int spill_create(int fd, uint64_t size_bytes, struct spill_lineage *lineage, struct spill **ret_spill);

bool spill_is_sealed(const struct spill *spill);

/* Nobody will read what was written under its key any more. */
void spill_lineage_wipe(struct spill_lineage *lineage);

/*
 * Closes the descriptor. No I/O may be in flight and no segment FILLING. What was not trimmed yet
 * stays as it is. NULL ok.
 */
void spill_destroy(struct spill *spill);

/* ---- writing: one writer fills a segment, then writes it ---- */

struct spill_segment; /* a FILLING segment, owned by one thread */

/*
 * 0, or -ENOSPC when no segment is free, -ENOMEM without memory for its buffer. May wait for a
 * trim under way when that is the last room there is. Without `compacts` the reserve is not free.
 */
int spill_segment_begin(struct spill *spill, bool compacts, struct spill_segment **ret_segment);

/*
 * What is left to compaction: it fills a segment before it can free one, so a backend that is full of dead extents, which
 * needs it most, could not be compacted without. 0 for a tiny one.
 */
uint64_t spill_reserve_bytes(const struct spill *spill);

/*
 * Put an object (1..POOL_UNITS_MAX units) into the segment. Returns its extent (unit offset in the
 * backend), or -ENOSPC when it does not fit any more: write this segment and begin another.
 */
int64_t spill_segment_add(struct spill_segment *segment, uint64_t owner, const void *object,
			  unsigned units);

unsigned spill_segment_count(const struct spill_segment *segment);

/*
 * Seal the segment if the backend is, write it, wait for the completion, make it LIVE and consume it. On error all its extents
 * are void, the segment is consumed and quarantined (see Transitions), and the error is returned:
 * the caller still has every object (nothing may be dropped before this returns 0). An extent whose
 * owner went away meanwhile is freed after this has returned 0, not before. Without extents: as
 * _abandon.
 */
int spill_segment_write(struct spill_segment *segment);

/* Give up without writing. */
void spill_segment_abandon(struct spill_segment *segment);

/*
 * Once per extent: a second free ends the daemon, at once in debug builds, else when the sums of
 * the segment go wrong.
 */
void spill_free(struct spill *spill, uint64_t extent, unsigned units);

/* Wait until every EMPTY segment has been trimmed (or could not be). */
void spill_trim_wait(struct spill *spill);

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
struct spill_range spill_range_of(const struct spill *spill, uint64_t extent, unsigned units);

/*
 * What was read of an extent, from the object's place on, as the object: `bytes` themselves, or opened into `room` (PAGE_BYTES)
 * on a sealed backend. 0; -EBADMSG: not what was written there; -ENOMEM. Only its owner knows whether the object
 * is the right one.
 */
int spill_object_open(struct spill *spill, uint64_t extent, unsigned units, const uint8_t *bytes, uint8_t *room,
		      const uint8_t **ret_object);

int spill_fd(const struct spill *spill);
void spill_count_read(struct spill *spill, uint64_t bytes, int result);

/* ---- recovery: a new daemon takes over a backend and has nothing but the slots that name extents ---- */

/*
 * This extent is live. Call for each, on a backend that was just created and before anything is
 * written to it or freed. -EINVAL when it lies where no object can lie, overlaps with one that was
 * claimed, or is too late; -ENOMEM; then nothing is changed.
 */
int spill_claim(struct spill *spill, uint64_t extent, unsigned units);

/*
 * All live extents are claimed. What nobody claimed is free, but a segment is filled only once a trim of
 * it has returned: a write of the predecessor's may have been under way. Until then spill_segment_begin
 * may wait. Blocks of the predecessor's dead segments are given back by that, too.
 */
void spill_claims_end(struct spill *spill);

/* ---- the end of its use ---- */

/* From now on segments are not trimmed: a device that nobody asked to discard. */
void spill_keep_blocks(struct spill *spill);

/* A drain has begun, or has ended before all was moved. Between them nothing is trimmed of a file whose disk has room beside it. */
void spill_set_draining(struct spill *spill, bool draining);

/*
 * Without live extents and writers: truncate the file to nothing, discard the whole device. Then only
 * spill_destroy may follow. 0 or -errno: what it held is still there, but nobody needs it.
 */
int spill_erase(struct spill *spill);

/* ---- compaction and drain ---- */

/* The first LIVE segment with number >= `from`, or -ENOENT: device order, for a drain. */
int64_t spill_next_segment(struct spill *spill, uint64_t from);

/*
 * A segment is sparse when so much of it is dead, or was never filled, that moving it gains room (4 %). Count and live bytes
 * of those there are.
 */
bool spill_is_sparse(struct spill *spill, uint64_t segment);
uint64_t spill_sparse_segments(struct spill *spill, uint64_t *ret_live_bytes);
/* Bytes of live extents in a segment. */
uint64_t spill_live_bytes(struct spill *spill, uint64_t segment);

struct spill_entry {
	uint64_t owner;
	uint64_t extent;
	unsigned units; /* of the object */
	unsigned object_bytes_in; /* where the object is in the segment's bytes */
};

/*
 * Check the SEGMENT_BYTES read from offset segment * SEGMENT_BYTES: that it is what this backend
 * last wrote there, and well formed whatever the bytes are. Of a claimed segment only the latter can be
 * told. A sealed table is opened in place. Returns the number of its entries, or -EBADMSG, -ENOMEM. The objects
 * themselves are not checked: their owners have checks of their own.
 */
int spill_table_verify(struct spill *spill, uint64_t segment, void *bytes);

/* An entry of verified bytes, in order of offset; index < what spill_table_verify returned. */
struct spill_entry spill_table_entry(const void *bytes, unsigned index);

void spill_statistics(struct spill *spill, struct spill_statistics *ret_statistics);
/* Of its capacity what is free, but for what is left to compaction: of statistics that were just taken. */
uint64_t spill_room_bytes(const struct spill *spill, const struct spill_statistics *statistics);
bool spill_is_valid(struct spill *spill);

#endif
