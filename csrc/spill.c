/* SPDX-License-Identifier: MIT */
/*
 * spill — see spill.h for format, states, invariants.
 *
 * Segment records (12 bytes) live in chunks of CHUNK_SEGMENTS, made when the first segment of a
 * chunk is taken: a backend costs RAM for the part that was ever used, 12.25 bytes for each MiB. A
 * chunk has two bitmaps, FREE and EMPTY; the lowest segment of either is taken first, so that a
 * file stays compact, and EMPTY ones that are taken again save the punch.
 *
 * Trimming has a thread of its own because it is slow (ext4: 0.3 ms a segment) while extents are
 * freed on the fault path. The file's reads wait for it, and it for reads under way: one punch behind the other, a read
 * took 500 us instead of 60. So the trimmer rests most of the time, unless someone waits for it; and while a drain reads the
 * file from end to end it does nothing that can wait.
 *
 * A segment is written by one pwrite of its used part: the block layer cuts it and has all pieces
 * in flight anyway (measured: io_uring is as fast with 1 x 1 MiB, slower with 4 x 256 KiB). And a
 * thread killed inside an O_DIRECT pwrite is gone only when its write is: a ring promises no such
 * thing.
 */
#define _GNU_SOURCE
#include "spill.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base.h"
#include "crash_point.h"
#include "fault_point.h"
#include "io.h"

#define SEGMENT_UNITS (SEGMENT_BYTES / POOL_UNIT_BYTES)
#define CHUNK_SEGMENTS 1024UL
#define CHUNK_WORDS (CHUNK_SEGMENTS / 64)
#define TRIM_FILE_SEGMENTS 1UL /* by one call: ext4 takes as long a segment, and holds up readers */
#define TRIM_DEVICE_SEGMENTS 16UL
#define TRIM_UNCLAIMED_SEGMENTS 16UL /* mostly holes */
#define TRIM_REST 4 /* times as long as a trim took, between two */
#define TRIM_REST_NS_MAX 100000000UL
#define TRIM_WAIT_SHARE 2u /* so many times what lives on a draining backend is to be free beside it */
#define BUFFERS_CACHED_MAX 2
#define SPARSE_PERCENT 96UL
#define RESERVE_SHARE 32u /* of a backend, for its compaction */
#define RESERVE_MIN 2UL   /* segments, of a backend with RESERVE_FROM of them at least */
#define RESERVE_FROM 16u
#define TRIMMER_STACK_BYTES 65536UL

#define SEGMENT_MAGIC 0x3247455350575356ULL /* "VSWPSEG2" */
#define SEALED_MAGIC 0x4c41455350575356ULL  /* "VSWPSEAL" */

struct segment_header {
	uint64_t magic;
	uint64_t generation;
	uint32_t extent_count;
	uint32_t used_bytes;
	uint64_t checksum;
	uint64_t identity;
	uint32_t table_bytes_in;
	uint32_t segment;
	uint8_t tag[SEAL_TAG_BYTES]; /* of a sealed table */
};

struct table_entry {
	uint64_t owner;
	uint16_t unit;
	uint16_t units;
	uint32_t checksum;
};

/* The last unit of a sealed extent. */
struct object_seal {
	uint64_t generation;
	uint8_t tag[SEAL_TAG_BYTES];
	uint8_t zero[40];
};

/* What a sealed object is bound to, beside its nonce. */
struct object_place {
	uint64_t extent;
	uint32_t units;
	uint32_t zero;
};

#define HEADER_UNITS (sizeof(struct segment_header) / POOL_UNIT_BYTES)

static_assert(sizeof(struct segment_header) == POOL_UNIT_BYTES, "the header is one unit");
static_assert(sizeof(struct table_entry) == 16, "format");
static_assert(sizeof(struct object_seal) == POOL_UNIT_BYTES, "a seal is one unit");
static_assert(sizeof(struct object_place) == 16, "without padding: it is authenticated");
static_assert(POOL_UNIT_BYTES % sizeof(struct table_entry) == 0, "the table is aligned");
static_assert(SEGMENT_UNITS <= UINT16_MAX, "units of a segment fit a record");
static_assert(SEGMENTS_MAX - 1 <= UINT32_MAX, "segment numbers fit the header");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little endian");

enum segment_state {
	SEGMENT_FREE = 0,
	SEGMENT_EMPTY,
	SEGMENT_TRIMMING,
	SEGMENT_FILLING,
	SEGMENT_WRITING,
	SEGMENT_LIVE,
	SEGMENT_QUARANTINED,
};

struct segment_record {
	uint16_t live_units;
	uint16_t live_count;
	uint16_t end_unit; /* LIVE: objects lie in [HEADER_UNITS, end_unit) */
	uint8_t state;
	uint8_t claimed;     /* LIVE: written by a predecessor, whose generations nobody knows */
	uint32_t generation; /* LIVE: its lower half, unless claimed */
};

struct chunk {
	struct segment_record records[CHUNK_SEGMENTS];
	uint64_t free[CHUNK_WORDS];
	uint64_t empty[CHUNK_WORDS];
	uint64_t **live_map; /* of each segment, one bit a unit; NULL unless LIVE. Debug, and for claims */
};

struct spill {
	int fd;
	bool is_device;
	bool can_allocate; /* relaxed: only ever goes false */
	struct spill_lineage *lineage;
	struct spill_lineage own; /* where the caller has none */
	struct seal *seal;        /* NULL: objects are written as they are */
	unsigned seal_units;      /* of an extent, beside its object's: 1 or 0 */
	uint64_t segment_count;

	pthread_mutex_t mutex;
	pthread_cond_t trim_work, trim_done;
	pthread_t trimmer;
	bool stopping;
	bool can_trim;
	bool claiming;           /* between the first claim and spill_claims_end */
	bool was_used;           /* nothing may be claimed any more */
	uint64_t usable_count;   /* segments from here on may not be filled yet (spill_claims_end) */
	unsigned trim_waiters; /* in spill_trim_wait: no rest */
	bool draining;         /* what is EMPTY may wait for the end */
	struct chunk **chunks; /* NULL: all FREE, never used */
	uint64_t chunk_count, chunks_made;
	uint64_t first_reusable; /* no chunk before it has FREE or EMPTY segments */
	uint64_t first_empty;    /* no chunk before it has EMPTY segments */
	uint64_t empty_count, trimming_count, used_count, quarantined_count;
	uint64_t live_units, live_count;
	struct spill_segment *cached; /* for reuse */
	unsigned cached_count;
	uint64_t written_bytes, write_errors, trimmed_bytes, trim_errors;

	uint64_t read_bytes, read_errors; /* atomic */
};

struct spill_segment {
	struct spill *spill;
	struct spill_segment *next;
	uint8_t *buffer; /* header, objects upwards; table downwards from the end */
	uint64_t number;
	unsigned extent_count;
	unsigned end_unit;
	bool was_empty; /* not FREE: still to be trimmed if it is abandoned */
};

/* ---- system calls ---- */

static int range_allocate(const struct spill *spill, uint64_t offset, uint64_t bytes)
{
	int error = fault_point("spill/allocate");

	if (error)
		return -error;
	return fallocate(spill->fd, 0, (off_t)offset, (off_t)bytes) < 0 ? -errno : 0;
}

