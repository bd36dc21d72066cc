/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "slot_table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base.h"
#include "crash_point.h"
#include "slot_heap.h"

/*
 * Word: bits 0-3 tag, 4-5 reserved, 6-11 units - 1, 12-49 location, 50-53 backend, 54-63 check 48-57.
 * SAME: bits 12-27 hold bits 48-63 of the repeated word.
 */
#define WORD_TAG_MASK 15
#define WORD_UNITS_SHIFT 6
#define WORD_LOCATION_SHIFT 12
#define WORD_LOCATION_MASK ((1ULL << 38) - 1)
#define WORD_BACKEND_SHIFT 50
#define WORD_CHECK_SHIFT 54

/*
 * A cluster is a row of groups of four entries, in the order of their pages. The first two places of the first
 * group hold the header, so that every entry is found by the same arithmetic, and copied as it is.
 */
struct group {
	uint64_t word[4];
	uint32_t check_middle[4]; /* check bits 16-47 */
	uint16_t check_low[4];    /* check bits 0-15 */
};
static_assert(sizeof(struct group) == SLOT_GRANULE_BYTES, "14 bytes an entry");

struct cluster {
	uint64_t pages[2]; /* bit p: page p has an entry */
	uint64_t word[2];
	uint32_t share;      /* maps that have it */
	uint8_t granules;    /* its size */
	uint8_t entries_low; /* bits set in pages[0] */
	uint8_t live;        /* words that are not NONE */
	uint8_t was_shared;  /* POOL and SPILL in it are counted as INDIRECT */
	uint32_t check_middle[2];
	uint8_t entries; /* bits set in pages */
	uint8_t reserved[3];
	uint16_t check_low[2];
};
static_assert(sizeof(struct cluster) == sizeof(struct group) && CLUSTER_PAGES == 128,
	      "layout in the state memfd");
#define HEADER_ENTRIES 2
#define CLUSTER_GRANULES_MAX ((CLUSTER_PAGES + HEADER_ENTRIES + 3) / 4)
static_assert(CLUSTER_GRANULES_MAX <= SLOT_BLOCK_GRANULES_MAX, "a full cluster is a block");

struct shared_slot {
	uint64_t word;
	uint32_t check_middle;
	uint16_t check_low;
	uint16_t count; /* 0: free, word is the next free index */
};
static_assert(sizeof(struct shared_slot) == 16, "layout in the state memfd");
#define SHARED_COUNT_MAX 65535u
#define SHARED_CHUNK_BYTES 16384UL

/* A cluster is replaced by one with room for TRIM_ROOM more slots than there are when that saves more granules than
 * this: a page that comes and goes must not copy its cluster each time. A full cluster costs least, and can
 * afford most. */
#define TRIM_ROOM 2
#define TRIM_GRANULES(granules) ((unsigned)(granules) * (granules) / 360)

/* Shared slots, handed out from the bottom; number 0 is none. */
struct shared_area {
	char *base;
	uint64_t bytes, used, populated; /* used and populated: read from anywhere */
	uint64_t live;
	uint64_t free; /* head of the free list */
};

struct slot_space {
	pthread_mutex_t lock;       /* handing out shared slots */
	pthread_mutex_t share_lock; /* contents of shared clusters and slots */
	struct slot_heap heap;      /* clusters and indexes */
	struct shared_area shared;
	uint8_t *claimed;     /* one for each cluster and shared slot; only while there are claims */
	uint8_t *shared_seen; /* one for each shared slot that a map was found to name; only until ready */
	uint64_t shared_spill_pages;
};

/* One store that a death cannot split, with everything before it done and nothing after it begun. */
static void publish(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELEASE);
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
}

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
	struct slot slot = { .tag = (enum slot_tag)(word & WORD_TAG_MASK) };

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

static bool tag_has_check(enum slot_tag tag)
{
	return tag == SLOT_SAME || tag == SLOT_POOL || tag == SLOT_SPILL || slot_is_kept(tag);
}

static bool word_is_possible(uint64_t word)
{
	struct slot slot;

	if ((word & WORD_TAG_MASK) >= SLOT_TAG_COUNT)
		return false;
	slot = slot_of(word, 0);
	return word_of(slot) == word && slot.backend < BACKENDS_MAX;
}

/*
 * The check first, the word last. A check that changes passes through POISONED when the old word has one, too:
 * that is no transition of the header, but half of each would be worse than an error.
 */
static void entry_store(uint64_t *word, uint32_t *check_middle, uint16_t *check_low, struct slot slot)
{
	uint32_t middle = (uint32_t)(slot.check >> 16);
	uint16_t low = (uint16_t)slot.check;

	if (tag_has_check(slot.tag) && (*check_middle != middle || *check_low != low)) {
		if (tag_has_check((enum slot_tag)(*word & WORD_TAG_MASK)))
			publish(word, SLOT_POISONED);
		*check_middle = middle;
		*check_low = low;
	}
	publish(word, word_of(slot));
}

static struct slot shared_slot_read(const struct shared_slot *shared)
{
	return slot_of(shared->word, (uint64_t)shared->check_middle << 16 | shared->check_low);
}

/* ---- clusters ---- */

