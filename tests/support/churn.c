/* SPDX-License-Identifier: MIT */
/*
 * churn — a seeded client that does everything to its memory and checks every byte of it.
 *
 *   churn MIB SECONDS SEED [THREADS] [FORKS] [WITHOUT]
 *
 * WITHOUT leaves operations out, to narrow a finding down: d DONTNEED, u munmap, r mremap, p mprotect, o a userfaultfd of
 * its own.
 *
 * Each thread owns blocks of pages. A page's content is a function of (block, page, version, kind), so it
 * can be checked at any time: version 0 reads as zeros. Operations, by chance: write, verify, scan,
 * madvise DONTNEED, munmap and map again, mremap (move, grow), mprotect and back, a userfaultfd of the program's own over a
 * block and away again, fork with a child that verifies, changes and verifies its copy. Exit status 0: every byte was right. A wrong byte is printed
 * with all there is to know about it, and ends the program with status 3.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define BLOCKS 24
#define BLOCK_PAGES_MAX 4096
#define VERSIONS_MAX 5000u

struct block {
	uint8_t *base;
	uint32_t pages;
	uint32_t id;
	uint32_t *versions; /* in the same memory as everything else: swapped too */
};

struct worker {
	uint64_t random;
	struct block blocks[BLOCKS];
	uint32_t block_pages;
	int number, forks;
	uint64_t operations, verified;
};

static volatile int stop;
static int children; /* that live, or are about to */
static uint64_t seed;
static const char *without = "";

static uint64_t next(struct worker *w)
{
	w->random ^= w->random << 13;
	w->random ^= w->random >> 7;
	w->random ^= w->random << 17;
	return w->random;
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	return x ^ x >> 33;
}

/* One of: zeros, one word, text-like, floats, random; by version. */
static void expected(uint64_t *page, uint32_t id, uint32_t number, uint32_t version)
{
	uint64_t key = mix(seed + id * 1000003ULL + number * 7919ULL + version * 104729ULL);

	if (version == 0) {
		memset(page, 0, PAGE);
		return;
	}
	for (unsigned i = 0; i < PAGE / 8; i++)
		switch (version % 5) {
		case 0: page[i] = key; break;
		case 1: page[i] = i % 4 ? 0x2065687420646e61ULL : mix(key + i); break;
		case 2: page[i] = 0x3ff0000000000000ULL + (mix(key + i) & 0xffffff); break;
		case 3: page[i] = mix(key + i); break;
		default: page[i] = i == key % 512 ? key : 0;
		}
}

/* Is it what was there at another time, or is what is known of it wrong: how many of its neighbours' versions are 0? */
static void explain(const struct block *b, uint32_t n)
{
	uint64_t page[PAGE / 8];
	uint32_t zero = 0, version = 0;

	while (version < VERSIONS_MAX) {
		expected(page, b->id, n, version);
		if (memcmp(page, b->base + n * PAGE, PAGE) == 0)
			break;
		version++;
	}
	for (uint32_t i = 0; i < b->pages; i++)
		zero += b->versions[i] == 0;
	fprintf(stderr, "churn: it is of version %u (%u: of none); version 0 have %u of %u pages of its block; versions at %p\n",
		version, VERSIONS_MAX, zero, b->pages, (void *)b->versions);
}

static void verify(struct worker *w, struct block *b, uint32_t n, const char *when)
{
	uint64_t want[PAGE / 8];

	expected(want, b->id, n, b->versions[n]);
	w->verified++;
	if (memcmp(want, b->base + n * PAGE, PAGE) == 0)
		return;
	for (unsigned i = 0; i < PAGE / 8; i++) {
		uint64_t have = ((uint64_t *)(b->base + n * PAGE))[i];

		if (have == want[i])
			continue;
		fprintf(stderr,
			"churn: WRONG BYTE pid %d worker %d %s block %u page %u at %p version %u word %u: "
			"%016lx, expected %016lx, seed %lu; now %016lx\n",
			getpid(), w->number, when, b->id, n, b->base + n * PAGE, b->versions[n], i, have,
			want[i], seed, ((volatile uint64_t *)(b->base + n * PAGE))[i]);
		explain(b, n);
		_exit(3);
	}
}

