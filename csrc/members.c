/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "members.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "base.h"
#include "engine_internal.h"
#include "shelve.h"
#include "sys.h"

#define LOOK_MS 500u
#define LOOK_NEAR_MS 100u    /* while a group uses more than NEAR_PERCENT of its limit */
#define NEAR_PERCENT 75u
#define LOOK_COST_FACTOR 20u /* no more than a twentieth of the time is spent on it, */
#define LOOK_MS_MAX 10000u   /* but the next one begins after this at the latest */

void members_destroy(struct members *members)
{
	if (!members)
		return;
	process_tree_destroy(&members->tree);
	free(members->excluded);
	free(members);
}

/* ---- what is charged ---- */

static int compare_pids(const void *a, const void *b)
{
	pid_t first = *(const pid_t *)a, second = *(const pid_t *)b;

	return (first > second) - (first < second);
}

static bool is_client(pid_t pid, const pid_t *clients, unsigned client_count)
{
	return client_count > 0 && bsearch(&pid, clients, client_count, sizeof pid, compare_pids);
}

static struct process *largest_child_of_clients(const struct process_tree *tree, const pid_t *clients, unsigned client_count)
{
	struct process *largest = NULL;

	for (unsigned i = 0; i < tree->count; i++) {
		struct process *process = &tree->processes[i];

		if (process->is_copy && process->charged > 0 && (!largest || process->charged > largest->charged) &&
		    is_client(process->parent, clients, client_count))
			largest = process;
	}
	return largest;
}

static void drop_clients(struct process_tree *tree, const pid_t *clients, unsigned client_count)
{
	unsigned kept = 0;

	for (unsigned i = 0; i < tree->count; i++)
		if (!is_client(tree->processes[i].pid, clients, client_count))
			tree->processes[kept++] = tree->processes[i];
	tree->count = kept;
}

uint64_t members_charge(struct process_tree *tree, const struct process_tree *before, const pid_t *clients,
			unsigned client_count, unsigned forks_pending)
{
	struct process *child;
	uint64_t sum = 0;

	drop_clients(tree, clients, client_count);
	for (unsigned i = 0; i < tree->count; i++) {
		struct process *process = &tree->processes[i];
		const struct process *seen = process_tree_find(before, process->pid);

		process->charged = seen ? min_of(process->bytes, seen->bytes) : 0;
	}
	while (forks_pending-- > 0 && (child = largest_child_of_clients(tree, clients, client_count)))
		child->charged = 0;
	for (unsigned i = 0; i < tree->count; i++)
		sum += tree->processes[i].charged;
	return sum;
}

/* ---- a look at one group ---- */

/* What is to be looked at, as it was when the look began. */
struct look {
	unsigned group;
	uint64_t generation;
	pid_t root;
	uint64_t root_start;
	pid_t *excluded;
	unsigned excluded_count;
};

/* Numbers of processes that have ended may be others' one day. */
static void forget_ended(struct members *members)
{
	unsigned kept = 0;

	for (unsigned i = 0; i < members->excluded_count; i++)
		if (kill(members->excluded[i], 0) == 0 || errno != ESRCH)
			members->excluded[kept++] = members->excluded[i];
	members->excluded_count = kept;
}

/* False: the group has none, or there is no memory to look at them. */
static bool look_begin(struct engine *engine, unsigned number, struct look *ret_look)
{
	SCOPED_LOCK(&engine->registry);
	struct members *members = engine->groups[number] ? engine->groups[number]->members : NULL;

	if (!members)
		return false;
	forget_ended(members);
	*ret_look = (struct look){ .group = number, .generation = members->generation, .root = members->root,
				   .root_start = members->root_start,
				   .excluded = malloc((members->excluded_count + 1) * sizeof *members->excluded),
				   .excluded_count = members->excluded_count };
	if (!ret_look->excluded)
		return false;
	memcpy(ret_look->excluded, members->excluded, members->excluded_count * sizeof *members->excluded);
	engine->members_noted_count = 0;
	return true;
}

/* Numbers of all clients and of those that were noted since the look began, sorted; NULL without memory. The registry lock
 * is held. */
static pid_t *client_pids(const struct engine *engine, unsigned group, unsigned *ret_count, unsigned *ret_pending)
{
	pid_t *pids = malloc((engine->clients_end + engine->members_noted_count + 1) * sizeof *pids);
	unsigned count = 0;

	*ret_pending = 0;
	if (!pids)
		return NULL;
	for (unsigned i = 0; i < engine->clients_end; i++) {
		const struct client *client = engine->clients[i];
		pid_t pid = client ? READ_ONCE(client->pid) : 0;

		if (!client || client_is_region(client))
			continue;
		if (pid > 0)
			pids[count++] = pid;
		else
			*ret_pending += (unsigned)client->group->number == group;
	}
	for (unsigned i = 0; i < engine->members_noted_count; i++)
		pids[count++] = engine->members_noted[i];
	qsort(pids, count, sizeof *pids, compare_pids);
	*ret_count = count;
	return pids;
}

static void look_end(struct engine *engine, const struct look *look, struct process_tree *tree)
{
	SCOPED_LOCK(&engine->registry);
	struct group *group = engine->groups[look->group];
	unsigned count, pending;
	pid_t *pids;

	/* Another one by now; or more came meanwhile than there is room to note. */
	if (!group || !group->members || group->members->generation != look->generation ||
	    engine->members_noted_count == MEMBERS_NOTED_MAX)
		return;
	pids = client_pids(engine, look->group, &count, &pending);
	if (!pids)
		return;
	WRITE_ONCE(group->unmanaged_bytes, members_charge(tree, &group->members->tree, pids, count, pending));
	free(pids);
	process_tree_destroy(&group->members->tree);
	group->members->tree = *tree;
	*tree = (struct process_tree){ 0 };
}

