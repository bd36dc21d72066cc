/* SPDX-License-Identifier: MIT */
/*
 * verify_memory — fill memory with known content, go over it, verify every byte of every page.
 *
 *   verify_memory [--mib N] [--kind KIND] [--seed N] [--passes N] [--seconds N] [--while FILE] [--order ORDER]
 *                 [--rewrite PERCENT] [--allocate mmap|malloc] [--threads N] [--fork] [--progress FILE]
 *
 *   KIND     zeros same text floats third random mixed    (third: 3 : 1; mixed: page by page)
 *   ORDER    sequential random
 *
 * A page's content is a function of (kind, seed, page, version). Version 1 is the fill; each pass
 * verifies every page once, in order, and rewrites PERCENT of them with the pass's version. --seconds
 * goes on with passes until the time is up, or FILE is there no more. --fork: after the passes a child verifies everything,
 * rewrites half, verifies again, while the parent does the same with the other half.
 * --progress FILE: the first 8 bytes of FILE are the count of pages verified, as it grows.
 *
 * One line of JSON on stdout; exit status 0 when every byte was right, 3 when not (the first ten
 * wrong pages are described on stderr), 1 for trouble of its own, 2 for wrong usage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define CHUNK_PAGES 16u /* unit of --allocate malloc: below malloc's mmap threshold, so on the heap */
#define THREADS_MAX 64u
#define REPORTS_MAX 10u

enum kind { ZEROS, SAME, TEXT, FLOATS, THIRD, RANDOM, MIXED };
static const char *const kind_names[] = { "zeros", "same", "text", "floats", "third", "random", "mixed" };

static struct {
	uint64_t mib, seed, passes, seconds, rewrite, threads;
	enum kind kind;
	int random_order, use_malloc, use_fork;
	const char *progress_path, *while_path;
} options = { .mib = 64, .seed = 1, .passes = 2, .rewrite = 25, .threads = 1, .kind = MIXED };