static void write_page(struct block *b, uint32_t n)
{
	b->versions[n]++;
	expected((uint64_t *)(b->base + n * PAGE), b->id, n, b->versions[n]);
}

static void *map(uint32_t pages)
{
	void *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED) {
		perror("churn: mmap");
		_exit(4);
	}
	return p;
}

static void drop(struct block *b, uint32_t first, uint32_t count)
{
	madvise(b->base + first * PAGE, count * PAGE, MADV_DONTNEED);
	memset(b->versions + first, 0, count * sizeof *b->versions);
}

/* What the kernel makes of [at, at + bytes) and its neighbours: the mappings, and whether they are registered (um, uw). */
static void print_mappings(uintptr_t at, uintptr_t bytes)
{
	FILE *smaps = fopen("/proc/self/smaps", "re");
	char line[512];
	bool within = false;

	while (smaps && fgets(line, sizeof line, smaps)) {
		unsigned long start, end;

		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			within = start <= at + bytes && end >= at;
		if (within && (strchr(line, '-') || strncmp(line, "VmFlags", 7) == 0))
			fprintf(stderr, "churn: %s", line);
	}
	if (smaps)
		fclose(smaps);
}

static void remap(struct worker *w, struct block *b)
{
	uint8_t *target = map(b->pages), *p;

	/* An address of its own to move to, so that nothing else is hit. */
	p = mremap(b->base, b->pages * PAGE, b->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target);
	if (p == MAP_FAILED) {
		fprintf(stderr, "churn: mremap of %u pages at %p to %p: %s\n", b->pages, (void *)b->base, (void *)target,
			strerror(errno));
		print_mappings((uintptr_t)b->base, b->pages * PAGE);
		_exit(4);
	}
	b->base = p;
	(void)w;
}

/* A child that another thread forks meanwhile has the descriptor too, and as long as it lives, what it was closed for without
 * UNREGISTER is its own: natively as well. */
static bool is_registered(int fd, struct uffdio_register *range)
{
	for (;;) {
		int before = __atomic_load_n(&children, __ATOMIC_SEQ_CST);

		if (ioctl(fd, UFFDIO_REGISTER, range) == 0)
			return true;
		if (errno != EBUSY || before == 0)
			return false;
		usleep(1000);
	}
}

/* Where only what is protected faults, and nothing is: so all there is to see is what was there. */
static void watch(struct worker *w, struct block *b, uint32_t n, uint32_t count)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .range = { (uintptr_t)b->base, b->pages * PAGE },
					 .mode = UFFDIO_REGISTER_MODE_WP };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) != 0 || !is_registered(fd, &range)) {
		perror("churn: userfaultfd");
		_exit(4);
	}
	for (uint32_t i = 0; i < b->pages; i++)
		verify(w, b, i, "watched by the program");
	for (uint32_t i = 0; i < count; i++)
		write_page(b, n + i);
	for (uint32_t i = 0; i < count; i++)
		verify(w, b, n + i, "written to, watched by the program");
	drop(b, n, count / 2);
	if (n % 2 && ioctl(fd, UFFDIO_UNREGISTER, &range.range) != 0) {
		perror("churn: UFFDIO_UNREGISTER");
		_exit(4);
	}
	verify(w, b, n, "no longer watched");
	close(fd);
	verify(w, b, n, "its descriptor closed");
}

static void child(struct worker *w, struct block *b)
{
	for (int i = 0; i < 200; i++) {
		uint32_t n = (uint32_t)(next(w) % b->pages);

		verify(w, b, n, "in child");
		if (i % 3 == 0) {
			write_page(b, n);
			verify(w, b, n, "in child, after write");
		}
	}
	for (int i = 0; i < BLOCKS; i++)
		verify(w, &w->blocks[i], (uint32_t)(next(w) % w->blocks[i].pages), "in child, other block");
	_exit(0);
}

static void fork_one(struct worker *w, struct block *b)
{
	int status;
	pid_t pid;

	__atomic_fetch_add(&children, 1, __ATOMIC_SEQ_CST);
	pid = fork();
	if (pid == 0)
		child(w, b);
	if (pid < 0) {
		__atomic_fetch_sub(&children, 1, __ATOMIC_SEQ_CST);
		return;
	}
	for (int i = 0; i < 50; i++) {
		uint32_t n = (uint32_t)(next(w) % b->pages);

		if (i % 2)
			write_page(b, n);
		verify(w, b, n, "beside child");
	}
	waitpid(pid, &status, 0);
	__atomic_fetch_sub(&children, 1, __ATOMIC_SEQ_CST);
	if (status != 0) {
		fprintf(stderr, "churn: child %d ended with status %x\n", pid, status);
		_exit(3);
	}
}