static int range_trim(const struct spill *spill, uint64_t offset, uint64_t bytes)
{
	uint64_t range[2] = { offset, bytes };
	int error = fault_point("spill/punch");
	int result;

	if (error)
		return -error;
	if (spill->is_device)
		result = ioctl(spill->fd, BLKDISCARD, range);
	else
		result = fallocate(spill->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				   (off_t)offset, (off_t)bytes);
	return result < 0 ? -errno : 0;
}

static bool is_unsupported(int result)
{
	return result == -EOPNOTSUPP || result == -ENOSYS || result == -ENOTTY;
}

static int flags_change(int fd, int set, int clear)
{
	int flags = fcntl(fd, F_GETFL);

	return flags < 0 ? -errno : fcntl(fd, F_SETFL, (flags | set) & ~clear) < 0 ? -errno : 0;
}

/* ---- segment table; mutex held ---- */

static struct segment_record *record_of(struct spill *spill, uint64_t number)
{
	return &spill->chunks[number / CHUNK_SEGMENTS]->records[number % CHUNK_SEGMENTS];
}

static uint64_t chunk_segment_count(const struct spill *spill, uint64_t chunk)
{
	return min_of(spill->segment_count - chunk * CHUNK_SEGMENTS, CHUNK_SEGMENTS);
}

static bool state_is_used(unsigned state)
{
	return state >= SEGMENT_FILLING;
}

static void bit_set(uint64_t *words, uint64_t bit, bool value)
{
	uint64_t mask = 1ULL << (bit % 64);

	words[bit / 64] = value ? words[bit / 64] | mask : words[bit / 64] & ~mask;
}

/* The one place where a state changes: bitmaps, hints and counts follow. */
static void state_set(struct spill *spill, uint64_t number, enum segment_state state)
{
	uint64_t index = number / CHUNK_SEGMENTS, bit = number % CHUNK_SEGMENTS;
	struct chunk *chunk = spill->chunks[index];
	struct segment_record *record = &chunk->records[bit];
	enum segment_state before = record->state;

	spill->empty_count -= before == SEGMENT_EMPTY;
	spill->trimming_count -= before == SEGMENT_TRIMMING;
	spill->used_count -= state_is_used(before);
	spill->empty_count += state == SEGMENT_EMPTY;
	spill->trimming_count += state == SEGMENT_TRIMMING;
	spill->used_count += state_is_used(state);
	spill->quarantined_count += state == SEGMENT_QUARANTINED;
	bit_set(chunk->free, bit, state == SEGMENT_FREE);
	bit_set(chunk->empty, bit, state == SEGMENT_EMPTY);
	if (state == SEGMENT_FREE || state == SEGMENT_EMPTY)
		spill->first_reusable = min_of(spill->first_reusable, index);
	if (state == SEGMENT_EMPTY)
		spill->first_empty = min_of(spill->first_empty, index);
	record->state = state;
}

/* No more live extents, or none ever: to be filled again. True when the trimmer has to be told. */
static bool segment_release(struct spill *spill, uint64_t number, bool has_blocks)
{
	bool trim = has_blocks && spill->can_trim;

	state_set(spill, number, trim ? SEGMENT_EMPTY : SEGMENT_FREE);
	return trim;
}

static struct chunk *chunk_create(uint64_t segment_count)
{
	struct chunk *chunk = calloc(1, sizeof *chunk);

	for (uint64_t i = 0; chunk && i < segment_count; i++)
		bit_set(chunk->free, i, true);
	return chunk;
}

static void chunk_forget_maps(struct chunk *chunk)
{
	for (uint64_t i = 0; chunk->live_map && i < CHUNK_SEGMENTS; i++)
		free(chunk->live_map[i]);
	free(chunk->live_map);
	chunk->live_map = NULL;
}

static void chunk_destroy(struct chunk *chunk)
{
	if (chunk)
		chunk_forget_maps(chunk);
	free(chunk);
}

/*
 * The lowest segment that can be filled; -ENOSPC when there is none; -EAGAIN when it lies in the
 * chunk *ret_chunk, which has to be made first.
 */
static int64_t segment_lowest(struct spill *spill, uint64_t *ret_chunk)
{
	for (uint64_t i = spill->first_reusable; i < spill->chunk_count; i++) {
		const struct chunk *chunk = spill->chunks[i];

		spill->first_reusable = i;
		*ret_chunk = i;
		if (!chunk)
			return i * CHUNK_SEGMENTS < spill->usable_count ? -EAGAIN : -ENOSPC;
		for (uint64_t word = 0; word < CHUNK_WORDS; word++) {
			uint64_t bits = chunk->free[word] | chunk->empty[word];

			if (bits) {
				uint64_t number = i * CHUNK_SEGMENTS + word * 64 +
						  (uint64_t)__builtin_ctzll(bits);

				return number < spill->usable_count ? (int64_t)number : -ENOSPC;
			}
		}
	}
	spill->first_reusable = spill->chunk_count;
	return -ENOSPC;
}

/* The first run of EMPTY segments; returns its length, 0 for none. */
static uint64_t run_lowest_empty(struct spill *spill, uint64_t *ret_number)
{
	uint64_t max = spill->is_device ? TRIM_DEVICE_SEGMENTS : TRIM_FILE_SEGMENTS;

	for (uint64_t i = spill->first_empty; i < spill->chunk_count && spill->empty_count; i++) {
		const struct chunk *chunk = spill->chunks[i];

		spill->first_empty = i;
		for (uint64_t word = 0; chunk && word < CHUNK_WORDS; word++) {
			uint64_t bits = chunk->empty[word], first, count;

			if (!bits)
				continue;
			first = (uint64_t)__builtin_ctzll(bits);
			bits = ~(bits >> first);
			count = bits ? (uint64_t)__builtin_ctzll(bits) : 64;
			*ret_number = i * CHUNK_SEGMENTS + word * 64 + first;
			return min_of(count, max);
		}
	}
	return 0;
}

/* ---- trimming ---- */

static void trim_run(struct spill *spill, uint64_t first, uint64_t count)
{
	int result;

	for (uint64_t i = 0; i < count; i++)
		state_set(spill, first + i, SEGMENT_TRIMMING);
	pthread_mutex_unlock(&spill->mutex);
	result = range_trim(spill, first * SEGMENT_BYTES, count * SEGMENT_BYTES);
	pthread_mutex_lock(&spill->mutex);
	/* Whatever came of it the segments may be filled again: what is in them is dead. */
	for (uint64_t i = 0; i < count; i++)
		state_set(spill, first + i, SEGMENT_FREE);
	if (result == 0)
		spill->trimmed_bytes += count * SEGMENT_BYTES;
	else
		spill->trim_errors++;
	if (is_unsupported(result))
		spill->can_trim = false; /* what is EMPTY still comes by here, once */
	pthread_cond_broadcast(&spill->trim_done);
}

static bool has_trims(const struct spill *spill)
{
	return spill->empty_count + spill->trimming_count > 0 ||
	       spill->usable_count < spill->segment_count;
}

