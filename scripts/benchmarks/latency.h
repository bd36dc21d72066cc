/* SPDX-License-Identifier: MIT */
/* latency.h — a log-linear histogram of nanoseconds: 16 buckets an octave, so 6 % wide at most. */
#ifndef BENCHMARKS_LATENCY_H
#define BENCHMARKS_LATENCY_H

#include <stdint.h>
#include <stdio.h>

#define LATENCY_BUCKETS 640u /* up to 2^40 ns */

struct latency {
	uint64_t counts[LATENCY_BUCKETS];
};

void latency_add(struct latency *latency, uint64_t ns);
void latency_merge(struct latency *into, const struct latency *from);

/* The lower bound of a bucket. */
uint64_t latency_bound_ns(unsigned bucket);

/* How many took at least `ns`. */
uint64_t latency_count_from(const struct latency *latency, uint64_t ns);

/* The quantile (0 to 1) of those that took at least `least_ns`, as a bucket's middle; 0 when there are none. */
double latency_quantile_ns(const struct latency *latency, uint64_t least_ns, double quantile);

/* As JSON: [[lower bound, count], …] of what is not 0. */
void latency_print(const struct latency *latency, FILE *file);

#endif
