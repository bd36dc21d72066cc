/* SPDX-License-Identifier: MIT */
/*
 * drain — objects leave a backend, or its sparse segments, while clients fault on them.
 *
 * Two passes, repeated until nothing is left
 *   by segment  in device order, whole segments read ahead. A segment's table says for which page of which
 *               client each object was written (spill.h). That may be out of date: a page was moved by
 *               mremap, its client forked and ended. An entry that no slot confirms is passed over.
 *   by slot     for what is left: all slots are walked, those that name the backend sorted by place.
 *
 * Life of one move
 *   1 gate      the slot is looked up and remembered, whole
 *   2 no gate   the object is expanded and checked against its slot, then stored: in the pool of its
 *               group, or in a segment of another backend (compaction: of the same)
 *   3           that segment has been written
 *   4 gate      if the slot is still what it was, it now names the new place, in one store, and the old
 *               extent is freed; else the new object is
 * So a daemon that dies anywhere in between leaves every slot naming a place that holds its object, and the
 * backend one that can be used, or drained, again. An object that fails its check is left where it is:
 * moved as it is it would only be further away from whoever could still repair it.
 *
 * Kept copies of resident pages are dropped by a drain and moved by a compaction. A page on its way out
 * (STAGED) hides the copy it was filled from; so does a client whose gate is shut. Both
 * end: the passes are repeated.
 *
 * Removal. New writes avoid a backend that is DRAINING; those under way have it pinned. Once nobody has,
 * and no extent is live, nothing can come any more (backend.c).
 *
 * Locking     a gate for at most MOVES_A_TURN slots, else nothing. The groups and clients of moves that are
 *             not settled are held by reference and by `users`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base.h"
#include "codec.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "io.h"
#include "sys.h"

#define SEGMENTS_AHEAD 2u /* one is moved, one read */
#define PIECE_BYTES (128UL << 10)
#define PIECES (SEGMENT_BYTES / PIECE_BYTES)
#define PIECES_PENDING 2u /* what a fault's read waits for on the same disk: a fifth of a millisecond at 1 GB/s */
#define AHEAD_BYTES (SEGMENTS_AHEAD * SEGMENT_BYTES)
#define BUFFER_BYTES (AHEAD_BYTES + 5 * PAGE_BYTES)
#define MOVES_MAX 8192u    /* of a segment that is not written yet */
#define MOVES_A_TURN 64u
#define CLUSTERS_A_TURN 16u
#define WALK_MOVES 2048u   /* looked up before they are sorted and moved */
#define HELD_MAX 64u
#define AGAIN_MS 20
#define ROOM_MS 50
#define TURN_BYTES (MOVES_A_TURN * PAGE_BYTES)
#define BACKGROUND_SEGMENTS 4u  /* compacted at a time by an idle writer */
#define BACKGROUND_PERCENT 50   /* live bytes of a backend, and of a segment, from which on it is left alone */
#define BACKGROUND_BYTES_MIN (64 * SEGMENT_BYTES)

struct move {
	struct client *client;
	uint64_t page;
	struct slot word; /* in the map: SPILL, KEPT_SPILL or INDIRECT */
	struct slot copy; /* behind it: SPILL, an extent of the backend */
	struct slot to;   /* POOL, SPILL; NONE: a kept copy that is dropped */
};

struct job {
	struct engine *engine;
	unsigned number;
	struct spill *spill;
	bool compacts, force;
	bool is_background; /* only what frees more than it writes */
	bool demotes;       /* to backends of a lower priority, and nowhere else (tier.h) */

	struct spill_segment *out; /* being filled with the objects of `moves`; NULL: none */
	unsigned out_number;       /* its backend, pinned */
	struct move *moves;
	unsigned move_count;
	struct client *held[HELD_MAX];
	unsigned held_count;

	uint8_t *buffers; /* SEGMENTS_AHEAD segments, then a page, one for an object, room for an extent and its surroundings */
	struct io_queue *queue;
	struct read_ahead *ahead; /* of the pass by segment */
	uint64_t settled; /* moves that came to their end */
	uint64_t extents_bad; /* failed their check in this round */
	bool lacks_room;      /* some had nowhere to go in this round */
};

/* ---- clients that are held ---- */

static void release_held(struct job *job)
{
	for (unsigned i = 0; i < job->held_count; i++) {
		pthread_mutex_lock(&job->engine->registry);
		job->held[i]->group->users--;
		pthread_mutex_unlock(&job->engine->registry);
		client_put(job->held[i]);
	}
	job->held_count = 0;
}

/* The client with that index, until release_held; NULL when there is none. */
static struct client *hold(struct job *job, uint64_t index)
{
	struct engine *engine = job->engine;
	struct client *client;

	if (index >= CLIENTS_MAX)
		return NULL;
	SCOPED_LOCK(&engine->registry);
	client = engine->clients[index];
	for (unsigned i = 0; client && i < job->held_count; i++)
		if (job->held[i] == client)
			return client;
	if (!client)
		return NULL;
	VS_CHECK(job->held_count < HELD_MAX);
	client->references++;
	client->group->users++;
	job->held[job->held_count++] = client;
	return client;
}

