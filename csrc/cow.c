/* SPDX-License-Identifier: MIT */
#include "cow.h"

#include <errno.h>
#include <stdlib.h>

#include "base.h"
#include "engine_internal.h"
#include "sys.h"

#define PSS_INTERVAL_NS 5000000ULL
#define PSS_COST_MIN 4u /* times what a reading took, while there is growth that no fault told of */
#define PSS_COST_MAX 16u /* without */
#define PSS_COST_ALONE 32u /* times what all of its group take, where next to nothing is shared ... */
#define PSS_ALONE_NS_MAX 1000000000ULL /* ... but no later */
#define PSS_COST_PART 4u /* of a whole round: many relatives are read more rarely, or readings would be all that is done */
#define PSS_GROWTH_BYTES (256ULL << 10)
#define PSS_PAGE_NS 100u /* what a reading takes, about */
#define ALONE_PART 64u /* Pss and resident size are not read in the same moment */
#define ALONE_NS 1000000000ULL /* so long it stays protected */
#define ALONE_FAULT_PAGES 64u  /* pages that are unprotected in the time of a fault */
#define UNCOUNTED_NS 500000000ULL
#define RANGES_MAX 64u

/* Clients of which all others were forked from one, as we saw. */
struct family {
	uint32_t living;     /* that have not ended */
	uint32_t uncounted;  /* of these: what they share counts with their parents until Pss is read */
	uint32_t references; /* clients that name it */
};

/* Anybody may find it who does not know of the fork yet. */
static struct family *family_of(const struct client *client)
{
	return __atomic_load_n(&client->family, __ATOMIC_ACQUIRE);
}

static void set_family(struct client *client, struct family *family)
{
	__atomic_store_n(&client->family, family, __ATOMIC_RELEASE);
}

static bool is_last_of_family(const struct client *client)
{
	const struct family *family = family_of(client);

	return family && READ_ONCE(family->living) == 1;
}

bool cow_is_alone(const struct client *client) { return READ_ONCE(client->is_alone) || is_last_of_family(client); }

/* Each client that is due has all of its group read, so the time until then follows what all of that takes. */
static uint64_t round_cost_ns(struct group *group, uint64_t cost_ns)
{
	group->pss_round_ns += cost_ns;
	return max_of(cost_ns, max_of(group->pss_round_ns, group->pss_round_before_ns) / PSS_COST_PART);
}

static void note_cost(struct client *client, uint64_t cost_ns)
{
	__atomic_fetch_add(&client->group->pss_costs_ns, cost_ns - client->pss_cost_ns, __ATOMIC_RELAXED);
	client->pss_cost_ns = cost_ns;
}

/* Growth since the last reading that neither statm nor a fault has told of. */
static void note_growth(struct client *client, int64_t pages, uint64_t cost_ns)
{
	uint64_t now_ns = sys_now_ns(), costs_ns;

	if ((uint64_t)pages * PAGE_BYTES >= PSS_GROWTH_BYTES)
		client->pss_cost_factor = PSS_COST_MIN;
	else
		client->pss_cost_factor = min_of(max_of(client->pss_cost_factor * 2, PSS_COST_MIN), PSS_COST_MAX);
	note_cost(client, cost_ns);
	costs_ns = READ_ONCE(client->group->pss_costs_ns);
	cost_ns = round_cost_ns(client->group, cost_ns);
	WRITE_ONCE(client->pss_next_ns, now_ns + PSS_INTERVAL_NS + cost_ns * client->pss_cost_factor);
	client->pss_alone_ns = client->pss_cost_factor < PSS_COST_MAX
				       ? 0 : now_ns + min_of(costs_ns * PSS_COST_ALONE, PSS_ALONE_NS_MAX);
}

/* A child counts itself from now on. Who counted it until now, 0 if it did. */
static uint64_t end_counted_with(struct client *client)
{
	uint64_t token = __atomic_exchange_n(&client->counted_with, 0, __ATOMIC_RELAXED);

	if (token)
		__atomic_fetch_sub(&family_of(client)->uncounted, 1, __ATOMIC_RELAXED);
	return token;
}

