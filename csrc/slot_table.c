/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "slot_table.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base.h"
#include "crash_point.h"

/*
 * Word: bits 0-3 tag, 4-5 reserved, 6-11 units - 1, 12-49 location, 50-53 backend, 54-63 check 48-57.
 * SAME: bits 12-27 hold bits 48-63 of the repeated word.
 */
#define WORD_UNITS_SHIFT 6
#define WORD_LOCATION_SHIFT 12
#define WORD_LOCATION_MASK ((1ULL << 38) - 1)
#define WORD_BACKEND_SHIFT 50
#define WORD_CHECK_SHIFT 54
#define CHECK_LOW_MASK ((1ULL << 48) - 1)

struct cluster {
	uint64_t words[CLUSTER_PAGES];
	uint32_t check_middle[CLUSTER_PAGES]; /* check bits 16-47 */
	uint16_t check_low[CLUSTER_PAGES];    /* check bits 0-15 */
	uint32_t share;                       /* maps that have it */
	uint16_t live;                        /* words that are not NONE */
	uint16_t was_shared;                  /* POOL and SPILL in it are counted as INDIRECT */
};
static_assert(sizeof(struct cluster) == 14 * CLUSTER_PAGES + 8, "14 bytes a page");

struct shared_slot {
	uint64_t word;
	uint32_t check_middle;
	uint16_t check_low;
	uint16_t count; /* 0: free, word is the next free index */
};
static_assert(sizeof(struct shared_slot) == 16, "layout in the state memfd");
#define SHARED_COUNT_MAX 65535u

/* The space is cut in three: clusters, shared slots, indexes, each handed out from its bottom. */
#define CHUNK_BYTES 65536UL
#define INDEX_LOG2_MIN 9
#define INDEX_LOG2_MAX 29

struct area {
	char *base;
	uint64_t bytes, used, populated;
};

struct slot_space {
	pthread_mutex_t lock;       /* handing out */
	pthread_mutex_t share_lock; /* contents of shared clusters and slots */
	struct area clusters, shared, indexes;
	uint32_t free_cluster; /* head of the free list, linked through words[0]; 0: empty */
	uint32_t free_shared;
	uint64_t free_index[INDEX_LOG2_MAX + 1]; /* offset + 1 of a free block, linked through its first word */
	uint64_t metadata_bytes; /* clusters, shared slots and indexes in use; atomic */
	uint64_t shared_spill_pages;
};

/* ---- words ---- */

static uint64_t word_of(struct slot slot)
{
	uint64_t word = (uint64_t)slot.tag;

	switch (slot.tag) {
	case SLOT_SAME:
		return word | (slot.check >> 48) << WORD_LOCATION_SHIFT;
	case SLOT_POOL:
	case SLOT_SPILL:
	case SLOT_KEPT_POOL:
	case SLOT_KEPT_SPILL:
		VS_CHECK(slot.location <= WORD_LOCATION_MASK);
		VS_CHECK(slot.units >= 1 && slot.units <= POOL_UNITS_MAX);
		return word | (uint64_t)(slot.units - 1) << WORD_UNITS_SHIFT |
		       slot.location << WORD_LOCATION_SHIFT |
		       (uint64_t)slot.backend << WORD_BACKEND_SHIFT |
		       (slot.check >> 48) << WORD_CHECK_SHIFT;
	case SLOT_STAGED:
	case SLOT_INDIRECT:
		return word | slot.location << WORD_LOCATION_SHIFT;
	default:
		return word;
	}
}

static struct slot slot_of(uint64_t word, uint64_t check_low48)
{
	struct slot slot = { .tag = (enum slot_tag)(word & 15) };

	switch (slot.tag) {
	case SLOT_SAME:
		slot.check = check_low48 | (word >> WORD_LOCATION_SHIFT) << 48;
		break;
	case SLOT_POOL:
	case SLOT_SPILL:
	case SLOT_KEPT_POOL:
	case SLOT_KEPT_SPILL:
		slot.units = (uint8_t)(((word >> WORD_UNITS_SHIFT) & 63) + 1);
		slot.location = (word >> WORD_LOCATION_SHIFT) & WORD_LOCATION_MASK;
		slot.backend = (uint8_t)((word >> WORD_BACKEND_SHIFT) & 15);
		slot.check = check_low48 | (word >> WORD_CHECK_SHIFT) << 48;
		break;
	case SLOT_STAGED:
	case SLOT_INDIRECT:
		slot.location = (word >> WORD_LOCATION_SHIFT) & WORD_LOCATION_MASK;
		break;
	default:
		VS_CHECK(slot.tag < SLOT_TAG_COUNT);
	}
	return slot;
}

static struct slot cluster_slot(const struct cluster *cluster, unsigned i)
{
	return slot_of(cluster->words[i],
		       (uint64_t)cluster->check_middle[i] << 16 | cluster->check_low[i]);
}

/* The check first, the word last and in one store: a reader after a crash sees either slot, whole;
 * the check of a swapped slot never changes without passing through STAGED or NONE. */
