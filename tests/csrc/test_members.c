/* SPDX-License-Identifier: MIT */
/*
 * test_members — which processes are below one, and what those are charged that are no clients.
 *
 * Build: tests/csrc/test_members.c and the data plane; -Icsrc; threads
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "engine_internal.h"
#include "members.h"
#include "sys.h"

#define MIB (1ULL << 20)
#define CHILD_BYTES (8 * MIB)
#define PATIENCE_NS 20000000000ULL

/* ---- what is charged ---- */

static struct process_tree tree_of(const struct process *processes, unsigned count)
{
	struct process_tree tree = { .processes = calloc(count + 1, sizeof *processes), .count = count };

	CHECK(tree.processes);
	memcpy(tree.processes, processes, count * sizeof *processes);
	process_tree_sort(&tree);
	return tree;
}

/* What they are charged when they were like `before` at the look before. */
static uint64_t charge(const struct process *now, unsigned count, const struct process *before, unsigned before_count,
		       const pid_t *clients, unsigned client_count, unsigned pending)
{
	struct process_tree tree = tree_of(now, count), last = tree_of(before, before_count);
	uint64_t sum = members_charge(&tree, &last, clients, client_count, pending), check = 0;

	for (unsigned i = 0; i < tree.count; i++)
		check += tree.processes[i].charged;
	CHECK(check == sum);
	process_tree_destroy(&tree);
	process_tree_destroy(&last);
	return sum;
}

static void test_who_is_seen_twice_counts(void)
{
	const struct process three[] = { { .pid = 3, .bytes = 30 }, { .pid = 1, .bytes = 10 }, { .pid = 2, .bytes = 20 } };
	const pid_t client[] = { 2 };

	CHECK(charge(three, 3, three, 0, client, 0, 0) == 0);
	CHECK(charge(three, 3, three, 3, client, 0, 0) == 60);
	CHECK(charge(three, 3, three, 3, client, 1, 0) == 40);
}

/* A client, 1, has vforked 2, which shows its memory as its own and then executes something small. */
static void test_between_vfork_and_exec(void)
{
	const struct process during[] = { { .pid = 2, .parent = 1, .bytes = 500 * MIB } };
	const struct process after[] = { { .pid = 2, .parent = 1, .bytes = MIB } };
	const pid_t client[] = { 1 };

	CHECK(charge(during, 1, during, 0, client, 1, 0) == 0);
	CHECK(charge(after, 1, during, 1, client, 1, 0) == MIB);
	CHECK(charge(during, 1, after, 1, client, 1, 0) == MIB);
}

/* The largest child of a client that has executed nothing, not the largest of all. */
static void test_forked_children_without_hello(void)
{
	const struct process four[] = { { .pid = 2, .parent = 1, .bytes = 100, .is_copy = true },
					{ .pid = 3, .parent = 1, .bytes = 5, .is_copy = true },
					{ .pid = 4, .parent = 9, .bytes = 1000, .is_copy = true },
					{ .pid = 5, .parent = 1, .bytes = 500 } };
	const pid_t client[] = { 1 };

	CHECK(charge(four, 4, four, 4, client, 1, 0) == 1605);
	CHECK(charge(four, 4, four, 4, client, 1, 1) == 1505);
	CHECK(charge(four, 4, four, 4, client, 1, 5) == 1500);
}

/* ---- the tree ---- */

/* The first of so many, each the parent of the next; all have memory, say so, and wait for a signal. */
static void be_children(int ready, unsigned count)
{
	volatile char *memory;

	while (--count > 0 && fork() == 0)
		;
	prctl(PR_SET_PDEATHSIG, SIGKILL); /* of a test that fails nothing is left */
	memory = malloc(CHILD_BYTES);
	for (size_t i = 0; memory && i < CHILD_BYTES; i += 4096)
		memory[i] = 1;
	CHECK(write(ready, "", 1) == 1);
	for (;;)
		pause();
}

static struct process_tree read_tree(const pid_t *excluded, unsigned count, bool has_lists)
{
	struct process_tree tree;

	CHECK(process_tree_read(getpid(), excluded, count, has_lists, &tree) == 0);
	return tree;
}

