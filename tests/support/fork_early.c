/* SPDX-License-Identifier: MIT */
/*
 * fork_early — fork all the time while the memory is still being brought under management.
 *
 *   fork_early MIB
 *
 * One thread fills MIB MiB in many small mappings, the other forks; each child verifies what its parent
 * had finished by then. A mapping that is registered between the fork and the moment the daemon hears of
 * it is registered in the parent alone: a page of the child's moved out of there would read as zeros.
 * Exit status 0: every byte was right.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define MAPPING_PAGES 64UL
#define GUARD_PAGES 32UL /* a mapping above a smaller guard is taken for a thread's stack */
#define SWEEPS 4
#define SWEEP_PAUSE_US 10000
#define FILL_PAUSE_US 4000

static uint64_t **mappings;
static size_t mapping_count;
static size_t filled; /* mappings that are complete; written by the filling thread alone */

static uint64_t word_of(size_t mapping, size_t word) { return (mapping * 0x9E3779B97F4A7C15ULL) ^ word / 3; }

static uint64_t *map_between_guards(void)
{
	size_t bytes = (MAPPING_PAGES + 2 * GUARD_PAGES) * PAGE;
	char *base = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (base == MAP_FAILED || mprotect(base + GUARD_PAGES * PAGE, MAPPING_PAGES * PAGE, PROT_READ | PROT_WRITE) != 0) {
		perror("fork_early: mmap");
		_exit(4);
	}
	return (uint64_t *)(base + GUARD_PAGES * PAGE);
}

static void *fill(void *unused)
{
	for (size_t i = 0; i < mapping_count; i++) {
		mappings[i] = map_between_guards(); /* now, so that there is always something to discover */
		for (size_t word = 0; word < MAPPING_PAGES * PAGE / 8; word++)
			mappings[i][word] = word_of(i, word);
		__atomic_store_n(&filled, i + 1, __ATOMIC_RELEASE);
		usleep(FILL_PAUSE_US);
	}
	return unused;
}

static void verify(size_t count)
{
	for (size_t i = 0; i < count; i++)
		for (size_t word = 0; word < MAPPING_PAGES * PAGE / 8; word++)
			if (mappings[i][word] != word_of(i, word)) {
				fprintf(stderr, "fork_early: pid %d mapping %zu word %zu: %016lx, expected %016lx\n",
					getpid(), i, word, mappings[i][word], word_of(i, word));
				_exit(3);
			}
}

/* The number of mappings is taken before the fork: what is filled later may be half done in the child. */
static pid_t fork_verifier(void)
{
	size_t count = __atomic_load_n(&filled, __ATOMIC_ACQUIRE);
	pid_t pid = fork();

	if (pid == 0) {
		for (int sweep = 0; sweep < SWEEPS; sweep++) {
			verify(count);
			usleep(SWEEP_PAUSE_US); /* be there long enough to be evicted from */
		}
		_exit(0);
	}
	return pid;
}

int main(int argc, char **argv)
{
	size_t mib = argc > 1 ? strtoul(argv[1], NULL, 0) : 64;
	int children = 0, status = 0;
	pthread_t filler;

	mapping_count = (mib << 20) / (MAPPING_PAGES * PAGE);
	mappings = calloc(mapping_count, sizeof *mappings);
	pthread_create(&filler, NULL, fill, NULL);
	while (__atomic_load_n(&filled, __ATOMIC_ACQUIRE) < mapping_count / 8)
		usleep(100);
	for (; __atomic_load_n(&filled, __ATOMIC_ACQUIRE) < mapping_count; children++) {
		pid_t pid = fork_verifier();

		if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0) {
			fprintf(stderr, "fork_early: child ended with status %x\n", status);
			_exit(3);
		}
	}
	pthread_join(filler, NULL);
	verify(mapping_count);
	printf("fork_early: %zu mappings, %d children: all right\n", mapping_count, children);
	return 0;
}