static unsigned bit_count(uint64_t bits)
{
#ifdef __POPCNT__
	return (unsigned)__builtin_popcountll(bits);
#else /* the compiler would call a function */
	bits -= bits >> 1 & 0x5555555555555555ULL;
	bits = (bits & 0x3333333333333333ULL) + (bits >> 2 & 0x3333333333333333ULL);
	return (unsigned)(((bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0FULL) * 0x0101010101010101ULL >> 56);
#endif
}

static bool cluster_has(const struct cluster *cluster, unsigned page)
{
	return cluster->pages[page / 64] >> (page % 64) & 1;
}

/* Entries of the pages before this one; `page` may be CLUSTER_PAGES. */
static unsigned cluster_rank(const struct cluster *cluster, unsigned page)
{
	if (page >= CLUSTER_PAGES)
		return cluster->entries;
	return (page < 64 ? 0u : cluster->entries_low) +
	       bit_count(cluster->pages[page / 64] & mask_of(0, page % 64));
}

/* The first page from here on that is in a set of pages, or CLUSTER_PAGES. */
static unsigned pages_next(const uint64_t pages[2], unsigned page)
{
	for (; page < CLUSTER_PAGES; page = (page | 63) + 1) {
		uint64_t rest = pages[page / 64] >> (page % 64);

		if (rest)
			return page + (unsigned)__builtin_ctzll(rest);
	}
	return CLUSTER_PAGES;
}

/* Entry e of every page of the cluster that has one. */
#define for_each_entry(cluster, page, e)                                                           \
	for (unsigned e = 0, page = pages_next((cluster)->pages, 0); page < CLUSTER_PAGES;         \
	     page = pages_next((cluster)->pages, page + 1), e++)

static struct group *entry_group(const struct cluster *cluster, unsigned e)
{
	return (struct group *)cluster + (e + HEADER_ENTRIES) / 4;
}

static unsigned entry_place(unsigned e) { return (e + HEADER_ENTRIES) % 4; }

static uint64_t *cluster_word(const struct cluster *cluster, unsigned e)
{
	return &entry_group(cluster, e)->word[entry_place(e)];
}

static enum slot_tag cluster_tag(const struct cluster *cluster, unsigned e)
{
	return (enum slot_tag)(*cluster_word(cluster, e) & WORD_TAG_MASK);
}

static struct slot cluster_slot(const struct cluster *cluster, unsigned e)
{
	const struct group *group = entry_group(cluster, e);
	unsigned i = entry_place(e);

	return slot_of(group->word[i], (uint64_t)group->check_middle[i] << 16 | group->check_low[i]);
}

static void cluster_store(struct cluster *cluster, unsigned e, struct slot slot)
{
	struct group *group = entry_group(cluster, e);
	unsigned i = entry_place(e);

	entry_store(&group->word[i], &group->check_middle[i], &group->check_low[i], slot);
}

static void entry_copy(struct cluster *to, unsigned to_e, const struct cluster *from, unsigned from_e)
{
	struct group *to_group = entry_group(to, to_e);
	const struct group *from_group = entry_group(from, from_e);
	unsigned i = entry_place(to_e), j = entry_place(from_e);

	to_group->word[i] = from_group->word[j];
	to_group->check_middle[i] = from_group->check_middle[j];
	to_group->check_low[i] = from_group->check_low[j];
}

static unsigned granules_of(unsigned entries) { return (entries + HEADER_ENTRIES + 3) / 4; }

static unsigned cluster_room(const struct cluster *cluster)
{
	return cluster->granules * 4u - HEADER_ENTRIES;
}

static uint64_t cluster_bytes(const struct cluster *cluster)
{
	return cluster->granules * SLOT_GRANULE_BYTES;
}

static struct cluster *cluster_at(const struct slot_space *space, uint32_t id)
{
	return slot_heap_at(&space->heap, id);
}

/* An empty cluster. Returns its id, or 0: no memory. */
static uint32_t cluster_alloc(struct slot_space *space, unsigned granules)
{
	uint32_t id = slot_heap_alloc(&space->heap, granules);

	if (id != 0)
		*cluster_at(space, id) = (struct cluster){ .share = 1, .granules = (uint8_t)granules };
	return id;
}

static void cluster_free(struct slot_space *space, uint32_t id)
{
	slot_heap_free(&space->heap, id, cluster_at(space, id)->granules);
}

/* The numbers that `pages` implies; a successor does this, too. */
static void cluster_count_entries(struct cluster *cluster)
{
	cluster->entries_low = (uint8_t)bit_count(cluster->pages[0]);
	cluster->entries = (uint8_t)(cluster->entries_low + bit_count(cluster->pages[1]));
}

/* Give a page, above all that have one, an entry, NONE. One store: the bit. */
static void cluster_append(struct cluster *cluster, unsigned page)
{
	*cluster_word(cluster, cluster->entries) = SLOT_NONE;
	publish(&cluster->pages[page / 64], cluster->pages[page / 64] | 1ULL << (page % 64));
	cluster_count_entries(cluster);
}

/* The same for a cluster that nobody has yet, with another one's entry; cluster_count_entries() comes last. */
static void cluster_append_copy(struct cluster *cluster, unsigned page, const struct cluster *from, unsigned e)
{
	entry_copy(cluster, cluster->live++, from, e);
	cluster->pages[page / 64] |= 1ULL << (page % 64);
}

/* ---- entries in the middle ---- */

/* The first NONE from entry e on, or the place after the last one, or the last NONE before. False: all are taken. */
static bool find_hole(const struct cluster *cluster, unsigned page, unsigned e, unsigned *ret_hole,
		      unsigned *ret_page)
{
	bool found = false;

	*ret_page = CLUSTER_PAGES;
	for (*ret_hole = e; cluster->live < cluster->entries && *ret_hole < cluster->entries; ++*ret_hole) {
		page = pages_next(cluster->pages, page + 1);
		*ret_page = page;
		if (cluster_tag(cluster, *ret_hole) == SLOT_NONE)
			return true;
	}
	*ret_hole = cluster->entries;
	*ret_page = CLUSTER_PAGES;
	if (cluster->entries < cluster_room(cluster))
		return true;
	if (cluster->live == cluster->entries)
		return false;
	for_each_entry(cluster, at, k) {
		if (k >= e)
			break;
		if (cluster_tag(cluster, k) == SLOT_NONE) {
			*ret_hole = k;
			*ret_page = at;
			found = true;
		}
	}
	return found;
}

static void undo_save(struct slot_undo *undo, uint32_t id, const struct cluster *cluster, unsigned first,
		      unsigned count)
{
	memcpy(undo->pages, cluster->pages, sizeof undo->pages);
	for (unsigned i = 0; i < count; i++) {
		const struct group *group = entry_group(cluster, first + i);

		undo->word[i] = group->word[entry_place(first + i)];
		undo->check_middle[i] = group->check_middle[entry_place(first + i)];
		undo->check_low[i] = group->check_low[entry_place(first + i)];
	}
	publish(&undo->what, (uint64_t)count << 48 | (uint64_t)first << 32 | id);
}

static void undo_restore(const struct slot_undo *undo, struct cluster *cluster)
{
	unsigned first = (uint16_t)(undo->what >> 32), count = (unsigned)(undo->what >> 48);

	memcpy(cluster->pages, undo->pages, sizeof undo->pages);
	for (unsigned i = 0; i < count; i++) {
		struct group *group = entry_group(cluster, first + i);

		group->word[entry_place(first + i)] = undo->word[i];
		group->check_middle[entry_place(first + i)] = undo->check_middle[i];
		group->check_low[entry_place(first + i)] = undo->check_low[i];
	}
}

/*
 * Give a page an entry, NONE, in the map's own cluster: those between its place and the nearest hole make way,
 * and the page of the hole has none any more. Returns false when the cluster is full.
 */
static bool cluster_open_entry(struct slot_map *map, uint32_t id, struct cluster *cluster, unsigned page)
{
	unsigned e = cluster_rank(cluster, page), hole, hole_page;

	if (e == cluster->entries && e < cluster_room(cluster)) {
		cluster_append(cluster, page);
		return true;
	}
	if (!find_hole(cluster, page, e, &hole, &hole_page))
		return false;
	if (hole >= e) {
		undo_save(&map->undo, id, cluster, e, hole - e + 1);
		for (unsigned k = hole; k > e; k--)
			entry_copy(cluster, k, cluster, k - 1);
	} else {
		undo_save(&map->undo, id, cluster, hole, e - hole);
		for (unsigned k = hole; k + 1 < e; k++)
			entry_copy(cluster, k, cluster, k + 1);
		e--;
	}
	*cluster_word(cluster, e) = SLOT_NONE;
	if (hole_page < CLUSTER_PAGES)
		cluster->pages[hole_page / 64] &= ~(1ULL << (hole_page % 64));
	cluster->pages[page / 64] |= 1ULL << (page % 64);
	cluster_count_entries(cluster);
	publish(&map->undo.what, 0);
	return true;
}

/* ---- the space ---- */

int slot_space_create(int memfd, uint64_t offset, void *base, uint64_t bytes, struct slot_space **ret_space)
{
	struct slot_space *space = calloc(1, sizeof *space);
	/* A multiple of what each part is handed out in. */
	uint64_t quarter = bytes / 4 / (4 * SLOT_CHUNK_BYTES) * (4 * SLOT_CHUNK_BYTES);
	char *parts = base;

	if (!space)
		return -ENOMEM;
	if (slot_heap_create(&space->heap, memfd, offset, parts, 2 * quarter, parts + 3 * quarter, quarter) != 0) {
		free(space);
		return -ENOMEM;
	}
	pthread_mutex_init(&space->lock, NULL);
	pthread_mutex_init(&space->share_lock, NULL);
	space->shared = (struct shared_area){ .base = parts + 2 * quarter, .bytes = quarter,
					      .used = sizeof(struct shared_slot) };
	*ret_space = space;
	return 0;
}

static uint64_t shared_max(const struct slot_space *space)
{
	return space->shared.bytes / sizeof(struct shared_slot);
}

static void shared_seen_drop(struct slot_space *space)
{
	if (space->shared_seen)
		munmap(space->shared_seen, shared_max(space));
	space->shared_seen = NULL;
}

void slot_space_destroy(struct slot_space *space)
{
	if (!space)
		return;
	shared_seen_drop(space);
	slot_heap_destroy(&space->heap);
	pthread_mutex_destroy(&space->lock);
	pthread_mutex_destroy(&space->share_lock);
	free(space);
}

uint64_t slot_space_metadata_bytes(const struct slot_space *space)
{
	return slot_heap_bytes(&space->heap) + READ_ONCE(space->shared.populated);
}

uint64_t slot_space_shared_spill_pages(const struct slot_space *space)
{
	return READ_ONCE(space->shared_spill_pages);
}

static struct shared_slot *shared_at(const struct slot_space *space, uint64_t index)
{
	VS_CHECK(index != 0 && index * sizeof(struct shared_slot) < READ_ONCE(space->shared.used));
	return (struct shared_slot *)(space->shared.base) + index;
}

/* Make sure that the first `bytes` have memory behind them: an error here, no SIGBUS later. */
static int shared_reserve(struct shared_area *shared, uint64_t bytes)
{
	uint64_t want = align_up(bytes, SHARED_CHUNK_BYTES);

	if (want > shared->bytes)
		return -ENOMEM;
	if (want <= shared->populated)
		return 0;
	if (madvise(shared->base + shared->populated, want - shared->populated,
		    23 /* POPULATE_WRITE */) != 0)
		return -ENOMEM;
	WRITE_ONCE(shared->populated, want);
	return 0;
}

static uint64_t shared_alloc(struct slot_space *space)
{
	SCOPED_LOCK(&space->lock);
	uint64_t index = space->shared.free;

	if (index != 0) {
		space->shared.free = shared_at(space, index)->word;
	} else {
		uint64_t next = space->shared.used;

		if (shared_reserve(&space->shared, next + sizeof(struct shared_slot)) != 0)
			return 0;
		WRITE_ONCE(space->shared.used, next + sizeof(struct shared_slot));
		index = next / sizeof(struct shared_slot);
	}
	space->shared.live++;
	return index;
}

static void shared_release(struct slot_space *space, uint64_t index)
{
	SCOPED_LOCK(&space->lock);
	struct shared_area *shared = &space->shared;
	struct shared_slot *slot = shared_at(space, index);

	slot->count = 0;
	slot->word = shared->free;
	shared->free = index;
	if (--shared->live > 0)
		return;
	/* The last one: all the memory goes back. */
	shared->free = 0;
	WRITE_ONCE(shared->used, sizeof(struct shared_slot));
	slot_heap_discard(&space->heap, shared->base, shared->populated);
	WRITE_ONCE(shared->populated, 0);
}

/* ---- index: cluster number of the address space -> cluster ----
 * Open addressing. Entry: (number + 1) << 32 | cluster id; id 0: a tombstone. Root: first page << 32 | pages. */

#define INDEX_PAGE_ENTRIES (PAGE_BYTES / sizeof(uint64_t))
#define CLUSTER_NUMBERS_MAX (2 * ADDRESS_PAGES_MAX / CLUSTER_PAGES) /* waiting remaps lie above the address space */
static_assert(CLUSTER_NUMBERS_MAX < UINT32_MAX, "a number fits in half an entry");

static uint64_t index_capacity(const struct slot_map *map)
{
	return (uint32_t)map->root * INDEX_PAGE_ENTRIES;
}

static uint64_t *index_entries(const struct slot_space *space, uint64_t root)
{
	return slot_heap_run_at(&space->heap, root >> 32);
}

uint64_t slot_map_metadata_bytes(const struct slot_map *map)
{
	return READ_ONCE(map->cluster_bytes) + (uint32_t)READ_ONCE(map->root) * PAGE_BYTES;
}

/* Where the entry of `number` is, or the empty one where it would go. */
static uint64_t index_probe(const uint64_t *entries, uint64_t capacity, uint64_t number)
{
	uint64_t at = ((number * 0x9E3779B97F4A7C15ULL) >> 32) * capacity >> 32;

	while (entries[at] != 0 && entries[at] >> 32 != number + 1)
		if (++at == capacity)
			at = 0;
	return at;
}

/* At most three quarters of an index are in use; a new one starts at three fifths. */
static bool index_is_full(uint64_t used, uint64_t capacity) { return used * 4 > capacity * 3; }

/* Rebuild the index with room for one more cluster: tombstones go, capacity follows need. */
static int index_rebuild(struct slot_space *space, struct slot_map *map)
{
	uint64_t pages = div_ceil((map->cluster_count + 1) * 5, 3 * INDEX_PAGE_ENTRIES);
	uint64_t capacity = pages * INDEX_PAGE_ENTRIES, old_root = map->root, page, *entries, used = 0;
	int result = slot_heap_run_alloc(&space->heap, pages, &page);

	if (result < 0)
		return result;
	entries = slot_heap_run_at(&space->heap, page);
	for (uint64_t i = 0; i < index_capacity(map); i++) {
		uint64_t entry = index_entries(space, old_root)[i];

		if ((uint32_t)entry == 0)
			continue;
		entries[index_probe(entries, capacity, (entry >> 32) - 1)] = entry;
		used++;
	}
	VS_CHECK(used == map->cluster_count);
	publish(&map->root, page << 32 | pages);
	map->index_used = used;
	if (old_root)
		slot_heap_run_free(&space->heap, old_root >> 32);
	return 0;
}

static uint32_t index_find(const struct slot_space *space, const struct slot_map *map,
			   uint64_t number)
{
	const uint64_t *entries;

	if (map->root == 0)
		return 0;
	entries = index_entries(space, map->root);
	return (uint32_t)entries[index_probe(entries, index_capacity(map), number)];
}

static int index_insert(struct slot_space *space, struct slot_map *map, uint64_t number, uint32_t id)
{
	uint64_t *entries, at;

	if (index_is_full(map->index_used + 1, index_capacity(map))) {
		int result = index_rebuild(space, map);

		if (result < 0)
			return result;
	}
	entries = index_entries(space, map->root);
	at = index_probe(entries, index_capacity(map), number);
	if (entries[at] == 0)
		map->index_used++;
	VS_CHECK((uint32_t)entries[at] == 0);
	publish(&entries[at], (number + 1) << 32 | id);
	WRITE_ONCE(map->cluster_count, map->cluster_count + 1);
	WRITE_ONCE(map->cluster_bytes, map->cluster_bytes + cluster_bytes(cluster_at(space, id)));
	return 0;
}

static void index_drop(struct slot_space *space, struct slot_map *map)
{
	uint64_t root = map->root;

	publish(&map->root, 0);
	map->index_used = 0;
	slot_heap_run_free(&space->heap, root >> 32);
}

/* The map has cluster `id` where it had another; 0: none. The other one still exists. */
static void index_replace(struct slot_space *space, struct slot_map *map, uint64_t number,
			  uint32_t id)
{
	uint64_t *entries = index_entries(space, map->root);
	uint64_t at = index_probe(entries, index_capacity(map), number);
	uint32_t old_id = (uint32_t)entries[at];

	publish(&entries[at], (number + 1) << 32 | id);
	WRITE_ONCE(map->cluster_bytes, map->cluster_bytes - cluster_bytes(cluster_at(space, old_id)) +
					       (id ? cluster_bytes(cluster_at(space, id)) : 0));
	if (id == 0) {
		WRITE_ONCE(map->cluster_count, map->cluster_count - 1);
		if (map->cluster_count == 0)
			index_drop(space, map);
	}
}

/* ---- sharing ---- */

/* A counted slot for what this one is, for `count` references. 0: no memory. share_lock is held. */
static uint64_t shared_create(struct slot_space *space, struct slot slot, unsigned count)
{
	uint64_t index = count > SHARED_COUNT_MAX ? 0 : shared_alloc(space);
	struct shared_slot *shared;

	if (index == 0)
		return 0;
	shared = shared_at(space, index);
	shared->count = (uint16_t)count;
	shared->word = SLOT_NONE;
	entry_store(&shared->word, &shared->check_middle, &shared->check_low, slot);
	return index;
}

/*
 * Give entry e of a shared cluster a counted slot, named by the cluster and by the copy about to be
 * made of it. The caller's map leaves the cluster for the copy, so the references stay `share`.
 */
static int share_slot(struct slot_space *space, struct cluster *cluster, unsigned e)
{
	uint64_t index = shared_create(space, cluster_slot(cluster, e), cluster->share);

	if (index == 0)
		return -ENOMEM;
	cluster_store(cluster, e, (struct slot){ .tag = SLOT_INDIRECT, .location = index });
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
 * *ret_id is 0 when nothing but kept copies is in it.
 */
static int cluster_copy(struct slot_space *space, struct cluster *old, uint32_t *ret_id)
{
	struct cluster *copy;
	unsigned live = 0;

	*ret_id = 0;
	for (unsigned e = 0; e < old->entries; e++) {
		VS_CHECK(cluster_tag(old, e) != SLOT_STAGED);
		live += cluster_tag(old, e) != SLOT_NONE && !slot_is_kept(cluster_tag(old, e));
	}
	if (live == 0)
		return 0;
	*ret_id = cluster_alloc(space, granules_of(live));
	if (*ret_id == 0)
		return -ENOMEM;
	copy = cluster_at(space, *ret_id);
	for_each_entry(old, page, e) {
		enum slot_tag tag = cluster_tag(old, e);

		if (tag == SLOT_NONE || slot_is_kept(tag))
			continue;
		if ((tag == SLOT_POOL || tag == SLOT_SPILL) && share_slot(space, old, e) != 0) {
			cluster_free(space, *ret_id);
			return -ENOMEM;
		}
		cluster_append_copy(copy, page, old, e);
	}
	cluster_count_entries(copy);
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
	for (unsigned e = 0; e < cluster->entries; e++)
		if (cluster_tag(cluster, e) != SLOT_NONE)
			count_change(map, count_class(cluster, cluster_tag(cluster, e)), sign);
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
	if (copy_id)
		counts_add(map, cluster_at(space, copy_id), 1);
	index_replace(space, map, number, copy_id);
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
	for (unsigned e = 0; e < cluster->entries; e++)
		spilled += cluster_tag(cluster, e) == SLOT_SPILL;
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

/* For its page and for another. 0: no memory. */
static uint64_t shared_create_for_two(struct slot_space *space, struct slot slot)
{
	SCOPED_LOCK(&space->share_lock);
	uint64_t index = shared_create(space, slot, 2);

	if (index != 0 && slot.tag == SLOT_SPILL)
		__atomic_fetch_add(&space->shared_spill_pages, 1, __ATOMIC_RELAXED);
	return index;
}

static int shared_get_another(struct slot_space *space, uint64_t index)
{
	SCOPED_LOCK(&space->share_lock);
	if (shared_at(space, index)->count == SHARED_COUNT_MAX)
		return -ENOMEM;
	shared_at(space, index)->count++;
	return 0;
}

int slot_share(struct slot_space *space, struct slot_map *map, uint64_t page, uint64_t *ret_index)
{
	struct slot slot;
	int result = slot_get(space, map, page, &slot);

	if (result < 0)
		return result;
	if (slot.tag == SLOT_INDIRECT) {
		*ret_index = slot.location;
		return shared_get_another(space, slot.location);
	}
	VS_CHECK(slot.tag == SLOT_POOL || slot.tag == SLOT_SPILL);
	*ret_index = shared_create_for_two(space, slot);
	if (*ret_index == 0)
		return -ENOMEM;
	VS_CHECK(slot_set(space, map, page, (struct slot){ .tag = SLOT_INDIRECT, .location = *ret_index }) == 0);
	return 0;
}

bool slot_shared_migrate(struct slot_space *space, uint64_t index, struct slot from, struct slot to)
{
	SCOPED_LOCK(&space->share_lock);
	struct shared_slot *shared = shared_at(space, index);

	if (shared->count == 0 || !slot_is_equal(shared_slot_read(shared), from))
		return false;
	entry_store(&shared->word, &shared->check_middle, &shared->check_low, to);
	if (from.tag != SLOT_SPILL && to.tag == SLOT_SPILL)
		__atomic_fetch_add(&space->shared_spill_pages, shared->count, __ATOMIC_RELAXED);
	if (from.tag == SLOT_SPILL && to.tag != SLOT_SPILL)
		__atomic_fetch_sub(&space->shared_spill_pages, shared->count, __ATOMIC_RELAXED);
	return true;
}

/* ---- own clusters ---- */

/* Put `slot` into an entry of the map's own cluster, with all that is counted. */
static void cluster_set(struct slot_map *map, struct cluster *cluster, unsigned e, struct slot slot)
{
	enum slot_tag old_tag = cluster_tag(cluster, e);

	cluster_store(cluster, e, slot);
	if (old_tag != SLOT_NONE) {
		count_change(map, count_class(cluster, old_tag), -1);
		cluster->live--;
	}
	if (slot.tag != SLOT_NONE) {
		count_change(map, count_class(cluster, slot.tag), 1);
		cluster->live++;
	}
}

/* A cluster with one entry, NONE. */
static int cluster_make(struct slot_space *space, struct slot_map *map, uint64_t page, uint32_t *ret_id)
{
	int result;

	*ret_id = cluster_alloc(space, granules_of(1));
	if (*ret_id == 0)
		return -ENOMEM;
	cluster_append(cluster_at(space, *ret_id), page % CLUSTER_PAGES);
	result = index_insert(space, map, page >> CLUSTER_SHIFT, *ret_id);
	if (result < 0)
		cluster_free(space, *ret_id);
	return result;
}

/* Room for one more slot in a full cluster: a larger copy, complete before the index names it. */
static int cluster_grow(struct slot_space *space, struct slot_map *map, uint64_t number, uint32_t *id)
{
	struct cluster *cluster, *old = cluster_at(space, *id);
	uint32_t old_id = *id;

	*id = cluster_alloc(space, old->granules + 1u);
	if (*id == 0)
		return -ENOMEM;
	cluster = cluster_at(space, *id);
	memcpy(cluster, old, cluster_bytes(old));
	cluster->granules++;
	index_replace(space, map, number, *id);
	cluster_free(space, old_id);
	return 0;
}

/* An entry for a page that has none. The cluster may become another one. */
static int cluster_add(struct slot_space *space, struct slot_map *map, uint64_t page, uint32_t *id)
{
	unsigned i = page % CLUSTER_PAGES;
	int result;

	if (*id == 0)
		return cluster_make(space, map, page, id);
	if (cluster_open_entry(map, *id, cluster_at(space, *id), i))
		return 0;
	result = cluster_grow(space, map, page >> CLUSTER_SHIFT, id);
	if (result < 0)
		return result;
	VS_CHECK(cluster_open_entry(map, *id, cluster_at(space, *id), i));
	return 0;
}

/* Some of its slots are gone. A cluster much too large is replaced, if there is memory for that: it can wait. */
static void cluster_trim(struct slot_space *space, struct slot_map *map, uint64_t number, uint32_t old_id)
{
	struct cluster *cluster, *old = cluster_at(space, old_id);
	uint32_t id = 0;

	if (old->live > 0) {
		unsigned granules = granules_of(old->live + TRIM_ROOM);

		if (granules + TRIM_GRANULES(old->granules) >= old->granules)
			return;
		id = cluster_alloc(space, granules);
		if (id == 0)
			return;
		cluster = cluster_at(space, id);
		for_each_entry(old, page, e)
			if (cluster_tag(old, e) != SLOT_NONE)
				cluster_append_copy(cluster, page, old, e);
		cluster_count_entries(cluster);
	}
	index_replace(space, map, number, id);
	cluster_free(space, old_id);
}

/* ---- get and set ---- */

bool slot_map_has(const struct slot_space *space, const struct slot_map *map, uint64_t cluster_number)
{
	return index_find(space, map, cluster_number) != 0;
}

/* Of the page in a cluster, 0: there is none. */
static struct slot slot_in(struct slot_space *space, uint32_t id, uint64_t page)
{
	const struct cluster *cluster = id != 0 ? cluster_at(space, id) : NULL;
	unsigned i = page % CLUSTER_PAGES;

	return cluster && cluster_has(cluster, i) ? cluster_slot(cluster, cluster_rank(cluster, i)) :
						    (struct slot){ .tag = SLOT_NONE };
}

int slot_get(struct slot_space *space, struct slot_map *map, uint64_t page, struct slot *ret_slot)
{
	uint32_t id;
	int result = cluster_own(space, map, page >> CLUSTER_SHIFT, &id);

	if (result == 0)
		*ret_slot = slot_in(space, id, page);
	return result;
}

struct slot slot_peek(struct slot_space *space, const struct slot_map *map, uint64_t page)
{
	SCOPED_LOCK(&space->share_lock); /* relatives may be taking copies of the cluster */
	return slot_in(space, index_find(space, map, page >> CLUSTER_SHIFT), page);
}

int slot_set(struct slot_space *space, struct slot_map *map, uint64_t page, struct slot slot)
{
	unsigned i = page % CLUSTER_PAGES;
	struct cluster *cluster;
	uint32_t id;
	int result = cluster_own(space, map, page >> CLUSTER_SHIFT, &id);

	if (result == 0 && (id == 0 || !cluster_has(cluster_at(space, id), i))) {
		if (slot.tag == SLOT_NONE)
			return 0;
		result = cluster_add(space, map, page, &id);
	}
	if (result < 0)
		return result;
	cluster = cluster_at(space, id);
	cluster_set(map, cluster, cluster_rank(cluster, i), slot);
	if (slot.tag == SLOT_NONE)
		cluster_trim(space, map, page >> CLUSTER_SHIFT, id);
	return 0;
}

/* ---- ranges ---- */

struct clear {
	struct slot_space *space;
	slot_visit_fn staged;
	slot_free_fn free_copy;
	void *context;
	uint64_t start_page, end_page; /* of what is cleared */
	uint32_t list;                 /* of what is detached */
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
	for (unsigned e = 0; e < cluster->entries; e++) {
		struct slot slot = cluster_slot(cluster, e);

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

/* Pages [first, end) of cluster `number`. */
static void cluster_clear_pages(struct clear *clear, struct slot_map *map, uint64_t number, unsigned first,
				unsigned end)
{
	uint32_t id = index_find(clear->space, map, number);
	struct cluster *cluster;

	if (id == 0 || (end - first == CLUSTER_PAGES && cluster_leave_shared(clear, map, number, id)))
		return;
	/* A part of a shared cluster: own it first. Out of memory here would leave a stale slot, which
	 * is the one thing that must not be: better end than give freed bytes back. */
	VS_CHECK(cluster_own(clear->space, map, number, &id) == 0);
	if (id == 0)
		return;
	cluster = cluster_at(clear->space, id);
	for_each_entry(cluster, page, e) {
		struct slot slot = cluster_slot(cluster, e);

		if (page < first || page >= end || slot.tag == SLOT_NONE)
			continue;
		/* The word first: after a death no word may name a copy that somebody else has got. */
		cluster_set(map, cluster, e, (struct slot){ .tag = SLOT_NONE });
		slot_drop(clear, number * CLUSTER_PAGES + page, slot);
	}
	cluster_trim(clear->space, map, number, id);
}

static void cluster_clear(struct clear *clear, struct slot_map *map, uint64_t number)
{
	uint64_t first = max_of(clear->start_page, number * CLUSTER_PAGES);
	uint64_t end = min_of(clear->end_page, (number + 1) * CLUSTER_PAGES);

	if (first < end)
		cluster_clear_pages(clear, map, number, first % CLUSTER_PAGES,
				    (unsigned)(end - number * CLUSTER_PAGES));
}

/* Visit each cluster of [first, last) that the map has, in any order. Its entry of the index may be replaced then. */
static void visit_clusters(struct clear *clear, struct slot_map *map, uint64_t first, uint64_t last,
			   void (*visit)(struct clear *clear, struct slot_map *map, uint64_t number))
{
	if (map->root == 0 || first >= last)
		return;
	if (last - first <= 2 * index_capacity(map)) {
		for (uint64_t number = first; number < last && map->root; number++)
			visit(clear, map, number);
		return;
	}
	/* A range wider than the index: walk the index. */
	for (uint64_t i = 0; map->root && i < index_capacity(map); i++) {
		uint64_t entry = index_entries(clear->space, map->root)[i], number = (entry >> 32) - 1;

		if ((uint32_t)entry != 0 && number >= first && number < last)
			visit(clear, map, number);
	}
}

void slot_map_clear(struct slot_space *space, struct slot_map *map, uint64_t start_page,
		    uint64_t end_page, slot_visit_fn staged, slot_free_fn free_copy, void *context)
{
	struct clear clear = { .space = space, .staged = staged, .free_copy = free_copy, .context = context,
			       .start_page = start_page, .end_page = end_page };

	visit_clusters(&clear, map, start_page >> CLUSTER_SHIFT, div_ceil(end_page, CLUSTER_PAGES), cluster_clear);
}

/* A cluster on a list is no map's: `share` is the next one. */
static void cluster_detach(struct clear *clear, struct slot_map *map, uint64_t number)
{
	uint32_t id = index_find(clear->space, map, number);
	struct cluster *cluster;

	if (id == 0)
		return;
	cluster = cluster_at(clear->space, id);
	if (__atomic_load_n(&cluster->share, __ATOMIC_ACQUIRE) != 1 || cluster->was_shared)
		return;
	for (unsigned e = 0; e < cluster->entries; e++)
		if (cluster_tag(cluster, e) == SLOT_STAGED)
			return;
	counts_add(map, cluster, -1);
	index_replace(clear->space, map, number, 0);
	cluster->share = clear->list;
	clear->list = id;
}

void slot_map_detach(struct slot_space *space, struct slot_map *map, uint64_t start_page, uint64_t end_page,
		     uint32_t *list)
{
	struct clear clear = { .space = space, .list = *list };

	visit_clusters(&clear, map, div_ceil(start_page, CLUSTER_PAGES), end_page >> CLUSTER_SHIFT, cluster_detach);
	*list = clear.list;
}

uint32_t slot_clusters_free(struct slot_space *space, uint32_t list, unsigned max, slot_free_fn free_copy, void *context)
{
	struct clear clear = { .space = space, .free_copy = free_copy, .context = context };

	for (unsigned done = 0; list != 0 && done < max; done++) {
		uint32_t id = list;
		struct cluster *cluster = cluster_at(space, id);

		for (unsigned e = 0; e < cluster->entries; e++)
			slot_drop(&clear, 0, cluster_slot(cluster, e));
		list = cluster->share;
		cluster_free(space, id);
	}
	return list;
}

int slot_map_move(struct slot_space *space, struct slot_map *map, uint64_t from, uint64_t to,
		  uint64_t pages, slot_visit_fn moved, void *context)
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

/* One map more has this cluster. share_lock is held. */
static void cluster_share(struct slot_space *space, struct slot_map *map, struct cluster *cluster)
{
	uint64_t spilled = 0;

	for (unsigned e = 0; e < cluster->entries; e++) {
		struct slot slot = cluster_slot(cluster, e);

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
	uint64_t page, *entries;
	int result;

	VS_CHECK(parent->counts[SLOT_STAGED] == 0 && child->root == 0);
	if (parent->root == 0)
		return 0;
	result = slot_heap_run_alloc(&space->heap, (uint32_t)parent->root, &page);
	if (result < 0)
		return result;
	entries = slot_heap_run_at(&space->heap, page);
	SCOPED_LOCK(&space->share_lock);
	memcpy(entries, index_entries(space, parent->root), index_capacity(parent) * sizeof *entries);
	for (uint64_t i = 0; i < index_capacity(parent); i++)
		if ((uint32_t)entries[i] != 0)
			cluster_share(space, parent, cluster_at(space, (uint32_t)entries[i]));
	child->cluster_count = parent->cluster_count;
	child->cluster_bytes = parent->cluster_bytes;
	child->index_used = parent->index_used;
	memcpy(child->counts, parent->counts, sizeof child->counts);
	publish(&child->root, page << 32 | (uint32_t)parent->root);
	return 0;
}

bool slot_map_next(struct slot_space *space, const struct slot_map *map, uint64_t *cursor,
		   uint64_t *ret_first_page)
{
	for (uint64_t i = *cursor; i < index_capacity(map); i++) {
		uint64_t entry = index_entries(space, map->root)[i];

		if ((uint32_t)entry == 0)
			continue;
		*cursor = i + 1;
		*ret_first_page = ((entry >> 32) - 1) * CLUSTER_PAGES;
		return true;
	}
	return false;
}

/* ---- a successor ---- */

/* The map's own fields are what its index and clusters say. */
struct map_sums {
	uint64_t counts[SLOT_TAG_COUNT], clusters, bytes, used, spilled;
};

/* Its block lies in the heap and holds its entries. */
static bool cluster_is_possible(const struct slot_space *space, uint32_t id)
{
	const struct cluster *cluster;
	unsigned entries;

	if (!slot_heap_has(&space->heap, id, 1))
		return false;
	cluster = cluster_at(space, id);
	entries = bit_count(cluster->pages[0]) + bit_count(cluster->pages[1]);
	return cluster->granules >= 1 && cluster->granules <= CLUSTER_GRANULES_MAX &&
	       slot_heap_has(&space->heap, id, cluster->granules) && entries <= cluster_room(cluster) &&
	       cluster->was_shared <= 1;
}

/* What its words add to the sums. False: a word that cannot be. */
static bool cluster_sum(const struct cluster *cluster, struct map_sums *sums, unsigned *ret_live)
{
	*ret_live = 0;
	for (unsigned e = 0; e < cluster->entries; e++) {
		enum slot_tag tag = cluster_tag(cluster, e);

		if (!word_is_possible(*cluster_word(cluster, e)) || (cluster->was_shared && tag == SLOT_STAGED))
			return false;
		if (tag == SLOT_NONE)
			continue;
		++*ret_live;
		sums->counts[count_class(cluster, tag)]++;
		sums->spilled += cluster->was_shared && tag == SLOT_SPILL;
	}
	sums->bytes += cluster_bytes(cluster);
	return true;
}

/* Entry i has the place where a search for it ends. */
static bool index_entry_is_possible(const uint64_t *entries, uint64_t capacity, uint64_t i)
{
	uint64_t number = (entries[i] >> 32) - 1;

	return number < CLUSTER_NUMBERS_MAX && index_probe(entries, capacity, number) == i;
}

int slot_space_open(int memfd, uint64_t offset, void *base, uint64_t bytes, struct slot_space **ret_space)
{
	struct slot_space *space;
	int result = slot_space_create(memfd, offset, base, bytes, &space);
	void *seen;

	if (result < 0)
		return result;
	seen = mmap(NULL, shared_max(space), PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (seen == MAP_FAILED) {
		slot_space_destroy(space);
		return -ENOMEM;
	}
	space->shared_seen = seen;
	*ret_space = space;
	return 0;
}

/* One more map names this shared slot. */
static int adopt_shared_slot(struct slot_space *space, uint64_t index, struct map_sums *sums)
{
	struct shared_slot *shared = (struct shared_slot *)space->shared.base + index;
	struct slot slot;

	if (index == 0 || index >= shared_max(space) || !word_is_possible(shared->word))
		return -EUCLEAN;
	slot = shared_slot_read(shared);
	if (slot.tag != SLOT_POOL && slot.tag != SLOT_SPILL)
		return -EUCLEAN;
	if (!space->shared_seen[index]) {
		space->shared_seen[index] = 1;
		space->shared.live++;
		space->shared.used = max_of(space->shared.used, (index + 1) * sizeof *shared);
		shared->count = 0;
	}
	if (shared->count == SHARED_COUNT_MAX)
		return -EUCLEAN;
	shared->count++;
	sums->spilled += slot.tag == SLOT_SPILL;
	return 0;
}

/* The change that the daemon died in never was. */
static int adopt_undo(struct slot_space *space, struct slot_undo *undo)
{
	uint32_t id = (uint32_t)undo->what;
	unsigned end = (unsigned)(uint16_t)(undo->what >> 32) + (unsigned)(undo->what >> 48);
	struct cluster *cluster;

	if (!slot_heap_has(&space->heap, id, 1))
		return -EUCLEAN;
	cluster = cluster_at(space, id);
	if (cluster->granules > CLUSTER_GRANULES_MAX || end > CLUSTER_PAGES || end > cluster_room(cluster) ||
	    !slot_heap_has(&space->heap, id, cluster->granules))
		return -EUCLEAN;
	undo_restore(undo, cluster);
	publish(&undo->what, 0);
	return 0;
}

/* The cluster of an index entry: 0, or 1 when nothing is in it. */
static int adopt_cluster(struct slot_space *space, struct slot_undo *undo, uint32_t id,
			 struct map_sums *sums)
{
	struct cluster *cluster;
	unsigned live;
	int result = (uint32_t)undo->what == id ? adopt_undo(space, undo) : 0;

	if (result < 0 || !cluster_is_possible(space, id))
		return -EUCLEAN;
	cluster = cluster_at(space, id);
	cluster_count_entries(cluster);
	if (!cluster_sum(cluster, sums, &live))
		return -EUCLEAN;
	if (live == 0) { /* it died between its last slot and its entry, or before its first */
		sums->bytes -= cluster_bytes(cluster);
		return 1;
	}
	result = slot_heap_adopt(&space->heap, id, cluster->granules);
	if (result < 0 || (result == 1 && !cluster->was_shared))
		return -EUCLEAN;
	cluster->share = result == 1 ? cluster->share + 1 : 1;
	cluster->live = (uint8_t)live;
	for (unsigned e = 0; e < cluster->entries; e++) {
		if (cluster_tag(cluster, e) != SLOT_INDIRECT)
			continue;
		result = adopt_shared_slot(space, cluster_slot(cluster, e).location, sums);
		if (result < 0)
			return result;
	}
	return 0;
}

static int adopt_index(struct slot_space *space, struct slot_map *map, struct map_sums *sums)
{
	uint64_t *entries = index_entries(space, map->root), capacity = index_capacity(map);

	for (uint64_t i = 0; i < capacity; i++)
		sums->used += entries[i] != 0;
	if (index_is_full(sums->used, capacity))
		return -EUCLEAN; /* and a search might not end */
	for (uint64_t i = 0; i < capacity; i++) {
		int result;

		if (entries[i] == 0)
			continue;
		if (!index_entry_is_possible(entries, capacity, i))
			return -EUCLEAN;
		if ((uint32_t)entries[i] == 0)
			continue;
		result = adopt_cluster(space, &map->undo, (uint32_t)entries[i], sums);
		if (result < 0)
			return result;
		if (result == 1)
			publish(&entries[i], entries[i] & ~(uint64_t)UINT32_MAX);
		else
			sums->clusters++;
	}
	return 0;
}

int slot_space_adopt(struct slot_space *space, struct slot_map *map)
{
	struct map_sums sums = { .used = 0 };
	int result;

	VS_CHECK(space->shared_seen);
	if (map->root != 0) {
		result = slot_heap_adopt_run(&space->heap, map->root >> 32, (uint32_t)map->root);
		if (result == 0)
			result = adopt_index(space, map, &sums);
		if (result < 0)
			return result;
	}
	if (map->undo.what != 0)
		return -EUCLEAN; /* of no cluster of this map */
	map->cluster_count = sums.clusters;
	map->cluster_bytes = sums.bytes;
	map->index_used = sums.used;
	memcpy(map->counts, sums.counts, sizeof map->counts);
	space->shared_spill_pages += sums.spilled;
	if (map->root != 0 && map->cluster_count == 0)
		index_drop(space, map);
	return 0;
}

int slot_space_ready(struct slot_space *space)
{
	struct shared_area *shared = &space->shared;
	int result = slot_heap_ready(&space->heap);

	if (result < 0)
		return result;
	if (shared->live > 0 && shared_reserve(shared, shared->used) != 0)
		return -ENOMEM;
	slot_heap_discard(&space->heap, shared->base + shared->populated, shared->bytes - shared->populated);
	for (uint64_t index = shared->used / sizeof(struct shared_slot) - 1; index > 0; index--) {
		if (space->shared_seen[index])
			continue;
		shared_at(space, index)->count = 0;
		shared_at(space, index)->word = shared->free;
		shared->free = index;
	}
	shared_seen_drop(space);
	return 0;
}

/* ---- claims ---- */

/* One byte for each thing that may be shared, with memory behind those that were met: first the clusters. */
static uint64_t claims_shared(const struct slot_space *space)
{
	return (space->heap.chunk_count << SLOT_CHUNK_SHIFT) + 1;
}

static int claims_begin(struct slot_space *space)
{
	uint8_t *claimed;

	if (space->claimed)
		return 0;
	claimed = mmap(NULL, claims_shared(space) + shared_max(space), PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (claimed == MAP_FAILED)
		return -ENOMEM;
	space->claimed = claimed;
	return 0;
}

void slot_space_claimed(struct slot_space *space)
{
	if (space->claimed)
		munmap(space->claimed, claims_shared(space) + shared_max(space));
	space->claimed = NULL;
}

static bool claim_first(uint8_t *claimed)
{
	return !*claimed && (*claimed = 1);
}

static int cluster_claim(struct slot_space *space, struct slot_map *map, struct cluster *cluster,
			 uint64_t first_page, slot_claim_fn claim, void *context)
{
	uint8_t *shared = space->claimed + claims_shared(space);

	for_each_entry(cluster, page, e) {
		struct slot slot = cluster_slot(cluster, e);
		int result;

		if (slot.tag == SLOT_NONE ||
		    (slot.tag == SLOT_INDIRECT && !claim_first(&shared[slot.location])))
			continue;
		if (slot.tag == SLOT_INDIRECT)
			slot = shared_slot_read(shared_at(space, slot.location));
		result = claim(context, first_page + page, slot);
		if (result == -EINVAL && (cluster->share > 1 || cluster_tag(cluster, e) == SLOT_INDIRECT))
			result = -EUCLEAN; /* other maps have counted it */
		if (result < 0 && result != -EINVAL)
			return result;
		if (result == -EINVAL)
			cluster_set(map, cluster, e, (struct slot){ .tag = SLOT_POISONED });
	}
	return 0;
}

int slot_map_claim(struct slot_space *space, struct slot_map *map, slot_claim_fn claim, void *context)
{
	int result = claims_begin(space);

	for (uint64_t i = 0; result == 0 && map->root && i < index_capacity(map); i++) {
		uint64_t entry = index_entries(space, map->root)[i];
		uint32_t id = (uint32_t)entry;

		if (id != 0 && claim_first(&space->claimed[id]))
			result = cluster_claim(space, map, cluster_at(space, id),
					       ((entry >> 32) - 1) * CLUSTER_PAGES, claim, context);
	}
	return result;
}

/* ---- checks ---- */

static bool cluster_is_valid(const struct slot_space *space, uint32_t id, struct map_sums *sums)
{
	const struct cluster *cluster = cluster_at(space, id);
	unsigned low = bit_count(cluster->pages[0]), live;

	if (!cluster_is_possible(space, id) || cluster->entries_low != low ||
	    cluster->entries != low + bit_count(cluster->pages[1]) || !cluster_sum(cluster, sums, &live) ||
	    live == 0 || live != cluster->live || cluster->share == 0 ||
	    (cluster->share > 1 && !cluster->was_shared))
		return false;
	for (unsigned e = 0; e < cluster->entries; e++)
		if (cluster_tag(cluster, e) == SLOT_INDIRECT &&
		    shared_at(space, cluster_slot(cluster, e).location)->count == 0)
			return false;
	return true;
}

bool slot_map_is_valid(struct slot_space *space, const struct slot_map *map)
{
	struct map_sums sums = { .used = 0 };

	SCOPED_LOCK(&space->share_lock);
	for (uint64_t i = 0; i < index_capacity(map); i++) {
		const uint64_t *entries = index_entries(space, map->root);

		if (entries[i] == 0)
			continue;
		sums.used++;
		if (!index_entry_is_possible(entries, index_capacity(map), i))
			return false;
		if ((uint32_t)entries[i] == 0)
			continue;
		sums.clusters++;
		if (!cluster_is_valid(space, (uint32_t)entries[i], &sums))
			return false;
	}
	return sums.used == map->index_used && sums.clusters == map->cluster_count &&
	       sums.bytes == map->cluster_bytes && (map->root != 0) == (map->cluster_count != 0) && map->undo.what == 0 &&
	       memcmp(sums.counts, map->counts, sizeof sums.counts) == 0;
}

bool slot_space_is_valid(struct slot_space *space)
{
	uint64_t free = 0, slots;

	SCOPED_LOCK(&space->lock);
	slots = space->shared.used / sizeof(struct shared_slot) - 1;
	for (uint64_t index = space->shared.free; index; index = shared_at(space, index)->word)
		if (shared_at(space, index)->count != 0 || ++free > slots)
			return false;
	return slots - free == space->shared.live && slot_heap_is_valid(&space->heap);
}
