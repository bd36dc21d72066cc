/* SPDX-License-Identifier: MIT */
/*
 * workloads — use memory the ways that programs do, and say how long each took.
 *
 *   workloads [OPTIONS] access PHASE,…   one process, phase after phase over the same memory
 *   workloads [OPTIONS] usemem N         N processes fill and re-read a share each, all at once
 *   workloads [OPTIONS] fork N           N children, one after the other, of a process that has all of it
 *   workloads [OPTIONS] teardown         munmap of one half, exit with the other
 *
 *   --mib N           working set (64)
 *   --ratio R         LZ4 ratio of the data (1.6)
 *   --zero PERCENT    pages that are all zero (0)
 *   --same PERCENT    pages that repeat one word (0)
 *   --seed N          (1)
 *
 *   PHASE   fill seq_read seq_rewrite rand_read rand_write hot zipf stride chase verify, with as many accesses
 *           as there are pages, or NAME:PERCENT of that
 *
 * A read checks four words of the page, `verify` every byte, seq_rewrite writes every byte anew, rand_write
 * two words. One line of JSON on stdout for each phase, when it is over:
 *
 *   phase, accesses, seconds (of the accesses alone), ns (mean of an access), faults (accesses of 2 us and more),
 *   p50_ns p99_ns p999_ns (of those), user_seconds, system_seconds, histogram [[ns, count], …], wrong
 *
 * Exit status 0 when every page was right, 3 when not, 1 for trouble of its own, 2 for wrong usage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "content.h"
#include "latency.h"
#include "pattern.h"

#define CHUNK 1024u          /* accesses chosen at a time, while no clock runs */
#define FAULT_NS 2000u       /* few accesses of resident memory take that long, no fault that swaps in is faster */
#define PROCESSES_MAX 256u
#define FORK_CHILD_READS 128u
#define FORK_UPDATES 64u     /* of the child, and of its parent meanwhile */

static struct {
	uint64_t mib, seed;
	double ratio;
	unsigned zero_percent, same_percent;
} options = { .mib = 64, .seed = 1, .ratio = 1.6 };

/* What a process measured; in shared memory where others report it. */
struct result {
	struct latency latency;
	uint64_t accesses, ns, wrong;
};

static uint64_t page_count;
static uint64_t *memory; /* page p is at memory + p * PAGE_WORDS */
static uint8_t *versions;
static uint64_t wrong_total;

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "workloads: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static _Noreturn void usage(void)
{
	fprintf(stderr, "usage: workloads [--mib N] [--ratio R] [--zero PERCENT] [--same PERCENT] "
		"[--seed N] access PHASE[:PERCENT],… | usemem N | fork N | teardown\n");
	exit(2);
}

static uint64_t number(const char *text, uint64_t least, uint64_t most)
{
	char *end;
	uint64_t value = strtoull(text, &end, 10);

	if (*text == '\0' || *end != '\0' || value < least || value > most)
		usage();
	return value;
}

static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void *map(uint64_t bytes, int sharing)
{
	void *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);

	if (address == MAP_FAILED)
		fail("mmap");
	return address;
}

static void init_content(uint64_t pages)
{
	page_count = pages;
	content_init(&(struct content_options){ .seed = options.seed, .page_count = pages, .ratio = options.ratio,
		.zero_percent = options.zero_percent, .same_percent = options.same_percent });
}

static void map_working_set(void)
{
	memory = map(page_count * PAGE_BYTES, MAP_PRIVATE);
	versions = calloc(page_count, 1);
	if (versions == NULL)
		fail("calloc");
}

/* ---- one access ---- */

enum action { READ, REWRITE, UPDATE, VERIFY };

/* Whether the page was what it must be; a write does not look. */
static bool access_page(enum action action, uint64_t page)
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

static void note_wrong(struct result *result, uint64_t page)
{
	if (result->wrong++ < 10)
		fprintf(stderr, "workloads: page %llu is not what was written\n", (unsigned long long)page);
}

/* ---- phases ---- */

struct phase {
	const char *name;
	enum pattern_kind pattern;
	enum action action;
};

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

static const struct phase *phase_named(const char *name)
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

