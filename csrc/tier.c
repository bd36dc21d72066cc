/* SPDX-License-Identifier: MIT */
#include "tier.h"

#include <errno.h>

#include "base.h"
#include "sys.h"

#define DEMOTE_SEGMENTS 2u /* a turn */
#define BEGIN_PART 16u     /* of its segments are free, or less */
#define END_PART 8u
#define PAUSE_NS 1000000000ULL /* after segments of which nothing could be moved: their clients are stopped, say */

/* Does it lack free segments, or has it since demotion began? */
static bool lacks_segments(struct backend *backend, struct spill *spill)
{
	struct spill_statistics statistics;
	bool lacks;

	spill_statistics(spill, &statistics);
	lacks = spill_room_bytes(spill, &statistics) <
		statistics.size_bytes / (READ_ONCE(backend->demotes) ? END_PART : BEGIN_PART);
	WRITE_ONCE(backend->demotes, lacks);
	return lacks;
}

/* Is a turn due, and is there a backend that takes it? */
static bool may_demote(struct engine *engine, unsigned number)
{
	struct backend *backend = &engine->backends[number];
	struct spill *spill = backend_pin(engine, number);
	bool due;
	int below;

	if (!spill)
		return false;
	due = lacks_segments(backend, spill);
	backend_unpin(engine, number);
	below = due ? backend_pick_below(engine, number) : -ENOENT;
	if (below < 0)
		return false;
	due = sys_now_ns() >= READ_ONCE(engine->backends[below].write_next_ns);
	backend_unpin(engine, (unsigned)below);
	return due;
}

bool tier_demote(struct engine *engine, unsigned number)
{
	struct backend *backend = &engine->backends[number];

	if (!READ_ONCE(engine->tiering) || sys_now_ns() < backend->demote_next_ns || !may_demote(engine, number))
		return false;
	if (drain_down(engine, number, &backend->demote_from, DEMOTE_SEGMENTS))
		return true;
	backend->demote_next_ns = sys_now_ns() + PAUSE_NS;
	return false;
}

/* A backend of a higher priority that can be written to: pages that it has room for in all; 0: there is none. */
static uint64_t pages_above(struct engine *engine, unsigned number)
{
	int best = backend_pick(engine);
	struct spill_statistics statistics = { 0 };

	if (best < 0)
		return 0;
	if (READ_ONCE(engine->backends[best].priority) > READ_ONCE(engine->backends[number].priority))
		spill_statistics(engine->backends[best].spill, &statistics);
	backend_unpin(engine, (unsigned)best);
	return statistics.size_bytes / PAGE_BYTES;
}

/* Was it waited for before, not long ago? From now on it was. */
static bool was_waited_for(struct engine *engine, const struct client *client, uint64_t page, uint64_t pages)
{
	struct ghosts *ghosts = &engine->waited_for;
	bool was;

	if (!ghosts->entries)
		return false;
	was = ghosts_is_recent(ghosts, client->index, page, pages);
	ghosts_note(ghosts, client->index, page);
	return was;
}

bool tier_makes_room(struct engine *engine, unsigned number)
{
	int below = __atomic_load_n(&engine->tiering, __ATOMIC_ACQUIRE) ? backend_pick_below(engine, number) : -ENOENT;

	if (below >= 0)
		backend_unpin(engine, (unsigned)below);
	return below >= 0;
}

bool tier_promotes(const struct client *client, uint64_t page, unsigned number)
{
	struct engine *engine = client->engine;
	const struct group *group = client->group;
	uint64_t pages;

	if (!__atomic_load_n(&engine->tiering, __ATOMIC_ACQUIRE))
		return false;
	pages = pages_above(engine, number);
	if (pages == 0)
		return false;
	return was_waited_for(engine, client, page, pages) ||
	       ghosts_is_recent(&group->ghosts, client->index, page, READ_ONCE(group->limit_bytes) / PAGE_BYTES);
}
