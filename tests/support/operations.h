/* SPDX-License-Identifier: MIT */
/*
 * operations.h — what the rows of the operation table are made of.
 *
 * A row maps memory of known content, has it put into the backing under test, does its operation, and
 * checks every byte against what Linux promises. It knows nothing of vswapd: paging out is a request that
 * natively does nothing.
 *
 * Content    a function of (area, page, version), of the kind that the backing wants. Version 0 is what an
 *            area is made with; a row that writes uses another one.
 * Failure    must() and everything built on it write one line and end the process, a forked child as well;
 *            who waits for it finds the status.
 */
#ifndef OPERATIONS_H
#define OPERATIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096UL
#define PART 80UL         /* above the smallest region that is managed (64), and no multiple of a cluster */
#define AREA_PAGES (3 * PART)
#define HALF (AREA_PAGES / 2)

/* ---- rows ---- */

#define ROW_OWN 1u  /* leaves its process changed: gets one of its own */
#define ROW_CALM 2u /* not while pages go out at any time: wants one in memory, or unmanaged, for a moment */
#define ROW_BOTH (ROW_OWN | ROW_CALM)

struct row {
	const char *name;
	void (*run)(void);
	unsigned flags;
};

/* One table for each file, ended by a row without a name. */
extern const struct row fork_rows[], map_rows[], advice_rows[], lock_rows[], io_rows[], process_rows[],
	userfaultfd_rows[];

__attribute__((format(printf, 2, 3))) void must(bool condition, const char *format, ...);
/* condition, with errno in the message */
void must_call(bool condition, const char *call);

/* ---- memory ---- */

struct area {
	uint8_t *at;
	size_t pages;
	uint64_t seed;
};

/* Mapped between inaccessible neighbours, filled with version 0, and in the backing under test. */
struct area area_make(size_t pages);
/* The same without the last step. */
struct area area_make_resident(size_t pages);
/* Only mapped: reads as zeros. */
struct area area_map(size_t pages);
/* The mapping is gone afterwards, the neighbours stay: it is a short-lived program. */
void area_free(const struct area *area);
uint8_t *area_page(const struct area *area, size_t page);

void area_write(const struct area *area, size_t first, size_t count, unsigned version);
/* What area_write would write to page `page`; 4096 bytes. */
void area_content(const struct area *area, size_t page, unsigned version, void *ret_bytes);
/* Every byte of these pages; `when` goes into the message. */
void area_check(const struct area *area, size_t first, size_t count, unsigned version, const char *when);
/* The same, against memory at another place. */
void area_check_at(const struct area *area, size_t first, size_t count, unsigned version,
		   const void *memory, const char *when);
void check_zeros(const void *memory, size_t pages, const char *when);

/* ---- paging out ---- */

/* Whether a daemon manages this process: else the table is run natively. */
bool is_managed(void);
/* Pages that are in the page tables, by /proc/self/pagemap. */
size_t pages_present(const void *memory, size_t pages);
/* Ask until all of them are out. */
void page_out(const void *memory, size_t pages);
/* Ask once, for the whole process: what cannot go, stays. */
void page_out_try(void);
/* Into the backing under test. */
void bring_out(const void *memory, size_t pages);
/* For rows that give up what it takes: open the connection and the pagemap now. */
void page_out_prepare(void);
/* For one that has closed them: open them at the next need. */
void page_out_anew(void);

/* ---- processes ---- */

/* Wait for a child and want this exit status. */
void wait_for(pid_t pid, int status, const char *who);
/* End a child: what it checked was right. */
_Noreturn void child_done(void);
/* A pair of processes in step: token_send in one, token_wait in the other. */
struct token {
	int fds[2];
};
struct token token_make(void);
void token_send(const struct token *token);
void token_wait(const struct token *token);

/* Path of this program. */
extern const char *program_path;

#endif
