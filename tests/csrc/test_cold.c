/* SPDX-License-Identifier: MIT */
/*
 * test_cold — the list of cold clusters against a record of when something was stored in each.
 *
 * Build: tests/csrc/test_cold.c csrc/cold.c csrc/slot_table.c csrc/slot_heap.c csrc/base.c; -Icsrc; threads
 */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <unistd.h>

#include "base.h"
#include "check.h"
#include "cold.h"

#define SPACE_BYTES (64ULL << 20)
#define CLUSTERS 500u
#define STEPS 60000u

static struct slot_space *space;
static struct slot_map map;
static struct cold_list list;
static uint64_t now_ms;

static void store(uint64_t number)
{
	CHECK(slot_set(space, &map, number * CLUSTER_PAGES, (struct slot){ .tag = SLOT_SAME, .check = number }) == 0);
	cold_push(&list, space, &map, number, now_ms++);
	CHECK(list.examined <= list.count && list.count <= list.capacity);
	CHECK(list.capacity <= 4 * (map.cluster_count + 64));
}

static void forget(uint64_t number)
{
	CHECK(slot_set(space, &map, number * CLUSTER_PAGES, (struct slot){ .tag = SLOT_NONE }) == 0);
}

static bool is_listed(uint64_t number)
{
	for (unsigned i = 0; i < list.count; i++)
		if ((list.entries[(list.first + i) % list.capacity] & ((1ULL << 29) - 1)) == number)
			return true;
	return false;
}

static void end(void)
{
	for (uint64_t number = 0; number < CLUSTERS; number++)
		forget(number);
	cold_destroy(&list);
	CHECK(list.count == 0 && map.cluster_count == 0);
}

/* Clusters that were stored once, long ago, stay in front of those that are stored again and again. */
static void test_busy_ones_do_not_displace(void)
{
	uint64_t number;

	for (uint64_t i = 0; i < CLUSTERS; i++)
		store(i);
	for (unsigned i = 0; i < 20 * CLUSTERS; i++)
		store(i % 10);
	for (uint64_t i = 10; i < CLUSTERS; i++) {
		do
			CHECK(cold_pop(&list, &number));
		while (number < 10 && i == 10); /* older entries of the busy ones */
		CHECK(number == i);
	}
	end();
}

/* Memory that comes and goes at new addresses takes no room. */
static void test_gone_clusters_are_forgotten(void)
{
	uint64_t number;

	for (uint64_t i = 1; i <= 100000; i++) {
		store(i);
		forget(i);
	}
	store(7);
	CHECK(list.count <= 128);
	while (cold_pop(&list, &number))
		;
	CHECK(number == 7);
	end();
}

static void test_model(uint64_t *random)
{
	static uint64_t stored_ms[CLUSTERS]; /* 0: not since it was taken */
	uint64_t number, last_ms = 0;

	memset(stored_ms, 0, sizeof stored_ms);
	for (unsigned step = 0; step < STEPS; step++) {
		uint64_t any = random_next(random) % CLUSTERS;

		switch (random_next(random) % 16) {
		case 0:
			forget(any);
			stored_ms[any] = 0;
			break;
		case 1:
		case 2:
			if (cold_pop(&list, &number) && !is_listed(number))
				stored_ms[number] = 0;
			break;
		case 3:
			(void)cold_examine(&list, now_ms, random_next(random) % 1000, &number);
			break;
		default: /* some more often than others */
			any = any % (1 + random_next(random) % CLUSTERS);
			stored_ms[any] = now_ms;
			store(any);
		}
		for (number = 0; step % 500 == 0 && number < CLUSTERS; number++)
			CHECK(!stored_ms[number] || is_listed(number));
	}
	while (cold_pop(&list, &number)) { /* the last entry of each, in order */
		if (is_listed(number) || !stored_ms[number])
			continue;
		CHECK(stored_ms[number] > last_ms);
		last_ms = stored_ms[number];
		stored_ms[number] = 0;
	}
	for (number = 0; number < CLUSTERS; number++)
		CHECK(!stored_ms[number]);
	end();
}

/* Each entry once, when it is old enough, and once more when something was stored there since. */
static void test_examine(void)
{
	uint64_t number;

	now_ms = 10; /* less than an age after the machine was started */
	store(1);
	store(2);
	CHECK(!cold_examine(&list, now_ms, 30, &number));
	CHECK(cold_examine(&list, 40, 30, &number) && number == 1);
	CHECK(!cold_examine(&list, 40, 30, &number));
	CHECK(cold_examine(&list, 41, 30, &number) && number == 2 && list.examined == 2);
	now_ms = 50;
	store(2);
	store(2);
	CHECK(list.count == 3);
	CHECK(cold_pop(&list, &number) && number == 1 && list.examined == 1);
	CHECK(cold_examine(&list, 100, 30, &number) && number == 2);
	CHECK(!cold_examine(&list, 100, 30, &number));
	now_ms = (1ULL << 35) - 1; /* times begin anew */
	store(3);
	CHECK(!cold_examine(&list, (1ULL << 35) + 20, 30, &number));
	CHECK(cold_examine(&list, (1ULL << 35) + 29, 30, &number) && number == 3);
	end();
}

int main(int argc, char **argv)
{
	uint64_t seed = argc > 1 ? strtoul(argv[1], NULL, 0) : 1, random;
	int memfd = memfd_create("slots", MFD_CLOEXEC);
	void *memory;

	if (seed == 0)
		seed = test_now_ns();
	random = seed;
	now_ms = 1;
	CHECK(memfd >= 0 && ftruncate(memfd, SPACE_BYTES) == 0);
	memory = mmap(NULL, SPACE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memfd, 0);
	CHECK(memory != MAP_FAILED && slot_space_create(memfd, 0, memory, SPACE_BYTES, &space) == 0);
	test_busy_ones_do_not_displace();
	test_gone_clusters_are_forgotten();
	test_model(&random);
	test_examine();
	slot_space_destroy(space);
	close(memfd);
	printf("test_cold: passed, seed %lu\n", (unsigned long)seed);
	return 0;
}
