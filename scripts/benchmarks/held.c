/* SPDX-License-Identifier: MIT */
/*
 * held — a program that fills memory and then holds it, while somebody looks at what that costs.
 *
 *   held [OPTIONS] FIFO STEP,…
 *
 *   --mib N           memory that is filled (64)
 *   --mapped-mib N    as much more is mapped and read once, which costs page tables and nothing else (0)
 *   --ratio R         LZ4 ratio of the data (1.6)
 *   --hot-mib N       a hot set (0)
 *   --hot-permille N  of the accesses go there (990)
 *   --zeros           all of it is zero, and the program has nothing else worth mentioning
 *
 *   FIFO.pid says who it is.
 *
 *   fill     write every page
 *   hold     wait for a byte in FIFO
 *   probe…   read pages at random until there is one; the name goes on as you like
 *   hotN…    read four words of pages until there is one, most of the hot set N; N is a digit
 *   verify   every byte of every page
 *
 * One line of JSON on stdout at the end of a step, as workloads.c prints it; and at the begin of one that waits, with
 * ":begin" behind its name.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "content.h"
#include "latency.h"
#include "pattern.h"

#define FAULT_NS 2000u      /* few accesses of resident memory take that long */
#define ACCESSES_A_LOOK 16u /* at FIFO */

static uint64_t page_count;
static uint64_t *memory;
static int zeros;
static uint64_t hot_pages, hot_permille = 990;

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "held: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static uint64_t number(const char *text, uint64_t most)
{
	char *end;
	uint64_t value = strtoull(text, &end, 10);

	if (*text == '\0' || *end != '\0' || value > most) {
		fprintf(stderr, "held: '%s' is not a number up to %llu\n", text, (unsigned long long)most);
		exit(2);
	}
	return value;
}

static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint64_t *map(uint64_t mib)
{
	void *address = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (address == MAP_FAILED)
		fail("mmap");
	return address;
}

static uint64_t *data_of(uint64_t page)
{
	return memory + page * PAGE_WORDS;
}

static void fill_page(uint64_t page)
{
	if (zeros)
		memset(data_of(page), 0, PAGE_BYTES);
	else
		content_write(data_of(page), page, 1);
}

static int page_is_right(uint64_t page)
{
	const uint64_t *words = data_of(page);

	for (unsigned i = 0; zeros && i < PAGE_WORDS; i++)
		if (words[i] != 0)
			return 0;
	return zeros || content_check_all(words, page, 1);
}

static void say(const char *phase, uint64_t since_ns, const struct latency *latency, uint64_t wrong)
{
	static const struct latency none;

	latency = latency ? latency : &none;
	printf("{\"phase\":\"%s\",\"seconds\":%.6f,\"wrong\":%llu,\"accesses\":%llu,\"faults\":%llu,\"p50_ns\":%.0f,"
		"\"p99_ns\":%.0f}\n",
		phase, (double)(now_ns() - since_ns) / 1e9, (unsigned long long)wrong,
		(unsigned long long)latency_count_from(latency, 0),
		(unsigned long long)latency_count_from(latency, FAULT_NS), latency_quantile_ns(latency, FAULT_NS, 0.5),
		latency_quantile_ns(latency, FAULT_NS, 0.99));
	fflush(stdout);
}

static void say_begin(const char *step)
{
	char phase[64];

	snprintf(phase, sizeof phase, "%s:begin", step);
	say(phase, now_ns(), NULL, 0);
}

/* Every page of it has an entry in the page tables: of the zero page. */
static void read_mapped(uint64_t mib)
{
	volatile uint8_t *bytes = (volatile uint8_t *)map(mib);

	if (madvise((void *)(uintptr_t)bytes, mib << 20, MADV_NOHUGEPAGE) != 0)
		fail("madvise");
	for (uint64_t at = 0; at < mib << 20; at += PAGE_BYTES)
		(void)bytes[at];
}

static void write_pid(const char *fifo_path)
{
	char path[4096];
	FILE *file;

	snprintf(path, sizeof path, "%s.pid", fifo_path);
	file = fopen(path, "w");
	if (file == NULL || fprintf(file, "%d", getpid()) < 0 || fclose(file) != 0)
		fail(path);
}

/* ---- steps ---- */