static void cluster_store(struct cluster *cluster, unsigned i, struct slot slot)
{
	if (slot.tag == SLOT_SAME || slot.tag == SLOT_POOL || slot.tag == SLOT_SPILL || slot_is_kept(slot.tag)) {
		cluster->check_middle[i] = (uint32_t)(slot.check >> 16);
		cluster->check_low[i] = (uint16_t)slot.check;
	}
	__atomic_store_n(&cluster->words[i], word_of(slot), __ATOMIC_RELEASE);
}

static struct slot shared_slot_read(const struct shared_slot *shared)
{
	return slot_of(shared->word, (uint64_t)shared->check_middle << 16 | shared->check_low);
}

static void shared_slot_write(struct shared_slot *shared, struct slot slot)
{
	shared->check_middle = (uint32_t)(slot.check >> 16);
	shared->check_low = (uint16_t)slot.check;
	__atomic_store_n(&shared->word, word_of(slot), __ATOMIC_RELEASE);
}

/* ---- the space ---- */

/* Make sure that the first `bytes` of an area have memory behind them: an error here, no SIGBUS later. */
static int area_reserve(struct area *area, uint64_t bytes)
{
	uint64_t want = align_up(bytes, CHUNK_BYTES);

	if (want > area->bytes)
		return -ENOMEM;
	if (want <= area->populated)
		return 0;
	if (madvise(area->base + area->populated, want - area->populated, 23 /* POPULATE_WRITE */) != 0)
		return -ENOMEM;
	area->populated = want;
	return 0;
}

int slot_space_create(void *base, uint64_t bytes, struct slot_space **ret_space)
{
	struct slot_space *space = calloc(1, sizeof *space);
	uint64_t third = bytes / 4 / CHUNK_BYTES * CHUNK_BYTES;

	if (!space)
		return -ENOMEM;
	pthread_mutex_init(&space->lock, NULL);
	pthread_mutex_init(&space->share_lock, NULL);
	space->clusters = (struct area){ base, 2 * third, sizeof(struct cluster), 0 };
	space->shared = (struct area){ (char *)base + 2 * third, third, sizeof(struct shared_slot), 0 };
	space->indexes = (struct area){ (char *)base + 3 * third, third, 4096, 0 };
	*ret_space = space;
	return 0;
}

void slot_space_destroy(struct slot_space *space)
{
	if (!space)
		return;
	pthread_mutex_destroy(&space->lock);
	pthread_mutex_destroy(&space->share_lock);
	free(space);
}

static struct cluster *cluster_at(const struct slot_space *space, uint32_t id)
{
	VS_CHECK(id != 0 && (uint64_t)id * sizeof(struct cluster) < READ_ONCE(space->clusters.used));
	return (struct cluster *)(space->clusters.base) + id;
}

static struct shared_slot *shared_at(const struct slot_space *space, uint64_t index)
{
	VS_CHECK(index != 0 && index * sizeof(struct shared_slot) < READ_ONCE(space->shared.used));
	return (struct shared_slot *)(space->shared.base) + index;
}

static void metadata_change(struct slot_space *space, int64_t by)
{
	__atomic_fetch_add(&space->metadata_bytes, (uint64_t)by, __ATOMIC_RELAXED);
}

static uint32_t cluster_alloc(struct slot_space *space)
{
	SCOPED_LOCK(&space->lock);
	struct cluster *cluster;
	uint32_t id = space->free_cluster;

	if (id != 0) {
		cluster = cluster_at(space, id);
		space->free_cluster = (uint32_t)cluster->words[0];
	} else {
		uint64_t next = space->clusters.used;

		if (area_reserve(&space->clusters, next + sizeof *cluster) != 0)
			return 0;
		WRITE_ONCE(space->clusters.used, next + sizeof *cluster);
		id = (uint32_t)(next / sizeof *cluster);
		cluster = cluster_at(space, id);
	}
	memset(cluster, 0, sizeof *cluster);
	cluster->share = 1;
	metadata_change(space, sizeof *cluster);
	return id;
}

static void cluster_free(struct slot_space *space, uint32_t id)
{
	SCOPED_LOCK(&space->lock);
	struct cluster *cluster = cluster_at(space, id);

	VS_CHECK(cluster->live == 0 || cluster->share == 0);
	cluster->words[0] = space->free_cluster;
	cluster->share = 0;
	cluster->live = 0;
	cluster->was_shared = 0;
	space->free_cluster = id;
	metadata_change(space, -(int64_t)sizeof *cluster);
}

static uint64_t shared_alloc(struct slot_space *space)
{
	SCOPED_LOCK(&space->lock);
	uint64_t index = space->free_shared;

	if (index != 0) {
		space->free_shared = (uint32_t)shared_at(space, index)->word;
	} else {
		uint64_t next = space->shared.used;

		if (area_reserve(&space->shared, next + sizeof(struct shared_slot)) != 0)
			return 0;
		WRITE_ONCE(space->shared.used, next + sizeof(struct shared_slot));
		index = next / sizeof(struct shared_slot);
	}
	metadata_change(space, sizeof(struct shared_slot));
	return index;
}

