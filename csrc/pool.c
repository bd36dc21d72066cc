/* SPDX-License-Identifier: MIT */
/*
 * pool — see pool.h for states, invariants and locking.
 *
 * Allocation takes from the fullest slabs: a class has its PARTIAL slabs on FULLNESS_LEVELS lists,
 * so that the emptiest drain by themselves and evacuation finds them at once. A slab is threaded
 * outside any lock before its pool sees it, and is given back after the pool forgot it.
 *
 * While objects are being adopted, which objects of a slab are live is known only in a bitmap; free
 * lists may not be threaded before the last one is known, as the links lie in the objects' memory.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base.h"
#include "fault_point.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define SLAB_UNITS ((unsigned)(POOL_SLAB_BYTES / POOL_UNIT_BYTES))
#define SLAB_NONE UINT32_MAX
#define OBJECT_NONE UINT16_MAX
#define RESERVE_SLABS 4 /* free slabs kept populated, so that a class may breathe at no cost */
#define FULLNESS_LEVELS 8
#define HEADERS_POPULATED_AT_ONCE 256u /* one page of headers */

#define SMALL_UNITS_MAX 32
#define SMALL_CLASSES 16
#define LARGE_OBJECTS_MAX 31 /* objects in a slab of the first large class */

/* Slab numbers are 32 bits wide, handles 38 (slot_table.c). */
#define SPACE_BYTES_MAX ((1ULL << 38) * POOL_UNIT_BYTES)
static_assert(SPACE_BYTES_MAX / POOL_SLAB_BYTES < SLAB_NONE, "slab numbers fit");
static_assert(POOL_SLAB_BYTES / POOL_UNIT_BYTES < OBJECT_NONE, "object indexes fit a free link");
static_assert(SMALL_CLASSES + LARGE_OBJECTS_MAX - POOL_SLAB_BYTES / PAGE_BYTES + 1 == POOL_CLASSES,
	      "large classes hold 31 .. 16 objects a slab");

enum slab_state { SLAB_FREE, SLAB_PARTIAL, SLAB_FULL, SLAB_EVACUATING };

struct slab {
	uint32_t next, previous; /* on its list; SLAB_NONE ends it */
	uint16_t free_head;      /* first free object, OBJECT_NONE: full */
	uint16_t used;           /* live objects */
	uint16_t owner;          /* number of its pool, 0: none; atomic, read without a lock */
	uint8_t class;
	uint8_t state;           /* atomic, too */
};
static_assert(sizeof(struct slab) == 16, "about half a byte per stored page");
static_assert(HEADERS_POPULATED_AT_ONCE * sizeof(struct slab) == PAGE_BYTES, "whole pages");

/* Live objects of a slab that is being adopted. */
struct slab_live {
	uint64_t words[SLAB_UNITS / 64];
};

struct pool_space {
	pthread_mutex_t lock;
	int memfd;
	uint8_t *base;
	uint32_t slab_count;        /* in the mapping */
	uint32_t end;               /* slabs from here on were never used, their headers neither */
	uint32_t headers_populated; /* headers that have memory */
	struct slab *slabs;
	uint32_t reserve_head;      /* FREE, populated */
	uint32_t reserve_count;
	uint32_t free_head;         /* FREE, punched */
	bool adopting;              /* written atomically under `lock`, read anywhere */
	uint64_t found_bytes;       /* length of the memfd as it was found */
	struct slab_live *live;     /* one per slab while adopting, NULL before the first */
	unsigned pool_count;
	struct pool *pools[GROUPS_MAX + 1]; /* by owner number; 0 stays unused */
};

struct pool_class {
	uint32_t heads[FULLNESS_LEVELS]; /* PARTIAL slabs, emptiest level first */
	uint32_t slab_count;             /* in any state */
	uint32_t evacuating_count;
	uint64_t used;                   /* live objects, in slabs of any state */
};

struct pool {
	pthread_mutex_t lock;
	struct pool_space *space;
	uint16_t number;
	uint32_t full_head;
	uint32_t evacuating_head;
	uint64_t slab_count;             /* read without the lock */
	uint64_t object_count;
	uint64_t object_bytes;           /* read without the lock, too */
	struct pool_class classes[POOL_CLASSES];
};

/* ---- size classes ---- */

