/* SPDX-License-Identifier: MIT */
/*
 * process_tree — the processes that descend from one, as /proc says.
 *
 * Processes come and go meanwhile: one that is found may have ended, and one whose parent or sibling ends just then may be
 * missed, until the next look. No lock; nothing is kept between calls.
 */
#ifndef VSWAP_PROCESS_TREE_H
#define VSWAP_PROCESS_TREE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define PROCESS_TREE_MAX 65536u

struct process {
	pid_t pid, parent;
	uint64_t bytes;   /* anonymous memory, its share of what it shares with forked relatives */
	bool is_copy;     /* of its parent: forked from it, and nothing executed since */
	uint64_t charged; /* members.h */
};

struct process_tree {
	struct process *processes; /* by number */
	unsigned count, capacity;
};

/* Sorted: all below `root`, without it, and without those of `excluded` and what is below them; `bytes` is 0. 0 or -ENOMEM, with a
 * tree to destroy in both cases. `has_lists`: process_tree_has_lists(); without lists all of /proc is read. */
int process_tree_read(pid_t root, const pid_t *excluded, unsigned excluded_count, bool has_lists,
		      struct process_tree *ret_tree);
/* CONFIG_PROC_CHILDREN. */
bool process_tree_has_lists(void);

/* By number, each once. */
void process_tree_sort(struct process_tree *tree);
/* NULL: it is not there. */
struct process *process_tree_find(const struct process_tree *tree, pid_t pid);
void process_tree_destroy(struct process_tree *tree);

/* Anonymous memory of a process; 0 when it has ended. */
uint64_t process_anonymous_bytes(pid_t pid);

#endif