static void shared_release(struct slot_space *space, uint64_t index)
{
	SCOPED_LOCK(&space->lock);
	struct shared_slot *shared = shared_at(space, index);

	shared->count = 0;
	shared->word = space->free_shared;
	space->free_shared = (uint32_t)index;
	metadata_change(space, -(int64_t)sizeof(struct shared_slot));
}

uint64_t slot_space_metadata_bytes(const struct slot_space *space)
{
	return READ_ONCE(space->metadata_bytes);
}

uint64_t slot_space_shared_spill_pages(const struct slot_space *space)
{
	return READ_ONCE(space->shared_spill_pages);
}

/* ---- index: cluster number of the address space -> cluster ----
 * Open addressing. Entry: (number + 1) << 32 | cluster id; id 0: a tombstone. */

static unsigned index_log2(const struct slot_map *map) { return (unsigned)(map->root & 255); }

static uint64_t *index_entries(const struct slot_space *space, const struct slot_map *map)
{
	return (uint64_t *)(space->indexes.base + (map->root >> 8));
}

uint64_t slot_map_metadata_bytes(const struct slot_map *map)
{
	uint64_t root = READ_ONCE(map->root);

	return READ_ONCE(map->cluster_count) * sizeof(struct cluster) +
	       (root ? 8ULL << (root & 255) : 0);
}

static uint64_t index_hash(uint64_t number, unsigned log2)
{
	return (number * 0x9E3779B97F4A7C15ULL) >> (64 - log2);
}

/* Slot of the index that holds `number`, or the empty one where it would go. */
static uint64_t index_probe(const uint64_t *entries, unsigned log2, uint64_t number)
{
	uint64_t mask = (1ULL << log2) - 1;
	uint64_t at = index_hash(number, log2);

	while (entries[at] != 0 && entries[at] >> 32 != number + 1)
		at = (at + 1) & mask;
	return at;
}

static uint64_t index_alloc(struct slot_space *space, unsigned log2)
{
	SCOPED_LOCK(&space->lock);
	uint64_t bytes = 8ULL << log2, offset;

	if (space->free_index[log2]) {
		offset = space->free_index[log2] - 1;
		space->free_index[log2] = *(uint64_t *)(space->indexes.base + offset);
	} else {
		offset = space->indexes.used;
		if (area_reserve(&space->indexes, offset + bytes) != 0)
			return 0;
		space->indexes.used = offset + bytes;
	}
	memset(space->indexes.base + offset, 0, bytes);
	metadata_change(space, (int64_t)bytes);
	return offset;
}

static void index_free(struct slot_space *space, uint64_t root)
{
	unsigned log2 = (unsigned)(root & 255);
	uint64_t offset = root >> 8;

	if (root == 0)
		return;
	SCOPED_LOCK(&space->lock);
	*(uint64_t *)(space->indexes.base + offset) = space->free_index[log2];
	space->free_index[log2] = offset + 1;
	metadata_change(space, -(int64_t)(8ULL << log2));
}

/* Rebuild the index with room for one more cluster: tombstones go, capacity follows need. */
static int index_rebuild(struct slot_space *space, struct slot_map *map)
{
	unsigned log2 = INDEX_LOG2_MIN;
	uint64_t offset, *entries, old_root = map->root, used = 0;

	while ((map->cluster_count + 1) * 3 > (2ULL << log2))
		log2++;
	if (log2 > INDEX_LOG2_MAX)
		return -ENOMEM;
	offset = index_alloc(space, log2);
	if (offset == 0)
		return -ENOMEM;
	entries = (uint64_t *)(space->indexes.base + offset);
	if (old_root) {
		const uint64_t *old = index_entries(space, map);

		for (uint64_t i = 0; i < 1ULL << index_log2(map); i++) {
			if ((uint32_t)old[i] == 0)
				continue;
			entries[index_probe(entries, log2, (old[i] >> 32) - 1)] = old[i];
			used++;
		}
	}
	VS_CHECK(used == map->cluster_count);
	__atomic_store_n(&map->root, offset << 8 | log2, __ATOMIC_RELEASE);
	map->index_used = used;
	index_free(space, old_root);
	return 0;
}

static uint32_t index_find(const struct slot_space *space, const struct slot_map *map,
			   uint64_t number)
{
	const uint64_t *entries;

	if (map->root == 0)
		return 0;
	entries = index_entries(space, map);
	return (uint32_t)entries[index_probe(entries, index_log2(map), number)];
}

