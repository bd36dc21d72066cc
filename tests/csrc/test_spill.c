/* SPDX-License-Identifier: MIT */
/*
 * spill against a model: random fills and frees with every extent read back, tables, trimming, a
 * full backend, write errors at every call, hostile bytes, flipped bits, double frees, two writers, a loop
 * device. Most of it once more on sealed backends, and what only they promise.
 *
 * Build: this file, csrc/spill.c, csrc/io.c, csrc/io_threads.c, csrc/fault_point.c, csrc/base.c,
 *        csrc/codec.c, csrc/seal.c, csrc/crash_point.c; -luring -llz4 -lzstd -lcrypto -pthread. With -DVSWAP_DEBUG -DVSWAP_FAULT_POINTS more is tried; run it under TSan
 *        too, for the writers.
 * Usage: test_spill [SEED [bench | dump PATH]]; dump leaves a backend for vswapd/spillfile.py.
 *        Files in $TMPDIR or /var/tmp, unlinked at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#include "base.h"
#include "codec.h"
#include "crash_point.h"
#include "fault_point.h"
#include "io.h"
#include "spill.h"

#define OBJECT_BYTES_MAX (POOL_UNITS_MAX * POOL_UNIT_BYTES)
#define SEGMENT_UNITS (SEGMENT_BYTES / POOL_UNIT_BYTES)
#define EXTENTS_MAX 40000u

static uint64_t seed_state;
static bool sealed; /* backends are made so from here on */

static unsigned seal_units(void)
{
	return sealed ? 1 : 0;
}

/* ---- files ---- */

static int file_create(void)
{
	const char *directory = getenv("TMPDIR");
	char path[4096];
	int fd;

	snprintf(path, sizeof path, "%s/vswap-spill-XXXXXX", directory ? directory : "/var/tmp");
	fd = mkostemp(path, O_CLOEXEC);
	CHECK(fd >= 0);
	unlink(path);
	return fd;
}

static struct spill *spill_open(int fd, uint64_t segments)
{
	static struct spill_lineage lineages[64];
	static unsigned count;
	struct spill_lineage *lineage = &lineages[count++ % 64];
	struct spill *spill;

	*lineage = (struct spill_lineage){ .is_sealed = sealed };
	CHECK(spill_create(fd, segments * SEGMENT_BYTES, sealed ? lineage : NULL, &spill) == 0);
	CHECK(spill_fd(spill) == fd && spill_is_sealed(spill) == sealed);
	return spill;
}

/* As a daemon after another: what that wrote can be opened. */
static struct spill *spill_open_again(int fd, uint64_t segments, struct spill_lineage *lineage)
{
	struct spill *spill;

	CHECK(spill_create(fd, segments * SEGMENT_BYTES, lineage, &spill) == 0);
	return spill;
}

static struct spill_statistics statistics_of(struct spill *spill)
{
	struct spill_statistics statistics;

	spill_statistics(spill, &statistics);
	return statistics;
}

/* ---- model: what is live ---- */

struct extent {
	uint64_t owner, extent;
	unsigned units;
};

struct model {
	struct spill *spill;
	uint64_t random, first_owner, next_owner;
	struct extent *extents; /* live */
	unsigned count;
	uint64_t live_units;
};

static struct model model_create(struct spill *spill, uint64_t first_owner)
{
	struct model model = {
		.spill = spill,
		.random = random_next(&seed_state),
		.first_owner = first_owner,
		.next_owner = first_owner,
		.extents = calloc(EXTENTS_MAX, sizeof *model.extents),
	};

	CHECK(model.extents);
	return model;
}

/* The bytes of an object follow from its owner's number. */
static void object_fill(uint64_t owner, unsigned units, uint8_t *object)
{
	uint64_t state = owner;

	for (unsigned i = 0; i < units * POOL_UNIT_BYTES; i += 8) {
		uint64_t word = random_next(&state);

		memcpy(object + i, &word, 8);
	}
}

static unsigned units_random(uint64_t *random)
{
	switch (random_below(random, 4)) {
	case 0:
		return POOL_UNITS_MAX;
	case 1:
		return 1 + random_below(random, 3);
	default:
		return 1 + random_below(random, POOL_UNITS_MAX);
	}
}

/* Put at most `max` random objects into a segment, without telling the model: how many. */
static unsigned segment_fill(struct model *model, struct spill_segment *segment, unsigned max)
{
	uint8_t object[OBJECT_BYTES_MAX];
	unsigned count = 0;

	while (count < max && model->count + count < EXTENTS_MAX) {
		struct extent *extent = &model->extents[model->count + count];
		int64_t place;

		extent->owner = model->next_owner;
		extent->units = units_random(&model->random);
		object_fill(extent->owner, extent->units, object);
		place = spill_segment_add(segment, extent->owner, object, extent->units);
		if (place == -ENOSPC)
			break;
		CHECK(place >= 0);
		extent->extent = (uint64_t)place;
		model->next_owner++;
		count++;
		CHECK(spill_segment_count(segment) == count);
	}
	return count;
}

static void model_add(struct model *model, unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		model->live_units += model->extents[model->count + i].units + seal_units();
	model->count += count;
}

/* Begin, fill and write a segment: 0 or what begin or write said. */
static int model_write(struct model *model, unsigned max)
{
	struct spill_segment *segment;
	int result = spill_segment_begin(model->spill, true, &segment);
	unsigned count;

	if (result < 0)
		return result;
	count = segment_fill(model, segment, max);
	result = spill_segment_write(segment);
	if (result == 0)
		model_add(model, count);
	return result;
}

static void model_forget(struct model *model, unsigned index)
{
	model->live_units -= model->extents[index].units + seal_units();
	model->extents[index] = model->extents[--model->count];
}

static void model_free(struct model *model, unsigned index)
{
	spill_free(model->spill, model->extents[index].extent, model->extents[index].units);
	model_forget(model, index);
}

static void model_free_all(struct model *model)
{
	while (model->count > 0)
		model_free(model, random_below(&model->random, model->count));
}

/* `bytes`: what was read, from the object's place on. */
static void extent_verify(struct spill *spill, const struct extent *extent, const uint8_t *bytes)
{
	uint8_t expected[OBJECT_BYTES_MAX], room[OBJECT_BYTES_MAX];
	const uint8_t *object;

	CHECK(spill_object_open(spill, extent->extent, extent->units, bytes, room, &object) == 0);
	CHECK(sealed == (object != bytes));
	object_fill(extent->owner, extent->units, expected);
	CHECK(memcmp(object, expected, extent->units * POOL_UNIT_BYTES) == 0);
}

static void model_read(struct model *model, unsigned index, void *buffer)
{
	const struct extent *extent = &model->extents[index];
	struct spill_range range = spill_range_of(model->spill, extent->extent, extent->units);
	int result;

	CHECK(range.offset_bytes % PAGE_BYTES == 0 && range.length_bytes % PAGE_BYTES == 0);
	CHECK(range.length_bytes <= 2 * PAGE_BYTES && range.object_bytes_in < PAGE_BYTES);
	result = io_read_wait(spill_fd(model->spill), buffer, range.length_bytes,
			      range.offset_bytes);
	CHECK(result == 0);
	spill_count_read(model->spill, range.length_bytes, result);
	extent_verify(model->spill, extent, (const uint8_t *)buffer + range.object_bytes_in);
}

