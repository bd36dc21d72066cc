/* SPDX-License-Identifier: MIT */
/*
 * scaling — clients, threads and mappings as many as asked for, over the same amount of memory.
 *
 *   scaling --mib N --clients N --threads N --regions N --stride PAGES --accesses N
 *
 * Each client, a process, writes its share of the memory, in so many mappings with holes between them; of each run of
 * STRIDE pages one is used. Then, each after a line that says it begins:
 *
 *   rest  nobody does anything
 *   one   a thread of the first client reads random pages of its own, the others only are there
 *   all   every thread of every client does
 *
 * A line of JSON as workloads prints them, whose time is that of the whole phase. Every page that is read is checked; data of
 * 3 : 1, so that little of it needs no disk. Exit status as workloads.
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
#include <sys/wait.h>
#include <unistd.h>

#include "access.h"

#define CLIENTS_MAX 256u
#define THREADS_MAX 64u
#define HOLE_PAGES 16u
#define RATIO 3.0
#define SETTLE_US 500000u /* after the fill, before anything is timed */
#define REST_US 2000000u

static struct {
	uint64_t mib, clients, threads, regions, stride, accesses;
} options = { .mib = 256, .clients = 1, .threads = 1, .regions = 1, .stride = 1, .accesses = 20000 };

struct shared {
	pthread_barrier_t barrier;      /* of all clients and their parent */
	struct result results[CLIENTS_MAX];
};

static struct shared *shared;
static uint64_t used_pages;          /* of a client */
static uint64_t region_used;         /* of those, in a region */
static uint64_t *base;

static _Noreturn void usage(void)
{
	fprintf(stderr, "usage: scaling [--mib N] [--clients N] [--threads N] [--regions N] [--stride PAGES] [--accesses N]\n");
	exit(2);
}

/* ---- memory of a client ---- */

static uint64_t region_pages(void)
{
	return region_used * options.stride + HOLE_PAGES;
}

static uint64_t *page_at(uint64_t number)
{
	return base + (number / region_used * region_pages() + number % region_used * options.stride) * PAGE_WORDS;
}

/* Holes are nobody's memory: a guard before a mapping would make it look like a stack. */
static void map_regions(void)
{
	uint64_t bytes = options.regions * region_pages() * PAGE_BYTES;

	base = map(bytes, MAP_PRIVATE | MAP_NORESERVE);
	if (madvise(base, bytes, MADV_NOHUGEPAGE) != 0)
		fail("MADV_NOHUGEPAGE");
	for (uint64_t i = 0; i < options.regions; i++) {
		char *end = (char *)base + (i + 1) * region_pages() * PAGE_BYTES;

		if (munmap(end - HOLE_PAGES * PAGE_BYTES, HOLE_PAGES * PAGE_BYTES) != 0)
			fail("munmap");
	}
	for (uint64_t number = 0; number < used_pages; number++)
		content_write(page_at(number), number, 1);
}

/* ---- reading ---- */

struct reader {
	pthread_t thread;
	struct result *result; /* of this thread alone */
	uint64_t seed, accesses;
};

static void *read_random(void *argument)
{
	struct reader *reader = argument;
	struct pattern pattern;

	pattern_init(&pattern, PATTERN_RANDOM, used_pages, reader->seed);
	for (uint64_t i = 0; i < reader->accesses; i++) {
		uint64_t number = pattern_next(&pattern), started = now_ns();
		bool right = content_check(page_at(number), number, 1);

		latency_add(&reader->result->latency, now_ns() - started);
		if (!right)
			note_wrong(reader->result, number);
	}
	reader->result->accesses = reader->accesses;
	return NULL;
}

static void read_with_threads(unsigned client, struct result *total)
{
	static struct reader readers[THREADS_MAX];

	for (unsigned i = 0; i < options.threads; i++) {
		readers[i] = (struct reader){ .seed = client * THREADS_MAX + i + 7,
			.accesses = options.accesses / (options.clients * options.threads),
			.result = calloc(1, sizeof *readers[i].result) };
		if (readers[i].result == NULL)
			fail("calloc");
		errno = pthread_create(&readers[i].thread, NULL, read_random, &readers[i]);
		if (errno != 0)
			fail("pthread_create");
	}
	for (unsigned i = 0; i < options.threads; i++) {
		pthread_join(readers[i].thread, NULL);
		latency_merge(&total->latency, &readers[i].result->latency);
		total->accesses += readers[i].result->accesses;
		total->wrong += readers[i].result->wrong;
		free(readers[i].result);
	}
}

/* ---- clients ---- */

static void meet(void)
{
	pthread_barrier_wait(&shared->barrier);
}

