/* SPDX-License-Identifier: MIT */
/*
 * backend — the table of spill backends: who may use an entry, which is written to, what there is.
 *
 * A removal takes the pointer out of the table first and then waits until nobody has the entry pinned;
 * a pin is counted first and then looks at the pointer. So either sees the other, and a number may be
 * given to a new backend without anyone mistaking it for the old one: whoever comes late compares his
 * slots, whole, before he believes what he read.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/statvfs.h>

#include "base.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "sys.h"

#define WRITE_ERRORS_MAX 8
#define ROOM_LOOK_NS 500000000ULL
#define ROOM_AGAIN_NS 5000000000ULL /* after a write that found none, whatever the file system says: a quota, say */
#define HANG_NS 1000000000ULL /* a segment is a megabyte */

struct spill *backend_pin(struct engine *engine, unsigned number)
{
	struct backend *backend = &engine->backends[number];
	struct spill *spill;

	VS_CHECK(number < BACKENDS_MAX);
	__atomic_fetch_add(&backend->pins, 1, __ATOMIC_SEQ_CST);
	spill = __atomic_load_n(&backend->spill, __ATOMIC_SEQ_CST);
	if (!spill)
		backend_unpin(engine, number);
	return spill;
}

void backend_unpin(struct engine *engine, unsigned number)
{
	uint32_t pins = __atomic_fetch_sub(&engine->backends[number].pins, 1, __ATOMIC_SEQ_CST);

	VS_CHECK(pins > 0);
}

void backend_install(struct engine *engine, unsigned number, const struct backend *from)
{
	struct backend *backend = &engine->backends[number];

	/* Field by field: somebody may just be pinning the entry, in vain. */
	WRITE_ONCE(backend->priority, from->priority);
	backend->is_device = from->is_device;
	memcpy(backend->path, from->path, sizeof backend->path);
	backend->errors = 0;
	backend->writing = 0;
	backend->rate_bytes = from->rate_bytes;
	backend->lacks_room = false;
	backend->room_look_ns = 0;
	backend->write_next_ns = 0;
	backend->demotes = false;
	backend->demote_from = 0;
	backend->demote_next_ns = 0;
	backend->job = ENGINE_JOB_NONE;
	WRITE_ONCE(backend->state, BACKEND_ACTIVE);
	__atomic_store_n(&backend->spill, from->spill, __ATOMIC_SEQ_CST);
}

void backend_remove(struct engine *engine, unsigned number)
{
	struct backend *backend = &engine->backends[number];
	struct spill *spill;
	struct writer *writer;

	pthread_mutex_lock(&engine->registry);
	spill = backend->spill;
	writer = backend->writer;
	backend->writer = NULL;
	crash_point(CRASH_DRAIN_EMPTY);
	/* A successor does not look for it any more; it closes what no record names. */
	__atomic_store_n(&engine->state->backends[number].used, 0, __ATOMIC_RELEASE);
	__atomic_store_n(&backend->spill, NULL, __ATOMIC_SEQ_CST);
	backend->job = ENGINE_JOB_NONE;
	pthread_mutex_unlock(&engine->registry);
	crash_point(CRASH_DRAIN_REMOVED);
	while (__atomic_load_n(&backend->pins, __ATOMIC_SEQ_CST) > 0)
		sys_sleep_ms(1);
	writer_destroy(writer);
	(void)spill_erase(spill); /* what cannot be erased is overwritten by whoever uses it next */
	spill_destroy(spill);
	pthread_mutex_lock(&engine->registry);
	if (!engine->state->backends[number].used) /* else it is another's already */
		spill_lineage_wipe(&engine->state->backends[number].lineage);
	pthread_mutex_unlock(&engine->registry);
}

/* It has not brought a write to its end for a while: others are written to meanwhile, of a lower priority, too. */
static bool hangs(const struct backend *backend)
{
	return __atomic_load_n(&backend->writing, __ATOMIC_ACQUIRE) > 0 &&
	       sys_now_ns() - READ_ONCE(backend->writing_since_ns) > HANG_NS;
}

/* What its file system can still hold of it. */
static uint64_t disk_room_bytes(const struct backend *backend, struct spill *spill)
{
	struct spill_statistics statistics;
	struct statvfs disk;

	if (backend->is_device || fstatvfs(spill_fd(spill), &disk) != 0)
		return UINT64_MAX;
	spill_statistics(spill, &statistics);
	/* What is free but not trimmed yet has its blocks already. */
	return (uint64_t)disk.f_bavail * disk.f_frsize + statistics.untrimmed_bytes;
}