/* The next segments that nobody claimed, from usable_count on; 0 when a claimed one is there. */
static uint64_t run_unclaimed(const struct spill *spill)
{
	uint64_t number = spill->usable_count, count = 0;
	uint64_t max = min_of(spill->segment_count - number, (uint64_t)TRIM_UNCLAIMED_SEGMENTS);

	while (count < max) {
		const struct chunk *chunk = spill->chunks[(number + count) / CHUNK_SEGMENTS];

		if (chunk && state_is_used(chunk->records[(number + count) % CHUNK_SEGMENTS].state))
			break;
		count++;
	}
	return count;
}

/*
 * Blocks that a predecessor left behind, or that a write of its was still on the way to: from here on
 * the segments may be filled.
 */
static void trim_unclaimed(struct spill *spill)
{
	uint64_t first = spill->usable_count, count = run_unclaimed(spill);
	int result = 0;

	if (count > 0 && spill->can_trim) {
		pthread_mutex_unlock(&spill->mutex);
		result = range_trim(spill, first * SEGMENT_BYTES, count * SEGMENT_BYTES);
		pthread_mutex_lock(&spill->mutex);
		spill->trim_errors += result < 0;
	}
	if (is_unsupported(result))
		spill->can_trim = false;
	spill->usable_count = first + max_of(count, (uint64_t)1);
	pthread_cond_broadcast(&spill->trim_done);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void trim_rest(struct spill *spill, uint64_t rest_ns)
{
	uint64_t end_ns = now_ns() + min_of(rest_ns, TRIM_REST_NS_MAX);
	struct timespec end = {
		.tv_sec = (time_t)(end_ns / 1000000000),
		.tv_nsec = (long)(end_ns % 1000000000),
	};

	while (!spill->stopping && spill->trim_waiters == 0 &&
	       pthread_cond_timedwait(&spill->trim_work, &spill->mutex, &end) == 0)
		; /* more to trim: that can wait */
}

/* Has its file system enough left for whatever of it is moved there before all of it goes back at once? RAM is not waited with. */
static bool disk_can_wait(struct spill *spill)
{
	uint64_t live_bytes = spill->live_units * POOL_UNIT_BYTES, free_bytes = 0;
	struct statfs disk;

	if (spill->is_device)
		return false;
	pthread_mutex_unlock(&spill->mutex);
	if (fstatfs(spill->fd, &disk) == 0 && disk.f_type != TMPFS_MAGIC && disk.f_type != RAMFS_MAGIC)
		free_bytes = (uint64_t)disk.f_bavail * (uint64_t)disk.f_bsize;
	pthread_mutex_lock(&spill->mutex);
	return free_bytes / TRIM_WAIT_SHARE > live_bytes;
}

/* Readers of a file wait for a punch, and it for reads under way: none while a drain reads it from end to end. */
static bool trim_can_wait(struct spill *spill)
{
	return spill->draining && spill->trim_waiters == 0 && disk_can_wait(spill);
}

static void *trimmer_main(void *argument)
{
	struct spill *spill = argument;
	uint64_t first, count, start_ns;

	name_this_thread("vswap-trim");
	SCOPED_LOCK(&spill->mutex);
	while (!spill->stopping) {
		start_ns = now_ns();
		if (!spill->claiming && spill->usable_count < spill->segment_count) {
			trim_unclaimed(spill);
			trim_rest(spill, now_ns() - start_ns);
			continue;
		}
		if (spill->empty_count > 0 && trim_can_wait(spill)) {
			trim_rest(spill, TRIM_REST_NS_MAX);
			continue;
		}
		count = run_lowest_empty(spill, &first);
		if (count == 0) {
			pthread_cond_wait(&spill->trim_work, &spill->mutex);
			continue;
		}
		trim_run(spill, first, count);
		trim_rest(spill, (now_ns() - start_ns) * TRIM_REST);
	}
	return NULL;
}

static int trimmer_start(struct spill *spill)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int result;

	sigfillset(&all);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, TRIMMER_STACK_BYTES);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	result = pthread_create(&spill->trimmer, &attributes, trimmer_main, spill);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return -result;
}

void spill_trim_wait(struct spill *spill)
{
	SCOPED_LOCK(&spill->mutex);
	spill->trim_waiters++;
	pthread_cond_signal(&spill->trim_work);
	while (has_trims(spill))
		pthread_cond_wait(&spill->trim_done, &spill->mutex);
	spill->trim_waiters--;
}

/* ---- lifecycle ---- */

/* Make *size_bytes what the descriptor has room for, in whole segments. */
static int size_prepare(int fd, uint64_t *size_bytes, bool *ret_is_device)
{
	uint64_t bytes = min_of(*size_bytes, SEGMENTS_MAX * SEGMENT_BYTES);
	struct stat status;
	off_t end;

	if (fstat(fd, &status) < 0)
		return -errno;
	*ret_is_device = S_ISBLK(status.st_mode);
	if (!*ret_is_device && !S_ISREG(status.st_mode))
		return -EINVAL;
	if (*ret_is_device) {
		end = lseek(fd, 0, SEEK_END);
		if (end < 0)
			return -errno;
		bytes = min_of(bytes, (uint64_t)end);
	}
	bytes -= bytes % SEGMENT_BYTES;
	if (bytes == 0)
		return -EINVAL;
	if (!*ret_is_device && status.st_size < (off_t)bytes && ftruncate(fd, (off_t)bytes) < 0)
		return -errno;
	*size_bytes = bytes;
	return 0;
}

static void locks_create(struct spill *spill)
{
	pthread_condattr_t attributes;

	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_mutex_init(&spill->mutex, NULL);
	pthread_cond_init(&spill->trim_work, &attributes);
	pthread_cond_init(&spill->trim_done, &attributes);
	pthread_condattr_destroy(&attributes);
}

static void spill_free_memory(struct spill *spill)
{
	seal_destroy(spill->seal);
	spill_lineage_wipe(&spill->own);
	pthread_cond_destroy(&spill->trim_work);
	pthread_cond_destroy(&spill->trim_done);
	pthread_mutex_destroy(&spill->mutex);
	free(spill->chunks);
	free(spill);
}

void spill_lineage_wipe(struct spill_lineage *lineage)
{
	explicit_bzero(lineage, sizeof *lineage);
}

/* Complete a new lineage, the identity last: a key under an identity is whole. */
static int lineage_begin(struct spill_lineage *lineage)
{
	uint64_t identity;

	if (lineage->is_sealed && getrandom(lineage->key, SEAL_KEY_BYTES, 0) != SEAL_KEY_BYTES)
		return -EIO;
	if (getrandom(&identity, sizeof identity, 0) != sizeof identity)
		return -EIO;
	__atomic_store_n(&lineage->identity, max_of(identity, (uint64_t)1), __ATOMIC_RELEASE);
	return 0;
}

static int lineage_take(struct spill *spill, struct spill_lineage *lineage)
{
	int result = 0;

	spill->lineage = lineage ? lineage : &spill->own;
	if (spill->lineage->identity == 0)
		result = lineage_begin(spill->lineage);
	if (result == 0 && spill->lineage->is_sealed)
		result = seal_create(spill->lineage->key, &spill->seal);
	spill->seal_units = spill->seal ? 1 : 0;
	return result;
}

bool spill_is_sealed(const struct spill *spill)
{
	return spill->seal;
}

