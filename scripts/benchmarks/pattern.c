/* SPDX-License-Identifier: MIT */
#include "pattern.h"

#include <math.h>

#include "content.h"

#define STRIDE 16u
#define ZIPF_EXPONENT 0.99

static uint64_t greatest_common_divisor(uint64_t a, uint64_t b)
{
	while (b != 0) {
		uint64_t rest = a % b;

		a = b;
		b = rest;
	}
	return a;
}

void pattern_init(struct pattern *pattern, enum pattern_kind kind, uint64_t page_count, uint64_t seed)
{
	*pattern = (struct pattern){ .kind = kind, .page_count = page_count, .state = content_mix(seed),
		.hot_pages = page_count / 5, .hot_permille = 800 };
	pattern->scatter = (uint64_t)((double)page_count * 0.6180339887) | 1;
	while (greatest_common_divisor(pattern->scatter, page_count) != 1)
		pattern->scatter += 2;
	if (kind != PATTERN_ZIPF)
		return;
	for (uint64_t rank = 1; rank <= page_count; rank++)
		pattern->zeta += pow((double)rank, -ZIPF_EXPONENT);
	pattern->eta = (1 - pow(2.0 / (double)page_count, 1 - ZIPF_EXPONENT))
		/ (1 - (1 + pow(0.5, ZIPF_EXPONENT)) / pattern->zeta);
}

static uint64_t random_below(struct pattern *pattern, uint64_t bound)
{
	return content_mix(pattern->state++) % bound;
}

/* Gray et al., "Quickly generating billion-record synthetic databases", 1994. */
static uint64_t zipf_rank(struct pattern *pattern)
{
	double unit = (double)(content_mix(pattern->state++) >> 11) / 0x1p53, scaled = unit * pattern->zeta;

	if (scaled < 1)
		return 0;
	if (scaled < 1 + pow(0.5, ZIPF_EXPONENT))
		return 1;
	double rank = (double)pattern->page_count
		* pow(pattern->eta * unit - pattern->eta + 1, 1 / (1 - ZIPF_EXPONENT));

	return rank < (double)pattern->page_count ? (uint64_t)rank : pattern->page_count - 1;
}

static uint64_t hot_rank(struct pattern *pattern)
{
	uint64_t hot_pages = pattern->hot_pages, rank;

	if (random_below(pattern, 1000) < pattern->hot_permille)
		rank = random_below(pattern, hot_pages);
	else
		rank = hot_pages + random_below(pattern, pattern->page_count - hot_pages);
	return (pattern->hot_first + rank) % pattern->page_count;
}

static uint64_t strided(const struct pattern *pattern, uint64_t access)
{
	uint64_t row_length = pattern->page_count / STRIDE;

	return access % row_length * STRIDE + access / row_length % STRIDE;
}

uint64_t pattern_next(struct pattern *pattern)
{
	switch (pattern->kind) {
	case PATTERN_SEQUENTIAL:
		return pattern->next++ % pattern->page_count;
	case PATTERN_STRIDED:
		return strided(pattern, pattern->next++);
	case PATTERN_RANDOM:
		return random_below(pattern, pattern->page_count);
	case PATTERN_HOT:
		return hot_rank(pattern) * pattern->scatter % pattern->page_count;
	case PATTERN_ZIPF:
		return zipf_rank(pattern) * pattern->scatter % pattern->page_count;
	case PATTERN_CHASE:
		break;
	}
	return pattern->next = content_link(pattern->next);
}
