/* SPDX-License-Identifier: MIT */
/*
 * fuzz_spill — what a spill backend gives back: objects, and segments with their tables.
 *
 * Input: one byte that says which, then
 *   object    units, 8 bytes of check, the object: expanded as fill.c does it. What passes the check of a seed's page
 *             is that page. (libFuzzer learns the check of other pages from the comparison.)
 *   segment   header, table: laid into a segment (first byte from 128 on: one that a successor claimed). Mode 2 puts the checksum right first, so that what comes behind it
 *             is reached. What is accepted has all its objects inside the segment.
 */
#include "spill.c"

#include "codec.h"
#include "fuzz.h"

#define PAGES 8

enum mode { MODE_OBJECT, MODE_SEGMENT, MODE_SUMMED };

static uint8_t secret[CODEC_SECRET_BYTES]; /* noise: with a secret of one byte repeated the hash is none */

__attribute__((constructor)) static void make_secret(void)
{
	uint64_t key = 1;

	for (unsigned i = 0; i < sizeof secret; i++) {
		key = key * 6364136223846793005u + 1442695040888963407u;
		secret[i] = (uint8_t)(key >> 56);
	}
}

/* From zeros to noise. */
static void make_page(unsigned number, uint64_t *words)
{
	uint64_t key = number + 1;

	for (unsigned i = 0; i < PAGE_BYTES / 8; i++) {
		key = key * 6364136223846793005u + 1442695040888963407u;
		words[i] = number == PAGES - 1 ? key : key >> (8 * number < 56 ? 60 - 7 * number : 0);
	}
}

static void test_object(const uint8_t *data, size_t size)
{
	static uint64_t page[PAGE_BYTES / 8], want[PAGE_BYTES / 8];
	unsigned units = data[0];
	uint8_t *object;
	uint64_t check;

	if (size < 9)
		return;
	memcpy(&check, data + 1, sizeof check);
	data += 9;
	size -= 9;
	object = calloc(1, units ? units * POOL_UNIT_BYTES : 1); /* as large as its units, not one byte more */
	MUST(object);
	memcpy(object, data, size < units * POOL_UNIT_BYTES ? size : units * POOL_UNIT_BYTES);
	if (codec_expand(object, units, page) == 0 && codec_check(page, secret) == check) {
		for (unsigned i = 0; i < PAGES; i++) {
			make_page(i, want);
			MUST(codec_check(want, secret) != check || memcmp(want, page, PAGE_BYTES) == 0);
		}
	}
	free(object);
}

static void test_segment(const uint8_t *data, size_t size, bool summed, bool claimed)
{
	static uint8_t *bytes;
	struct spill_lineage lineage = { .identity = 7 };
	struct spill spill = { .lineage = &lineage, .segment_count = 4 };
	struct segment_header header = { 0 };
	size_t table_bytes_max = 0;
	int count;

	bytes = bytes ? bytes : calloc(1, SEGMENT_BYTES);
	MUST(bytes);
	memcpy(&header, data, min_of(size, sizeof header));
	if (size > sizeof header && header.table_bytes_in < SEGMENT_BYTES && header.table_bytes_in >= sizeof header) {
		table_bytes_max = min_of(size - sizeof header, SEGMENT_BYTES - header.table_bytes_in);
		memcpy(bytes + header.table_bytes_in, data + sizeof header, table_bytes_max);
	}
	if (summed && header_is_sound(&header, false))
		header.checksum = segment_checksum(header, bytes + header.table_bytes_in,
						   table_bytes(header.extent_count));
	memcpy(bytes, &header, sizeof header);
	count = segment_verify(&spill, 2, claimed, 5, bytes);
	for (int i = 0; i < count; i++) {
		struct spill_entry entry = spill_table_entry(bytes, (unsigned)i);

		MUST(entry.units >= 1 && entry.units <= POOL_UNITS_MAX);
		MUST(entry.object_bytes_in >= sizeof header &&
		     entry.object_bytes_in + entry.units * POOL_UNIT_BYTES <= header.table_bytes_in);
		MUST(entry.extent == 2 * SEGMENT_UNITS + entry.object_bytes_in / POOL_UNIT_BYTES);
	}
	if (table_bytes_max)
		memset(bytes + header.table_bytes_in, 0, table_bytes_max);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size < 2)
		return 0;
	if (data[0] % 3 == MODE_OBJECT)
		test_object(data + 1, size - 1);
	else
		test_segment(data + 1, size - 1, data[0] % 3 == MODE_SUMMED, data[0] >= 128);
	return 0;
}

static size_t object_seed(unsigned number, enum codec_method method, uint8_t *data)
{
	static uint64_t page[PAGE_BYTES / 8];
	struct codec_scratch *scratch = codec_scratch_create();
	uint64_t check;
	unsigned units;

	make_page(number, page);
	check = codec_check(page, secret);
	units = codec_compress(scratch, method, page, data + 10);
	data[0] = MODE_OBJECT;
	data[1] = (uint8_t)units;
	memcpy(data + 2, &check, sizeof check);
	codec_scratch_destroy(scratch);
	return 10 + units * POOL_UNIT_BYTES;
}

static size_t segment_seed(unsigned extents, enum mode mode, uint8_t *data)
{
	struct segment_header header = {
		.magic = SEGMENT_MAGIC, .generation = 5, .extent_count = extents, .identity = 7, .segment = 2,
		.table_bytes_in = (uint32_t)(POOL_UNIT_BYTES * (1 + extents * (extents + 1) / 2)),
	};
	struct table_entry *entries = (struct table_entry *)(data + 1 + sizeof header);
	unsigned unit = 1;

	header.used_bytes = header.table_bytes_in + (uint32_t)table_bytes(extents);
	for (unsigned i = 1; i <= extents; unit += i++) {
		struct table_entry entry = { .owner = i, .unit = (uint16_t)unit, .units = (uint16_t)i };

		memcpy(&entries[extents - i], &entry, sizeof entry);
	}
	data[0] = (uint8_t)mode;
	header.checksum = segment_checksum(header, entries, table_bytes(extents));
	memcpy(data + 1, &header, sizeof header);
	return 1 + sizeof header + table_bytes(extents);
}

size_t fuzz_seed(unsigned index, uint8_t *data)
{
	if (index < 2 * PAGES)
		return object_seed(index / 2, index % 2 ? CODEC_ZSTD : CODEC_LZ4, data);
	index -= 2 * PAGES;
	if (index < 12)
		return segment_seed(1 + index / 2 * 3, index % 2 ? MODE_SUMMED : MODE_SEGMENT, data);
	return 0;
}
