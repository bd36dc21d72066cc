/* SPDX-License-Identifier: MIT */
/*
 * codec — what a page's bytes are: same-filled, compressible, raw; and how to know them again.
 *
 * Pure functions over memory, safe from any thread; each thread brings its own scratch.
 *
 * Object format  an object is `units` * 64 bytes.
 *                units == 64: the 4096 raw bytes of the page.
 *                units <  64: LZ4 (or ZSTD) block, padding, and in the last byte
 *                    bits 0-5  number of padding bytes before that byte (0..63)
 *                    bits 6-7  enum codec_method
 *                so the exact compressed length is units * 64 - 1 - padding.
 * Check          58 bits of a keyed 64-bit XXH3 of the expanded page. It serves twice: to see that
 *                a page is unchanged since its copy was stored, and to verify what storage gives
 *                back. See docs/decisions for why 58.
 */
#ifndef VSWAP_CODEC_H
#define VSWAP_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "limits.h"

enum codec_method {
	CODEC_LZ4 = 0,
	CODEC_ZSTD = 1, /* second-chance compression of old objects */
};

#define CODEC_CHECK_BITS 58
#define CODEC_SECRET_BYTES 192 /* XXH3 secret, random per state memfd */

/* Per-thread compression state. Create returns NULL without memory; destroying NULL is fine. */
struct codec_scratch;
struct codec_scratch *codec_scratch_create(void);
void codec_scratch_destroy(struct codec_scratch *scratch);

/* Keyed check of one page; at most CODEC_CHECK_BITS bits are set. */
uint64_t codec_check(const void *page, const uint8_t secret[CODEC_SECRET_BYTES]);

/* True when all 512 words of the page are equal; *ret_word is that word. Page is 8-byte aligned. */
bool codec_same_filled(const void *page, uint64_t *ret_word);

/* Fill a page with one 64-bit word. */
void codec_fill(void *page, uint64_t word);

/*
 * Compress one page into `object` (room for PAGE_BYTES). Returns the object's size in units,
 * 1..64; 64 means stored raw (incompressible: less than one unit saved). Never fails.
 */
unsigned codec_compress(struct codec_scratch *scratch, enum codec_method method, const void *page,
			void *object);

/* Was the object compressed a second time? */
bool codec_is_zstd(const void *object, unsigned units);

/*
 * Expand an object of `units` units into `page`. Returns 0, or -EBADMSG when the object is not
 * well formed, or -ENOMEM when it takes one more ZSTD state and there is no memory for it (the object
 * is fine: try again); page contents are then undefined. Never reads outside
 * the object or writes outside the page, whatever the object holds.
 */
int codec_expand(const void *object, unsigned units, void *page);

#endif
