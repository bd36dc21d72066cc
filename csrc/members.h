/* SPDX-License-Identifier: MIT */
/*
 * members — what a group's processes that are no clients take of its limit.
 *
 * The members of a group are the processes below its root process, without those that are excluded and what is below
 * them. Those that are clients are counted by the data plane already. The others are looked at twice a second, near a limit
 * ten times, and, unless one look takes seconds, never so that it takes more than a twentieth of the time:
 *
 *   - One counts with the smaller of two looks in a row: what it has for an instant only could end the group.
 *   - A child between vfork and exec shows the memory of its parent as its own: where both have one address space, the child
 *     has none.
 *   - Forked children that have not said hello are clients without a number. They are the largest of the children of
 *     clients that have executed nothing, as a fork starts with all that its parent has.
 *   - A process that becomes a client is no longer charged (engine_note_client), also by a look that is under way.
 *
 * In an embedded daemon the same thread has the interpreter's code leave RAM while that waits (shelve.h).
 *
 * Invariants  1 group->unmanaged_bytes is the sum of what is charged, from the last look and what was noted since
 *             2 nothing is charged for a process that the group's clients are known to be
 * Locking     the registry lock for all that is kept; /proc is read without it
 */
#ifndef VSWAP_MEMBERS_H
#define VSWAP_MEMBERS_H

#include <stdint.h>
#include <sys/types.h>

#include "process_tree.h"

struct engine;

#define MEMBERS_NOTED_MAX 64

/* Of a group. */
struct members {
	pid_t root;
	uint64_t root_start;       /* sys_process_start, when it was told */
	pid_t *excluded;
	unsigned excluded_count;
	uint64_t generation;       /* engine->members_generation when it was set: what began before it is void */
	struct process_tree tree;  /* sorted: those that are no clients, as they were at the last look */
};

void members_destroy(struct members *members);

/*
 * What each process of a sorted tree is to be charged, and their sum in bytes. `before`: the tree at the look before, sorted;
 * `clients`: sorted; they are dropped from the tree. `forks_pending`: clients of the group whose process is not known.
 */
uint64_t members_charge(struct process_tree *tree, const struct process_tree *before, const pid_t *clients,
			unsigned client_count, unsigned forks_pending);

void *members_thread_main(void *engine);

#endif