static void run_phase(const struct phase *phase, uint64_t percent, struct result *result)
{
	uint64_t left = page_count * percent / 100;
	struct pattern pattern;
	uint64_t pages[CHUNK], page = 0;

	pattern_init(&pattern, phase->pattern, page_count, options.seed + (uint64_t)(phase - phases));
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

static void print_result(const char *name, const struct result *result, const struct rusage *from,
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

static void get_usage(int whose, struct rusage *usage)
{
	if (getrusage(whose, usage) != 0)
		fail("getrusage");
}

/* ---- modes ---- */

static void run_access(char *names)
{
	init_content(options.mib * 256);
	map_working_set();
	for (char *name = strtok(names, ","); name != NULL; name = strtok(NULL, ",")) {
		char *colon = strchr(name, ':');
		uint64_t percent = colon ? number(colon + 1, 1, 10000) : 100;

		if (colon != NULL)
			*colon = '\0';
		const struct phase *phase = phase_named(name);
		struct rusage from, to;
		struct result *result = calloc(1, sizeof *result);

		if (result == NULL)
			fail("calloc");
		get_usage(RUSAGE_SELF, &from);
		run_phase(phase, percent, result);
		get_usage(RUSAGE_SELF, &to);
		print_result(name, result, &from, &to);
		free(result);
	}
}

/* A child that dies with its parent. */
static pid_t fork_child(void)
{
	fflush(stdout);
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	if (pid == 0 && prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
		fail("prctl");
	return pid;
}

/* Any child: where several wait for each other, the one that failed is seen at once. */
static void wait_child(void)
{
	int status;

	if (wait(&status) < 0)
		fail("wait");
	if (status != 0) {
		fprintf(stderr, "workloads: a child ended with wait status 0x%x\n", (unsigned)status);
		_exit(WIFEXITED(status) && WEXITSTATUS(status) == 3 ? 3 : 1);
	}
}

static _Noreturn void usemem_child(pthread_barrier_t *barrier, struct result *result)
{
	map_working_set();
	pthread_barrier_wait(barrier); /* all start at once */
	run_phase(phase_named("fill"), 100, result);
	pthread_barrier_wait(barrier); /* the memory of all is wanted at the same time */
	run_phase(phase_named("seq_read"), 100, result);
	_exit(result->wrong ? 3 : 0);
}

struct usemem {
	pthread_barrier_t barrier;
	struct result results[];
};

static struct usemem *map_usemem(unsigned process_count)
{
	struct usemem *usemem = map(sizeof *usemem + process_count * sizeof usemem->results[0], MAP_SHARED);
	pthread_barrierattr_t attributes;

	errno = pthread_barrierattr_init(&attributes);
	if (errno == 0)
		errno = pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
	if (errno == 0)
		errno = pthread_barrier_init(&usemem->barrier, &attributes, process_count + 1);
	if (errno != 0)
		fail("pthread_barrier_init");
	return usemem;
}

/* The time of the whole, ends of processes included: that is what N programs on a machine feel. */
static void run_usemem(unsigned process_count)
{
	struct usemem *usemem = map_usemem(process_count);
	struct result *total = &usemem->results[0];
	struct rusage from, to;

	init_content(options.mib * 256 / process_count);
	get_usage(RUSAGE_CHILDREN, &from);
	for (unsigned i = 0; i < process_count; i++)
		if (fork_child() == 0)
			usemem_child(&usemem->barrier, &usemem->results[i]);
	pthread_barrier_wait(&usemem->barrier);
	uint64_t started = now_ns();

	pthread_barrier_wait(&usemem->barrier);
	for (unsigned i = 0; i < process_count; i++)
		wait_child();
	uint64_t ended = now_ns();

	get_usage(RUSAGE_CHILDREN, &to);
	for (unsigned i = 1; i < process_count; i++) {
		latency_merge(&total->latency, &usemem->results[i].latency);
		total->accesses += usemem->results[i].accesses;
		total->wrong += usemem->results[i].wrong;
	}
	total->ns = ended - started;
	print_result("usemem", total, &from, &to);
}

static void touch_random(enum action action, unsigned count, uint64_t seed, struct result *result)
{
	struct pattern pattern;

	pattern_init(&pattern, PATTERN_RANDOM, page_count, seed);
	for (unsigned i = 0; i < count; i++) {
		uint64_t page = pattern_next(&pattern);

		if (!access_page(action, page))
			note_wrong(result, page);
	}
}

/* An access here is a child: fork, what both do, and its end. */
static void run_fork(unsigned child_count)
{
	struct result *filled = calloc(1, sizeof *filled), *result = calloc(1, sizeof *result);
	struct rusage from, to;

	if (filled == NULL || result == NULL)
		fail("calloc");
	init_content(options.mib * 256);
	map_working_set();
	run_phase(phase_named("fill"), 100, filled);
	get_usage(RUSAGE_SELF, &from);
	for (unsigned i = 0; i < child_count; i++) {
		uint64_t started = now_ns();
		pid_t pid = fork_child();

		if (pid == 0) {
			touch_random(READ, FORK_CHILD_READS, options.seed + 3 * i, result);
			touch_random(UPDATE, FORK_UPDATES, options.seed + 3 * i + 1, result);
			touch_random(READ, FORK_CHILD_READS, options.seed + 3 * i + 1, result);
			_exit(result->wrong ? 3 : 0);
		}
		touch_random(UPDATE, FORK_UPDATES, options.seed + 3 * i + 2, result);
		wait_child();
		uint64_t took = now_ns() - started;

		latency_add(&result->latency, took);
		result->ns += took;
		result->accesses++;
	}
	get_usage(RUSAGE_SELF, &to);
	print_result("fork", result, &from, &to);
}

struct teardown {
	struct result munmap_result;
	uint64_t exit_started_ns;
};

static _Noreturn void teardown_child(struct teardown *teardown)
{
	struct result *result = &teardown->munmap_result;

	map_working_set();
	run_phase(phase_named("fill"), 100, result);
	bool is_wrong = result->wrong != 0;
	uint64_t half = page_count / 2;

	memset(result, 0, sizeof *result);
	uint64_t started = now_ns();

	if (munmap(memory, half * PAGE_BYTES) != 0)
		fail("munmap");
	result->ns = now_ns() - started;
	result->accesses = half;
	teardown->exit_started_ns = now_ns();
	_exit(is_wrong ? 3 : 0);
}

/* An access here is a page that goes. */
static void run_teardown(void)
{
	struct teardown *teardown = map(sizeof *teardown, MAP_SHARED);
	struct result *exit_result = calloc(1, sizeof *exit_result);
	struct rusage from, to;

	if (exit_result == NULL)
		fail("calloc");
	init_content(options.mib * 256);
	get_usage(RUSAGE_CHILDREN, &from);
	pid_t pid = fork_child();

	if (pid == 0)
		teardown_child(teardown);
	wait_child();
	exit_result->ns = now_ns() - teardown->exit_started_ns;
	exit_result->accesses = teardown->munmap_result.accesses;
	get_usage(RUSAGE_CHILDREN, &to);
	print_result("munmap", &teardown->munmap_result, &from, &from);
	print_result("exit", exit_result, &from, &to);
}

/* ---- command line ---- */

static double ratio_of(const char *text)
{
	char *end;
	double value = strtod(text, &end);

	if (*end != '\0' || !(value >= 1.05 && value <= 20))
		usage();
	return value;
}

static void parse_options(int argc, char **argv)
{
	static const struct option names[] = {
		{ "mib", required_argument, NULL, 'm' }, { "ratio", required_argument, NULL, 'r' },
		{ "zero", required_argument, NULL, 'z' }, { "same", required_argument, NULL, 's' },
		{ "seed", required_argument, NULL, 'e' },
		{ NULL, 0, NULL, 0 },
	};

	for (int option; (option = getopt_long(argc, argv, "", names, NULL)) != -1;) {
		switch (option) {
		case 'm': options.mib = number(optarg, 1, 1u << 24); break;
		case 'r': options.ratio = ratio_of(optarg); break;
		case 'z': options.zero_percent = (unsigned)number(optarg, 0, 100); break;
		case 's': options.same_percent = (unsigned)number(optarg, 0, 100); break;
		case 'e': options.seed = number(optarg, 0, UINT64_MAX); break;
		default: usage();
		}
	}
}

int main(int argc, char **argv)
{
	parse_options(argc, argv);
	int left = argc - optind;
	char *mode = left > 0 ? argv[optind] : NULL, *argument = left > 1 ? argv[optind + 1] : NULL;

	/* Whoever measures may be killed: nothing of ours goes on then. */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
		fail("prctl");
	if (left == 2 && strcmp(mode, "access") == 0)
		run_access(argument);
	else if (left == 2 && strcmp(mode, "usemem") == 0)
		run_usemem((unsigned)number(argument, 1, PROCESSES_MAX));
	else if (left == 2 && strcmp(mode, "fork") == 0)
		run_fork((unsigned)number(argument, 1, 100000));
	else if (left == 1 && strcmp(mode, "teardown") == 0)
		run_teardown();
	else
		usage();
	return wrong_total != 0 ? 3 : 0;
}
