/* SPDX-License-Identifier: MIT */
/*
 * near_and_far — a client with memory that needs a backend, and memory that does not.
 *
 *   near_and_far NEAR_MIB FAR_MIB
 *
 * Near pages hold one word each: wherever they are, they are not on a backend. Far pages hold noise. Prints "ready",
 * then does what it reads, a line each, and says what it found: "near", "far": all of it is read; "fresh": that much
 * new noise is written, as much as far, and read. A far reading is done by a thread of its own, so that a near one
 * can be asked for while it waits. The answer is the word, the pages that were wrong, and those that were lost
 * (SIGBUS). Ends with its input.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096UL
#define MIB_PAGES 256

struct area {
	const char *name;
	uint8_t *bytes;
	size_t pages;
};

static struct area near_area = { "near", NULL, 0 }, far_area = { "far", NULL, 0 }, fresh_area = { "fresh", NULL, 0 };
static __thread sigjmp_buf lost;

static void on_bus_error(int number)
{
	(void)number;
	siglongjmp(lost, 1);
}

static void content(const struct area *area, uint64_t *words, size_t page)
{
	uint64_t key = (page + 1) * 0x9E3779B97F4A7C15ULL;

	for (size_t i = 0; i < PAGE / 8; i++) {
		if (area != &near_area) {
			key ^= key << 13;
			key ^= key >> 7;
			key ^= key << 17;
		}
		words[i] = key;
	}
}

static void fill(struct area *area, size_t mib)
{
	area->pages = mib * MIB_PAGES;
	area->bytes = mmap(NULL, area->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (area->bytes == MAP_FAILED)
		exit(6);
	for (size_t i = 0; i < area->pages; i++)
		content(area, (uint64_t *)(area->bytes + i * PAGE), i);
}

static void *read_all(void *argument)
{
	const struct area *area = argument;
	volatile size_t wrong_pages = 0, lost_pages = 0;
	uint64_t want[PAGE / 8];

	for (volatile size_t i = 0; i < area->pages; i++) {
		content(area, want, i);
		if (sigsetjmp(lost, 1))
			lost_pages++;
		else if (memcmp(want, area->bytes + i * PAGE, PAGE) != 0)
			wrong_pages++;
	}
	printf("%s %zu %zu\n", area->name, wrong_pages, lost_pages);
	fflush(stdout);
	return NULL;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_bus_error, .sa_flags = SA_NODEFER };
	char line[32];
	pthread_t thread;

	if (argc != 3)
		return 2;
	sigaction(SIGBUS, &action, NULL);
	fill(&near_area, strtoul(argv[1], NULL, 0));
	fill(&far_area, strtoul(argv[2], NULL, 0));
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		if (strcmp(line, "near\n") == 0) {
			read_all(&near_area);
		} else if (strcmp(line, "fresh\n") == 0) {
			fill(&fresh_area, far_area.pages / MIB_PAGES);
			read_all(&fresh_area);
		} else if (pthread_create(&thread, NULL, read_all, &far_area) == 0) {
			pthread_detach(thread);
		}
	}
	return 0;
}
