/* SPDX-License-Identifier: MIT */
/*
 * workloads — use memory the ways that programs do, and say how long each took.
 *
 *   workloads [OPTIONS] access PHASE,…   one process, phase after phase over the same memory
 *   workloads [OPTIONS] usemem N         N processes fill and re-read a share each, all at once
 *   workloads [OPTIONS] fork N           N children, one after the other, of a process that has all of it
 *   workloads [OPTIONS] teardown         one process unmaps all of it, then another ends with as much
 *   workloads [OPTIONS] pageout          swapped out by request, all back, out again unchanged
 *   workloads [OPTIONS] fault PERCENT BALLAST  single faults of what was swapped out by request (pageout.h)
 *   workloads [OPTIONS] data             write the working set to stdout, for others to use
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
#include <unistd.h>

#include "access.h"
#include "pageout.h"

#define PROCESSES_MAX 256u
#define FORK_CHILD_READS 128u
#define FORK_UPDATES 64u     /* of the child, and of its parent meanwhile */

static struct {
	uint64_t mib, seed;
	double ratio;
	unsigned zero_percent, same_percent;
} options = { .mib = 64, .seed = 1, .ratio = 1.6 };

static _Noreturn void usage(void)
{
	fprintf(stderr, "usage: workloads [--mib N] [--ratio R] [--zero PERCENT] [--same PERCENT] "
		"[--seed N] access PHASE[:PERCENT],… | usemem N | fork N | teardown | pageout | fault PERCENT BALLAST | "
		"data\n");
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

static void init_content(uint64_t pages)
{
	access_init(&(struct content_options){ .seed = options.seed, .page_count = pages, .ratio = options.ratio,
		.zero_percent = options.zero_percent, .same_percent = options.same_percent });
}

/* ---- modes ---- */

static void run_access(char *names)
{
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
	struct result result;
	uint64_t started_ns;
};

static _Noreturn void teardown_child(struct teardown *teardown, bool is_unmapping)
{
	struct result *result = &teardown->result;

	map_working_set();
	run_phase(phase_named("fill"), 100, result);
	bool is_wrong = result->wrong != 0;

	memset(result, 0, sizeof *result);
	result->accesses = page_count;
	teardown->started_ns = now_ns();
	if (is_unmapping && munmap(memory, page_count * PAGE_BYTES) != 0)
		fail("munmap");
	if (is_unmapping)
		result->ns = now_ns() - teardown->started_ns;
	_exit(is_wrong ? 3 : 0);
}

/* An access here is a page that goes. */
static void tear_down(const char *name, bool is_unmapping)
{
	struct teardown *teardown = map(sizeof *teardown, MAP_SHARED);
	struct rusage from, to;

	get_usage(RUSAGE_CHILDREN, &from);
	pid_t pid = fork_child();

	if (pid == 0)
		teardown_child(teardown, is_unmapping);
	wait_child();
	if (!is_unmapping)
		teardown->result.ns = now_ns() - teardown->started_ns;
	get_usage(RUSAGE_CHILDREN, &to);
	print_result(name, &teardown->result, &from, &to);
}

static void run_teardown(void)
{
	tear_down("munmap", true);
	tear_down("exit", false);
}

static void write_data(void)
{
	uint64_t page[PAGE_WORDS];

	for (uint64_t i = 0; i < page_count; i++) {
		content_write(page, i, 1);
		if (fwrite(page, sizeof page, 1, stdout) != 1)
			fail("stdout");
	}
	if (fflush(stdout) != 0)
		fail("stdout");
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

static bool is_mode(char **words, int count, const char *name, int arguments)
{
	return count == 1 + arguments && strcmp(words[0], name) == 0;
}

int main(int argc, char **argv)
{
	parse_options(argc, argv);
	int count = argc - optind;
	char **words = argv + optind;

	/* Whoever measures may be killed: nothing of ours goes on then. */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
		fail("prctl");
	if (is_mode(words, count, "usemem", 1)) {
		unsigned processes = (unsigned)number(words[1], 1, PROCESSES_MAX);

		init_content(options.mib * 256 / processes);
		run_usemem(processes);
		return wrong_total != 0 ? 3 : 0;
	}
	init_content(options.mib * 256);
	if (is_mode(words, count, "access", 1))
		run_access(words[1]);
	else if (is_mode(words, count, "fork", 1))
		run_fork((unsigned)number(words[1], 1, 100000));
	else if (is_mode(words, count, "teardown", 0))
		run_teardown();
	else if (is_mode(words, count, "pageout", 0))
		run_pageout();
	else if (is_mode(words, count, "fault", 2))
		run_fault((unsigned)number(words[1], 1, 100), (unsigned)number(words[2], 0, 10000));
	else if (is_mode(words, count, "data", 0))
		write_data();
	else
		usage();
	return wrong_total != 0 ? 3 : 0;
}