/* ---- step 4 ---- */

static void free_new(struct job *job, const struct move *move)
{
	if (move->to.tag == SLOT_POOL)
		pool_free(move->client->group->pool, move->to.location, move->to.units);
	else if (move->to.tag != SLOT_NONE)
		spill_free(job->engine->backends[move->to.backend].spill, move->to.location,
			   move->to.units);
}

/* The gate is held. */
static void settle_move(struct job *job, const struct move *move)
{
	struct engine *engine = job->engine;
	struct client *client = move->client;
	struct slot_map *map = &client->record->map;
	struct slot word;
	bool done = false;

	if (!client->dead && slot_get(engine->slots, map, move->page, &word) == 0 &&
	    slot_is_equal(word, move->word)) {
		if (word.tag == SLOT_INDIRECT)
			done = slot_shared_migrate(engine->slots, word.location, move->copy, move->to);
		else if (slot_is_kept(word.tag) && move->to.tag != SLOT_NONE)
			done = slot_set(engine->slots, map, move->page, slot_kept(move->to)) == 0;
		else
			done = slot_set(engine->slots, map, move->page, move->to) == 0;
	}
	if (!done) {
		free_new(job, move);
		return;
	}
	crash_point(CRASH_DRAIN_SETTLED_ONE);
	job->settled++;
	if (move->to.tag == SLOT_POOL)
		client_cold_push(client, move->page >> CLUSTER_SHIFT, move->to.units == POOL_UNITS_MAX);
	if (move->to.tag == SLOT_POOL || move->to.tag == SLOT_NONE)
		group_spill_changed(client->group, -(int)move->copy.units);
	spill_free(job->spill, move->copy.location, move->copy.units);
	if (job->compacts)
		counter_add(engine, compacted_pages, 1);
	else if (job->demotes)
		counter_add(engine, demoted_pages, move->to.tag != SLOT_NONE);
	else
		counter_add(engine, drained_pages, 1);
}

static void settle(struct job *job, struct move *moves, unsigned count)
{
	for (unsigned i = 0; i < count;) {
		struct client *client = moves[i].client;
		unsigned end = min_of(i + MOVES_A_TURN, count);

		pthread_mutex_lock(&client->gate);
		for (; i < end && moves[i].client == client; i++)
			settle_move(job, &moves[i]);
		client_metadata_changed(client);
		pthread_mutex_unlock(&client->gate);
		group_pool_changed(client->group);
	}
}

/* ---- the segment that is being filled ---- */

static void out_close(struct job *job)
{
	job->out = NULL;
	job->move_count = 0;
	if (!job->compacts)
		backend_unpin(job->engine, job->out_number);
}

/* Step 3, and 4 for all in it. On an error every object is still where it was. */
static int out_flush(struct job *job)
{
	int result;

	if (!job->out)
		return 0;
	result = backend_write_segment(job->engine, job->out_number, job->out);
	if (result == 0)
		settle(job, job->moves, job->move_count);
	out_close(job);
	return result;
}

static int out_open(struct job *job)
{
	struct engine *engine = job->engine;
	unsigned tries = 0;
	int result;

	do {
		int number = job->compacts ? (int)job->number :
			     job->demotes ? backend_pick_below(engine, job->number) : backend_pick(engine);

		if (number < 0)
			return number;
		job->out_number = (unsigned)number;
		result = spill_segment_begin(engine->backends[number].spill, job->compacts, &job->out);
		if (result < 0)
			out_close(job);
		/* Others have taken what was free there: is there another backend? */
	} while (result == -ENOSPC && !job->compacts && ++tries < BACKENDS_MAX);
	if (result == 0 && !job->compacts && !job->demotes)
		WRITE_ONCE(engine->backend_turn, job->out_number);
	return result;
}

static int out_add(struct job *job, struct move *move, const uint8_t *object)
{
	uint64_t owner = (uint64_t)move->client->index << 40 | move->page;
	int64_t extent = -ENOSPC;
	int result = 0;

	if (job->out && job->move_count < MOVES_MAX)
		extent = spill_segment_add(job->out, owner, object, move->copy.units);
	if (extent < 0) {
		result = out_flush(job);
		if (result == 0)
			result = out_open(job);
		if (result < 0)
			return result;
		extent = spill_segment_add(job->out, owner, object, move->copy.units);
		VS_CHECK(extent >= 0); /* one object fits into an empty segment */
	}
	move->to = move->copy;
	move->to.backend = (uint8_t)job->out_number;
	move->to.location = (uint64_t)extent;
	job->moves[job->move_count++] = *move;
	return 0;
}

/* ---- step 2 ---- */

static void read_on(struct job *job);