/* All live extents through a queue, DEPTH at a time. */
static void model_read_all(struct model *model, enum io_backend backend)
{
	enum { DEPTH = 16 };
	struct io_completion completions[DEPTH];
	struct io_queue *queue;
	uint8_t *buffer = aligned_alloc(PAGE_BYTES, DEPTH * 2 * PAGE_BYTES);
	unsigned begun = 0, done = 0;
	unsigned index_of[DEPTH], free_slots[DEPTH], free_count = DEPTH;

	CHECK(io_queue_create(DEPTH, backend, &queue) == 0 && buffer);
	for (unsigned i = 0; i < DEPTH; i++)
		free_slots[i] = i;
	while (done < model->count) {
		unsigned count;

		while (begun < model->count && free_count > 0) {
			unsigned slot = free_slots[--free_count];
			struct spill_range range = spill_range_of(model->spill, model->extents[begun].extent,
								  model->extents[begun].units);

			index_of[slot] = begun++;
			CHECK(io_read(queue, spill_fd(model->spill), buffer + slot * 2 * PAGE_BYTES,
				      range.length_bytes, range.offset_bytes, slot) == 0);
		}
		count = io_wait(queue, completions, DEPTH);
		for (unsigned i = 0; i < count; i++, done++) {
			unsigned slot = (unsigned)completions[i].cookie;
			const struct extent *extent = &model->extents[index_of[slot]];
			struct spill_range range = spill_range_of(model->spill, extent->extent, extent->units);

			CHECK(completions[i].result == range.length_bytes);
			extent_verify(model->spill, extent,
				      buffer + slot * 2 * PAGE_BYTES + range.object_bytes_in);
			free_slots[free_count++] = slot;
		}
	}
	io_queue_destroy(queue);
	free(buffer);
}

/* The table of one LIVE segment, and every object in it. How many of them the model knows. */
static unsigned table_verify(struct model *model, uint64_t number, uint8_t *bytes,
			     const uint32_t *index_of)
{
	unsigned found = 0;
	int count, result = io_read_wait(spill_fd(model->spill), bytes, SEGMENT_BYTES,
					 number * SEGMENT_BYTES);

	CHECK(result == 0);
	count = spill_table_verify(model->spill, number, bytes);
	CHECK(count > 0);
	for (int i = 0; i < count; i++) {
		struct spill_entry entry = spill_table_entry(bytes, (unsigned)i);
		const struct extent *extent;

		extent_verify(model->spill, &(struct extent){ entry.owner, entry.extent, entry.units },
			      bytes + entry.object_bytes_in);
		if (index_of[entry.owner - model->first_owner] == 0)
			continue; /* freed */
		extent = &model->extents[index_of[entry.owner - model->first_owner] - 1];
		CHECK(extent->extent == entry.extent && extent->units == entry.units);
		found++;
	}
	return found;
}

/* Tables name every live extent; no LIVE segment is missed; what is mostly dead is sparse. */
static void model_verify_tables(struct model *model, uint64_t segment_count)
{
	uint64_t *live_units = calloc(segment_count, sizeof *live_units), live_bytes = 0;
	uint32_t *index_of = calloc(model->next_owner - model->first_owner + 1, sizeof *index_of);
	uint8_t *bytes = aligned_alloc(PAGE_BYTES, SEGMENT_BYTES);
	uint64_t sparse_count = spill_sparse_segments(model->spill, &live_bytes);
	unsigned found = 0;

	CHECK(live_units && index_of && bytes);
	for (unsigned i = 0; i < model->count; i++) {
		live_units[model->extents[i].extent / SEGMENT_UNITS] += model->extents[i].units + seal_units();
		index_of[model->extents[i].owner - model->first_owner] = i + 1;
	}
	for (int64_t number = 0; (number = spill_next_segment(model->spill, (uint64_t)number)) >= 0;
	     number++) {
		bool sparse = spill_is_sparse(model->spill, (uint64_t)number);

		CHECK(sparse || live_units[number] * 100 > SEGMENT_UNITS * 70);
		CHECK(!sparse || live_units[number] * 100 < SEGMENT_UNITS * 96);
		sparse_count -= sparse;
		live_bytes -= sparse ? live_units[number] * POOL_UNIT_BYTES : 0;
		found += table_verify(model, (uint64_t)number, bytes, index_of);
	}
	CHECK(found == model->count);
	CHECK(sparse_count == 0 && live_bytes == 0);
	free(live_units);
	free(index_of);
	free(bytes);
}

static void model_verify_sums(struct model *model)
{
	struct spill_statistics statistics = statistics_of(model->spill);

	CHECK(spill_is_valid(model->spill));
	CHECK(statistics.extent_count == model->count);
	CHECK(statistics.live_bytes == model->live_units * POOL_UNIT_BYTES);
	CHECK(statistics.used_bytes + statistics.untrimmed_bytes <= statistics.size_bytes);
	CHECK(statistics.used_bytes >= statistics.live_bytes);
}

/* ---- tests ---- */

static void test_random(int fd, enum io_backend backend)
{
	enum { SEGMENTS = 12, STEPS = 300 };
	struct spill *spill = spill_open(fd, SEGMENTS);
	struct model model = model_create(spill, 1);
	void *buffer = aligned_alloc(PAGE_BYTES, 2 * PAGE_BYTES);
	unsigned full = 0, written = 0;

	for (int step = 0; step < STEPS; step++) {
		int result = model_write(&model, random_below(&model.random, 2) ? EXTENTS_MAX : 20);

		CHECK(result == 0 || result == -ENOSPC);
		written += result == 0;
		full += result == -ENOSPC;
		for (unsigned i = 0; model.count > 0 && i < 20; i++)
			model_read(&model, random_below(&model.random, model.count), buffer);
		if (result == -ENOSPC || random_below(&model.random, 8) == 0) {
			unsigned keep = random_below(&model.random, model.count + 1);

			while (model.count > keep)
				model_free(&model, random_below(&model.random, model.count));
		}
		model_verify_sums(&model);
		if (step % 50 == 0) {
			model_read_all(&model, backend);
			model_verify_tables(&model, SEGMENTS);
		}
	}
	CHECK(written > SEGMENTS && full > 0);
	model_read_all(&model, backend);
	model_free_all(&model);
	model_verify_sums(&model);
	model_verify_tables(&model, SEGMENTS);
	CHECK(statistics_of(spill).used_bytes == 0);
	spill_trim_wait(spill);
	CHECK(statistics_of(spill).untrimmed_bytes == 0 && statistics_of(spill).trim_errors == 0);
	CHECK(spill_is_valid(spill));
	spill_destroy(spill);
	free(model.extents);
	free(buffer);
}

static void test_create(void)
{
	struct spill *spill;
	int pipe_fds[2], fd = file_create();

	CHECK(spill_create(-1, SEGMENT_BYTES, NULL, &spill) == -EBADF);
	CHECK(pipe(pipe_fds) == 0);
	CHECK(spill_create(pipe_fds[0], SEGMENT_BYTES, NULL, &spill) == -EINVAL);
	CHECK(spill_create(fd, SEGMENT_BYTES - 1, NULL, &spill) == -EINVAL);
	CHECK(fcntl(fd, F_GETFD) >= 0); /* still ours */
	CHECK(spill_create(fd, 2 * SEGMENT_BYTES + 4096, NULL, &spill) == 0);
	CHECK(statistics_of(spill).size_bytes == 2 * SEGMENT_BYTES);
	CHECK(spill_is_valid(spill));
	CHECK(spill_next_segment(spill, 0) == -ENOENT);
	CHECK(spill_next_segment(spill, 99999) == -ENOENT);
	spill_destroy(spill);
	CHECK(fcntl(fd, F_GETFD) < 0);
	spill_destroy(NULL);
	close(pipe_fds[0]);
	close(pipe_fds[1]);
}