static int index_insert(struct slot_space *space, struct slot_map *map, uint64_t number, uint32_t id)
{
	uint64_t *entries, at;

	if (map->root == 0 || (map->index_used + 1) * 4 > (3ULL << index_log2(map))) {
		int result = index_rebuild(space, map);

		if (result < 0)
			return result;
	}
	entries = index_entries(space, map);
	at = index_probe(entries, index_log2(map), number);
	if (entries[at] == 0)
		map->index_used++;
	VS_CHECK((uint32_t)entries[at] == 0);
	__atomic_store_n(&entries[at], (number + 1) << 32 | id, __ATOMIC_RELEASE);
	WRITE_ONCE(map->cluster_count, map->cluster_count + 1);
	return 0;
}

static void index_replace(struct slot_space *space, struct slot_map *map, uint64_t number,
			  uint32_t id)
{
	uint64_t *entries = index_entries(space, map);
	uint64_t at = index_probe(entries, index_log2(map), number);

	VS_CHECK((uint32_t)entries[at] != 0);
	__atomic_store_n(&entries[at], (number + 1) << 32 | id, __ATOMIC_RELEASE);
	if (id == 0) {
		WRITE_ONCE(map->cluster_count, map->cluster_count - 1);
		if (map->cluster_count == 0) {
			uint64_t root = map->root;

			__atomic_store_n(&map->root, 0, __ATOMIC_RELEASE);
			map->index_used = 0;
			index_free(space, root);
		}
	}
}

/* ---- sharing ---- */

/*
 * Give slot i of a shared cluster a counted slot, named by the cluster and by the copy about to be
 * made of it. The caller's map leaves the cluster for the copy, so the references stay `share`.
 */
static int share_slot(struct slot_space *space, struct cluster *cluster, unsigned i)
{
	struct slot slot = cluster_slot(cluster, i);
	uint64_t index = cluster->share > SHARED_COUNT_MAX ? 0 : shared_alloc(space);
	struct shared_slot *shared;

	if (index == 0)
		return -ENOMEM;
	shared = shared_at(space, index);
	shared->count = (uint16_t)cluster->share;
	shared_slot_write(shared, slot);
	cluster_store(cluster, i, (struct slot){ .tag = SLOT_INDIRECT, .location = index });
	return 0;
}

/*
 * Slots of a shared cluster, before and after a copy is made of it:
 *   POOL, SPILL -> INDIRECT in both, count = maps that have the cluster
 *   INDIRECT    -> INDIRECT in both: its count already counts every map that has the cluster
 *   KEPT_*      -> stays with the old cluster, NONE in the copy
 *   ZERO, SAME, POISONED -> the same in both
 * The tags of the old cluster change for every map that has it without their knowing: that is why a
 * cluster that was shared counts POOL and SPILL as INDIRECT, until it has one owner again.
 */
static int cluster_copy(struct slot_space *space, struct cluster *old, uint32_t *ret_id)
{
	uint32_t id = cluster_alloc(space);
	struct cluster *copy;

	if (id == 0)
		return -ENOMEM;
	copy = cluster_at(space, id);
	for (unsigned i = 0; i < CLUSTER_PAGES; i++) {
		struct slot slot = cluster_slot(old, i);

		VS_CHECK(slot.tag != SLOT_STAGED);
		if (slot.tag == SLOT_POOL || slot.tag == SLOT_SPILL) {
			if (share_slot(space, old, i) != 0) {
				copy->live = 0; /* its words name what the old cluster still owns */
				cluster_free(space, id);
				return -ENOMEM;
			}
			slot = cluster_slot(old, i);
		}
		if (slot.tag == SLOT_NONE || slot_is_kept(slot.tag))
			continue;
		cluster_store(copy, i, slot);
		copy->live++;
	}
	*ret_id = id;
	return 0;
}

/* The tag as which a map counts a word. */
static enum slot_tag count_class(const struct cluster *cluster, enum slot_tag tag)
{
	bool hidden = cluster->was_shared && (tag == SLOT_POOL || tag == SLOT_SPILL);

	return hidden ? SLOT_INDIRECT : tag;
}

/* One writer, inside the gate; readers are anywhere. */
static void count_change(struct slot_map *map, enum slot_tag tag, int by)
{
	WRITE_ONCE(map->counts[tag], map->counts[tag] + (uint64_t)(int64_t)by);
}

static void counts_add(struct slot_map *map, const struct cluster *cluster, int sign)
{
	for (unsigned i = 0; i < CLUSTER_PAGES; i++) {
		enum slot_tag tag = (enum slot_tag)(cluster->words[i] & 15);

		if (tag != SLOT_NONE)
			count_change(map, count_class(cluster, tag), sign);
	}
}

/* Make cluster `*id` (of `number`) the map's own. share_lock is held. */
static int cluster_unshare(struct slot_space *space, struct slot_map *map, uint64_t number,
			   uint32_t *id)
{
	struct cluster *old = cluster_at(space, *id);
	uint32_t copy_id;
	int result;

	if (old->share == 1)
		return 0;
	result = cluster_copy(space, old, &copy_id);
	if (result < 0)
		return result;
	counts_add(map, old, -1);
	counts_add(map, cluster_at(space, copy_id), 1);
	if (cluster_at(space, copy_id)->live == 0) { /* nothing but kept copies of others */
		index_replace(space, map, number, 0);
		cluster_free(space, copy_id);
		copy_id = 0;
	} else {
		index_replace(space, map, number, copy_id);
	}
	__atomic_store_n(&old->share, old->share - 1, __ATOMIC_RELEASE);
	*id = copy_id;
	return 0;
}

