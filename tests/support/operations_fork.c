/* SPDX-License-Identifier: MIT */
/* operations_fork — rows: processes that share pages which are out, and change them on both sides. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "operations.h"

extern char **environ;

static pid_t fork_checked(void)
{
	pid_t pid = fork();

	must_call(pid >= 0, "fork");
	return pid;
}

/* fork in no way that libc, and so the client library, hears of. */
static pid_t clone_like_fork(void)
{
	pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);

	must_call(pid >= 0, "clone");
	return pid;
}

static char *const exit_7[] = { "operations", "--exit", "7", NULL };

/* Child and parent in turn: each sees its own changes and none of the other's. */
static void both_sides(pid_t (*make_child)(void), bool child_pages_out)
{
	struct area area = area_make(AREA_PAGES);
	struct token to_child = token_make(), to_parent = token_make();
	pid_t pid = make_child();

	if (pid == 0) {
		area_check(&area, 0, HALF, 0, "inherited");
		area_write(&area, 0, HALF, 1);
		token_send(&to_parent);
		token_wait(&to_child);
		area_check(&area, HALF, HALF, 0, "after the parent wrote");
		area_check(&area, 0, HALF, 1, "own changes");
		if (child_pages_out) {
			page_out(area.at, area.pages);
			area_check(&area, 0, HALF, 1, "own changes, out and back");
			area_check(&area, HALF, HALF, 0, "shared pages, out and back");
		}
		child_done();
	}
	token_wait(&to_parent);
	area_check(&area, 0, 4, 0, "after the child wrote");
	area_write(&area, HALF, HALF, 2);
	page_out_try();
	token_send(&to_child);
	wait_for(pid, 0, "child");
	area_check(&area, 0, HALF, 0, "after the child ended");
	area_check(&area, HALF, HALF, 2, "after the child ended");
	page_out(area.at, area.pages);
	area_check(&area, 0, HALF, 0, "out and back");
	area_check(&area, HALF, HALF, 2, "out and back");
	area_free(&area);
}

static void fork_both(void) { both_sides(fork_checked, true); }
static void fork_raw_clone(void) { both_sides(clone_like_fork, false); }

static void fork_parent_writes_first(void)
{
	struct area area = area_make(AREA_PAGES);
	struct token to_child = token_make();
	pid_t pid = fork_checked();

	if (pid == 0) {
		token_wait(&to_child);
		area_check(&area, 0, area.pages, 0, "after the parent wrote");
		child_done();
	}
	area_write(&area, 0, area.pages, 1);
	page_out_try();
	token_send(&to_child);
	wait_for(pid, 0, "child");
	area_check(&area, 0, area.pages, 1, "own changes");
	area_free(&area);
}

static void fork_child_ends_untouched(void)
{
	struct area area = area_make(AREA_PAGES);
	pid_t pid = fork_checked();

	if (pid == 0)
		child_done();
	wait_for(pid, 0, "child");
	area_check(&area, 0, area.pages, 0, "after the child ended");
	page_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 0, "out and back");
	area_free(&area);
}

static void fork_exec(void)
{
	struct area area = area_make(AREA_PAGES);
	pid_t pid = fork_checked();

	if (pid == 0) {
		area_write(&area, 0, 8, 1);
		execve(program_path, exit_7, environ);
		must_call(false, "execve");
	}
	wait_for(pid, 7, "child");
	area_check(&area, 0, area.pages, 0, "after the child's exec");
	area_free(&area);
}

/* Three generations; each changes a part of its own, and outlives its parent. */
static void fork_grandchildren(void)
{
	struct area area = area_make(AREA_PAGES);
	struct token last = token_make();
	pid_t pid = fork_checked();

	if (pid == 0) {
		area_write(&area, 0, 16, 1);
		pid = fork_checked();
		if (pid != 0)
			child_done();
		area_check(&area, 0, 16, 1, "grandchild, of its parent");
		area_write(&area, 16, 16, 2);
		page_out(area.at, area.pages);
		pid = fork_checked();
		if (pid != 0)
			child_done();
		area_check(&area, 0, 16, 1, "great-grandchild, of its grandparent");
		area_check(&area, 16, 16, 2, "great-grandchild, of its parent");
		area_write(&area, 32, 16, 3);
		page_out(area.at, area.pages);
		area_check(&area, 32, 16, 3, "great-grandchild, its own");
		area_check(&area, 48, area.pages - 48, 0, "great-grandchild, of all");
		token_send(&last);
		child_done();
	}
	close(last.fds[1]);
	wait_for(pid, 0, "child");
	token_wait(&last);
	area_check(&area, 0, area.pages, 0, "after all of them");
	area_free(&area);
}

static void fork_siblings(void)
{
	struct area area = area_make(AREA_PAGES);
	struct token go = token_make();
	pid_t pids[3];

	for (unsigned i = 0; i < 3; i++) {
		pids[i] = fork_checked();
		if (pids[i] == 0) {
			area_write(&area, 8 * i, 16, i + 1);
			token_wait(&go);
			area_check(&area, 8 * i, 16, i + 1, "own changes");
			area_check(&area, HALF, HALF, 0, "shared");
			child_done();
		}
	}
	area_check(&area, 0, HALF, 0, "in the parent");
	for (unsigned i = 0; i < 3; i++)
		token_send(&go);
	for (unsigned i = 0; i < 3; i++)
		wait_for(pids[i], 0, "sibling");
	area_check(&area, 0, area.pages, 0, "after all of them");
	area_free(&area);
}