/* Segments come lowest first, all of them, then -ENOSPC; what is given up comes back. */
static void test_full(void)
{
	enum { SEGMENTS = 5 };
	struct spill *spill = spill_open(file_create(), SEGMENTS);
	struct model model = model_create(spill, 1);
	struct spill_segment *segments[SEGMENTS], *none;

	for (unsigned i = 0; i < SEGMENTS; i++) {
		unsigned count;

		CHECK(spill_segment_begin(spill, true, &segments[i]) == 0);
		count = segment_fill(&model, segments[i], 1);
		CHECK(count == 1 && model.extents[0].extent == i * SEGMENT_UNITS + 1);
	}
	CHECK(spill_segment_begin(spill, true, &none) == -ENOSPC);
	CHECK(statistics_of(spill).used_bytes == SEGMENTS * SEGMENT_BYTES);
	CHECK(spill_is_valid(spill));
	spill_segment_abandon(segments[3]);
	spill_segment_abandon(segments[1]);
	CHECK(spill_segment_begin(spill, true, &segments[1]) == 0);
	CHECK(segment_fill(&model, segments[1], 1) == 1);
	CHECK(model.extents[0].extent == 1 * SEGMENT_UNITS + 1);
	for (unsigned i = 0; i < SEGMENTS; i++)
		if (i != 3)
			spill_segment_abandon(segments[i]);
	CHECK(spill_segment_begin(spill, true, &none) == 0);
	CHECK(spill_segment_write(none) == 0); /* empty: nothing is written */
	CHECK(statistics_of(spill).used_bytes == 0 && statistics_of(spill).written_bytes == 0);
	CHECK(statistics_of(spill).untrimmed_bytes == 0);
	CHECK(spill_is_valid(spill));
	spill_destroy(spill);
	free(model.extents);
}

/* Whoever compacts gets the last segments of all but a tiny backend; nobody else does. */
static void test_reserve(void)
{
	enum { SEGMENTS = 20, RESERVE = 2, TINY = 5 };
	struct spill *spill = spill_open(file_create(), SEGMENTS), *tiny = spill_open(file_create(), TINY);
	struct spill_segment *segments[SEGMENTS], *none;

	CHECK(spill_reserve_bytes(spill) == RESERVE * SEGMENT_BYTES);
	for (unsigned i = 0; i < SEGMENTS - RESERVE; i++)
		CHECK(spill_segment_begin(spill, false, &segments[i]) == 0);
	CHECK(spill_segment_begin(spill, false, &none) == -ENOSPC);
	for (unsigned i = SEGMENTS - RESERVE; i < SEGMENTS; i++)
		CHECK(spill_segment_begin(spill, true, &segments[i]) == 0);
	CHECK(spill_segment_begin(spill, true, &none) == -ENOSPC);
	spill_segment_abandon(segments[0]);
	CHECK(spill_segment_begin(spill, false, &none) == -ENOSPC);
	for (unsigned i = 1; i < SEGMENTS; i++)
		spill_segment_abandon(segments[i]);
	CHECK(spill_is_valid(spill));
	spill_destroy(spill);
	CHECK(spill_reserve_bytes(tiny) == 0);
	for (unsigned i = 0; i < TINY; i++)
		CHECK(spill_segment_begin(tiny, false, &segments[i]) == 0);
	for (unsigned i = 0; i < TINY; i++)
		spill_segment_abandon(segments[i]);
	spill_destroy(tiny);
}

/* The smallest objects fill a segment to the last byte that format allows. */
static void test_smallest(void)
{
	const unsigned extent_units = 1 + seal_units();
	const unsigned expected = (unsigned)((SEGMENT_BYTES - POOL_UNIT_BYTES) / (extent_units * POOL_UNIT_BYTES + 16));
	struct spill *spill = spill_open(file_create(), 1);
	uint8_t object[POOL_UNIT_BYTES], *bytes = aligned_alloc(PAGE_BYTES, SEGMENT_BYTES);
	struct spill_segment *segment;
	unsigned count = 0;

	CHECK(bytes && spill_segment_begin(spill, true, &segment) == 0);
	object_fill(count, 1, object);
	while (spill_segment_add(segment, count, object, 1) >= 0)
		object_fill(++count, 1, object);
	CHECK(count == expected);
	CHECK(spill_segment_write(segment) == 0);
	CHECK(io_read_wait(spill_fd(spill), bytes, SEGMENT_BYTES, 0) == 0);
	CHECK(spill_table_verify(spill, 0, bytes) == (int)count);
	for (unsigned i = 0; i < count; i++) {
		struct spill_entry entry = spill_table_entry(bytes, i);

		CHECK(entry.owner == i && entry.extent == i * extent_units + 1 && entry.units == 1);
		extent_verify(spill, &(struct extent){ i, entry.extent, 1 }, bytes + entry.object_bytes_in);
		spill_free(spill, entry.extent, 1);
	}
	CHECK(spill_is_valid(spill) && statistics_of(spill).used_bytes == 0);
	spill_destroy(spill);
	free(bytes);
}

/* More segments than one chunk of the table has; then holes in the middle are filled first. */
static void test_chunks(void)
{
	enum { SEGMENTS = 1100 };
	struct spill *spill = spill_open(file_create(), SEGMENTS);
	struct model model = model_create(spill, 1);
	uint64_t metadata_bytes = statistics_of(spill).metadata_bytes;

	for (unsigned i = 0; i < SEGMENTS; i++)
		CHECK(model_write(&model, 1) == 0);
	CHECK(model_write(&model, 1) == -ENOSPC);
	model_verify_sums(&model);
	CHECK(statistics_of(spill).metadata_bytes > metadata_bytes);
	CHECK(statistics_of(spill).used_bytes == SEGMENTS * SEGMENT_BYTES);
	for (unsigned i = 0; i < SEGMENTS; i++) /* one extent a segment, in order */
		CHECK(model.extents[i].extent == i * SEGMENT_UNITS + 1);
	model_free(&model, 1090);
	model_free(&model, 1030);
	CHECK(model_write(&model, 1) == 0 && model_write(&model, 1) == 0);
	CHECK(model.extents[model.count - 2].extent == 1030 * SEGMENT_UNITS + 1 ||
	      model.extents[model.count - 1].extent == 1030 * SEGMENT_UNITS + 1);
	model_read_all(&model, IO_AUTOMATIC);
	model_free_all(&model);
	spill_trim_wait(spill);
	model_verify_sums(&model);
	CHECK(statistics_of(spill).trimmed_bytes >= SEGMENTS * SEGMENT_BYTES);
	spill_destroy(spill);
	free(model.extents);
}

static uint64_t disk_bytes(int fd)
{
	struct stat status;

	CHECK(fstat(fd, &status) == 0);
	return (uint64_t)status.st_blocks * 512;
}

/* Nothing on disk before, little while half empty, nothing after. */
static void test_punch(void)
{
	enum { SEGMENTS = 8 };
	int fd = file_create();
	struct spill *spill = spill_open(fd, SEGMENTS);
	struct model model = model_create(spill, 1);

	CHECK(disk_bytes(fd) == 0);
	for (unsigned i = 0; i < SEGMENTS; i++)
		CHECK(model_write(&model, EXTENTS_MAX) == 0);
	CHECK(disk_bytes(fd) >= statistics_of(spill).live_bytes);
	for (unsigned i = model.count; i-- > 0;)
		if (model.extents[i].extent / SEGMENT_UNITS % 2)
			model_free(&model, i);
	spill_trim_wait(spill);
	CHECK(disk_bytes(fd) <= SEGMENTS / 2 * SEGMENT_BYTES + 65536);
	model_read_all(&model, IO_AUTOMATIC);
	model_free_all(&model);
	spill_trim_wait(spill);
	CHECK(disk_bytes(fd) <= 65536); /* a file system's own: extent tree, xattr */
	CHECK(statistics_of(spill).trimmed_bytes == SEGMENTS * SEGMENT_BYTES);
	spill_destroy(spill);
	free(model.extents);
}