int spill_create(int fd, uint64_t size_bytes, struct spill_lineage *lineage, struct spill **ret_spill)
{
	struct spill *spill;
	bool is_device = false;
	int result = size_prepare(fd, &size_bytes, &is_device);

	if (result < 0)
		return result;
	spill = calloc(1, sizeof *spill);
	if (!spill)
		return -ENOMEM;
	spill->fd = fd;
	spill->is_device = is_device;
	spill->can_allocate = !is_device;
	spill->can_trim = true;
	spill->segment_count = spill->usable_count = size_bytes / SEGMENT_BYTES;
	spill->chunk_count = div_ceil(spill->segment_count, CHUNK_SEGMENTS);
	spill->chunks = calloc(spill->chunk_count, sizeof *spill->chunks);
	locks_create(spill);
	result = spill->chunks ? lineage_take(spill, lineage) : -ENOMEM;
	if (result == 0)
		result = trimmer_start(spill);
	if (result < 0) {
		spill_free_memory(spill);
		return result;
	}
	(void)flags_change(fd, O_DIRECT, 0); /* some file systems refuse: buffered, then */
	*ret_spill = spill;
	return 0;
}

static void segment_destroy(struct spill_segment *segment)
{
	munmap(segment->buffer, SEGMENT_BYTES);
	free(segment);
}

void spill_destroy(struct spill *spill)
{
	if (!spill)
		return;
	pthread_mutex_lock(&spill->mutex);
	spill->stopping = true;
	pthread_cond_signal(&spill->trim_work);
	pthread_mutex_unlock(&spill->mutex);
	pthread_join(spill->trimmer, NULL);
	while (spill->cached) {
		struct spill_segment *segment = spill->cached;

		spill->cached = segment->next;
		segment_destroy(segment);
	}
	for (uint64_t i = 0; i < spill->chunk_count; i++) {
		for (uint64_t j = 0; spill->chunks[i] && j < CHUNK_SEGMENTS; j++)
			VS_CHECK(spill->chunks[i]->records[j].state != SEGMENT_FILLING &&
				 spill->chunks[i]->records[j].state != SEGMENT_WRITING);
		chunk_destroy(spill->chunks[i]);
	}
	close(spill->fd);
	spill_free_memory(spill);
}

/* ---- segment buffers ---- */

/* Mapped, not malloc'ed: page-aligned for O_DIRECT without an alignment's waste. */
static struct spill_segment *segment_create(struct spill *spill)
{
	struct spill_segment *segment = calloc(1, sizeof *segment);

	if (!segment)
		return NULL;
	segment->spill = spill;
	segment->buffer = mmap(NULL, SEGMENT_BYTES, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (segment->buffer == MAP_FAILED) {
		free(segment);
		return NULL;
	}
	return segment;
}

static struct spill_segment *segment_get(struct spill *spill)
{
	struct spill_segment *segment;

