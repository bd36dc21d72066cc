/* SPDX-License-Identifier: MIT */
/* operations_map — rows: mappings that go, move, grow, and change their protection. */
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "operations.h"
#include "operations_internal.h"

/* Map anew at an address that was unmapped: nothing of what was there may show. */
static void map_again(void *at, size_t pages)
{
	void *got = mmap(at, pages * PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	must_call(got == at, "mmap again");
	check_zeros(at, pages, "mapped again");
}

static void munmap_whole(void)
{
	struct area area = area_make(AREA_PAGES);

	area_free(&area);
	map_again(area.at, area.pages);
	area_write(&area, 0, area.pages, 1);
	page_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 1, "new content, out and back");
	area_free(&area);
}

static void munmap_parts(size_t first, size_t count)
{
	struct area area = area_make(AREA_PAGES);

	must_call(munmap(area_page(&area, first), count * PAGE) == 0, "munmap");
	area_check(&area, 0, first, 0, "below the gap");
	area_check(&area, first + count, area.pages - first - count, 0, "above the gap");
	map_again(area_page(&area, first), count);
	area_write(&area, first, count, 1);
	page_out(area.at, area.pages);
	area_check(&area, first, count, 1, "in the gap, out and back");
	area_check(&area, 0, first, 0, "below the gap, out and back");
	area_check(&area, first + count, area.pages - first - count, 0, "above the gap, out and back");
	area_free(&area);
}

static void munmap_start(void) { munmap_parts(0, PART); }
static void munmap_end(void) { munmap_parts(AREA_PAGES - PART, PART); }
static void munmap_middle(void) { munmap_parts(PART, PART); }

/* ---- mremap ---- */

static void mremap_grow(void)
{
	struct area area = area_make(AREA_PAGES);
	struct area grown = { area.at, area.pages + 16, area.seed };

	/* The inaccessible neighbour leaves its place. */
	must_call(munmap(area_page(&area, area.pages), 16 * PAGE) == 0, "munmap");
	must_call(mremap(area.at, area.pages * PAGE, grown.pages * PAGE, 0) == area.at, "mremap");
	check_zeros(area_page(&grown, area.pages), 16, "what it grew by");
	area_check(&grown, 0, area.pages, 0, "what was there");
	area_write(&grown, area.pages, 16, 1);
	page_out(grown.at, grown.pages);
	area_check(&grown, area.pages, 16, 1, "what it grew by, out and back");
	area_check(&grown, 0, area.pages, 0, "what was there, out and back");
	area_free(&grown);
}

static void mremap_shrink(void)
{
	struct area area = area_make(AREA_PAGES);
	size_t pages = area.pages - PART;

	must_call(mremap(area.at, area.pages * PAGE, pages * PAGE, 0) == area.at, "mremap");
	area_check(&area, 0, pages, 0, "what is left");
	map_again(area_page(&area, pages), PART);
	page_out(area.at, area.pages);
	area_check(&area, 0, pages, 0, "what is left, out and back");
	check_zeros(area_page(&area, pages), PART, "mapped again, out and back");
	area_free(&area);
}

static void mremap_move_and_grow(void)
{
	struct area area = area_make(AREA_PAGES);
	struct area moved = { .pages = 2 * area.pages, .seed = area.seed };

	/* In place it cannot: a neighbour is there. */
	moved.at = mremap(area.at, area.pages * PAGE, moved.pages * PAGE, MREMAP_MAYMOVE);
	must_call(moved.at != MAP_FAILED, "mremap");
	must(moved.at != area.at, "it did not move");
	area_check(&moved, 0, area.pages, 0, "moved");
	check_zeros(area_page(&moved, area.pages), area.pages, "what it grew by");
	map_again(area.at, area.pages);
	page_out(moved.at, moved.pages);
	area_check(&moved, 0, area.pages, 0, "moved, out and back");
	area_free(&moved);
	area_free(&area);
}

#define MAPPINGS_MAX (1UL << 18) /* more than a process may have */
#define SMALL 50UL /* a part that is too small to be managed */

