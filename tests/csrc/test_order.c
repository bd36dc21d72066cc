/* SPDX-License-Identifier: MIT */
/*
 * test_order — ghosts against an exact record of evictions, probation against a plain queue.
 *
 * Build: tests/csrc/test_order.c csrc/order.c csrc/base.c; -Icsrc; threads
 */
#define _GNU_SOURCE
#include "base.h"
#include "check.h"
#include "order.h"

#define LIMIT_PAGES 65536u
#define EVICTIONS 200000u
#define STEPS 400000u

/* Of pages evicted a short while ago nearly all are known, of older ones and of those never evicted nearly none. */
static void test_ghosts(uint64_t *random)
{
	const uint64_t window = LIMIT_PAGES / 8, strange = 1ULL << 30;
	struct ghosts ghosts;
	uint64_t *pages = malloc(EVICTIONS * sizeof *pages);
	unsigned known = 0, wrong = 0;

	CHECK(pages && ghosts_create(&ghosts, LIMIT_PAGES * PAGE_BYTES) == 0);
	for (unsigned i = 0; i < EVICTIONS; i++) {
		pages[i] = (uint64_t)i * 7 + random_next(random) % 7; /* each once */
		ghosts_note(&ghosts, 3, pages[i]);
	}
	for (unsigned i = 0; i < 1000; i++) {
		uint64_t recent = pages[EVICTIONS - 1 - random_next(random) % (window / 2)];
		uint64_t old = pages[random_next(random) % (EVICTIONS - 2 * window)];

		known += ghosts_is_recent(&ghosts, 3, recent, window);
		wrong += ghosts_is_recent(&ghosts, 4, recent, window);
		wrong += ghosts_is_recent(&ghosts, 3, old, window);
		wrong += ghosts_is_recent(&ghosts, 3, strange + i, LIMIT_PAGES);
	}
	CHECK(known > 900); /* some are overwritten by later ones */
	CHECK(wrong < 20);  /* tags of 12 bits, one of them always set */
	free(pages);
	ghosts_destroy(&ghosts);
	ghosts_destroy(&ghosts); /* as after a failed create */
}

/* A queue of single pages. */
struct model {
	uint64_t pages[STEPS];
	unsigned first, end;
};

static void check_front(struct probation *probation, const struct model *model)
{
	struct probation_run run;

	CHECK(probation->page_count == model->end - model->first);
	CHECK(probation_peek(probation, &run) == (model->end > model->first));
	if (model->end == model->first)
		return;
	CHECK(run.count > 0 && run.count <= model->end - model->first);
	for (uint64_t i = 0; i < run.count; i++)
		CHECK(model->pages[model->first + i] == run.page + i);
}

/* As a forked child gets it: the same pages in the same order. */
static void check_copy(struct probation *probation)
{
	struct probation child = { 0 };
	struct probation_run run, of_child;

	probation_copy(probation, &child);
	CHECK(child.page_count == probation->page_count);
	while (probation_peek(probation, &run) && probation_peek(&child, &of_child)) {
		uint64_t count = min_of(run.count, of_child.count);

		CHECK(run.page == of_child.page);
		probation_take(probation, count);
		probation_take(&child, count);
	}
	CHECK(child.page_count == 0 && probation->page_count == 0);
	probation_clear(&child);
}

static void test_probation(uint64_t *random)
{
	struct model *model = calloc(1, sizeof *model);
	struct probation probation = { 0 };
	struct probation_run run;
	uint64_t next = 1000;

	CHECK(model);
	for (unsigned step = 0; model->end + 64 < STEPS; step++) {
		uint64_t count = 1 + random_next(random) % 8;

		if (random_next(random) % 3 && probation_peek(&probation, &run)) {
			count = min_of(count, run.count);
			probation_take(&probation, count);
			model->first += (unsigned)count;
			if (random_next(random) % 4 == 0) {
				probation_return(&probation, run.page, count);
				model->first -= (unsigned)count;
			}
		} else {
			next += random_next(random) % 3 ? 0 : 1 + random_next(random) % 100;
			probation_push(&probation, next, count);
			for (uint64_t i = 0; i < count; i++)
				model->pages[model->end++] = next++;
		}
		check_front(&probation, model);
	}
	check_copy(&probation);
	probation_clear(&probation);
	CHECK(!probation_peek(&probation, &run) && probation.page_count == 0);
	free(model);
}

/* More runs than there is room for: the oldest are forgotten, counts stay right. */
static void test_forgetting(void)
{
	struct probation probation = { 0 };
	struct probation_run run;
	uint64_t pages = 0;

	for (uint64_t i = 0; i < PROBATION_RUNS_MAX + 10; i++)
		probation_push(&probation, i * 100, 1 + i % 3);
	CHECK(probation_peek(&probation, &run) && run.page == 1000);
	probation_return(&probation, 0, 1); /* no room in front of them: the hand finds it */
	CHECK(probation_peek(&probation, &run) && run.page == 1000);
	while (probation_peek(&probation, &run)) {
		pages += run.count;
		CHECK(probation.page_count >= run.count);
		probation_take(&probation, run.count);
	}
	CHECK(probation.page_count == 0 && pages >= PROBATION_RUNS_MAX);
	probation_clear(&probation);
}

static void test_part(void)
{
	struct probation probation = { 0 };
	uint64_t most = 0;

	CHECK(!probation_is_full(&probation, -5));
	for (uint64_t i = 0; i < 2 * PROBATION_PAGES_MAX; i++) {
		probation_push(&probation, i, 1);
		if (!probation_is_full(&probation, INT64_MAX))
			most = probation.page_count;
		CHECK(probation_is_full(&probation, INT64_MAX) <= probation_is_full(&probation, 0));
	}
	CHECK(most == PROBATION_PAGES_MAX);
	probation_clear(&probation);
}

int main(int argc, char **argv)
{
	uint64_t random = test_seed(argc, argv);

	test_ghosts(&random);
	test_probation(&random);
	test_forgetting();
	test_part();
	return 0;
}