static bool is_cancelled(const struct job *job)
{
	return READ_ONCE(job->engine->backends[job->number].job_cancelled) ||
	       READ_ONCE(job->engine->stopping);
}

/* The object in bytes that were read from its place on: sound, or NULL. */
static const uint8_t *object_check(struct job *job, const struct move *move, const uint8_t *bytes)
{
	uint8_t *page = job->buffers + AHEAD_BYTES;
	const uint8_t *object;

	if (spill_object_open(job->spill, move->copy.location, move->copy.units, bytes, page + PAGE_BYTES, &object) < 0 ||
	    codec_expand(object, move->copy.units, page) < 0 ||
	    codec_check(page, job->engine->state->secret) != move->copy.check)
		return NULL;
	return object;
}

/* Does the page still have the slot that was looked up? */
static bool is_unchanged(struct job *job, const struct move *move)
{
	struct slot word;

	SCOPED_LOCK(&move->client->gate);
	if (move->client->dead ||
	    slot_get(job->engine->slots, &move->client->record->map, move->page, &word) < 0 ||
	    !slot_is_equal(word, move->word))
		return false;
	return word.tag != SLOT_INDIRECT ||
	       slot_is_equal(slot_shared_get(job->engine->slots, word.location), move->copy);
}

/*
 * The object, sound, or NULL. What was read ahead may have been overwritten since, if the page was freed:
 * so it is read once more, and only an unchanged slot makes it a bad object.
 */
static const uint8_t *object_get(struct job *job, const struct move *move, const uint8_t *bytes)
{
	struct spill_range range = spill_range_of(job->spill, move->copy.location, move->copy.units);
	uint8_t *buffer = job->buffers + AHEAD_BYTES + 2 * PAGE_BYTES;
	const uint8_t *object = bytes ? object_check(job, move, bytes) : NULL;
	int result;

	if (object)
		return object;
	result = io_read_wait(spill_fd(job->spill), buffer, range.length_bytes, range.offset_bytes);
	spill_count_read(job->spill, range.length_bytes, result);
	if (result == 0)
		object = object_check(job, move, buffer + range.object_bytes_in);
	if (!object)
		job->extents_bad += is_unchanged(job, move);
	return object;
}

/* Has the pool of the group room for a turn's objects, for as long as nobody else takes it? */
static bool pool_takes(const struct group *group, bool others_take)
{
	uint64_t taken_bytes = pool_bytes(group->pool) + TURN_BYTES;
	uint64_t cap = group_pool_cap_bytes(group);

	if (group_room_bytes(group) < (int64_t)(2 * group_reserve_bytes(group) + TURN_BYTES))
		return false;
	if (group->pool_limit_bytes && taken_bytes > group->pool_limit_bytes)
		return false;
	/* Not up to the cap, from which on the writer would carry it to the others in small steps. */
	return !others_take || taken_bytes + cap / 8 < cap;
}

/* Where the objects of this turn go: 0 pool, 1 a segment, -ENOSPC. */
static int destination(struct job *job, const struct group *group)
{
	int other;

	if (job->compacts || job->demotes)
		return 1;
	other = job->out ? 1 : backend_pick(job->engine);
	if (other >= 0 && !job->out)
		backend_unpin(job->engine, (unsigned)other);
	if (pool_takes(group, other >= 0))
		return 0;
	return other >= 0 ? 1 : -ENOSPC;
}

static int pool_add(struct move *move, const uint8_t *object)
{
	uint64_t handle;
	int result = pool_store(move->client->group->pool, object, move->copy.units, &handle);

	if (result < 0)
		return -ENOSPC;
	move->to = (struct slot){ .tag = SLOT_POOL, .units = move->copy.units, .location = handle,
				  .check = move->copy.check };
	return 0;
}

/*
 * Move the objects of one client's pages, at most MOVES_A_TURN. `bytes` are those of the backend from
 * `start` on; NULL: read each. An error is one of room, of the target, or -ECANCELED.
 */
static int move_turn(struct job *job, struct move *moves, unsigned count, const uint8_t *bytes,
		     uint64_t start)
{
	unsigned done = 0;
	int to = destination(job, moves[0].client->group), result = 0;

	if (is_cancelled(job))
		return -ECANCELED;
	read_on(job);
	for (unsigned i = 0; i < count && result == 0; i++) {
		struct move *move = &moves[i];
		const uint8_t *object;

		if (slot_is_kept(move->word.tag) && !job->compacts) {
			move->to = (struct slot){ .tag = SLOT_NONE };
			moves[done++] = *move;
			continue;
		}
		if (to < 0) {
			result = to;
			break;
		}
		object = object_get(job, move,
				    bytes ? bytes + (move->copy.location * POOL_UNIT_BYTES - start) : NULL);
		if (object)
			result = to == 0 ? pool_add(move, object) : out_add(job, move, object);
		if (object && result == 0 && to == 0)
			moves[done++] = *move;
	}
	crash_point(CRASH_DRAIN_STORED);
	settle(job, moves, done);
	if (result == -ENOSPC && job->force) {
		job->lacks_room = true; /* those of other groups may still go */
		result = 0;
	}
	return result;
}