/* One owner again: its POOL and SPILL words are counted as what they are. */
static void cluster_settle(struct slot_space *space, struct slot_map *map, struct cluster *cluster)
{
	uint64_t spilled = 0;

	counts_add(map, cluster, -1);
	WRITE_ONCE(cluster->was_shared, 0);
	counts_add(map, cluster, 1);
	for (unsigned i = 0; i < CLUSTER_PAGES; i++)
		spilled += (cluster->words[i] & 15) == SLOT_SPILL;
	__atomic_fetch_sub(&space->shared_spill_pages, spilled, __ATOMIC_RELAXED);
}

/* The map's own cluster of that number: *ret_id, 0 when there is none. */
static int cluster_own(struct slot_space *space, struct slot_map *map, uint64_t number,
		       uint32_t *ret_id)
{
	uint32_t id = index_find(space, map, number);

	if (id != 0 && READ_ONCE(cluster_at(space, id)->was_shared)) {
		SCOPED_LOCK(&space->share_lock);
		int result = cluster_unshare(space, map, number, &id);

		if (result < 0)
			return result;
		if (id != 0 && cluster_at(space, id)->was_shared)
			cluster_settle(space, map, cluster_at(space, id));
	}
	*ret_id = id;
	return 0;
}

void slot_share_lock(struct slot_space *space) { pthread_mutex_lock(&space->share_lock); }
void slot_share_unlock(struct slot_space *space) { pthread_mutex_unlock(&space->share_lock); }

struct slot slot_shared_peek(struct slot_space *space, uint64_t index)
{
	VS_CHECK(shared_at(space, index)->count > 0);
	return shared_slot_read(shared_at(space, index));
}

struct slot slot_shared_get(struct slot_space *space, uint64_t index)
{
	SCOPED_LOCK(&space->share_lock);
	return slot_shared_peek(space, index);
}

void slot_shared_put(struct slot_space *space, uint64_t index, slot_free_fn free_copy, void *context)
{
	struct slot slot;
	bool last;

	pthread_mutex_lock(&space->share_lock);
	struct shared_slot *shared = shared_at(space, index);
	VS_CHECK(shared->count > 0);
	slot = shared_slot_read(shared);
	if (slot.tag == SLOT_SPILL)
		__atomic_fetch_sub(&space->shared_spill_pages, 1, __ATOMIC_RELAXED);
	last = --shared->count == 0;
	if (last)
		shared_release(space, index);
	pthread_mutex_unlock(&space->share_lock);
	if (last)
		free_copy(context, slot);
}

bool slot_shared_migrate(struct slot_space *space, uint64_t index, struct slot from, struct slot to)
{
	SCOPED_LOCK(&space->share_lock);
	struct shared_slot *shared = shared_at(space, index);

	if (shared->count == 0 || !slot_is_equal(shared_slot_read(shared), from))
		return false;
	shared_slot_write(shared, to);
	if (from.tag != SLOT_SPILL && to.tag == SLOT_SPILL)
		__atomic_fetch_add(&space->shared_spill_pages, shared->count, __ATOMIC_RELAXED);
	if (from.tag == SLOT_SPILL && to.tag != SLOT_SPILL)
		__atomic_fetch_sub(&space->shared_spill_pages, shared->count, __ATOMIC_RELAXED);
	return true;
}

/* ---- get and set ---- */

int slot_get(struct slot_space *space, struct slot_map *map, uint64_t page, struct slot *ret_slot)
{
	uint32_t id;
	int result = cluster_own(space, map, page >> CLUSTER_SHIFT, &id);

	if (result < 0)
		return result;
	*ret_slot = id ? cluster_slot(cluster_at(space, id), page % CLUSTER_PAGES)
		       : (struct slot){ .tag = SLOT_NONE };
	return 0;
}

int slot_set(struct slot_space *space, struct slot_map *map, uint64_t page, struct slot slot)
{
	uint64_t number = page >> CLUSTER_SHIFT;
	unsigned i = page % CLUSTER_PAGES;
	struct cluster *cluster;
	enum slot_tag old_tag;
	uint32_t id;
	int result = cluster_own(space, map, number, &id);

	if (result < 0)
		return result;
	if (id == 0) {
		if (slot.tag == SLOT_NONE)
			return 0;
		id = cluster_alloc(space);
		if (id == 0)
			return -ENOMEM;
		result = index_insert(space, map, number, id);
		if (result < 0) {
			cluster_free(space, id);
			return result;
		}
	}
	cluster = cluster_at(space, id);
	old_tag = (enum slot_tag)(cluster->words[i] & 15);
	if (old_tag != SLOT_NONE) {
		count_change(map, count_class(cluster, old_tag), -1);
		cluster->live--;
	}
	cluster_store(cluster, i, slot);
	if (slot.tag != SLOT_NONE) {
		count_change(map, count_class(cluster, slot.tag), 1);
		cluster->live++;
	}
	if (cluster->live == 0) {
		index_replace(space, map, number, 0);
		cluster_free(space, id);
	}
	return 0;
}

