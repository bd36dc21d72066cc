/* SPDX-License-Identifier: MIT */
/* operations_area — memory of known content, in and out of its backing, and checked. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "operations.h"
#include "operations_internal.h"

#define NEIGHBOUR_PAGES 32UL /* more than a thread's guard: the mapping must not look like a stack */
#define OUT_SECONDS_MAX 10.0
#define REPLY_BYTES_MAX (1UL << 18)

enum backing backing;
bool is_tortured;

/* ---- content ---- */

static uint64_t mix(uint64_t x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	return x ^ x >> 33;
}

void area_content(const struct area *area, size_t page, unsigned version, void *ret_bytes)
{
	uint64_t key = mix(area->seed * 0x9e3779b97f4a7c15ULL + page * 7919 + version * 104729 + 1);
	enum backing kind = version ? BACKING_POOL : backing; /* what is written differs from zeros */
	uint64_t words[PAGE / 8];

	if (version && backing == BACKING_RAW)
		kind = BACKING_RAW;
	for (unsigned i = 0; i < PAGE / 8; i++)
		switch (kind) {
		case BACKING_ZERO: words[i] = 0; break;
		case BACKING_SAME: words[i] = key; break;
		case BACKING_RAW: words[i] = mix(key + i); break;
		default: words[i] = i % 4 ? 0x2065687420646e61ULL : mix(key + i);
		}
	memcpy(ret_bytes, words, PAGE);
}

uint8_t *area_page(const struct area *area, size_t page) { return area->at + page * PAGE; }

void area_write(const struct area *area, size_t first, size_t count, unsigned version)
{
	for (size_t i = first; i < first + count; i++)
		area_content(area, i, version, area_page(area, i));
}

void area_check_at(const struct area *area, size_t first, size_t count, unsigned version,
		   const void *memory, const char *when)
{
	const uint8_t *at = memory;

	for (size_t i = 0; i < count; i++) {
		uint8_t wanted[PAGE];
		size_t byte = 0;

		area_content(area, first + i, version, wanted);
		if (memcmp(wanted, at + i * PAGE, PAGE) == 0)
			continue;
		while (wanted[byte] == at[i * PAGE + byte])
			byte++;
		must(false, "%s: page %zu of version %u, byte %zu is %02x, not %02x", when, first + i,
		     version, byte, at[i * PAGE + byte], wanted[byte]);
	}
}

void area_check(const struct area *area, size_t first, size_t count, unsigned version, const char *when)
{
	area_check_at(area, first, count, version, area_page(area, first), when);
}

void check_zeros(const void *memory, size_t pages, const char *when)
{
	const uint8_t *at = memory;

	for (size_t i = 0; i < pages * PAGE; i++)
		must(at[i] == 0, "%s: byte %zu of page %zu is %02x, not zero", when, i % PAGE, i / PAGE,
		     at[i]);
}

/* ---- mapping ---- */

