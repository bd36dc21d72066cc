/* SPDX-License-Identifier: MIT */
/*
 * shelve — see shelve.h.
 *
 * What must hold: between the copy of a mapping and its replacement nothing writes to it. There is one thread, its signals are
 * blocked, and what it touches meanwhile is its stack and, for errno and the kernel's own notes about the thread (rseq, robust
 * list), the mapping of its thread control block. Both are left out.
 */
#define _GNU_SOURCE
#include "shelve.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base.h"
#include "limits.h"
#include "sys.h"

#define RANGES_MAX 256
#define RANGE_BYTES_MIN (128UL << 10) /* smaller ones are not worth a mapping */
#define RANGE_BYTES_MAX (1UL << 30)   /* no interpreter's, but a sanitizer's shadow */
#define RUN_PAGES_MAX 512
#define REST_LOOKS 2u
#define DONTNEED_LOCKED 24 /* MADV_DONTNEED_LOCKED */
#define PAGE_OF_FILE (5ULL << 61) /* pagemap: present, and of a file or shared */

struct shelf_range {
	uint64_t start, end;
	bool is_of_file; /* now: what is not in memory is no hole */
};

/* Where memory was shelved; a fork's child has the same. Some of it may be unmapped by now. */
static struct shelf_range shelf[RANGES_MAX];
static int shelf_count;
static unsigned long shelf_inode;
static bool is_locked; /* all that is mapped from now on, until it is unlocked */

static bool holds(const struct shelf_range *range, const void *address)
{
	return (uintptr_t)address >= range->start && (uintptr_t)address < range->end;
}

/* One line of /proc/self/maps. */
struct own_mapping {
	struct shelf_range range;
	char protection[5];
	unsigned long inode; /* 0: of no file */
	bool is_named; /* by the kernel: a stack, its own pages */
	bool is_interpreter; /* its code, or what that refers to */
};

static bool mapping_read(const char *line, struct own_mapping *ret)
{
	char name[256] = "";
	unsigned long start, end;
	int fields = sscanf(line, "%lx-%lx %4s %*s %*s %lu %255s", &start, &end, ret->protection, &ret->inode, name);
	const char *file = strrchr(name, '/');

	ret->range = (struct shelf_range){ start, end, ret->inode != 0 };
	ret->is_named = name[0] == '[' && strcmp(name, "[heap]") != 0;
	ret->is_interpreter = file && (strncmp(file, "/python", 7) == 0 || strncmp(file, "/libpython", 10) == 0);
	return fields >= 4;
}

/* Private memory that may be replaced: anonymous, or a program's data? */
static bool is_idle_memory(const struct own_mapping *mapping)
{
	uint64_t bytes = mapping->range.end - mapping->range.start;

	return strcmp(mapping->protection, "rw-p") == 0 && !mapping->is_named &&
	       bytes >= RANGE_BYTES_MIN && bytes <= RANGE_BYTES_MAX &&
	       !holds(&mapping->range, __builtin_thread_pointer()) &&
	       !holds(&mapping->range, __builtin_frame_address(0));
}

/* Shelved, and the interpreter's alone: not the heap, nor what lies below it, the program's own data. */
static bool is_interpreters(const struct own_mapping *mapping)
{
	bool is_shelved = false;

	for (int i = 0; i < shelf_count; i++)
		is_shelved |= mapping->range.start < shelf[i].end && mapping->range.end > shelf[i].start;
	return is_shelved && mapping->inode == shelf_inode && strcmp(mapping->protection, "rw-p") == 0 &&
	       mapping->range.start >= (uintptr_t)sbrk(0);
}

/* Of a file, and nobody writes to it: code, constants, and what the loader has changed in them. */
static bool is_constant(const struct own_mapping *mapping)
{
	return mapping->inode != 0 && mapping->protection[1] == '-' && mapping->protection[3] == 'p';
}

static bool is_interpreter_constant(const struct own_mapping *mapping)
{
	return mapping->is_interpreter && is_constant(mapping);
}

/* The list is complete, and its file closed, before anything is copied. */
static int list_ranges(bool (*is_wanted)(const struct own_mapping *), struct shelf_range ranges[static RANGES_MAX])
{
	FILE *maps = fopen("/proc/self/maps", "re");
	struct own_mapping mapping;
	char line[512];
	int count = 0;

	if (!maps)
		return -errno;
	while (count < RANGES_MAX && fgets(line, sizeof line, maps))
		if (mapping_read(line, &mapping) && is_wanted(&mapping))
			ranges[count++] = mapping.range;
	fclose(maps);
	return count;
}

static bool is_only_thread(void)
{
	struct stat tasks;

	return stat("/proc/self/task", &tasks) == 0 && tasks.st_nlink == 3; /* ".", ".." and one */
}

/*
 * May another thread write to the interpreter's memory, though it has not got its lock? Not the data plane's, nor the kernel's that
 * serve a ring; nor one of trio's that waits for work: it is called so then, and what it waits for is in the heap.
 */
