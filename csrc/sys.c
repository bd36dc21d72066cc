/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "sys.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "base.h"
#include "fault_point.h"
#include "procmap.h"

struct ioctl_poison {
	uint64_t start, len, mode;
	int64_t updated;
};
#define STAT_BYTES 1024
#define IOCTL_POISON _IOWR(0xAA, 0x08, struct ioctl_poison)
#define IOCTL_NEW_USERFAULTFD _IO(0xAA, 0x00)

struct ioctl_pagemap_scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define IOCTL_PAGEMAP_SCAN _IOWR('f', 16, struct ioctl_pagemap_scan)
#define PAGE_IS_WRITTEN (1ULL << 1) /* and what was never protected */
#define PAGE_IS_PRESENT (1ULL << 3)
#define PAGE_IS_SWAPPED (1ULL << 4)
#define PAGE_IS_ZERO_PAGE (1ULL << 5)
#define PAGE_IS_THERE (PAGE_IS_PRESENT | PAGE_IS_SWAPPED)

static_assert(sizeof(struct page_range) == 24, "layout of the kernel's struct page_region");

/* ---- userfaultfd ---- */

static int ioctl_errno(int fd, unsigned long request, void *argument)
{
	return ioctl(fd, request, argument) == 0 ? 0 : -errno;
}

/* The same, for calls that a test may make fail. */
static int ioctl_pointed(const char *point, int fd, unsigned long request, void *argument)
{
	errno = fault_point(point);
	return errno ? -1 : ioctl(fd, request, argument);
}

int sys_userfaultfd_api(int fd, uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	return ioctl_pointed("sys/api", fd, UFFDIO_API, &api) < 0 ? -errno : 0;
}

static int register_mode(int fd, uint64_t address, uint64_t bytes, uint64_t mode)
{
	struct uffdio_register range = { .range = { address, bytes }, .mode = mode };

	return ioctl_pointed("sys/register", fd, UFFDIO_REGISTER, &range) < 0 ? -errno : 0;
}

int sys_userfaultfd_register(int fd, uint64_t address, uint64_t bytes)
{
	return register_mode(fd, address, bytes, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);
}

int sys_userfaultfd_register_quiet(int fd, uint64_t address, uint64_t bytes)
{
	return register_mode(fd, address, bytes, UFFDIO_REGISTER_MODE_WP);
}

int sys_userfaultfd_unregister(int fd, uint64_t address, uint64_t bytes)
{
	struct uffdio_range range = { address, bytes };
	return ioctl_errno(fd, UFFDIO_UNREGISTER, &range);
}

int sys_userfaultfd_wake(int fd, uint64_t address, uint64_t bytes)
{
	struct uffdio_range range = { address, bytes };
	return ioctl_errno(fd, UFFDIO_WAKE, &range);
}

int sys_userfaultfd_poison(int fd, uint64_t address, uint64_t bytes)
{
	struct ioctl_poison range = { .start = address, .len = bytes };
	return ioctl_errno(fd, IOCTL_POISON, &range);
}

/*
 * The errno policy of COPY and ZEROPAGE. `progress` is the kernel's count of bytes or its negative
 * errno. ENOSPC is what old kernels said for ESRCH; ENOMEM may be the client's own cgroup.
 */
static enum fill_outcome fill_outcome_of(int result, int64_t progress, uint64_t bytes,
					 uint64_t *ret_bytes)
{
	int error = result == 0 ? 0 : errno;

	if (progress > 0) {
		*ret_bytes = (uint64_t)progress;
		return *ret_bytes >= bytes ? FILL_DONE : FILL_PARTIAL;
	}
	*ret_bytes = 0;
	switch (error) {
	case EEXIST:
		return FILL_PRESENT;
	case EAGAIN:
		return FILL_AGAIN;
	case ENOENT:
		return FILL_MOVED;
	case ENOMEM:
		return FILL_NO_MEMORY;
	case ESRCH:
	case ENOSPC:
		return FILL_GONE;
	default:
		return FILL_BROKEN;
	}
}