/* ---- ranges ---- */

struct clear {
	struct slot_space *space;
	slot_visit_fn staged;
	slot_free_fn free_copy;
	void *context;
};

static void slot_drop(struct clear *clear, uint64_t page, struct slot slot)
{
	if (slot.tag == SLOT_STAGED)
		clear->staged(clear->context, page, slot);
	else if (slot.tag == SLOT_INDIRECT)
		slot_shared_put(clear->space, slot.location, clear->free_copy, clear->context);
	else if (slot.tag == SLOT_POOL || slot.tag == SLOT_SPILL || slot_is_kept(slot.tag))
		clear->free_copy(clear->context, slot);
}

/* Leave a cluster that other maps have too: they keep what is in it, one reference less. */
static bool cluster_leave_shared(struct clear *clear, struct slot_map *map, uint64_t number,
				 uint32_t id)
{
	uint64_t indirect[CLUSTER_PAGES];
	unsigned count = 0;
	struct cluster *cluster = cluster_at(clear->space, id);

	if (__atomic_load_n(&cluster->share, __ATOMIC_ACQUIRE) == 1)
		return false;
	pthread_mutex_lock(&clear->space->share_lock);
	if (cluster->share == 1) {
		pthread_mutex_unlock(&clear->space->share_lock);
		return false;
	}
	for (unsigned i = 0; i < CLUSTER_PAGES; i++) {
		struct slot slot = cluster_slot(cluster, i);

		if (slot.tag == SLOT_INDIRECT)
			indirect[count++] = slot.location;
		if (slot.tag == SLOT_SPILL)
			__atomic_fetch_sub(&clear->space->shared_spill_pages, 1, __ATOMIC_RELAXED);
	}
	counts_add(map, cluster, -1);
	index_replace(clear->space, map, number, 0);
	__atomic_store_n(&cluster->share, cluster->share - 1, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&clear->space->share_lock);
	for (unsigned i = 0; i < count; i++)
		slot_shared_put(clear->space, indirect[i], clear->free_copy, clear->context);
	return true;
}

static void cluster_clear(struct clear *clear, struct slot_map *map, uint64_t number, uint64_t mask)
{
	uint32_t id = index_find(clear->space, map, number);
	struct cluster *cluster;

	if (id == 0 || (mask == ~0ULL && cluster_leave_shared(clear, map, number, id)))
		return;
	/* A part of a shared cluster: own it first. Out of memory here would leave a stale slot, which
	 * is the one thing that must not be: better end than give freed bytes back. */
	VS_CHECK(cluster_own(clear->space, map, number, &id) == 0);
	if (id == 0)
		return;
	cluster = cluster_at(clear->space, id);
	for (unsigned i = 0; i < CLUSTER_PAGES; i++) {
		struct slot slot = cluster_slot(cluster, i);

		if (!(mask >> i & 1) || slot.tag == SLOT_NONE)
			continue;
		count_change(map, count_class(cluster, slot.tag), -1);
		cluster->live--;
		cluster_store(cluster, i, (struct slot){ .tag = SLOT_NONE });
		slot_drop(clear, number * CLUSTER_PAGES + i, slot);
	}
	if (cluster->live == 0) {
		index_replace(clear->space, map, number, 0);
		cluster_free(clear->space, id);
	}
}

static uint64_t cluster_mask(uint64_t number, uint64_t start_page, uint64_t end_page)
{
	uint64_t first = max_of(start_page, number * CLUSTER_PAGES);
	uint64_t end = min_of(end_page, (number + 1) * CLUSTER_PAGES);

	return first >= end ? 0
			    : mask_of((unsigned)(first % CLUSTER_PAGES), (unsigned)(end - first));
}

void slot_map_clear(struct slot_space *space, struct slot_map *map, uint64_t start_page,
		    uint64_t end_page, slot_visit_fn staged, slot_free_fn free_copy, void *context)
{
	struct clear clear = { space, staged, free_copy, context };
	uint64_t first = start_page >> CLUSTER_SHIFT;
	uint64_t last = (end_page + CLUSTER_PAGES - 1) >> CLUSTER_SHIFT;

	if (map->root == 0 || start_page >= end_page)
		return;
	if (last - first <= 2ULL << index_log2(map)) {
		for (uint64_t number = first; number < last && map->root; number++)
			cluster_clear(&clear, map, number, cluster_mask(number, start_page, end_page));
		return;
	}
	/* A range wider than the index: walk the index. Entries are only turned to tombstones here. */
	for (uint64_t i = 0; map->root && i < 1ULL << index_log2(map); i++) {
		uint64_t entry = index_entries(space, map)[i];
		uint64_t mask;

		if ((uint32_t)entry == 0)
			continue;
		mask = cluster_mask((entry >> 32) - 1, start_page, end_page);
		if (mask)
			cluster_clear(&clear, map, (entry >> 32) - 1, mask);
	}
}