/* ---- step 1 ---- */

/* Does this page name an extent that is to be moved? Fills in all but `to`. The gate is held. */
static bool look_up(struct job *job, struct client *client, uint64_t page, struct move *move)
{
	struct slot_space *space = job->engine->slots;

	if (slot_get(space, &client->record->map, page, &move->word) < 0)
		return false;
	if (move->word.tag == SLOT_INDIRECT)
		move->copy = slot_shared_get(space, move->word.location);
	else if (move->word.tag == SLOT_KEPT_SPILL)
		move->copy = slot_unkept(move->word);
	else
		move->copy = move->word;
	move->client = client;
	move->page = page;
	return move->copy.tag == SLOT_SPILL && move->copy.backend == job->number;
}

/* ---- by segment ---- */

static int move_entries(struct job *job, const uint8_t *bytes, unsigned first, unsigned end)
{
	struct spill_entry entry = spill_table_entry(bytes, first);
	uint64_t start = entry.extent * POOL_UNIT_BYTES - entry.object_bytes_in;
	struct client *client;
	struct move moves[MOVES_A_TURN];
	unsigned count = 0;

	if (job->held_count == HELD_MAX) {
		int result = out_flush(job);

		if (result < 0)
			return result;
		release_held(job);
	}
	client = hold(job, entry.owner >> 40);
	if (!client)
		return 0;
	pthread_mutex_lock(&client->gate);
	for (unsigned i = first; i < end && !client->dead && !client_is_shut(client); i++) {
		struct move *move = &moves[count];

		entry = spill_table_entry(bytes, i);
		if (look_up(job, client, entry.owner & ((1ULL << 40) - 1), move) &&
		    move->copy.location == entry.extent && move->copy.units == entry.units)
			count++;
	}
	client_metadata_changed(client); /* a shared cluster may have become its own */
	pthread_mutex_unlock(&client->gate);
	return count > 0 ? move_turn(job, moves, count, bytes, start) : 0;
}

static int move_segment(struct job *job, uint64_t number, uint8_t *bytes)
{
	int count = spill_table_verify(job->spill, number, bytes), result = 0;

	/* Not what was written there, or no longer: its objects are found by their slots. */
	for (unsigned i = 0, end; count > 0 && i < (unsigned)count && result == 0; i = end) {
		uint64_t client = spill_table_entry(bytes, i).owner >> 40;

		for (end = i + 1; end < (unsigned)count && end - i < MOVES_A_TURN &&
				  spill_table_entry(bytes, end).owner >> 40 == client; end++)
			;
		result = move_entries(job, bytes, i, end);
	}
	return result;
}

static bool is_wanted(struct job *job, uint64_t segment)
{
	if (job->is_background)
		return spill_live_bytes(job->spill, segment) < SEGMENT_BYTES / 100 * BACKGROUND_PERCENT;
	return !job->compacts || spill_is_sparse(job->spill, segment);
}

/* The next segment to move, from `from` on, or -ENOENT. */
static int64_t next_wanted(struct job *job, uint64_t from)
{
	int64_t number = spill_next_segment(job->spill, from);

	while (number >= 0 && !is_wanted(job, (uint64_t)number))
		number = spill_next_segment(job->spill, (uint64_t)number + 1);
	return number;
}

static void note_left(struct job *job)
{
	struct backend *backend = &job->engine->backends[job->number];
	struct spill_statistics statistics;
	uint64_t left_bytes;

	if (job->compacts) {
		(void)spill_sparse_segments(job->spill, &left_bytes);
	} else {
		spill_statistics(job->spill, &statistics);
		left_bytes = statistics.live_bytes;
	}
	WRITE_ONCE(backend->job_left_bytes, min_of(left_bytes, backend->job_total_bytes));
}

/*
 * The next segment is read while one is moved, a piece at a time and few of them under way: who faults waits for those. Segments
 * come in the order in which they were asked for.
 */
struct read_ahead {
	struct ahead_segment {
		int64_t number;
		unsigned asked, pending; /* pieces; 0 pending and all asked: it is there, or has failed */
		int error;
	} segments[SEGMENTS_AHEAD];
	unsigned first, count;
	unsigned pending;
	uint64_t next;
	unsigned left; /* segments that may still be asked for */
};

static uint8_t *segment_buffer(const struct job *job, unsigned slot)
{
	return job->buffers + slot * SEGMENT_BYTES;
}

static void ask_piece(struct job *job, struct read_ahead *ahead, unsigned slot)
{
	struct ahead_segment *segment = &ahead->segments[slot];
	uint64_t at = segment->asked * PIECE_BYTES;
	int result = io_read(job->queue, spill_fd(job->spill), segment_buffer(job, slot) + at, PIECE_BYTES,
			     (uint64_t)segment->number * SEGMENT_BYTES + at, slot);

	segment->asked++;
	if (result == 0) {
		segment->pending++;
		ahead->pending++;
	} else {
		segment->error = result;
		segment->asked = PIECES;
	}
}