#define DRAINED_SEGMENTS 8

/* A backend of which nothing lives any more, while it is drained. */
static struct spill *spill_drained(int fd)
{
	struct spill *spill = spill_open(fd, DRAINED_SEGMENTS);
	struct model model = model_create(spill, 1);

	for (unsigned i = 0; i < DRAINED_SEGMENTS; i++)
		CHECK(model_write(&model, EXTENTS_MAX) == 0);
	spill_set_draining(spill, true);
	model_free_all(&model);
	free(model.extents);
	return spill;
}

/* On a disk the blocks stay until a drain has ended; what is RAM goes back meanwhile, and to whoever waits. */
static void test_draining(void)
{
	const uint64_t bytes = DRAINED_SEGMENTS * SEGMENT_BYTES;
	int memory = memfd_create("spill", MFD_CLOEXEC);
	struct spill *spill = spill_drained(file_create());

	usleep(300000); /* it would have been done by now */
	CHECK(statistics_of(spill).trimmed_bytes == 0 && statistics_of(spill).untrimmed_bytes == bytes);
	spill_set_draining(spill, false);
	while (statistics_of(spill).trimmed_bytes < bytes)
		usleep(1000);
	spill_destroy(spill);
	spill = spill_drained(file_create());
	spill_trim_wait(spill);
	CHECK(statistics_of(spill).trimmed_bytes == bytes);
	spill_destroy(spill);
	CHECK(memory >= 0);
	spill = spill_drained(memory);
	while (statistics_of(spill).trimmed_bytes < bytes)
		usleep(1000);
	spill_destroy(spill);
}

/* A file that may not become so long is refused when the backend is made, not at some write. */
static void test_file_limit(void)
{
	struct rlimit before, limit;
	struct spill *spill;
	int fd = file_create();

	signal(SIGXFSZ, SIG_IGN);
	CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
	limit = before;
	limit.rlim_cur = 2 * SEGMENT_BYTES;
	CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
	CHECK(spill_create(fd, 4 * SEGMENT_BYTES, NULL, &spill) == -EFBIG);
	CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
	close(fd);
}

/* ---- hostile bytes ---- */

/* Verifying opens a sealed table in place. */
static int table_verify_copy(struct spill *spill, uint64_t number, const uint8_t *bytes, uint8_t *copy)
{
	memcpy(copy, bytes, SEGMENT_BYTES);
	return spill_table_verify(spill, number, copy);
}

static void test_hostile(void)
{
	struct spill *spill = spill_open(file_create(), 2);
	struct model model = model_create(spill, 1);
	uint8_t *bytes = aligned_alloc(PAGE_BYTES, SEGMENT_BYTES), *damaged = malloc(SEGMENT_BYTES);
	uint32_t used, table;

	CHECK(bytes && damaged);
	CHECK(model_write(&model, 200) == 0 && model_write(&model, 200) == 0);
	CHECK(io_read_wait(spill_fd(spill), bytes, SEGMENT_BYTES, 0) == 0);
	CHECK(table_verify_copy(spill, 0, bytes, damaged) == 200);
	CHECK(table_verify_copy(spill, 1, bytes, damaged) == -EBADMSG); /* misdirected */
	memcpy(&used, bytes + 20, 4);
	memcpy(&table, bytes + 40, 4);
	CHECK(used == table + 200 * 16);
	for (int i = 0; i < 3000; i++) {
		unsigned at = random_below(&seed_state, 64 + 200 * 16);
		uint8_t flip = (uint8_t)(1u << random_below(&seed_state, 8));

		memcpy(damaged, bytes, SEGMENT_BYTES);
		if (sealed && at >= 24 && at < 32)
			continue; /* what is for spillfile.py: the tag says all that and more */
		damaged[at < 64 ? at : table + at - 64] ^= flip;
		CHECK(spill_table_verify(spill, 0, damaged) == -EBADMSG);
	}
	for (int i = 0; i < 300; i++) { /* sound but for wild numbers in the header */
		memcpy(damaged, bytes, SEGMENT_BYTES);
		for (unsigned at = 16; at < 64; at += 4)
			if (!(sealed && at >= 24 && at < 32) && random_below(&seed_state, 3) == 0) {
				uint32_t word = (uint32_t)random_next(&seed_state) >>
						random_below(&seed_state, 32);

				memcpy(damaged + at, &word, 4);
			}
		if (memcmp(damaged, bytes, 64) != 0)
			CHECK(spill_table_verify(spill, 0, damaged) == -EBADMSG);
	}
	/* What this place held before is no table of what it holds now. */
	model_free_all(&model);
	CHECK(table_verify_copy(spill, 0, bytes, damaged) == -EBADMSG);
	spill_trim_wait(spill); /* else the next one may begin elsewhere */
	CHECK(model_write(&model, 200) == 0 && model.extents[0].extent == 1);
	CHECK(table_verify_copy(spill, 0, bytes, damaged) == -EBADMSG);
	spill_destroy(spill);
	free(model.extents);
	free(bytes);
	free(damaged);
}

/* ---- flipped bits ---- */

#define FLIPS 10000
#define FLIP_PAGES 150

/* From a few words to noise. */
static void page_fill(unsigned number, uint64_t *words)
{
	uint64_t state = number;

	for (unsigned i = 0; i < PAGE_BYTES / 8; i++) {
		uint64_t word = random_next(&state);

		words[i] = number % 5 == 4 ? word : word >> (16 + 8 * (number % 5));
	}
}

static void bit_flip(int fd, uint64_t bit)
{
	uint8_t byte;

	CHECK(pread(fd, &byte, 1, (off_t)(bit / 8)) == 1);
	byte ^= (uint8_t)(1u << bit % 8);
	CHECK(pwrite(fd, &byte, 1, (off_t)(bit / 8)) == 1);
}

/*
 * One bit of the storage at a time: reading the page back as fill.c does it fails, or a decoder did not use the
 * bit and the page is right. Never another page. A sealed one fails whatever the bit was.
 */
static void test_flips(void)
{
	static uint64_t page[PAGE_BYTES / 8], want[PAGE_BYTES / 8];
	int fd = file_create(), buffered;
	struct spill *spill = spill_open(fd, 1);
	struct codec_scratch *scratch = codec_scratch_create();
	struct extent extents[FLIP_PAGES];
	uint8_t *buffer = aligned_alloc(PAGE_BYTES, 2 * PAGE_BYTES), object[OBJECT_BYTES_MAX], room[OBJECT_BYTES_MAX];
	uint8_t secret[CODEC_SECRET_BYTES];
	struct spill_segment *segment;
	unsigned refused = 0;
	char path[64];

	for (unsigned i = 0; i < sizeof secret; i++)
		secret[i] = (uint8_t)random_next(&seed_state);
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	buffered = open(path, O_RDWR | O_CLOEXEC); /* the spill's own is O_DIRECT */
	CHECK(buffered >= 0 && scratch && buffer && spill_segment_begin(spill, true, &segment) == 0);
	for (unsigned i = 0; i < FLIP_PAGES; i++) {
		int64_t place;

		page_fill(i, page);
		extents[i].units = codec_compress(scratch, i % 2 ? CODEC_ZSTD : CODEC_LZ4, page, object);
		place = spill_segment_add(segment, i, object, extents[i].units);
		CHECK(place >= 0);
		extents[i].extent = (uint64_t)place;
	}
	CHECK(spill_segment_write(segment) == 0);
	for (unsigned i = 0; i < FLIPS; i++) {
		unsigned n = random_below(&seed_state, FLIP_PAGES), units = extents[n].units;
		struct spill_range range = spill_range_of(spill, extents[n].extent, units);
		uint64_t bit = extents[n].extent * POOL_UNIT_BYTES * 8 +
			       random_below(&seed_state, (units + seal_units()) * (unsigned)POOL_UNIT_BYTES * 8);
		const uint8_t *read;

		page_fill(n, want);
		bit_flip(buffered, bit);
		CHECK(io_read_wait(fd, buffer, range.length_bytes, range.offset_bytes) == 0);
		if (spill_object_open(spill, extents[n].extent, units, buffer + range.object_bytes_in, room, &read) < 0 ||
		    codec_expand(read, units, page) < 0 ||
		    codec_check(page, secret) != codec_check(want, secret))
			refused++;
		else
			CHECK(memcmp(page, want, PAGE_BYTES) == 0);
		bit_flip(buffered, bit);
	}
	CHECK(refused > FLIPS / 100 * 90 && (!sealed || refused == FLIPS));
	printf("%u flipped bits: %u pages refused, %u right all the same\n", FLIPS, refused, FLIPS - refused);
	close(buffered);
	codec_scratch_destroy(scratch);
	free(buffer);
	spill_destroy(spill);
}

