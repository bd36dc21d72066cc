/* SPDX-License-Identifier: MIT */
/* operations_advice — rows: madvise and process_madvise, each on pages that are out. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "operations.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define HUGE_PAGES 512UL

static void advise(const struct area *area, size_t first, size_t count, int advice)
{
	must_call(madvise(area_page(area, first), count * PAGE, advice) == 0, "madvise");
}

/* ---- what gives memory up ---- */

static void madvise_dontneed(void)
{
	struct area area = area_make(AREA_PAGES);

	advise(&area, 0, area.pages, MADV_DONTNEED);
	check_zeros(area.at, area.pages, "after DONTNEED");
	area_write(&area, 0, area.pages, 1);
	page_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 1, "written again, out and back");
	advise(&area, 0, area.pages, MADV_DONTNEED);
	page_out(area.at, area.pages);
	check_zeros(area.at, area.pages, "DONTNEED again, out and back");
	area_free(&area);
}

static void madvise_dontneed_part(void)
{
	struct area area = area_make(AREA_PAGES);

	advise(&area, 10, 20, MADV_DONTNEED);
	area_write(&area, 20, 5, 1);
	page_out(area.at, area.pages);
	area_check(&area, 0, 10, 0, "below");
	check_zeros(area_page(&area, 10), 10, "after DONTNEED");
	area_check(&area, 20, 5, 1, "written again");
	check_zeros(area_page(&area, 25), 5, "after DONTNEED");
	area_check(&area, 30, area.pages - 30, 0, "above");
	area_free(&area);
}

/* After FREE each page is what it was or zeros, and stays that. */
static void check_freed(const struct area *area, size_t first, size_t count, unsigned version)
{
	static const uint8_t zeros[PAGE];

	for (size_t i = first; i < first + count; i++)
		if (memcmp(area_page(area, i), zeros, PAGE) != 0)
			area_check(area, i, 1, version, "after FREE, neither old nor zeros");
}

static void madvise_free(void)
{
	struct area area = area_make(AREA_PAGES);

	advise(&area, 0, HALF, MADV_FREE);
	check_freed(&area, 0, HALF, 0);
	area_check(&area, HALF, HALF, 0, "the rest");
	page_out_try();
	check_freed(&area, 0, HALF, 0);
	area_check(&area, HALF, HALF, 0, "the rest, after eviction was tried");
	area_free(&area);
}

/* As jemalloc and Go do: given up, used again without a system call, given up again. */
static void madvise_free_reuse(void)
{
	struct area area = area_make(AREA_PAGES);

	for (unsigned round = 1; round <= 4; round++) {
		advise(&area, 0, area.pages, round % 2 ? MADV_FREE : MADV_DONTNEED);
		area_write(&area, 0, HALF, round);
		page_out_try();
		area_check(&area, 0, HALF, round, "used again");
		if (round % 2 == 0)
			check_zeros(area_page(&area, HALF), HALF, "not used again");
		area_write(&area, HALF, HALF, round);
		page_out_try();
		area_check(&area, 0, area.pages, round, "all used again");
	}
	area_free(&area);
}

/* ---- what only says when ---- */

static void advice_without_effect(int advice, const char *when)
{
	struct area area = area_make(AREA_PAGES);

	advise(&area, 0, area.pages, advice);
	area_check(&area, 0, HALF, 0, when);
	page_out_try();
	area_write(&area, 0, HALF, 1);
	advise(&area, 0, area.pages, advice);
	page_out(area.at, area.pages);
	area_check(&area, 0, HALF, 1, when);
	area_check(&area, HALF, HALF, 0, when);
	area_free(&area);
}

static void madvise_willneed(void) { advice_without_effect(MADV_WILLNEED, "after WILLNEED"); }
static void madvise_cold(void) { advice_without_effect(MADV_COLD, "after COLD"); }
static void madvise_pageout(void) { advice_without_effect(MADV_PAGEOUT, "after PAGEOUT"); }
static void madvise_random(void) { advice_without_effect(MADV_RANDOM, "after RANDOM"); }
static void madvise_sequential(void) { advice_without_effect(MADV_SEQUENTIAL, "after SEQUENTIAL"); }
static void madvise_dontdump(void) { advice_without_effect(MADV_DONTDUMP, "after DONTDUMP"); }

static void populate(int advice, const char *when)
{
	struct area area = area_make(AREA_PAGES), fresh = area_map(AREA_PAGES);

	advise(&area, 0, area.pages, advice);
	area_check(&area, 0, area.pages, 0, when);
	page_out(area.at, area.pages);
	advise(&area, 3, 90, advice);
	area_check(&area, 0, area.pages, 0, when);
	page_out_try(); /* and so registers what is new */
	advise(&fresh, 0, fresh.pages, advice);
	check_zeros(fresh.at, fresh.pages, when);
	area_free(&fresh);
	area_free(&area);
}

