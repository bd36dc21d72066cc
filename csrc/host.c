/* SPDX-License-Identifier: MIT */
#include "host.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "available.h"
#include "base.h"
#include "engine_internal.h"
#include "sys.h"

#define MIB (1ULL << 20)
#define TICK_MS 100u
#define LOOK_MS_MIN 50u
#define LOOK_MS_MAX 1000u
#define STEP_BYTES GROUP_HOST_STEP_BYTES
#define HOT_STEP_PART 4             /* of a step, from those that want it back */
#define MARGIN_PART 4               /* of the reserve, above it */
#define MARGIN_BYTES_MIN (8 * MIB)
#define MARGIN_BYTES_MAX (128 * MIB)
#define CGROUP_PART 8               /* of a cgroup, at most, is reserve */
#define FLOOR_PART 4
#define GIVES_LIMIT_MIN (32 * MIB)  /* what is smaller is not worth it, our own test among them */
#define GIVES_POOL_MIN (1 * MIB)
#define GIVES_PERCENT_MAX 80        /* of a page, in the pool, without a backend */
#define GIVE_BACK_BYTES_MIN (1 * MIB)
#define WINDOW_NS 500000000ULL
#define HOT_PAGES_MIN 1024u
#define HOT_NS (10 * WINDOW_NS)
#define SHORT_NS (6 * WINDOW_NS)
#define SHIFT_PART 8                /* of its limit, what a hot group is given back in a window, at others' cost */
#define MEMBERSHIP_BYTES 4096

/* What a look saw. */
struct look {
	bool is_known;      /* something could be read */
	bool is_below;      /* some place is below its reserve */
	bool has_margin;    /* all of them have reserve and margin */
	int place;          /* the one that lacks most; -1: the machine, else a cgroup's number */
	uint64_t missing_bytes;  /* there, to reserve and margin */
	uint64_t surplus_bytes;  /* in the place that has least above that */
	uint64_t distance_bytes; /* ... above its reserve */
	struct available available;
	uint64_t reserve_bytes;
};

/* ---- looking ---- */

static uint64_t margin_bytes(uint64_t reserve_bytes)
{
	return min_of(max_of(reserve_bytes / MARGIN_PART, MARGIN_BYTES_MIN), MARGIN_BYTES_MAX);
}

static void look_at(struct look *look, int place, struct available available, uint64_t reserve_bytes)
{
	uint64_t end = reserve_bytes + margin_bytes(reserve_bytes);
	uint64_t missing = end - min_of(end, available.bytes), surplus = available.bytes - min_of(end, available.bytes);
	uint64_t distance = available.bytes - min_of(available.bytes, reserve_bytes);

	look->is_below |= available.bytes < reserve_bytes;
	look->has_margin &= missing == 0;
	if (!look->is_known || missing > look->missing_bytes ||
	    (missing == look->missing_bytes && distance < look->distance_bytes)) {
		look->place = place;
		look->missing_bytes = missing;
		look->distance_bytes = distance;
		look->available = available;
		look->reserve_bytes = reserve_bytes;
	}
	look->surplus_bytes = look->is_known ? min_of(look->surplus_bytes, surplus) : surplus;
	look->is_known = true;
}

static struct look look_around(struct host *host)
{
	struct look look = { .has_margin = true, .place = -1 };
	struct available available, machine = { 0 };

	SCOPED_LOCK(&host->lock);
	if (host->reserve_bytes == 0)
		return look;
	if (available_of_machine("/proc/meminfo", &machine) == 0)
		look_at(&look, -1, machine, available_reserve(host->reserve_bytes, machine.total_bytes));
	for (unsigned i = 0; i < host->cgroup_count; i++) {
		if (available_of_cgroup(host->cgroups[i].directory, &available) < 0)
			continue;
		/* What is to be left of a machine may be more than all that a cgroup has. */
		if (machine.total_bytes == 0 || available.total_bytes < machine.total_bytes)
			look_at(&look, (int)i, available,
				min_of(available_reserve(host->reserve_bytes, available.total_bytes),
				       available.total_bytes / CGROUP_PART));
	}
	return look;
}

/* ---- membership of the cgroup that is short ---- */

static pid_t any_member(struct engine *engine, unsigned number)
{
	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++) {
		const struct client *client = engine->clients[i];

		if (client && client->group->number == (int)number && READ_ONCE(client->pid) > 0 &&
		    !READ_ONCE(client->dead))
			return client->pid;
	}
	return 0;
}

