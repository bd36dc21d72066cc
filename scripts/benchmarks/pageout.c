/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "pageout.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "access.h"

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#define ENTRIES 4096u /* of pagemap at a time */
#define PRESENT (1ull << 63)
#define SETTLE_US 1000000u /* a disk gets what is still on its way to it, and nobody faults meanwhile */

static int daemon_fd = -1;

/* ---- asking ---- */

static void connect_daemon(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const char *path = getenv("VSWAPD_SOCKET");

	if (path == NULL)
		return;
	snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	daemon_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (daemon_fd < 0 || connect(daemon_fd, (struct sockaddr *)&address, sizeof address) != 0)
		fail(path);
}

static void ask_daemon(void)
{
	char line[512];
	size_t used = 0;
	int length = snprintf(line, sizeof line, "{\"op\":\"pageout\",\"pid\":%d,\"timeout_ms\":60000}\n", getpid());

	if (write(daemon_fd, line, (size_t)length) != length)
		fail("request to the daemon");
	while (used == 0 || line[used - 1] != '\n') {
		ssize_t got = read(daemon_fd, line + used, sizeof line - 1 - used);

		if (got <= 0)
			fail("answer of the daemon");
		used += (size_t)got;
	}
	line[used] = '\0';
	if (strstr(line, "\"ok\":true") == NULL) {
		fprintf(stderr, "workloads: the daemon says %s", line);
		_exit(1);
	}
}

static void page_out(void)
{
	if (daemon_fd >= 0)
		ask_daemon();
	else if (madvise(memory, page_count * PAGE_BYTES, MADV_PAGEOUT) != 0)
		fail("MADV_PAGEOUT");
}

static uint64_t present_pages(void)
{
	static uint64_t entries[ENTRIES];
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t present = 0;

	if (fd < 0)
		fail("/proc/self/pagemap");
	for (uint64_t page = 0; page < page_count; page += ENTRIES) {
		uint64_t count = page_count - page < ENTRIES ? page_count - page : ENTRIES;
		off_t at = (off_t)(((uintptr_t)memory / PAGE_BYTES + page) * sizeof entries[0]);

		if (pread(fd, entries, count * sizeof entries[0], at) != (ssize_t)(count * sizeof entries[0]))
			fail("/proc/self/pagemap");
		for (uint64_t i = 0; i < count; i++)
			present += (entries[i] & PRESENT) != 0;
	}
	close(fd);
	return present;
}

static void time_pageout(const char *name)
{
	struct result *result = calloc(1, sizeof *result);
	struct rusage from, to;
	uint64_t before = present_pages();

	if (result == NULL)
		fail("calloc");
	get_usage(RUSAGE_SELF, &from);
	uint64_t started = now_ns();

	page_out();
	result->ns = now_ns() - started;
	get_usage(RUSAGE_SELF, &to);
	result->accesses = before - present_pages();
	if (result->accesses < before / 2) {
		fprintf(stderr, "workloads: %s: only %llu of %llu pages went\n", name,
			(unsigned long long)result->accesses, (unsigned long long)before);
		_exit(1);
	}
	print_result(name, result, &from, &to);
	free(result);
}

/* ---- modes ---- */

static void time_phase(const char *name, const char *phase)
{
	struct result *result = calloc(1, sizeof *result);
	struct rusage from, to;

	if (result == NULL)
		fail("calloc");
	get_usage(RUSAGE_SELF, &from);
	run_phase(phase_named(phase), 100, result);
	get_usage(RUSAGE_SELF, &to);
	if (name != NULL)
		print_result(name, result, &from, &to);
	free(result);
}

void run_pageout(void)
{
	map_working_set();
	time_phase(NULL, "fill");
	usleep(SETTLE_US); /* whoever has it managed has had the time to see it */
	connect_daemon();
	time_pageout("out_dirty");
	time_phase("back", "seq_read");
	time_pageout("out_same");
	time_phase("verify", "verify");
}

static void write_ballast(uint64_t bytes)
{
	uint64_t *ballast = map(bytes, MAP_PRIVATE);

	for (uint64_t page = 0; page < bytes / PAGE_BYTES; page++)
		content_write(ballast + page * PAGE_WORDS, page % page_count, 1);
	if (munmap(ballast, bytes) != 0)
		fail("munmap");
}

/* Each page once at most: whoever comes back must have been out. */
static void time_faults(unsigned percent, struct result *result)
{
	uint64_t left = page_count * percent / 100, page = 0;

	while (left-- > 0) {
		page = content_link(page);
		uint64_t started = now_ns();
		bool right = access_page(READ, page);
		uint64_t took = now_ns() - started;

		latency_add(&result->latency, took);
		result->ns += took;
		result->accesses++;
		if (!right)
			note_wrong(result, page);
	}
}

void run_fault(unsigned percent, unsigned ballast_percent)
{
	struct result *result = calloc(1, sizeof *result);
	struct rusage from, to;

	if (result == NULL)
		fail("calloc");
	map_working_set();
	time_phase(NULL, "fill");
	usleep(SETTLE_US);
	connect_daemon();
	page_out();
	if (present_pages() > page_count / 2) {
		fprintf(stderr, "workloads: more than half of the memory stayed\n");
		_exit(1);
	}
	if (ballast_percent > 0)
		write_ballast(page_count * ballast_percent / 100 * PAGE_BYTES);
	usleep(SETTLE_US);
	get_usage(RUSAGE_SELF, &from);
	time_faults(percent, result);
	get_usage(RUSAGE_SELF, &to);
	print_result("fault", result, &from, &to);
	free(result);
}