static uint8_t **chunks;      /* page p is at chunks[p / CHUNK_PAGES] + p % CHUNK_PAGES pages */
static uint8_t *versions;     /* of each page */
static uint64_t page_count;
static uint64_t *progress;
static uint64_t local_progress, wrong_pages, passes_done;

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "verify_memory: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static uint64_t mix(uint64_t value)
{
	value += 0x9e3779b97f4a7c15u;
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
	value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
	return value ^ (value >> 31);
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint8_t *page_at(uint64_t page)
{
	return chunks[page / CHUNK_PAGES] + page % CHUNK_PAGES * PAGE;
}

/* ---- content ---- */

static void fill_text(uint8_t *data, uint64_t random)
{
	static const char *const words[16] = { "the ", "memory ", "page ", "swapped ", "is ", "never ",
		"lost ", "and ", "comes ", "back ", "as ", "it ", "was ", "written ", "before ", "again\n" };
	size_t used = 0;

	while (used < PAGE) {
		const char *word = words[next_random(&random) % 16];
		size_t length = strlen(word);

		if (length > PAGE - used)
			length = PAGE - used;
		memcpy(data + used, word, length);
		used += length;
	}
}

static void fill_floats(uint8_t *data, uint64_t random)
{
	double value = (double)(random % 1000);

	for (size_t i = 0; i < PAGE / sizeof value; i++) {
		value += (double)(next_random(&random) % 256) / 256.0;
		memcpy(data + i * sizeof value, &value, sizeof value);
	}
}

static void fill_random(uint8_t *data, size_t bytes, uint64_t random)
{
	for (size_t i = 0; i + 8 <= bytes; i += 8) {
		uint64_t word = next_random(&random);

		memcpy(data + i, &word, 8);
	}
}

/* The 4096 bytes that `page` has in `version`. */
static void make_content(uint8_t *data, uint64_t page, uint8_t version)
{
	uint64_t random = mix(options.seed * 0x1000193u + page * 256u + version) | 1;
	enum kind kind = options.kind == MIXED ? (enum kind)(mix(page ^ options.seed) % MIXED) : options.kind;

	memset(data, 0, PAGE);
	switch (kind) {
	case SAME:
		for (size_t i = 0; i < PAGE; i += 8)
			memcpy(data + i, &random, 8);
		break;
	case TEXT:
		fill_text(data, random);
		break;
	case FLOATS:
		fill_floats(data, random);
		break;
	case THIRD:
		fill_random(data, PAGE / 3 / 8 * 8, random);
		break;
	case RANDOM:
		fill_random(data, PAGE, random);
		break;
	case ZEROS:
	case MIXED:
		break;
	}
}

static void write_page(uint64_t page, uint8_t version)
{
	make_content(page_at(page), page, version);
	versions[page] = version;
}

static void report_wrong(uint64_t page, const uint8_t *wanted)
{
	const uint8_t *found = page_at(page);
	unsigned offset = 0;

	if (__atomic_fetch_add(&wrong_pages, 1, __ATOMIC_RELAXED) >= REPORTS_MAX)
		return;
	while (offset < PAGE - 1 && found[offset] == wanted[offset])
		offset++;
	fprintf(stderr, "verify_memory[%d]: page %llu at %p version %u: byte %u is %02x, not %02x\n", getpid(),
		(unsigned long long)page, (const void *)found, versions[page], offset, found[offset],
		wanted[offset]);
}

static void verify_page(uint64_t page)
{
	uint8_t wanted[PAGE] __attribute__((aligned(8)));

	make_content(wanted, page, versions[page]);
	if (memcmp(page_at(page), wanted, PAGE) != 0)
		report_wrong(page, wanted);
	__atomic_fetch_add(progress, 1, __ATOMIC_RELAXED);
}

/* ---- passes ---- */

struct share {
	uint64_t first, count; /* pages of one thread */
	uint8_t version;
};

static void *fill_share(void *argument)
{
	const struct share *share = argument;

	for (uint64_t i = 0; i < share->count; i++)
		write_page(share->first + i, 1);
	return NULL;
}

/* Every page of the share once: a random order is i -> (i * odd + b) mod 2^k, values beyond skipped. */
static void *pass_share(void *argument)
{
	const struct share *share = argument;
	uint64_t size = 1, step = 1, start = 0;

	while (size < share->count)
		size *= 2;
	if (options.random_order) {
		step = mix(options.seed + share->version) | 1;
		start = mix(options.seed ^ share->version);
	}
	for (uint64_t i = 0; i < size; i++) {
		uint64_t index = (start + i * step) % size;
		uint64_t page = share->first + index;

		if (index >= share->count)
			continue;
		verify_page(page);
		if (mix(page * 31 + share->version) % 100 < options.rewrite)
			write_page(page, share->version);
	}
	return NULL;
}

static void run_shares(void *(*work)(void *), uint8_t version)
{
	pthread_t threads[THREADS_MAX];
	struct share shares[THREADS_MAX];
	uint64_t part = page_count / options.threads;

	for (uint64_t t = 0; t < options.threads; t++) {
		uint64_t end = t + 1 == options.threads ? page_count : (t + 1) * part;

		shares[t] = (struct share){ t * part, end - t * part, version };
		if (t + 1 == options.threads)
			work(&shares[t]);
		else if (pthread_create(&threads[t], NULL, work, &shares[t]) != 0)
			fail("pthread_create");
	}
	for (uint64_t t = 0; t + 1 < options.threads; t++)
		pthread_join(threads[t], NULL);
}

static int goes_on(uint64_t deadline_ns)
{
	return now_ns() < deadline_ns && (!options.while_path || access(options.while_path, F_OK) == 0);
}

static void run_passes(void)
{
	uint64_t deadline_ns = now_ns() + options.seconds * 1000000000u;

	run_shares(fill_share, 1);
	while (passes_done < options.passes || (options.seconds && goes_on(deadline_ns))) {
		run_shares(pass_share, (uint8_t)(2 + passes_done % 250));
		passes_done++;
	}
}

static void verify_all(void)
{
	for (uint64_t page = 0; page < page_count; page++)
		verify_page(page);
}

static void rewrite_parity(uint64_t parity)
{
	for (uint64_t page = parity; page < page_count; page += 2)
		write_page(page, (uint8_t)(253 + parity));
}

/* Parent and child each change a half of what they share, and must not see the other's changes. */
static void run_fork(void)
{
	pid_t child = fork();
	int status = 0;

	if (child < 0)
		fail("fork");
	verify_all();
	rewrite_parity(child == 0);
	verify_all();
	if (child == 0)
		_exit(wrong_pages ? 3 : 0);
	if (waitpid(child, &status, 0) != child)
		fail("waitpid");
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
		fprintf(stderr, "verify_memory: the forked child ended with wait status 0x%x\n", (unsigned)status);
		wrong_pages++;
	}
}