/* What a child does to its mappings does nothing to its parent's. */
static void fork_child_unmaps(void)
{
	struct area area = area_make(AREA_PAGES);
	pid_t pid = fork_checked();

	if (pid == 0) {
		struct area moved = area;

		must_call(munmap(area.at, 16 * PAGE) == 0, "munmap");
		must_call(madvise(area_page(&area, 16), 16 * PAGE, MADV_DONTNEED) == 0, "DONTNEED");
		check_zeros(area_page(&area, 16), 16, "child, after DONTNEED");
		moved.at = mremap(area_page(&area, 32), (area.pages - 32) * PAGE,
				  (area.pages - 32) * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
				  area_map(area.pages).at);
		must_call(moved.at != MAP_FAILED, "mremap");
		area_check_at(&area, 32, area.pages - 32, 0, moved.at, "child, after mremap");
		child_done();
	}
	wait_for(pid, 0, "child");
	area_check(&area, 0, area.pages, 0, "in the parent");
	area_free(&area);
}

static void fork_parent_unmaps(void)
{
	struct area area = area_make(AREA_PAGES);
	struct token to_child = token_make();
	pid_t pid = fork_checked();

	if (pid == 0) {
		token_wait(&to_child);
		area_check(&area, 0, area.pages, 0, "after the parent let go of it");
		child_done();
	}
	must_call(madvise(area.at, 32 * PAGE, MADV_DONTNEED) == 0, "DONTNEED");
	check_zeros(area.at, 32, "parent, after DONTNEED");
	area_free(&area);
	token_send(&to_child);
	wait_for(pid, 0, "child");
}

/* ---- fork while other threads use the memory ---- */

struct toucher {
	struct area area;
	volatile int stop;
};

static void *touch_all_the_time(void *argument)
{
	struct toucher *toucher = argument;

	while (!toucher->stop)
		area_check(&toucher->area, 0, toucher->area.pages, 0, "in a thread");
	return NULL;
}

static void fork_threaded(void)
{
	struct toucher toucher = { .area = area_make(AREA_PAGES) };
	struct area own = area_make(AREA_PAGES);
	pthread_t threads[2];

	for (unsigned i = 0; i < 2; i++)
		must(pthread_create(&threads[i], NULL, touch_all_the_time, &toucher) == 0, "no thread");
	for (unsigned i = 0; i < 4; i++) {
		pid_t pid;

		page_out_try();
		pid = fork_checked();
		if (pid == 0) {
			area_check(&toucher.area, 0, toucher.area.pages, 0, "child, the threads' area");
			area_check(&own, 0, own.pages, 0, "child, the main thread's area");
			child_done();
		}
		wait_for(pid, 0, "child");
	}
	toucher.stop = 1;
	for (unsigned i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	area_check(&own, 0, own.pages, 0, "afterwards");
	area_free(&own);
	area_free(&toucher.area);
}

/* ---- children in the same memory ---- */

static void fork_vfork(void)
{
	struct area area = area_make(AREA_PAGES);
	volatile uint8_t *byte = area_page(&area, 3);
	uint8_t wanted[PAGE];
	pid_t pid;

	area_content(&area, 3, 0, wanted);
	pid = vfork();
	if (pid == 0) {
		if (*byte != wanted[0])
			_exit(3);
		execve(program_path, exit_7, environ);
		_exit(4);
	}
	must_call(pid > 0, "vfork");
	wait_for(pid, 7, "child");
	area_check(&area, 0, area.pages, 0, "after vfork and exec");
	page_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 0, "out and back");
	area_free(&area);
}

static void fork_posix_spawn(void)
{
	struct area area = area_make(AREA_PAGES);
	pid_t pid;

	must(posix_spawn(&pid, program_path, NULL, NULL, exit_7, environ) == 0, "posix_spawn fails");
	wait_for(pid, 7, "child");
	area_check(&area, 0, area.pages, 0, "after posix_spawn");
	page_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 0, "out and back");
	area_free(&area);
}

static int check_and_write(void *argument)
{
	const struct area *area = argument;

	area_check(area, 0, HALF, 0, "in the child");
	area_write(area, 0, HALF, 1);
	return 5;
}

static void fork_clone_vm(void)
{
	struct area area = area_make(AREA_PAGES);
	struct area stack = area_map(AREA_PAGES);
	pid_t pid = clone(check_and_write, stack.at + stack.pages * PAGE, CLONE_VM | SIGCHLD, &area);

	must_call(pid > 0, "clone");
	wait_for(pid, 5, "child");
	area_check(&area, 0, HALF, 1, "the child's changes");
	area_check(&area, HALF, HALF, 0, "the rest");
	area_free(&area);
	area_free(&stack);
}

const struct row fork_rows[] = {
	{ "fork", fork_both, 0 },
	{ "fork_raw_clone", fork_raw_clone, 0 },
	{ "fork_parent_writes_first", fork_parent_writes_first, 0 },
	{ "fork_child_ends_untouched", fork_child_ends_untouched, 0 },
	{ "fork_exec", fork_exec, 0 },
	{ "fork_grandchildren", fork_grandchildren, 0 },
	{ "fork_siblings", fork_siblings, 0 },
	{ "fork_child_unmaps", fork_child_unmaps, 0 },
	{ "fork_parent_unmaps", fork_parent_unmaps, 0 },
	{ "fork_threaded", fork_threaded, 0 },
	{ "vfork", fork_vfork, 0 },
	{ "posix_spawn", fork_posix_spawn, 0 },
	{ "clone_vm", fork_clone_vm, 0 },
	{ NULL, NULL, 0 },
};
