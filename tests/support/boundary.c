/* SPDX-License-Identifier: MIT */
/*
 * boundary — a client that goes through every operation of its swap once, in the same order every time.
 *
 *   boundary [REST_MS]      rest after each page-out, so that pages are written to a backend
 *
 * Under `drive --fail`: attach, fill, page out, fault from every backing, page out again what was kept, fork with a
 * child that verifies and changes, mremap, MADV_DONTNEED, page in. Every byte is checked after each step.
 * Exit status: 0 every byte was right; 4 some pages could not be given back (SIGBUS on a touch, its documented
 * end) and all others were right; 5 the forked child was killed; 3 a wrong byte.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define OUT_MS_MAX 300 /* what is not out by then stays: the failure under test may forbid it */

static const size_t page_count = 256;
static unsigned rest_ms;
static uint8_t *area;
static unsigned *versions; /* on the stack: never out */
static sigjmp_buf lost;
static size_t lost_pages;
static bool child_killed;

static void on_bus_error(int number)
{
	(void)number;
	siglongjmp(lost, 1);
}

/* By page: zero, one word, text that compresses, noise. */
static void content(uint64_t *words, size_t page, unsigned version)
{
	uint64_t key = (page + 1) * 0x9E3779B97F4A7C15ULL + version;

	for (size_t i = 0; i < PAGE / 8; i++) {
		key ^= key << 13;
		key ^= key >> 7;
		key ^= key << 17;
		words[i] = page % 4 == 0 ? 0 : page % 4 == 1 ? page + version : page % 4 == 2 ? key & 0xff : key;
	}
}

static void write_pages(size_t first, size_t count, unsigned version)
{
	for (volatile size_t i = first; i < first + count; i++) {
		versions[i] = version;
		if (sigsetjmp(lost, 1) == 0)
			content((uint64_t *)(area + i * PAGE), i, version);
		else
			lost_pages++;
	}
}

static void check(size_t first, size_t count, const char *when)
{
	static uint64_t want[PAGE / 8];

	for (volatile size_t i = first; i < first + count; i++) {
		content(want, i, versions[i]);
		if (sigsetjmp(lost, 1)) {
			lost_pages++;
		} else if (memcmp(want, area + i * PAGE, PAGE) != 0) {
			fprintf(stderr, "boundary: WRONG BYTE %s, page %zu\n", when, i);
			_exit(3);
		}
	}
}

static bool is_out(void)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry = 0;
	bool out = true;

	for (size_t i = 0; i < page_count; i++)
		if (pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)area / PAGE + i) * 8) == 8)
			out &= !(entry >> 63);
	close(fd);
	return out;
}

static void page_out(void)
{
	kill(getppid(), SIGUSR1);
	for (unsigned ms = 0; ms < OUT_MS_MAX && !is_out(); ms++)
		usleep(1000);
	usleep(rest_ms * 1000);
}

static void fork_and_check(void)
{
	int status = 0;
	pid_t pid = fork();

	if (pid == 0) {
		check(0, page_count, "in the child");
		write_pages(0, page_count / 2, 9);
		check(0, page_count, "in the child, changed");
		_exit(lost_pages ? 4 : 0);
	}
	waitpid(pid, &status, 0);
	if (WIFSIGNALED(status))
		child_killed = true;
	else if (WEXITSTATUS(status) == 4)
		lost_pages++;
	else if (WEXITSTATUS(status))
		_exit(WEXITSTATUS(status));
	check(0, page_count, "after the child");
}

static void move_it(void)
{
	uint8_t *to = mmap(NULL, page_count * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	area = mremap(area, page_count * PAGE, page_count * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	if (area == MAP_FAILED)
		_exit(6);
}

int main(int argc, char **argv)
{
	unsigned table[256] = { 0 };
	struct sigaction action = { .sa_handler = on_bus_error, .sa_flags = SA_NODEFER };

	if (argc > 1)
		rest_ms = (unsigned)strtoul(argv[1], NULL, 0);
	versions = table;
	sigaction(SIGBUS, &action, NULL);
	area = mmap(NULL, page_count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	write_pages(0, page_count, 1);
	usleep(50000); /* long enough to be seen, and managed */
	page_out();
	check(0, page_count, "out and back");
	page_out(); /* of copies that were kept */
	write_pages(0, page_count / 3, 2);
	check(0, page_count, "a part written");
	page_out();
	fork_and_check();
	page_out();
	move_it();
	check(0, page_count / 2, "moved while out");
	page_out();
	kill(getppid(), SIGUSR2);
	check(0, page_count, "paged in");
	return child_killed ? 5 : lost_pages ? 4 : 0;
}