/* ---- setting up ---- */

static void allocate(void)
{
	uint64_t chunk_count;
	uint8_t *all;

	page_count = options.mib * (1024 * 1024 / PAGE);
	chunk_count = (page_count + CHUNK_PAGES - 1) / CHUNK_PAGES;
	chunks = calloc(chunk_count, sizeof *chunks);
	versions = calloc(page_count, 1);
	if (!chunks || !versions)
		fail("malloc");
	if (options.use_malloc) {
		for (uint64_t i = 0; i < chunk_count; i++)
			if (!(chunks[i] = malloc(CHUNK_PAGES * PAGE)))
				fail("malloc");
		return;
	}
	all = mmap(NULL, page_count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (all == MAP_FAILED)
		fail("mmap");
	for (uint64_t i = 0; i < chunk_count; i++)
		chunks[i] = all + i * CHUNK_PAGES * PAGE;
}

static void open_progress(void)
{
	int fd;

	progress = &local_progress;
	if (!options.progress_path)
		return;
	fd = open(options.progress_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, PAGE) != 0)
		fail(options.progress_path);
	progress = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (progress == MAP_FAILED)
		fail("mmap");
	close(fd);
}

static _Noreturn void usage(const char *what)
{
	fprintf(stderr, "verify_memory: %s; see the head of tests/support/verify_memory.c\n", what);
	exit(2);
}

static uint64_t parse_number(const char *text)
{
	char *end;
	unsigned long long value = strtoull(text, &end, 0);

	if (!*text || *end)
		usage("not a number");
	return value;
}

static enum kind parse_kind(const char *text)
{
	for (unsigned kind = 0; kind <= MIXED; kind++)
		if (strcmp(text, kind_names[kind]) == 0)
			return (enum kind)kind;
	usage("unknown kind");
}

static void parse_options(int argc, char **argv)
{
	static const struct option names[] = {
		{ "mib", 1, NULL, 'm' },      { "kind", 1, NULL, 'k' },    { "seed", 1, NULL, 's' },
		{ "passes", 1, NULL, 'p' },   { "seconds", 1, NULL, 'S' }, { "order", 1, NULL, 'o' },
		{ "rewrite", 1, NULL, 'r' },  { "allocate", 1, NULL, 'a' }, { "threads", 1, NULL, 't' },
		{ "fork", 0, NULL, 'f' },     { "progress", 1, NULL, 'P' }, { "while", 1, NULL, 'w' },
		{ NULL, 0, NULL, 0 },
	};
	int option;

	while ((option = getopt_long(argc, argv, "", names, NULL)) != -1) {
		switch (option) {
		case 'm': options.mib = parse_number(optarg); break;
		case 'k': options.kind = parse_kind(optarg); break;
		case 's': options.seed = parse_number(optarg); break;
		case 'p': options.passes = parse_number(optarg); break;
		case 'S': options.seconds = parse_number(optarg); break;
		case 'o': options.random_order = strcmp(optarg, "random") == 0; break;
		case 'r': options.rewrite = parse_number(optarg); break;
		case 'a': options.use_malloc = strcmp(optarg, "malloc") == 0; break;
		case 't': options.threads = parse_number(optarg); break;
		case 'f': options.use_fork = 1; break;
		case 'P': options.progress_path = optarg; break;
		case 'w': options.while_path = optarg; break;
		default: exit(2);
		}
	}
	if (optind != argc || !options.mib || !options.threads || options.threads > THREADS_MAX)
		usage("wrong arguments");
}

int main(int argc, char **argv)
{
	uint64_t started_ns;

	parse_options(argc, argv);
	allocate();
	open_progress();
	started_ns = now_ns();
	run_passes();
	verify_all();
	if (options.use_fork)
		run_fork();
	printf("{\"kind\": \"%s\", \"pages\": %llu, \"passes\": %llu, \"verified_pages\": %llu, "
	       "\"wrong_pages\": %llu, \"seconds\": %.3f}\n", kind_names[options.kind],
	       (unsigned long long)page_count, (unsigned long long)passes_done,
	       (unsigned long long)__atomic_load_n(progress, __ATOMIC_RELAXED), (unsigned long long)wrong_pages,
	       (double)(now_ns() - started_ns) / 1e9);
	return wrong_pages ? 3 : 0;
}