	pthread_mutex_lock(&spill->mutex);
	segment = spill->cached;
	if (segment) {
		spill->cached = segment->next;
		spill->cached_count--;
	}
	pthread_mutex_unlock(&spill->mutex);
	return segment ? segment : segment_create(spill);
}

static void segment_put(struct spill_segment *segment)
{
	struct spill *spill = segment->spill;

	pthread_mutex_lock(&spill->mutex);
	if (spill->cached_count < BUFFERS_CACHED_MAX) {
		segment->next = spill->cached;
		spill->cached = segment;
		spill->cached_count++;
		segment = NULL;
	}
	pthread_mutex_unlock(&spill->mutex);
	if (segment)
		segment_destroy(segment);
}

/* ---- filling ---- */

static int chunk_make(struct spill *spill, uint64_t index)
{
	struct chunk *chunk = chunk_create(chunk_segment_count(spill, index));

	if (!chunk)
		return -ENOMEM;
	pthread_mutex_lock(&spill->mutex);
	if (!spill->chunks[index]) {
		spill->chunks[index] = chunk;
		spill->chunks_made++;
		chunk = NULL;
	}
	pthread_mutex_unlock(&spill->mutex);
	chunk_destroy(chunk); /* another writer was first */
	return 0;
}

uint64_t spill_reserve_bytes(const struct spill *spill)
{
	if (spill->segment_count < RESERVE_FROM)
		return 0;
	return max_of(spill->segment_count / RESERVE_SHARE, RESERVE_MIN) * SEGMENT_BYTES;
}

uint64_t spill_room_bytes(const struct spill *spill, const struct spill_statistics *statistics)
{
	uint64_t taken = statistics->used_bytes + spill_reserve_bytes(spill);

	return statistics->size_bytes - min_of(taken, statistics->size_bytes);
}

/* Take a segment; -EAGAIN: make chunk *ret_chunk first. */
static int segment_take(struct spill *spill, bool compacts, struct spill_segment *segment, uint64_t *ret_chunk)
{
	uint64_t reserve = compacts ? 0 : spill_reserve_bytes(spill) / SEGMENT_BYTES;
	int64_t number;

	SCOPED_LOCK(&spill->mutex);
	VS_CHECK(!spill->claiming);
	spill->was_used = true;
	if (reserve > 0 && spill->used_count + reserve >= spill->segment_count)
		return -ENOSPC;
	number = segment_lowest(spill, ret_chunk);
	while (number == -ENOSPC &&
	       (spill->trimming_count > 0 || spill->usable_count < spill->segment_count)) {
		pthread_cond_wait(&spill->trim_done, &spill->mutex);
		number = segment_lowest(spill, ret_chunk);
	}
	if (number < 0)
		return (int)number;
	segment->number = (uint64_t)number;
	segment->was_empty = record_of(spill, segment->number)->state == SEGMENT_EMPTY;
	state_set(spill, segment->number, SEGMENT_FILLING);
	return 0;
}

int spill_segment_begin(struct spill *spill, bool compacts, struct spill_segment **ret_segment)
{
	struct spill_segment *segment = segment_get(spill);
	uint64_t chunk;
	int result;

	if (!segment)
		return -ENOMEM;
	result = segment_take(spill, compacts, segment, &chunk);
	while (result == -EAGAIN) { /* at most once per chunk */
		result = chunk_make(spill, chunk);
		if (result == 0)
			result = segment_take(spill, compacts, segment, &chunk);
	}
	if (result < 0) {
		segment_put(segment);
		return result;
	}
	segment->extent_count = 0;
	segment->end_unit = HEADER_UNITS;
	*ret_segment = segment;
	return 0;
}

static uint64_t table_bytes(unsigned extent_count)
{
	return extent_count * sizeof(struct table_entry);
}

int64_t spill_segment_add(struct spill_segment *segment, uint64_t owner, const void *object,
			  unsigned units)
{
	unsigned extent_units = units + segment->spill->seal_units;
	struct table_entry entry = {
		.owner = owner,
		.unit = (uint16_t)segment->end_unit,
		.units = (uint16_t)extent_units,
	};
	uint64_t table = table_bytes(segment->extent_count + 1);
	uint64_t start = segment->end_unit * POOL_UNIT_BYTES;

	VS_CHECK(units >= 1 && units <= POOL_UNITS_MAX);
	if (start + extent_units * POOL_UNIT_BYTES + table > SEGMENT_BYTES)
		return -ENOSPC;
	memcpy(segment->buffer + start, object, units * POOL_UNIT_BYTES);
	memcpy(segment->buffer + SEGMENT_BYTES - table, &entry, sizeof entry);
	segment->end_unit += extent_units;
	segment->extent_count++;
	return (int64_t)(segment->number * SEGMENT_UNITS + entry.unit);
}

unsigned spill_segment_count(const struct spill_segment *segment)
{
	return segment->extent_count;
}

/* ---- the format ---- */

static uint64_t segment_checksum(struct segment_header header, const void *rest, size_t length)
{
	XXH3_state_t state;

	header.checksum = 0;
	XXH3_64bits_reset(&state);
	XXH3_64bits_update(&state, &header, sizeof header);
	XXH3_64bits_update(&state, rest, length);
	return XXH3_64bits_digest(&state);
}

static struct seal_nonce table_nonce(const struct segment_header *header)
{
	return (struct seal_nonce){ .generation = header->generation };
}

/* What a sealed table is bound to: the header, as it is before it is sealed. */
static struct segment_header table_context(struct segment_header header)
{
	header.checksum = 0;
	memset(header.tag, 0, sizeof header.tag);
	return header;
}

/* Encrypt the object of an extent, which begins at `unit` of the segment, and put its seal behind it. */
static int object_seal(const struct spill_segment *segment, const struct table_entry *entry, uint64_t generation)
{
	unsigned units = entry->units - segment->spill->seal_units;
	uint8_t *object = segment->buffer + entry->unit * POOL_UNIT_BYTES;
	struct object_place place = { .extent = segment->number * SEGMENT_UNITS + entry->unit, .units = units };
	struct seal_context context = { &place, sizeof place };
	struct seal_nonce nonce = { .generation = generation, .unit = entry->unit };
	struct object_seal seal = { .generation = generation };
	int result = seal_encrypt(segment->spill->seal, nonce, context, object, units * POOL_UNIT_BYTES, seal.tag);

	if (result == 0)
		memcpy(object + units * POOL_UNIT_BYTES, &seal, sizeof seal);
	return result;
}

/* Each extent as it is to be on disk. */
static int objects_finish(const struct spill_segment *segment, uint64_t generation)
{
	uint8_t *last = segment->buffer + SEGMENT_BYTES;
	int result = 0;

	for (unsigned i = 1; i <= segment->extent_count && result == 0; i++) {
		struct table_entry entry;

		memcpy(&entry, last - table_bytes(i), sizeof entry);
		if (segment->spill->seal)
			result = object_seal(segment, &entry, generation);
		else
			entry.checksum = (uint32_t)XXH3_64bits(segment->buffer + entry.unit * POOL_UNIT_BYTES,
							       entry.units * POOL_UNIT_BYTES);
		memcpy(last - table_bytes(i), &entry, sizeof entry);
	}
	return result;
}

/* The header's checksum, and of a sealed segment its table. */
static int header_finish(struct spill_segment *segment, struct segment_header *header, uint8_t *table,
			 uint64_t table_length)
{
	struct segment_header bound = table_context(*header);
	struct seal_context context = { &bound, sizeof bound };
	int result = 0;

	if (!segment->spill->seal) {
		header->checksum = segment_checksum(*header, table, table_length);
		return 0;
	}
	result = seal_encrypt(segment->spill->seal, table_nonce(header), context, table, table_length, header->tag);
	header->checksum = segment_checksum(*header, segment->buffer + sizeof *header, header->used_bytes - sizeof *header);
	return result;
}

/* Put table and header in place, encrypted where the backend is sealed: the bytes to write, or -ENOMEM. */
static int64_t segment_finish(struct spill_segment *segment, uint64_t generation)
{
	uint64_t table_length = table_bytes(segment->extent_count);
	uint64_t table_bytes_in = segment->end_unit * POOL_UNIT_BYTES;
	uint64_t used_bytes = table_bytes_in + table_length;
	uint64_t write_bytes = align_up(used_bytes, PAGE_BYTES);
	uint8_t *table = segment->buffer + table_bytes_in;
	int result = objects_finish(segment, generation);
	struct segment_header header = {
		.magic = segment->spill->seal ? SEALED_MAGIC : SEGMENT_MAGIC,
		.generation = generation,
		.extent_count = segment->extent_count,
		.used_bytes = (uint32_t)used_bytes,
		.identity = segment->spill->lineage->identity,
		.table_bytes_in = (uint32_t)table_bytes_in,
		.segment = (uint32_t)segment->number,
	};

	memmove(table, segment->buffer + SEGMENT_BYTES - table_length, table_length);
	memset(segment->buffer + used_bytes, 0, write_bytes - used_bytes);
	if (result == 0)
		result = header_finish(segment, &header, table, table_length);
	memcpy(segment->buffer, &header, sizeof header);
	return result < 0 ? result : (int64_t)write_bytes;
}

static struct table_entry table_entry_get(const uint8_t *bytes, unsigned index_from_end)
{
	struct segment_header header;
	struct table_entry entry;

	memcpy(&header, bytes, sizeof header);
	memcpy(&entry, bytes + header.table_bytes_in + table_bytes(index_from_end), sizeof entry);
	return entry;
}

static bool header_is_sound(const struct segment_header *header, bool sealed)
{
	static const uint8_t zero[sizeof header->tag];

	return header->magic == (sealed ? SEALED_MAGIC : SEGMENT_MAGIC) &&
	       (sealed || memcmp(header->tag, zero, sizeof zero) == 0) &&
	       header->used_bytes <= SEGMENT_BYTES && header->extent_count >= 1 &&
	       header->extent_count <= SEGMENT_BYTES / sizeof(struct table_entry) &&
	       header->table_bytes_in >= sizeof *header &&
	       header->table_bytes_in % POOL_UNIT_BYTES == 0 &&
	       header->table_bytes_in + table_bytes(header->extent_count) == header->used_bytes;
}

/* Entries come last object first and leave no gap between header and table. */
static bool table_is_sound(const uint8_t *bytes, const struct segment_header *header, unsigned seal_units)
{
	uint64_t end_unit = header->table_bytes_in / POOL_UNIT_BYTES;

	for (unsigned i = 0; i < header->extent_count; i++) {
		struct table_entry entry = table_entry_get(bytes, i);

		if (entry.units < 1 + seal_units || entry.units > POOL_UNITS_MAX + seal_units ||
		    (uint64_t)entry.unit + entry.units != end_unit)
			return false;
		end_unit = entry.unit;
	}
	return end_unit == HEADER_UNITS;
}

/* Is the table what was written, as far as its checksum or its tag can tell? A sealed one is opened in place. */
static int table_open(const struct spill *spill, const struct segment_header *header, uint8_t *table)
{
	uint64_t length = table_bytes(header->extent_count);
	struct segment_header bound = table_context(*header);
	struct seal_context context = { &bound, sizeof bound };

	if (spill->seal)
		return seal_decrypt(spill->seal, table_nonce(header), context, table, length, header->tag, table);
	return segment_checksum(*header, table, length) == header->checksum ? 0 : -EBADMSG;
}

/* Of a claimed segment it is only known that it is well formed: its entries may be a stale table's. */
static int segment_verify(const struct spill *spill, uint64_t number, bool claimed,
			  uint32_t generation, uint8_t *bytes)
{
	struct segment_header header;
	int result;

	memcpy(&header, bytes, sizeof header);
	if (!header_is_sound(&header, spill->seal) || header.segment != number)
		return -EBADMSG;
	if (!claimed && (header.identity != spill->lineage->identity ||
			 (uint32_t)header.generation != generation))
		return -EBADMSG;
	result = table_open(spill, &header, bytes + header.table_bytes_in);
	if (result < 0)
		return result;
	return table_is_sound(bytes, &header, spill->seal_units) ? (int)header.extent_count : -EBADMSG;
}

int spill_table_verify(struct spill *spill, uint64_t segment, void *bytes)
{
	struct segment_record record = { 0 };

	VS_CHECK(segment < spill->segment_count);
	pthread_mutex_lock(&spill->mutex);
	if (spill->chunks[segment / CHUNK_SEGMENTS])
		record = *record_of(spill, segment);
	pthread_mutex_unlock(&spill->mutex);
	if (record.state != SEGMENT_LIVE)
		return -EBADMSG;
	return segment_verify(spill, segment, record.claimed, record.generation, bytes);
}

struct spill_entry spill_table_entry(const void *bytes, unsigned index)
{
	struct segment_header header;
	struct table_entry entry;
	unsigned seal_units;

