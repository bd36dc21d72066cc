/* SPDX-License-Identifier: MIT */
/*
 * test_pool — the pool beside a model: every live object, its bytes and whose units they are.
 *
 * Build: tests/csrc/test_pool.c csrc/pool.c csrc/base.c; -Icsrc; threads
 *
 * `test_pool SEED bench` prints times and the measured waste instead.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base.h"
#include "check.h"
#include "pool.h"

#define SLAB_UNITS (POOL_SLAB_BYTES / POOL_UNIT_BYTES)
#define SPACE_BYTES (8UL << 20)
#define POOLS 3
#define OBJECTS_MAX 6000
#define RESERVE_BYTES (4 * POOL_SLAB_BYTES)

struct object {
	uint64_t handle;
	uint64_t seed; /* of its bytes */
	uint8_t units, pool;
};

struct model {
	int memfd;
	struct pool_space *space;
	struct pool *pools[POOLS];
	struct pool_space *dead_space; /* of a predecessor; destroyed last, for the leak checker */
	struct pool *dead_pools[POOLS];
	struct object objects[OBJECTS_MAX];
	unsigned count;
	uint8_t unit_is_live[SPACE_BYTES / POOL_UNIT_BYTES];
};

/* ---- helpers ---- */

static int memfd_make(void)
{
	int fd = memfd_create("test-pool", MFD_CLOEXEC);

	CHECK(fd >= 0);
	return fd;
}

/* RAM the memfd has. */
static uint64_t memfd_bytes(int fd)
{
	struct stat status;

	CHECK(fstat(fd, &status) == 0);
	return (uint64_t)status.st_blocks * 512;
}

static struct pool_statistics statistics_of(struct pool *pool)
{
	struct pool_statistics statistics;

	pool_statistics(pool, &statistics);
	return statistics;
}

static void object_make(uint8_t *bytes, unsigned units, uint64_t seed)
{
	for (size_t i = 0; i < units * POOL_UNIT_BYTES; i += sizeof seed) {
		uint64_t word = random_next(&seed);
		memcpy(bytes + i, &word, sizeof word);
	}
}

static void object_check(const struct pool_space *space, const struct object *object)
{
	uint8_t expected[PAGE_BYTES];

	object_make(expected, object->units, object->seed);
	CHECK(memcmp(pool_object(space, object->handle), expected,
		     object->units * POOL_UNIT_BYTES) == 0);
}

/* Sizes as compressors make them: a third each around 3:1, 1.6:1 and 1.2:1, and all others. */
static unsigned units_random(uint64_t *random)
{
	static const uint8_t centre[3] = { 21, 40, 54 };
	unsigned units;

	if (random_below(random, 8) == 0)
		return 1 + random_below(random, POOL_UNITS_MAX);
	units = centre[random_below(random, 3)];
	units += random_below(random, units / 3 + 1) + random_below(random, units / 3 + 1);
	return min_of(units - units / 3, POOL_UNITS_MAX);
}

/* ---- model ---- */

static void model_open(struct model *model)
{
	CHECK(pool_space_create(model->memfd, SPACE_BYTES, &model->space) == 0);
	for (unsigned i = 0; i < POOLS; i++)
		CHECK(pool_create(model->space, &model->pools[i]) == 0);
}

static struct model *model_create(void)
{
	struct model *model = calloc(1, sizeof *model);

	CHECK(model);
	model->memfd = memfd_make();
	model_open(model);
	return model;
}

/* The daemon dies; its successor has the memfd and nothing else. */
static void model_reopen(struct model *model)
{
	model->dead_space = model->space;
	memcpy(model->dead_pools, model->pools, sizeof model->pools);
	model_open(model);
}

static void model_destroy(struct model *model)
{
	for (unsigned i = 0; i < POOLS; i++)
		pool_destroy(model->pools[i]);
	pool_space_destroy(model->space);
	CHECK(memfd_bytes(model->memfd) <= RESERVE_BYTES);
	for (unsigned i = 0; i < POOLS; i++)
		pool_destroy(model->dead_pools[i]);
	pool_space_destroy(model->dead_space);
	close(model->memfd);
	free(model);
}

