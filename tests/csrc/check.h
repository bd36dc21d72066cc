/* SPDX-License-Identifier: MIT */
/*
 * check — what every C test needs: a check that ends the test, and random numbers from a seed.
 *
 * usage: test_X [SEED [bench]]   exit status 0: passed. SEED 0 takes one from the clock; the seed
 * in use is printed, and the same seed gives the same run (but for the order of threads).
 */
#ifndef VSWAP_TEST_CHECK_H
#define VSWAP_TEST_CHECK_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHECK(condition)                                                               \
	do {                                                                           \
		if (!(condition)) {                                                    \
			fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, \
				#condition);                                           \
			exit(1);                                                       \
		}                                                                      \
	} while (0)

static inline uint64_t test_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* splitmix64: every state is a good one, so a seed may be any number. */
static inline uint64_t random_next(uint64_t *state)
{
	uint64_t value = *state += 0x9e3779b97f4a7c15u;

	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
	value = (value ^ value >> 27) * 0x94d049bb133111ebu;
	return value ^ value >> 31;
}

static inline unsigned random_below(uint64_t *state, unsigned limit)
{
	return (unsigned)(random_next(state) % limit);
}

/* The seed of the run, printed. */
static inline uint64_t test_seed(int argc, char **argv)
{
	uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;

	if (seed == 0)
		seed = test_now_ns();
	printf("%s seed %llu\n", argv[0], (unsigned long long)seed);
	fflush(stdout);
	return seed;
}

static inline bool test_is_bench(int argc, char **argv)
{
	return argc > 2 && strcmp(argv[2], "bench") == 0;
}

#endif
