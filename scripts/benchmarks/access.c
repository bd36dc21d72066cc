/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "access.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "content.h"
#include "pattern.h"

#define CHUNK 1024u    /* accesses chosen at a time, while no clock runs */
#define FAULT_NS 2000u /* few accesses of resident memory take that long, no fault that swaps in is faster */

uint64_t page_count;
uint64_t *memory;
uint64_t wrong_total;

static uint8_t *versions;
static uint64_t seed;

_Noreturn void fail(const char *what)
{
	fprintf(stderr, "workloads: %s: %s\n", what, strerror(errno));
	_exit(1);
}

uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

void *map(uint64_t bytes, int sharing)
{
	void *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);

	if (address == MAP_FAILED)
		fail("mmap");
	return address;
}

void access_init(const struct content_options *content)
{
	page_count = content->page_count;
	seed = content->seed;
	content_init(content);
}

void map_working_set(void)
{
	memory = map(page_count * PAGE_BYTES, MAP_PRIVATE);
	versions = calloc(page_count, 1);
	if (versions == NULL)
		fail("calloc");
}

/* ---- one access ---- */

bool access_page(enum action action, uint64_t page)
{
	uint64_t *data = memory + page * PAGE_WORDS;

	switch (action) {
	case READ:
		return content_check(data, page, versions[page]);
	case VERIFY:
		return content_check_all(data, page, versions[page]);
	case REWRITE:
		versions[page] = content_version_rewritten(versions[page]);
		content_write(data, page, versions[page]);
		return true;
	case UPDATE:
		versions[page] = content_version_updated(versions[page]);
		content_update(data, page, versions[page]);
	}
	return true;
}

void note_wrong(struct result *result, uint64_t page)
{
	if (result->wrong++ < 10)
		fprintf(stderr, "workloads: page %llu is not what was written\n", (unsigned long long)page);
}

/* ---- phases ---- */

static const struct phase phases[] = {
	{ "fill", PATTERN_SEQUENTIAL, REWRITE },
	{ "seq_read", PATTERN_SEQUENTIAL, READ },
	{ "seq_rewrite", PATTERN_SEQUENTIAL, REWRITE },
	{ "rand_read", PATTERN_RANDOM, READ },
	{ "rand_write", PATTERN_RANDOM, UPDATE },
	{ "hot", PATTERN_HOT, READ },
	{ "zipf", PATTERN_ZIPF, READ },
	{ "stride", PATTERN_STRIDED, READ },
	{ "chase", PATTERN_CHASE, READ },
	{ "verify", PATTERN_SEQUENTIAL, VERIFY },
};

#define PHASE_COUNT (sizeof phases / sizeof phases[0])

const struct phase *phase_named(const char *name)
{
	for (size_t i = 0; i < PHASE_COUNT; i++)
		if (strcmp(phases[i].name, name) == 0)
			return &phases[i];
	fprintf(stderr, "workloads: no phase '%s'\n", name);
	exit(2);
}

/* Every access is timed on its own; choosing pages is not. */
static void time_chunk(const struct phase *phase, const uint64_t *pages, unsigned count, struct result *result)
{
	uint64_t before = now_ns(), started = before;

	for (unsigned i = 0; i < count; i++) {
		bool right = access_page(phase->action, pages[i]);
		uint64_t after = now_ns();

		latency_add(&result->latency, after - before);
		before = after;
		if (!right)
			note_wrong(result, pages[i]);
	}
	result->ns += before - started;
	result->accesses += count;
}

/* A chase reads where to go next from the page itself; a wrong link would end anywhere, so it is checked first. */
static uint64_t time_chase(uint64_t page, unsigned count, struct result *result)
{
	uint64_t before = now_ns(), started = before;

	for (unsigned i = 0; i < count; i++) {
		bool right = access_page(READ, page);
		uint64_t next = memory[page * PAGE_WORDS + 1], after = now_ns();

		latency_add(&result->latency, after - before);
		before = after;
		if (!right) {
			note_wrong(result, page);
			next = content_link(page);
		}
		page = next;
	}
	result->ns += before - started;
	result->accesses += count;
	return page;
}

void run_phase(const struct phase *phase, uint64_t percent, struct result *result)
{
	uint64_t left = page_count * percent / 100;
	struct pattern pattern;
	uint64_t pages[CHUNK], page = 0;

	pattern_init(&pattern, phase->pattern, page_count, seed + (uint64_t)(phase - phases));
	while (left > 0) {
		unsigned count = left < CHUNK ? (unsigned)left : CHUNK;

		if (phase->pattern == PATTERN_CHASE) {
			page = time_chase(page, count, result);
		} else {
			for (unsigned i = 0; i < count; i++)
				pages[i] = pattern_next(&pattern);
			time_chunk(phase, pages, count, result);
		}
		left -= count;
	}
}

/* ---- report ---- */

static double seconds_of(struct timeval time)
{
	return (double)time.tv_sec + (double)time.tv_usec / 1e6;
}

void print_result(const char *name, const struct result *result, const struct rusage *from,
	const struct rusage *to)
{
	const struct latency *latency = &result->latency;

	printf("{\"phase\":\"%s\",\"accesses\":%llu,\"seconds\":%.6f,\"ns\":%.1f,\"faults\":%llu,", name,
		(unsigned long long)result->accesses, (double)result->ns / 1e9,
		result->accesses ? (double)result->ns / (double)result->accesses : 0.0,
		(unsigned long long)latency_count_from(latency, FAULT_NS));
	printf("\"p50_ns\":%.0f,\"p99_ns\":%.0f,\"p999_ns\":%.0f,", latency_quantile_ns(latency, FAULT_NS, 0.5),
		latency_quantile_ns(latency, FAULT_NS, 0.99), latency_quantile_ns(latency, FAULT_NS, 0.999));
	printf("\"user_seconds\":%.3f,\"system_seconds\":%.3f,",
		seconds_of(to->ru_utime) - seconds_of(from->ru_utime),
		seconds_of(to->ru_stime) - seconds_of(from->ru_stime));
	printf("\"wrong\":%llu,\"histogram\":", (unsigned long long)result->wrong);
	latency_print(latency, stdout);
	printf("}\n");
	fflush(stdout);
	wrong_total += result->wrong;
}

void get_usage(int whose, struct rusage *usage)
{
	if (getrusage(whose, usage) != 0)
		fail("getrusage");
}