/* Size of an object of each class in units, and how many fit into a slab. */
static const uint16_t class_units[POOL_CLASSES] = {
	2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32,
	33, 34, 35, 36, 37, 39, 40, 42, 44, 46, 48, 51, 53, 56, 60, 64,
};
static const uint16_t class_capacity[POOL_CLASSES] = {
	512, 256, 170, 128, 102, 85, 73, 64, 56, 51, 46, 42, 39, 36, 34, 32,
	31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16,
};

static unsigned class_of(unsigned units)
{
	unsigned class;

	VS_CHECK(units >= 1 && units <= POOL_UNITS_MAX);
	class = units <= SMALL_UNITS_MAX ? (units - 1) / 2
					 : SMALL_CLASSES + LARGE_OBJECTS_MAX - SLAB_UNITS / units;
	VS_DCHECK(class < POOL_CLASSES && class_units[class] >= units);
	VS_DCHECK(class_capacity[class] == SLAB_UNITS / class_units[class]);
	return class;
}

static uint64_t class_bytes(unsigned class) { return class_units[class] * POOL_UNIT_BYTES; }

/* ---- addresses ---- */

static uint8_t *slab_address(const struct pool_space *space, uint32_t number)
{
	VS_DCHECK(number < space->slab_count);
	return space->base + number * POOL_SLAB_BYTES;
}

static uint8_t *object_address(const struct pool_space *space, uint32_t number, unsigned class,
			       unsigned index)
{
	return slab_address(space, number) + index * class_bytes(class);
}

static uint64_t object_handle(uint32_t number, unsigned class, unsigned index)
{
	return (uint64_t)number * SLAB_UNITS + index * class_units[class];
}

static uint16_t link_get(const uint8_t *object)
{
	uint16_t link;

	memcpy(&link, object, sizeof link);
	return link;
}

static void link_set(uint8_t *object, unsigned link)
{
	uint16_t value = (uint16_t)link;

	memcpy(object, &value, sizeof value);
}

/* ---- lists of slabs ---- */

static void list_push(struct pool_space *space, uint32_t *head, uint32_t number)
{
	struct slab *slab = &space->slabs[number];

	slab->next = *head;
	slab->previous = SLAB_NONE;
	if (*head != SLAB_NONE)
		space->slabs[*head].previous = number;
	*head = number;
}

static void list_remove(struct pool_space *space, uint32_t *head, uint32_t number)
{
	struct slab *slab = &space->slabs[number];

	if (slab->previous == SLAB_NONE) {
		VS_CHECK(*head == number);
		*head = slab->next;
	} else {
		space->slabs[slab->previous].next = slab->next;
	}
	if (slab->next != SLAB_NONE)
		space->slabs[slab->next].previous = slab->previous;
	slab->next = slab->previous = SLAB_NONE;
}

static uint32_t list_pop(struct pool_space *space, uint32_t *head)
{
	uint32_t number = *head;

	if (number != SLAB_NONE)
		list_remove(space, head, number);
	return number;
}

static void slab_set_state(struct slab *slab, enum slab_state state)
{
	__atomic_store_n(&slab->state, (uint8_t)state, __ATOMIC_RELAXED);
}

static void slab_set_owner(struct slab *slab, unsigned owner)
{
	__atomic_store_n(&slab->owner, (uint16_t)owner, __ATOMIC_RELAXED);
}

/* The list of its pool that a slab belongs to, going by its state and fullness. */
static uint32_t *slab_list(struct pool *pool, const struct slab *slab)
{
	unsigned capacity = class_capacity[slab->class];

	if (slab->state == SLAB_EVACUATING)
		return &pool->evacuating_head;
	if (slab->used == capacity)
		return &pool->full_head;
	return &pool->classes[slab->class].heads[slab->used * FULLNESS_LEVELS / capacity];
}

/* A slab's `used` changed: move it from list `before` to the one it belongs to now. */
static void slab_relist(struct pool *pool, uint32_t number, uint32_t *before)
{
	struct slab *slab = &pool->space->slabs[number];
	uint32_t *after = slab_list(pool, slab);

	if (before == after)
		return;
	list_remove(pool->space, before, number);
	list_push(pool->space, after, number);
	if (slab->state != SLAB_EVACUATING)
		slab_set_state(slab, after == &pool->full_head ? SLAB_FULL : SLAB_PARTIAL);
}

/* ---- slabs of the space ---- */

/* Give back the memory of [offset, offset + bytes). The kernel refuses only a sealed memfd. */
static void space_punch(const struct pool_space *space, uint64_t offset, uint64_t bytes)
{
	int result = fallocate(space->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			       (off_t)offset, (off_t)bytes);

	(void)result;
}