enum fill_outcome sys_userfaultfd_copy(int fd, uint64_t address, const void *source, uint64_t bytes,
				       uint64_t *ret_bytes)
{
	struct uffdio_copy copy = { .dst = address, .src = (uintptr_t)source, .len = bytes };
	int result = ioctl_pointed("sys/copy", fd, UFFDIO_COPY, &copy);
	return fill_outcome_of(result, copy.copy, bytes, ret_bytes);
}

enum fill_outcome sys_userfaultfd_zero(int fd, uint64_t address, uint64_t bytes, uint64_t *ret_bytes)
{
	struct uffdio_zeropage zero = { .range = { address, bytes } };
	int result = ioctl_pointed("sys/zero", fd, UFFDIO_ZEROPAGE, &zero);
	return fill_outcome_of(result, zero.zeropage, bytes, ret_bytes);
}

static int write_protect(const char *point, int fd, uint64_t address, uint64_t bytes, uint64_t mode)
{
	struct uffdio_writeprotect range = { .range = { address, bytes }, .mode = mode };

	return ioctl_pointed(point, fd, UFFDIO_WRITEPROTECT, &range);
}

int sys_userfaultfd_protect(int fd, uint64_t address, uint64_t bytes)
{
	return write_protect("sys/protect", fd, address, bytes, UFFDIO_WRITEPROTECT_MODE_WP) < 0 ? -errno : 0;
}

enum fill_outcome sys_userfaultfd_unprotect(int fd, uint64_t address, uint64_t bytes)
{
	int result = write_protect("sys/unprotect", fd, address, bytes, 0);
	uint64_t done;

	return fill_outcome_of(result, result == 0 ? (int64_t)bytes : 0, bytes, &done);
}

bool sys_userfaultfd_is_gone(int fd)
{
	/* UNREGISTER of the page at address 0x10000, where nothing of ours can be, takes the address
	 * space first: ENOMEM when it is gone, EINVAL (no mapping) or 0 otherwise. */
	return sys_userfaultfd_unregister(fd, 0x1000, PAGE_BYTES) == -ENOMEM;
}

bool sys_userfaultfd_is_changing(int fd)
{
	static const uint8_t page[PAGE_BYTES] __attribute__((aligned(4096)));
	uint64_t done;

	/* COPY looks at that first, and only then for the mapping: there is none at this address. */
	return sys_userfaultfd_copy(fd, PAGE_BYTES, page, PAGE_BYTES, &done) == FILL_AGAIN;
}

static bool kernel_is_older_than(int major, int minor)
{
	struct utsname name;
	int have_major = 0, have_minor = 0;

	if (uname(&name) != 0 || sscanf(name.release, "%d.%d", &have_major, &have_minor) != 2)
		return true;
	return have_major < major || (have_major == major && have_minor < minor);
}

int sys_probe(int *ret_device, char *message)
{
	int device, fd, result;

	if (kernel_is_older_than(6, 12)) {
		snprintf(message, 256, "this kernel is too old: Linux 6.12 or later is needed");
		return -ENOSYS;
	}
	device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (device < 0) {
		result = -errno;
		snprintf(message, 256,
			 "/dev/userfaultfd cannot be opened (%s): run as root, and see that the kernel "
			 "has CONFIG_USERFAULTFD and the container shows the device",
			 strerror(-result));
		return result;
	}
	fd = ioctl(device, IOCTL_NEW_USERFAULTFD, O_CLOEXEC | O_NONBLOCK);
	result = fd < 0 ? -errno
			: sys_userfaultfd_api(fd, UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
						      UFFD_FEATURE_EVENT_REMOVE |
						      UFFD_FEATURE_EVENT_UNMAP |
						      UFFD_FEATURE_THREAD_ID);
	if (fd >= 0)
		close(fd);
	if (result < 0) {
		close(device);
		snprintf(message, 256,
			 "userfaultfd cannot be used with fork events (%s): CAP_SYS_PTRACE is needed, "
			 "run as root",
			 strerror(-result));
		return result;
	}
	*ret_device = device;
	return 0;
}