/* As many pieces as may be under way, of the segments that have a buffer. */
static void read_more(struct job *job, struct read_ahead *ahead)
{
	for (unsigned k = 0; k < SEGMENTS_AHEAD; k++) {
		unsigned slot = (ahead->first + k) % SEGMENTS_AHEAD;

		if (k == ahead->count) {
			int64_t number = ahead->left > 0 ? next_wanted(job, ahead->next) : -ENOENT;

			if (number < 0)
				return;
			ahead->segments[slot] = (struct ahead_segment){ .number = number };
			ahead->next = (uint64_t)number + 1;
			ahead->left--;
			ahead->count++;
		}
		while (ahead->segments[slot].asked < PIECES && ahead->pending < PIECES_PENDING)
			ask_piece(job, ahead, slot);
	}
}

static void read_reap(struct job *job, struct read_ahead *ahead, bool wait)
{
	struct io_completion completions[PIECES_PENDING];
	unsigned count = wait ? io_wait(job->queue, completions, PIECES_PENDING)
			      : io_reap(job->queue, completions, PIECES_PENDING);

	for (unsigned i = 0; i < count; i++) {
		struct ahead_segment *segment = &ahead->segments[completions[i].cookie];

		segment->pending--;
		ahead->pending--;
		if (completions[i].result < 0) {
			segment->error = (int)completions[i].result;
			segment->asked = PIECES;
		}
	}
}

/* While something else is done. */
static void read_on(struct job *job)
{
	if (!job->ahead)
		return;
	read_reap(job, job->ahead, false);
	read_more(job, job->ahead);
}

/* Wait for the oldest segment: its slot, which is its own until read_done. */
static unsigned read_wait(struct job *job, struct read_ahead *ahead)
{
	struct ahead_segment *segment = &ahead->segments[ahead->first];

	while (segment->asked < PIECES || segment->pending > 0) {
		VS_CHECK(ahead->pending > 0);
		read_reap(job, ahead, true);
		read_more(job, ahead);
	}
	spill_count_read(job->spill, SEGMENT_BYTES, segment->error);
	return ahead->first;
}

static void read_done(struct read_ahead *ahead)
{
	ahead->first = (ahead->first + 1) % SEGMENTS_AHEAD;
	ahead->count--;
}

/* At most `segments` segments from *from on. A segment that cannot be read is left to the other pass. */
static int pass_by_segment(struct job *job, uint64_t *from, unsigned segments)
{
	struct read_ahead ahead = { .next = *from, .left = segments };
	int result = 0;

	job->ahead = &ahead;
	while (result == 0) {
		unsigned slot;

		read_more(job, &ahead);
		if (ahead.count == 0)
			break;
		slot = read_wait(job, &ahead);
		if (ahead.segments[slot].error == 0)
			result = move_segment(job, (uint64_t)ahead.segments[slot].number, segment_buffer(job, slot));
		read_done(&ahead);
		if (!job->out)
			release_held(job);
		if (is_cancelled(job))
			result = -ECANCELED;
		note_left(job);
	}
	job->ahead = NULL;
	while (ahead.pending > 0)
		read_reap(job, &ahead, true); /* the buffers are ours until then */
	if (result == 0)
		result = out_flush(job);
	release_held(job);
	*from = ahead.next;
	return result;
}

/* ---- by slot ---- */

static int move_compare(const void *a, const void *b)
{
	const struct move *left = a, *right = b;

	return left->copy.location < right->copy.location ? -1 : left->copy.location > right->copy.location;
}

/* Pages of the client that name the backend, from *cursor on; fewer than WALK_MOVES: these were all. */
static unsigned walk_client(struct job *job, struct client *client, uint64_t *cursor, struct move *moves)
{
	struct slot_space *space = job->engine->slots;
	struct slot_map *map = &client->record->map;
	unsigned count = 0;
	bool more = true;

	while (more && count + CLUSTERS_A_TURN * CLUSTER_PAGES <= WALK_MOVES) {
		SCOPED_LOCK(&client->gate);
		for (unsigned k = 0; more && k < CLUSTERS_A_TURN; k++) {
			uint64_t first;

			more = !client->dead && !client_is_shut(client) &&
			       slot_map_next(space, map, cursor, &first);
			for (unsigned i = 0; more && i < CLUSTER_PAGES; i++) {
				struct move *move = &moves[count];

				if (look_up(job, client, first + i, move) &&
				    is_wanted(job, move->copy.location * POOL_UNIT_BYTES / SEGMENT_BYTES))
					count++;
			}
		}
		client_metadata_changed(client);
	}
	if (!more)
		*cursor = UINT64_MAX;
	qsort(moves, count, sizeof *moves, move_compare);
	return count;
}

