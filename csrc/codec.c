/* SPDX-License-Identifier: MIT */
/*
 * codec — see codec.h for the object format.
 *
 * Costs a page (Xeon, 2.x GHz): check 0.2 us, same-filled test 5 ns when it is not and 0.1 us when
 * it is, LZ4 expansion 1-2 us. The fault path is expansion and check; both are free of allocation,
 * except for a ZSTD state when more threads than ever before expand at the same time.
 */
#define XXH_INLINE_ALL
#include "codec.h"

#include <errno.h>
#include <lz4.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include <zstd.h>

#include "base.h"

#define LZ4_ACCELERATION 1
#define ZSTD_LEVEL 1
#define EXPANDERS_MAX 16

#define TRAILER_BYTES 1
#define PADDING_MASK 0x3f
#define METHOD_SHIFT 6
/* Longest block worth storing: one byte more, and the object would be as large as the page. */
#define BLOCK_BYTES_MAX ((POOL_UNITS_MAX - 1) * POOL_UNIT_BYTES - TRAILER_BYTES)

static_assert(POOL_UNIT_BYTES - 1 <= PADDING_MASK, "padding fits its 6 bits");
static_assert(PAGE_BYTES <= LZ4_MAX_INPUT_SIZE, "a page is a valid LZ4 input");
static_assert(CODEC_SECRET_BYTES >= XXH3_SECRET_SIZE_MIN, "secret is long enough for XXH3");

/* Pages are written as anything; may_alias lets them be read as words. */
typedef uint64_t __attribute__((may_alias)) page_word;

struct codec_scratch {
	void *lz4;
	ZSTD_CCtx *zstd;
};

struct codec_scratch *codec_scratch_create(void)
{
	struct codec_scratch *scratch = calloc(1, sizeof *scratch);

	if (!scratch)
		return NULL;
	scratch->lz4 = malloc((size_t)LZ4_sizeofState());
	scratch->zstd = ZSTD_createCCtx();
	if (!scratch->lz4 || !scratch->zstd) {
		codec_scratch_destroy(scratch);
		return NULL;
	}
	return scratch;
}

void codec_scratch_destroy(struct codec_scratch *scratch)
{
	if (!scratch)
		return;
	free(scratch->lz4);
	ZSTD_freeCCtx(scratch->zstd);
	free(scratch);
}

uint64_t codec_check(const void *page, const uint8_t secret[CODEC_SECRET_BYTES])
{
	return XXH3_64bits_withSecret(page, PAGE_BYTES, secret, CODEC_SECRET_BYTES) &
	       ((1ULL << CODEC_CHECK_BITS) - 1);
}

bool codec_same_filled(const void *page, uint64_t *ret_word)
{
	const page_word *words = page;
	const size_t last = PAGE_BYTES / sizeof *words - 1;

	VS_DCHECK((uintptr_t)page % sizeof *words == 0);
	/* The last word first: pages that begin alike (headers, zeros) often do not end alike. */
	if (words[0] != words[last] || words[0] != words[last / 2])
		return false;
	/* All are equal when each equals its neighbour; libc's memcmp has the widest vectors. */
	if (memcmp(words, words + 1, PAGE_BYTES - sizeof *words) != 0)
		return false;
	*ret_word = words[0];
	return true;
}

void codec_fill(void *page, uint64_t word)
{
	page_word *words = page;

	VS_DCHECK((uintptr_t)page % sizeof *words == 0);
	for (size_t i = 0; i < PAGE_BYTES / sizeof *words; i++)
		words[i] = word;
}

/* ---- compress ---- */

/* Length of the block written to `block`, or 0 when it would exceed BLOCK_BYTES_MAX. */
static size_t compress_block(struct codec_scratch *scratch, enum codec_method method,
			     const void *page, void *block)
{
	size_t bytes;
	int count;

	switch (method) {
	case CODEC_LZ4:
		count = LZ4_compress_fast_extState(scratch->lz4, page, block, (int)PAGE_BYTES,
						   (int)BLOCK_BYTES_MAX, LZ4_ACCELERATION);
		return count > 0 ? (size_t)count : 0;
	case CODEC_ZSTD:
		bytes = ZSTD_compressCCtx(scratch->zstd, block, BLOCK_BYTES_MAX, page, PAGE_BYTES,
					  ZSTD_LEVEL);
		return ZSTD_isError(bytes) ? 0 : bytes;
	}
	VS_CHECK(!"codec_method");
}