static void test_tree(bool has_lists)
{
	struct process_tree tree;
	pid_t first, middle = 0, all[3];
	int pipes[2];
	char byte;

	CHECK(pipe(pipes) == 0);
	first = fork();
	CHECK(first >= 0);
	if (first == 0)
		be_children(pipes[1], 3);
	for (int i = 0; i < 3; i++)
		CHECK(read(pipes[0], &byte, 1) == 1);
	tree = read_tree(NULL, 0, has_lists);
	CHECK(tree.count == 3 && process_tree_find(&tree, first) && process_tree_find(&tree, first)->parent == getpid());
	for (unsigned i = 0; i < tree.count; i++) {
		CHECK(process_tree_find(&tree, tree.processes[i].pid) == &tree.processes[i]);
		all[i] = tree.processes[i].pid;
		CHECK(process_anonymous_bytes(all[i]) >= CHILD_BYTES && sys_is_copy(all[i], tree.processes[i].parent));
		if (tree.processes[i].parent == first)
			middle = all[i];
	}
	CHECK(middle && !process_tree_find(&tree, getpid()) && !sys_is_copy(getpid(), getppid()));
	process_tree_destroy(&tree);
	tree = read_tree(&middle, 1, has_lists); /* what is below it, neither */
	CHECK(tree.count == 1 && tree.processes[0].pid == first);
	process_tree_destroy(&tree);
	for (int i = 0; i < 3; i++)
		CHECK(kill(all[i], SIGKILL) == 0);
	CHECK(waitpid(first, NULL, 0) == first);
	CHECK(process_anonymous_bytes(first) == 0);
	CHECK(close(pipes[0]) == 0 && close(pipes[1]) == 0);
}

/* More than there is room for at first. */
static void test_many(bool has_lists)
{
	enum { MANY = 300 };
	pid_t children[MANY];
	struct process_tree tree;

	for (int i = 0; i < MANY; i++) {
		children[i] = fork();
		CHECK(children[i] >= 0);
		if (children[i] == 0)
			for (;;)
				pause();
	}
	tree = read_tree(NULL, 0, has_lists);
	for (int i = 0; i < MANY; i++)
		CHECK(process_tree_find(&tree, children[i]));
	process_tree_destroy(&tree);
	for (int i = 0; i < MANY; i++) {
		CHECK(kill(children[i], SIGKILL) == 0);
		CHECK(waitpid(children[i], NULL, 0) == children[i]);
	}
	tree = read_tree(NULL, 0, has_lists);
	CHECK(tree.count == 0 && !process_tree_find(&tree, children[0]));
	process_tree_destroy(&tree);
}

/* ---- the thread that looks ---- */

static bool is_charged(const struct group *group) { return READ_ONCE(group->unmanaged_bytes) >= CHILD_BYTES; }

/* A few looks are enough for each change. */
static void wait_charged(struct group *group, bool charged)
{
	uint64_t since = test_now_ns();

	while (is_charged(group) != charged) {
		CHECK(test_now_ns() - since < PATIENCE_NS);
		usleep(1000);
	}
}

/* Invariant 1. */
static void check_sum(struct engine *engine, const struct group *group)
{
	uint64_t sum = 0;

	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < group->members->tree.count; i++)
		sum += group->members->tree.processes[i].charged;
	CHECK(sum == group->unmanaged_bytes);
}

static void set_client(struct engine *engine, struct client *client)
{
	SCOPED_LOCK(&engine->registry);
	engine->clients[0] = client;
	engine->clients_end = client != NULL;
}

static char fifo[] = "/tmp/test_members.XXXXXX/fifo";

/* Its child is in our memory until somebody opens the fifo. */
static void *spawn(void *ret_child)
{
	posix_spawn_file_actions_t actions;
	char *argv[] = { "true", NULL };

	CHECK(posix_spawn_file_actions_init(&actions) == 0);
	CHECK(posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, fifo, O_RDONLY, 0) == 0);
	CHECK(posix_spawn(ret_child, "/bin/true", &actions, NULL, argv, NULL) == 0);
	CHECK(posix_spawn_file_actions_destroy(&actions) == 0);
	return NULL;
}