static bool may_be_written(const struct backend *backend, struct spill *spill)
{
	struct spill_statistics statistics;

	/* After the pin: a drain sets the state first and then waits for pins. */
	if (__atomic_load_n(&backend->state, __ATOMIC_SEQ_CST) != BACKEND_ACTIVE || hangs(backend) ||
	    READ_ONCE(backend->lacks_room))
		return false;
	spill_statistics(spill, &statistics);
	return spill_room_bytes(spill, &statistics) >= SEGMENT_BYTES;
}

/* Of those with a priority below `below`, and encrypted if `sealed`. */
static int pick(struct engine *engine, int64_t below, bool sealed)
{
	unsigned turn = READ_ONCE(engine->backend_turn);
	int best = -ENOSPC;

	/* From the one after the last on: of equal priorities the first one met is kept. */
	for (unsigned i = 1; i <= BACKENDS_MAX; i++) {
		unsigned number = (turn + i) % BACKENDS_MAX;
		struct backend *backend = &engine->backends[number];
		struct spill *spill = backend_pin(engine, number);

		if (!spill)
			continue;
		if (READ_ONCE(backend->priority) < below && (!sealed || spill_is_sealed(spill)) &&
		    may_be_written(backend, spill) &&
		    (best < 0 || READ_ONCE(backend->priority) > READ_ONCE(engine->backends[best].priority))) {
			if (best >= 0)
				backend_unpin(engine, (unsigned)best);
			best = (int)number;
		} else {
			backend_unpin(engine, number);
		}
	}
	return best;
}

int backend_pick(struct engine *engine) { return pick(engine, INT64_MAX, false); }

int backend_pick_below(struct engine *engine, unsigned number)
{
	struct spill *spill = backend_pin(engine, number);
	bool sealed = spill && spill_is_sealed(spill);

	if (!spill)
		return -ENOENT;
	backend_unpin(engine, number);
	return pick(engine, READ_ONCE(engine->backends[number].priority), sealed);
}

/* Its file system may have room again, or none. Asked by its writer: the answer may take as long as a write. The
 * backend is pinned. */
static void look_for_room(struct backend *backend, struct spill *spill)
{
	uint64_t now_ns = sys_now_ns();

	if (now_ns < READ_ONCE(backend->room_look_ns))
		return;
	WRITE_ONCE(backend->lacks_room, disk_room_bytes(backend, spill) < SEGMENT_BYTES);
	WRITE_ONCE(backend->room_look_ns, now_ns + ROOM_LOOK_NS);
}

struct spill *backend_pin_to_write(struct engine *engine, unsigned number)
{
	struct backend *backend = &engine->backends[number];
	struct spill *spill = backend_pin(engine, number);
	int best = -ENOSPC;
	bool wanted;

	if (spill)
		look_for_room(backend, spill);
	if (spill && may_be_written(backend, spill))
		best = backend_pick(engine);
	wanted = best >= 0 && READ_ONCE(engine->backends[best].priority) <= READ_ONCE(backend->priority);

	if (best >= 0)
		backend_unpin(engine, (unsigned)best);
	if (spill && !wanted)
		backend_unpin(engine, number);
	return wanted ? spill : NULL;
}