	memcpy(&header, bytes, sizeof header);
	VS_CHECK(index < header.extent_count);
	seal_units = header.magic == SEALED_MAGIC ? 1 : 0;
	entry = table_entry_get(bytes, header.extent_count - 1 - index);
	return (struct spill_entry){
		.owner = entry.owner,
		.extent = header.segment * SEGMENT_UNITS + entry.unit,
		.units = entry.units - seal_units,
		.object_bytes_in = (unsigned)(entry.unit * POOL_UNIT_BYTES),
	};
}

/* ---- which units are live: in debug builds always, else while extents are claimed ---- */

#ifdef VSWAP_DEBUG
#define HAS_LIVE_MAPS true
#else
#define HAS_LIVE_MAPS false
#endif

/* The segment's place in its chunk's maps; NULL without memory. */
static uint64_t **live_map_of(struct spill *spill, uint64_t number)
{
	struct chunk *chunk = spill->chunks[number / CHUNK_SEGMENTS];

	if (!chunk->live_map)
		chunk->live_map = calloc(CHUNK_SEGMENTS, sizeof *chunk->live_map);
	return chunk->live_map ? &chunk->live_map[number % CHUNK_SEGMENTS] : NULL;
}

static uint64_t *live_map_create(const struct spill_segment *segment)
{
	uint64_t *map = HAS_LIVE_MAPS ? calloc(SEGMENT_UNITS / 64, sizeof *map) : NULL;

	VS_CHECK(map || !HAS_LIVE_MAPS);
	for (unsigned unit = HEADER_UNITS; map && unit < segment->end_unit; unit++)
		bit_set(map, unit, true);
	return map;
}

static void live_map_install(struct spill *spill, uint64_t number, uint64_t *map)
{
	uint64_t **place = HAS_LIVE_MAPS ? live_map_of(spill, number) : NULL;

	VS_CHECK(place || !HAS_LIVE_MAPS);
	if (!place)
		return;
	free(*place);
	*place = map;
}

static bool live_map_has(const uint64_t *map, uint64_t unit, unsigned units)
{
	for (uint64_t i = unit; i < unit + units; i++)
		if (map[i / 64] >> (i % 64) & 1)
			return true;
	return false;
}

static void live_map_clear(struct spill *spill, uint64_t number, uint64_t unit, unsigned units)
{
	uint64_t *map = HAS_LIVE_MAPS ? *live_map_of(spill, number) : NULL;

	for (uint64_t i = unit; map && i < unit + units; i++) {
		VS_CHECK(live_map_has(map, i, 1)); /* not live: freed twice, or never written */
		bit_set(map, i, false);
	}
}

/* ---- writing ---- */

static bool can_allocate(const struct spill *spill)
{
	return __atomic_load_n(&spill->can_allocate, __ATOMIC_RELAXED);
}

/*
 * Blocks first: want of room is then found before a byte is written. Some file systems take
 * O_DIRECT as a flag and refuse it at the first write: the first write switches it off for all.
 */
static int segment_transfer(struct spill_segment *segment, uint64_t write_bytes)
{
	struct spill *spill = segment->spill;
	uint64_t offset = segment->number * SEGMENT_BYTES;
	int result;

	if (can_allocate(spill)) {
		do
			result = range_allocate(spill, offset, write_bytes);
		while (result == -EINTR);
		if (is_unsupported(result))
			__atomic_store_n(&spill->can_allocate, false, __ATOMIC_RELAXED);
		else if (result < 0)
			return result;
	}
	result = io_write_wait(spill->fd, segment->buffer, write_bytes, offset);
	if (result == -EINVAL && flags_change(spill->fd, 0, O_DIRECT) == 0)
		result = io_write_wait(spill->fd, segment->buffer, write_bytes, offset);
	return result;
}

static void segment_make_live(struct spill_segment *segment, uint64_t generation,
			      uint64_t write_bytes)
{
	struct spill *spill = segment->spill;
	uint64_t *map = live_map_create(segment);
	uint16_t live_units = (uint16_t)(segment->end_unit - HEADER_UNITS);

	SCOPED_LOCK(&spill->mutex);
	struct segment_record *record = record_of(spill, segment->number);

	VS_CHECK(record->state == SEGMENT_WRITING && record->live_count == 0);
	live_map_install(spill, segment->number, map);
	record->live_units = live_units;
	record->live_count = (uint16_t)segment->extent_count;
	record->end_unit = (uint16_t)segment->end_unit;
	record->generation = (uint32_t)generation;
	record->claimed = 0;
	state_set(spill, segment->number, SEGMENT_LIVE);
	spill->live_units += live_units;
	spill->live_count += segment->extent_count;
	spill->written_bytes += write_bytes;
}

static void segment_fail(struct spill_segment *segment, int result)
{
	struct spill *spill = segment->spill;
	bool trim = false;

	pthread_mutex_lock(&spill->mutex);
	spill->write_errors++;
	if (result == -ENOSPC || result == -EDQUOT || result == -ENOMEM)
		trim = segment_release(spill, segment->number, true);
	else
		state_set(spill, segment->number, SEGMENT_QUARANTINED);
	pthread_mutex_unlock(&spill->mutex);
	if (trim)
		pthread_cond_signal(&spill->trim_work);
}

int spill_segment_write(struct spill_segment *segment)
{
	struct spill *spill = segment->spill;
	uint64_t generation;
	int64_t write_bytes;
	int result;

	if (segment->extent_count == 0) {
		spill_segment_abandon(segment);
		return 0;
	}
	pthread_mutex_lock(&spill->mutex);
	VS_CHECK(record_of(spill, segment->number)->state == SEGMENT_FILLING);
	state_set(spill, segment->number, SEGMENT_WRITING);
	/* Before anything is encrypted: see Crash order of sealed backends. */
	generation = __atomic_add_fetch(&spill->lineage->generation, 1, __ATOMIC_SEQ_CST);
	pthread_mutex_unlock(&spill->mutex);
	crash_point(CRASH_SEGMENT_NUMBERED);
	write_bytes = segment_finish(segment, generation);
	VS_DCHECK(spill->seal || segment_verify(spill, segment->number, false, (uint32_t)generation,
						segment->buffer) == (int)segment->extent_count);
	result = write_bytes < 0 ? (int)write_bytes : segment_transfer(segment, (uint64_t)write_bytes);
	if (result == 0)
		segment_make_live(segment, generation, (uint64_t)write_bytes);
	else
		segment_fail(segment, result);
	segment_put(segment);
	return result;
}

void spill_segment_abandon(struct spill_segment *segment)
{
	struct spill *spill = segment->spill;
	bool trim;

	pthread_mutex_lock(&spill->mutex);
	VS_CHECK(record_of(spill, segment->number)->state == SEGMENT_FILLING);
	trim = segment_release(spill, segment->number, segment->was_empty);
	pthread_mutex_unlock(&spill->mutex);
	if (trim)
		pthread_cond_signal(&spill->trim_work);
	segment_put(segment);
}

/* ---- freeing ---- */

void spill_free(struct spill *spill, uint64_t extent, unsigned units)
{
	uint64_t number = extent / SEGMENT_UNITS, unit = extent % SEGMENT_UNITS;
	struct segment_record *record;

	VS_CHECK(number < spill->segment_count && units >= 1 && units <= POOL_UNITS_MAX);
	units += spill->seal_units;
	SCOPED_LOCK(&spill->mutex);
	VS_CHECK(!spill->claiming && spill->chunks[number / CHUNK_SEGMENTS]);
	record = record_of(spill, number);
	VS_CHECK(record->state == SEGMENT_LIVE);
	VS_CHECK(unit >= HEADER_UNITS && unit + units <= record->end_unit);
	VS_CHECK(record->live_units >= units && record->live_count >= 1);
	live_map_clear(spill, number, unit, units);
	record->live_units = (uint16_t)(record->live_units - units);
	record->live_count--;
	VS_CHECK((record->live_units == 0) == (record->live_count == 0));
	spill->live_units -= units;
	spill->live_count--;
	if (record->live_count > 0)
		return;
	live_map_install(spill, number, NULL);
	record->claimed = 0;
	/* With the lock held: the last extent of all gone, the backend may be, once it is released. */
	if (segment_release(spill, number, true))
		pthread_cond_signal(&spill->trim_work);
}

/* ---- reading ---- */

struct spill_range spill_range_of(const struct spill *spill, uint64_t extent, unsigned units)
{
	uint64_t first = extent * POOL_UNIT_BYTES, end = (extent + units + spill->seal_units) * POOL_UNIT_BYTES;
	uint64_t offset = first / PAGE_BYTES * PAGE_BYTES;

