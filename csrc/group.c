/* SPDX-License-Identifier: MIT */
#include "group.h"

#include "base.h"
#include "engine.h"

#define MIB (1ULL << 20)
#define STREAMING_PERCENT 40
#define REGISTER_CLIENT_BYTES (2 * MIB) /* what is filled elsewhere while one client is registered */

uint64_t group_usage_bytes(const struct group *group)
{
	int64_t resident = READ_ONCE(group->resident_pages);
	int64_t metadata = READ_ONCE(group->metadata_bytes);

	return (uint64_t)max_of(resident, 0) * PAGE_BYTES + (uint64_t)max_of(metadata, 0) +
	       READ_ONCE(group->unmanaged_bytes) +
	       pool_bytes(group->pool);
}

/* What evictors keep it below. */
static uint64_t lowered_limit_bytes(const struct group *group)
{
	uint64_t limit = READ_ONCE(group->limit_bytes), lowered = READ_ONCE(group->host_limit_bytes);

	return lowered ? min_of(limit, lowered) : limit;
}

int64_t group_room_bytes(const struct group *group)
{
	return (int64_t)lowered_limit_bytes(group) - (int64_t)group_usage_bytes(group);
}

int64_t group_charge_room_bytes(const struct group *group)
{
	uint64_t limit = READ_ONCE(group->limit_bytes), lowered = READ_ONCE(group->host_limit_bytes);

	if (lowered)
		limit = min_of(limit, lowered + GROUP_HOST_STEP_BYTES + limit / GROUP_HOST_SLACK_PART);
	return (int64_t)limit - (int64_t)group_usage_bytes(group);
}

bool group_is_pressed(const struct group *group)
{
	return READ_ONCE(group->host_limit_bytes) || READ_ONCE(group->host_pool_bytes);
}

bool group_is_to_give(const struct group *group)
{
	uint64_t pool = READ_ONCE(group->host_pool_bytes);

	return (pool && pool_bytes(group->pool) > pool) ||
	       (READ_ONCE(group->host_limit_bytes) && !group_has_room(group, 1));
}

bool group_has_own_room(const struct group *group)
{
	return READ_ONCE(group->limit_bytes) >= group_usage_bytes(group) + 2 * group_reserve_bytes(group);
}

void group_lift(struct group *group)
{
	WRITE_ONCE(group->host_limit_bytes, 0);
	WRITE_ONCE(group->host_pool_bytes, 0);
}

void group_relieve(struct group *group, uint64_t now_ns)
{
	WRITE_ONCE(group->host_hold_ns, now_ns + GROUP_HOST_HOLD_NS);
	WRITE_ONCE(group->host_stuck_since_ns, 0);
	group_lift(group);
}

static void note_usage(struct group *group)
{
	uint64_t usage = group_usage_bytes(group);

	if (usage > READ_ONCE(group->usage_bytes_max))
		WRITE_ONCE(group->usage_bytes_max, usage);
}

void group_charge_anyway(struct group *group, uint64_t pages)
{
	__atomic_fetch_add(&group->resident_pages, (int64_t)pages, __ATOMIC_RELAXED);
	note_usage(group);
}

bool group_charge(struct group *group, uint64_t pages)
{
	if (group_charge_room_bytes(group) < (int64_t)(pages * PAGE_BYTES))
		return false;
	group_charge_anyway(group, pages);
	return true;
}

void group_uncharge(struct group *group, uint64_t pages)
{
	__atomic_fetch_sub(&group->resident_pages, (int64_t)pages, __ATOMIC_RELAXED);
}

uint64_t group_register_bytes(const struct group *group)
{
	uint64_t limit = READ_ONCE(group->limit_bytes), others = max_of(READ_ONCE(group->unregistered), 1u) - 1;

	return min_of(min_of(max_of(limit / 16, 12 * MIB), limit / 3) + others * REGISTER_CLIENT_BYTES, limit / 2);
}