static void model_mark(struct model *model, const struct object *object, bool live)
{
	for (unsigned i = 0; i < object->units; i++) {
		CHECK(object->handle + i < sizeof model->unit_is_live);
		CHECK(model->unit_is_live[object->handle + i] == !live);
		model->unit_is_live[object->handle + i] = live;
	}
}

/* Store, and compare what the pool said it would do with what it did. */
static int model_store(struct model *model, unsigned pool_number, unsigned units, uint64_t seed)
{
	struct pool *pool = model->pools[pool_number];
	struct object *object = &model->objects[model->count];
	uint64_t growth = pool_growth_bytes(pool, units), before = statistics_of(pool).bytes;
	uint8_t bytes[PAGE_BYTES];
	int result;

	CHECK(model->count < OBJECTS_MAX);
	object_make(bytes, units, seed);
	*object = (struct object){ .seed = seed, .units = (uint8_t)units,
				   .pool = (uint8_t)pool_number };
	result = pool_store(pool, bytes, units, &object->handle);
	if (result < 0)
		return result;
	CHECK(statistics_of(pool).bytes == before + growth);
	CHECK(!pool_is_evacuating(pool, object->handle));
	model_mark(model, object, true);
	model->count++;
	return 0;
}

static void model_free(struct model *model, unsigned i)
{
	struct object object = model->objects[i];

	object_check(model->space, &object);
	model_mark(model, &object, false);
	pool_free(model->pools[object.pool], object.handle, object.units);
	model->objects[i] = model->objects[--model->count];
}

static void model_check(struct model *model)
{
	uint64_t counts[POOLS] = { 0 }, bytes[POOLS] = { 0 }, held = 0;

	for (unsigned i = 0; i < model->count; i++) {
		object_check(model->space, &model->objects[i]);
		counts[model->objects[i].pool]++;
		bytes[model->objects[i].pool] += model->objects[i].units * POOL_UNIT_BYTES;
	}
	for (unsigned i = 0; i < POOLS; i++) {
		struct pool_statistics statistics = statistics_of(model->pools[i]);

		CHECK(pool_is_valid(model->pools[i]));
		CHECK(statistics.object_count == counts[i]);
		CHECK(statistics.object_bytes >= bytes[i]);
		CHECK(statistics.bytes >= statistics.object_bytes);
		CHECK(statistics.bytes == statistics.slab_count * POOL_SLAB_BYTES);
		held += statistics.bytes;
	}
	CHECK(memfd_bytes(model->memfd) >= held);
	CHECK(memfd_bytes(model->memfd) <= held + RESERVE_BYTES);
}

/* Random stores and frees around a number of live objects. */
static void model_churn(struct model *model, unsigned operations, unsigned target, uint64_t *random)
{
	for (unsigned i = 0; i < operations; i++) {
		bool store = random_below(random, target * 2) >= model->count;

		if (store && model->count < OBJECTS_MAX)
			(void)model_store(model, random_below(random, POOLS), units_random(random),
					  random_next(random));
		else if (model->count)
			model_free(model, random_below(random, model->count));
		if (i % 1000 == 0)
			model_check(model);
	}
	model_check(model);
}

static void model_free_part(struct model *model, unsigned percent, uint64_t *random)
{
	for (unsigned i = model->count; i-- > 0;)
		if (random_below(random, 100) < percent)
			model_free(model, i);
}

/* ---- tests ---- */