	return (struct spill_range){
		.offset_bytes = offset,
		.length_bytes = (uint32_t)(align_up(end, PAGE_BYTES) - offset),
		.object_bytes_in = (uint32_t)(first - offset),
	};
}

int spill_object_open(struct spill *spill, uint64_t extent, unsigned units, const uint8_t *bytes, uint8_t *room,
		      const uint8_t **ret_object)
{
	struct object_place place = { .extent = extent, .units = units };
	struct seal_context context = { &place, sizeof place };
	struct object_seal seal;
	static const uint8_t zero[sizeof seal.zero];
	struct seal_nonce nonce;
	int result;

	VS_CHECK(units >= 1 && units <= POOL_UNITS_MAX);
	*ret_object = spill->seal ? room : bytes;
	if (!spill->seal)
		return 0;
	memcpy(&seal, bytes + units * POOL_UNIT_BYTES, sizeof seal);
	nonce = (struct seal_nonce){ .generation = seal.generation, .unit = (uint32_t)(extent % SEGMENT_UNITS) };
	result = seal_decrypt(spill->seal, nonce, context, bytes, units * POOL_UNIT_BYTES, seal.tag, room);
	if (result == 0 && memcmp(seal.zero, zero, sizeof zero) != 0)
		return -EBADMSG; /* says nothing about the object, but the storage is broken */
	return result;
}

int spill_fd(const struct spill *spill)
{
	return spill->fd;
}

void spill_count_read(struct spill *spill, uint64_t bytes, int result)
{
	if (result < 0)
		__atomic_fetch_add(&spill->read_errors, 1, __ATOMIC_RELAXED);
	else
		__atomic_fetch_add(&spill->read_bytes, bytes, __ATOMIC_RELAXED);
}

/* ---- recovery ---- */

static bool may_claim(struct spill *spill)
{
	SCOPED_LOCK(&spill->mutex);
	spill->claiming = !spill->was_used;
	return spill->claiming;
}

/* The extent lies where objects can lie. */
static bool extent_is_sane(const struct spill *spill, uint64_t extent, unsigned units)
{
	uint64_t unit = extent % SEGMENT_UNITS;

	return extent / SEGMENT_UNITS < spill->segment_count && units >= 1 && units <= POOL_UNITS_MAX &&
	       unit >= HEADER_UNITS && unit + units + spill->seal_units < SEGMENT_UNITS;
}

static int claim(struct spill *spill, uint64_t number, uint64_t unit, unsigned units)
{
	SCOPED_LOCK(&spill->mutex);
	struct segment_record *record = record_of(spill, number);
	uint64_t **map = live_map_of(spill, number);

	if (map && !*map)
		*map = calloc(SEGMENT_UNITS / 64, sizeof **map);
	if (!map || !*map)
		return -ENOMEM;
	if (live_map_has(*map, unit, units))
		return -EINVAL;
	for (uint64_t i = unit; i < unit + units; i++)
		bit_set(*map, i, true);
	record->live_units = (uint16_t)(record->live_units + units);
	record->live_count++;
	record->end_unit = (uint16_t)max_of((uint64_t)record->end_unit, unit + units);
	record->claimed = 1;
	if (record->state == SEGMENT_FREE)
		state_set(spill, number, SEGMENT_LIVE);
	spill->live_units += units;
	spill->live_count++;
	return 0;
}

int spill_claim(struct spill *spill, uint64_t extent, unsigned units)
{
	uint64_t number = extent / SEGMENT_UNITS;
	int result = 0;

	if (!extent_is_sane(spill, extent, units))
		return -EINVAL;
	if (!may_claim(spill))
		return -EINVAL;
	if (!spill->chunks[number / CHUNK_SEGMENTS])
		result = chunk_make(spill, number / CHUNK_SEGMENTS);
	return result < 0 ? result : claim(spill, number, extent % SEGMENT_UNITS, units + spill->seal_units);
}

void spill_claims_end(struct spill *spill)
{
	SCOPED_LOCK(&spill->mutex);
	VS_CHECK(!spill->was_used);
	for (uint64_t i = 0; !HAS_LIVE_MAPS && i < spill->chunk_count; i++)
		if (spill->chunks[i])
			chunk_forget_maps(spill->chunks[i]);
	spill->was_used = true;
	spill->claiming = false;
	spill->usable_count = 0;
	pthread_cond_signal(&spill->trim_work);
}

/* ---- the end of its use ---- */

void spill_keep_blocks(struct spill *spill)
{
	SCOPED_LOCK(&spill->mutex);
	spill->can_trim = false;
}

void spill_set_draining(struct spill *spill, bool draining)
{
	SCOPED_LOCK(&spill->mutex);
	spill->draining = draining;
	pthread_cond_signal(&spill->trim_work);
}

int spill_erase(struct spill *spill)
{
	uint64_t range[2] = { 0, spill->segment_count * SEGMENT_BYTES };
	int result;

	pthread_mutex_lock(&spill->mutex);
	VS_CHECK(spill->live_count == 0);
	pthread_mutex_unlock(&spill->mutex);
	/* A trim under way does no harm: there is nothing left to keep. */
	result = spill->is_device ? ioctl(spill->fd, BLKDISCARD, range) : ftruncate(spill->fd, 0);
	return result < 0 ? -errno : 0;
}

/* ---- compaction and drain ---- */

/* The first LIVE segment of one chunk at or after `from`, or -ENOENT. */
static int64_t chunk_next(struct spill *spill, uint64_t index, uint64_t from)
{
	SCOPED_LOCK(&spill->mutex);
	const struct chunk *chunk = spill->chunks[index];
	uint64_t first = index * CHUNK_SEGMENTS;

	for (uint64_t i = max_of(from, first) - first; chunk && i < CHUNK_SEGMENTS; i++)
		if (chunk->records[i].state == SEGMENT_LIVE)
			return (int64_t)(first + i);
	return -ENOENT;
}

int64_t spill_next_segment(struct spill *spill, uint64_t from)
{
	for (uint64_t i = from / CHUNK_SEGMENTS; i < spill->chunk_count; i++) {
		int64_t number = chunk_next(spill, i, from);

		if (number >= 0)
			return number;
	}
	return -ENOENT;
}

/* A segment that holds less than it could: dead extents, or written before it was full. */
static bool is_sparse(const struct segment_record *record)
{
	uint64_t table_units = div_ceil(table_bytes(record->live_count), POOL_UNIT_BYTES);

	return record->state == SEGMENT_LIVE &&
	       (record->live_units * 100UL < (record->end_unit - HEADER_UNITS) * SPARSE_PERCENT ||
		(record->end_unit + table_units) * 100UL < SEGMENT_UNITS * SPARSE_PERCENT);
}

bool spill_is_sparse(struct spill *spill, uint64_t segment)
{
	SCOPED_LOCK(&spill->mutex);
	return spill->chunks[segment / CHUNK_SEGMENTS] && is_sparse(record_of(spill, segment));
}

uint64_t spill_live_bytes(struct spill *spill, uint64_t segment)
{
	SCOPED_LOCK(&spill->mutex);
	return spill->chunks[segment / CHUNK_SEGMENTS] ?
		       record_of(spill, segment)->live_units * (uint64_t)POOL_UNIT_BYTES : 0;
}

uint64_t spill_sparse_segments(struct spill *spill, uint64_t *ret_live_bytes)
{
	uint64_t count = 0, live_units = 0;

	for (uint64_t i = 0; i < spill->chunk_count; i++) {
		SCOPED_LOCK(&spill->mutex);
		const struct chunk *chunk = spill->chunks[i];

		for (uint64_t k = 0; chunk && k < CHUNK_SEGMENTS; k++)
			if (is_sparse(&chunk->records[k])) {
				live_units += chunk->records[k].live_units;
				count++;
			}
	}
	*ret_live_bytes = live_units * POOL_UNIT_BYTES;
	return count;
}

/* ---- what it is at ---- */

void spill_statistics(struct spill *spill, struct spill_statistics *ret_statistics)
{
	SCOPED_LOCK(&spill->mutex);

	*ret_statistics = (struct spill_statistics){
		.size_bytes = spill->segment_count * SEGMENT_BYTES,
		.used_bytes = spill->used_count * SEGMENT_BYTES,
		.quarantined_bytes = spill->quarantined_count * SEGMENT_BYTES,
		.untrimmed_bytes = (spill->empty_count + spill->trimming_count) * SEGMENT_BYTES,
		.live_bytes = spill->live_units * POOL_UNIT_BYTES,
		.extent_count = spill->live_count,
		.written_bytes = spill->written_bytes,
		.read_bytes = __atomic_load_n(&spill->read_bytes, __ATOMIC_RELAXED),
		.write_errors = spill->write_errors,
		.read_errors = __atomic_load_n(&spill->read_errors, __ATOMIC_RELAXED),
		.trimmed_bytes = spill->trimmed_bytes,
		.trim_errors = spill->trim_errors,
		.metadata_bytes = sizeof *spill + spill->chunk_count * sizeof *spill->chunks +
				  spill->chunks_made * sizeof(struct chunk),
	};
}

/* What spill_is_valid adds up from the records, to compare with the counts that are kept. */
struct census {
	uint64_t empty, trimming, used, quarantined, live_units, live_count, chunks;
};

static bool record_is_valid(const struct chunk *chunk, uint64_t bit, struct census *census)
{
	const struct segment_record *record = &chunk->records[bit];
	bool free = chunk->free[bit / 64] >> (bit % 64) & 1;
	bool empty = chunk->empty[bit / 64] >> (bit % 64) & 1;
	bool live = record->state == SEGMENT_LIVE;

	census->empty += empty;
	census->trimming += record->state == SEGMENT_TRIMMING;
	census->used += state_is_used(record->state);
	census->quarantined += record->state == SEGMENT_QUARANTINED;
	census->live_units += record->live_units;
	census->live_count += record->live_count;
	return record->state <= SEGMENT_QUARANTINED && free == (record->state == SEGMENT_FREE) &&
	       empty == (record->state == SEGMENT_EMPTY) && live == (record->live_count > 0) &&
	       live == (record->live_units > 0) && record->live_count <= record->live_units &&
	       (!live || record->live_units + HEADER_UNITS <= record->end_unit) &&
	       record->end_unit < SEGMENT_UNITS && (live || !record->claimed);
}

static bool chunk_is_valid(const struct spill *spill, uint64_t index, struct census *census)
{
	const struct chunk *chunk = spill->chunks[index];
	uint64_t reusable = 0, empty = 0;

	for (uint64_t i = 0; i < CHUNK_WORDS; i++) {
		reusable |= chunk->free[i] | chunk->empty[i];
		empty |= chunk->empty[i];
	}
	for (uint64_t i = 0; i < chunk_segment_count(spill, index); i++)
		if (!record_is_valid(chunk, i, census))
			return false;
	for (uint64_t i = chunk_segment_count(spill, index); i < CHUNK_SEGMENTS; i++)
		if (chunk->free[i / 64] >> (i % 64) & 1 || chunk->records[i].state != SEGMENT_FREE)
			return false;
	census->chunks++;
	return (!reusable || spill->first_reusable <= index) &&
	       (!empty || spill->first_empty <= index);
}

bool spill_is_valid(struct spill *spill)
{
	SCOPED_LOCK(&spill->mutex);
	struct census census = { 0 };

	for (uint64_t i = 0; i < spill->chunk_count; i++) {
		if (!spill->chunks[i] && spill->first_reusable > i)
			return false;
		if (spill->chunks[i] && !chunk_is_valid(spill, i, &census))
			return false;
	}
	return census.empty == spill->empty_count && census.trimming == spill->trimming_count &&
	       census.used == spill->used_count && census.quarantined == spill->quarantined_count &&
	       census.live_units == spill->live_units && census.live_count == spill->live_count &&
	       census.chunks == spill->chunks_made;
}