static bool is_member(struct host *host, int place, pid_t pid)
{
	char path[64], text[MEMBERSHIP_BYTES];

	snprintf(path, sizeof path, "/proc/%d/cgroup", pid);
	if (sys_read_text(path, text, sizeof text) < 0)
		return false;
	SCOPED_LOCK(&host->lock);
	return place < (int)host->cgroup_count &&
	       available_is_member(text, host->cgroups[place].version, host->cgroups[place].path);
}

/* Which groups' programs are not charged there? One process speaks for its group. */
static void find_outside(struct engine *engine, int place, uint64_t now)
{
	struct host *host = &engine->host;

	if (place == host->outside_place && now - host->outside_ns < WINDOW_NS)
		return;
	host->outside_place = place;
	host->outside_ns = now;
	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		pid_t pid = place >= 0 && READ_ONCE(engine->groups[i]) ? any_member(engine, i) : 0;

		host->is_outside[i] = pid > 0 && !is_member(host, place, pid);
	}
}

/* ---- pressing; the registry lock is held ---- */

bool host_is_useless(struct engine *engine, const struct group *group)
{
	return READ_ONCE(group->pool_percent) >= GIVES_PERCENT_MAX && !writeback_is_possible(engine, group);
}

/* Of this group only the pool counts. */
static bool is_pool_only(const struct host *host, const struct group *group)
{
	return group->flags & ENGINE_GROUP_REGIONS || host->is_outside[group->number];
}

/* Is there anything to be had from it, now or later? */
static bool may_give(struct engine *engine, const struct group *group, uint64_t now)
{
	if (!group->client_count || READ_ONCE(group->limit_bytes) < GIVES_LIMIT_MIN ||
	    now < READ_ONCE(group->host_hold_ns))
		return false;
	return is_pool_only(&engine->host, group) ? writeback_is_possible(engine, group) : !host_is_useless(engine, group);
}

/* What of a group does not go for this, whatever the shortage. Evictors go on until two reserves are free below the limit. */
static uint64_t floor_bytes(const struct group *group)
{
	uint64_t fixed = READ_ONCE(group->unmanaged_bytes) +
			 (uint64_t)max_of(READ_ONCE(group->metadata_bytes), (int64_t)0);

	return fixed + READ_ONCE(group->limit_bytes) / FLOOR_PART + 2 * group_reserve_bytes(group);
}

static uint64_t givable_bytes(const struct host *host, const struct group *group)
{
	bool is_pool = is_pool_only(host, group);
	uint64_t has = is_pool ? pool_bytes(group->pool) : group_usage_bytes(group);

	return has - min_of(has, is_pool ? GIVES_POOL_MIN : floor_bytes(group));
}

static void press(const struct host *host, struct group *group, uint64_t bytes)
{
	if (is_pool_only(host, group))
		WRITE_ONCE(group->host_pool_bytes, max_of(pool_bytes(group->pool), bytes + 1) - bytes);
	else
		WRITE_ONCE(group->host_limit_bytes, max_of(group_usage_bytes(group), bytes + 1) - bytes);
}

/* Down to which level must all be brought for this much? 0: all that they can give is not more. */
static uint64_t level_of(const uint64_t *gives, uint64_t wanted)
{
	uint64_t low = 0, high = 0;

	for (unsigned i = 0; i < GROUPS_MAX; i++)
		high = max_of(high, gives[i]);
	while (low < high) {
		uint64_t level = low + (high - low + 1) / 2, sum = 0;

		for (unsigned i = 0; i < GROUPS_MAX && sum < wanted; i++)
			sum += gives[i] - min_of(gives[i], level);
		if (sum >= wanted)
			low = level;
		else
			high = level - 1;
	}
	return low;
}

/* Have those that are hot, or those that are not, give so much. Returns what they could not. */
static uint64_t press_some(struct engine *engine, bool hot, uint64_t wanted, uint64_t now)
{
	uint64_t gives[GROUPS_MAX] = { 0 }, level;

	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		struct group *group = engine->groups[i];

		if (group && (now < group->host_hot_ns) == hot && may_give(engine, group, now))
			gives[i] = givable_bytes(&engine->host, group);
	}
	level = level_of(gives, wanted);
	for (unsigned i = 0; i < GROUPS_MAX && wanted > 0; i++) {
		uint64_t bytes = min_of(gives[i] - min_of(gives[i], level), wanted);

		if (bytes == 0)
			continue;
		press(&engine->host, engine->groups[i], bytes);
		wanted -= bytes;
	}
	return wanted;
}