/* So many pages of what a child's parent counted for it. It is about to be read, too, and then all is exact. */
static void take_from_parent(struct client *child, uint64_t token, int64_t pages)
{
	struct client *parent = client_get(child->engine, token);

	if (!parent)
		return;
	WRITE_ONCE(parent->pss_above_resident, READ_ONCE(parent->pss_above_resident) - pages);
	look_set_resident(parent, max_of(READ_ONCE(parent->resident_pages) - pages, (int64_t)0),
			  READ_ONCE(parent->growth_pages));
	client_put(parent);
}

/* Its parent has ended first, or is being let go: nobody counts what they shared. */
static void count_orphan(struct client *client)
{
	uint64_t token = READ_ONCE(client->counted_with);
	struct client *parent = token ? client_get(client->engine, token) : NULL;

	if (token && (!parent || READ_ONCE(parent->dead) || READ_ONCE(parent->leaving)) && end_counted_with(client)) {
		WRITE_ONCE(client->pss_above_resident, 0);
		WRITE_ONCE(client->pss_next_ns, 0);
	}
	if (parent)
		client_put(parent);
}

/*
 * Reading walks over the page table, and while its lock is contended it does so in pieces: on a busy machine 0.1 s and
 * more. A page that is moved meanwhile is seen twice, or not at all, and what faults bring behind the walk is not
 * seen. So, of now: as much more as was charged meanwhile, but no more than all that is resident.
 */
static void read_pss(struct client *client, uint64_t resident)
{
	int64_t before = READ_ONCE(client->resident_pages), copied = READ_ONCE(client->copied_pages), pages, growth;
	uint64_t bytes, resident_before = resident, since_ns = sys_now_ns(), parent;
	struct process_size size;
	uint32_t forks = READ_ONCE(client->forks);

	if (sys_pss_anonymous(client->thread ? client->thread : client->pid, &bytes) < 0) {
		WRITE_ONCE(client->pss_next_ns, since_ns + PSS_INTERVAL_NS);
		return;
	}
	if (sys_statm(client->statm_fd, &size) == 0 && size.pages > 0) /* else the thread that is looked at has just ended */
		resident = size.anonymous_pages;
	if (READ_ONCE(client->forks) != forks) /* what was read is of before it, or of after it */
		return;
	pages = (int64_t)(bytes / PAGE_BYTES);
	WRITE_ONCE(client->is_alone, pages + pages / ALONE_PART >= (int64_t)max_of(resident, resident_before));
	pages = min_of(pages + max_of(READ_ONCE(client->resident_pages) - before, (int64_t)0), (int64_t)resident);
	growth = max_of(pages - READ_ONCE(client->resident_pages), (int64_t)0);
	WRITE_ONCE(client->pss_above_resident, pages - (int64_t)resident);
	parent = end_counted_with(client);
	if (parent) { /* no growth */
		take_from_parent(client, parent, growth);
		growth = 0;
	}
	WRITE_ONCE(client->shared_pages, 2 * ((int64_t)resident - pages)); /* a page shared by two counts half in each */
	/* What was let through before the reading is in it. */
	__atomic_fetch_sub(&client->copied_pages, copied, __ATOMIC_RELAXED);
	look_set_resident(client, pages, growth);
	note_growth(client, growth, sys_now_ns() - since_ns);
}

/* A child's share counts with its parent until it is read. So it is read first, or nobody would have it for a moment. But where
 * there is always another child, it is not waited for. */
static bool must_wait(const struct client *client, uint64_t now)
{
	const struct family *family = family_of(client);

	return family && READ_ONCE(family->uncounted) > 0 && !READ_ONCE(client->counted_with) &&
	       now < READ_ONCE(client->pss_next_ns) + UNCOUNTED_NS;
}

/* A copy counts half with each of two relatives: one is read with the other. But who shares next to nothing has no such
 * copies, and cannot grow by much unseen. */