uint64_t group_reserve_bytes(const struct group *group)
{
	uint64_t limit = READ_ONCE(group->limit_bytes);

	return min_of(max_of(limit / 256, MIB / 2), 8 * MIB);
}

bool group_has_room(const struct group *group, unsigned reserves)
{
	uint64_t limit = READ_ONCE(group->limit_bytes), usage = group_usage_bytes(group);
	uint64_t growth = (uint64_t)max_of(READ_ONCE(group->growth_pages), (int64_t)0) * PAGE_BYTES;
	uint64_t reserve = reserves * group_reserve_bytes(group);

	return limit >= usage + reserve + min_of(growth, limit / 8) && lowered_limit_bytes(group) >= usage + reserve;
}

bool group_is_streaming(const struct group *group)
{
	return READ_ONCE(group->stream_percent) >= STREAMING_PERCENT;
}

uint64_t group_pool_cap_bytes(const struct group *group)
{
	if (group->flags & ENGINE_GROUP_REGIONS) {
		uint64_t limit = READ_ONCE(group->limit_bytes);

		return limit - min_of((uint64_t)max_of(READ_ONCE(group->metadata_bytes), (int64_t)0), limit);
	}
	/* 80 % up to a mean object of 70 % of a page, 28 % at 86 %, 10 % at 95 %. */
	uint32_t mean = min_of(max_of(READ_ONCE(group->pool_percent), 70u), 95u);
	uint32_t percent = mean <= 86 ? 80 - (mean - 70) * 13 / 4 : 28 - (mean - 86) * 2;
	uint64_t cap = lowered_limit_bytes(group) / 100 * percent;

	return group->pool_limit_bytes ? min_of(cap, group->pool_limit_bytes) : cap;
}

uint64_t group_pool_taken_bytes(const struct group *group)
{
	uint64_t live = pool_live_bytes(group->pool), bytes = pool_bytes(group->pool);

	return group->pool_limit_bytes ? bytes : min_of(bytes, live + live / 4);
}

void group_pool_changed(struct group *group)
{
	struct pool_statistics statistics;

	pool_statistics(group->pool, &statistics);
	if (statistics.object_count > 1024)
		WRITE_ONCE(group->pool_percent,
			   (uint32_t)(statistics.object_bytes * 100 / PAGE_BYTES /
				      statistics.object_count));
	note_usage(group);
}

void group_spill_changed(struct group *group, int units)
{
	__atomic_fetch_add(&group->spill_bytes, units * (int64_t)POOL_UNIT_BYTES, __ATOMIC_RELAXED);
}

uint64_t group_spill_room_bytes(const struct group *group)
{
	uint64_t limit = READ_ONCE(group->spill_limit_bytes);
	uint64_t used = (uint64_t)max_of(READ_ONCE(group->spill_bytes), (int64_t)0) +
			READ_ONCE(group->segments_under_way) * SEGMENT_BYTES;

	return limit ? limit - min_of(used, limit) : UINT64_MAX;
}

bool group_keeps_spilled_copies(const struct group *group)
{
	return group_spill_room_bytes(group) >= READ_ONCE(group->spill_limit_bytes) / 4;
}

bool group_gives_up_copies(const struct group *group)
{
	return !group_is_streaming(group) && group->pool_limit_bytes == 0;
}

bool group_keeps_copies(const struct group *group)
{
	return group_pool_taken_bytes(group) < group_pool_cap_bytes(group);
}

void group_note_stream(struct group *group, bool streaming)
{
	/* In 1/256 steps of the distance: about the last 256 faults count. Races lose a step, no more. */
	uint32_t old = READ_ONCE(group->stream_percent);
	static __thread uint32_t fraction;

	fraction += streaming ? 100 - old : old;
	if (fraction >= 256) {
		fraction -= 256;
		old = streaming ? min_of(old + 1, 100u) : (old ? old - 1 : 0);
		WRITE_ONCE(group->stream_percent, old);
	}
}