/* How many objects of each size a slab takes, and that it is given back when the last one goes. */
static void test_classes(void)
{
	struct model *model = model_create();

	for (unsigned units = 1; units <= POOL_UNITS_MAX; units++) {
		unsigned rounded = units <= 32 ? (units + 1) / 2 * 2 : units;
		unsigned capacity = (unsigned)SLAB_UNITS / rounded;

		CHECK(pool_growth_bytes(model->pools[0], units) == POOL_SLAB_BYTES);
		for (unsigned i = 0; i < capacity; i++) {
			CHECK(model_store(model, 0, units, i) == 0);
			CHECK(statistics_of(model->pools[0]).slab_count == 1);
		}
		CHECK(pool_growth_bytes(model->pools[0], units) == POOL_SLAB_BYTES);
		model_check(model);
		while (model->count)
			model_free(model, model->count / 2);
		CHECK(statistics_of(model->pools[0]).bytes == 0);
		CHECK(statistics_of(model->pools[0]).object_bytes == 0);
		model_check(model);
	}
	model_destroy(model);
}

/* Objects go where most are already, so that the other slabs can drain. */
static void test_fullest_first(void)
{
	enum { SLABS = 4, CAPACITY = 16 };
	struct model *model = model_create();
	uint64_t fullest;

	for (unsigned i = 0; i < SLABS * CAPACITY; i++)
		CHECK(model_store(model, 0, 64, i) == 0);
	fullest = model->objects[2 * CAPACITY].handle / SLAB_UNITS;
	for (unsigned i = model->count; i-- > 0;) /* it keeps 12 of 16, the others 4 */
		if (i % CAPACITY >= (i / CAPACITY == 2 ? 12 : 4))
			model_free(model, i);
	for (unsigned i = 0; i < 4; i++) {
		CHECK(model_store(model, 0, 64, i) == 0);
		CHECK(model->objects[model->count - 1].handle / SLAB_UNITS == fullest);
	}
	model_check(model);
	model_destroy(model);
}

static void test_random(uint64_t *random)
{
	struct model *model = model_create();

	model_churn(model, 10000, 1500, random);
	model_churn(model, 10000, 5000, random); /* more than fits: -ENOSPC */
	model_churn(model, 10000, 300, random);
	model_free_part(model, 100, random);
	model_check(model);
	CHECK(memfd_bytes(model->memfd) <= RESERVE_BYTES);
	model_destroy(model);
}

static void test_space_exhausted(void)
{
	struct model *model = model_create();
	unsigned fit = (unsigned)(SPACE_BYTES / PAGE_BYTES);
	struct object freed;

	for (unsigned i = 0; i < fit; i++)
		CHECK(model_store(model, i % 2, 64, i) == 0);
	CHECK(model_store(model, 0, 64, 1) == -ENOSPC);
	CHECK(model_store(model, 2, 1, 1) == -ENOSPC);
	model_check(model);
	freed = model->objects[7];
	model_free(model, 7);
	CHECK(model_store(model, !freed.pool, 64, 1) == -ENOSPC); /* the room is another pool's */
	CHECK(model_store(model, freed.pool, 64, 1) == 0);
	model_check(model);
	model_destroy(model);
}

/* No memory for a slab is an error of the store; here because the memfd is cut short. */
static void test_no_memory(void)
{
	struct model *model = model_create();

	CHECK(model_store(model, 0, 64, 1) == 0);
	CHECK(ftruncate(model->memfd, (off_t)POOL_SLAB_BYTES + 8192) == 0);
	CHECK(model_store(model, 0, 10, 2) == -ENOMEM);
	CHECK(model_store(model, 0, 10, 2) == -ENOMEM);
	CHECK(memfd_bytes(model->memfd) == POOL_SLAB_BYTES);
	CHECK(statistics_of(model->pools[0]).slab_count == 1);
	CHECK(ftruncate(model->memfd, (off_t)SPACE_BYTES) == 0);
	CHECK(model_store(model, 0, 10, 2) == 0);
	model_check(model);
	model_destroy(model);
}

