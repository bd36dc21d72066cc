/* SPDX-License-Identifier: MIT */
/* drive_synthetic — slots that nobody has written: what a large table costs those beside it (scripts/bench --scaling). */
#ifndef DRIVE_SYNTHETIC_H
#define DRIVE_SYNTHETIC_H

#include <stdio.h>
#include <stdlib.h>

#include "engine_internal.h"

static _Noreturn void drive_synthetic_fail(void)
{
	fprintf(stderr, "drive: no room for synthetic slots\n");
	exit(98);
}

/* Large tables, without the memory and the time that pages would take. */
static void drive_add_synthetic_slots(struct engine *engine, uint64_t count)
{
	struct engine_region region = { .mode = 0600, .name = "synthetic" };
	int region_group = engine_group_create(engine, "synthetic", 1ULL << 50, 0, ENGINE_GROUP_REGIONS);
	struct client *client;
	uint64_t number;

	region.group = region_group;
	if (region_group < 0 || engine_region_create(engine, &region, &number) < 0 ||
	    engine_region_truncate(engine, number, count * PAGE_BYTES) < 0)
		drive_synthetic_fail();
	client = client_get(engine, number);
	pthread_mutex_lock(&client->gate);
	for (uint64_t page = 0; page < count; page++)
		if (slot_set(engine->slots, &client->record->map, page,
			     (struct slot){ .tag = SLOT_SAME, .check = page + 1 }) < 0)
			drive_synthetic_fail();
	client_metadata_changed(client);
	pthread_mutex_unlock(&client->gate);
	client_put(client);
}

#endif