struct area area_map(size_t pages)
{
	static uint64_t seed;
	size_t bytes = (pages + 2 * NEIGHBOUR_PAGES) * PAGE;
	struct area area = { .pages = pages, .seed = ++seed };
	uint8_t *whole = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	must_call(whole != MAP_FAILED, "mmap");
	area.at = whole + NEIGHBOUR_PAGES * PAGE;
	must_call(mprotect(area.at, pages * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
	return area;
}

struct area area_make_resident(size_t pages)
{
	struct area area = area_map(pages);

	area_write(&area, 0, pages, 0);
	return area;
}

struct area area_make(size_t pages)
{
	struct area area = area_make_resident(pages);

	bring_out(area.at, pages);
	return area;
}

void area_free(const struct area *area) { must_call(munmap(area->at, area->pages * PAGE) == 0, "munmap"); }

/* ---- where pages are ---- */

static int pagemap_fd = -1;
static pid_t pagemap_pid;

size_t pages_present(const void *memory, size_t pages)
{
	uint64_t entries[512];
	size_t present = 0;

	if (pagemap_pid != getpid()) {
		if (pagemap_fd >= 0)
			close(pagemap_fd);
		pagemap_fd = open("/proc/thread-self/pagemap", O_RDONLY | O_CLOEXEC);
		must_call(pagemap_fd >= 0, "open pagemap");
		pagemap_pid = getpid();
	}
	for (size_t done = 0; done < pages;) {
		size_t count = pages - done < 512 ? pages - done : 512;
		off_t offset = (off_t)(((uintptr_t)memory / PAGE + done) * 8);

		must_call(pread(pagemap_fd, entries, count * 8, offset) == (ssize_t)(count * 8),
			  "read pagemap");
		for (size_t i = 0; i < count; i++)
			present += entries[i] >> 63;
		done += count;
	}
	return present;
}

/* ---- the daemon ---- */

static int control_fd = -1;
static pid_t control_pid;

bool is_managed(void)
{
	const char *path = getenv("VSWAPD_SOCKET");

	return path && *path;
}

static void control_connect(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (control_pid == getpid())
		return;
	if (control_fd >= 0)
		close(control_fd); /* of the parent */
	strncpy(address.sun_path, getenv("VSWAPD_SOCKET"), sizeof address.sun_path - 1);
	control_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	must_call(control_fd >= 0 &&
			  connect(control_fd, (struct sockaddr *)&address, sizeof address) == 0,
		  "connect to the daemon");
	control_pid = getpid();
}

/* One request, one line of answer, in memory of its own that the caller frees. */
static char *control_request(const char *line)
{
	char *reply = mmap(NULL, REPLY_BYTES_MAX, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	size_t used = 0;

	must_call(reply != MAP_FAILED, "mmap");
	control_connect();
	must_call(send(control_fd, line, strlen(line), MSG_NOSIGNAL) == (ssize_t)strlen(line), "send");
	while (used == 0 || reply[used - 1] != '\n') {
		ssize_t got = recv(control_fd, reply + used, REPLY_BYTES_MAX - 1 - used, 0);

		must_call(got > 0, "answer of the daemon");
		used += (size_t)got;
	}
	return reply;
}

static void control_free(char *reply) { munmap(reply, REPLY_BYTES_MAX); }

/* A number of this client in the status; 0 when it is not there. */
static unsigned long own_statistic(const char *name)
{
	char *reply = control_request("{\"op\":\"status\"}\n"), text[64];
	const char *found;
	unsigned long number = 0;

	snprintf(text, sizeof text, "{\"pid\":%d,", getpid());
	found = strstr(reply, text);
	snprintf(text, sizeof text, "\"%s\":", name);
	found = found ? strstr(found, text) : NULL;
	if (found)
		number = strtoul(found + strlen(text), NULL, 10);
	control_free(reply);
	return number;
}

static double now_seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Between two looks at what another process does. */
static void wait_a_moment(void)
{
	struct timespec moment = { 0, 2000000 };

	nanosleep(&moment, NULL);
}

static void page_out_ask(char reason[static 200])
{
	char line[80], *reply;

	snprintf(line, sizeof line, "{\"op\":\"pageout\",\"pid\":%d}\n", getpid());
	reply = control_request(line);
	snprintf(reason, 200, "%s", reply);
	control_free(reply);
}

void page_out_try(void)
{
	char reason[200];

	if (is_managed())
		page_out_ask(reason);
}

void page_out(const void *memory, size_t pages)
{
	double deadline = now_seconds() + OUT_SECONDS_MAX;
	char reason[200] = "";

	if (!is_managed())
		return;
	for (;;) {
		size_t present;

		page_out_ask(reason);
		present = pages_present(memory, pages);
		if (present == 0)
			return;
		must(now_seconds() < deadline, "%zu of %zu pages at %p do not go out: %s", present, pages,
		     memory, reason);
		wait_a_moment();
	}
}

static void wait_for_statistic(const char *name, size_t pages)
{
	double deadline = now_seconds() + OUT_SECONDS_MAX;

	while (own_statistic(name) < pages) {
		must(now_seconds() < deadline, "%s stays at %lu, below %zu", name, own_statistic(name),
		     pages);
		wait_a_moment();
	}
}

static void touch(const void *memory, size_t pages)
{
	const volatile uint8_t *at = memory;

	for (size_t i = 0; i < pages; i++)
		(void)at[i * PAGE];
}

void bring_out(const void *memory, size_t pages)
{
	if (!is_managed())
		return;
	page_out(memory, pages);
	switch (backing) {
	case BACKING_SPILL:
		wait_for_statistic("spill_pages", pages);
		break;
	case BACKING_KEPT:
		touch(memory, pages);
		if (!is_tortured)
			must(own_statistic("kept_pages") >= pages / 2, "only %lu of %zu copies are kept",
			     own_statistic("kept_pages"), pages);
		break;
	case BACKING_RESIDENT:
		touch(memory, pages);
		break;
	default:
		break;
	}
}

void page_out_prepare(void)
{
	uint8_t here = 0;

	(void)pages_present(&here, 1);
	if (is_managed())
		control_connect();
}

void page_out_anew(void)
{
	pagemap_fd = control_fd = -1;
	pagemap_pid = control_pid = 0;
}
