/* SPDX-License-Identifier: MIT */
/*
 * test_codec — round trips, the object format, and hostile objects.
 *
 * Build: tests/csrc/test_codec.c csrc/codec.c csrc/base.c; -Icsrc; lz4, zstd, threads
 *
 * liblz4 and libzstd are not instrumented by ASan, so objects and pages lie between inaccessible
 * pages here: a read or write outside them is a SIGSEGV in any build.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <zstd.h>

#include "base.h"
#include "check.h"
#include "codec.h"

#define WORDS (PAGE_BYTES / sizeof(uint64_t))
#define ROUND_TRIPS 4000
#define HOSTILE_OBJECTS 40000

enum page_kind { PAGE_SPARSE, PAGE_POINTERS, PAGE_TEXT, PAGE_MIXED, PAGE_RANDOM, PAGE_KINDS };

static const char *const kind_names[PAGE_KINDS] = {
	"sparse", "pointers", "text", "mixed", "random",
};

static uint8_t secret[CODEC_SECRET_BYTES];

/* A page with inaccessible neighbours. */
static uint8_t *guarded_page(void)
{
	uint8_t *base = mmap(NULL, 3 * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(base != MAP_FAILED);
	CHECK(mprotect(base + PAGE_BYTES, PAGE_BYTES, PROT_READ | PROT_WRITE) == 0);
	return base + PAGE_BYTES;
}

static void guarded_free(uint8_t *page) { CHECK(munmap(page - PAGE_BYTES, 3 * PAGE_BYTES) == 0); }

static uint64_t page_word(enum page_kind kind, uint64_t *random)
{
	switch (kind) {
	case PAGE_SPARSE:
		return random_below(random, 40) == 0 ? random_next(random) : 0;
	case PAGE_POINTERS:
		return 0x7f1200000000u + random_below(random, 1 << 16) * 16;
	case PAGE_MIXED:
		return random_below(random, 3) ? random_next(random) : random_below(random, 1000);
	default:
		return random_next(random);
	}
}

static void page_make(uint8_t *page, enum page_kind kind, uint64_t *random)
{
	static const char words[8][9] = { "the ", "slot ", "of a ", "page ",
					  "is ", "swapped ", "\n\t", "region " };
	size_t at = 0;

	if (kind != PAGE_TEXT) {
		for (; at < WORDS; at++) {
			uint64_t word = page_word(kind, random);
			memcpy(page + at * sizeof word, &word, sizeof word);
		}
		return;
	}
	while (at < PAGE_BYTES) {
		const char *word = words[random_below(random, 8)];
		size_t bytes = min_of(strlen(word), PAGE_BYTES - at);

		memcpy(page + at, word, bytes);
		at += bytes;
		if (at < PAGE_BYTES && random_below(random, 4) == 0)
			page[at++] = (uint8_t)random_next(random);
	}
}

/* ---- format ---- */

static void check_format(const uint8_t *object, unsigned units, enum codec_method method)
{
	unsigned trailer = object[units * POOL_UNIT_BYTES - 1], padding = trailer & 63;

	CHECK(trailer >> 6 == (unsigned)method);
	for (unsigned i = 0; i < padding; i++)
		CHECK(object[units * POOL_UNIT_BYTES - 2 - i] == 0);
}

static void check_round_trip(struct codec_scratch *scratch, const uint8_t *page,
			     enum codec_method method)
{
	uint8_t *buffer = guarded_page(), *object = guarded_page(), *expanded = guarded_page();
	unsigned units = codec_compress(scratch, method, page, buffer);
	size_t bytes = units * POOL_UNIT_BYTES;

	CHECK(units >= 1 && units <= POOL_UNITS_MAX);
	if (units == POOL_UNITS_MAX)
		CHECK(memcmp(buffer, page, PAGE_BYTES) == 0);
	else
		check_format(buffer, units, method);
	/* Flush with the guard behind it, then with the one before it. */
	memcpy(object + PAGE_BYTES - bytes, buffer, bytes);
	memset(expanded, 0xa5, PAGE_BYTES);
	CHECK(codec_expand(object + PAGE_BYTES - bytes, units, expanded) == 0);
	CHECK(memcmp(expanded, page, PAGE_BYTES) == 0);
	CHECK(codec_expand(buffer, units, expanded) == 0);
	CHECK(codec_check(expanded, secret) == codec_check(page, secret));
	guarded_free(buffer);
	guarded_free(object);
	guarded_free(expanded);
}

static void test_round_trips(uint64_t *random)
{
	struct codec_scratch *scratch = codec_scratch_create();
	uint8_t *page = guarded_page();

	CHECK(scratch);
	for (unsigned i = 0; i < ROUND_TRIPS; i++) {
		enum page_kind kind = random_below(random, PAGE_KINDS);

		page_make(page, kind, random);
		if (i % 3 == 0) /* every length of compressible head */
			memset(page, (int)i, random_below(random, PAGE_BYTES + 1));
		check_round_trip(scratch, page, i & 1 ? CODEC_ZSTD : CODEC_LZ4);
	}
	codec_scratch_destroy(scratch);
	codec_scratch_destroy(NULL);
	guarded_free(page);
}

/* The limits of the size range, and that an object depends on its page alone. */
static void test_sizes(uint64_t *random)
{
	struct codec_scratch *scratch = codec_scratch_create();
	uint8_t *page = guarded_page(), *object = guarded_page(), *again = guarded_page();
	unsigned units;

	page_make(page, PAGE_RANDOM, random);
	CHECK(codec_compress(scratch, CODEC_LZ4, page, object) == POOL_UNITS_MAX);
	CHECK(codec_compress(scratch, CODEC_ZSTD, page, object) == POOL_UNITS_MAX);
	memset(page, 0, PAGE_BYTES);
	CHECK(codec_compress(scratch, CODEC_LZ4, page, object) == 1);
	CHECK(codec_compress(scratch, CODEC_ZSTD, page, object) == 1);
	for (int method = CODEC_LZ4; method <= CODEC_ZSTD; method++) {
		page_make(page, PAGE_POINTERS, random);
		memset(object, 0xff, PAGE_BYTES);
		units = codec_compress(scratch, (enum codec_method)method, page, object);
		CHECK(units < POOL_UNITS_MAX);
		CHECK(codec_compress(scratch, (enum codec_method)method, page, again) == units);
		CHECK(memcmp(object, again, units * POOL_UNIT_BYTES) == 0);
	}
	codec_scratch_destroy(scratch);
	guarded_free(page);
	guarded_free(object);
	guarded_free(again);
}

/* ---- same-filled and check ---- */

static void test_same_filled(uint64_t *random)
{
	uint8_t *page = guarded_page();
	uint64_t word, found = 7;

	for (unsigned i = 0; i < WORDS; i++) {
		word = i == 0 ? 0 : random_next(random);
		codec_fill(page, word);
		CHECK(codec_same_filled(page, &found) && found == word);
		page[i * sizeof word + random_below(random, 8)] ^=
			(uint8_t)(1 << random_below(random, 8));
		CHECK(!codec_same_filled(page, &found) && found == word);
	}
	/* The same byte everywhere is not the only way; the same 16 bytes everywhere is no way. */
	for (unsigned i = 0; i < PAGE_BYTES; i++)
		page[i] = (uint8_t)(i % 16);
	CHECK(!codec_same_filled(page, &found));
	guarded_free(page);
}

static void test_check(uint64_t *random)
{
	uint8_t *page = guarded_page(), other[CODEC_SECRET_BYTES];
	uint64_t check, seen = 0;

	page_make(page, PAGE_MIXED, random);
	check = codec_check(page, secret);
	CHECK(check == codec_check(page, secret));
	for (unsigned bit = 0; bit < 8 * PAGE_BYTES; bit += 1 + random_below(random, 8)) {
		page[bit / 8] ^= (uint8_t)(1 << bit % 8);
		seen |= codec_check(page, secret);
		CHECK(codec_check(page, secret) != check);
		page[bit / 8] ^= (uint8_t)(1 << bit % 8);
	}
	CHECK(seen == (1ULL << CODEC_CHECK_BITS) - 1);
	memcpy(other, secret, sizeof other);
	other[random_below(random, 64)] ^= 1;
	CHECK(codec_check(page, other) != check);
	guarded_free(page);
}

/* ---- hostile objects ---- */

static void hostile_mutate(uint8_t *object, size_t bytes, uint64_t *random)
{
	unsigned count = 1 + random_below(random, 8);

	for (unsigned i = 0; i < count; i++) {
		size_t at = random_below(random, (unsigned)bytes);

		switch (random_below(random, 4)) {
		case 0:
			object[at] ^= (uint8_t)(1 << random_below(random, 8));
			break;
		case 1:
			object[at] = 0xff; /* LZ4: a length that goes on */
			break;
		case 2:
			object[bytes - 1] = (uint8_t)random_next(random);
			break;
		default:
			object[random_below(random, (unsigned)min_of(bytes, 16))] =
				(uint8_t)random_next(random);
		}
	}
}

static void test_hostile(uint64_t *random)
{
	struct codec_scratch *scratch = codec_scratch_create();
	uint8_t *page = guarded_page(), *object = guarded_page(), *buffer = guarded_page();
	unsigned refused = 0;

	for (unsigned i = 0; i < HOSTILE_OBJECTS; i++) {
		unsigned units;
		size_t bytes;
		uint8_t *start;
		int result;

		page_make(page, random_below(random, PAGE_KINDS), random);
		units = codec_compress(scratch, i & 1 ? CODEC_ZSTD : CODEC_LZ4, page, buffer);
		if (i % 4 == 0) /* the slot says another size */
			units = 1 + random_below(random, POOL_UNITS_MAX);
		if (i % 16 == 1) /* nothing is right */
			page_make(buffer, PAGE_RANDOM, random);
		bytes = units * POOL_UNIT_BYTES;
		start = i & 2 ? object : object + PAGE_BYTES - bytes;
		memcpy(start, buffer, bytes);
		hostile_mutate(start, bytes, random);
		result = codec_expand(start, units, page);
		CHECK(result == 0 || result == -EBADMSG);
		refused += result == -EBADMSG;
	}
	CHECK(refused > HOSTILE_OBJECTS / 4);
	CHECK(codec_expand(object, 0, page) == -EBADMSG);
	CHECK(codec_expand(object, POOL_UNITS_MAX + 1, page) == -EBADMSG);
	codec_scratch_destroy(scratch);
	guarded_free(page);
	guarded_free(object);
	guarded_free(buffer);
}

/* A block shorter or longer than a page is refused, an empty and an unknown one too. */
static void test_malformed(void)
{
	uint8_t object[POOL_UNIT_BYTES] = { 0 }, page[PAGE_BYTES];
	size_t bytes;

	object[sizeof object - 1] = 63;
	CHECK(codec_expand(object, 1, page) == -EBADMSG); /* no byte of block */
	object[sizeof object - 1] = 62;
	CHECK(codec_expand(object, 1, page) == -EBADMSG); /* LZ4: a page of no bytes */
	object[sizeof object - 1] = 2 << 6;
	CHECK(codec_expand(object, 1, page) == -EBADMSG);
	object[sizeof object - 1] = 3 << 6;
	CHECK(codec_expand(object, 1, page) == -EBADMSG);
	object[0] = 4 << 4; /* LZ4: four literals, and the end */
	object[sizeof object - 1] = 63 - 5;
	CHECK(codec_expand(object, 1, page) == -EBADMSG);
	bytes = ZSTD_compress(object, sizeof object - 1, "short", 5, 1);
	CHECK(!ZSTD_isError(bytes));
	object[sizeof object - 1] = (uint8_t)((63 - bytes) | CODEC_ZSTD << 6);
	CHECK(codec_expand(object, 1, page) == -EBADMSG);
}

/* ---- threads ---- */

static void *thread_main(void *argument)
{
	uint64_t random = (uint64_t)(uintptr_t)argument;
	struct codec_scratch *scratch = codec_scratch_create();
	uint8_t *page = guarded_page();

	for (unsigned i = 0; i < 200; i++) {
		page_make(page, random_below(&random, PAGE_KINDS), &random);
		check_round_trip(scratch, page, i & 1 ? CODEC_ZSTD : CODEC_LZ4);
	}
	codec_scratch_destroy(scratch);
	guarded_free(page);
	return NULL;
}

static void test_threads(uint64_t *random)
{
	pthread_t threads[4];

	for (unsigned i = 0; i < 4; i++)
		CHECK(pthread_create(&threads[i], NULL, thread_main,
				     (void *)(uintptr_t)random_next(random)) == 0);
	for (unsigned i = 0; i < 4; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
}

/* ---- bench ---- */

enum { BENCH_PAGES = 512, BENCH_ROUNDS = 20 };

struct bench {
	uint8_t *pages, *objects;
	unsigned units[BENCH_PAGES];
	struct codec_scratch *scratch;
	enum codec_method method;
	volatile uint64_t sink;
};

typedef void (*bench_fn)(struct bench *bench, unsigned i);

static void bench_check(struct bench *bench, unsigned i)
{
	bench->sink += codec_check(bench->pages + i * PAGE_BYTES, secret);
}

static void bench_same_filled(struct bench *bench, unsigned i)
{
	uint64_t word = 0;

	bench->sink += codec_same_filled(bench->pages + i * PAGE_BYTES, &word) + word;
}

static void bench_fill(struct bench *bench, unsigned i)
{
	codec_fill(bench->pages + i * PAGE_BYTES, i);
}

static void bench_compress(struct bench *bench, unsigned i)
{
	bench->units[i] = codec_compress(bench->scratch, bench->method,
					 bench->pages + i * PAGE_BYTES,
					 bench->objects + i * PAGE_BYTES);
}

static void bench_expand(struct bench *bench, unsigned i)
{
	static _Alignas(64) uint8_t page[PAGE_BYTES];

	CHECK(codec_expand(bench->objects + i * PAGE_BYTES, bench->units[i], page) == 0);
}

/* Best round's nanoseconds a page: the machine is shared. */
static double bench_run(struct bench *bench, bench_fn fn)
{
	uint64_t best = UINT64_MAX;

	for (unsigned round = 0; round < BENCH_ROUNDS; round++) {
		uint64_t start = test_now_ns();

		for (unsigned i = 0; i < BENCH_PAGES; i++)
			fn(bench, i);
		best = min_of(best, test_now_ns() - start);
	}
	return (double)best / BENCH_PAGES;
}

static void bench_methods(struct bench *bench, const char *name)
{
	static const char *const method_names[] = { "lz4", "zstd" };

	for (int method = CODEC_LZ4; method <= CODEC_ZSTD; method++) {
		double compress_ns, expand_ns;
		unsigned units = 0;

		bench->method = (enum codec_method)method;
		compress_ns = bench_run(bench, bench_compress);
		expand_ns = bench_run(bench, bench_expand);
		for (unsigned i = 0; i < BENCH_PAGES; i++)
			units += bench->units[i];
		printf("%-8s %-4s ratio %5.2f compress %7.0f ns expand %7.0f ns\n", name,
		       method_names[method], (double)BENCH_PAGES * POOL_UNITS_MAX / units,
		       compress_ns, expand_ns);
	}
}

static void bench_all(uint64_t *random)
{
	struct bench bench = { .scratch = codec_scratch_create(), .sink = 0 };

	bench.pages = aligned_alloc(PAGE_BYTES, BENCH_PAGES * PAGE_BYTES);
	bench.objects = aligned_alloc(PAGE_BYTES, BENCH_PAGES * PAGE_BYTES);
	CHECK(bench.pages && bench.objects && bench.scratch);
	for (unsigned kind = 0; kind < PAGE_KINDS; kind++) {
		for (unsigned i = 0; i < BENCH_PAGES; i++)
			page_make(bench.pages + i * PAGE_BYTES, kind, random);
		bench_methods(&bench, kind_names[kind]);
	}
	printf("check %.0f ns, same-filled (ordinary page) %.0f ns", bench_run(&bench, bench_check),
	       bench_run(&bench, bench_same_filled));
	memset(bench.pages, 0, BENCH_PAGES * PAGE_BYTES);
	printf(", same-filled (zero page) %.0f ns", bench_run(&bench, bench_same_filled));
	printf(", fill %.0f ns\n", bench_run(&bench, bench_fill));
	free(bench.pages);
	free(bench.objects);
	codec_scratch_destroy(bench.scratch);
}

int main(int argc, char **argv)
{
	uint64_t random = test_seed(argc, argv);

	for (unsigned i = 0; i < CODEC_SECRET_BYTES; i++)
		secret[i] = (uint8_t)random_next(&random);
	if (test_is_bench(argc, argv)) {
		bench_all(&random);
		return 0;
	}
	test_round_trips(&random);
	test_sizes(&random);
	test_same_filled(&random);
	test_check(&random);
	test_hostile(&random);
	test_malformed();
	test_threads(&random);
	return 0;
}