/* A vfork child that is slow to execute something. */
static void check_child_in_our_memory(const struct group *group)
{
	char *memory = malloc(CHILD_BYTES), *name = strrchr(fifo, '/');
	pthread_t thread;
	pid_t child;
	int fd;

	*name = '\0';
	CHECK(memory && mkdtemp(fifo));
	*name = '/';
	CHECK(mkfifo(fifo, 0600) == 0);
	memset(memory, 1, CHILD_BYTES);
	CHECK(pthread_create(&thread, NULL, spawn, &child) == 0);
	for (unsigned i = 0; i < 150; i++) { /* three looks, or more */
		usleep(10000);
		CHECK(!is_charged(group));
	}
	fd = open(fifo, O_WRONLY);
	CHECK(fd >= 0 && pthread_join(thread, NULL) == 0 && waitpid(child, NULL, 0) == child);
	CHECK(memory[CHILD_BYTES / 2] == 1);
	CHECK(close(fd) == 0 && unlink(fifo) == 0);
	*name = '\0';
	CHECK(rmdir(fifo) == 0);
	free(memory);
}

static void set_root_start(struct engine *engine, struct members *members, uint64_t start)
{
	SCOPED_LOCK(&engine->registry);
	members->root_start = start;
}

/* No more of an engine than it looks at. */
static void test_looks(void)
{
	struct engine *engine = calloc(1, sizeof *engine);
	struct group *group = calloc(1, sizeof *group);
	struct client *client = calloc(1, sizeof *client);
	int memfd = sys_memfd("test", 0, false), pipes[2];
	pthread_t thread;
	pid_t child;
	char byte;

	CHECK(engine && group && client && memfd >= 0 && pipe(pipes) == 0);
	CHECK(pool_space_create(memfd, MIB, &engine->pool_space) == 0 && pool_create(engine->pool_space, &group->pool) == 0);
	pthread_mutex_init(&engine->registry, NULL);
	work_init(&engine->counting);
	group->limit_bytes = CHILD_BYTES; /* so that looks are frequent */
	engine->groups[0] = group;
	child = fork();
	CHECK(child >= 0);
	if (child == 0)
		be_children(pipes[1], 1);
	CHECK(read(pipes[0], &byte, 1) == 1);
	*client = (struct client){ .pid = child, .group = group };
	CHECK(engine_group_set_members(engine, 1, getpid(), NULL, 0) == -ENOENT);
	CHECK(engine_group_set_members(engine, 0, getpid(), NULL, 0) == 0);
	CHECK(pthread_create(&thread, NULL, members_thread_main, engine) == 0);

	wait_charged(group, true);
	/* About to become a client: from now on, until it has turned out not to be one. */
	engine_note_client(engine, child);
	CHECK(!is_charged(group));
	check_sum(engine, group);
	wait_charged(group, true);
	check_sum(engine, group);
	engine_note_client(engine, child);
	set_client(engine, client);
	usleep(500000); /* several looks */
	CHECK(!is_charged(group));
	set_client(engine, NULL);
	wait_charged(group, true);
	CHECK(engine_group_set_members(engine, 0, getpid(), &child, 1) == 0);
	wait_charged(group, false);
	CHECK(engine_group_set_members(engine, 0, getpid(), NULL, 0) == 0);
	wait_charged(group, true);
	CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
	wait_charged(group, false);
	check_child_in_our_memory(group);
	/* Another process by that number, as far as can be told. */
	set_root_start(engine, group->members, 1);
	child = fork();
	CHECK(child >= 0);
	if (child == 0)
		be_children(pipes[1], 1);
	CHECK(read(pipes[0], &byte, 1) == 1);
	usleep(1500000); /* three looks, or more */
	CHECK(!is_charged(group));
	set_root_start(engine, group->members, sys_process_start(getpid()));
	wait_charged(group, true);
	CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);

	__atomic_store_n(&engine->stopping, true, __ATOMIC_RELEASE);
	work_ask(&engine->counting);
	CHECK(pthread_join(thread, NULL) == 0);
	members_destroy(group->members);
	pool_destroy(group->pool);
	pool_space_destroy(engine->pool_space);
	CHECK(close(memfd) == 0 && close(pipes[0]) == 0 && close(pipes[1]) == 0);
	free(client);
	free(group);
	free(engine);
}

int main(void)
{
	test_who_is_seen_twice_counts();
	test_between_vfork_and_exec();
	test_forked_children_without_hello();
	alarm(60); /* children that outlive this would wait for ever */
	for (int has_lists = 0; has_lists < 2; has_lists++) {
		test_tree(has_lists != 0);
		test_many(has_lists != 0);
	}
	test_looks();
	CHECK(process_tree_has_lists() == (access("/proc/thread-self/children", F_OK) == 0));
	return 0;
}
