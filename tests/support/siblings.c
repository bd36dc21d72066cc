/* SPDX-License-Identifier: MIT */
/*
 * siblings — many processes of one that fill their memory at the same time, each a part of the limit.
 *
 *   siblings PROCESSES MIB
 *
 * The parent, which is too small to be managed, writes what all have in common, forks, and lets them begin at once: each
 * fills MIB MiB of its own, then reads all of it and what is common. So they come under management, are registered and run into the
 * limit together, and their common pages must be copied before they can go. Exit status 0: every byte was right.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define COMMON_BYTES (3UL << 19)

/* Five words of eight are as good as random: it takes time to compress, and LZ4 makes 1.6 : 1 of it. */
static uint64_t word_of(uint64_t seed, size_t i)
{
	uint64_t word = (seed << 40) + i * 0x9E3779B97F4A7C15ULL;

	word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9ULL;
	return i % 8 < 5 ? word ^ word >> 27 : seed;
}

static void fill(uint64_t *words, size_t bytes, uint64_t seed)
{
	for (size_t i = 0; i < bytes / 8; i++)
		words[i] = word_of(seed, i);
}

static void check(const uint64_t *words, size_t bytes, uint64_t seed)
{
	for (size_t i = 0; i < bytes / 8; i++)
		if (words[i] != word_of(seed, i)) {
			fprintf(stderr, "siblings: process %lu, WRONG BYTE at %zu: %lx\n", seed, i * 8, words[i]);
			_exit(3);
		}
}

static uint64_t *map(size_t bytes)
{
	void *area = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (area == MAP_FAILED) {
		perror("siblings: mmap");
		_exit(1);
	}
	return area;
}

static _Noreturn void run(const uint64_t *common, size_t bytes, uint64_t seed, int begin_fd)
{
	uint64_t *own = map(bytes);
	char byte;

	if (read(begin_fd, &byte, 1) != 0)
		_exit(1);
	fill(own, bytes, seed);
	for (unsigned turn = 0; turn < 2; turn++) {
		check(own, bytes, seed);
		check(common, COMMON_BYTES, 0);
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	unsigned long processes = argc == 3 ? strtoul(argv[1], NULL, 10) : 0, mib = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
	uint64_t *common = map(COMMON_BYTES);
	int begin[2], worst = 0;

	if (processes == 0 || mib == 0 || pipe(begin) != 0)
		return 2;
	fill(common, COMMON_BYTES, 0);
	for (unsigned long i = 1; i <= processes; i++) {
		pid_t pid = fork();

		if (pid < 0)
			return 1;
		if (pid == 0) {
			close(begin[1]);
			run(common, mib << 20, i, begin[0]);
		}
	}
	usleep(100000); /* all wait by then, or begin a little later */
	close(begin[1]);
	for (unsigned long i = 0; i < processes; i++) {
		int status;

		if (wait(&status) < 0)
			return 1;
		if (!WIFEXITED(status) || WEXITSTATUS(status))
			worst = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
	}
	return worst;
}