static void test_arguments(void)
{
	struct pool_space *space = NULL;
	struct pool *pools[GROUPS_MAX], *more = NULL;
	int memfd = memfd_make();

	CHECK(pool_space_create(memfd, 0, &space) == -EINVAL);
	CHECK(pool_space_create(memfd, UINT64_MAX, &space) == -EINVAL);
	CHECK(pool_space_create(-1, SPACE_BYTES, &space) == -EBADF && !space);
	CHECK(pool_space_create(memfd, SPACE_BYTES - 1, &space) == 0);
	for (unsigned i = 0; i < GROUPS_MAX; i++)
		CHECK(pool_create(space, &pools[i]) == 0);
	CHECK(pool_create(space, &more) == -ENOSPC && !more);
	CHECK(pool_adopt(pools[0], 0, 64) == -EINVAL); /* the memfd was empty */
	for (unsigned i = 0; i < GROUPS_MAX; i++)
		pool_destroy(pools[i]);
	pool_destroy(NULL);
	pool_space_destroy(space);
	pool_space_destroy(NULL);
	close(memfd);
}

/* ---- misuse ends the process ---- */

enum misuse { WRONG_SIZE, WRONG_POOL, WRONG_HANDLE, TWICE };

static void misuse(struct model *model, enum misuse what)
{
	struct object object = model->objects[0];

	if (what == TWICE)
		pool_free(model->pools[0], object.handle, object.units);
	pool_free(model->pools[what == WRONG_POOL], object.handle + (what == WRONG_HANDLE),
		  what == WRONG_SIZE ? 60 : object.units);
}

static void test_misuse(void)
{
	struct model *model = model_create();

	for (unsigned i = 0; i < 3; i++)
		CHECK(model_store(model, 0, 20, i) == 0);
	for (int what = WRONG_SIZE; what <= TWICE; what++) {
		pid_t child;
		int status;

#ifndef VSWAP_DEBUG
		if (what == TWICE) /* found in debug builds only */
			break;
#endif
		child = fork();
		CHECK(child >= 0);
		if (child == 0) {
			signal(SIGABRT, SIG_DFL);
			close(2);
			misuse(model, (enum misuse)what);
			_exit(0);
		}
		CHECK(waitpid(child, &status, 0) == child);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
	}
	/* The children shared the memfd, so the objects' bytes are not looked at any more. */
	model_destroy(model);
}

/* ---- compaction ---- */

/* Objects in each slab, for the pool with that number. */
static void slab_counts(const struct model *model, unsigned pool, uint16_t *counts)
{
	memset(counts, 0, SPACE_BYTES / POOL_SLAB_BYTES * sizeof *counts);
	for (unsigned i = 0; i < model->count; i++)
		if (model->objects[i].pool == pool)
			counts[model->objects[i].handle / SLAB_UNITS]++;
}

/* No slab that stays and is of the same class is clearly emptier than one to be emptied. */
static void check_emptiest(const struct model *model, unsigned pool)
{
	uint16_t counts[SPACE_BYTES / POOL_SLAB_BYTES];
	unsigned fullest[65] = { 0 };

	slab_counts(model, pool, counts);
	for (int pass = 0; pass < 2; pass++)
		for (unsigned i = 0; i < model->count; i++) {
			const struct object *object = &model->objects[i];
			unsigned count = counts[object->handle / SLAB_UNITS];
			unsigned slack = (unsigned)SLAB_UNITS / object->units / 8 + 1;

			if (object->pool != pool || object->units % 2)
				continue; /* odd sizes may share a class with even ones */
			if (pool_is_evacuating(model->pools[pool], object->handle)) {
				if (pass == 0)
					fullest[object->units] =
						max_of(fullest[object->units], count);
			} else if (pass == 1 && fullest[object->units]) {
				CHECK(count + slack >= fullest[object->units]);
			}
		}
}

/* Move up to `max` objects out of slabs being evacuated, as compaction does. Returns how many. */
static unsigned evacuate_objects(struct model *model, unsigned pool, unsigned max)
{
	unsigned moved = 0;

	for (unsigned i = 0; i < model->count && moved < max;) {
		struct object object = model->objects[i];

		if (object.pool != pool ||
		    !pool_is_evacuating(model->pools[pool], object.handle)) {
			i++;
			continue;
		}
		/* Never needs a slab: model_store checks that the growth announced here happens. */
		CHECK(pool_growth_bytes(model->pools[pool], object.units) == 0);
		CHECK(model_store(model, pool, object.units, object.seed) == 0);
		model_free(model, i); /* puts the copy in its place */
		moved++;
	}
	return moved;
}