int slot_map_move(struct slot_space *space, struct slot_map *map, uint64_t from, uint64_t to,
		  uint64_t pages, slot_visit_fn moved, slot_free_fn free_copy, void *context)
{
	for (uint64_t done = 0; done < pages && map->root;) {
		uint64_t number = (from + done) >> CLUSTER_SHIFT;
		struct slot slot;
		int result;

		if (index_find(space, map, number) == 0) {
			done = min_of(pages, (number + 1) * CLUSTER_PAGES - from);
			continue;
		}
		result = slot_get(space, map, from + done, &slot);
		if (result == 0 && slot.tag != SLOT_NONE) {
			result = slot_set(space, map, to + done, slot);
			crash_point(CRASH_SLOT_MOVED);
			if (result == 0) {
				(void)slot_set(space, map, from + done, (struct slot){ .tag = SLOT_NONE });
				if (slot.tag == SLOT_STAGED)
					moved(context, to + done, slot);
			}
		}
		if (result < 0)
			return result;
		done++;
	}
	return 0;
}

/* ---- a successor ---- */

static int open_map(struct slot_space *space, struct slot_map *map, uint8_t *reached)
{
	uint64_t *entries, clusters = 0;

	memset(map->counts, 0, sizeof map->counts);
	map->cluster_count = map->index_used = 0;
	if (map->root == 0)
		return 0;
	entries = index_entries(space, map);
	space->indexes.used = max_of(space->indexes.used, (map->root >> 8) + (8ULL << index_log2(map)));
	for (uint64_t i = 0; i < 1ULL << index_log2(map); i++) {
		uint32_t id = (uint32_t)entries[i];
		struct cluster *cluster = (struct cluster *)space->clusters.base + id;

		map->index_used += entries[i] != 0;
		if (id == 0)
			continue;
		clusters++;
		space->clusters.used = max_of(space->clusters.used, (id + 1ULL) * sizeof *cluster);
		if (!reached[id]) {
			reached[id] = 1;
			cluster->share = 0;
			cluster->live = 0;
			for (unsigned k = 0; k < CLUSTER_PAGES; k++)
				cluster->live += (cluster->words[k] & 15) != SLOT_NONE;
		}
		cluster->share++;
		for (unsigned k = 0; k < CLUSTER_PAGES; k++)
			if ((cluster->words[k] & 15) == SLOT_INDIRECT) {
				uint64_t index = cluster_slot(cluster, k).location;
				struct shared_slot *shared = (struct shared_slot *)space->shared.base + index;

				space->shared.used = max_of(space->shared.used, (index + 1) * sizeof *shared);
				if (!reached[index + (1u << 28)]) {
					reached[index + (1u << 28)] = 1;
					shared->count = 0;
				}
				shared->count++;
			}
		counts_add(map, cluster, 1);
	}
	map->cluster_count = clusters;
	metadata_change(space, (int64_t)(clusters * sizeof(struct cluster)));
	return 0;
}

static uint8_t *claimed_bits;