/* Those that are to be measured: to read what a client shares is to walk over all of its page tables. */
static void drop_present_clients(struct engine *engine, const struct look *look, struct process_tree *tree)
{
	SCOPED_LOCK(&engine->registry);
	unsigned count, pending;
	pid_t *pids = client_pids(engine, look->group, &count, &pending);

	if (pids)
		drop_clients(tree, pids, count);
	free(pids);
}

/* Its number may be another's by now, who is nobody's root. */
static int read_tree(const struct look *look, bool has_lists, struct process_tree *ret_tree)
{
	*ret_tree = (struct process_tree){ 0 };
	if (sys_process_start(look->root) != look->root_start)
		return 0;
	return process_tree_read(look->root, look->excluded, look->excluded_count, has_lists, ret_tree);
}

static void look_at_group(struct engine *engine, unsigned number, bool has_lists)
{
	struct process_tree tree;
	struct look look;

	if (!look_begin(engine, number, &look))
		return;
	if (read_tree(&look, has_lists, &tree) == 0) {
		drop_present_clients(engine, &look, &tree);
		for (unsigned i = 0; i < tree.count; i++) {
			struct process *process = &tree.processes[i];

			if (sys_shares_memory(process->pid, process->parent))
				continue; /* its parent's, with which it counts */
			process->is_copy = sys_is_copy(process->pid, process->parent); /* first: it may execute something */
			process->bytes = process_anonymous_bytes(process->pid);
		}
		look_end(engine, &look, &tree);
	}
	process_tree_destroy(&tree);
	free(look.excluded);
}

/* ---- all of them ---- */

/* Numbers of the groups that have a root. *ret_is_near: one of all groups uses most of its limit. */
static unsigned list_groups(struct engine *engine, uint16_t numbers[static GROUPS_MAX], bool *ret_is_near)
{
	unsigned count = 0;

	*ret_is_near = false;
	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		const struct group *group = engine->groups[i];

		if (!group)
			continue;
		*ret_is_near |= group_usage_bytes(group) / NEAR_PERCENT >= READ_ONCE(group->limit_bytes) / 100;
		if (group->members)
			numbers[count++] = (uint16_t)i;
	}
	return count;
}

/* Milliseconds until the next look. */
static unsigned look_at_all(struct engine *engine, bool has_lists)
{
	uint16_t numbers[GROUPS_MAX];
	uint64_t since = sys_now_ns(), cost_ms;
	bool is_near;
	unsigned count = list_groups(engine, numbers, &is_near);

	for (unsigned i = 0; i < count; i++)
		look_at_group(engine, numbers[i], has_lists);
	cost_ms = (sys_now_ns() - since) / 1000000;
	return max_of(is_near ? LOOK_NEAR_MS : LOOK_MS, (unsigned)min_of(cost_ms * LOOK_COST_FACTOR, (uint64_t)LOOK_MS_MAX));
}

void *members_thread_main(void *argument)
{
	bool has_lists = process_tree_has_lists();
	struct engine *engine = argument;
	uint64_t seen = 0;

	name_this_thread("vswap-members");
	while (!__atomic_load_n(&engine->stopping, __ATOMIC_ACQUIRE)) {
		unsigned ms = look_at_all(engine, has_lists);

		shelve_rest();
		work_wait(&engine->counting, &seen, &engine->stopping, ms);
	}
	return NULL;
}

/* ---- for the control plane ---- */

int engine_group_set_members(struct engine *engine, int number, int32_t root, const int32_t *excluded, uint32_t count)
{
	struct members *members = calloc(1, sizeof *members);
	pid_t *copy = malloc((count + 1) * sizeof *copy);
	struct group *group;

	if (!members || !copy) {
		free(members);
		free(copy);
		return -ENOMEM;
	}
	if (count > 0)
		memcpy(copy, excluded, count * sizeof *copy);
	*members = (struct members){ .root = root, .root_start = sys_process_start(root), .excluded = copy,
				     .excluded_count = count };
	SCOPED_LOCK(&engine->registry);
	group = group_at(engine, number);
	if (!group) {
		members_destroy(members);
		return -ENOENT;
	}
	members->generation = ++engine->members_generation;
	if (group->members && group->members->root == root) { /* what was seen of them stays */
		members->root_start = group->members->root_start;
		members->tree = group->members->tree;
		group->members->tree = (struct process_tree){ 0 };
	}
	members_destroy(group->members);
	group->members = members;
	return 0;
}

void engine_note_client(struct engine *engine, int32_t pid)
{
	SCOPED_LOCK(&engine->registry);
	if (engine->members_noted_count < MEMBERS_NOTED_MAX)
		engine->members_noted[engine->members_noted_count++] = pid;
	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		struct group *group = engine->groups[i];
		struct process *process = group && group->members ? process_tree_find(&group->members->tree, pid) : NULL;

		if (!process)
			continue;
		WRITE_ONCE(group->unmanaged_bytes, READ_ONCE(group->unmanaged_bytes) - process->charged);
		process->bytes = process->charged = 0;
	}
}