static void test_evacuate(uint64_t *random)
{
	struct model *model = model_create();

	for (unsigned round = 0; round < 12; round++) {
		struct pool *pool = model->pools[round % POOLS];
		uint64_t before, wanted;
		unsigned count;

		model_churn(model, 3000, 2500, random);
		model_free_part(model, 30 + 5 * round, random);
		before = statistics_of(pool).bytes;
		wanted = round % 4 == 0 ? UINT64_MAX : 1 + random_below(random, 1 << 20);
		count = pool_evacuate(pool, wanted);
		CHECK(wanted == UINT64_MAX || count <= div_ceil(wanted, POOL_SLAB_BYTES));
		CHECK(count > 0);
		check_emptiest(model, round % POOLS);
		model_check(model);
		if (round % 3 == 2) { /* interrupted, with other work between */
			evacuate_objects(model, round % POOLS, 20);
			pool_evacuate(pool, POOL_SLAB_BYTES);
			model_churn(model, 500, model->count + 1, random);
			pool_evacuate_end(pool);
			model_check(model);
			continue;
		}
		evacuate_objects(model, round % POOLS, UINT32_MAX);
		CHECK(statistics_of(pool).bytes == before - count * POOL_SLAB_BYTES);
		pool_evacuate_end(pool);
		model_check(model);
		CHECK(wanted != UINT64_MAX || pool_evacuate(pool, UINT64_MAX) == 0);
	}
	model_destroy(model);
}

/* ---- recovery ---- */

/* All that is not in a live object may hold anything: nothing there is read by the successor. */
static void scribble(struct model *model)
{
	static uint8_t junk[POOL_UNIT_BYTES];

	memset(junk, 0xee, sizeof junk);
	for (uint64_t unit = 0; unit < sizeof model->unit_is_live; unit++)
		if (!model->unit_is_live[unit])
			CHECK(pwrite(model->memfd, junk, sizeof junk,
				     (off_t)(unit * POOL_UNIT_BYTES)) == (ssize_t)sizeof junk);
}

static void shuffle(struct model *model, uint64_t *random)
{
	for (unsigned i = model->count; i > 1; i--) {
		unsigned other = random_below(random, i);
		struct object object = model->objects[i - 1];

		model->objects[i - 1] = model->objects[other];
		model->objects[other] = object;
	}
}

/* What a damaged slot table might name. */
static void adopt_nonsense(struct model *model, const struct object *live)
{
	struct pool *pool = model->pools[live->pool];
	struct pool *other = model->pools[(live->pool + 1) % POOLS];

	CHECK(pool_adopt(pool, live->handle, live->units) == -EINVAL);
	CHECK(pool_adopt(other, live->handle, live->units) == -EINVAL);
	CHECK(pool_adopt(other, live->handle / SLAB_UNITS * SLAB_UNITS, live->units) == -EINVAL);
	CHECK(pool_adopt(pool, live->handle + 1, live->units) == -EINVAL);
	CHECK(pool_adopt(pool, live->handle / SLAB_UNITS * SLAB_UNITS,
			 live->units > 32 ? 2 : 64) == -EINVAL);
	CHECK(pool_adopt(pool, live->handle / SLAB_UNITS * SLAB_UNITS + SLAB_UNITS - 1, 2) ==
	      -EINVAL);
	CHECK(pool_adopt(pool, live->handle, 0) == -EINVAL);
	CHECK(pool_adopt(pool, live->handle, 65) == -EINVAL);
	CHECK(pool_adopt(pool, SPACE_BYTES / POOL_UNIT_BYTES, live->units) == -EINVAL);
	CHECK(pool_adopt(pool, UINT64_MAX, live->units) == -EINVAL);
}

static void adopt_all(struct model *model, uint64_t *random)
{
	shuffle(model, random);
	for (unsigned i = 0; i < model->count; i++) {
		const struct object *object = &model->objects[i];

		CHECK(pool_adopt(model->pools[object->pool], object->handle, object->units) == 0);
		if (i % 64 == 0)
			adopt_nonsense(model, object);
	}
}

