/* SPDX-License-Identifier: MIT */
/*
 * census — where the pages of one client are, counted slot by slot for whoever asks.
 *
 * The slot map counts its pages by tag as they change, but not by backend: a counter for each would cost every client
 * what few ever ask for. So this walks the map, some clusters under the gate at a time, and changes nothing: what forked
 * relatives share stays shared. Pages that move to another tier meanwhile may be counted in both, or in neither.
 */
#include <errno.h>

#include "base.h"
#include "engine_internal.h"

#define CLUSTERS_A_TURN 64

static_assert(ENGINE_BACKENDS_MAX == BACKENDS_MAX, "a figure for each backend");

static void count_page(struct engine *engine, struct slot slot, struct engine_client_tiers *tiers)
{
	bool is_kept = slot_is_kept(slot.tag);

	if (slot.tag == SLOT_INDIRECT)
		slot = slot_shared_get(engine->slots, slot.location);
	switch (slot.tag) {
	case SLOT_ZERO:
		tiers->zero_pages++;
		break;
	case SLOT_SAME:
		tiers->same_pages++;
		break;
	case SLOT_POOL:
	case SLOT_KEPT_POOL:
		*(is_kept ? &tiers->pool_kept_pages : &tiers->pool_pages) += 1;
		break;
	case SLOT_SPILL:
	case SLOT_KEPT_SPILL:
		(is_kept ? tiers->backend_kept_pages : tiers->backend_pages)[slot.backend]++;
		break;
	default: /* resident, on its way, or lost */
		break;
	}
}

/* True when there may be more. */
static bool count_some(struct client *client, uint64_t *cursor, struct engine_client_tiers *tiers)
{
	const struct slot_map *map = &client->record->map;
	uint64_t first;

	SCOPED_LOCK(&client->gate);
	for (unsigned k = 0; k < CLUSTERS_A_TURN; k++) {
		if (client->dead || !slot_map_next(client->engine->slots, map, cursor, &first))
			return false;
		for (uint64_t page = first; page < first + CLUSTER_PAGES; page++)
			count_page(client->engine, slot_peek(client->engine->slots, map, page), tiers);
	}
	return true;
}

int engine_client_tiers(struct engine *engine, uint64_t token, struct engine_client_tiers *ret_tiers)
{
	struct client *client = client_get(engine, token);
	uint64_t cursor = 0;

	*ret_tiers = (struct engine_client_tiers){ 0 };
	if (!client)
		return -ESRCH;
	while (count_some(client, &cursor, ret_tiers))
		continue;
	client_put(client);
	return 0;
}