/* Memory for the headers of slabs [0, count). The space is locked. */
static int headers_reserve(struct pool_space *space, uint32_t count)
{
	uint32_t want = (uint32_t)align_up(count, HEADERS_POPULATED_AT_ONCE);

	if (count <= space->headers_populated)
		return 0;
	if (madvise(space->slabs + space->headers_populated,
		    (want - space->headers_populated) * sizeof *space->slabs,
		    MADV_POPULATE_WRITE) != 0)
		return -ENOMEM;
	space->headers_populated = want;
	return 0;
}

/* A slab number for a new slab, preferably one with memory. */
static int slab_number_take(struct pool_space *space, uint32_t *ret_number, bool *ret_is_populated)
{
	SCOPED_LOCK(&space->lock);
	uint32_t number;

	if (fault_point("pool/grow"))
		return -ENOMEM;
	number = list_pop(space, &space->reserve_head);
	*ret_is_populated = number != SLAB_NONE;
	if (number != SLAB_NONE)
		space->reserve_count--;
	else
		number = list_pop(space, &space->free_head);
	if (number == SLAB_NONE) {
		if (space->end == space->slab_count)
			return -ENOSPC;
		if (headers_reserve(space, space->end + 1) < 0)
			return -ENOMEM;
		number = space->end++;
	}
	VS_CHECK(space->slabs[number].state == SLAB_FREE && space->slabs[number].owner == 0);
	*ret_number = number;
	return 0;
}

static void slab_number_give(struct pool_space *space, uint32_t number, bool may_reserve)
{
	pthread_mutex_lock(&space->lock);
	if (may_reserve && space->reserve_count < RESERVE_SLABS) {
		list_push(space, &space->reserve_head, number);
		space->reserve_count++;
		pthread_mutex_unlock(&space->lock);
		return;
	}
	pthread_mutex_unlock(&space->lock);
	/* Nobody else knows the slab now; it is offered again only when its memory is gone. */
	space_punch(space, number * POOL_SLAB_BYTES, POOL_SLAB_BYTES);
	SCOPED_LOCK(&space->lock);
	list_push(space, &space->free_head, number);
}

/* Thread the free objects of a slab, all or (when adopted) those not in `live`. */
static void slab_thread(struct pool_space *space, uint32_t number, const struct slab_live *live)
{
	struct slab *slab = &space->slabs[number];
	unsigned next = OBJECT_NONE;

	for (unsigned i = class_capacity[slab->class]; i-- > 0;) {
		if (live && live->words[i / 64] >> i % 64 & 1)
			continue;
		link_set(object_address(space, number, slab->class, i), next);
		next = i;
	}
	slab->free_head = (uint16_t)next;
}

/* A populated, threaded slab that belongs to nobody yet. */
static int slab_take(struct pool_space *space, unsigned class, uint32_t *ret_number)
{
	uint32_t number = SLAB_NONE;
	bool is_populated;
	int result = slab_number_take(space, &number, &is_populated);

	if (result < 0)
		return result;
	if (!is_populated &&
	    madvise(slab_address(space, number), POOL_SLAB_BYTES, MADV_POPULATE_WRITE) != 0) {
		slab_number_give(space, number, false);
		return -ENOMEM;
	}
	space->slabs[number].class = (uint8_t)class;
	space->slabs[number].used = 0;
	slab_thread(space, number, NULL);
	*ret_number = number;
	return 0;
}

/* ---- space ---- */

/* Map the memfd, and room for a header per slab that takes memory only when slabs are used. */
static int space_map(struct pool_space *space)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	uint64_t bytes = space->slab_count * POOL_SLAB_BYTES;
	uint64_t headers_bytes = align_up(space->slab_count * sizeof *space->slabs, PAGE_BYTES);
	void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
			  space->memfd, 0);
	void *headers;

	if (base == MAP_FAILED)
		return -errno;
	headers = mmap(NULL, headers_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (headers == MAP_FAILED) {
		int result = -errno;
		munmap(base, bytes);
		return result;
	}
	/* Slabs come and go one by one; a huge page would outlive all but its last. */
	(void)madvise(base, bytes, MADV_NOHUGEPAGE);
	space->base = base;
	space->slabs = headers;
	return 0;
}