/* What all could give: for the log. */
static uint64_t all_givable(struct engine *engine, uint64_t now)
{
	uint64_t bytes = 0;

	for (unsigned i = 0; i < GROUPS_MAX; i++)
		if (engine->groups[i] && may_give(engine, engine->groups[i], now))
			bytes += givable_bytes(&engine->host, engine->groups[i]);
	return bytes;
}

/* Those that can give nothing have their limits back. */
static void lift_useless(struct engine *engine, uint64_t now)
{
	for (unsigned i = 0; i < GROUPS_MAX; i++)
		if (engine->groups[i] && group_is_pressed(engine->groups[i]) && !may_give(engine, engine->groups[i], now))
			group_lift(engine->groups[i]);
}

/* Limits rise while there is room: all at once if there is enough for that. */
static void give_back(struct engine *engine, uint64_t surplus)
{
	uint64_t owed = 0, share;
	unsigned count = 0;

	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		const struct group *group = engine->groups[i];
		uint64_t lowered = group ? READ_ONCE(group->host_limit_bytes) : 0;

		count += group && group_is_pressed(group);
		if (lowered)
			owed += READ_ONCE(group->limit_bytes) - min_of(READ_ONCE(group->limit_bytes), lowered);
	}
	share = max_of(count ? surplus / 2 / count : 0, GIVE_BACK_BYTES_MIN);
	for (unsigned i = 0; i < GROUPS_MAX && count > 0; i++) {
		struct group *group = engine->groups[i];
		uint64_t lowered = group ? READ_ONCE(group->host_limit_bytes) : 0;

		if (!group || !group_is_pressed(group))
			continue;
		if (!lowered || owed <= surplus || lowered + share >= READ_ONCE(group->limit_bytes))
			group_lift(group);
		else
			WRITE_ONCE(group->host_limit_bytes, lowered + share);
	}
}

/* Have others give what a hot group wants back, and let it have that. */
static void shift_to(struct engine *engine, struct group *group, uint64_t now)
{
	uint64_t lowered = READ_ONCE(group->host_limit_bytes), wanted = READ_ONCE(group->limit_bytes) / SHIFT_PART;

	if (!lowered)
		return;
	wanted = min_of(wanted, STEP_BYTES);
	wanted -= press_some(engine, false, wanted, now);
	WRITE_ONCE(group->host_limit_bytes, lowered + wanted);
}

/* What pressed groups gave since the last look, and which of them want it back. */
static void take_stock(struct engine *engine, uint64_t now)
{
	struct host *host = &engine->host;
	bool is_window = now - host->window_ns >= WINDOW_NS;

	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		struct group *group = engine->groups[i];
		uint64_t evicted, written, gone, refilled;

		if (!group)
			continue;
		evicted = READ_ONCE(group->evicted_pages);
		written = READ_ONCE(group->written_pages);
		if (group_is_pressed(group)) {
			__atomic_fetch_add(&host->reclaimed_pages, evicted - group->host_evicted, __ATOMIC_RELAXED);
			__atomic_fetch_add(&host->written_pages, written - group->host_written, __ATOMIC_RELAXED);
		}
		group->host_evicted = evicted;
		group->host_written = written;
		if (!is_window)
			continue;
		gone = evicted - group->host_window_evicted;
		refilled = READ_ONCE(group->refilled_pages) - group->host_window_refilled;
		group->host_window_evicted = evicted;
		group->host_window_refilled += refilled;
		if (!group_is_pressed(group) || gone < HOT_PAGES_MIN || refilled < gone / 2)
			continue;
		group->host_hot_ns = now + HOT_NS;
		shift_to(engine, group, now);
	}
	if (is_window)
		host->window_ns = now;
}

static bool is_any_pressed(const struct engine *engine)
{
	for (unsigned i = 0; i < GROUPS_MAX; i++)
		if (engine->groups[i] && group_is_pressed(engine->groups[i]))
			return true;
	return false;
}

/* ---- what is told ---- */

static void tell_begin(struct engine *engine, const struct look *look, uint64_t givable, uint64_t now)
{
	struct host *host = &engine->host;
	struct engine_event event = { .kind = ENGINE_EVENT_HOST_SHORT, .group = -1, .place = (uint32_t)(look->place + 1),
				      .a = look->available.bytes, .b = look->reserve_bytes, .c = givable };

	host->since_ns = now;
	host->reclaimed_before = host->reclaimed_pages;
	WRITE_ONCE(host->is_short, true);
	__atomic_fetch_add(&host->shortages, 1, __ATOMIC_RELAXED);
	engine_event_push(engine, &event);
}