/* ---- recovery, and the end ---- */

static bool is_hole(int fd, uint64_t segment)
{
	off_t start = (off_t)(segment * SEGMENT_BYTES), data = lseek(fd, start, SEEK_DATA);

	return data < 0 || data >= start + (off_t)SEGMENT_BYTES;
}

/* A successor on the same file, with nothing but the places of the live extents. */
static void test_claims(void)
{
	enum { SEGMENTS = 5 };
	int fd = file_create(), again = dup(fd);
	struct spill_lineage lineage = { .is_sealed = sealed };
	struct model model = model_create(spill_open_again(fd, SEGMENTS, &lineage), 1);
	uint64_t dead_segment, end;

	for (int i = 0; i < SEGMENTS - 1; i++)
		CHECK(model_write(&model, EXTENTS_MAX) == 0);
	dead_segment = model.extents[0].extent / SEGMENT_UNITS;
	for (unsigned i = model.count; i-- > 0;) /* its blocks are left behind, as by a daemon that died */
		if (model.extents[i].extent / SEGMENT_UNITS != dead_segment && random_below(&model.random, 3))
			model_free(&model, i);
	spill_destroy(model.spill);
	model.spill = spill_open_again(again, SEGMENTS, &lineage);
	end = SEGMENTS * SEGMENT_UNITS;
	CHECK(spill_claim(model.spill, end + 1, 1) == -EINVAL);
	CHECK(spill_claim(model.spill, 0, 1) == -EINVAL); /* the header */
	CHECK(spill_claim(model.spill, end - 1, 1) == -EINVAL); /* nothing is left for the table */
	CHECK(spill_claim(model.spill, SEGMENT_UNITS - 1, 2) == -EINVAL);
	CHECK(spill_claim(model.spill, 1, 0) == -EINVAL);
	CHECK(spill_claim(model.spill, 1, POOL_UNITS_MAX + 1) == -EINVAL);
	for (unsigned i = model.count; i-- > 0;) {
		struct extent extent = model.extents[i];

		if (extent.extent / SEGMENT_UNITS == dead_segment) {
			model_forget(&model, i);
			continue;
		}
		CHECK(spill_claim(model.spill, extent.extent, extent.units) == 0);
		CHECK(spill_claim(model.spill, extent.extent + extent.units - 1, 1) == -EINVAL);
	}
	spill_claims_end(model.spill);
	CHECK(spill_claim(model.spill, dead_segment * SEGMENT_UNITS + 1, 1) == -EINVAL);
	model_verify_sums(&model);
	model_read_all(&model, IO_AUTOMATIC);
	for (int64_t number = 0; (number = spill_next_segment(model.spill, (uint64_t)number)) >= 0; number++) {
		uint8_t *bytes = aligned_alloc(PAGE_BYTES, SEGMENT_BYTES);

		CHECK(bytes && io_read_wait(again, bytes, SEGMENT_BYTES, (uint64_t)number * SEGMENT_BYTES) == 0);
		CHECK(spill_table_verify(model.spill, (uint64_t)number, bytes) > 0); /* whoever wrote it */
		free(bytes);
	}
	spill_trim_wait(model.spill);
	CHECK(is_hole(again, dead_segment) && is_hole(again, SEGMENTS - 1));
	CHECK(model_write(&model, EXTENTS_MAX) == 0);
	model_read_all(&model, IO_AUTOMATIC);
	model_free_all(&model);
	model_verify_sums(&model);
	spill_destroy(model.spill);
	free(model.extents);
}

/* What nobody claimed is filled only when a trim of it has returned. */
static void test_unclaimed(void)
{
	enum { SEGMENTS = 40 };
	int fd = file_create(), again = dup(fd);
	uint8_t *bytes = aligned_alloc(PAGE_BYTES, SEGMENT_BYTES);
	struct spill_segment *segments[SEGMENTS];
	struct spill *spill = spill_open(fd, SEGMENTS);

	CHECK(bytes);
	memset(bytes, 0x5a, SEGMENT_BYTES);
	for (uint64_t i = 0; i < SEGMENTS; i++)
		CHECK(io_write_wait(fd, bytes, SEGMENT_BYTES, i * SEGMENT_BYTES) == 0);
	spill_destroy(spill);
	spill = spill_open(again, SEGMENTS);
	spill_claims_end(spill);
	for (uint64_t i = 0; i < SEGMENTS; i++) {
		CHECK(spill_segment_begin(spill, true, &segments[i]) == 0);
		CHECK(is_hole(again, i));
	}
	for (unsigned i = 0; i < SEGMENTS; i++)
		spill_segment_abandon(segments[i]);
	CHECK(spill_is_valid(spill));
	spill_destroy(spill);
	free(bytes);
}

static void test_erase(void)
{
	int fd = file_create(), again = dup(fd);
	struct model model = model_create(spill_open(fd, 4), 1);
	struct stat status;

	spill_keep_blocks(model.spill);
	CHECK(model_write(&model, 200) == 0);
	model_free_all(&model);
	CHECK(statistics_of(model.spill).untrimmed_bytes == 0); /* nobody is going to */
	CHECK(fstat(again, &status) == 0 && status.st_blocks > 0);
	CHECK(spill_erase(model.spill) == 0);
	spill_destroy(model.spill);
	CHECK(fstat(again, &status) == 0 && status.st_size == 0 && status.st_blocks == 0);
	close(again);
	free(model.extents);
}

/* ---- misuse ends the process ---- */

enum misuse {
	FREE_TWICE,
	FREE_OUTSIDE,
	FREE_HEADER,
	FREE_EMPTY,
	FREE_FILLING,
	FREE_TOO_MUCH,
	MISUSES,
};