int sys_userfaultfd_covers(int fd, uint64_t address)
{
	struct uffdio_continue probe = { .range = { address, PAGE_BYTES } };
	int result = ioctl_errno(fd, UFFDIO_CONTINUE, &probe);

	/* CONTINUE finds the mapping first (ENOENT: none of this descriptor), and only then that it is
	 * for shared memory alone (EINVAL). It changes nothing. */
	return result == -EAGAIN ? -EAGAIN : result != -ENOENT;
}

/* ---- a client's /proc ---- */

int sys_open_proc(pid_t pid, const char *file)
{
	char path[64];
	int fd;

	snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
	errno = fault_point("sys/open");
	fd = errno ? -1 : open(path, O_RDONLY | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

/* What one read of `fd` gives, with a NUL behind it: bytes or -errno. Closes it; of what could not be opened the -errno. */
static int take_text(int fd, char *text, size_t bytes)
{
	ssize_t length;
	int result;

	if (fd < 0)
		return fd;
	length = read(fd, text, bytes - 1);
	result = length < 0 ? -errno : (int)length;
	close(fd);
	text[max_of(result, 0)] = '\0';
	return result;
}

int sys_read_text(const char *path, char *text, size_t bytes)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	return take_text(fd < 0 ? -errno : fd, text, bytes);
}

/* Field `number` of a stat file of a process, its bytes from the blank before it on, in `text`; NULL: not to be had. */
static const char *stat_field(pid_t pid, const char *file, int number, char text[static STAT_BYTES])
{
	const char *at;

	if (take_text(sys_open_proc(pid, file), text, STAT_BYTES) <= 0)
		return NULL;
	at = strrchr(text, ')'); /* the name may have blanks and brackets in it; field 3 comes after */
	for (int field = 2; at && field < number; field++)
		at = strchr(at + 1, ' ');
	return at;
}

uint64_t sys_process_start(pid_t pid)
{
	char text[STAT_BYTES];
	const char *start = stat_field(pid, "stat", 22, text);

	return start ? strtoull(start, NULL, 10) : 0;
}

bool sys_shares_memory(pid_t pid, pid_t other)
{
	return other > 0 && syscall(SYS_kcmp, pid, other, KCMP_VM, 0UL, 0UL) == 0;
}

pid_t sys_process_parent(pid_t pid)
{
	char text[STAT_BYTES];
	const char *parent = stat_field(pid, "stat", 4, text);

	return parent ? atoi(parent) : 0;
}

int sys_thread_cpu(pid_t pid, pid_t thread)
{
	char file[40], text[STAT_BYTES];
	const char *cpu;

	snprintf(file, sizeof file, "task/%d/stat", thread);
	cpu = stat_field(pid, file, 39, text);
	return cpu ? atoi(cpu) : -ESRCH;
}

pid_t sys_live_thread(pid_t pid)
{
	char path[64];
	DIR *directory;
	struct dirent *entry;
	pid_t found = 0;

	snprintf(path, sizeof path, "/proc/%d/task", pid);
	directory = opendir(path);
	if (!directory)
		return 0;
	while (!found && (entry = readdir(directory))) {
		struct process_size size;
		pid_t tid = (pid_t)strtol(entry->d_name, NULL, 10);
		int fd = tid > 0 ? sys_open_proc(tid, "statm") : -1;

		if (fd < 0)
			continue;
		if (sys_statm(fd, &size) == 0 && size.pages > 0)
			found = tid;
		close(fd);
	}
	closedir(directory);
	return found;
}

static bool page_begins_with(pid_t pid, uint64_t address, uint64_t word)
{
	int pagemap_fd = sys_open_proc(pid, "pagemap"), mem_fd = sys_open_proc(pid, "mem");
	uint64_t entry = 0, have = 0;
	bool found = pagemap_fd >= 0 && mem_fd >= 0 &&
		     pread(pagemap_fd, &entry, sizeof entry, (off_t)(address / PAGE_BYTES * 8)) == 8 &&
		     entry >> 62 && !(entry >> 61 & 1) && /* there, and no file's: to read that may block */
		     sys_read_client(mem_fd, address, &have, sizeof have) == sizeof have && have == word;

	if (pagemap_fd >= 0)
		close(pagemap_fd);
	if (mem_fd >= 0)
		close(mem_fd);
	return found;
}

pid_t sys_find_page(uint64_t address, uint64_t word)
{
	DIR *directory = opendir("/proc");
	struct dirent *entry;
	pid_t found = -ESRCH;

	if (!directory)
		return -errno;
	while (found < 0 && (entry = readdir(directory))) {
		pid_t pid = (pid_t)strtol(entry->d_name, NULL, 10);

		if (pid > 0 && page_begins_with(pid, address, word))
			found = pid;
	}
	closedir(directory);
	return found;
}

int sys_visit_wiped(pid_t pid, sys_range_fn visit, void *context)
{
	char *line = NULL;
	size_t size = 0;
	struct page_range range = { 0 };
	pid_t thread = sys_live_thread(pid);
	int fd = thread > 0 ? sys_open_proc(thread, "smaps") : -ESRCH, result;
	FILE *file;

	if (fd < 0)
		return fd;
	file = fdopen(fd, "r");
	if (!file) {
		close(fd);
		return -ENOMEM;
	}
	while (getline(&line, &size, file) > 0) {
		uint64_t start, end;

		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			range = (struct page_range){ .start = start, .end = end };
		else if (strncmp(line, "VmFlags:", 8) == 0 && strstr(line, " wf"))
			visit(context, range);
	}
	result = feof(file) ? 0 : -EIO;
	free(line);
	fclose(file);
	return result;
}

/* Pages of one of the categories `any`, and of all of `mask`, but for those of `inverted`, which is part of it. */
static int scan(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges, unsigned max,
		uint64_t max_pages, uint64_t any, uint64_t mask, uint64_t inverted, uint64_t *ret_walk_end)
{
	struct ioctl_pagemap_scan request = {
		.size = sizeof request,
		.start = start,
		.end = end,
		.vec = (uintptr_t)ranges,
		.vec_len = max,
		.max_pages = max_pages,
		.category_inverted = inverted,
		.category_mask = mask,
		.category_anyof_mask = any,
		.return_mask = any,
	};
	int count = ioctl_pointed("sys/scan", pagemap_fd, IOCTL_PAGEMAP_SCAN, &request);

	if (count < 0)
		return -errno;
	*ret_walk_end = request.walk_end;
	return count;
}

int sys_resident_ranges(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges,
			unsigned max, uint64_t max_pages, uint64_t *ret_walk_end)
{
	return scan(pagemap_fd, start, end, ranges, max, max_pages, PAGE_IS_THERE, PAGE_IS_ZERO_PAGE, PAGE_IS_ZERO_PAGE,
		    ret_walk_end);
}

int sys_there_ranges(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges, unsigned max,
		     uint64_t *ret_walk_end)
{
	return scan(pagemap_fd, start, end, ranges, max, 0, PAGE_IS_THERE, 0, 0, ret_walk_end);
}

int sys_mapped_ranges(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges,
		      unsigned max, uint64_t max_pages, uint64_t *ret_walk_end)
{
	return scan(pagemap_fd, start, end, ranges, max, max_pages, PAGE_IS_PRESENT, 0, 0, ret_walk_end);
}

int sys_zero_ranges(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges, unsigned max,
		    uint64_t *ret_walk_end)
{
	return scan(pagemap_fd, start, end, ranges, max, 0, PAGE_IS_PRESENT, PAGE_IS_ZERO_PAGE, 0, ret_walk_end);
}

int sys_unprotected_ranges(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges, unsigned max,
			   uint64_t *ret_walk_end)
{
	return scan(pagemap_fd, start, end, ranges, max, 0, PAGE_IS_THERE, PAGE_IS_WRITTEN, 0, ret_walk_end);
}

bool sys_page_is_present(int pagemap_fd, uint64_t address)
{
	uint64_t entry;

	if (pread(pagemap_fd, &entry, sizeof entry, (off_t)(address / PAGE_BYTES * 8)) != 8)
		return false;
	return (entry >> 62) != 0; /* or in the kernel's swap */
}

int sys_mapping_next(int maps_fd, uint64_t address, struct mapping *ret_mapping)
{
	struct ioctl_procmap_query query = {
		.size = sizeof query,
		.query_flags = PROCMAP_COVERING_OR_NEXT,
		.query_addr = address,
		.vma_name_addr = (uintptr_t)ret_mapping->name,
		.vma_name_size = sizeof ret_mapping->name,
	};
	int result = ioctl_pointed("sys/mapping", maps_fd, IOCTL_PROCMAP_QUERY, &query) < 0 ? -errno : 0;

	if (result == -ENAMETOOLONG) { /* a long name is a file's: not anonymous */
		query.vma_name_size = 0;
		query.vma_name_addr = 0;
		ret_mapping->name[0] = '/';
		ret_mapping->name[1] = '\0';
		result = ioctl_errno(maps_fd, IOCTL_PROCMAP_QUERY, &query);
	} else if (result == 0 && query.vma_name_size == 0) {
		ret_mapping->name[0] = '\0';
	}
	if (result == -ENOENT)
		return 0;
	if (result < 0)
		return result;
	ret_mapping->start = query.vma_start;
	ret_mapping->end = query.vma_end;
	ret_mapping->readable = query.vma_flags & PROCMAP_READABLE;
	ret_mapping->writable = query.vma_flags & PROCMAP_WRITABLE;
	ret_mapping->executable = query.vma_flags & PROCMAP_EXECUTABLE;
	ret_mapping->shared = query.vma_flags & PROCMAP_SHARED;
	ret_mapping->anonymous = query.inode == 0 && query.dev_major == 0 && query.dev_minor == 0;
	return 1;
}

ssize_t sys_read_client(int mem_fd, uint64_t address, void *buffer, size_t bytes)
{
	ssize_t count;

	errno = fault_point("sys/mem");
	count = errno ? -1 : pread(mem_fd, buffer, bytes, (off_t)address);
	return count < 0 ? -errno : count;
}

int sys_read_client_pages(int mem_fd, uint64_t address, void *buffer, uint64_t mask)
{
	while (mask) {
		unsigned first = (unsigned)__builtin_ctzll(mask);
		uint64_t rest = ~(mask >> first);
		unsigned count = rest ? (unsigned)__builtin_ctzll(rest) : 64;
		size_t bytes = count * PAGE_BYTES;
		ssize_t done = sys_read_client(mem_fd, address + first * PAGE_BYTES,
					       (char *)buffer + first * PAGE_BYTES, bytes);

		if (done != (ssize_t)bytes)
			return done < 0 ? (int)done : -EFAULT;
		mask &= ~mask_of(first, count);
	}
	return 0;
}

int sys_name_address_space(pid_t pid, struct address_space_name *ret_name)
{
	int fd = sys_open_proc(pid, "auxv");
	ssize_t length;

	if (fd < 0)
		return fd;
	*ret_name = (struct address_space_name){ 0 };
	length = read(fd, ret_name->words, sizeof ret_name->words);
	close(fd);
	if (length <= 0)
		return -ESRCH;
	for (unsigned i = 0; i + 1 < sizeof ret_name->words / 8 && ret_name->words[i] != AT_NULL; i += 2)
		if (ret_name->words[i] == AT_SECURE && ret_name->words[i + 1])
			return -EPERM;
	return 0;
}

bool sys_has_address_space(pid_t pid, const struct address_space_name *name)
{
	struct address_space_name its;

	return sys_name_address_space(pid, &its) == 0 && memcmp(&its, name, sizeof its) == 0;
}

bool sys_is_copy(pid_t pid, pid_t parent)
{
	struct address_space_name name;

	return sys_name_address_space(parent, &name) == 0 && sys_has_address_space(pid, &name);
}

int sys_pidfd(pid_t pid)
{
	long fd;

	errno = fault_point("sys/pidfd");
	fd = errno ? -1 : syscall(SYS_pidfd_open, pid, 0);
	return fd < 0 ? -errno : (int)fd;
}

bool sys_pidfd_is_dead(int pidfd)
{
	struct pollfd poll_fd = { .fd = pidfd, .events = POLLIN };

	return poll(&poll_fd, 1, 0) == 1;
}

void sys_pidfd_kill(int pidfd)
{
	(void)syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
}

int sys_statm(int statm_fd, struct process_size *ret_size)
{
	char text[128], *cursor = text;
	ssize_t length = pread(statm_fd, text, sizeof text - 1, 0);
	uint64_t resident, other;

	if (length <= 0)
		return length < 0 ? -errno : -ESRCH;
	text[length] = '\0';
	ret_size->pages = strtoull(cursor, &cursor, 10);
	resident = strtoull(cursor, &cursor, 10);
	other = strtoull(cursor, &cursor, 10);
	ret_size->anonymous_pages = resident > other ? resident - other : 0;
	ret_size->other_pages = other;
	return 0;
}

/* A size in one of a process's files. `field`: with the newline before it, as the program has chosen its name. */
static int field_bytes(pid_t pid, const char *file, const char *field, uint64_t *ret_bytes)
{
	char text[4096];
	const char *line;
	int fd = sys_open_proc(pid, file);

	if (fd < 0)
		return fd;
	if (take_text(fd, text, sizeof text) <= 0)
		return -ESRCH;
	line = strstr(text, field);
	if (!line)
		return -ENODATA;
	*ret_bytes = strtoull(line + strlen(field), NULL, 10) * 1024;
	return 0;
}

int sys_shared_bytes(pid_t pid, uint64_t *ret_bytes) { return field_bytes(pid, "status", "\nRssShmem:", ret_bytes); }

int sys_pss_anonymous(pid_t pid, uint64_t *ret_bytes)
{
	return field_bytes(pid, "smaps_rollup", "\nPss_Anon:", ret_bytes);
}

/* ---- futexes, memory, time ---- */

int sys_futex_wait(const uint32_t *word, uint32_t value, unsigned timeout_ms)
{
	struct timespec timeout = { timeout_ms / 1000, (long)(timeout_ms % 1000) * 1000000L };

	return syscall(SYS_futex, word, FUTEX_WAIT, value, &timeout, NULL, 0) == 0 ? 0 : -errno;
}

void sys_futex_wake(const uint32_t *word)
{
	(void)syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

int sys_memfd(const char *name, uint64_t bytes, bool sealed)
{
	int fd;

	errno = fault_point("sys/memfd");
	fd = errno ? -1 : memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return -errno;
	if (ftruncate(fd, (off_t)bytes) != 0 ||
	    (sealed && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)) {
		int result = -errno;
		close(fd);
		return result;
	}
	return fd;
}

void sys_discard(int memfd, uint64_t offset, void *at, uint64_t bytes)
{
	off_t start = (off_t)offset, end = (off_t)(offset + bytes), data, hole;

	if (!fault_point("sys/discard") &&
	    fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, (off_t)bytes) == 0)
		return;
	/* Holes are zeros, and to write there would be to fill them. */
	for (; start < end && (data = lseek(memfd, start, SEEK_DATA)) >= 0 && data < end; start = hole) {
		hole = lseek(memfd, data, SEEK_HOLE);
		hole = hole < 0 || hole > end ? end : hole;
		memset((char *)at + (data - (off_t)offset), 0, (size_t)(hole - data));
	}
}

#define DAEMON_NICE (-10)

void sys_pin_this_thread(unsigned cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	(void)sched_setaffinity(0, sizeof set, &set);
}

void sys_keep_off_cpus(uint64_t cpus)
{
	static __thread cpu_set_t allowed;
	static __thread uint64_t kept_off;
	cpu_set_t rest;

	if (cpus == kept_off)
		return;
	if (kept_off == 0 && sched_getaffinity(0, sizeof allowed, &allowed) < 0)
		return;
	rest = allowed;
	for (unsigned cpu = 0; cpu < 64; cpu++)
		if (cpus >> cpu & 1)
			CPU_CLR(cpu, &rest);
	if (sched_setaffinity(0, sizeof rest, CPU_COUNT(&rest) ? &rest : &allowed) == 0)
		kept_off = cpus;
}

void sys_prefer_this_thread(void)
{
	(void)setpriority(PRIO_PROCESS, 0, DAEMON_NICE); /* Linux: of this thread alone */
}

void sys_hurry_this_thread(void)
{
	const struct sched_param parameters = { .sched_priority = 1 };

	/* Nice is a share of the CPU within a session's or a control group's, and no more. */
	if (sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &parameters) < 0)
		(void)setpriority(PRIO_PROCESS, 0, -20);
}