static bool is_reading_due(struct client *client)
{
	struct group *group = client->group;
	uint64_t now = sys_now_ns(), next_ns = READ_ONCE(client->pss_next_ns);
	bool is_alone = READ_ONCE(client->is_alone), due;

	if (must_wait(client, now))
		return false;
	if (is_alone)
		next_ns = max_of(next_ns, client->pss_alone_ns);
	due = now >= next_ns;
	if (due && READ_ONCE(client->pss_round) == group->pss_round) {
		WRITE_ONCE(group->pss_round, group->pss_round + 1);
		group->pss_round_before_ns = group->pss_round_ns;
		group->pss_round_ns = 0;
	}
	due |= READ_ONCE(client->pss_round) != group->pss_round && !is_alone;
	WRITE_ONCE(client->pss_round, group->pss_round);
	return due;
}

/* All that is there is its own. */
static void look_alone(struct client *client, uint64_t resident)
{
	note_cost(client, 0);
	WRITE_ONCE(client->pss_above_resident, 0);
	WRITE_ONCE(client->shared_pages, 0);
	__atomic_store_n(&client->copied_pages, 0, __ATOMIC_RELAXED);
	look_set_resident(client, (int64_t)resident, 0);
}

static void look_shared(struct client *client, uint64_t resident)
{
	int64_t pages = max_of((int64_t)resident + READ_ONCE(client->pss_above_resident), (int64_t)0);

	look_set_resident(client, pages + READ_ONCE(client->copied_pages), READ_ONCE(client->growth_pages));
}

void cow_look(struct client *client, uint64_t resident)
{
	count_orphan(client);
	if (is_last_of_family(client))
		look_alone(client, resident);
	else if (is_reading_due(client))
		read_pss(client, resident);
	else
		look_shared(client, resident);
	if (!cow_is_alone(client)) {
		WRITE_ONCE(client->alone_since_ns, 0);
	} else if (READ_ONCE(client->alone_since_ns) == 0) {
		WRITE_ONCE(client->alone_faults, 0);
		WRITE_ONCE(client->alone_since_ns, sys_now_ns());
	}
}

/* All that is shared may be copied before Pss is read again. */
static bool is_worth_protecting(const struct client *client)
{
	return client->group->flags & ENGINE_GROUP_TORTURE ||
	       group_room_bytes(client->group) < READ_ONCE(client->shared_pages) * (int64_t)PAGE_BYTES;
}

/* To unprotect all of it is worth its cost. */
static bool is_worth_unprotecting(const struct client *client)
{
	uint64_t since_ns = READ_ONCE(client->alone_since_ns);
	int64_t faults = READ_ONCE(client->alone_faults);

	return since_ns && (sys_now_ns() - since_ns >= ALONE_NS ||
			    faults * ALONE_FAULT_PAGES >= READ_ONCE(client->resident_pages));
}

bool cow_is_due(const struct client *client)
{
	if (!READ_ONCE(client->pss))
		return false;
	return READ_ONCE(client->is_protecting) ? cow_is_alone(client) && is_worth_unprotecting(client)
						: !cow_is_alone(client) && is_worth_protecting(client);
}

/* What was protected for another reason, zero pages, is so again. */
static int unprotect_region(struct client *client, const struct range *region)
{
	if (sys_userfaultfd_unprotect(client->events_fd, region->start, region->end - region->start) == FILL_AGAIN)
		return -EAGAIN;
	look_protect_zero_pages(client, region->start, region->end);
	return 0;
}

void cow_note_registered(struct client *client, uint64_t start, uint64_t end)
{
	if (client->is_protecting && !cow_is_alone(client) &&
	    sys_userfaultfd_protect(client->events_fd, start, end - start) == -EAGAIN)
		WRITE_ONCE(client->is_protecting, false); /* all of it once more, then */
}

