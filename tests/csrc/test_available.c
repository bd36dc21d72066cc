/* SPDX-License-Identifier: MIT */
/*
 * test_available — what is available, out of files as the kernel writes them.
 *
 * Build: tests/csrc/test_available.c csrc/available.c csrc/sys.c csrc/base.c; -Icsrc; threads
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include "available.h"
#include "check.h"
#include "engine.h"

#define MIB (1ULL << 20)

static char directory[64];

static const char *path_of(const char *name)
{
	static char path[128];

	snprintf(path, sizeof path, "%s/%s", directory, name);
	return path;
}

static void put(const char *name, const char *text)
{
	FILE *file = fopen(path_of(name), "w");

	CHECK(file && fputs(text, file) >= 0 && fclose(file) == 0);
}

static void drop(const char *name) { CHECK(unlink(path_of(name)) == 0); }

static void test_machine(void)
{
	struct available found = { 0 };

	CHECK(available_of_machine(path_of("meminfo"), &found) == -ENOENT);
	put("meminfo", "MemTotal:  8388608 kB\nMemFree: 1 kB\nMemAvailable:    1024 kB\nBuffers: 7 kB\n");
	CHECK(available_of_machine(path_of("meminfo"), &found) == 0);
	CHECK(found.total_bytes == 8192 * MIB && found.bytes == MIB);
	put("meminfo", "MemTotal: 1 kB\nXMemAvailable: 3 kB\nMemAvailableX: 3 kB\n");
	CHECK(available_of_machine(path_of("meminfo"), &found) == -ENODATA);
	CHECK(found.bytes == MIB); /* untouched */
	drop("meminfo");
	CHECK(available_of_machine("/proc/meminfo", &found) == 0);
	CHECK(found.total_bytes > found.bytes && found.bytes > MIB);
}

static void test_version_1(void)
{
	struct available found = { 0 };

	CHECK(available_of_cgroup(directory, &found) == -ENOENT);
	put("memory.usage_in_bytes", "94371840\n");
	put("memory.limit_in_bytes", "9223372036854771712\n");
	CHECK(available_of_cgroup(directory, &found) == -ENODATA);
	put("memory.limit_in_bytes", "104857600\n");
	CHECK(available_of_cgroup(directory, &found) == 0);
	CHECK(found.total_bytes == 100 * MIB && found.bytes == 10 * MIB);
	/* Its own caches and those below; what is used counts half. */
	put("memory.stat", "inactive_file 1\ntotal_cache 5\ntotal_inactive_file 1048576\ntotal_active_file 4194304\n");
	CHECK(available_of_cgroup(directory, &found) == 0);
	CHECK(found.bytes == 13 * MIB);
	put("memory.usage_in_bytes", "204857600\n"); /* the limit was lowered, and nothing could go */
	CHECK(available_of_cgroup(directory, &found) == 0);
	CHECK(found.bytes == 0);
	drop("memory.usage_in_bytes");
	drop("memory.limit_in_bytes");
	drop("memory.stat");
}

static void test_version_2(void)
{
	struct available found = { 0 };

	put("memory.max", "max\n");
	put("memory.current", "94371840\n");
	CHECK(available_of_cgroup(directory, &found) == -ENODATA);
	put("memory.high", "99614720\n");
	CHECK(available_of_cgroup(directory, &found) == 0);
	CHECK(found.total_bytes == 95 * MIB && found.bytes == 5 * MIB);
	put("memory.max", "104857600\n");
	put("memory.high", "max\n");
	put("memory.stat", "anon 7\ninactive_file 1048576\nactive_file 2097152\n");
	CHECK(available_of_cgroup(directory, &found) == 0);
	CHECK(found.total_bytes == 100 * MIB && found.bytes == 12 * MIB);
	drop("memory.max");
	drop("memory.high");
	drop("memory.current");
	drop("memory.stat");
}

static void test_membership(void)
{
	const char *first = "9:name=systemd:/x\n4:cpu,memory:/a/b\n0::/\n", *second = "1:cpu:/a\n0::/a/b\n";

	CHECK(available_is_member(first, 1, "/a/b") && available_is_member(first, 1, "/a") &&
	      available_is_member(first, 1, "/"));
	CHECK(!available_is_member(first, 1, "/a/bc") &&
	      !available_is_member(first, 1, "/x") && !available_is_member(first, 2, "/a"));
	CHECK(available_is_member(second, 2, "/a/b") && available_is_member(second, 2, "/"));
	CHECK(!available_is_member(second, 1, "/a") && !available_is_member(second, 2, "/b"));
	CHECK(!available_is_member("3:memoryx:/a\n", 1, "/a") && !available_is_member("", 2, "/") &&
	      !available_is_member("nonsense\n", 2, "/"));
	CHECK(available_is_member("0::/a/bc", 2, "/a/bc") && !available_is_member("0::/a/bc", 2, "/a/b"));
}

static void test_reserve(void)
{
	CHECK(available_reserve(7, 100 * MIB) == 7 && available_reserve(0, 100 * MIB) == 0);
	CHECK(available_reserve(ENGINE_HOST_RESERVE_AUTO, 10000 * MIB) == 200 * MIB);
	CHECK(available_reserve(ENGINE_HOST_RESERVE_AUTO, 1000000 * MIB) == 512 * MIB);
	CHECK(available_reserve(ENGINE_HOST_RESERVE_AUTO, 400 * MIB) == 16 * MIB);
	CHECK(available_reserve(ENGINE_HOST_RESERVE_AUTO, 80 * MIB) == 10 * MIB);
}

static void bench(const char *cgroup)
{
	const unsigned count = 20000;
	struct available found;
	uint64_t start_ns = test_now_ns(), middle_ns;

	for (unsigned i = 0; i < count; i++)
		CHECK(available_of_machine("/proc/meminfo", &found) == 0);
	middle_ns = test_now_ns();
	for (unsigned i = 0; i < count; i++)
		(void)available_of_cgroup(cgroup, &found);
	printf("the machine %.1f us, a cgroup %.1f us\n", (double)(middle_ns - start_ns) / count / 1000,
	       (double)(test_now_ns() - middle_ns) / count / 1000);
}

/* As the others; with "bench" a directory of a cgroup may follow. */
int main(int argc, char **argv)
{
	if (test_is_bench(argc, argv)) {
		bench(argc > 3 ? argv[3] : "/sys/fs/cgroup");
		return 0;
	}
	snprintf(directory, sizeof directory, "/tmp/test_available.XXXXXX");
	CHECK(mkdtemp(directory));
	test_machine();
	test_version_1();
	test_version_2();
	test_membership();
	test_reserve();
	CHECK(rmdir(directory) == 0);
	return 0;
}