static void madvise_populate_read(void) { populate(MADV_POPULATE_READ, "after POPULATE_READ"); }
static void madvise_populate_write(void) { populate(MADV_POPULATE_WRITE, "after POPULATE_WRITE"); }

/* ---- fork ---- */

static void check_in_child(const struct area *wiped, const struct area *other)
{
	pid_t pid = fork();

	must_call(pid >= 0, "fork");
	if (pid == 0) {
		check_zeros(wiped->at, wiped->pages, "child, what must be wiped");
		area_check(other, 0, other->pages, 0, "child, the neighbour");
		area_write(wiped, 0, HALF, 1);
		page_out_try();
		area_check(wiped, 0, HALF, 1, "child, its own");
		check_zeros(area_page(wiped, HALF), wiped->pages - HALF, "child, the rest of what was wiped");
		child_done();
	}
	wait_for(pid, 0, "child");
	area_check(wiped, 0, wiped->pages, 0, "parent");
	area_check(other, 0, other->pages, 0, "parent, the neighbour");
}

static void madvise_wipeonfork(void)
{
	struct area area = area_make_resident(AREA_PAGES), other = area_make(AREA_PAGES);

	advise(&area, 0, area.pages, MADV_WIPEONFORK);
	bring_out(other.at, other.pages);
	page_out_try(); /* whether it goes out is the daemon's business */
	check_in_child(&area, &other);
	area_free(&area);
	area_free(&other);
}

static void madvise_wipeonfork_while_out(void)
{
	struct area area = area_make(AREA_PAGES), other = area_make(AREA_PAGES);

	advise(&area, 0, area.pages, MADV_WIPEONFORK);
	check_in_child(&area, &other);
	page_out_try();
	check_in_child(&area, &other);
	advise(&area, 0, area.pages, MADV_KEEPONFORK);
	page_out_try();
	area_check(&area, 0, area.pages, 0, "kept again");
	area_free(&area);
	area_free(&other);
}

/* What is resident has never been out. */
static void madvise_wipeonfork_half_out(void)
{
	struct area area = area_map(AREA_PAGES), other = area_map(AREA_PAGES);

	area_write(&area, 0, HALF, 0);
	area_write(&other, 0, HALF, 0);
	bring_out(area.at, HALF);
	bring_out(other.at, HALF);
	area_write(&area, HALF, area.pages - HALF, 0);
	area_write(&other, HALF, other.pages - HALF, 0);
	advise(&area, 0, area.pages, MADV_WIPEONFORK);
	check_in_child(&area, &other);
	area_free(&area);
	area_free(&other);
}

static void madvise_dontfork(void)
{
	struct area area = area_make(AREA_PAGES), other = area_make(AREA_PAGES);
	pid_t pid;

	advise(&area, 0, area.pages, MADV_DONTFORK);
	pid = fork();
	must_call(pid >= 0, "fork");
	if (pid == 0) {
		void *got = mmap(area.at, area.pages * PAGE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

		must_call(got == area.at, "child, mmap where nothing was inherited");
		check_zeros(area.at, 4, "child, mapped anew");
		area_write(&area, 0, HALF, 1);
		page_out(area.at, HALF);
		area_check(&area, 0, HALF, 1, "child, its own");
		check_zeros(area_page(&area, HALF), HALF, "child, the rest of its own");
		area_check(&other, 0, other.pages, 0, "child, the neighbour");
		child_done();
	}
	wait_for(pid, 0, "child");
	area_check(&area, 0, area.pages, 0, "parent");
	area_free(&area);
	area_free(&other);
}

/* ---- huge pages ---- */

static struct area huge_area(void)
{
	struct area area = area_map(3 * HUGE_PAGES);

	area.at = (uint8_t *)(((uintptr_t)area.at + HUGE_PAGES * PAGE - 1) & ~(HUGE_PAGES * PAGE - 1));
	area.pages = HUGE_PAGES;
	return area;
}

static void madvise_hugepage(void)
{
	struct area area = huge_area();

	area_write(&area, 0, area.pages, 0);
	bring_out(area.at, area.pages);
	/* Not every kernel has huge pages: the content is what counts. */
	(void)madvise(area.at, area.pages * PAGE, MADV_HUGEPAGE);
	area_check(&area, 0, HALF, 0, "after HUGEPAGE");
	page_out(area.at, area.pages);
	(void)madvise(area.at, area.pages * PAGE, MADV_NOHUGEPAGE);
	area_check(&area, 0, area.pages, 0, "after NOHUGEPAGE");
	area_free(&area);
}

static void madvise_hugepage_first(void)
{
	struct area area = huge_area();

	(void)madvise(area.at, area.pages * PAGE, MADV_HUGEPAGE);
	area_write(&area, 0, area.pages, 0);
	bring_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 0, "huge pages, out and back");
	area_free(&area);
}