/* An unread event keeps the kernel from it, or has kept it from registering anything: at the next look again. */
void cow_adapt(struct client *client)
{
	bool protect = !client->is_protecting;
	int result = client->regions.count ? 0 : -EAGAIN;

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

/* ---- forks and ends ---- */

/* Who was alone founds one; with relatives that nobody knows there is none. */
static void join_family(struct client *parent, struct client *child)
{
	struct family *family = parent->family;

	if (!READ_ONCE(parent->pss) && !family) {
		family = calloc(1, sizeof *family);
		if (family) {
			*family = (struct family){ .living = 1, .references = 1 };
			set_family(parent, family);
		}
	}
	if (!family)
		return;
	__atomic_fetch_add(&family->living, 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&family->references, 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&family->uncounted, 1, __ATOMIC_RELAXED);
	set_family(child, family);
	WRITE_ONCE(child->counted_with, parent->record->token);
}

static bool protect_ranges(struct client *parent, struct client *child, const struct page_range *ranges, int count)
{
	for (int i = 0; i < count; i++) {
		uint64_t start = ranges[i].start, bytes = ranges[i].end - start;

		if (sys_userfaultfd_protect(parent->events_fd, start, bytes) == -EAGAIN ||
		    sys_userfaultfd_protect(child->events_fd, start, bytes) == -EAGAIN)
			return false;
	}
	return true;
}

/* What the parent has let through, and what came since: the rest is protected in both. */
static bool protect_rest(struct client *parent, struct client *child)
{
	struct page_range ranges[RANGES_MAX];

	for (size_t i = 0; i < parent->regions.count; i++) {
		uint64_t at = parent->regions.ranges[i].start, end = parent->regions.ranges[i].end;

		while (at < end) {
			int count = sys_unprotected_ranges(parent->pagemap_fd, at, end, ranges, RANGES_MAX, &at);

			if (count < 0 || !protect_ranges(parent, child, ranges, count))
				return false;
		}
	}
	return true;
}

static void share(struct client *client, int64_t resident, bool is_protecting)
{
	WRITE_ONCE(client->pss, true);
	WRITE_ONCE(client->is_alone, false);
	WRITE_ONCE(client->alone_since_ns, 0);
	WRITE_ONCE(client->is_protecting, is_protecting);
	WRITE_ONCE(client->shared_pages, resident);
	WRITE_ONCE(client->forks, client->forks + 1);
}

/* Not at once, for all is known, and of what is protected faults tell. */
static void put_reading_off(struct client *client, uint64_t resident, bool is_protecting)
{
	uint64_t cost_ns = resident * PSS_PAGE_NS * (is_protecting ? PSS_COST_MAX : PSS_COST_MIN);

	WRITE_ONCE(client->pss_round, READ_ONCE(client->group->pss_round));
	WRITE_ONCE(client->pss_next_ns, sys_now_ns() + PSS_INTERVAL_NS + cost_ns);
}

void cow_note_fork(struct client *parent, struct client *child)
{
	bool was_alone = !READ_ONCE(parent->pss) || cow_is_alone(parent), is_protecting;
	struct process_size size = { 0 };
	uint64_t resident;

	(void)sys_statm(parent->statm_fd, &size);
	resident = size.anonymous_pages;
	join_family(parent, child);
	is_protecting = parent->is_protecting && protect_rest(parent, child);
	if (was_alone) {
		WRITE_ONCE(parent->pss_above_resident, 0);
		put_reading_off(parent, resident, is_protecting);
	}
	if (child->family) { /* else nobody knows who counts it: it counts, and is read at once */
		WRITE_ONCE(child->pss_above_resident, -(int64_t)resident);
		put_reading_off(child, resident, is_protecting);
	}
	share(parent, (int64_t)resident, is_protecting);
	share(child, (int64_t)resident, is_protecting);
}

void cow_note_end(struct client *client)
{
	if (!client->family)
		return;
	(void)end_counted_with(client);
	__atomic_fetch_sub(&client->family->living, 1, __ATOMIC_RELAXED);
}

void cow_forget(struct client *client)
{
	note_cost(client, 0);
	if (client->family && __atomic_sub_fetch(&client->family->references, 1, __ATOMIC_ACQ_REL) == 0)
		free(client->family);
}

/* ---- writes that are let through ---- */

void cow_note_copied(struct client *client, uint64_t count)
{
	if (!client->is_protecting)
		return;
	if (cow_is_alone(client))
		__atomic_fetch_add(&client->alone_faults, 1, __ATOMIC_RELAXED);
	else
		__atomic_fetch_add(&client->copied_pages, (int64_t)count, __ATOMIC_RELAXED);
}

void cow_let_through(struct client *client, uint64_t page, uint64_t count)
{
	if (client->is_protecting)
		(void)sys_userfaultfd_unprotect(client->events_fd, address_of(page), count * PAGE_BYTES);
}
