/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "process_tree.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base.h"
#include "limits.h"
#include "sys.h"

#define PSS_FROM_BYTES (1ULL << 20) /* smaller processes are counted by what is resident: cheaper, and hardly wrong */

/* ---- a tree ---- */

/* Where the number is, or where there is room for it. */
static uint32_t *place_of(const struct process_tree *tree, pid_t pid)
{
	uint32_t mask = 2 * tree->capacity - 1, i = (uint32_t)pid * 0x9E3779B1u >> 7;

	while (tree->places[i & mask] && tree->processes[tree->places[i & mask] - 1].pid != pid)
		i++;
	return &tree->places[i & mask];
}

static bool has(const struct process_tree *tree, pid_t pid) { return tree->count > 0 && *place_of(tree, pid); }

static int grow(struct process_tree *tree)
{
	unsigned capacity = max_of(2 * tree->capacity, 64u);
	struct process *processes = realloc(tree->processes, capacity * sizeof *processes);
	uint32_t *places;

	if (!processes)
		return -ENOMEM;
	tree->processes = processes;
	places = calloc(2 * capacity, sizeof *places);
	if (!places)
		return -ENOMEM;
	free(tree->places);
	tree->places = places;
	tree->capacity = capacity;
	for (unsigned i = 0; i < tree->count; i++)
		*place_of(tree, tree->processes[i].pid) = i + 1;
	return 0;
}

/* What is there already, or too much, stays out. */
static int add(struct process_tree *tree, pid_t pid, pid_t parent)
{
	if (tree->count == PROCESS_TREE_MAX || has(tree, pid))
		return 0;
	if (tree->count == tree->capacity && grow(tree) < 0)
		return -ENOMEM;
	*place_of(tree, pid) = tree->count + 1;
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
	free(tree->places);
	tree->places = NULL;
	if (tree->count > 0)
		qsort(tree->processes, tree->count, sizeof *tree->processes, by_pid);
}

struct process *process_tree_find(const struct process_tree *tree, pid_t pid)
{
	struct process key = { .pid = pid };

	return tree->count == 0 ? NULL : bsearch(&key, tree->processes, tree->count, sizeof key, by_pid);
}

void process_tree_destroy(struct process_tree *tree)
{
	free(tree->processes);
	free(tree->places);
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

static pid_t parent_of(pid_t pid)
{
	char path[64], line[512];
	const char *behind_name = NULL;
	int parent = 0;
	FILE *stat;

	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	stat = fopen(path, "re");
	if (!stat)
		return 0;
	if (fgets(line, sizeof line, stat))
		behind_name = strrchr(line, ')');
	if (!behind_name || sscanf(behind_name, ") %*c %d", &parent) != 1)
		parent = 0;
	fclose(stat);
	return parent;
}

static int read_everybody(struct process_tree *everybody)
{
	DIR *processes = opendir("/proc");
	const struct dirent *process;
	int result = 0;

	while (processes && result == 0 && (process = readdir(processes))) {
		pid_t pid = atoi(process->d_name);

		if (pid > 0)
			result = add(everybody, pid, parent_of(pid));
	}
	if (processes)
		closedir(processes);
	return result;
}

static int add_descendants(struct process_tree *tree, pid_t root, const struct process_tree *everybody,
			   const pid_t *excluded, unsigned excluded_count)
{
	unsigned before;

	do {
		before = tree->count;
		for (unsigned i = 0; i < everybody->count; i++) {
			const struct process *process = &everybody->processes[i];

			if ((process->parent != root && !has(tree, process->parent)) || has(tree, process->pid) ||
			    is_one_of(process->pid, excluded, excluded_count))
				continue;
			if (add(tree, process->pid, process->parent) < 0)
				return -ENOMEM;
		}
	} while (tree->count > before);
	return 0;
}

/* ---- for callers ---- */

int process_tree_read(pid_t root, const pid_t *excluded, unsigned excluded_count, bool has_lists,
		      struct process_tree *ret_tree)
{
	struct process_tree everybody = { 0 };
	int result;

	*ret_tree = (struct process_tree){ 0 };
	if (has_lists) {
		result = add_children(ret_tree, root, excluded, excluded_count);
		for (unsigned i = 0; result == 0 && i < ret_tree->count; i++)
			result = add_children(ret_tree, ret_tree->processes[i].pid, excluded, excluded_count);
		return result;
	}
	result = read_everybody(&everybody);
	if (result == 0)
		result = add_descendants(ret_tree, root, &everybody, excluded, excluded_count);
	process_tree_destroy(&everybody);
	return result;
}

uint64_t process_anonymous_bytes(pid_t pid)
{
	int fd = sys_open_proc(pid, "statm");
	uint64_t size, pages, bytes;
	int result = fd < 0 ? fd : sys_statm(fd, &size, &pages);

	if (fd >= 0)
		close(fd);
	if (result < 0)
		return 0;
	if (pages * PAGE_BYTES >= PSS_FROM_BYTES && sys_pss_anonymous(pid, &bytes) == 0)
		return bytes;
	return pages * PAGE_BYTES;
}