/* Make the memfd long enough, and note how long it was. */
static int space_measure(struct pool_space *space, uint64_t capacity_bytes)
{
	struct stat status;
	uint64_t bytes;

	if (capacity_bytes == 0 || capacity_bytes > SPACE_BYTES_MAX)
		return -EINVAL;
	if (fstat(space->memfd, &status) != 0)
		return -errno;
	space->found_bytes = (uint64_t)status.st_size;
	bytes = align_up(max_of(capacity_bytes, space->found_bytes), POOL_SLAB_BYTES);
	if (bytes > SPACE_BYTES_MAX)
		return -EINVAL;
	if (bytes > space->found_bytes && ftruncate(space->memfd, (off_t)bytes) != 0)
		return -errno;
	space->slab_count = (uint32_t)(bytes / POOL_SLAB_BYTES);
	return 0;
}

int pool_space_create(int memfd, uint64_t capacity_bytes, struct pool_space **ret_space)
{
	struct pool_space *space = calloc(1, sizeof *space);
	int result;

	if (!space)
		return -ENOMEM;
	space->memfd = memfd;
	space->reserve_head = space->free_head = SLAB_NONE;
	space->adopting = true;
	result = space_measure(space, capacity_bytes);
	if (result == 0)
		result = space_map(space);
	if (result < 0) {
		free(space);
		return result;
	}
	pthread_mutex_init(&space->lock, NULL);
	*ret_space = space;
	return 0;
}

static void live_unmap(struct pool_space *space)
{
	if (space->live)
		munmap(space->live, space->slab_count * sizeof *space->live);
	space->live = NULL;
}

void pool_space_destroy(struct pool_space *space)
{
	if (!space)
		return;
	VS_CHECK(space->pool_count == 0);
	live_unmap(space);
	munmap(space->base, space->slab_count * POOL_SLAB_BYTES);
	munmap(space->slabs, align_up(space->slab_count * sizeof *space->slabs, PAGE_BYTES));
	pthread_mutex_destroy(&space->lock);
	free(space);
}

/* ---- adoption ---- */

static bool space_is_adopting(const struct pool_space *space)
{
	return __builtin_expect(__atomic_load_n(&space->adopting, __ATOMIC_ACQUIRE), 0);
}

