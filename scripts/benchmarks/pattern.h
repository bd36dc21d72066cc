/* SPDX-License-Identifier: MIT */
/* pattern.h — in which order a phase visits pages. Deterministic for a seed. */
#ifndef BENCHMARKS_PATTERN_H
#define BENCHMARKS_PATTERN_H

#include <stdint.h>

enum pattern_kind {
	PATTERN_SEQUENTIAL,
	PATTERN_STRIDED, /* every 16th page, 16 times over with another start */
	PATTERN_RANDOM,  /* uniform */
	PATTERN_HOT,     /* most accesses go to a part of the pages, which lie scattered: four of five to a fifth */
	PATTERN_ZIPF,    /* exponent 0.99, as YCSB has it; popular pages lie scattered */
	PATTERN_CHASE,   /* each page names the next: content_link() */
};

struct pattern {
	enum pattern_kind kind;
	uint64_t page_count;
	uint64_t state;   /* of the random numbers */
	uint64_t next;    /* sequential, strided: accesses so far; chase: the page */
	uint64_t scatter; /* rank * scatter modulo page_count is a permutation */
	double zeta, eta; /* Zipf's constants for page_count */
	uint64_t hot_first, hot_pages; /* ranks of the hot ones, to be changed before the first access, as is ... */
	unsigned hot_permille;         /* of accesses that go there */
};

void pattern_init(struct pattern *pattern, enum pattern_kind kind, uint64_t page_count, uint64_t seed);

/* The next page. */
uint64_t pattern_next(struct pattern *pattern);

#endif