static void hold(int fifo)
{
	char byte;

	while (read(fifo, &byte, 1) < 0)
		if (errno == EAGAIN)
			usleep(1000); /* the descriptor is probe's, too */
		else if (errno != EINTR)
			fail("fifo");
}

static uint64_t probe(int fifo, struct latency *latency)
{
	uint64_t random = now_ns(), wrong = 0;
	char byte;

	while (read(fifo, &byte, 1) != 1)
		for (unsigned i = 0; i < ACCESSES_A_LOOK; i++) {
			uint64_t page = (random = content_mix(random)) % page_count, before = now_ns();

			wrong += !page_is_right(page);
			latency_add(latency, now_ns() - before);
		}
	return wrong;
}

/* The hot sets lie one behind the other in an order in which neighbours are scattered (pattern.h). */
static uint64_t visit_hot(unsigned number, int fifo, struct latency *latency)
{
	uint64_t wrong = 0;
	struct pattern pattern;
	char byte;

	pattern_init(&pattern, PATTERN_HOT, page_count, now_ns());
	pattern.hot_first = number * hot_pages;
	pattern.hot_pages = hot_pages;
	pattern.hot_permille = (unsigned)hot_permille;
	while (read(fifo, &byte, 1) != 1)
		for (unsigned i = 0; i < ACCESSES_A_LOOK; i++) {
			uint64_t page = pattern_next(&pattern), before = now_ns();

			wrong += !content_check(data_of(page), page, 1);
			latency_add(latency, now_ns() - before);
		}
	return wrong;
}

static int waits(const char *step)
{
	return strcmp(step, "hold") == 0 || strncmp(step, "probe", 5) == 0 || strncmp(step, "hot", 3) == 0;
}

static uint64_t run_step(const char *step, int fifo)
{
	struct latency *latency = calloc(1, sizeof *latency);
	uint64_t since_ns = now_ns(), wrong = 0;

	if (latency == NULL)
		fail("calloc");
	if (waits(step))
		say_begin(step);
	if (strcmp(step, "hold") == 0)
		hold(fifo);
	else if (strncmp(step, "probe", 5) == 0)
		wrong = probe(fifo, latency);
	else if (strncmp(step, "hot", 3) == 0)
		wrong = visit_hot((unsigned)(step[3] - '0'), fifo, latency);
	else
		for (uint64_t page = 0; page < page_count; page++)
			if (strcmp(step, "fill") == 0)
				fill_page(page);
			else if (strcmp(step, "verify") == 0)
				wrong += !page_is_right(page);
			else
				exit(2);
	say(step, since_ns, latency, wrong);
	free(latency);
	return wrong;
}

int main(int argc, char **argv)
{
	static const struct option longs[] = { { "mib", 1, 0, 'm' }, { "mapped-mib", 1, 0, 'M' }, { "ratio", 1, 0, 'r' },
		{ "zeros", 0, 0, 'z' }, { "hot-mib", 1, 0, 'h' }, { "hot-permille", 1, 0, 'p' }, { 0, 0, 0, 0 } };
	struct content_options content = { .seed = 1, .ratio = 1.6 };
	uint64_t mib = 64, mapped_mib = 0, wrong = 0;
	int option, fifo;

	while ((option = getopt_long(argc, argv, "+", longs, NULL)) != -1)
		switch (option) {
		case 'm': mib = number(optarg, 1 << 20); break;
		case 'M': mapped_mib = number(optarg, 1 << 20); break;
		case 'r': content.ratio = strtod(optarg, NULL); break;
		case 'z': zeros = 1; break;
		case 'h': hot_pages = number(optarg, 1 << 20) * 256; break;
		case 'p': hot_permille = number(optarg, 1000); break;
		default: return 2;
		}
	if (argc != optind + 2 || mib == 0 || hot_pages >= mib * 256)
		return 2;
	fifo = open(argv[optind], O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (fifo < 0)
		fail(argv[optind]);
	write_pid(argv[optind]);
	page_count = content.page_count = mib * 256;
	if (!zeros)
		content_init(&content);
	if (mapped_mib)
		read_mapped(mapped_mib);
	memory = map(mib);
	for (char *step = strtok(argv[optind + 1], ","); step != NULL; step = strtok(NULL, ","))
		wrong += run_step(step, fifo);
	return wrong ? 3 : 0;
}