static void misuse_do(enum misuse misuse)
{
	struct spill *spill = spill_open(file_create(), 4);
	uint8_t object[OBJECT_BYTES_MAX] = { 0 };
	struct spill_segment *segment;
	uint64_t extents[3];

	CHECK(spill_segment_begin(spill, true, &segment) == 0);
	for (unsigned i = 0; i < 3; i++)
		extents[i] = (uint64_t)spill_segment_add(segment, i, object, 2);
	if (misuse == FREE_FILLING)
		spill_free(spill, extents[0], 2);
	CHECK(spill_segment_write(segment) == 0);
	if (misuse == FREE_OUTSIDE)
		spill_free(spill, extents[2], 3);
	if (misuse == FREE_HEADER)
		spill_free(spill, 0, 2);
	if (misuse == FREE_EMPTY)
		spill_free(spill, SEGMENT_UNITS + 1, 2);
	if (misuse == FREE_TOO_MUCH) { /* the sums: no bitmap needed */
		spill_free(spill, extents[0], 4);
		spill_free(spill, extents[0], 4);
	}
	if (misuse == FREE_TWICE) {
		spill_free(spill, extents[1], 2);
		spill_free(spill, extents[1], 2);
#ifndef VSWAP_DEBUG
		spill_free(spill, extents[0], 2);
		spill_free(spill, extents[2], 2); /* here at the latest */
#endif
	}
}

static void test_misuse(void)
{
	fflush(NULL);
	for (int misuse = 0; misuse < MISUSES; misuse++) {
		pid_t pid = fork();
		int status;

		CHECK(pid >= 0);
		if (pid == 0) {
			struct rlimit none = { 0, 0 };

			setrlimit(RLIMIT_CORE, &none);
			signal(SIGABRT, SIG_DFL);
			CHECK(freopen("/dev/null", "w", stderr));
			misuse_do((enum misuse)misuse);
			_exit(0);
		}
		CHECK(waitpid(pid, &status, 0) == pid);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
	}
}

/* ---- fault points ---- */

#ifdef VSWAP_FAULT_POINTS

static void test_quarantine(void)
{
	struct spill *spill = spill_open(file_create(), 2);
	struct model model = model_create(spill, 1);

	fault_point_clear();
	fault_point_set("io/write", 1, EIO, false);
	CHECK(model_write(&model, 100) == -EIO);
	CHECK(model.count == 0 && statistics_of(spill).write_errors == 1);
	CHECK(statistics_of(spill).quarantined_bytes == SEGMENT_BYTES);
	CHECK(statistics_of(spill).used_bytes == SEGMENT_BYTES);
	CHECK(spill_next_segment(spill, 0) == -ENOENT);
	model_verify_sums(&model);
	CHECK(model_write(&model, 100) == 0); /* in the other one */
	CHECK(model.extents[0].extent / SEGMENT_UNITS == 1);
	CHECK(model_write(&model, 100) == -ENOSPC);
	model_free_all(&model);
	spill_trim_wait(spill);
	CHECK(model_write(&model, 100) == 0 && model.extents[0].extent / SEGMENT_UNITS == 1);
	model_read_all(&model, IO_AUTOMATIC);
	model_verify_sums(&model);
	spill_destroy(spill);
	free(model.extents);
}

/* No room on the file system, at allocation or at the write: not even the segment is lost. */
static void test_no_room(const char *name)
{
	struct spill *spill = spill_open(file_create(), 2);
	struct model model = model_create(spill, 1);

	fault_point_clear();
	fault_point_set(name, 1, ENOSPC, true);
	for (int i = 0; i < 5; i++)
		CHECK(model_write(&model, 100) == -ENOSPC);
	CHECK(statistics_of(spill).write_errors == 5 && statistics_of(spill).used_bytes == 0);
	model_verify_sums(&model);
	fault_point_clear();
	CHECK(model_write(&model, 100) == 0 && model_write(&model, 100) == 0);
	model_read_all(&model, IO_AUTOMATIC);
	model_verify_sums(&model);
	spill_destroy(spill);
	free(model.extents);
}

/* A file system that refuses O_DIRECT only when it is used: buffered from then on. */
static void test_direct_refused(void)
{
	int fd = file_create();
	struct spill *spill = spill_open(fd, 2);
	struct model model = model_create(spill, 1);

	fault_point_clear();
	fault_point_set("io/write", 1, EINVAL, false);
	CHECK(model_write(&model, 100) == 0 && statistics_of(spill).write_errors == 0);
	CHECK((fcntl(fd, F_GETFL) & O_DIRECT) == 0);
	model_read_all(&model, IO_AUTOMATIC);
	spill_destroy(spill);
	free(model.extents);
}

/* A backend's life with `name` failing at call n: what was written is right, failures are told. */
static bool life_with_fault(const char *name, uint64_t n, int error, bool persistent)
{
	enum { SEGMENTS = 6, ROUNDS = 8 };
	struct spill *spill = spill_open(file_create(), SEGMENTS);
	struct model model = model_create(spill, 1);
	bool hit;

	fault_point_clear();
	fault_point_set(name, n, error, persistent);
	for (int i = 0; i < ROUNDS; i++) {
		int result = model_write(&model, 50);

		CHECK(result == 0 || result == -error || result == -ENOSPC);
		model_verify_sums(&model);
		if (result == -ENOSPC || i % 3 == 2)
			model_free_all(&model);
		model_read_all(&model, IO_THREADS);
	}
	model_free_all(&model);
	spill_trim_wait(spill);
	model_verify_sums(&model);
	hit = fault_point_hits(name) > 0;
	fault_point_clear();
	spill_destroy(spill);
	free(model.extents);
	return hit;
}

static void test_faults(void)
{
	static const struct {
		const char *name;
		int error;
	} cases[] = {
		{ "io/write", EIO },          { "io/write", EINTR },
		{ "io/write", ENOSPC },       { "io/write", EINVAL },
		{ "spill/allocate", ENOSPC }, { "spill/allocate", EOPNOTSUPP },
		{ "spill/allocate", EIO },    { "spill/punch", EIO },
		{ "spill/punch", EOPNOTSUPP },
		{ "seal/encrypt", ENOMEM }, /* last: only of sealed ones */
	};

	for (unsigned i = 0; i < sizeof cases / sizeof *cases - !sealed; i++) {
		uint64_t n = 1;

		while (life_with_fault(cases[i].name, n, cases[i].error, false)) {
			n += strcmp(cases[i].name, "seal/encrypt") == 0 ? n / 2 + 1 : 1; /* that one for each object */
			CHECK(n < 100000);
		}
		CHECK(n > 1);
		if (cases[i].error != EINTR)
			CHECK(life_with_fault(cases[i].name, 1, cases[i].error, true));
	}
	test_quarantine();
	test_direct_refused();
	test_no_room("io/write");
	test_no_room("spill/allocate");
	fault_point_clear();
}

#else

static void test_faults(void)
{
	printf("skip: fault points are not built in\n");
}

#endif

/* ---- two writers, and a reader who also frees ---- */

struct writer {
	struct model model;
	pthread_t thread;
	unsigned rounds, full;
};

static void *writer_main(void *argument)
{
	struct writer *writer = argument;
	struct model *model = &writer->model;
	void *buffer = aligned_alloc(PAGE_BYTES, 2 * PAGE_BYTES);

	CHECK(buffer);
	for (unsigned i = 0; i < writer->rounds; i++) {
		int result = model_write(model, 100);
		uint64_t live_bytes;

		CHECK(result == 0 || result == -ENOSPC);
		writer->full += result == -ENOSPC;
		for (unsigned j = 0; model->count > 0 && j < 10; j++)
			model_read(model, random_below(&model->random, model->count), buffer);
		for (unsigned j = 0; model->count > 0 && j < (result < 0 ? 2000u : 60u); j++)
			model_free(model, random_below(&model->random, model->count));
		(void)spill_sparse_segments(model->spill, &live_bytes);
		CHECK(spill_is_valid(model->spill));
	}
	free(buffer);
	return NULL;
}