unsigned codec_compress(struct codec_scratch *scratch, enum codec_method method, const void *page,
			void *object)
{
	size_t bytes = compress_block(scratch, method, page, object);
	size_t units, padding;
	uint8_t *trailer;

	VS_CHECK(bytes <= BLOCK_BYTES_MAX);
	if (bytes == 0) {
		memcpy(object, page, PAGE_BYTES);
		return POOL_UNITS_MAX;
	}
	units = div_ceil(bytes + TRAILER_BYTES, POOL_UNIT_BYTES);
	padding = units * POOL_UNIT_BYTES - TRAILER_BYTES - bytes;
	VS_CHECK(units < POOL_UNITS_MAX && padding < POOL_UNIT_BYTES);
	trailer = (uint8_t *)object + bytes + padding;
	/* An object is a function of its page: no old bytes of the buffer get to disk. */
	memset((uint8_t *)object + bytes, 0, padding);
	*trailer = (uint8_t)(padding | (unsigned)method << METHOD_SHIFT);
	return (unsigned)units;
}

/* ---- expand ---- */

/*
 * ZSTD states that nobody uses just now, made when they are first needed: as many as threads ever expanded at the
 * same time. Each is 100 KiB, and there are several fault threads a client: too much for one of each thread's own.
 */
static ZSTD_DCtx *expanders[EXPANDERS_MAX];

static ZSTD_DCtx *expander_take(void)
{
	for (unsigned i = 0; i < EXPANDERS_MAX; i++) {
		ZSTD_DCtx *expander = __atomic_exchange_n(&expanders[i], NULL, __ATOMIC_ACQUIRE);

		if (expander)
			return expander;
	}
	return ZSTD_createDCtx();
}

static void expander_give(ZSTD_DCtx *expander)
{
	for (unsigned i = 0; i < EXPANDERS_MAX; i++) {
		ZSTD_DCtx *none = NULL;

		if (__atomic_compare_exchange_n(&expanders[i], &none, expander, false, __ATOMIC_RELEASE,
						__ATOMIC_RELAXED))
			return;
	}
	ZSTD_freeDCtx(expander);
}

static int expand_lz4(const void *block, size_t bytes, void *page)
{
	int count = LZ4_decompress_safe(block, page, (int)bytes, (int)PAGE_BYTES);

	return count == (int)PAGE_BYTES ? 0 : -EBADMSG;
}

static int expand_zstd(const void *block, size_t bytes, void *page)
{
	ZSTD_DCtx *expander = expander_take();
	size_t count;

	if (!expander)
		return -ENOMEM;
	count = ZSTD_decompressDCtx(expander, page, PAGE_BYTES, block, bytes);
	expander_give(expander);
	return count == PAGE_BYTES ? 0 : -EBADMSG;
}

bool codec_is_zstd(const void *object, unsigned units)
{
	size_t last = units * POOL_UNIT_BYTES - TRAILER_BYTES;

	return units < POOL_UNITS_MAX && ((const uint8_t *)object)[last] >> METHOD_SHIFT == CODEC_ZSTD;
}

int codec_expand(const void *object, unsigned units, void *page)
{
	static const uint8_t zeros[POOL_UNIT_BYTES];
	uint8_t trailer;
	size_t bytes;

	if (units == 0 || units > POOL_UNITS_MAX)
		return -EBADMSG;
	if (units == POOL_UNITS_MAX) {
		memcpy(page, object, PAGE_BYTES);
		return 0;
	}
	bytes = units * POOL_UNIT_BYTES - TRAILER_BYTES;
	trailer = ((const uint8_t *)object)[bytes];
	bytes -= trailer & PADDING_MASK; /* 0 at least: padding < POOL_UNIT_BYTES <= an object */
	if (memcmp((const uint8_t *)object + bytes, zeros, trailer & PADDING_MASK) != 0)
		return -EBADMSG; /* says nothing about the page, but the storage is broken */
	switch (trailer >> METHOD_SHIFT) {
	case CODEC_LZ4:
		return expand_lz4(object, bytes, page);
	case CODEC_ZSTD:
		return expand_zstd(object, bytes, page);
	default:
		return -EBADMSG;
	}
}