static _Noreturn void client_main(unsigned number)
{
	struct result *result = &shared->results[number];
	struct reader lone = { .result = result, .seed = 3, .accesses = options.accesses };

	map_regions();
	meet(); /* filled */
	meet();
	if (number == 0)
		(void)read_random(&lone);
	meet(); /* one is over */
	meet();
	if (number == 0)
		*result = (struct result){ .wrong = result->wrong };
	read_with_threads(number, result);
	meet(); /* all is over */
	meet(); /* the results are taken, and nobody ends before */
	_exit(result->wrong ? 3 : 0);
}

static void begin(const char *name)
{
	printf("{\"phase\":\"%s_begins\"}\n", name);
	fflush(stdout);
	usleep(SETTLE_US); /* whoever reads this has the time to look at the daemon */
}

static void report(const char *name, uint64_t started, const struct rusage *from, unsigned client_count)
{
	struct result total = { .ns = now_ns() - started };
	struct rusage to;

	for (unsigned i = 0; i < client_count; i++) {
		latency_merge(&total.latency, &shared->results[i].latency);
		total.accesses += shared->results[i].accesses;
		total.wrong += shared->results[i].wrong;
	}
	get_usage(RUSAGE_CHILDREN, &to);
	print_result(name, &total, from, &to);
}

static void share(void)
{
	pthread_barrierattr_t attributes;

	shared = map(sizeof *shared, MAP_SHARED);
	errno = pthread_barrierattr_init(&attributes);
	if (errno == 0)
		errno = pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
	if (errno == 0)
		errno = pthread_barrier_init(&shared->barrier, &attributes, (unsigned)options.clients + 1);
	if (errno != 0)
		fail("pthread_barrier_init");
}

static void start_clients(void)
{
	fflush(stdout);
	for (unsigned i = 0; i < options.clients; i++) {
		pid_t pid = fork();

		if (pid < 0)
			fail("fork");
		if (pid == 0 && prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
			fail("prctl");
		if (pid == 0)
			client_main(i);
	}
}

static void wait_clients(void)
{
	for (unsigned i = 0; i < options.clients; i++) {
		int status;

		if (wait(&status) < 0)
			fail("wait");
		if (status != 0) {
			fprintf(stderr, "scaling: a client ended with wait status 0x%x\n", (unsigned)status);
			_exit(WIFEXITED(status) && WEXITSTATUS(status) == 3 ? 3 : 1);
		}
	}
}

static void run(void)
{
	struct rusage from;
	uint64_t started;

	share();
	start_clients();
	meet(); /* filled */
	get_usage(RUSAGE_CHILDREN, &from);
	begin("rest");
	started = now_ns();
	usleep(REST_US);
	report("rest", started, &from, 0);
	begin("one");
	started = now_ns();
	meet();
	meet(); /* one is over */
	report("one", started, &from, 1);
	begin("all");
	started = now_ns();
	meet();
	meet(); /* all is over */
	report("all", started, &from, (unsigned)options.clients);
	usleep(SETTLE_US);
	meet();
	wait_clients();
}

/* ---- command line ---- */

static uint64_t number(const char *text, uint64_t most)
{
	char *end;
	uint64_t value = strtoull(text, &end, 10);

	if (*text == '\0' || *end != '\0' || value < 1 || value > most)
		usage();
	return value;
}

static void parse_options(int argc, char **argv)
{
	static const struct option names[] = {
		{ "mib", required_argument, NULL, 'm' }, { "clients", required_argument, NULL, 'c' },
		{ "threads", required_argument, NULL, 't' }, { "regions", required_argument, NULL, 'r' },
		{ "stride", required_argument, NULL, 's' }, { "accesses", required_argument, NULL, 'a' },
		{ NULL, 0, NULL, 0 },
	};

	for (int option; (option = getopt_long(argc, argv, "", names, NULL)) != -1;) {
		switch (option) {
		case 'm': options.mib = number(optarg, 1u << 20); break;
		case 'c': options.clients = number(optarg, CLIENTS_MAX); break;
		case 't': options.threads = number(optarg, THREADS_MAX); break;
		case 'r': options.regions = number(optarg, 60000); break;
		case 's': options.stride = number(optarg, 4096); break;
		case 'a': options.accesses = number(optarg, 1u << 30); break;
		default: usage();
		}
	}
	if (optind != argc)
		usage();
}

int main(int argc, char **argv)
{
	parse_options(argc, argv);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
		fail("prctl");
	region_used = options.mib * 256 / options.clients / options.regions;
	used_pages = region_used * options.regions;
	if (region_used == 0) {
		fprintf(stderr, "scaling: less than a page for each region\n");
		return 2;
	}
	access_init(&(struct content_options){ .seed = 1, .page_count = used_pages, .ratio = RATIO });
	run();
	return wrong_total != 0 ? 3 : 0;
}