static void test_writers(void)
{
	enum { WRITERS = 2 };
	struct spill *spill = spill_open(file_create(), 10);
	struct writer writers[WRITERS];

	for (unsigned i = 0; i < WRITERS; i++) {
		writers[i] = (struct writer){ .rounds = 200 };
		writers[i].model = model_create(spill, (uint64_t)i << 32);
	}
	for (unsigned i = 0; i < WRITERS; i++)
		CHECK(pthread_create(&writers[i].thread, NULL, writer_main, &writers[i]) == 0);
	for (unsigned i = 0; i < WRITERS; i++)
		pthread_join(writers[i].thread, NULL);
	for (unsigned i = 0; i < WRITERS; i++)
		model_read_all(&writers[i].model, IO_AUTOMATIC);
	CHECK(statistics_of(spill).extent_count == writers[0].model.count + writers[1].model.count);
	for (unsigned i = 0; i < WRITERS; i++) {
		model_free_all(&writers[i].model);
		free(writers[i].model.extents);
	}
	spill_trim_wait(spill);
	CHECK(spill_is_valid(spill) && statistics_of(spill).used_bytes == 0);
	spill_destroy(spill);
}

/* ---- a block device ---- */

/* A loop device on an unlinked file, or -1. The kernel detaches it at the last close. */
static int loop_open(int file)
{
	struct loop_config config = {
		.fd = (uint32_t)file,
		.block_size = 4096,
		.info.lo_flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
	};
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);

	for (int tries = 0; control >= 0 && tries < 8; tries++) {
		char path[32];
		int number = ioctl(control, LOOP_CTL_GET_FREE), fd;

		if (number < 0)
			break;
		snprintf(path, sizeof path, "/dev/loop%d", number);
		fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd < 0)
			break;
		if (ioctl(fd, LOOP_CONFIGURE, &config) == 0) {
			close(control);
			return fd;
		}
		close(fd); /* someone else was first */
	}
	if (control >= 0)
		close(control);
	return -1;
}

static void test_device(void)
{
	enum { SEGMENTS = 12 };
	int file = file_create(), fd;
	struct spill *spill;
	struct model model;

	CHECK(ftruncate(file, (off_t)(SEGMENTS * SEGMENT_BYTES + 8192)) == 0);
	fd = loop_open(file);
	if (fd < 0) {
		printf("skip: no loop device here (%s)\n", strerror(errno));
		close(file);
		return;
	}
	spill = spill_open(fd, SEGMENTS * 100); /* no more than the device has */
	CHECK(statistics_of(spill).size_bytes == SEGMENTS * SEGMENT_BYTES);
	model = model_create(spill, 1);
	for (unsigned i = 0; i < SEGMENTS; i++)
		CHECK(model_write(&model, EXTENTS_MAX) == 0);
	CHECK(model_write(&model, 1) == -ENOSPC);
	model_read_all(&model, IO_AUTOMATIC);
	model_free_all(&model);
	spill_trim_wait(spill);
	model_verify_sums(&model);
	CHECK(statistics_of(spill).trim_errors <= 1);
	if (statistics_of(spill).trim_errors == 0)
		CHECK(disk_bytes(file) <= 65536);
	else
		printf("skip: the loop device does not discard\n");
	free(model.extents);
	spill_destroy(spill);
	fd = loop_open(file);
	CHECK(fd >= 0);
	test_random(fd, IO_AUTOMATIC);
	close(file);
}

/* ---- what only sealed backends promise; `sealed` is set ---- */

/* Nothing that was put in is on the disk, neither objects nor owners. */
static void test_ciphertext(void)
{
	int fd = file_create();
	struct spill_lineage lineage = { .is_sealed = 1 }, zero = { 0 };
	struct model model = model_create(spill_open_again(fd, 2, &lineage), 0x1122334455667700);
	uint8_t *bytes = aligned_alloc(PAGE_BYTES, SEGMENT_BYTES), object[OBJECT_BYTES_MAX];

	CHECK(bytes && model_write(&model, EXTENTS_MAX) == 0);
	CHECK(io_read_wait(fd, bytes, SEGMENT_BYTES, 0) == 0);
	CHECK(!memmem(bytes, SEGMENT_BYTES, "\x66\x55\x44\x33\x22\x11", 6)); /* the upper bytes of every owner */
	CHECK(!memmem(bytes, SEGMENT_BYTES, lineage.key, 8) && memcmp(lineage.key, zero.key, SEAL_KEY_BYTES) != 0);
	for (unsigned i = 0; i < model.count; i++) {
		object_fill(model.extents[i].owner, 1, object);
		for (unsigned k = 0; k < POOL_UNIT_BYTES; k += 8)
			CHECK(!memmem(bytes, SEGMENT_BYTES, object + k, 8));
	}
	model_free_all(&model);
	spill_destroy(model.spill);
	spill_lineage_wipe(&lineage);
	CHECK(memcmp(&lineage, &zero, sizeof zero) == 0);
	free(model.extents);
	free(bytes);
}

static int object_open_at(struct spill *spill, uint64_t extent, unsigned units, const uint8_t *bytes)
{
	uint8_t room[OBJECT_BYTES_MAX];
	const uint8_t *object;

	return spill_object_open(spill, extent, units, bytes, room, &object);
}

/* Bytes of another place, size, backend or key are not taken for those that belong there. */
static void test_places(void)
{
	int fd = file_create(), other_fd = file_create();
	struct spill *spill = spill_open(fd, 2), *other = spill_open(other_fd, 2);
	struct model model = model_create(spill, 1), copies = model_create(other, 1);
	uint8_t *bytes = aligned_alloc(PAGE_BYTES, SEGMENT_BYTES), *copy = malloc(SEGMENT_BYTES);

	CHECK(bytes && copy && model_write(&model, 300) == 0 && model_write(&model, 300) == 0);
	CHECK(model_write(&copies, 300) == 0);
	CHECK(io_read_wait(fd, bytes, SEGMENT_BYTES, 0) == 0);
	for (unsigned i = 0; i < 300; i++) {
		const struct extent *extent = &model.extents[i], *next = &model.extents[i + 1];
		const uint8_t *object = bytes + extent->extent * POOL_UNIT_BYTES;

		CHECK(object_open_at(spill, extent->extent, extent->units, object) == 0);
		CHECK(object_open_at(other, extent->extent, extent->units, object) == -EBADMSG);
		CHECK(object_open_at(spill, extent->extent + SEGMENT_UNITS, extent->units, object) == -EBADMSG);
		if (extent->units > 1)
			CHECK(object_open_at(spill, extent->extent, extent->units - 1, object) == -EBADMSG);
		if (i < 299 && next->units == extent->units)
			CHECK(object_open_at(spill, next->extent, next->units, object) == -EBADMSG);
	}
	CHECK(table_verify_copy(other, 0, bytes, copy) == -EBADMSG);
	memcpy(bytes + 32, "another!", 8); /* even if its identity were right */
	CHECK(table_verify_copy(spill, 0, bytes, copy) == -EBADMSG);
	model_free_all(&model);
	model_free_all(&copies);
	spill_destroy(spill);
	spill_destroy(other);
	free(model.extents);
	free(copies.extents);
	free(bytes);
	free(copy);
}

#define GENERATIONS_SEGMENTS 16

