/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "process_tree.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base.h"
#include "limits.h"
#include "sys.h"

#define PSS_FROM_BYTES (1ULL << 20) /* smaller processes are counted by what is resident: cheaper, and hardly wrong */

/* ---- a tree ---- */

static int add(struct process_tree *tree, pid_t pid, pid_t parent)
{
	if (tree->count == PROCESS_TREE_MAX)
		return 0;
	if (tree->count == tree->capacity) {
		unsigned capacity = max_of(2 * tree->capacity, 64u);
		struct process *processes = realloc(tree->processes, capacity * sizeof *processes);

		if (!processes)
			return -ENOMEM;
		tree->processes = processes;
		tree->capacity = capacity;
	}
	tree->processes[tree->count++] = (struct process){ .pid = pid, .parent = parent };
	return 0;
}

static int by_pid(const void *a, const void *b)
{
	pid_t first = ((const struct process *)a)->pid, second = ((const struct process *)b)->pid;

	return (first > second) - (first < second);
}

void process_tree_sort(struct process_tree *tree)
{
	unsigned kept = 0;

	if (tree->count > 0)
		qsort(tree->processes, tree->count, sizeof *tree->processes, by_pid);
	/* One whose parent ended meanwhile may have been found with two. */
	for (unsigned i = 0; i < tree->count; i++)
		if (i == 0 || tree->processes[i].pid != tree->processes[kept - 1].pid)
			tree->processes[kept++] = tree->processes[i];
	tree->count = kept;
}

struct process *process_tree_find(const struct process_tree *tree, pid_t pid)
{
	struct process key = { .pid = pid };

	return tree->count == 0 ? NULL : bsearch(&key, tree->processes, tree->count, sizeof key, by_pid);
}

void process_tree_destroy(struct process_tree *tree)
{
	free(tree->processes);
	*tree = (struct process_tree){ 0 };
}

/* ---- by lists of children ---- */

bool process_tree_has_lists(void)
{
	char path[64];

	snprintf(path, sizeof path, "/proc/self/task/%d/children", getpid());
	return access(path, F_OK) == 0;
}

static bool is_one_of(pid_t pid, const pid_t *pids, unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		if (pids[i] == pid)
			return true;
	return false;
}

static int add_children_of_thread(struct process_tree *tree, pid_t pid, int thread, const pid_t *excluded, unsigned excluded_count)
{
	char path[64];
	int child, result = 0;
	FILE *children;

	snprintf(path, sizeof path, "/proc/%d/task/%d/children", pid, thread);
	children = fopen(path, "re");
	if (!children)
		return 0; /* it has ended */
	while (result == 0 && fscanf(children, "%d", &child) == 1)
		if (!is_one_of(child, excluded, excluded_count))
			result = add(tree, child, pid);
	fclose(children);
	return result;
}

static int add_children(struct process_tree *tree, pid_t pid, const pid_t *excluded, unsigned excluded_count)
{
	const struct dirent *task;
	char path[64];
	int result = 0;
	DIR *tasks;

	snprintf(path, sizeof path, "/proc/%d/task", pid);
	tasks = opendir(path);
	while (tasks && result == 0 && (task = readdir(tasks)))
		if (task->d_name[0] != '.')
			result = add_children_of_thread(tree, pid, atoi(task->d_name), excluded, excluded_count);
	if (tasks)
		closedir(tasks);
	return result;
}

/* ---- by everybody's parent ---- */

static int read_everybody(struct process_tree *everybody)
{
	DIR *processes = opendir("/proc");
	const struct dirent *process;
	int result = 0;

	while (processes && result == 0 && (process = readdir(processes))) {
		pid_t pid = atoi(process->d_name);

		if (pid > 0)
			result = add(everybody, pid, sys_process_parent(pid));
	}
	if (processes)
		closedir(processes);
	process_tree_sort(everybody);
	return result;
}

/* Which of them are below `root`, in as many passes as the tree is deep. */
static void mark_descendants(const struct process_tree *everybody, pid_t root, const pid_t *excluded, unsigned excluded_count,
			     bool *is_below)
{
	bool found;

	do {
		found = false;
		for (unsigned i = 0; i < everybody->count; i++) {
			const struct process *process = &everybody->processes[i];
			const struct process *parent = process_tree_find(everybody, process->parent);

			if (is_below[i] || is_one_of(process->pid, excluded, excluded_count) ||
			    (process->parent != root && !(parent && is_below[parent - everybody->processes])))
				continue;
			is_below[i] = found = true;
		}
	} while (found);
}

static int add_descendants(struct process_tree *tree, pid_t root, const pid_t *excluded, unsigned excluded_count)
{
	struct process_tree everybody = { 0 };
	int result = read_everybody(&everybody);
	bool *is_below = calloc(everybody.count + 1, sizeof *is_below);

	if (!is_below)
		result = -ENOMEM;
	if (result == 0)
		mark_descendants(&everybody, root, excluded, excluded_count, is_below);
	for (unsigned i = 0; result == 0 && i < everybody.count; i++)
		if (is_below[i])
			result = add(tree, everybody.processes[i].pid, everybody.processes[i].parent);
	free(is_below);
	process_tree_destroy(&everybody);
	return result;
}

/* ---- for callers ---- */

int process_tree_read(pid_t root, const pid_t *excluded, unsigned excluded_count, bool has_lists,
		      struct process_tree *ret_tree)
{
	int result;

	*ret_tree = (struct process_tree){ 0 };
	if (has_lists)
		result = add_children(ret_tree, root, excluded, excluded_count);
	else
		result = add_descendants(ret_tree, root, excluded, excluded_count);
	for (unsigned i = 0; has_lists && result == 0 && i < ret_tree->count; i++)
		result = add_children(ret_tree, ret_tree->processes[i].pid, excluded, excluded_count);
	process_tree_sort(ret_tree);
	return result;
}

uint64_t process_anonymous_bytes(pid_t pid)
{
	int fd = sys_open_proc(pid, "statm");
	struct process_size size;
	uint64_t pages, bytes;
	int result = fd < 0 ? fd : sys_statm(fd, &size);

	if (fd >= 0)
		close(fd);
	if (result < 0)
		return 0;
	pages = size.anonymous_pages;
	if (pages * PAGE_BYTES >= PSS_FROM_BYTES && sys_pss_anonymous(pid, &bytes) == 0)
		return bytes;
	return pages * PAGE_BYTES;
}