static int pass_by_slot(struct job *job)
{
	struct move *moves = malloc(WALK_MOVES * sizeof *moves);
	int result = moves ? 0 : -ENOMEM;

	for (unsigned index = 0; result == 0 && index < READ_ONCE(job->engine->clients_end); index++) {
		struct client *client = hold(job, index);
		uint64_t cursor = 0;

		while (client && result == 0 && cursor != UINT64_MAX) {
			unsigned count = walk_client(job, client, &cursor, moves);

			for (unsigned i = 0; i < count && result == 0; i += MOVES_A_TURN)
				result = move_turn(job, moves + i, min_of(count - i, MOVES_A_TURN), NULL, 0);
			if (is_cancelled(job))
				result = -ECANCELED;
		}
		if (result == 0)
			result = out_flush(job);
		release_held(job);
		note_left(job);
	}
	free(moves);
	return result;
}

/* ---- jobs ---- */

/*
 * In one huge page if there is one: of single pages a large read has hundreds of pieces for the device, and where that
 * fills its queue whoever faults waits until it is read. NULL: no memory.
 */
static uint8_t *buffers_map(void)
{
	size_t bytes = AHEAD_BYTES + BUFFER_BYTES, before;
	uint8_t *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (start == MAP_FAILED)
		return NULL;
	before = (size_t)(-(uintptr_t)start % AHEAD_BYTES);
	if (before > 0)
		munmap(start, before);
	munmap(start + before + BUFFER_BYTES, bytes - before - BUFFER_BYTES);
	(void)madvise(start + before, AHEAD_BYTES, MADV_HUGEPAGE);
	return start + before;
}

static void buffers_unmap(uint8_t *buffers)
{
	if (buffers)
		munmap(buffers, BUFFER_BYTES);
}

static int job_open(struct job *job, struct engine *engine, unsigned number, bool compacts, bool force)
{
	int result = -ENOMEM;

	*job = (struct job){ .engine = engine, .number = number, .compacts = compacts, .force = force,
			     .spill = engine->backends[number].spill };
	job->moves = malloc(MOVES_MAX * sizeof *job->moves);
	job->buffers = buffers_map();
	if (job->moves && job->buffers)
		result = io_queue_create(PIECES_PENDING, IO_AUTOMATIC, &job->queue);
	if (result == 0)
		return 0;
	buffers_unmap(job->buffers);
	free(job->moves);
	return result;
}

static void job_close(struct job *job)
{
	if (job->out) { /* cancelled: its objects are still where they were */
		spill_segment_abandon(job->out);
		out_close(job);
	}
	release_held(job);
	io_queue_destroy(job->queue);
	buffers_unmap(job->buffers);
	free(job->moves);
}

/* Take the registry lock when none of a set of backends is being compacted in the background. */
static void registry_lock(struct engine *engine, uint32_t backends)
{
	bool busy = true;

	while (busy) {
		pthread_mutex_lock(&engine->registry);
		busy = false;
		for (unsigned i = 0; i < BACKENDS_MAX; i++)
			busy = busy || ((backends >> i & 1) &&
					engine->backends[i].job == JOB_COMPACT_BACKGROUND);
		if (!busy)
			return;
		pthread_mutex_unlock(&engine->registry);
		sys_sleep_ms(1); /* it takes a few segments at a time */
	}
}

/* The backend is this job's: 0, -ENOENT, -EBUSY. The registry lock is held. */
static int job_claim(struct engine *engine, int number, uint32_t kind)
{
	struct backend *backend = number >= 0 && number < BACKENDS_MAX ? &engine->backends[number] : NULL;

	if (!backend || !backend->spill)
		return -ENOENT;
	if (backend->job != ENGINE_JOB_NONE ||
	    (kind != ENGINE_JOB_DRAIN && backend->state != BACKEND_ACTIVE))
		return -EBUSY;
	WRITE_ONCE(backend->job_cancelled, false);
	WRITE_ONCE(backend->job_waiting, false);
	WRITE_ONCE(backend->job_since_ns, sys_now_ns());
	WRITE_ONCE(backend->job, kind);
	return 0;
}

