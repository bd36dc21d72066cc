/* SPDX-License-Identifier: MIT */
/*
 * races — a client that runs again and again into one race of the kernel's interface.
 *
 *   races SCENARIO ROUNDS
 *
 * The daemon (`drive`) is made late at the moment that matters, by --delay; without its guard against the race some
 * round reads a wrong byte. Exit status 3 then, 0 when every round read what it must, 5 when a round could not be
 * brought about at all.
 *
 *   remap   unmap memory and map other memory there, while some of it is about to be moved out
 *   refill  give a page up that another thread has just touched, while it is being filled
 *   open    the same with pages of the run that a stream has brought about
 *   awaited touch a page of such a run behind one that was given up: the run brings neither, and no other fault does
 *   zap     give up much memory at once, while it is being evicted
 *   sparse  touch memory for the first time between pages that are being moved out
 *   freed   give pages up that are out, again and again; for daemons that die
 *   wiped   a child finds zeros in memory of which a part was out, and another never, when they parted; for daemons that die
 *   parted  the same, and the parent unmaps it as soon as they have parted
 *   beside  ... as they part, by another thread
 *   fork    parent and child write to pages that were out when they parted, and have them evicted again
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define WAIT_MS_MAX 2000

static const char *scenario;
static uint8_t *large; /* enough of it to be managed */

static _Noreturn void wrong(size_t page, uint64_t found, uint64_t expected)
{
	fprintf(stderr, "races %s: WRONG BYTE, page %zu: %lx instead of %lx\n", scenario, page, found, expected);
	_exit(3);
}

static uint8_t *map(void *at, size_t pages)
{
	uint8_t *area = mmap(at, pages * PAGE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0);

	if (area == MAP_FAILED)
		_exit(6);
	(void)madvise(area, pages * PAGE, MADV_NOHUGEPAGE);
	return area;
}

/* Half of a page by its number and version, so that it is not the same word all over. */
static uint64_t word_of(size_t page, uint64_t version) { return (version << 32 | page) + 1; }

static void write_page(uint8_t *area, size_t page, uint64_t version)
{
	uint64_t *words = (uint64_t *)(area + page * PAGE);

	for (size_t i = 0; i < PAGE / 16; i++)
		words[i] = word_of(page, version) + i;
}

static void check_page(const uint8_t *area, size_t page, uint64_t version)
{
	const volatile uint64_t *words = (const uint64_t *)(area + page * PAGE);

	for (size_t i = 0; i < PAGE / 16; i++)
		if (words[i] != word_of(page, version) + i)
			wrong(page, words[i], word_of(page, version) + i);
}

static void check_zero(const uint8_t *area, size_t page)
{
	const volatile uint64_t *words = (const uint64_t *)(area + page * PAGE);

	for (size_t i = 0; i < PAGE / 8; i++)
		if (words[i] != 0)
			wrong(page, words[i], 0);
}

/* Pages of [first, first + count) that are in memory. */
static size_t count_resident(const uint8_t *area, size_t first, size_t count)
{
	static int fd = -1;
	size_t resident = 0;
	uint64_t entry;

	if (fd < 0)
		fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	for (size_t i = first; i < first + count; i++)
		if (pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)area / PAGE + i) * 8) == 8)
			resident += entry >> 63;
	return resident;
}

/* Until no more than that many pages are in memory. */
static bool wait_until_out(const uint8_t *area, size_t pages, size_t left)
{
	for (unsigned ms = 0; ms < WAIT_MS_MAX; ms++) {
		if (count_resident(area, 0, pages) <= left)
			return true;
		usleep(1000);
	}
	return false;
}

/* Have `drive` page everything out; it is our parent. */
static bool page_out(const uint8_t *area, size_t pages)
{
	kill(getppid(), SIGUSR1);
	return wait_until_out(area, pages, 0);
}

/* Memory that is mapped at its first use. */
static bool write_and_page_out(uint8_t **area, size_t pages, unsigned round)
{
	if (!*area)
		*area = map(NULL, pages);
	for (size_t i = 0; i < pages; i++)
		write_page(*area, i, round);
	return page_out(*area, pages);
}

static unsigned remap(unsigned round)
{
	enum { PAGES = 64 };
	static uint8_t *area;

	if (!area) {
		area = map(NULL, PAGES);
		for (size_t i = 0; i < PAGES; i++)
			write_page(area, i, 0);
	}
	if (!wait_until_out(area, PAGES, PAGES - 1))
		return 0;
	for (size_t i = 0; i < PAGES; i++)
		check_page(area, i, round);
	usleep(round * 131 % 3000); /* so that a batch is chosen, at some time or other */
	munmap(area, PAGES * PAGE);
	map(area, PAGES);
	for (size_t i = 0; i < PAGES; i++)
		write_page(area, i, round + 1);
	usleep(5000);
	for (size_t i = 0; i < PAGES; i++)
		check_page(area, i, round + 1);
	return 1;
}