static void note_failure(struct engine *engine, unsigned number, int result)
{
	struct backend *backend = &engine->backends[number];
	struct engine_event event = { .kind = ENGINE_EVENT_BACKEND_ERROR, .group = -1, .a = number,
				      .b = (uint64_t)(int64_t)result };

	/* A full file system, or quota, may have room later; a device that cannot write is left alone. */
	if (result == -ENOSPC || result == -EDQUOT) {
		WRITE_ONCE(backend->room_look_ns, sys_now_ns() + ROOM_AGAIN_NS);
		WRITE_ONCE(backend->lacks_room, true);
	} else if (result != -ENOMEM &&
		   __atomic_add_fetch(&backend->errors, 1, __ATOMIC_RELAXED) >= WRITE_ERRORS_MAX) {
		uint32_t active = BACKEND_ACTIVE;

		(void)__atomic_compare_exchange_n(&backend->state, &active, BACKEND_FAILED, false,
						  __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	}
	engine_event_push(engine, &event);
}

/* One more segment: when may the next be written, by its rate? */
static void note_written(struct backend *backend, uint64_t start_ns)
{
	uint64_t rate = READ_ONCE(backend->rate_bytes), next_ns = READ_ONCE(backend->write_next_ns), later_ns;

	if (rate == 0)
		return;
	do /* its own writer and that of a higher one (tier.h) may be at it */
		later_ns = max_of(next_ns, start_ns) + SEGMENT_BYTES * 1000000000ULL / rate;
	while (!__atomic_compare_exchange_n(&backend->write_next_ns, &next_ns, later_ns, false, __ATOMIC_RELAXED,
					    __ATOMIC_RELAXED));
}

int backend_write_segment(struct engine *engine, unsigned number, struct spill_segment *segment)
{
	struct backend *backend = &engine->backends[number];
	uint64_t start_ns = sys_now_ns();
	int result;

	WRITE_ONCE(backend->writing_since_ns, start_ns);
	__atomic_fetch_add(&backend->writing, 1, __ATOMIC_RELEASE);
	result = spill_segment_write(segment);
	WRITE_ONCE(backend->writing_since_ns, sys_now_ns());
	__atomic_fetch_sub(&backend->writing, 1, __ATOMIC_RELEASE);
	if (result < 0)
		note_failure(engine, number, result);
	else
		note_written(backend, start_ns);
	return result;
}

uint64_t backend_room_bytes(const struct backend *backend, struct spill *spill)
{
	struct spill_statistics statistics;
	uint64_t room;

	spill_statistics(spill, &statistics);
	room = min_of(spill_room_bytes(spill, &statistics), disk_room_bytes(backend, spill));
	return room / SEGMENT_BYTES * SEGMENT_BYTES;
}

/* ---- what there is ---- */

static void describe(const struct backend *backend, struct spill *spill, unsigned number,
		     struct engine_backend_statistics *record)
{
	uint64_t sparse_live_bytes;
	struct spill_statistics statistics;

	spill_statistics(spill, &statistics);
	*record = (struct engine_backend_statistics){
		.backend = (int32_t)number,
		.priority = READ_ONCE(backend->priority),
		.state = READ_ONCE(backend->state),
		.is_device = backend->is_device,
		.is_encrypted = spill_is_sealed(spill),
		.size_bytes = statistics.size_bytes,
		.used_bytes = statistics.used_bytes,
		.room_bytes = backend_room_bytes(backend, spill),
		.live_bytes = statistics.live_bytes,
		.sparse_bytes = spill_sparse_segments(spill, &sparse_live_bytes) * SEGMENT_BYTES,
		.extent_count = statistics.extent_count,
		.written_bytes = statistics.written_bytes,
		.read_bytes = statistics.read_bytes,
		.trimmed_bytes = statistics.trimmed_bytes,
		.rate_bytes = READ_ONCE(backend->rate_bytes),
		.lacks_room = READ_ONCE(backend->lacks_room),
		.errors = statistics.write_errors + statistics.read_errors,
		.writing_ms = __atomic_load_n(&backend->writing, __ATOMIC_ACQUIRE) ?
				      (sys_now_ns() - READ_ONCE(backend->writing_since_ns)) / 1000000 : 0,
		.job = READ_ONCE(backend->job),
	};
	memcpy(record->path, backend->path, sizeof record->path);
	if (record->job == JOB_COMPACT_BACKGROUND)
		record->job = ENGINE_JOB_NONE;
	if (record->job == ENGINE_JOB_NONE)
		return;
	record->job_waiting = READ_ONCE(backend->job_waiting);
	record->job_ms = (sys_now_ns() - READ_ONCE(backend->job_since_ns)) / 1000000;
	record->job_total_bytes = READ_ONCE(backend->job_total_bytes);
	record->job_left_bytes = READ_ONCE(backend->job_left_bytes);
}

int engine_backend_list(struct engine *engine, struct engine_backend_statistics *records, int max)
{
	int count = 0;

	for (unsigned i = 0; i < BACKENDS_MAX; i++) {
		struct spill *spill = backend_pin(engine, i);

		if (!spill)
			continue;
		if (count++ < max)
			describe(&engine->backends[i], spill, i, &records[count - 1]);
		backend_unpin(engine, i);
	}
	return count;
}
