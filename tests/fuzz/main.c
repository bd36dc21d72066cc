/* SPDX-License-Identifier: MIT */
/*
 * main — drives a fuzz target where there is no libFuzzer.
 *
 *   TARGET [-runs=N] [-seed=S]      mutated seeds; a finding prints the run's number and its bytes
 *   TARGET -seeds=DIRECTORY         write the seeds there (libFuzzer's corpus)
 *   TARGET FILE...                  these inputs, once
 */
#include "fuzz.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

#define SEEDS_MAX 64

static uint8_t seeds[SEEDS_MAX][FUZZ_BYTES_MAX], input[FUZZ_BYTES_MAX];
static size_t sizes[SEEDS_MAX], input_size;
static unsigned seed_count;
static uint64_t state = 1;

static uint64_t next(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static size_t below(size_t limit) { return limit ? (size_t)((next() >> 11) % limit) : 0; }

static void mutate_once(void)
{
	static const uint64_t edges[] = { 0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff,
					  0x7fffffffffffffff, 0xfffffffffffff000, 0xffffffffffffffff };
	size_t at = below(input_size), bytes = 1 + below(8), from;
	uint64_t value;

	switch (below(6)) {
	case 0:
		input[at] ^= (uint8_t)(1u << below(8));
		break;
	case 1:
		input[at] = (uint8_t)next();
		break;
	case 2:
		value = edges[below(sizeof edges / sizeof *edges)];
		memcpy(input + at, &value, bytes < input_size - at ? bytes : input_size - at);
		break;
	case 3: /* shorter */
		input_size = 1 + below(input_size);
		break;
	case 4: /* a piece moved */
		from = below(input_size);
		bytes = 1 + below(64);
		bytes = bytes < input_size - (from > at ? from : at) ? bytes : input_size - (from > at ? from : at);
		memmove(input + at, input + from, bytes);
		break;
	default: /* longer */
		while (bytes-- && input_size < FUZZ_BYTES_MAX)
			input[input_size++] = (uint8_t)next();
	}
}

static void make_input(void)
{
	unsigned i = (unsigned)below(seed_count);

	memcpy(input, seeds[i], sizes[i]);
	input_size = sizes[i];
	for (size_t n = 1 + below(below(4) ? 4 : 32); n > 0; n--)
		mutate_once();
}

static void on_abort(int number)
{
	char text[64];
	int length = snprintf(text, sizeof text, "\ninput of %zu bytes: ", input_size);

	(void)!write(STDERR_FILENO, text, (size_t)length);
	for (size_t i = 0; i < input_size; i++) {
		length = snprintf(text, sizeof text, "%02x", input[i]);
		(void)!write(STDERR_FILENO, text, (size_t)length);
	}
	signal(number, SIG_DFL);
	raise(number);
}

static void write_seeds(const char *directory)
{
	for (unsigned i = 0; i < seed_count; i++) {
		char path[4096];
		FILE *file;

		snprintf(path, sizeof path, "%s/seed-%u", directory, i);
		file = fopen(path, "wb");
		MUST(file && fwrite(seeds[i], 1, sizes[i], file) == sizes[i] && fclose(file) == 0);
	}
}

static void run_file(const char *path)
{
	FILE *file = fopen(path, "rb");

	MUST(file);
	input_size = fread(input, 1, sizeof input, file);
	fclose(file);
	LLVMFuzzerTestOneInput(input, input_size);
}

int main(int argc, char **argv)
{
	unsigned long long runs = 100000;

	while (seed_count < SEEDS_MAX && (sizes[seed_count] = fuzz_seed(seed_count, seeds[seed_count])) > 0)
		seed_count++;
	signal(SIGABRT, on_abort);
	for (int i = 1; i < argc; i++) {
		if (strncmp(argv[i], "-runs=", 6) == 0) {
			runs = strtoull(argv[i] + 6, NULL, 10);
		} else if (strncmp(argv[i], "-seed=", 6) == 0) {
			state = strtoull(argv[i] + 6, NULL, 10) * 0x9E3779B97F4A7C15ULL | 1;
		} else if (strncmp(argv[i], "-seeds=", 7) == 0) {
			write_seeds(argv[i] + 7);
			return 0;
		} else {
			run_file(argv[i]);
			runs = 0;
		}
	}
	for (unsigned long long run = 0; run < runs; run++) {
		make_input();
		LLVMFuzzerTestOneInput(input, input_size);
	}
	printf("%llu inputs, no finding\n", runs);
	return 0;
}
