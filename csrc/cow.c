/* SPDX-License-Identifier: MIT */
#include "cow.h"

#include <errno.h>

#include "base.h"
#include "engine_internal.h"
#include "sys.h"

#define PSS_INTERVAL_NS 5000000ULL
#define PSS_COST_MIN 4u /* times what a reading took, while there is growth that no fault told of */
#define PSS_COST_MAX 16u /* without */
#define PSS_COST_PART 4u /* of a whole round: many relatives are read more rarely, or readings would be all that is done */
#define PSS_GROWTH_BYTES (256ULL << 10)
#define ALONE_PART 64u /* Pss and resident size are not read in the same moment */

/* Each client that is due has all of its group read, so the time until then follows what all of that takes. */
static uint64_t round_cost_ns(struct group *group, uint64_t cost_ns)
{
	group->pss_round_ns += cost_ns;
	return max_of(cost_ns, max_of(group->pss_round_ns, group->pss_round_before_ns) / PSS_COST_PART);
}

/* Growth since the last reading that neither statm nor a fault has told of. */
static void note_growth(struct client *client, int64_t pages, uint64_t cost_ns)
{
	if ((uint64_t)pages * PAGE_BYTES >= PSS_GROWTH_BYTES)
		client->pss_cost_factor = PSS_COST_MIN;
	else
		client->pss_cost_factor = min_of(max_of(client->pss_cost_factor * 2, PSS_COST_MIN), PSS_COST_MAX);
	client->pss_next_ns = sys_now_ns() + PSS_INTERVAL_NS +
			      round_cost_ns(client->group, cost_ns) * client->pss_cost_factor;
}

/*
 * Reading walks over the page table, and while its lock is contended it does so in pieces: on a busy machine 0.1 s and
 * more. A page that is moved meanwhile is seen twice, or not at all, and what faults bring behind the walk is not
 * seen. So, of now: as much more as was charged meanwhile, but no more than all that is resident.
 */
static void read_pss(struct client *client, uint64_t resident)
{
	int64_t before = READ_ONCE(client->resident_pages), copied = READ_ONCE(client->copied_pages), pages, growth;
	uint64_t bytes, size, resident_before = resident, since_ns = sys_now_ns();

	if (sys_pss_anonymous(client->thread ? client->thread : client->pid, &bytes) < 0) {
		client->pss_next_ns = since_ns + PSS_INTERVAL_NS;
		return;
	}
	if (sys_statm(client->statm_fd, &size, &resident) < 0 || size == 0)
		resident = resident_before; /* the thread that is looked at has just ended */
	pages = (int64_t)(bytes / PAGE_BYTES);
	WRITE_ONCE(client->is_alone, pages + pages / ALONE_PART >= (int64_t)max_of(resident, resident_before));
	pages = min_of(pages + max_of(READ_ONCE(client->resident_pages) - before, (int64_t)0), (int64_t)resident);
	growth = max_of(pages - READ_ONCE(client->resident_pages), (int64_t)0);
	WRITE_ONCE(client->pss_above_resident, pages - (int64_t)resident);
	/* What was let through before the reading is in it. */
	__atomic_fetch_sub(&client->copied_pages, copied, __ATOMIC_RELAXED);
	look_set_resident(client, pages, growth);
	note_growth(client, growth, sys_now_ns() - since_ns);
}

/* A copy counts half with each of two relatives: one is read with the other. */
static bool is_reading_due(struct client *client)
{
	struct group *group = client->group;
	bool due = sys_now_ns() >= client->pss_next_ns;

	if (due && client->pss_round == group->pss_round) {
		group->pss_round++;
		group->pss_round_before_ns = group->pss_round_ns;
		group->pss_round_ns = 0;
	}
	due |= client->pss_round != group->pss_round;
	client->pss_round = group->pss_round;
	return due;
}

void cow_look(struct client *client, uint64_t resident)
{
	if (is_reading_due(client))
		read_pss(client, resident);
	else
		look_set_resident(client,
				  max_of((int64_t)resident + client->pss_above_resident, (int64_t)0) +
					  READ_ONCE(client->copied_pages),
				  READ_ONCE(client->growth_pages));
}

/* All that is shared may be copied before Pss is read again. A page shared by two counts half in each. */
static bool is_worth_protecting(const struct client *client)
{
	int64_t shared_bytes = -2 * READ_ONCE(client->pss_above_resident) * (int64_t)PAGE_BYTES;

	return client->group->flags & ENGINE_GROUP_TORTURE || group_room_bytes(client->group) < shared_bytes;
}

bool cow_is_due(const struct client *client)
{
	if (!READ_ONCE(client->pss))
		return false;
	return READ_ONCE(client->is_protecting) ? READ_ONCE(client->is_alone)
						: !READ_ONCE(client->is_alone) && is_worth_protecting(client);
}

/* What was protected for another reason, zero pages, is so again. */
static int unprotect_region(struct client *client, const struct range *region)
{
	if (sys_userfaultfd_unprotect(client->events_fd, region->start, region->end - region->start) == FILL_AGAIN)
		return -EAGAIN;
	look_protect_zero_pages(client, region->start, region->end);
	return 0;
}

/* An unread event keeps the kernel from it: at the next look again. */
void cow_adapt(struct client *client)
{
	bool protect = !client->is_protecting;
	int result = 0;

	if (!cow_is_due(client))
		return;
	for (size_t i = 0; i < client->regions.count && result != -EAGAIN; i++) {
		const struct range *region = &client->regions.ranges[i];

		if (protect)
			result = sys_userfaultfd_protect(client->events_fd, region->start,
							 region->end - region->start);
		else
			result = unprotect_region(client, region);
	}
	if (result == -EAGAIN)
		return;
	WRITE_ONCE(client->is_protecting, protect);
}

void cow_note_fork(struct client *client)
{
	WRITE_ONCE(client->pss, true);
	WRITE_ONCE(client->is_alone, false);
	WRITE_ONCE(client->is_protecting, false);
}

void cow_note_copied(struct client *client, uint64_t count)
{
	if (client->is_protecting)
		__atomic_fetch_add(&client->copied_pages, (int64_t)count, __ATOMIC_RELAXED);
}

void cow_let_through(struct client *client, uint64_t page, uint64_t count)
{
	if (client->is_protecting)
		(void)sys_userfaultfd_unprotect(client->events_fd, address_of(page), count * PAGE_BYTES);
}
