/* SPDX-License-Identifier: MIT */
/* operations_lock — rows: locked memory is in memory, and stays there. */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "operations.h"

static void must_stay(const struct area *area, size_t first, size_t count, const char *when)
{
	size_t present = pages_present(area_page(area, first), count);

	must(present == count, "%s: %zu of %zu locked pages are present", when, present, count);
	page_out_try();
	present = pages_present(area_page(area, first), count);
	must(present == count, "%s: %zu of %zu locked pages are left after eviction was tried", when, present,
	     count);
}

static void lock_mlock(void)
{
	struct area area = area_make(AREA_PAGES);

	must_call(mlock(area.at, area.pages * PAGE) == 0, "mlock");
	must_stay(&area, 0, area.pages, "mlock");
	area_check(&area, 0, area.pages, 0, "locked");
	area_write(&area, 0, HALF, 1);
	must_call(munlock(area.at, area.pages * PAGE) == 0, "munlock");
	page_out(area.at, area.pages);
	area_check(&area, 0, HALF, 1, "unlocked, out and back");
	area_check(&area, HALF, HALF, 0, "unlocked, out and back");
	area_free(&area);
}

static void lock_mlock_part(void)
{
	struct area area = area_make(AREA_PAGES);

	must_call(mlock(area_page(&area, PART), PART * PAGE) == 0, "mlock");
	must_stay(&area, PART, PART, "mlock");
	page_out(area.at, PART);
	page_out(area_page(&area, 2 * PART), PART);
	area_check(&area, 0, area.pages, 0, "locked and not locked");
	must_call(munmap(area_page(&area, PART), PART * PAGE) == 0, "munmap");
	area_check(&area, 0, PART, 0, "below");
	area_check(&area, 2 * PART, PART, 0, "above");
	area_free(&area);
}

static void lock_on_fault(void)
{
	struct area area = area_make(AREA_PAGES);

	must_call(mlock2(area.at, area.pages * PAGE, MLOCK_ONFAULT) == 0, "mlock2");
	area_check(&area, 0, HALF, 0, "locked on fault");
	must_stay(&area, 0, HALF, "locked on fault");
	area_check(&area, 0, area.pages, 0, "all of it");
	must_call(munlock(area.at, area.pages * PAGE) == 0, "munlock");
	area_free(&area);
}

static void lock_map_locked(void)
{
	struct area area = area_make(AREA_PAGES);
	struct area locked = { .pages = AREA_PAGES, .seed = area.seed };

	locked.at = mmap(NULL, locked.pages * PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);
	must_call(locked.at != MAP_FAILED, "mmap");
	area_write(&locked, 0, locked.pages, 0);
	must_stay(&locked, 0, locked.pages, "MAP_LOCKED");
	area_check(&locked, 0, locked.pages, 0, "locked");
	area_free(&locked);
	/* Over memory that is out */
	locked.at = mmap(area.at, area.pages * PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED | MAP_FIXED, -1, 0);
	must_call(locked.at == area.at, "mmap over it");
	check_zeros(area.at, area.pages, "mapped over, locked");
	must_stay(&area, 0, area.pages, "MAP_LOCKED over it");
	area_free(&area);
}

/* Locks do not survive fork: the child's pages may go out. */
static void lock_and_fork(void)
{
	struct area area = area_make(AREA_PAGES);
	pid_t pid;

	must_call(mlock(area.at, area.pages * PAGE) == 0, "mlock");
	pid = fork();
	must_call(pid >= 0, "fork");
	if (pid == 0) {
		area_check(&area, 0, area.pages, 0, "child");
		area_write(&area, 0, HALF, 1);
		page_out_try();
		area_check(&area, 0, HALF, 1, "child, its own");
		area_check(&area, HALF, HALF, 0, "child, shared");
		child_done();
	}
	wait_for(pid, 0, "child");
	must_stay(&area, 0, area.pages, "parent");
	area_check(&area, 0, area.pages, 0, "parent");
	area_free(&area);
}

static void lock_all_current(void)
{
	struct area area = area_make(AREA_PAGES), later;

	must_call(mlockall(MCL_CURRENT) == 0, "mlockall");
	must_stay(&area, 0, area.pages, "mlockall");
	area_check(&area, 0, area.pages, 0, "locked");
	later = area_make(AREA_PAGES);
	area_check(&later, 0, later.pages, 0, "mapped later");
	must_call(munlockall() == 0, "munlockall");
	page_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 0, "unlocked, out and back");
	area_free(&area);
}

static void lock_all_future(void)
{
	struct area area = area_make(AREA_PAGES), later;
	pid_t pid;

	must_call(mlockall(MCL_CURRENT | MCL_FUTURE) == 0, "mlockall");
	must_stay(&area, 0, area.pages, "mlockall");
	later = area_make_resident(AREA_PAGES);
	must_stay(&later, 0, later.pages, "mapped after mlockall");
	area_check(&area, 0, area.pages, 0, "locked");
	pid = fork();
	must_call(pid >= 0, "fork");
	if (pid == 0) {
		area_check(&later, 0, later.pages, 0, "child");
		page_out_try();
		area_check(&later, 0, later.pages, 0, "child, after eviction was tried");
		child_done();
	}
	wait_for(pid, 0, "child");
	must_call(munlockall() == 0, "munlockall");
	page_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 0, "unlocked, out and back");
	area_free(&later);
	area_free(&area);
}

static void lock_all_on_fault(void)
{
	struct area area = area_make(AREA_PAGES);

	must_call(mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0, "mlockall");
	area_check(&area, 0, area.pages, 0, "locked on fault");
	must_stay(&area, 0, area.pages, "locked on fault");
	area_check(&area, 0, area.pages, 0, "after eviction was tried");
	must_call(munlockall() == 0, "munlockall");
	area_free(&area);
}

const struct row lock_rows[] = {
	{ "mlock", lock_mlock, 0 },
	{ "mlock_part", lock_mlock_part, 0 },
	{ "mlock_on_fault", lock_on_fault, 0 },
	{ "map_locked", lock_map_locked, 0 },
	{ "mlock_and_fork", lock_and_fork, 0 },
	{ "mlockall_current", lock_all_current, ROW_OWN },
	{ "mlockall_future", lock_all_future, ROW_OWN },
	{ "mlockall_on_fault", lock_all_on_fault, ROW_OWN },
	{ NULL, NULL, 0 },
};
