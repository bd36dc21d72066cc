/* SPDX-License-Identifier: MIT */
/* access — a working set, what is done to its pages one by one, how long each took, and the line that says so. */
#ifndef BENCH_ACCESS_H
#define BENCH_ACCESS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/resource.h>

#include "content.h"
#include "latency.h"
#include "pattern.h"

/* What a process measured; in shared memory where others report it. */
struct result {
	struct latency latency;
	uint64_t accesses, ns, wrong;
};

enum action { READ, REWRITE, UPDATE, VERIFY };

struct phase {
	const char *name;
	enum pattern_kind pattern;
	enum action action;
};

extern uint64_t page_count;
extern uint64_t *memory; /* page p is at memory + p * PAGE_WORDS */
extern uint64_t wrong_total;

/* "workloads: WHAT: errno's text", status 1 */
_Noreturn void fail(const char *what);
uint64_t now_ns(void);
void *map(uint64_t bytes, int sharing);

/* Before anything else. */
void access_init(const struct content_options *content);
void map_working_set(void);

/* Whether the page was what it must be; a write does not look. */
bool access_page(enum action action, uint64_t page);
void note_wrong(struct result *result, uint64_t page);

/* Status 2 when there is none. */
const struct phase *phase_named(const char *name);
void run_phase(const struct phase *phase, uint64_t percent, struct result *result);

void get_usage(int whose, struct rusage *usage);
void print_result(const char *name, const struct result *result, const struct rusage *from, const struct rusage *to);

#endif