static bool may_be_written(void)
{
	DIR *tasks = opendir("/proc/self/task");
	const struct dirent *task;
	bool found = !tasks;

	while (!found && (task = readdir(tasks))) {
		char path[64], name[17] = "";
		FILE *file;

		if (task->d_name[0] == '.' || atoi(task->d_name) == gettid())
			continue;
		snprintf(path, sizeof path, "/proc/self/task/%.20s/comm", task->d_name);
		file = fopen(path, "re");
		if (!file)
			continue; /* it has ended */
		if (fgets(name, sizeof name, file))
			found = strncmp(name, "vswap-", 6) != 0 && strncmp(name, "iou-", 4) != 0 &&
				strncmp(name, "Trio thread", 11) != 0;
		fclose(file); /* nothing to read: it has just ended */
	}
	if (tasks)
		closedir(tasks);
	return found;
}

static int write_all(int fd, uint64_t address, uint64_t bytes, uint64_t offset)
{
	while (bytes > 0) {
		/* Not pwrite(3): a sanitizer would look at what lies between allocations. */
		long count = syscall(SYS_pwrite64, fd, address, bytes, offset);

		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			return count < 0 ? -errno : -ENOSPC;
		address += (uint64_t)count;
		offset += (uint64_t)count;
		bytes -= (uint64_t)count;
	}
	return 0;
}

/*
 * Copy the pages of a range that are there to `offset` of the file. What was never touched of anonymous memory stays a hole;
 * *ret_end is the end of the last page that is there, behind which the mapping stays what it is.
 */
static int copy_range(int fd, int pagemap_fd, struct shelf_range range, uint64_t offset, uint64_t *ret_end)
{
	uint64_t entries[RUN_PAGES_MAX], pages, i, first;

	*ret_end = range.end;
	if (range.is_of_file)
		return write_all(fd, range.start, range.end - range.start, offset);
	*ret_end = range.start;
	for (uint64_t at = range.start; at < range.end; at += pages * PAGE_BYTES) {
		pages = min_of((range.end - at) / PAGE_BYTES, (uint64_t)RUN_PAGES_MAX);
		if (pread(pagemap_fd, entries, pages * sizeof *entries, (off_t)(at / PAGE_BYTES * sizeof *entries)) !=
		    (ssize_t)(pages * sizeof *entries))
			return -EIO;
		for (i = 0; i < pages; i++) {
			int result;

			for (first = i; i < pages && entries[i] >> 62; i++) /* present or swapped */
				;
			if (i == first)
				continue;
			result = write_all(fd, at + first * PAGE_BYTES, (i - first) * PAGE_BYTES,
					   offset + (at - range.start) + first * PAGE_BYTES);
			if (result < 0)
				return result;
			*ret_end = at + i * PAGE_BYTES;
		}
	}
	return 0;
}

/* Map it from the file, at the same addresses. What it was mapped from is no longer needed. */
static int replace(int fd, struct shelf_range range, uint64_t offset)
{
	void *at = (void *)(uintptr_t)range.start;
	uint64_t bytes = range.end - range.start;

	/* The file has to reach beyond the last page: the rest of a mapping is SIGBUS. It does: that page was written. */
	if (mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, (off_t)offset) != at)
		return -errno;
	if (is_locked)
		(void)munlock(at, bytes);
	(void)madvise(at, bytes, MADV_RANDOM); /* with what lies around it in the page cache that is mapped, too */
	return 0;
}

static int shelve_ranges(int fd, int pagemap_fd, const struct shelf_range *ranges, int count)
{
	uint64_t offset = 0, end;

	for (int i = 0; i < count; i++) {
		int result = copy_range(fd, pagemap_fd, ranges[i], offset, &end);
		struct shelf_range copied = { ranges[i].start, end, true };

		if (result < 0)
			return result;
		if (end - ranges[i].start < RANGE_BYTES_MIN)
			continue;
		result = replace(fd, copied, offset);
		if (result < 0)
			return result;
		shelf[shelf_count++] = copied;
		offset += end - ranges[i].start;
	}
	return (int)(offset >> 20);
}

int shelve_memory(int fd)
{
	struct shelf_range ranges[RANGES_MAX];
	sigset_t all, before;
	struct statfs figures;
	struct stat file;
	int count, result, pagemap_fd;

	if (fstatfs(fd, &figures) < 0 || fstat(fd, &file) < 0)
		return -errno;
	if (figures.f_type == TMPFS_MAGIC || figures.f_type == RAMFS_MAGIC)
		return -EMEDIUMTYPE;
	if (shelf_count > 0 || !is_only_thread())
		return -EBUSY;
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap_fd < 0)
		return -errno;
	shelf_inode = file.st_ino;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);
	count = list_ranges(is_idle_memory, ranges);
	result = count < 0 ? count : shelve_ranges(fd, pagemap_fd, ranges, count);
	sigprocmask(SIG_SETMASK, &before, NULL);
	close(pagemap_fd);
	return result;
}

