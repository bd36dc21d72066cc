/* SPDX-License-Identifier: MIT */
#include "latency.h"

#define SUB_BITS 4u
#define SUB (1u << SUB_BITS)

static unsigned bucket_of(uint64_t ns)
{
	if (ns < SUB)
		return (unsigned)ns;
	unsigned octave = 63u - (unsigned)__builtin_clzll(ns);
	unsigned bucket = (octave - SUB_BITS + 1) * SUB + (unsigned)((ns >> (octave - SUB_BITS)) & (SUB - 1));

	return bucket < LATENCY_BUCKETS ? bucket : LATENCY_BUCKETS - 1;
}

uint64_t latency_bound_ns(unsigned bucket)
{
	if (bucket < SUB)
		return bucket;
	return (uint64_t)(SUB + bucket % SUB) << (bucket / SUB - 1);
}

void latency_add(struct latency *latency, uint64_t ns)
{
	latency->counts[bucket_of(ns)]++;
}

void latency_merge(struct latency *into, const struct latency *from)
{
	for (unsigned i = 0; i < LATENCY_BUCKETS; i++)
		into->counts[i] += from->counts[i];
}

uint64_t latency_count_from(const struct latency *latency, uint64_t ns)
{
	uint64_t count = 0;

	for (unsigned i = bucket_of(ns); i < LATENCY_BUCKETS; i++)
		count += latency->counts[i];
	return count;
}

double latency_quantile_ns(const struct latency *latency, uint64_t least_ns, double quantile)
{
	uint64_t total = latency_count_from(latency, least_ns), seen = 0;

	for (unsigned i = bucket_of(least_ns); i < LATENCY_BUCKETS; i++) {
		seen += latency->counts[i];
		if (seen != 0 && (double)seen >= quantile * (double)total)
			return (double)(latency_bound_ns(i) + latency_bound_ns(i + 1)) / 2;
	}
	return 0;
}

void latency_print(const struct latency *latency, FILE *file)
{
	const char *separator = "";

	fputc('[', file);
	for (unsigned i = 0; i < LATENCY_BUCKETS; i++) {
		if (latency->counts[i] == 0)
			continue;
		fprintf(file, "%s[%llu,%llu]", separator, (unsigned long long)latency_bound_ns(i),
			(unsigned long long)latency->counts[i]);
		separator = ",";
	}
	fputc(']', file);
}