int slot_space_open(void *base, uint64_t bytes, struct slot_map *const *maps, unsigned map_count,
		    struct slot_space **ret_space)
{
	struct slot_space *space;
	uint8_t *reached = mmap(NULL, 1u << 29, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int result = slot_space_create(base, bytes, &space);

	for (unsigned i = 0; result == 0 && i < map_count; i++)
		result = open_map(space, maps[i], reached);
	for (uint32_t id = 1; id < space->clusters.used / sizeof(struct cluster); id++)
		if (!reached[id]) {
			struct cluster *cluster = (struct cluster *)space->clusters.base + id;

			memset(cluster, 0, sizeof *cluster);
			cluster->words[0] = space->free_cluster;
			space->free_cluster = id;
		}
	for (uint64_t id = 1; id < space->shared.used / sizeof(struct shared_slot); id++)
		if (!reached[id + (1u << 28)]) {
			struct shared_slot *shared = (struct shared_slot *)space->shared.base + id;

			shared->count = 0;
			shared->word = space->free_shared;
			space->free_shared = (uint32_t)id;
		}
	madvise(reached, 1u << 29, MADV_DONTNEED);
	claimed_bits = reached;
	*ret_space = space;
	return result;
}

int slot_map_claim(struct slot_space *space, struct slot_map *map, slot_claim_fn claim, void *context)
{
	for (uint64_t i = 0; map->root && i < 1ULL << index_log2(map); i++) {
		uint64_t entry = index_entries(space, map)[i];
		uint32_t id = (uint32_t)entry;
		struct cluster *cluster;

		if (id == 0 || claimed_bits[id])
			continue;
		claimed_bits[id] = 1;
		cluster = cluster_at(space, id);
		for (unsigned k = 0; k < CLUSTER_PAGES; k++) {
			struct slot slot = cluster_slot(cluster, k);
			uint64_t index = slot.location;
			int result;

			if (slot.tag == SLOT_INDIRECT) {
				if (claimed_bits[index + (1u << 28)])
					continue;
				claimed_bits[index + (1u << 28)] = 1;
				slot = shared_slot_read(shared_at(space, index));
			}
			result = slot.tag == SLOT_NONE
					 ? 0
					 : claim(context, ((entry >> 32) - 1) * CLUSTER_PAGES + k, slot);
			if (result == -EINVAL) {
				fprintf(stderr, "claim failed: tag %d loc %llx units %u page %llx\n", slot.tag,
					(unsigned long long)slot.location, slot.units,
					(unsigned long long)(((entry >> 32) - 1) * CLUSTER_PAGES + k));
				cluster_store(cluster, k, (struct slot){ .tag = SLOT_POISONED });
			} else if (result < 0)
				return result;
		}
	}
	return 0;
}

/* One map more has this cluster. share_lock is held. */
static void cluster_share(struct slot_space *space, struct slot_map *map, struct cluster *cluster)
{
	uint64_t spilled = 0;

	for (unsigned i = 0; i < CLUSTER_PAGES; i++) {
		struct slot slot = cluster_slot(cluster, i);

		if (slot.tag == SLOT_SPILL)
			spilled += cluster->was_shared ? 1 : 2;
		if (slot.tag == SLOT_INDIRECT) {
			struct shared_slot *shared = shared_at(space, slot.location);

			VS_CHECK(shared->count < SHARED_COUNT_MAX);
			shared->count++;
			spilled += shared_slot_read(shared).tag == SLOT_SPILL;
		}
	}
	counts_add(map, cluster, -1);
	WRITE_ONCE(cluster->was_shared, 1);
	counts_add(map, cluster, 1);
	__atomic_fetch_add(&space->shared_spill_pages, spilled, __ATOMIC_RELAXED);
	__atomic_store_n(&cluster->share, cluster->share + 1, __ATOMIC_RELEASE);
}

int slot_map_share(struct slot_space *space, struct slot_map *parent, struct slot_map *child)
{
	uint64_t offset, *entries, capacity;

	VS_CHECK(parent->counts[SLOT_STAGED] == 0 && child->root == 0);
	if (parent->root == 0)
		return 0;
	offset = index_alloc(space, index_log2(parent));
	if (offset == 0)
		return -ENOMEM;
	capacity = 1ULL << index_log2(parent);
	entries = (uint64_t *)(space->indexes.base + offset);
	SCOPED_LOCK(&space->share_lock);
	memcpy(entries, index_entries(space, parent), capacity * 8);
	for (uint64_t i = 0; i < capacity; i++) {
		struct cluster *cluster;

		if ((uint32_t)entries[i] == 0)
			continue;
		cluster = cluster_at(space, (uint32_t)entries[i]);
		cluster_share(space, parent, cluster);
	}
	child->cluster_count = parent->cluster_count;
	child->index_used = parent->index_used;
	memcpy(child->counts, parent->counts, sizeof child->counts);
	__atomic_store_n(&child->root, offset << 8 | index_log2(parent), __ATOMIC_RELEASE);
	return 0;
}

bool slot_map_next(struct slot_space *space, const struct slot_map *map, uint64_t *cursor,
		   uint64_t *ret_first_page)
{
	if (map->root == 0)
		return false;
	for (uint64_t i = *cursor; i < 1ULL << index_log2(map); i++) {
		uint64_t entry = index_entries(space, map)[i];

		if ((uint32_t)entry == 0)
			continue;
		*cursor = i + 1;
		*ret_first_page = ((entry >> 32) - 1) * CLUSTER_PAGES;
		return true;
	}
	return false;
}

bool slot_map_is_valid(struct slot_space *space, const struct slot_map *map)
{
	uint64_t counts[SLOT_TAG_COUNT] = { 0 }, clusters = 0;

	SCOPED_LOCK(&space->share_lock);
	for (uint64_t i = 0; map->root && i < 1ULL << index_log2(map); i++) {
		uint32_t id = (uint32_t)index_entries(space, map)[i];
		const struct cluster *cluster;
		uint32_t live = 0;

		if (id == 0)
			continue;
		clusters++;
		cluster = cluster_at(space, id);
		for (unsigned k = 0; k < CLUSTER_PAGES; k++) {
			enum slot_tag tag = cluster_slot(cluster, k).tag;

			live += tag != SLOT_NONE;
			counts[count_class(cluster, tag)] += tag != SLOT_NONE;
		}
		if (live != cluster->live || live == 0 || cluster->share == 0)
			return false;
	}
	if (clusters != map->cluster_count)
		return false;
	for (int tag = 1; tag < SLOT_TAG_COUNT; tag++)
		if (counts[tag] != map->counts[tag])
			return false;
	return true;
}