/* All of each range: what is not in memory is in the file that it is mapped from. */
static int shelve_ranges_again(int fd, const struct shelf_range *ranges, int count)
{
	uint64_t offset = 0;

	for (int i = 0; i < count; i++) {
		uint64_t bytes = ranges[i].end - ranges[i].start;
		int result = write_all(fd, ranges[i].start, bytes, offset);

		if (result == 0)
			result = replace(fd, ranges[i], offset);
		if (result < 0)
			return result;
		offset += bytes;
	}
	return (int)(offset >> 20);
}

int shelve_again(int fd)
{
	struct shelf_range ranges[RANGES_MAX];
	sigset_t all, before;
	int count, result;

	if (shelf_count == 0)
		return -ENOENT;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	count = list_ranges(is_interpreters, ranges);
	result = may_be_written() ? -EBUSY : count;
	if (result >= 0)
		result = shelve_ranges_again(fd, ranges, count);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return result;
}

/* Runs of pages that are the file's, not written to since; locked ones too. */
static void unmap_clean(int pagemap_fd, struct shelf_range range)
{
	uint64_t entries[RUN_PAGES_MAX], pages, first;

	for (uint64_t at = range.start; at < range.end; at += pages * PAGE_BYTES) {
		pages = min_of((range.end - at) / PAGE_BYTES, (uint64_t)RUN_PAGES_MAX);
		if (pread(pagemap_fd, entries, pages * sizeof *entries, (off_t)(at / PAGE_BYTES * sizeof *entries)) !=
		    (ssize_t)(pages * sizeof *entries))
			return;
		for (uint64_t i = 0; i < pages; i++) {
			for (first = i; i < pages && (entries[i] & PAGE_OF_FILE) == PAGE_OF_FILE; i++)
				;
			if (i > first)
				(void)madvise((void *)(uintptr_t)(at + first * PAGE_BYTES), (i - first) * PAGE_BYTES,
					      is_locked ? DONTNEED_LOCKED : MADV_DONTNEED);
		}
	}
}

/* Of files that nobody writes to: those pages may go at any time. */
static void unmap_files(int pagemap_fd, bool (*is_wanted)(const struct own_mapping *))
{
	struct shelf_range ranges[RANGES_MAX];
	int count = list_ranges(is_wanted, ranges);

	for (int i = 0; i < count; i++)
		unmap_clean(pagemap_fd, ranges[i]);
}

static void unmap_idle(void)
{
	int pagemap_fd;

	if (shelf_count == 0 || !is_only_thread())
		return;
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap_fd < 0)
		return;
	unmap_files(pagemap_fd, is_constant);
	for (int i = 0; i < shelf_count; i++)
		unmap_clean(pagemap_fd, shelf[i]);
	close(pagemap_fd);
}

void shelve_wait(const int *fds, unsigned count)
{
	struct pollfd polled[SHELVE_FDS_MAX];
	sigset_t all, before;

	VS_CHECK(count <= SHELVE_FDS_MAX);
	for (unsigned i = 0; i < count; i++)
		polled[i] = (struct pollfd){ .fd = fds[i], .events = POLLIN };
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);
	unmap_idle();
	(void)ppoll(polled, count, NULL, &before);
	sigprocmask(SIG_SETMASK, &before, NULL);
}

int shelve_wait_signal(const int *signals, unsigned count)
{
	sigset_t all, before, waited;
	int number;

	sigemptyset(&waited);
	for (unsigned i = 0; i < count; i++)
		sigaddset(&waited, signals[i]);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);
	unmap_idle();
	sigprocmask(SIG_SETMASK, &before, NULL);
	while ((number = sigwaitinfo(&waited, NULL)) < 0 && errno == EINTR)
		;
	return number < 0 ? -errno : number;
}

/* The CPU time of the first thread; 0: not to be had. */
static unsigned long long first_thread_ns(void)
{
	char text[64];

	return sys_read_text("/proc/self/schedstat", text, sizeof text) > 0 ? strtoull(text, NULL, 10) : 0;
}

void shelve_rest(void)
{
	static unsigned long long seen_ns;
	static unsigned quiet;
	unsigned long long now_ns = shelf_count > 0 ? first_thread_ns() : 0;
	int pagemap_fd;

	if (now_ns == 0)
		return;
	quiet = now_ns == seen_ns ? quiet + 1 : 0;
	seen_ns = now_ns;
	if (quiet != REST_LOOKS)
		return;
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap_fd < 0)
		return;
	unmap_files(pagemap_fd, is_interpreter_constant);
	close(pagemap_fd);
}

void shelve_unlock(void)
{
	is_locked = true;
	for (int i = 0; i < shelf_count; i++)
		(void)munlock((void *)(uintptr_t)shelf[i].start, shelf[i].end - shelf[i].start);
}

void shelve_page_out(int fd)
{
	(void)sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE);
	for (int i = 0; i < shelf_count; i++)
		(void)madvise((void *)(uintptr_t)shelf[i].start, shelf[i].end - shelf[i].start, MADV_PAGEOUT);
	/* What is no longer mapped, dirty then and clean now, or it would be mapped again with what is read near it. */
	(void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
}
