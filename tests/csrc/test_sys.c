/* SPDX-License-Identifier: MIT */
/*
 * test_sys — memory of the daemon: given back though it is locked, and locked where that is allowed.
 *
 * Build: tests/csrc/test_sys.c csrc/sys.c csrc/fault_point.c csrc/base.c; -Icsrc. With -DVSWAP_FAULT_POINTS what happens when
 * the kernel refuses is tried as well. Locking needs root, and is tried in children, as it is for all of a process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base.h"
#include "check.h"
#include "fault_point.h"
#include "sys.h"

#define PAGES 64u
#define BEHIND (1ULL << 32) /* of holes, too many to be written to */
#define NOBODY 65534
#define LIMIT_BYTES (1UL << 20)

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define IS_SANITIZED true /* these have mlock() do nothing, and say it did */
#else
#define IS_SANITIZED false
#endif

/* ---- memory that is given back ---- */

static uint64_t file_pages(int fd)
{
	struct stat status;

	CHECK(fstat(fd, &status) == 0);
	return (uint64_t)status.st_blocks * 512 / PAGE_BYTES;
}

static bool is_zero(const char *at, uint64_t bytes)
{
	for (uint64_t i = 0; i < bytes; i++)
		if (at[i])
			return false;
	return true;
}

/* Pages 16 to 31 and all behind the last one of a memfd that is locked; what lies around them stays. */
static void test_discard(bool is_refused)
{
	const uint64_t first = 16 * PAGE_BYTES, bytes = 16 * PAGE_BYTES, end = PAGES * PAGE_BYTES;
	int fd = sys_memfd("discard", BEHIND, false);
	char *at = mmap(NULL, BEHIND, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

	CHECK(fd >= 0 && at != MAP_FAILED);
	memset(at, 7, end);
	if (geteuid() == 0 && !IS_SANITIZED)
		CHECK(mlock(at, end) == 0 && madvise(at + first, bytes, MADV_REMOVE) < 0 && errno == EINVAL);
	sys_discard(fd, first, at + first, bytes);
	CHECK(file_pages(fd) == (is_refused ? PAGES : PAGES - 16));
	CHECK(at[first - 1] == 7 && at[first + bytes] == 7 && is_zero(at + first, bytes));
	memset(at + first, 7, bytes);
	sys_discard(fd, end - PAGE_BYTES, at + end - PAGE_BYTES, BEHIND - end + PAGE_BYTES);
	CHECK(file_pages(fd) == (is_refused ? PAGES : PAGES - 1));
	CHECK(at[end - PAGE_BYTES - 1] == 7 && is_zero(at + end - PAGE_BYTES, PAGE_BYTES));
	munmap(at, BEHIND);
	close(fd);
}

/* ---- locked memory ---- */

static uint64_t status_kib(const char *name)
{
	char line[256];
	uint64_t kib = UINT64_MAX;
	FILE *status = fopen("/proc/self/status", "re");

	CHECK(status);
	while (fgets(line, sizeof line, status))
		if (strncmp(line, name, strlen(name)) == 0)
			kib = strtoull(line + strlen(name), NULL, 10);
	fclose(status);
	CHECK(kib != UINT64_MAX);
	return kib;
}

/* Sparse memory stays sparse: only what is touched is kept. */
static void lock_without_limit(void)
{
	const uint64_t bytes = 1UL << 30;
	uint64_t before = status_kib("VmRSS:"), locked;
	char *at;

	CHECK(sys_lock_memory());
	locked = status_kib("VmLck:");
	at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(at != MAP_FAILED);
	at[bytes / 2] = 1;
	CHECK(locked > 0 && status_kib("VmLck:") == locked + bytes / 1024);
	CHECK(status_kib("VmRSS:") < before + (16 << 10));
}

/* A limit that is not enough for all that is to come leaves nothing locked, and no mapping fails for it. */
static void lock_within_limit(void)
{
	struct rlimit limit = { LIMIT_BYTES, LIMIT_BYTES };

	CHECK(setrlimit(RLIMIT_MEMLOCK, &limit) == 0 && setresuid(NOBODY, NOBODY, NOBODY) == 0);
	CHECK(!sys_lock_memory());
	CHECK(status_kib("VmLck:") == 0);
	CHECK(mmap(NULL, 4 * LIMIT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
}

static void lock_not_allowed(void)
{
	struct rlimit limit = { 0, 0 };

	CHECK(setrlimit(RLIMIT_MEMLOCK, &limit) == 0 && setresuid(NOBODY, NOBODY, NOBODY) == 0);
	CHECK(!sys_lock_memory());
	CHECK(status_kib("VmLck:") == 0);
}

static void in_child(void (*test)(void))
{
	int status = 0;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		test();
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}

int main(void)
{
	test_discard(false);
#ifdef VSWAP_FAULT_POINTS
	fault_point_set("sys/discard", 1, EPERM, true);
	test_discard(true);
	CHECK(fault_point_hits("sys/discard") == 2);
	fault_point_clear();
#endif
	if (geteuid() != 0 || IS_SANITIZED) {
		printf("test_sys: locking is not tried: needs root, and no sanitizer\n");
		return 0;
	}
	in_child(lock_without_limit);
	in_child(lock_within_limit);
	in_child(lock_not_allowed);
	return 0;
}
