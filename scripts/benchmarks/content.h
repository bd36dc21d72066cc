/* SPDX-License-Identifier: MIT */
/*
 * content.h — what the pages of a workload contain: a function of (seed, page, version), so that any page can
 * be verified at any time, and of a wanted LZ4 ratio.
 *
 * A data page is a stamp (word 0), a link (word 1), a page of a bank made once with the wanted ratio, and
 * the stamp again, inverted (last word). A version has a generation in its upper half, which chooses the
 * bank page, and a count of small updates in its lower half, which only changes the stamps. Zero pages are
 * all zero, same-filled pages repeat the stamp.
 */
#ifndef BENCHMARKS_CONTENT_H
#define BENCHMARKS_CONTENT_H

#include <stdbool.h>
#include <stdint.h>

#define PAGE_BYTES 4096u
#define PAGE_WORDS (PAGE_BYTES / 8u)

struct content_options {
	uint64_t seed;
	uint64_t page_count;   /* links go round all of them */
	double ratio;          /* LZ4 ratio of the data pages, from 1.05 to 20 */
	unsigned zero_percent; /* of all pages */
	unsigned same_percent;
};

/* Once, before anything else. Takes about 20 ms. Ends the program when the ratio cannot be reached. */
void content_init(const struct content_options *options);

/* What LZ4 makes of the data pages: bytes in for bytes out. */
double content_ratio(void);

/* All of a page. */
void content_write(uint64_t *data, uint64_t page, uint8_t version);

/* Both stamps only: a small update. `version` differs from the page's in its lower half only. Does nothing to a
 * zero page; all of a same-filled page changes. */
void content_update(uint64_t *data, uint64_t page, uint8_t version);

/* The next small update, the next generation. Versions start at 1 and wrap round within 8 bits. */
uint8_t content_version_updated(uint8_t version);
uint8_t content_version_rewritten(uint8_t version);

/* Stamps, link and one word of the rest. */
bool content_check(const uint64_t *data, uint64_t page, uint8_t version);

/* Every byte. */
bool content_check_all(const uint64_t *data, uint64_t page, uint8_t version);

/* Where page `page` leads in a pointer chase: one cycle through all pages in no apparent order. */
uint64_t content_link(uint64_t page);

/* 64 bits that depend on all bits of `value`. */
uint64_t content_mix(uint64_t value);

#endif