/* Bitmaps for all slabs, which take memory only where they are written. The space is locked. */
static int live_map(struct pool_space *space)
{
	void *live;

	if (space->live)
		return 0;
	live = mmap(NULL, space->slab_count * sizeof *space->live, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (live == MAP_FAILED)
		return -ENOMEM;
	space->live = live;
	return 0;
}

/* Mark an object live; the first of a slab makes it this pool's. Pool and space are locked. */
static int slab_adopt(struct pool *pool, uint32_t number, unsigned class, unsigned index)
{
	struct pool_space *space = pool->space;
	struct slab *slab = &space->slabs[number];
	uint64_t *word = &space->live[number].words[index / 64], bit = 1ULL << index % 64;

	if (slab->owner == 0) {
		slab_set_owner(slab, pool->number);
		slab->class = (uint8_t)class;
		WRITE_ONCE(pool->slab_count, pool->slab_count + 1);
		pool->classes[class].slab_count++;
	}
	if (slab->owner != pool->number || slab->class != class || *word & bit)
		return -EINVAL;
	*word |= bit;
	slab->used++;
	pool->classes[class].used++;
	pool->object_count++;
	WRITE_ONCE(pool->object_bytes, pool->object_bytes + class_bytes(class));
	return 0;
}

int pool_adopt(struct pool *pool, uint64_t handle, unsigned units)
{
	struct pool_space *space = pool->space;
	uint64_t number = handle / SLAB_UNITS;
	unsigned class, offset = (unsigned)(handle % SLAB_UNITS);

	if (units == 0 || units > POOL_UNITS_MAX || number >= space->found_bytes / POOL_SLAB_BYTES)
		return -EINVAL;
	class = class_of(units);
	if (offset % class_units[class] != 0 ||
	    offset / class_units[class] >= class_capacity[class])
		return -EINVAL;
	SCOPED_LOCK(&pool->lock);
	SCOPED_LOCK(&space->lock);
	if (!space->adopting)
		return -EINVAL;
	if (live_map(space) < 0 || headers_reserve(space, (uint32_t)number + 1) < 0)
		return -ENOMEM;
	space->end = max_of(space->end, (uint32_t)number + 1);
	return slab_adopt(pool, (uint32_t)number, class, offset / class_units[class]);
}

/* Give an adopted slab to its pool, which is not locked: nobody uses it before adoption ends. */
static void slab_adopt_end(struct pool_space *space, uint32_t number)
{
	struct slab *slab = &space->slabs[number];
	struct pool *pool = space->pools[slab->owner];
	uint32_t *list;

	VS_CHECK(pool && slab->used > 0);
	list = slab_list(pool, slab);
	slab_thread(space, number, &space->live[number]);
	slab_set_state(slab, list == &pool->full_head ? SLAB_FULL : SLAB_PARTIAL);
	list_push(space, list, number);
}

void pool_space_adopt_end(struct pool_space *space)
{
	SCOPED_LOCK(&space->lock);
	uint64_t gap_end = space->found_bytes; /* all behind it is dealt with */

	if (!space->adopting)
		return;
	for (uint32_t number = space->end; number-- > 0;) {
		uint64_t start = number * POOL_SLAB_BYTES;

		if (space->slabs[number].owner == 0) {
			list_push(space, &space->free_head, number);
			continue;
		}
		slab_adopt_end(space, number);
		if (gap_end > start + POOL_SLAB_BYTES)
			space_punch(space, start + POOL_SLAB_BYTES,
				    gap_end - start - POOL_SLAB_BYTES);
		gap_end = start;
	}
	if (gap_end > 0)
		space_punch(space, 0, gap_end);
	live_unmap(space);
	__atomic_store_n(&space->adopting, false, __ATOMIC_RELEASE);
}

/* ---- pools ---- */

static int pool_register(struct pool *pool)
{
	struct pool_space *space = pool->space;
	SCOPED_LOCK(&space->lock);

	for (unsigned number = 1; number <= GROUPS_MAX; number++) {
		if (space->pools[number])
			continue;
		space->pools[number] = pool;
		space->pool_count++;
		pool->number = (uint16_t)number;
		return 0;
	}
	return -ENOSPC;
}

int pool_create(struct pool_space *space, struct pool **ret_pool)
{
	struct pool *pool = calloc(1, sizeof *pool);

	if (!pool)
		return -ENOMEM;
	pool->space = space;
	pool->full_head = pool->evacuating_head = SLAB_NONE;
	for (unsigned class = 0; class < POOL_CLASSES; class++)
		for (unsigned level = 0; level < FULLNESS_LEVELS; level++)
			pool->classes[class].heads[level] = SLAB_NONE;
	if (pool_register(pool) < 0) {
		free(pool);
		return -ENOSPC;
	}
	pthread_mutex_init(&pool->lock, NULL);
	*ret_pool = pool;
	return 0;
}

/* Take a slab out of its pool, which is locked, and out of its counts. Live objects are lost. */
static void slab_forget(struct pool *pool, uint32_t number)
{
	struct slab *slab = &pool->space->slabs[number];
	struct pool_class *class = &pool->classes[slab->class];

	VS_CHECK(slab->owner == pool->number);
	list_remove(pool->space, slab_list(pool, slab), number);
	if (slab->state == SLAB_EVACUATING)
		class->evacuating_count--;
	class->slab_count--;
	class->used -= slab->used;
	WRITE_ONCE(pool->slab_count, pool->slab_count - 1);
	pool->object_count -= slab->used;
	WRITE_ONCE(pool->object_bytes, pool->object_bytes - slab->used * class_bytes(slab->class));
	slab->used = 0;
	slab_set_owner(slab, 0);
	slab_set_state(slab, SLAB_FREE);
}

static void list_release(struct pool *pool, const uint32_t *head)
{
	while (*head != SLAB_NONE) {
		uint32_t number = *head;

		slab_forget(pool, number);
		slab_number_give(pool->space, number, true);
	}
}

void pool_destroy(struct pool *pool)
{
	struct pool_space *space;

	if (!pool)
		return;
	space = pool->space;
	pool_space_adopt_end(space);
	list_release(pool, &pool->full_head);
	list_release(pool, &pool->evacuating_head);
	for (unsigned class = 0; class < POOL_CLASSES; class++)
		for (unsigned level = 0; level < FULLNESS_LEVELS; level++)
			list_release(pool, &pool->classes[class].heads[level]);
	VS_CHECK(pool->slab_count == 0 && pool->object_count == 0 && pool->object_bytes == 0);
	pthread_mutex_lock(&space->lock);
	VS_CHECK(space->pools[pool->number] == pool);
	space->pools[pool->number] = NULL;
	space->pool_count--;
	pthread_mutex_unlock(&space->lock);
	pthread_mutex_destroy(&pool->lock);
	free(pool);
}

/* ---- store and free ---- */

/* The fullest PARTIAL slab of a class, to within a level. The pool is locked. */
static uint32_t class_fullest(const struct pool *pool, unsigned class)
{
	for (unsigned level = FULLNESS_LEVELS; level-- > 0;)
		if (pool->classes[class].heads[level] != SLAB_NONE)
			return pool->classes[class].heads[level];
	return SLAB_NONE;
}

/* Take the first free object of a PARTIAL slab. The pool is locked. */
static uint64_t object_take(struct pool *pool, uint32_t number)
{
	struct slab *slab = &pool->space->slabs[number];
	unsigned capacity = class_capacity[slab->class], index = slab->free_head;
	uint32_t *list = slab_list(pool, slab);

	VS_CHECK(slab->state == SLAB_PARTIAL && index < capacity && slab->used < capacity);
	slab->free_head = link_get(object_address(pool->space, number, slab->class, index));
	VS_CHECK(slab->free_head < capacity || slab->free_head == OBJECT_NONE);
	slab->used++;
	pool->classes[slab->class].used++;
	pool->object_count++;
	WRITE_ONCE(pool->object_bytes, pool->object_bytes + class_bytes(slab->class));
	slab_relist(pool, number, list);
	return object_handle(number, slab->class, index);
}

/* A fresh slab becomes this pool's, PARTIAL. The pool is locked. */
static void slab_enlist(struct pool *pool, uint32_t number)
{
	struct slab *slab = &pool->space->slabs[number];

	slab_set_owner(slab, pool->number);
	slab_set_state(slab, SLAB_PARTIAL);
	list_push(pool->space, slab_list(pool, slab), number);
	pool->classes[slab->class].slab_count++;
	WRITE_ONCE(pool->slab_count, pool->slab_count + 1);
}

/* Take an object of a class from a new slab, or from one that became PARTIAL meanwhile. */
static int pool_grow(struct pool *pool, unsigned class, uint64_t *ret_handle)
{
	uint32_t fresh = SLAB_NONE, number;
	int result = slab_take(pool->space, class, &fresh);

	pthread_mutex_lock(&pool->lock);
	number = class_fullest(pool, class);
	if (number == SLAB_NONE && result == 0) {
		slab_enlist(pool, fresh);
		number = fresh;
		fresh = SLAB_NONE;
	}
	if (number != SLAB_NONE)
		*ret_handle = object_take(pool, number);
	pthread_mutex_unlock(&pool->lock);
	if (fresh != SLAB_NONE)
		slab_number_give(pool->space, fresh, true);
	return number != SLAB_NONE ? 0 : result;
}

int pool_store(struct pool *pool, const void *object, unsigned units, uint64_t *ret_handle)
{
	unsigned class = class_of(units);
	uint64_t handle = 0;
	uint32_t number;
	int result;

	if (space_is_adopting(pool->space))
		pool_space_adopt_end(pool->space);
	pthread_mutex_lock(&pool->lock);
	number = class_fullest(pool, class);
	if (number != SLAB_NONE)
		handle = object_take(pool, number);
	pthread_mutex_unlock(&pool->lock);
	if (number == SLAB_NONE) {
		result = pool_grow(pool, class, &handle);
		if (result < 0)
			return result;
	}
	/* Outside the lock: the object is on no free list, and nobody else knows its handle yet. */
	memcpy(pool->space->base + handle * POOL_UNIT_BYTES, object, units * POOL_UNIT_BYTES);
	*ret_handle = handle;
	return 0;
}

const void *pool_object(const struct pool_space *space, uint64_t handle)
{
	VS_CHECK(handle < (uint64_t)space->slab_count * SLAB_UNITS);
	return space->base + handle * POOL_UNIT_BYTES;
}

/* Too slow but for debugging: a free that happens twice. */
static bool object_is_free(const struct pool_space *space, uint32_t number, unsigned index)
{
	const struct slab *slab = &space->slabs[number];
	unsigned at = slab->free_head;

	for (unsigned i = 0; i < SLAB_UNITS && at != OBJECT_NONE; i++) {
		if (at == index)
			return true;
		at = link_get(object_address(space, number, slab->class, at));
	}
	return false;
}

/* Put an object back on its slab's free list; true when the slab is empty and forgotten now. */
static bool object_give(struct pool *pool, uint32_t number, unsigned class, unsigned index)
{
	struct slab *slab = &pool->space->slabs[number];
	uint32_t *list;

	VS_CHECK(slab->owner == pool->number && slab->class == class && slab->used > 0);
	VS_DCHECK(!object_is_free(pool->space, number, index));
	list = slab_list(pool, slab);
	link_set(object_address(pool->space, number, class, index), slab->free_head);
	slab->free_head = (uint16_t)index;
	slab->used--;
	pool->classes[class].used--;
	pool->object_count--;
	WRITE_ONCE(pool->object_bytes, pool->object_bytes - class_bytes(class));
	slab_relist(pool, number, list);
	if (slab->used > 0)
		return false;
	slab_forget(pool, number);
	return true;
}

void pool_free(struct pool *pool, uint64_t handle, unsigned units)
{
	unsigned class = class_of(units), offset = (unsigned)(handle % SLAB_UNITS);
	uint32_t number = (uint32_t)(handle / SLAB_UNITS);
	bool is_empty;

	if (space_is_adopting(pool->space))
		pool_space_adopt_end(pool->space);
	VS_CHECK(handle < (uint64_t)pool->space->slab_count * SLAB_UNITS);
	VS_CHECK(offset % class_units[class] == 0);
	VS_CHECK(offset / class_units[class] < class_capacity[class]);
	pthread_mutex_lock(&pool->lock);
	is_empty = object_give(pool, number, class, offset / class_units[class]);
	pthread_mutex_unlock(&pool->lock);
	if (is_empty)
		slab_number_give(pool->space, number, true);
}

unsigned pool_object_bytes(unsigned units)
{
	return (unsigned)class_bytes(class_of(units));
}

uint64_t pool_growth_bytes(struct pool *pool, unsigned units)
{
	unsigned class = class_of(units);

	if (space_is_adopting(pool->space))
		return POOL_SLAB_BYTES;
	SCOPED_LOCK(&pool->lock);
	return class_fullest(pool, class) == SLAB_NONE ? POOL_SLAB_BYTES : 0;
}

/* ---- compaction ---- */

/*
 * How many PARTIAL slabs of a class can be emptied into the others. All live objects, also those of
 * slabs being evacuated already, must fit into the slabs that stay.
 */
static uint64_t class_surplus_slabs(const struct pool_class *class, unsigned capacity)
{
	uint64_t needed = div_ceil(class->used, capacity);
	uint64_t have = class->slab_count - class->evacuating_count;

	return have > needed ? have - needed : 0;
}

/* Mark the slabs of one level of a class, at most `max` of them. Returns how many. */
static unsigned level_evacuate(struct pool *pool, unsigned class, unsigned level, uint64_t max)
{
	struct pool_class *of = &pool->classes[class];
	unsigned count = 0;

	max = min_of(max, class_surplus_slabs(of, class_capacity[class]));
	while (count < max && of->heads[level] != SLAB_NONE) {
		uint32_t number = list_pop(pool->space, &of->heads[level]);

		slab_set_state(&pool->space->slabs[number], SLAB_EVACUATING);
		list_push(pool->space, &pool->evacuating_head, number);
		of->evacuating_count++;
		count++;
	}
	return count;
}

unsigned pool_evacuate(struct pool *pool, uint64_t bytes)
{
	uint64_t wanted = bytes / POOL_SLAB_BYTES + (bytes % POOL_SLAB_BYTES != 0);
	unsigned count = 0;

	if (space_is_adopting(pool->space))
		pool_space_adopt_end(pool->space);
	SCOPED_LOCK(&pool->lock);
	for (unsigned level = 0; level < FULLNESS_LEVELS; level++)
		for (unsigned class = 0; class < POOL_CLASSES && count < wanted; class++)
			count += level_evacuate(pool, class, level, wanted - count);
	return count;
}

bool pool_is_evacuating(const struct pool *pool, uint64_t handle)
{
	const struct pool_space *space = pool->space;
	const struct slab *slab = &space->slabs[handle / SLAB_UNITS];

	VS_CHECK(handle < (uint64_t)space->slab_count * SLAB_UNITS);
	return __atomic_load_n(&slab->state, __ATOMIC_RELAXED) == SLAB_EVACUATING &&
	       __atomic_load_n(&slab->owner, __ATOMIC_RELAXED) == pool->number;
}

void pool_evacuate_end(struct pool *pool)
{
	uint32_t number;

	if (space_is_adopting(pool->space))
		return;
	SCOPED_LOCK(&pool->lock);
	while ((number = list_pop(pool->space, &pool->evacuating_head)) != SLAB_NONE) {
		struct slab *slab = &pool->space->slabs[number];

		/* It came from PARTIAL and can only have lost objects since. */
		VS_CHECK(slab->used < class_capacity[slab->class]);
		slab_set_state(slab, SLAB_PARTIAL);
		list_push(pool->space, slab_list(pool, slab), number);
		pool->classes[slab->class].evacuating_count--;
	}
}

/* ---- statistics and validation ---- */

uint64_t pool_bytes(const struct pool *pool)
{
	return READ_ONCE(pool->slab_count) * POOL_SLAB_BYTES;
}

uint64_t pool_live_bytes(const struct pool *pool)
{
	return READ_ONCE(pool->object_bytes);
}

void pool_statistics(struct pool *pool, struct pool_statistics *ret_statistics)
{
	SCOPED_LOCK(&pool->lock);

	*ret_statistics = (struct pool_statistics){
		.bytes = pool_bytes(pool),
		.object_bytes = pool->object_bytes,
		.object_count = pool->object_count,
		.slab_count = pool->slab_count,
		.metadata_bytes = pool->slab_count * sizeof(struct slab) + sizeof *pool,
	};
}

/* Invariant 2: the free list has each free object once, and as many as there should be. */
static bool slab_free_list_is_valid(const struct pool_space *space, uint32_t number)
{
	const struct slab *slab = &space->slabs[number];
	unsigned capacity = class_capacity[slab->class], count = 0;
	struct slab_live seen = { { 0 } };

	for (unsigned at = slab->free_head; at != OBJECT_NONE; count++) {
		if (at >= capacity || seen.words[at / 64] >> at % 64 & 1)
			return false;
		seen.words[at / 64] |= 1ULL << at % 64;
		at = link_get(object_address(space, number, slab->class, at));
	}
	return slab->used + count == capacity;
}

/* What was found on the lists of a pool. */
struct pool_census {
	uint64_t slab_count, object_count, object_bytes;
	struct {
		uint64_t slab_count, evacuating_count, used;
	} classes[POOL_CLASSES];
};

static bool slab_is_valid(struct pool *pool, uint32_t number, const uint32_t *list)
{
	const struct slab *slab = &pool->space->slabs[number];
	enum slab_state state = list == &pool->full_head         ? SLAB_FULL
				: list == &pool->evacuating_head ? SLAB_EVACUATING
								 : SLAB_PARTIAL;

	if (slab->owner != pool->number || slab->class >= POOL_CLASSES || slab->state != state)
		return false;
	if (slab->used == 0 || slab_list(pool, slab) != list)
		return false;
	return slab_free_list_is_valid(pool->space, number);
}

/* Check the slabs of a list and count them. A list longer than the pool has slabs is a ring. */
static bool list_is_valid(struct pool *pool, const uint32_t *list, struct pool_census *census)
{
	uint32_t previous = SLAB_NONE;

	for (uint32_t number = *list; number != SLAB_NONE;) {
		const struct slab *slab = &pool->space->slabs[number];

		if (++census->slab_count > pool->slab_count || slab->previous != previous ||
		    !slab_is_valid(pool, number, list))
			return false;
		census->classes[slab->class].slab_count++;
		census->classes[slab->class].evacuating_count += slab->state == SLAB_EVACUATING;
		census->classes[slab->class].used += slab->used;
		census->object_count += slab->used;
		census->object_bytes += slab->used * class_bytes(slab->class);
		previous = number;
		number = slab->next;
	}
	return true;
}

bool pool_is_valid(struct pool *pool)
{
	struct pool_census census = { 0 };

	pool_space_adopt_end(pool->space);
	SCOPED_LOCK(&pool->lock);
	if (!list_is_valid(pool, &pool->full_head, &census) ||
	    !list_is_valid(pool, &pool->evacuating_head, &census))
		return false;
	for (unsigned i = 0; i < POOL_CLASSES; i++) {
		const struct pool_class *class = &pool->classes[i];

		for (unsigned level = 0; level < FULLNESS_LEVELS; level++)
			if (!list_is_valid(pool, &class->heads[level], &census))
				return false;
		if (census.classes[i].slab_count != class->slab_count ||
		    census.classes[i].evacuating_count != class->evacuating_count ||
		    census.classes[i].used != class->used)
			return false;
	}
	return census.slab_count == pool->slab_count && census.object_count == pool->object_count &&
	       census.object_bytes == pool->object_bytes;
}
