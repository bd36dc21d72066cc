/* SPDX-License-Identifier: MIT */
#include "remap.h"

#include "base.h"
#include "checkpoint.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "sys.h"

#define LIMBO_PAGE ADDRESS_PAGES_MAX /* first page number beyond every address space */
#define LIMBO_PAGES (ADDRESS_PAGES_MAX / REMAPS_MAX / 2)

void remap_withdraw(struct client *client, uint64_t start, uint64_t end)
{
	/* A range not in the set is merely not evicted; one wrongly in it would be a lost page. */
	if (range_set_remove(&client->regions, start, end, 2 * REGIONS_MAX) < 0)
		range_set_clear(&client->regions);
}

static bool is_armed(const struct client *client, uint64_t start, uint64_t end)
{
	const struct range *range = range_set_at(&client->armed, start);

	return range && range->start < end;
}

void remap_armed(struct client *client, uint64_t start, uint64_t end)
{
	(void)range_set_add(&client->armed, start, end, 0, 2 * REGIONS_MAX);
}

void remap_disarmed(struct client *client, uint64_t start, uint64_t end)
{
	(void)range_set_remove(&client->armed, start, end, 4 * REGIONS_MAX);
}

static void drop_slots(struct client *client, uint64_t page, uint64_t pages)
{
	if (checkpoint_step(client) != STEP_DONE)
		client_forget_slots(client, page, pages);
}

/* Poison what could not be moved for want of memory: SIGBUS there rather than a wrong byte. */
static void poison_rest(struct client *client, uint64_t page, uint64_t to_page, uint64_t pages)
{
	for (uint64_t i = 0; i < pages; i++) {
		struct slot slot;

		if (slot_get(client->engine->slots, &client->record->map, page + i, &slot) < 0 ||
		    slot_is_swapped(slot.tag))
			(void)sys_userfaultfd_poison(client->events_fd, address_of(to_page + i),
						     PAGE_BYTES);
	}
	client_forget_slots(client, page, pages);
}

static void move_slots(struct client *client, uint64_t page, uint64_t to_page, uint64_t pages)
{
	drop_slots(client, to_page, pages); /* unmapped by the move; its event may come later */
	crash_point(CRASH_REMAP_DROPPED);
	if (checkpoint_step(client) == STEP_DONE)
		return;
	client->record->move = (struct slot_move){ page, to_page, pages, 0 };
	__atomic_store_n(&client->record->move.step, client->record->step, __ATOMIC_RELEASE);
	if (slot_map_move(client->engine->slots, &client->record->map, page, to_page, pages,
			  client_staged_moved, client) < 0)
		poison_rest(client, page, to_page, pages);
	crash_point(CRASH_REMAP_MOVED);
}

static void attach(struct client *client, const struct waiting_remap *remap)
{
	move_slots(client, remap->limbo_page, page_of(remap->to), page_of(remap->bytes));
	remap_armed(client, remap->to, remap->to + remap->bytes);
	if (remap->region_bytes)
		(void)range_set_add(&client->regions, remap->to, remap->to + remap->region_bytes,
				    remap->protection, REGIONS_MAX);
}

static void remove_waiting(struct client *client, unsigned i)
{
	client->remaps[i] = client->remaps[--client->remap_count];
	client->remap_changes++;
}

static void attach_vacated(struct client *client)
{
	for (unsigned i = 0; i < client->remap_count;) {
		struct waiting_remap remap = client->remaps[i];

		if (is_armed(client, remap.to, remap.to + remap.bytes)) {
			i++;
			continue;
		}
		remove_waiting(client, i);
		attach(client, &remap);
	}
}

bool remap_is_waiting(const struct client *client, uint64_t page)
{
	for (unsigned i = 0; i < client->remap_count; i++)
		if (page - page_of(client->remaps[i].to) < page_of(client->remaps[i].bytes))
			return true;
	return false;
}

void remap_settle(struct client *client)
{
	while (client->remap_count > 0) {
		struct waiting_remap remap = client->remaps[0];

		remove_waiting(client, 0);
		attach(client, &remap);
	}
}

void remap_unmap(struct client *client, uint64_t start, uint64_t end)
{
	bool armed = is_armed(client, start, end);

	remap_withdraw(client, start, end);
	WRITE_ONCE(client->size_pages_seen, 0); /* what comes in its place may be just as large */
	for (unsigned i = 0; !armed && i < client->remap_count;) {
		struct waiting_remap *remap = &client->remaps[i];
		uint64_t first = max_of(start, remap->to), last = min_of(end, remap->to + remap->bytes);

		if (first < last)
			drop_slots(client, remap->limbo_page + page_of(first - remap->to),
				   page_of(last - first));
		i++;
	}
	drop_slots(client, page_of(start), page_of(end - start));
	remap_disarmed(client, start, end);
	if (client->quarantine.count)
		(void)range_set_remove(&client->quarantine, start, end, QUARANTINE_MAX);
	attach_vacated(client);
}

/* A limbo range of its own for each waiting remap; the oldest is attached when there is none. */
static uint64_t limbo_page(struct client *client)
{
	if (client->remap_count == REMAPS_MAX) {
		struct waiting_remap remap = client->remaps[0];

		remove_waiting(client, 0);
		attach(client, &remap);
	}
	for (uint64_t n = 0;; n++) {
		uint64_t page = LIMBO_PAGE + n * LIMBO_PAGES;
		bool used = false;

		for (unsigned i = 0; i < client->remap_count; i++)
			used |= client->remaps[i].limbo_page == page;
		if (!used)
			return page;
	}
}

void remap_move(struct client *client, uint64_t from, uint64_t to, uint64_t bytes)
{
	const struct range *region = range_set_at(&client->regions, from);
	struct waiting_remap remap = { .to = to, .bytes = bytes };

	if (region && region->start <= from) {
		remap.protection = region->value;
		remap.region_bytes = min_of(region->end, from + bytes) - from;
	}
	remap_withdraw(client, from, from + bytes);
	remap_withdraw(client, to, to + bytes);
	/* Not armed here, and waited for: the same mapping moves on before it arrived. */
	for (unsigned i = 0; !is_armed(client, from, from + bytes) && i < client->remap_count; i++)
		if (client->remaps[i].to == from && client->remaps[i].bytes == bytes) {
			client->remaps[i].to = to;
			client->remap_changes++;
			attach_vacated(client);
			return;
		}
	if (!is_armed(client, to, to + bytes)) {
		move_slots(client, page_of(from), page_of(to), page_of(bytes));
		remap.limbo_page = LIMBO_PAGE; /* nothing there: attach only books the range */
		remap_armed(client, to, to + bytes);
		if (remap.region_bytes)
			(void)range_set_add(&client->regions, to, to + remap.region_bytes,
					    remap.protection, REGIONS_MAX);
		return;
	}
	remap.limbo_page = limbo_page(client);
	move_slots(client, page_of(from), remap.limbo_page, page_of(bytes));
	client->remaps[client->remap_count++] = remap;
	client->remap_changes++;
}