static uint8_t *refilled;

static void *touch(void *argument)
{
	const volatile uint8_t *byte = refilled + (uintptr_t)argument * PAGE;

	(void)*byte;
	return NULL;
}

static unsigned refill(unsigned round)
{
	enum { PAGES = 64 };
	pthread_t thread;

	if (!write_and_page_out(&refilled, PAGES, round))
		return 0;
	for (size_t i = 0; i < PAGES; i += 8) {
		if (pthread_create(&thread, NULL, touch, (void *)i) != 0)
			_exit(6);
		usleep(1000);
		madvise(refilled + i * PAGE, PAGE, MADV_DONTNEED);
		pthread_join(thread, NULL);
		check_zero(refilled, i);
		check_page(refilled, i + 1, round);
	}
	return 1;
}

static uint8_t *streamed;

static void *stream(void *argument)
{
	for (size_t i = 0; i < (uintptr_t)argument; i++)
		(void)*(const volatile uint8_t *)(streamed + i * PAGE);
	return NULL;
}

/* Whatever its reader has come to by then. */
static unsigned open_runs(unsigned round)
{
	enum { PAGES = 512, STEP = 16 };
	pthread_t thread;

	if (!write_and_page_out(&streamed, PAGES, round))
		return 0;
	if (pthread_create(&thread, NULL, stream, (void *)(uintptr_t)PAGES) != 0)
		_exit(6);
	for (size_t i = STEP; i < PAGES; i += STEP) {
		usleep(500 + round % 4 * 200);
		madvise(streamed + i * PAGE, PAGE, MADV_DONTNEED);
	}
	pthread_join(thread, NULL);
	for (size_t i = 0; i < PAGES; i++)
		if (i == 0 || i % STEP != 0)
			check_page(streamed, i, round);
		else
			check_zero(streamed, i);
	return 1;
}

static void lost(int signal)
{
	(void)signal;
	(void)!write(STDERR_FILENO, "races: a fault is answered by nobody\n", 37);
	_exit(3);
}

/* The reader's windows double: its touch of the last page has begun a run of 32. */
static unsigned awaited(unsigned round)
{
	enum { PAGES = 64, READ = 32, GIVEN_UP = 40, TOUCHED = 50 };
	pthread_t thread;

	if (!write_and_page_out(&streamed, PAGES, round))
		return 0;
	signal(SIGALRM, lost);
	alarm(20);
	if (pthread_create(&thread, NULL, stream, (void *)(uintptr_t)READ) != 0)
		_exit(6);
	usleep(round % 20 * 1500);
	madvise(streamed + GIVEN_UP * PAGE, PAGE, MADV_DONTNEED);
	check_page(streamed, TOUCHED, round);
	check_zero(streamed, GIVEN_UP);
	pthread_join(thread, NULL);
	alarm(0);
	return 1;
}

static unsigned zap(unsigned round)
{
	enum { PAGES = 16384 };
	static uint8_t *area;

	if (!area)
		area = map(NULL, PAGES);
	for (size_t i = 0; i < PAGES; i++)
		*(uint64_t *)(area + i * PAGE) = word_of(i, round);
	if (!wait_until_out(area, PAGES, PAGES - 1))
		return 0;
	madvise(area, PAGES * PAGE, MADV_DONTNEED);
	usleep(3000);
	for (size_t i = 0; i < PAGES; i++)
		if (*(volatile uint64_t *)(area + i * PAGE) != 0)
			wrong(i, *(uint64_t *)(area + i * PAGE), 0);
	return 1;
}

/* Every other page holds one word all over: back in memory such a page has no copy that would end a run of pages that
 * were never touched. */
static void check_word(const uint8_t *area, size_t page, uint64_t version)
{
	const volatile uint64_t *words = (const uint64_t *)(area + page * PAGE);

	for (size_t i = 0; i < PAGE / 8; i++)
		if (words[i] != word_of(page, version))
			wrong(page, words[i], word_of(page, version));
}

static unsigned sparse(unsigned round)
{
	enum { PAGES = 512 };
	uint8_t *area = map(NULL, PAGES);

	for (size_t i = 1; i < PAGES; i += 2)
		for (size_t k = 0; k < PAGE / 8; k++)
			((uint64_t *)(area + i * PAGE))[k] = word_of(i, round);
	if (!wait_until_out(area, PAGES, PAGES / 4)) /* those filled last stay for a while, whichever they are */
		return 0;
	for (size_t i = 1; i < PAGES; i += 2)
		check_word(area, i, round);
	for (size_t i = 0; i < PAGES; i += 2)
		check_zero(area, i);
	for (size_t i = 1; i < PAGES; i += 2)
		check_word(area, i, round);
	munmap(area, PAGES * PAGE);
	return 1;
}

