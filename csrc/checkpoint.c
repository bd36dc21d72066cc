/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "checkpoint.h"

#include <errno.h>
#include <string.h>

#include "base.h"
#include "engine_internal.h"
#include "sys.h"

#define STEP_BITS 16

static uint64_t changes_of(const struct client *client)
{
	return client->regions.changes + client->armed.changes + client->quarantine.changes +
	       client->remap_changes;
}

static struct checkpoint *checkpoint_at(const struct client *client, uint64_t version)
{
	return state_checkpoints(client->engine->state, client->index) + (version & 1);
}

/* Copy a set behind those that are there already. False when it does not fit. */
static bool put_ranges(struct checkpoint *checkpoint, uint32_t *used, const struct range_set *set)
{
	if (set->count > CHECKPOINT_RANGES_MAX - *used)
		return false;
	if (set->count)
		memcpy(checkpoint->ranges + *used, set->ranges, set->count * sizeof *set->ranges);
	*used += (uint32_t)set->count;
	return true;
}

void checkpoint_write(struct client *client, uint32_t applied)
{
	struct client_record *record = client->record;
	uint64_t version = record->checkpoint_version;
	struct checkpoint *next = checkpoint_at(client, version + 1);
	uint32_t used = 0;
	uint32_t flags = (client->registered ? CHECKPOINT_REGISTERED : 0) |
			 (client->pss ? CHECKPOINT_PSS : 0);

	if (changes_of(client) == client->checkpoint_changes && applied == client->checkpoint_applied &&
	    flags == client->checkpoint_flags && client->steps == 0)
		return;
	next->applied = applied;
	next->flags = flags;
	if (!put_ranges(next, &used, &client->regions) || !put_ranges(next, &used, &client->armed) ||
	    !put_ranges(next, &used, &client->quarantine)) {
		next->flags |= CHECKPOINT_TOO_MANY;
		next->region_count = next->armed_count = next->quarantine_count = 0;
	} else {
		next->region_count = (uint32_t)client->regions.count;
		next->armed_count = (uint32_t)client->armed.count;
		next->quarantine_count = (uint32_t)client->quarantine.count;
	}
	next->remap_count = client->remap_count;
	memcpy(next->remaps, client->remaps, client->remap_count * sizeof *next->remaps);
	__atomic_store_n(&record->checkpoint_version, version + 1, __ATOMIC_RELEASE);
	client->checkpoint_changes = changes_of(client);
	client->checkpoint_applied = applied;
	client->checkpoint_flags = flags;
	client->steps = 0;
}

static int take_ranges(struct range_set *set, const struct range *ranges, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		if (range_set_add(set, ranges[i].start, ranges[i].end, ranges[i].value,
				  CHECKPOINT_RANGES_MAX) < 0)
			return -ENOMEM;
	return 0;
}

int checkpoint_read(struct client *client, uint32_t *ret_applied)
{
	struct client_record *record = client->record;
	const struct checkpoint *checkpoint = checkpoint_at(client, record->checkpoint_version);
	const struct range *ranges = checkpoint->ranges;
	int result = take_ranges(&client->regions, ranges, checkpoint->region_count);

	ranges += checkpoint->region_count;
	if (result == 0)
		result = take_ranges(&client->armed, ranges, checkpoint->armed_count);
	ranges += checkpoint->armed_count;
	if (result == 0)
		result = take_ranges(&client->quarantine, ranges, checkpoint->quarantine_count);
	client->remap_count = min_of(checkpoint->remap_count, (uint32_t)REMAPS_MAX);
	memcpy(client->remaps, checkpoint->remaps, client->remap_count * sizeof *client->remaps);
	WRITE_ONCE(client->registered, checkpoint->flags & CHECKPOINT_REGISTERED);
	WRITE_ONCE(client->pss, checkpoint->flags & CHECKPOINT_PSS);
	if (checkpoint->flags & CHECKPOINT_TOO_MANY)
		result = -ENOMEM;
	client->checkpoint_changes = changes_of(client);
	client->checkpoint_applied = *ret_applied = checkpoint->applied;
	client->checkpoint_flags = checkpoint->flags;
	client->steps = 0;
	return result;
}

/* Steps begun since the checkpoint that counts. */
static uint64_t steps_begun(const struct client_record *record)
{
	uint64_t begun_for = record->step >> STEP_BITS;
	uint64_t version = record->checkpoint_version & (UINT64_MAX >> STEP_BITS);

	return begun_for == version ? record->step & ((1 << STEP_BITS) - 1) : 0;
}

bool checkpoint_is_interrupted(const struct client *client)
{
	return steps_begun(client->record) > 0;
}

enum step checkpoint_step(struct client *client)
{
	struct client_record *record = client->record;
	uint64_t begun = steps_begun(record), step = ++client->steps;

	VS_CHECK(step < 1 << STEP_BITS);
	if (step < begun)
		return STEP_DONE;
	if (step == begun)
		return STEP_RESUMED;
	__atomic_store_n(&record->step, record->checkpoint_version << STEP_BITS | step,
			 __ATOMIC_RELEASE);
	return STEP_FRESH;
}

void checkpoint_discard(struct state *state, int state_fd, unsigned client_index)
{
	struct checkpoint *both = state_checkpoints(state, client_index);

	sys_discard(state_fd, (uint64_t)((char *)both - (char *)state), both, 2 * sizeof *both);
}