/* With MCL_FUTURE each mapping counts in full, whatever is touched of it: where there is a limit the next ones would
 * fail, which is found out here. */
bool sys_lock_memory(void)
{
	struct rlimit limit;
	void *beyond;

	if (fault_point("sys/lock") || getrlimit(RLIMIT_MEMLOCK, &limit) < 0 ||
	    mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) < 0)
		return false;
	if (limit.rlim_cur == RLIM_INFINITY)
		return true;
	beyond = mmap(NULL, limit.rlim_cur + PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (beyond == MAP_FAILED) {
		(void)munlockall();
		return false;
	}
	munmap(beyond, limit.rlim_cur + PAGE_BYTES);
	return true;
}

void sys_refuse_core_dumps(void)
{
	(void)prctl(PR_SET_DUMPABLE, 0);
}

int sys_nice_now(void)
{
	return getpriority(PRIO_PROCESS, 0);
}

int sys_nice(int nice)
{
	int before = sys_nice_now();

	(void)setpriority(PRIO_PROCESS, 0, nice); /* a hint */
	return before;
}

uint64_t sys_now_coarse_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

uint64_t sys_thread_cpu_ns(void)
{
	struct timespec used;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
	return (uint64_t)used.tv_sec * 1000000000ULL + (uint64_t)used.tv_nsec;
}

int sys_thread_waited_ns(uint64_t *ret_ns)
{
	char text[64];
	unsigned long long waited_ns;
	int result = sys_read_text("/proc/thread-self/schedstat", text, sizeof text);

	if (result < 0)
		return result;
	if (sscanf(text, "%*u %llu", &waited_ns) != 1)
		return -ENODATA;
	*ret_ns = waited_ns;
	return 0;
}

uint64_t sys_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

static void sleep_for(struct timespec duration)
{
	while (nanosleep(&duration, &duration) != 0 && errno == EINTR)
		;
}

void sys_sleep_ms(unsigned milliseconds)
{
	sleep_for((struct timespec){ milliseconds / 1000, (long)(milliseconds % 1000) * 1000000L });
}

void sys_sleep_us(unsigned microseconds)
{
	sleep_for((struct timespec){ microseconds / 1000000, (long)(microseconds % 1000000) * 1000L });
}

void sys_eventfd_signal(int fd)
{
	uint64_t one = 1;

	(void)!write(fd, &one, sizeof one);
}

void sys_eventfd_drain(int fd)
{
	uint64_t value;

	(void)!read(fd, &value, sizeof value);
}