static void job_release(struct engine *engine, unsigned number)
{
	struct backend *backend = &engine->backends[number];
	uint32_t draining = BACKEND_DRAINING;

	SCOPED_LOCK(&engine->registry);
	WRITE_ONCE(backend->job, ENGINE_JOB_NONE);
	(void)__atomic_compare_exchange_n(&backend->state, &draining, BACKEND_ACTIVE, false,
					  __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

int engine_backend_cancel(struct engine *engine, int number)
{
	SCOPED_LOCK(&engine->registry);
	if (number < 0 || number >= BACKENDS_MAX || !engine->backends[number].spill ||
	    engine->backends[number].job == ENGINE_JOB_NONE)
		return -ENOENT;
	WRITE_ONCE(engine->backends[number].job_cancelled, true);
	return 0;
}

/* ---- drain ---- */

/* The registry lock is held. */
static void add_room(struct engine *engine, uint32_t set, struct engine_room *room)
{
	for (unsigned i = 0; i < BACKENDS_MAX; i++) {
		const struct backend *backend = &engine->backends[i];
		struct spill_statistics statistics;

		if (!backend->spill)
			continue;
		spill_statistics(backend->spill, &statistics);
		if (set >> i & 1)
			room->live_bytes += statistics.live_bytes;
		else if (backend->state == BACKEND_ACTIVE)
			room->backend_bytes += backend_room_bytes(backend, backend->spill);
	}
	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		const struct group *group = engine->groups[i];
		int64_t bytes;

		if (!group)
			continue;
		bytes = group_room_bytes(group) - (int64_t)(2 * group_reserve_bytes(group));
		bytes = min_of(bytes, READ_ONCE(group->spill_bytes));
		if (group->pool_limit_bytes)
			bytes = min_of(bytes, (int64_t)group->pool_limit_bytes -
						      (int64_t)pool_bytes(group->pool));
		room->pool_bytes += (uint64_t)max_of(bytes, 0);
	}
}

static int drain_begin(struct engine *engine, uint32_t backends, int force, struct engine_room *ret_room)
{
	struct engine_room room = { 0 };

	for (unsigned i = 0; i < BACKENDS_MAX; i++)
		if ((backends >> i & 1) && !engine->backends[i].spill)
			return -ENOENT;
	add_room(engine, backends, &room);
	*ret_room = room;
	for (unsigned i = 0; i < BACKENDS_MAX; i++)
		if ((backends >> i & 1) && engine->backends[i].job != ENGINE_JOB_NONE)
			return -EBUSY;
	if (!force && room.live_bytes > room.backend_bytes + room.pool_bytes)
		return -ENOSPC;
	for (unsigned i = 0; i < BACKENDS_MAX; i++) {
		struct backend *backend = &engine->backends[i];

		if (!(backends >> i & 1))
			continue;
		VS_CHECK(job_claim(engine, (int)i, ENGINE_JOB_DRAIN) == 0);
		/* A failed one is drained, too, and then in use again if that does not succeed: its errors
		 * will say so if it should not be. */
		__atomic_store_n(&backend->state, BACKEND_DRAINING, __ATOMIC_SEQ_CST);
		WRITE_ONCE(backend->job_total_bytes, 0);
		WRITE_ONCE(backend->job_left_bytes, 0);
	}
	return 0;
}

int engine_backend_drain_begin(struct engine *engine, uint32_t backends, int force,
			       struct engine_room *ret_room)
{
	int result;

	registry_lock(engine, backends);
	result = drain_begin(engine, backends, force, ret_room);
	pthread_mutex_unlock(&engine->registry);
	return result;
}

/* Nobody writes to it, and nothing is in it: in this order, for a write that ends makes extents live. */
static bool is_drained(const struct job *job, struct spill_statistics *ret_statistics)
{
	bool pinned = __atomic_load_n(&job->engine->backends[job->number].pins, __ATOMIC_SEQ_CST) > 0;

	spill_statistics(job->spill, ret_statistics);
	return !pinned && ret_statistics->extent_count == 0;
}

/* Until there may be room for something that had none, or some of it is gone. */
static void wait_for_room(struct job *job, uint64_t live_bytes)
{
	struct backend *backend = &job->engine->backends[job->number];
	struct engine_room room = { .live_bytes = live_bytes };

	WRITE_ONCE(backend->job_waiting, true);
	while (room.backend_bytes + room.pool_bytes < TURN_BYTES && room.live_bytes == live_bytes &&
	       !is_cancelled(job)) {
		sys_sleep_ms(ROOM_MS);
		room = (struct engine_room){ 0 };
		pthread_mutex_lock(&job->engine->registry);
		add_room(job->engine, 1u << job->number, &room);
		pthread_mutex_unlock(&job->engine->registry);
	}
	WRITE_ONCE(backend->job_waiting, false);
}

/* Both passes, once. */
static int drain_round(struct job *job)
{
	struct spill_statistics statistics;
	uint64_t from = 0;
	int result;

	job->extents_bad = 0;
	job->lacks_room = false;
	result = pass_by_segment(job, &from, UINT32_MAX);
	spill_statistics(job->spill, &statistics);
	if (result < 0 || statistics.extent_count == 0)
		return result;
	job->extents_bad = 0; /* it meets them all again */
	result = pass_by_slot(job);
	spill_statistics(job->spill, &statistics);
	if (result == 0 && statistics.extent_count > 0 && statistics.extent_count <= job->extents_bad)
		result = -EBADMSG;
	return result;
}

static int drain(struct job *job)
{
	struct spill_statistics statistics;
	uint64_t extents_before = UINT64_MAX;
	int result = 0;

	while (result == 0 && !is_drained(job, &statistics)) {
		if (statistics.extent_count == extents_before && job->lacks_room)
			wait_for_room(job, statistics.live_bytes);
		else if (statistics.extent_count == extents_before)
			sys_sleep_ms(AGAIN_MS); /* pages on their way out, or a reader's pin */
		extents_before = statistics.extent_count;
		result = is_cancelled(job) ? -ECANCELED : drain_round(job);
	}
	return result;
}

int engine_backend_drain(struct engine *engine, int number, int force)
{
	struct backend *backend = &engine->backends[number];
	struct spill_statistics statistics;
	struct job job;
	int result, nice_before;

	VS_CHECK(backend->job == ENGINE_JOB_DRAIN && backend->spill);
	spill_statistics(backend->spill, &statistics);
	WRITE_ONCE(backend->job_total_bytes, statistics.live_bytes);
	WRITE_ONCE(backend->job_left_bytes, statistics.live_bytes);
	spill_set_draining(backend->spill, true);
	nice_before = sys_nice(0); /* faults go first */
	result = job_open(&job, engine, (unsigned)number, false, force != 0);
	if (result == 0) {
		result = drain(&job);
		job_close(&job);
	}
	(void)sys_nice(nice_before);
	if (result == 0) {
		backend_remove(engine, (unsigned)number);
		return 0;
	}
	spill_set_draining(backend->spill, false);
	job_release(engine, (unsigned)number);
	return result;
}

/* ---- compaction ---- */

/* Would rewriting the sparse segments free one at least? */
static bool has_gain(struct spill *spill, uint64_t *ret_live_bytes)
{
	uint64_t count = spill_sparse_segments(spill, ret_live_bytes);

	/* A table takes a little of each new segment. */
	return count > div_ceil(*ret_live_bytes + *ret_live_bytes / 32, SEGMENT_BYTES);
}

static int compact(struct job *job)
{
	struct backend *backend = &job->engine->backends[job->number];
	uint64_t live_bytes, from = 0;
	int result = 0;

	if (!has_gain(job->spill, &live_bytes))
		return 0;
	WRITE_ONCE(backend->job_total_bytes, live_bytes);
	WRITE_ONCE(backend->job_left_bytes, live_bytes);
	result = pass_by_segment(job, &from, UINT32_MAX);
	if (result == 0 && has_gain(job->spill, &live_bytes))
		result = pass_by_slot(job);
	if (result == 0)
		spill_trim_wait(job->spill);
	return result;
}

int engine_backend_compact(struct engine *engine, int number)
{
	struct job job;
	int result, nice_before;

	registry_lock(engine, number >= 0 && number < BACKENDS_MAX ? 1u << number : 0);
	result = job_claim(engine, number, ENGINE_JOB_COMPACT);
	pthread_mutex_unlock(&engine->registry);
	if (result < 0)
		return result;
	WRITE_ONCE(engine->backends[number].job_total_bytes, 0);
	WRITE_ONCE(engine->backends[number].job_left_bytes, 0);
	nice_before = sys_nice(0); /* faults go first */
	result = job_open(&job, engine, (unsigned)number, true, false);
	if (result == 0) {
		result = compact(&job);
		job_close(&job);
	}
	(void)sys_nice(nice_before);
	job_release(engine, (unsigned)number);
	return result;
}

/* Half of it is dead, and it is worth the trouble. */
static bool is_fragmented(struct spill *spill)
{
	struct spill_statistics statistics;

	spill_statistics(spill, &statistics);
	return statistics.used_bytes >= BACKGROUND_BYTES_MIN &&
	       statistics.live_bytes < statistics.used_bytes / 100 * BACKGROUND_PERCENT;
}

bool drain_in_background(struct engine *engine, unsigned number)
{
	uint64_t from = 0;
	struct job job;
	bool claimed;

	pthread_mutex_lock(&engine->registry);
	claimed = engine->backends[number].spill && is_fragmented(engine->backends[number].spill) &&
		  job_claim(engine, (int)number, JOB_COMPACT_BACKGROUND) == 0;
	pthread_mutex_unlock(&engine->registry);
	if (!claimed)
		return false;
	if (job_open(&job, engine, number, true, false) == 0) {
		job.is_background = true;
		(void)pass_by_segment(&job, &from, BACKGROUND_SEGMENTS);
		job_close(&job);
	}
	job_release(engine, number);
	return true;
}

bool drain_down(struct engine *engine, unsigned number, uint64_t *from, unsigned segments)
{
	struct job job;
	int result;

	pthread_mutex_lock(&engine->registry);
	result = job_claim(engine, (int)number, JOB_COMPACT_BACKGROUND);
	pthread_mutex_unlock(&engine->registry);
	if (result < 0)
		return false;
	result = job_open(&job, engine, number, false, false);
	if (result == 0) {
		job.demotes = true;
		if (spill_next_segment(job.spill, *from) < 0)
			*from = 0;
		result = pass_by_segment(&job, from, segments);
		if (result == 0 && job.settled == 0)
			result = -EAGAIN;
		job_close(&job);
	}
	job_release(engine, number);
	return result == 0;
}