/* How adoption ends: by the call for it, or by one of those that need the free lists. */
static void adopt_end(struct model *model, unsigned round)
{
	uint8_t bytes[PAGE_BYTES] = { 0 };
	uint64_t handle;

	if (round % 4 == 0) {
		pool_space_adopt_end(model->space);
	} else if (round % 4 == 1) {
		CHECK(pool_store(model->pools[1], bytes, 33, &handle) == 0);
		pool_free(model->pools[1], handle, 33);
	} else if (round % 4 == 2) {
		CHECK(pool_is_valid(model->pools[2]));
	} else {
		model_free(model, model->count - 1);
	}
	for (unsigned i = 0; i < SPACE_BYTES / POOL_SLAB_BYTES; i++) /* too late for any slab */
		CHECK(pool_adopt(model->pools[0], i * SLAB_UNITS, 64) == -EINVAL);
}

static void test_adopt(uint64_t *random)
{
	for (unsigned round = 0; round < 8; round++) {
		struct model *model = model_create();

		model_churn(model, 6000, 2000, random);
		model_free_part(model, 10 * round, random);
		if (round % 2)
			pool_evacuate(model->pools[0], UINT64_MAX);
		scribble(model);
		model_reopen(model);
		adopt_all(model, random);
		adopt_end(model, round);
		model_check(model); /* also that the memory of all other slabs is given back */
		model_churn(model, 6000, 2000, random);
		model_destroy(model);
	}
}

/* A memfd with content and nobody to adopt it is as good as new. */
static void test_adopt_nothing(uint64_t *random)
{
	struct model *model = model_create();

	scribble(model);
	CHECK(memfd_bytes(model->memfd) == SPACE_BYTES);
	model_reopen(model);
	CHECK(model_store(model, 0, 30, 1) == 0);
	CHECK(memfd_bytes(model->memfd) == POOL_SLAB_BYTES);
	model_churn(model, 2000, 500, random);
	model_destroy(model);
}

/* ---- threads ---- */

enum { THREADS = 4, THREAD_OBJECTS = 300, THREAD_OPERATIONS = 8000 };

struct worker {
	pthread_t thread;
	struct pool_space *space;
	struct pool *pools[2];
	uint64_t random;
	unsigned count;
	struct object objects[THREAD_OBJECTS];
};

static void worker_store(struct worker *worker)
{
	struct object *object = &worker->objects[worker->count];
	uint8_t bytes[PAGE_BYTES];
	int result;

	object->units = (uint8_t)units_random(&worker->random);
	object->seed = random_next(&worker->random);
	object->pool = random_next(&worker->random) & 1;
	object_make(bytes, object->units, object->seed);
	result = pool_store(worker->pools[object->pool], bytes, object->units, &object->handle);
	CHECK(result == 0 || result == -ENOSPC);
	worker->count += result == 0;
}

static void worker_free(struct worker *worker, unsigned i)
{
	struct object *object = &worker->objects[i];

	object_check(worker->space, object);
	pool_free(worker->pools[object->pool], object->handle, object->units);
	*object = worker->objects[--worker->count];
}

/* One thread's part of a compaction: move what is its own. */
static void worker_evacuate(struct worker *worker, struct pool *pool)
{
	pool_evacuate(pool, 4 * POOL_SLAB_BYTES);
	for (unsigned i = 0; i < worker->count; i++) {
		struct object *object = &worker->objects[i];
		uint64_t handle;

		if (worker->pools[object->pool] != pool ||
		    !pool_is_evacuating(pool, object->handle))
			continue;
		if (pool_store(pool, pool_object(worker->space, object->handle), object->units,
			       &handle) < 0)
			continue;
		pool_free(pool, object->handle, object->units);
		object->handle = handle;
	}
	pool_evacuate_end(pool);
}

