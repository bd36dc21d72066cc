/* SPDX-License-Identifier: MIT */
/*
 * slots — what the slot table costs an operation when it holds N slots, of one map, N = 10^4 … 10^8.
 *
 *   slots N
 *
 * The slots are synthetic: they name objects that are nowhere, and nothing but the table (csrc/slot_table.h) is asked for them.
 * One line of JSON: nanoseconds of an append, of a look-up and a replacement of a random one, of dropping a random one and
 * setting it again, bytes a slot, and what a successor needs to take the table over, a slot. Every look-up is checked.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "slot_table.h"

#define SPACE_BYTES (1ull << 36)
#define FIRST_PAGE (1ull << 32)
#define RANDOM_OPERATIONS 1000000u

static struct slot_map map;
static struct slot_space *space;
static uint64_t slot_count, claimed_count;

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "slots: %s\n", what);
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint64_t mix(uint64_t value)
{
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
	value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
	return value ^ (value >> 31);
}

static struct slot slot_of(uint64_t number)
{
	return (struct slot){ .tag = SLOT_POOL, .units = (uint8_t)(1 + number % 40), .location = number & 0xffffffff,
			      .check = mix(number) >> 6 };
}

static uint64_t random_number(uint64_t i)
{
	return mix(i * 0x9e3779b97f4a7c15u + 1) % slot_count;
}

static void set(uint64_t number, struct slot slot)
{
	if (slot_set(space, &map, FIRST_PAGE + number, slot) != 0)
		fail("no memory for a slot");
}

static void check(uint64_t number)
{
	struct slot slot;

	if (slot_get(space, &map, FIRST_PAGE + number, &slot) != 0 || !slot_is_equal(slot, slot_of(number)))
		fail("a slot is not what was set");
}

static double time_append(void)
{
	uint64_t started = now_ns();

	for (uint64_t i = 0; i < slot_count; i++)
		set(i, slot_of(i));
	return (double)(now_ns() - started) / (double)slot_count;
}

static double time_look_up(void)
{
	uint64_t started = now_ns();

	for (uint64_t i = 0; i < RANDOM_OPERATIONS; i++)
		check(random_number(i));
	return (double)(now_ns() - started) / RANDOM_OPERATIONS;
}

static double time_replace(void)
{
	uint64_t started = now_ns();

	for (uint64_t i = 0; i < RANDOM_OPERATIONS; i++)
		set(random_number(i), slot_of(random_number(i)));
	return (double)(now_ns() - started) / RANDOM_OPERATIONS;
}

static double time_drop_and_set(void)
{
	uint64_t started = now_ns();

	for (uint64_t i = 0; i < RANDOM_OPERATIONS; i++) {
		set(random_number(i), (struct slot){ .tag = SLOT_NONE });
		set(random_number(i), slot_of(random_number(i)));
	}
	return (double)(now_ns() - started) / RANDOM_OPERATIONS;
}

static int claim(void *context, uint64_t page, struct slot slot)
{
	(void)context;
	(void)page;
	claimed_count += slot.tag == SLOT_POOL;
	return 0;
}

/* As recover.c does it, but for what it does with each slot. */
static double time_takeover(int fd, void *base)
{
	slot_space_destroy(space);
	uint64_t started = now_ns();

	if (slot_space_open(fd, 0, base, SPACE_BYTES, &space) != 0 || slot_space_adopt(space, &map) != 0 ||
	    slot_space_ready(space) != 0 || slot_map_claim(space, &map, claim, NULL) != 0)
		fail("the table cannot be taken over");
	slot_space_claimed(space);
	return (double)(now_ns() - started) / (double)slot_count;
}

int main(int argc, char **argv)
{
	slot_count = argc == 2 ? strtoull(argv[1], NULL, 10) : 0;
	if (slot_count == 0) {
		fprintf(stderr, "usage: slots N\n");
		return 2;
	}
	int fd = memfd_create("slots", MFD_CLOEXEC);
	void *base = MAP_FAILED;

	if (fd >= 0 && ftruncate(fd, SPACE_BYTES) == 0)
		base = mmap(NULL, SPACE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (base == MAP_FAILED || slot_space_create(fd, 0, base, SPACE_BYTES, &space) != 0)
		fail("no address space");
	double append = time_append(), look_up = time_look_up(), replace = time_replace(), again = time_drop_and_set();
	double bytes = (double)slot_space_metadata_bytes(space) / (double)slot_count, takeover = time_takeover(fd, base);

	for (uint64_t i = 0; i < RANDOM_OPERATIONS; i++)
		check(random_number(i));
	if (claimed_count != slot_count)
		fail("not every slot was taken over");
	printf("{\"phase\":\"slots\",\"slots\":%llu,\"append_ns\":%.1f,\"look_up_ns\":%.1f,\"replace_ns\":%.1f,"
	       "\"drop_and_set_ns\":%.1f,\"takeover_ns\":%.1f,\"bytes\":%.2f}\n",
	       (unsigned long long)slot_count, append, look_up, replace, again, takeover, bytes);
	return 0;
}