/* Mappings that the kernel makes of it. */
static unsigned count_mappings(const struct area *area)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[512];
	unsigned count = 0;

	must_call(maps != NULL, "open maps");
	while (fgets(line, sizeof line, maps)) {
		uintptr_t start = 0, end = 0;

		must(sscanf(line, "%lx-%lx ", &start, &end) == 2, "maps: %s", line);
		count += start < (uintptr_t)area_page(area, area->pages) && end > (uintptr_t)area->at;
	}
	fclose(maps);
	return count;
}

/* One mapping to the program. Most of it is managed and out, and the rest is not, for it was read-only when it was found. */
static struct area area_make_divided(void)
{
	struct area area = area_map(AREA_PAGES);

	must_call(mprotect(area_page(&area, SMALL / 2), SMALL / 2 * PAGE, PROT_READ) == 0, "mprotect");
	area_write(&area, SMALL, area.pages - SMALL, 0);
	bring_out(area_page(&area, SMALL), area.pages - SMALL);
	must_call(mprotect(area_page(&area, SMALL / 2), SMALL / 2 * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
	area_write(&area, 0, SMALL, 0);
	if (is_managed() && backing != BACKING_RESIDENT)
		must(count_mappings(&area) == 2, "it is in %u parts", count_mappings(&area));
	return area;
}

static void mremap_divided_grow(void)
{
	struct area area = area_make_divided();
	struct area grown = { area.at, area.pages + 16, area.seed }, moved = { .pages = 2 * grown.pages, .seed = area.seed };

	must_call(munmap(area_page(&area, area.pages), 16 * PAGE) == 0, "munmap");
	must_call(mremap(area.at, area.pages * PAGE, grown.pages * PAGE, 0) == area.at, "mremap");
	check_zeros(area_page(&grown, area.pages), 16, "what it grew by");
	area_write(&grown, area.pages, 16, 0);
	must(mremap(area.at, grown.pages * PAGE, moved.pages * PAGE, 0) == MAP_FAILED && errno == ENOMEM,
	     "it may not move, and did");
	moved.at = mremap(area.at, grown.pages * PAGE, moved.pages * PAGE, MREMAP_MAYMOVE);
	must_call(moved.at != MAP_FAILED, "mremap");
	area_check(&moved, 0, grown.pages, 0, "moved");
	check_zeros(area_page(&moved, grown.pages), grown.pages, "what it grew by");
	map_again(area.at, grown.pages);
	page_out(area_page(&moved, SMALL), moved.pages - SMALL);
	area_check(&moved, 0, grown.pages, 0, "moved, out and back");
	area_free(&moved);
	area_free(&grown);
}

/* All of it, then the first half. */
static void mremap_divided_fixed(void)
{
	struct area area = area_make_divided(), target = area_make(AREA_PAGES), half = area_make(HALF);
	struct area moved = { target.at, area.pages, area.seed };
	size_t bytes = area.pages * PAGE;

	must(mremap(area.at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, area_page(&area, 1)) == MAP_FAILED &&
		     errno == EINVAL,
	     "moved onto itself");
	must_call(mremap(area.at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, target.at) == target.at, "mremap");
	area_check(&moved, 0, moved.pages, 0, "moved");
	map_again(area.at, area.pages);
	must_call(mremap(moved.at, bytes, HALF * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, half.at) == half.at, "mremap");
	area_check_at(&area, 0, HALF, 0, half.at, "moved, half of it");
	map_again(moved.at, moved.pages);
	page_out(area_page(&half, SMALL), half.pages - SMALL);
	area_check_at(&area, 0, HALF, 0, half.at, "moved, out and back");
	area_free(&half);
	area_free(&moved);
	area_free(&area);
}

static void mremap_divided_dontunmap(void)
{
	struct area area = area_make_divided();
	struct area moved = { .pages = area.pages, .seed = area.seed };

	moved.at = mremap(area.at, area.pages * PAGE, area.pages * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	must_call(moved.at != MAP_FAILED, "mremap");
	check_zeros(area.at, area.pages, "the old place");
	area_check(&moved, 0, moved.pages, 0, "the new place");
	area_write(&area, 0, area.pages, 1);
	page_out(area_page(&moved, SMALL), moved.pages - SMALL);
	area_check(&area, 0, area.pages, 1, "the old place");
	area_check(&moved, 0, moved.pages, 0, "the new place, out and back");
	area_free(&moved);
	area_free(&area);
}

/* With so few mappings left to the process that it is refused, at one piece or the other: all of it stays where it is. */
static void mremap_divided_refused(void)
{
	struct area whole = area_make_divided(), target = area_map(AREA_PAGES);
	struct area area = { whole.at, whole.pages - 8, whole.seed }; /* so that a mapping has to be split */
	size_t bytes = area.pages * PAGE, room = MAPPINGS_MAX * PAGE;
	uint8_t *filler = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	size_t filled = 0, refused = 0;
	void *moved;

	must_call(filler != MAP_FAILED, "mmap");
	while (filled < MAPPINGS_MAX && mprotect(filler + filled * PAGE, PAGE, PROT_READ) == 0)
		filled += 2;
	must(filled < MAPPINGS_MAX && errno == ENOMEM, "there is no limit");
	for (;;) {
		moved = mremap(area.at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, target.at);
		if (moved != MAP_FAILED)
			break;
		must(errno == ENOMEM, "mremap: %s", strerror(errno));
		area_check(&whole, 0, whole.pages, 0, "refused");
		must(++refused < filled, "never granted");
		filled -= 2;
		must_call(mprotect(filler + filled * PAGE, PAGE, PROT_NONE) == 0, "mprotect");
	}
	must_call(munmap(filler, room) == 0, "munmap");
	must(refused > 1, "refused %zu times", refused);
	must(moved == target.at, "moved to %p", moved);
	area_check_at(&area, 0, area.pages, 0, target.at, "granted");
	area_check(&whole, area.pages, 8, 0, "what stayed");
	area_free(&target);
}

/* Onto an area whose own pages are out: they are gone. */
static void mremap_fixed(void)
{
	struct area area = area_make(AREA_PAGES), target = area_make(AREA_PAGES);
	struct area moved = { target.at, area.pages, area.seed };

	must_call(mremap(area.at, area.pages * PAGE, area.pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			 target.at) == target.at,
		  "mremap");
	area_check(&moved, 0, moved.pages, 0, "moved");
	map_again(area.at, area.pages);
	page_out(moved.at, moved.pages);
	area_check(&moved, 0, moved.pages, 0, "moved, out and back");
	area_free(&moved);
	area_free(&area);
}

static void mremap_fixed_part(void)
{
	struct area area = area_make(AREA_PAGES), target = area_make(AREA_PAGES);

	must_call(mremap(area_page(&area, PART), PART * PAGE, PART * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			 area_page(&target, 5)) == area_page(&target, 5),
		  "mremap");
	area_check(&target, 0, 5, 0, "target, below");
	area_check_at(&area, PART, PART, 0, area_page(&target, 5), "moved");
	area_check(&target, 5 + PART, target.pages - PART - 5, 0, "target, above");
	area_check(&area, 0, PART, 0, "source, below");
	area_check(&area, 2 * PART, PART, 0, "source, above");
	map_again(area_page(&area, PART), PART);
	page_out(target.at, target.pages);
	area_check_at(&area, PART, PART, 0, area_page(&target, 5), "moved, out and back");
	area_free(&area);
	area_free(&target);
}

static void mremap_dontunmap(void)
{
	struct area area = area_make(AREA_PAGES);
	struct area moved = { .pages = area.pages, .seed = area.seed };

	moved.at = mremap(area.at, area.pages * PAGE, area.pages * PAGE,
			  MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	must_call(moved.at != MAP_FAILED, "mremap");
	check_zeros(area.at, area.pages, "the old place");
	area_check(&moved, 0, moved.pages, 0, "the new place");
	area_write(&area, 0, area.pages, 1);
	page_out(area.at, area.pages);
	page_out(moved.at, moved.pages);
	area_check(&area, 0, area.pages, 1, "the old place, out and back");
	area_check(&moved, 0, moved.pages, 0, "the new place, out and back");
	area_free(&moved);
	area_free(&area);
}

static void mremap_there_and_back(void)
{
	struct area area = area_make(AREA_PAGES), other = area_map(AREA_PAGES);
	size_t bytes = area.pages * PAGE;

	for (unsigned i = 0; i < 3; i++) {
		must_call(mremap(area.at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, other.at) ==
				  other.at, "mremap there");
		must_call(mremap(other.at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, area.at) ==
				  area.at, "mremap back");
	}
	area_check(&area, 0, area.pages, 0, "back");
	page_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 0, "out and back");
	area_free(&area);
}

/* ---- mmap over it ---- */

static void map_fixed_over(void)
{
	struct area area = area_make(AREA_PAGES);

	must_call(mmap(area_page(&area, 10), PART * PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == area_page(&area, 10),
		  "mmap over it");
	check_zeros(area_page(&area, 10), PART, "mapped over");
	area_check(&area, 0, 10, 0, "below");
	area_check(&area, 10 + PART, area.pages - PART - 10, 0, "above");
	area_write(&area, 10, PART, 1);
	page_out(area.at, area.pages);
	area_check(&area, 10, PART, 1, "mapped over, out and back");
	area_free(&area);
}

static void map_file_over(void)
{
	struct area area = area_make(AREA_PAGES);
	uint8_t content[PAGE];
	int fd = memfd_create("operations", MFD_CLOEXEC);

	must_call(fd >= 0 && ftruncate(fd, PART * PAGE) == 0, "memfd");
	area_content(&area, 0, 9, content);
	must_call(pwrite(fd, content, PAGE, 0) == (ssize_t)PAGE, "pwrite");
	must_call(mmap(area_page(&area, 10), PART * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
		       0) == area_page(&area, 10),
		  "mmap over it");
	page_out_try();
	must(memcmp(area_page(&area, 10), content, PAGE) == 0, "the file does not show");
	check_zeros(area_page(&area, 11), PART - 1, "the file's hole");
	area_check(&area, 0, 10, 0, "below");
	area_check(&area, 10 + PART, area.pages - PART - 10, 0, "above");
	area_free(&area);
	close(fd);
}

/* ---- brk ---- */

static void brk_up_and_down(void)
{
	struct area area = { .pages = AREA_PAGES, .seed = 4711 };
	uintptr_t end = (uintptr_t)sbrk(0);

	must_call(sbrk((intptr_t)(-end % PAGE)) != (void *)-1, "sbrk");
	area.at = sbrk((intptr_t)(area.pages * PAGE));
	must_call(area.at != (void *)-1, "sbrk up");
	area_write(&area, 0, area.pages, 0);
	bring_out(area.at, area.pages);
	must_call(sbrk(-(intptr_t)(HALF * PAGE)) != (void *)-1, "sbrk down");
	area_check(&area, 0, HALF, 0, "what is left");
	must_call(sbrk((intptr_t)(HALF * PAGE)) != (void *)-1, "sbrk up again");
	check_zeros(area_page(&area, HALF), HALF, "up again");
	area_write(&area, HALF, HALF, 1);
	page_out(area.at, area.pages);
	area_check(&area, 0, HALF, 0, "what was left, out and back");
	area_check(&area, HALF, HALF, 1, "up again, out and back");
	must_call(sbrk(-(intptr_t)(area.pages * PAGE)) != (void *)-1, "sbrk down");
}

/* ---- protection ---- */

static sigjmp_buf fault_return;
static volatile uintptr_t fault_address;

static void fault_handler(int signal, siginfo_t *info, void *context)
{
	(void)signal;
	(void)context;
	fault_address = (uintptr_t)info->si_addr;
	siglongjmp(fault_return, 1);
}

/* Whether an access ends in SIGSEGV there. */
static bool faults(volatile uint8_t *at, bool writes)
{
	struct sigaction action = { .sa_sigaction = fault_handler, .sa_flags = SA_SIGINFO }, before;
	bool volatile faulted = true;

	sigaction(SIGSEGV, &action, &before);
	if (sigsetjmp(fault_return, 1) == 0) {
		if (writes)
			*at = 1;
		else
			(void)*at;
		faulted = false;
	}
	sigaction(SIGSEGV, &before, NULL);
	return faulted && fault_address == (uintptr_t)at;
}

static void mprotect_none_and_back(void)
{
	struct area area = area_make(AREA_PAGES);

	must_call(mprotect(area.at, area.pages * PAGE, PROT_NONE) == 0, "mprotect");
	must(faults(area_page(&area, 1), false), "inaccessible memory can be read");
	page_out_try();
	must_call(mprotect(area.at, area.pages * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
	area_check(&area, 0, area.pages, 0, "accessible again");
	area_write(&area, 0, HALF, 1);
	page_out(area.at, area.pages);
	area_check(&area, 0, HALF, 1, "written, out and back");
	area_check(&area, HALF, HALF, 0, "out and back");
	area_free(&area);
}

static void mprotect_read_only(void)
{
	struct area area = area_make(AREA_PAGES);

	must_call(mprotect(area_page(&area, 10), 40 * PAGE, PROT_READ) == 0, "mprotect");
	page_out_try();
	must(faults(area_page(&area, 11), true), "read-only memory can be written");
	area_check(&area, 0, area.pages, 0, "read-only");
	page_out_try();
	area_check(&area, 10, 40, 0, "read-only, after eviction was tried");
	must_call(mprotect(area_page(&area, 10), 40 * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
	area_write(&area, 10, 40, 1);
	page_out(area.at, area.pages);
	area_check(&area, 10, 40, 1, "writable again, out and back");
	area_check(&area, 0, 10, 0, "below");
	area_free(&area);
}

static void mprotect_rwx(void)
{
	static const uint8_t function[] = { 0xb8, 42, 0, 0, 0, 0xc3 }; /* mov $42, %eax; ret */
	struct area area = area_make(AREA_PAGES);
	int (*call)(void);

	must_call(mprotect(area.at, area.pages * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC) == 0, "mprotect");
	area_check(&area, 0, area.pages, 0, "executable");
	memcpy(area_page(&area, 7) + 64, function, sizeof function);
	page_out(area.at, area.pages);
	{
		uintptr_t address = (uintptr_t)area_page(&area, 7) + 64;

		memcpy(&call, &address, sizeof call);
	}
#if defined(__x86_64__)
	must(call() == 42, "code that was out does something else");
#endif
	area_check(&area, 8, area.pages - 8, 0, "executable, out and back");
	area_free(&area);
}

const struct row map_rows[] = {
	{ "munmap_whole", munmap_whole, 0 },
	{ "munmap_start", munmap_start, 0 },
	{ "munmap_end", munmap_end, 0 },
	{ "munmap_middle", munmap_middle, 0 },
	{ "mremap_grow", mremap_grow, 0 },
	{ "mremap_shrink", mremap_shrink, 0 },
	{ "mremap_move_and_grow", mremap_move_and_grow, 0 },
	{ "mremap_divided_grow", mremap_divided_grow, 0 },
	{ "mremap_divided_fixed", mremap_divided_fixed, 0 },
	{ "mremap_divided_dontunmap", mremap_divided_dontunmap, 0 },
	{ "mremap_divided_refused", mremap_divided_refused, ROW_OWN },
	{ "mremap_fixed", mremap_fixed, 0 },
	{ "mremap_fixed_part", mremap_fixed_part, 0 },
	{ "mremap_dontunmap", mremap_dontunmap, 0 },
	{ "mremap_there_and_back", mremap_there_and_back, 0 },
	{ "map_fixed_over", map_fixed_over, 0 },
	{ "map_file_over", map_file_over, 0 },
	{ "brk", brk_up_and_down, 0 },
	{ "mprotect_none_and_back", mprotect_none_and_back, 0 },
	{ "mprotect_read_only", mprotect_read_only, 0 },
	{ "mprotect_rwx", mprotect_rwx, 0 },
	{ NULL, NULL, 0 },
};