static void *worker_main(void *argument)
{
	struct worker *worker = argument;

	for (unsigned i = 0; i < THREAD_OPERATIONS; i++) {
		unsigned what = random_below(&worker->random, 1000);

		if (what < 2)
			worker_evacuate(worker, worker->pools[what]);
		else if (what < 4)
			CHECK(pool_is_valid(worker->pools[what - 2]));
		else if (what < 500 && worker->count < THREAD_OBJECTS)
			worker_store(worker);
		else if (worker->count)
			worker_free(worker, random_below(&worker->random, worker->count));
	}
	while (worker->count)
		worker_free(worker, 0);
	return NULL;
}

static void test_threads(uint64_t *random)
{
	struct model *model = model_create();
	struct worker *workers = calloc(THREADS, sizeof *workers);

	CHECK(workers);
	for (unsigned i = 0; i < THREADS; i++) {
		workers[i].space = model->space;
		workers[i].pools[0] = model->pools[0];
		workers[i].pools[1] = model->pools[1];
		workers[i].random = random_next(random);
		CHECK(pthread_create(&workers[i].thread, NULL, worker_main, &workers[i]) == 0);
	}
	for (unsigned i = 0; i < THREADS; i++)
		CHECK(pthread_join(workers[i].thread, NULL) == 0);
	model_check(model);
	model_destroy(model);
	free(workers);
}

/* ---- bench ---- */

#define BENCH_OBJECTS_MAX 60000u

struct bench_object {
	uint64_t handle;
	unsigned bytes; /* of the compressed page, before rounding to units */
	unsigned units;
};

/* A third each around 1.2:1, 1.6:1 and 3:1, log-normal like. */
static struct bench_object bench_object_make(uint64_t *random)
{
	static const double ratios[3] = { 1.2, 1.6, 3.0 };
	double spread = -6;
	struct bench_object object = { 0 };

	for (unsigned i = 0; i < 12; i++) /* sum of twelve: about normal, deviation 1 */
		spread += random_below(random, 1 << 20) * 0x1p-20;
	spread = (double)PAGE_BYTES / ratios[random_below(random, 3)] * (1 + 0.15 * spread);
	object.bytes = (unsigned)max_of(spread, 64.0);
	object.units = (unsigned)min_of(div_ceil(object.bytes + 1, POOL_UNIT_BYTES),
					POOL_UNITS_MAX);
	if (object.units == POOL_UNITS_MAX)
		object.bytes = PAGE_BYTES;
	return object;
}

static void bench_waste_print(struct pool *pool, const struct bench_object *objects, unsigned count,
			      const char *when)
{
	struct pool_statistics statistics = statistics_of(pool);
	uint64_t bytes = 0, unit_bytes = 0;
	double over;

	for (unsigned i = 0; i < count; i++) {
		bytes += objects[i].bytes;
		unit_bytes += objects[i].units * POOL_UNIT_BYTES;
	}
	over = 100.0 / (double)bytes;
	printf("%6u objects %-9s payload %6.1f MiB: units +%.2f %%, classes +%.2f %%, "
	       "tails and free objects +%.2f %%, in all +%.2f %%; metadata %.2f B/object\n",
	       count, when, (double)bytes / (1 << 20), (double)(unit_bytes - bytes) * over,
	       (double)(statistics.object_bytes - unit_bytes) * over,
	       (double)(statistics.bytes - statistics.object_bytes) * over,
	       (double)(statistics.bytes - bytes) * over,
	       (double)statistics.metadata_bytes / count);
}

static void bench_compact(struct pool_space *space, struct pool *pool, struct bench_object *objects,
			  unsigned count)
{
	unsigned slabs = pool_evacuate(pool, UINT64_MAX), moved = 0;

	for (unsigned i = 0; i < count; i++) {
		uint64_t handle;

		if (!pool_is_evacuating(pool, objects[i].handle))
			continue;
		CHECK(pool_store(pool, pool_object(space, objects[i].handle), objects[i].units,
				 &handle) == 0);
		pool_free(pool, objects[i].handle, objects[i].units);
		objects[i].handle = handle;
		moved++;
	}
	pool_evacuate_end(pool);
	printf("%6u objects moved to free %u slabs\n", moved, slabs);
}