static unsigned freed(unsigned round)
{
	enum { PAGES = 256 };
	static uint8_t *area;

	if (!area)
		area = map(NULL, PAGES);
	for (size_t i = 0; i < PAGES; i++)
		write_page(area, i, round);
	if (!wait_until_out(area, PAGES, PAGES / 4)) /* those filled last stay for a while */
		return 0;
	for (size_t i = 0; i < PAGES; i += 2)
		madvise(area + i * PAGE, PAGE, MADV_DONTNEED);
	for (size_t i = 0; i < PAGES; i++)
		if (i % 2)
			check_page(area, i, round);
		else
			check_zero(area, i);
	return 1;
}

static unsigned part(unsigned round)
{
	enum { PAGES = 64 };
	static uint8_t *area;
	int status = 0;
	pid_t pid;

	if (!area)
		area = map(NULL, PAGES);
	for (size_t i = 0; i < PAGES; i++)
		write_page(area, i, 3 * round);
	if (!page_out(area, PAGES))
		return 0;
	pid = fork();
	for (size_t i = 0; i < PAGES; i++)
		if (i % 2 == (pid == 0))
			write_page(area, i, 3 * round + 1 + (pid == 0));
	(void)wait_until_out(area, PAGES, PAGES - 1);
	for (size_t i = 0; i < PAGES; i++)
		check_page(area, i, i % 2 == (pid == 0) ? 3 * round + 1 + (pid == 0) : 3 * round);
	if (pid == 0)
		_exit(0);
	if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
		_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 4);
	return 1;
}

/* Has just been written to for the first time: it has no slot. */
static void write_anew(uint8_t *area, size_t page, uint64_t version)
{
	madvise(area + page * PAGE, PAGE, MADV_DONTNEED);
	write_page(area, page, version);
}

enum { WIPED_PAGES = 256 };

static void *unmap_in_a_moment(void *area)
{
	usleep(1000); /* longer than fork copies, shorter than the daemon is late */
	munmap(area, WIPED_PAGES * PAGE);
	return NULL;
}

/* A child finds zeros; the parent, what it has, unless it unmaps that: `unmap`, in the parent or beside it. */
static unsigned wipe(unsigned round, void *(*unmap)(void *area), bool is_beside)
{
	uint8_t *area = map(NULL, WIPED_PAGES);
	pthread_t thread;
	int status = 0;
	pid_t pid;

	madvise(area, WIPED_PAGES * PAGE, MADV_WIPEONFORK);
	for (size_t i = 0; i < WIPED_PAGES; i++)
		write_page(area, i, round);
	if (!wait_until_out(area, WIPED_PAGES, WIPED_PAGES * 3 / 4))
		return 0;
	for (size_t i = 1; i < WIPED_PAGES; i += 2)
		write_anew(area, i, round);
	write_anew(large, 0, round);
	if (is_beside && pthread_create(&thread, NULL, unmap, area) != 0)
		_exit(6);
	pid = fork();
	if (pid > 0 && unmap && !is_beside)
		unmap(area);
	for (size_t i = 0; i < WIPED_PAGES; i++)
		if (pid == 0)
			check_zero(area, i);
		else if (!unmap)
			check_page(area, i, round);
	if (pid == 0)
		_exit(0);
	if (is_beside)
		pthread_join(thread, NULL);
	if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
		_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 4);
	if (!unmap)
		munmap(area, WIPED_PAGES * PAGE);
	return 1;
}

static void *unmap_at_once(void *area)
{
	munmap(area, WIPED_PAGES * PAGE);
	return NULL;
}

static unsigned wiped(unsigned round) { return wipe(round, NULL, false); }
static unsigned parted(unsigned round) { return wipe(round, unmap_at_once, false); }
static unsigned beside(unsigned round) { return wipe(round, unmap_in_a_moment, true); }

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		unsigned (*run)(unsigned round); /* 0: it did not come about */
	} scenarios[] = { { "remap", remap }, { "refill", refill }, { "open", open_runs },
			  { "awaited", awaited }, { "zap", zap },
			  { "sparse", sparse }, { "freed", freed }, { "wiped", wiped }, { "parted", parted },
			  { "beside", beside }, { "fork", part } };
	unsigned rounds = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 0) : 0, came = 0;

	scenario = argc > 1 ? argv[1] : "";
	large = map(NULL, 512);
	memset(large, 1, 512 * PAGE);
	usleep(100000);
	for (size_t s = 0; s < sizeof scenarios / sizeof *scenarios; s++)
		if (strcmp(scenarios[s].name, scenario) == 0)
			for (unsigned round = 0; round < rounds; round++)
				came += scenarios[s].run(round);
	fprintf(stderr, "races %s: %u of %u rounds\n", scenario, came, rounds);
	return came > rounds / 2 ? 0 : 5;
}