static void madvise_collapse(void)
{
	struct area area = huge_area();

	area_write(&area, 0, area.pages, 0);
	bring_out(area.at, area.pages);
	(void)madvise(area.at, area.pages * PAGE, MADV_COLLAPSE);
	area_check(&area, 0, area.pages, 0, "after COLLAPSE");
	(void)madvise(area.at, area.pages * PAGE, MADV_COLLAPSE);
	page_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 0, "collapsed, out and back");
	area_free(&area);
}

/* ---- process_madvise ---- */

static void process_madvise_self(void)
{
	static const int advices[] = { MADV_WILLNEED, MADV_COLD, MADV_PAGEOUT, MADV_COLLAPSE };
	struct area area = area_make(AREA_PAGES);
	struct iovec parts[2] = { { area.at, 20 * PAGE }, { area_page(&area, 90), 30 * PAGE } };
	int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);

	must_call(pidfd >= 0, "pidfd_open");
	for (size_t i = 0; i < sizeof advices / sizeof *advices; i++) {
		long done = syscall(SYS_process_madvise, pidfd, parts, 2, advices[i], 0);

		must_call(done > 0 || advices[i] == MADV_COLLAPSE, "process_madvise");
		area_check(&area, 0, area.pages, 0, "after process_madvise");
		page_out(area.at, area.pages);
	}
	area_check(&area, 0, area.pages, 0, "out and back");
	/* A process may do so to itself, from Linux 6.13 on. */
	if (syscall(SYS_process_madvise, pidfd, parts, 2, MADV_DONTNEED, 0) > 0) {
		check_zeros(area.at, 20, "after DONTNEED, first part");
		check_zeros(area_page(&area, 90), 30, "after DONTNEED, second part");
		area_check(&area, 20, 70, 0, "between the parts");
		area_check(&area, 120, area.pages - 120, 0, "behind the parts");
	}
	close(pidfd);
	area_free(&area);
}

static void process_madvise_other(void)
{
	struct area area = area_make(AREA_PAGES);
	struct iovec whole = { area.at, area.pages * PAGE };
	pid_t parent = getpid(), pid = fork();

	must_call(pid >= 0, "fork");
	if (pid == 0) {
		int pidfd = (int)syscall(SYS_pidfd_open, parent, 0);

		must_call(pidfd >= 0, "pidfd_open");
		must_call(syscall(SYS_process_madvise, pidfd, &whole, 1, MADV_PAGEOUT, 0) > 0,
			  "process_madvise");
		child_done();
	}
	wait_for(pid, 0, "child");
	area_check(&area, 0, area.pages, 0, "after process_madvise of a child");
	area_free(&area);
}

const struct row advice_rows[] = {
	{ "madvise_dontneed", madvise_dontneed, 0 },
	{ "madvise_dontneed_part", madvise_dontneed_part, 0 },
	{ "madvise_free", madvise_free, 0 },
	{ "madvise_free_reuse", madvise_free_reuse, 0 },
	{ "madvise_willneed", madvise_willneed, 0 },
	{ "madvise_cold", madvise_cold, 0 },
	{ "madvise_pageout", madvise_pageout, 0 },
	{ "madvise_random", madvise_random, 0 },
	{ "madvise_sequential", madvise_sequential, 0 },
	{ "madvise_dontdump", madvise_dontdump, 0 },
	{ "madvise_populate_read", madvise_populate_read, 0 },
	{ "madvise_populate_write", madvise_populate_write, 0 },
	{ "madvise_wipeonfork", madvise_wipeonfork, 0 },
	{ "madvise_wipeonfork_while_out", madvise_wipeonfork_while_out, 0 },
	{ "madvise_wipeonfork_half_out", madvise_wipeonfork_half_out, 0 },
	{ "madvise_dontfork", madvise_dontfork, 0 },
	{ "madvise_hugepage", madvise_hugepage, 0 },
	{ "madvise_hugepage_first", madvise_hugepage_first, 0 },
	{ "madvise_collapse", madvise_collapse, 0 },
	{ "process_madvise_self", process_madvise_self, 0 },
	{ "process_madvise_other", process_madvise_other, 0 },
	{ NULL, NULL, 0 },
};