/* One daemon: takes over what is live, writes, frees some, and dies: `how` says where. */
static void generations_life(int fd, struct spill_lineage *lineage, struct model *model, unsigned how)
{
	struct spill *spill = spill_open_again(dup(fd), GENERATIONS_SEGMENTS, lineage);
	struct spill_segment *segment;

	model->spill = spill;
	model->random += how; /* else each child would do what the one before did */
	for (unsigned i = 0; i < model->count; i++)
		CHECK(spill_claim(spill, model->extents[i].extent, model->extents[i].units) == 0);
	spill_claims_end(spill);
	model_read_all(model, IO_AUTOMATIC);
	for (unsigned i = 0; i < 2 + how % 3; i++)
		CHECK(model_write(model, 50) == 0);
	while (model->count > 5)
		model_free(model, random_below(&model->random, model->count));
	if (how % 4 == 0) { /* collected, no number yet */
		CHECK(spill_segment_begin(spill, true, &segment) == 0);
		(void)segment_fill(model, segment, 50);
		_exit(0);
	}
	if (how % 4 == 1)
		_exit(0);
#ifdef VSWAP_FAULT_POINTS
	if (how % 4 == 2)
		(void)crash_point_arm("SEGMENT_NUMBERED", 1);
#endif
	struct rlimit limit = { SEGMENT_BYTES / 4, SEGMENT_BYTES / 4 };

	signal(SIGXFSZ, SIG_DFL); /* how 3: a write that reaches the disk in part, and kills */
	if (how % 4 == 3)
		(void)setrlimit(RLIMIT_FSIZE, &limit);
	(void)model_write(model, EXTENTS_MAX);
	_exit(0);
}

/*
 * The number that a nonce is made of is used once, whatever the daemons die of: no two segments that are ever seen on
 * the disk have it in common, unless they are the same segment.
 */
static void test_generations(void)
{
	enum { LIVES = 60, SEEN_MAX = 4096 };
	struct { uint64_t generation, digest; } *seen = calloc(SEEN_MAX, sizeof *seen);
	struct spill_lineage *lineage = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct model *model = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	size_t extents_bytes = EXTENTS_MAX * sizeof *model->extents;
	uint8_t *bytes = aligned_alloc(PAGE_BYTES, SEGMENT_BYTES);
	unsigned seen_count = 0;
	int fd = file_create();

	CHECK(seen && bytes && lineage != MAP_FAILED && model != MAP_FAILED);
	lineage->is_sealed = 1;
	*model = (struct model){ .random = random_next(&seed_state), .first_owner = 1, .next_owner = 1 };
	model->extents = mmap(NULL, extents_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(model->extents != MAP_FAILED);
	for (unsigned life = 0; life < LIVES; life++) {
		pid_t child;

		fflush(NULL);
		child = fork();
		if (child == 0)
			generations_life(fd, lineage, model, life);
		CHECK(child > 0 && waitpid(child, NULL, 0) == child);
		for (uint64_t number = 0; number < GENERATIONS_SEGMENTS; number++) {
			uint64_t generation, digest = 1;
			unsigned i = 0;

			if (pread(fd, bytes, SEGMENT_BYTES, (off_t)(number * SEGMENT_BYTES)) < 64 || memcmp(bytes, "VSWPSEAL", 8) != 0)
				continue;
			memcpy(&generation, bytes + 8, 8);
			for (unsigned k = 0; k < PAGE_BYTES; k += 8) { /* the first page: header, and 63 units of ciphertext */
				uint64_t word;

				memcpy(&word, bytes + k, 8);
				digest = (digest ^ word) * 0x9e3779b97f4a7c15;
			}
			while (i < seen_count && seen[i].generation != generation)
				i++;
			CHECK(i < SEEN_MAX && generation <= lineage->generation);
			CHECK(i == seen_count || seen[i].digest == digest);
			seen[i].generation = generation;
			seen[i].digest = digest;
			seen_count += i == seen_count;
		}
	}
	printf("%u deaths: %u segments seen, %lu begun, each under a number of its own\n", LIVES, seen_count, lineage->generation);
	CHECK(seen_count > LIVES);
	munmap(model->extents, extents_bytes);
	munmap(model, PAGE_BYTES);
	munmap(lineage, PAGE_BYTES);
	free(seen);
	free(bytes);
	close(fd);
}

/* ---- bench, dump ---- */

static void bench(void)
{
	enum { SEGMENTS = 512 };
	struct spill *spill = spill_open(file_create(), SEGMENTS);
	static uint8_t object[OBJECT_BYTES_MAX];
	uint64_t fill_ns = 0, write_ns = 0, free_ns, objects = 0, bytes;

	object_fill(1, POOL_UNITS_MAX, object);
	for (int life = 0; life < 2; life++) { /* the second finds its blocks there */
		fill_ns = write_ns = objects = 0;
		for (unsigned i = 0; i < SEGMENTS; i++) {
			struct spill_segment *segment;
			uint64_t start = test_now_ns();

			CHECK(spill_segment_begin(spill, true, &segment) == 0);
			while (spill_segment_add(segment, objects, object, 38) >= 0)
				objects++;
			fill_ns += test_now_ns() - start;
			start = test_now_ns();
			CHECK(spill_segment_write(segment) == 0);
			write_ns += test_now_ns() - start;
		}
		bytes = statistics_of(spill).live_bytes;
		printf("%s write: %.0f MB/s; fill: %.2f us an object; %.1f %% overhead\n",
		       sealed ? "sealed" : "plain", (double)SEGMENTS * SEGMENT_BYTES / 1e6 / ((double)write_ns / 1e9),
		       (double)fill_ns / 1e3 / (double)objects,
		       100.0 * (double)(statistics_of(spill).used_bytes - bytes) / (double)bytes);
		free_ns = test_now_ns();
		for (uint64_t i = 0; i < objects; i++)
			spill_free(spill, i / (objects / SEGMENTS) * SEGMENT_UNITS + 1 +
						  i % (objects / SEGMENTS) * (38 + seal_units()), 38);
		free_ns = test_now_ns() - free_ns;
		printf("free: %.0f ns an extent\n", (double)free_ns / (double)objects);
	}
	free_ns = test_now_ns();
	spill_trim_wait(spill);
	printf("trim left: %.0f ms; metadata %lu bytes\n", (double)(test_now_ns() - free_ns) / 1e6,
	       statistics_of(spill).metadata_bytes);
	spill_destroy(spill);
}

static void dump(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	struct spill *spill;
	struct model model;

	CHECK(fd >= 0);
	spill = spill_open(fd, 8);
	model = model_create(spill, 1);
	for (int i = 0; i < 3; i++)
		CHECK(model_write(&model, i == 1 ? 3 : EXTENTS_MAX) == 0);
	for (unsigned i = 0; i < model.count; i++)
		printf("%lu %lu %u\n", model.extents[i].owner, model.extents[i].extent,
		       model.extents[i].units);
	spill_destroy(spill);
	free(model.extents);
}

int main(int argc, char **argv)
{
	int memory;

	seed_state = test_seed(argc, argv);
	if (argc > 3 && strcmp(argv[2], "dump") == 0) {
		dump(argv[3]);
		return 0;
	}
	if (test_is_bench(argc, argv)) {
		bench();
		sealed = true;
		bench();
		return 0;
	}
	test_create();
	test_full();
	test_reserve();
	test_smallest();
	test_random(file_create(), IO_THREADS);
	test_random(file_create(), IO_AUTOMATIC);
	memory = memfd_create("test_spill", MFD_CLOEXEC);
	CHECK(memory >= 0);
	test_random(memory, IO_AUTOMATIC);
	test_chunks();
	test_punch();
	test_draining();
	test_file_limit();
	test_hostile();
	test_flips();
	test_claims();
	test_unclaimed();
	test_erase();
	test_misuse();
	test_faults();
	test_writers();
	test_device();
	sealed = true;
	test_smallest();
	test_random(file_create(), IO_THREADS);
	test_random(file_create(), IO_AUTOMATIC);
	test_hostile();
	test_flips();
	test_claims();
	test_faults();
	test_writers();
	test_ciphertext();
	test_places();
	test_generations();
	printf("passed\n");
	return 0;
}