static void operate(struct worker *w)
{
	struct block *b = &w->blocks[next(w) % BLOCKS];
	uint32_t n = (uint32_t)(next(w) % b->pages);
	uint32_t count = (uint32_t)(next(w) % 64 + 1);
	uint64_t what = next(w) % 1000;

	if (count > b->pages - n)
		count = b->pages - n;
	w->operations++;
	if ((what >= 930 && what < 960 && strchr(without, 'd')) ||
	    (what >= 960 && what < 970 && strchr(without, 'u')) ||
	    (what >= 970 && what < 985 && strchr(without, 'r')) ||
	    (what >= 985 && what < 991 && strchr(without, 'p')) || (what >= 991 && what < 995 && strchr(without, 'o')))
		return;
	if (what < 350) {
		for (uint32_t i = 0; i < count; i++)
			write_page(b, n + i);
	} else if (what < 900) {
		for (uint32_t i = 0; i < count; i++)
			verify(w, b, n + i, "in run");
	} else if (what < 930) {
		for (uint32_t i = 0; i < b->pages; i++)
			verify(w, b, i, "in scan");
	} else if (what < 960) {
		drop(b, n, count);
	} else if (what < 970) {
		munmap(b->base, b->pages * PAGE);
		memset(b->versions, 0, b->pages * sizeof *b->versions);
		b->base = map(b->pages);
	} else if (what < 985) {
		remap(w, b);
	} else if (what < 991) {
		mprotect(b->base + n * PAGE, count * PAGE, PROT_READ);
		verify(w, b, n, "read-only");
		mprotect(b->base + n * PAGE, count * PAGE, PROT_READ | PROT_WRITE);
	} else if (what < 995) {
		watch(w, b, n, count);
	} else if (w->forks) {
		fork_one(w, b);
	}
}

static void *run(void *argument)
{
	struct worker *w = argument;

	for (int i = 0; i < BLOCKS; i++) {
		struct block *b = &w->blocks[i];

		b->id = (uint32_t)(w->number * BLOCKS + i);
		b->pages = w->block_pages;
		b->base = map(b->pages);
		b->versions = calloc(b->pages, sizeof *b->versions);
		for (uint32_t n = 0; n < b->pages; n++)
			write_page(b, n);
	}
	while (!stop)
		operate(w);
	for (int i = 0; i < BLOCKS; i++)
		for (uint32_t n = 0; n < w->blocks[i].pages; n++)
			verify(w, &w->blocks[i], n, "at end");
	return NULL;
}

int main(int argc, char **argv)
{
	uint64_t mib = argc > 1 ? strtoull(argv[1], NULL, 0) : 64, operations = 0, verified = 0;
	unsigned seconds = argc > 2 ? (unsigned)atoi(argv[2]) : 10;
	int threads = argc > 4 ? atoi(argv[4]) : 1;
	struct worker *workers;
	pthread_t ids[64];

	without = argc > 6 ? argv[6] : "";
	seed = argc > 3 ? strtoull(argv[3], NULL, 0) : 1;
	workers = calloc((size_t)threads, sizeof *workers);
	for (int i = 0; i < threads && i < 64; i++) {
		workers[i].random = mix(seed * 64 + (uint64_t)i + 1) | 1;
		workers[i].number = i;
		workers[i].forks = argc > 5 ? atoi(argv[5]) : 0;
		workers[i].block_pages = (uint32_t)(mib * 256 / (uint64_t)threads / BLOCKS);
		pthread_create(&ids[i], NULL, run, &workers[i]);
	}
	sleep(seconds);
	stop = 1;
	for (int i = 0; i < threads; i++) {
		pthread_join(ids[i], NULL);
		operations += workers[i].operations;
		verified += workers[i].verified;
	}
	printf("churn: seed %lu operations %lu pages verified %lu: all right\n", seed, operations, verified);
	return 0;
}