static void tell_end(struct engine *engine, const struct look *look, uint64_t now)
{
	struct host *host = &engine->host;
	struct engine_event event = { .kind = ENGINE_EVENT_HOST_OVER, .group = -1,
				      .place = (uint32_t)(look->place + 1), .a = look->available.bytes,
				      .b = (now - host->since_ns) / 1000000,
				      .c = (host->reclaimed_pages - host->reclaimed_before) * PAGE_BYTES };

	WRITE_ONCE(host->is_short, false);
	engine_event_push(engine, &event);
}

/* ---- a tick ---- */

/* One look, and what follows from it. Returns milliseconds until the next. */
static unsigned tick(struct engine *engine)
{
	struct host *host = &engine->host;
	struct look look = look_around(host);
	uint64_t now = sys_now_ns(), fill = engine_fill_bytes_per_ms(engine);
	bool kick = false;

	host->is_reclaiming = look.is_known && (look.is_below || (host->is_reclaiming && !look.has_margin));
	if (host->is_reclaiming)
		find_outside(engine, look.place, now);
	pthread_mutex_lock(&engine->registry);
	take_stock(engine, now);
	if (host->is_reclaiming) {
		uint64_t wanted = min_of(look.missing_bytes, STEP_BYTES);

		host->reclaiming_ns = now;
		if (!host->is_short)
			tell_begin(engine, &look, all_givable(engine, now), now);
		lift_useless(engine, now);
		wanted = press_some(engine, false, wanted, now);
		(void)press_some(engine, true, wanted / HOT_STEP_PART, now);
		kick = true;
	} else if (is_any_pressed(engine) && (look.has_margin || !look.is_known)) {
		give_back(engine, look.is_known ? look.surplus_bytes : UINT64_MAX);
	}
	if (host->is_short && !host->is_reclaiming && now - host->reclaiming_ns >= SHORT_NS)
		tell_end(engine, &look, now);
	kick |= is_any_pressed(engine);
	pthread_mutex_unlock(&engine->registry);
	WRITE_ONCE(host->available_bytes, look.available.bytes);
	WRITE_ONCE(host->available_reserve_bytes, look.reserve_bytes);
	if (kick) {
		work_ask(&engine->evicting);
		work_ask(&engine->writing);
	}
	if (kick || host->is_short)
		return TICK_MS;
	return (unsigned)max_of(min_of(look.is_known ? look.distance_bytes / fill / 2 : LOOK_MS_MAX, (uint64_t)LOOK_MS_MAX),
				(uint64_t)LOOK_MS_MIN);
}

void *host_thread_main(void *argument)
{
	struct engine *engine = argument;
	uint64_t seen = 0;

	name_this_thread("vswap-host");
	while (!__atomic_load_n(&engine->stopping, __ATOMIC_ACQUIRE))
		work_wait(&engine->pressing, &seen, &engine->stopping, tick(engine));
	return NULL;
}

/* ---- made and set ---- */

void host_create(struct host *host) { pthread_mutex_init(&host->lock, NULL); }

static void forget_cgroups(struct host *host)
{
	for (unsigned i = 0; i < host->cgroup_count; i++) {
		free(host->cgroups[i].directory);
		free(host->cgroups[i].path);
	}
	host->cgroup_count = 0;
}

void host_destroy(struct host *host)
{
	forget_cgroups(host);
	pthread_mutex_destroy(&host->lock);
}

int engine_set_host_reserve(struct engine *engine, uint64_t reserve_bytes, const struct engine_cgroup *cgroups,
			    int count)
{
	struct host *host = &engine->host;

	pthread_mutex_lock(&host->lock);
	forget_cgroups(host);
	host->reserve_bytes = reserve_bytes;
	for (int i = 0; i < count && i < HOST_CGROUPS_MAX; i++) {
		struct host_cgroup cgroup = { strdup(cgroups[i].directory), strdup(cgroups[i].path), cgroups[i].version };

		if (!cgroup.directory || !cgroup.path) {
			free(cgroup.directory);
			free(cgroup.path);
			pthread_mutex_unlock(&host->lock);
			return -ENOMEM;
		}
		host->cgroups[host->cgroup_count++] = cgroup;
	}
	pthread_mutex_unlock(&host->lock);
	work_ask(&engine->pressing);
	return 0;
}
