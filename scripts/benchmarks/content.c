/* SPDX-License-Identifier: MIT */
#include "content.h"

#include <lz4.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BANK_PAGES 256u /* 1 MiB: more than LZ4's window of 64 KiB, little beside any working set */
#define LITERALS_MEAN 10.0
#define MATCH_MIN 5u /* LZ4 on 64-bit machines hashes five bytes */

static struct content_options options;
static uint64_t bank[BANK_PAGES][PAGE_WORDS];
static double bank_ratio;
static uint64_t link_modulus, link_multiplier; /* modulus: power of two >= page_count */

uint64_t content_mix(uint64_t value)
{
	value += 0x9e3779b97f4a7c15u;
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
	value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
	return value ^ (value >> 31);
}

/* ---- bank ---- */

static uint64_t next_random(uint64_t *state)
{
	return content_mix((*state)++);
}

/* From `mean` / 2 to `mean` * 3 / 2. */
static unsigned around(double mean, uint64_t *state)
{
	double unit = (double)(next_random(state) >> 11) / 0x1p53;

	return (unsigned)lround(mean * (0.5 + unit));
}

/* Random literals and copies of what came before, as LZ4 sees any data: the longer the copies, the higher
 * the ratio. Lengths vary, so that expanding branches as it does for real data. */
static void make_bank_page(uint8_t *data, double match_mean, uint64_t *state)
{
	unsigned used = 0;

	while (used < PAGE_BYTES) {
		unsigned literals = around(LITERALS_MEAN, state), match = around(match_mean, state);

		for (unsigned i = 0; i < literals && used < PAGE_BYTES; i++)
			data[used++] = (uint8_t)next_random(state);
		if (match < MATCH_MIN || used < 64)
			continue;
		unsigned from = (unsigned)(next_random(state) % (used - 32));

		for (unsigned i = 0; i < match && used < PAGE_BYTES; i++)
			data[used++] = data[from + i];
	}
}

static double make_bank(double match_mean)
{
	uint64_t state = content_mix(options.seed), compressed = 0;
	char buffer[LZ4_COMPRESSBOUND(PAGE_BYTES)];

	for (unsigned i = 0; i < BANK_PAGES; i++) {
		make_bank_page((uint8_t *)bank[i], match_mean, &state);
		compressed += (uint64_t)LZ4_compress_default((const char *)bank[i], buffer, PAGE_BYTES, sizeof buffer);
	}
	return (double)(BANK_PAGES * PAGE_BYTES) / (double)compressed;
}

static void find_bank(double ratio)
{
	double low = 0, high = 512;

	for (int i = 0; i < 14; i++) {
		double middle = (low + high) / 2;

		if (make_bank(middle) < ratio)
			low = middle;
		else
			high = middle;
	}
	bank_ratio = make_bank(high);
	if (fabs(bank_ratio / ratio - 1) > 0.03) {
		fprintf(stderr, "workloads: no data of ratio %.2f, nearest is %.2f\n", ratio, bank_ratio);
		exit(1);
	}
}

/* ---- links ---- */

/* A full-period linear congruence modulo a power of two; what lies beyond the last page is passed over. */
static uint64_t congruence(uint64_t page)
{
	return (page * link_multiplier + 0x3c6ef35fu) & (link_modulus - 1);
}

uint64_t content_link(uint64_t page)
{
	do {
		page = congruence(page);
	} while (page >= options.page_count);
	return page;
}

void content_init(const struct content_options *wanted)
{
	options = *wanted;
	for (link_modulus = 1; link_modulus < options.page_count; link_modulus *= 2)
		;
	link_multiplier = 0x19660du; /* 1 modulo 4 */
	find_bank(options.ratio);
}

double content_ratio(void)
{
	return bank_ratio;
}

/* ---- pages ---- */

enum kind { DATA, ZERO, SAME };

static enum kind kind_of(uint64_t page)
{
	if (options.zero_percent + options.same_percent == 0)
		return DATA;
	uint64_t percent = content_mix(page ^ ~options.seed) % 100;

	return percent < options.zero_percent ? ZERO
		: percent < options.zero_percent + options.same_percent ? SAME : DATA;
}

static uint64_t stamp_of(uint64_t page, uint8_t version)
{
	return content_mix(options.seed ^ (page << 8 | version)) | 1;
}

static const uint64_t *bank_of(uint64_t page, uint8_t version)
{
	return bank[content_mix(page << 4 | version >> 4) % BANK_PAGES];
}

uint8_t content_version_updated(uint8_t version)
{
	return (uint8_t)((version & 0xf0) | ((version + 1) & 0x0f));
}

uint8_t content_version_rewritten(uint8_t version)
{
	return (uint8_t)(version + 0x10);
}

void content_write(uint64_t *data, uint64_t page, uint8_t version)
{
	uint64_t stamp = stamp_of(page, version);

	switch (kind_of(page)) {
	case ZERO:
		memset(data, 0, PAGE_BYTES);
		return;
	case SAME:
		for (unsigned i = 0; i < PAGE_WORDS; i++)
			data[i] = stamp;
		return;
	case DATA:
		memcpy(data, bank_of(page, version), PAGE_BYTES);
		data[0] = stamp;
		data[1] = content_link(page);
		data[PAGE_WORDS - 1] = ~stamp;
	}
}

void content_update(uint64_t *data, uint64_t page, uint8_t version)
{
	uint64_t stamp = stamp_of(page, version);

	if (kind_of(page) != DATA) {
		content_write(data, page, version);
		return;
	}
	data[0] = stamp;
	data[PAGE_WORDS - 1] = ~stamp;
}

bool content_check(const uint64_t *data, uint64_t page, uint8_t version)
{
	uint64_t stamp = stamp_of(page, version);
	unsigned word = 2 + (unsigned)(stamp >> 32) % (PAGE_WORDS - 3);

	switch (kind_of(page)) {
	case ZERO:
		return (data[0] | data[word] | data[PAGE_WORDS - 1]) == 0;
	case SAME:
		return data[0] == stamp && data[word] == stamp && data[PAGE_WORDS - 1] == stamp;
	case DATA:
		break;
	}
	return data[0] == stamp && data[1] == content_link(page) && data[PAGE_WORDS - 1] == ~stamp
		&& data[word] == bank_of(page, version)[word];
}

bool content_check_all(const uint64_t *data, uint64_t page, uint8_t version)
{
	uint64_t expected[PAGE_WORDS];

	content_write(expected, page, version);
	return memcmp(data, expected, PAGE_BYTES) == 0;
}