static void bench_waste(unsigned count, uint64_t *random)
{
	static struct bench_object objects[BENCH_OBJECTS_MAX];
	static uint8_t bytes[PAGE_BYTES];
	int memfd = memfd_make();
	struct pool_space *space;
	struct pool *pool;

	CHECK(pool_space_create(memfd, 1UL << 30, &space) == 0 && pool_create(space, &pool) == 0);
	for (unsigned i = 0; i < count; i++) {
		objects[i] = bench_object_make(random);
		CHECK(pool_store(pool, bytes, objects[i].units, &objects[i].handle) == 0);
	}
	bench_waste_print(pool, objects, count, "filled");
	for (unsigned i = 0; i < 4 * count; i++) {
		struct bench_object *object = &objects[random_below(random, count)];

		pool_free(pool, object->handle, object->units);
		*object = bench_object_make(random);
		CHECK(pool_store(pool, bytes, object->units, &object->handle) == 0);
	}
	bench_waste_print(pool, objects, count, "churned");
	bench_compact(space, pool, objects, count);
	bench_waste_print(pool, objects, count, "compacted");
	pool_destroy(pool);
	pool_space_destroy(space);
	close(memfd);
}

/* Best of some rounds: store many, with new slabs for them; then free and store every other one. */
static void bench_times(unsigned units)
{
	enum { COUNT = 8192, ROUNDS = 8 };
	static uint64_t handles[COUNT];
	static uint8_t bytes[PAGE_BYTES];
	uint64_t grow = UINT64_MAX, store = UINT64_MAX, freed = UINT64_MAX, start;
	int memfd = memfd_make();
	struct pool_space *space;
	struct pool *pool;

	CHECK(pool_space_create(memfd, 1UL << 30, &space) == 0 && pool_create(space, &pool) == 0);
	for (unsigned round = 0; round < ROUNDS; round++) {
		start = test_now_ns();
		for (unsigned i = 0; i < COUNT; i++)
			CHECK(pool_store(pool, bytes, units, &handles[i]) == 0);
		grow = min_of(grow, test_now_ns() - start);
		/* Every other object goes and comes: no slab does. */
		start = test_now_ns();
		for (unsigned i = 0; i < COUNT; i += 2)
			pool_free(pool, handles[i * 5 % COUNT & ~1u], units);
		freed = min_of(freed, test_now_ns() - start);
		start = test_now_ns();
		for (unsigned i = 0; i < COUNT; i += 2)
			CHECK(pool_store(pool, bytes, units, &handles[i]) == 0);
		store = min_of(store, test_now_ns() - start);
		for (unsigned i = 0; i < COUNT; i++)
			pool_free(pool, handles[i], units);
	}
	printf("%2u units: store %4.0f ns (with new slabs %4.0f), free %4.0f ns\n", units,
	       2.0 * (double)store / COUNT, (double)grow / COUNT, 2.0 * (double)freed / COUNT);
	pool_destroy(pool);
	pool_space_destroy(space);
	close(memfd);
}

static void bench_all(uint64_t *random)
{
	static const unsigned units[] = { 1, 8, 21, 40, 54, 64 };

	for (unsigned i = 0; i < sizeof units / sizeof *units; i++)
		bench_times(units[i]);
	bench_waste(4000, random);
	bench_waste(20000, random);
	bench_waste(BENCH_OBJECTS_MAX, random);
}

int main(int argc, char **argv)
{
	uint64_t random = test_seed(argc, argv);

	if (test_is_bench(argc, argv)) {
		bench_all(&random);
		return 0;
	}
	test_classes();
	test_fullest_first();
	test_random(&random);
	test_space_exhausted();
	test_no_memory();
	test_arguments();
	test_misuse();
	test_evacuate(&random);
	test_adopt(&random);
	test_adopt_nothing(&random);
	test_threads(&random);
	return 0;
}
