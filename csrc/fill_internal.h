/* SPDX-License-Identifier: MIT */
/*
 * fill_internal — what the parts of fill share: fill.c answers from memory, fill_open.c too, for long runs, fill_read.c from
 * backends. The gate is held by the caller throughout.
 */
#ifndef VSWAP_FILL_INTERNAL_H
#define VSWAP_FILL_INTERNAL_H

#include "fill.h"

#define FILL_ZERO_GAP_PAGES 8 /* more of them between others are cheaper by themselves */

/* The object behind a word: the word itself, or what an INDIRECT one names. */
struct slot fill_copy_of(struct client *client, struct slot word);

/* Charge as many of `want` pages from `page` on as there is room for, at least 1; 0 when there is none. */
unsigned fill_charge_some(struct client *client, uint64_t page, unsigned want);
void fill_uncharge(struct client *client, uint64_t pages);

/* Nothing will tell when: after a moment. */
enum fill_result fill_try_again(struct client *client);
/* The page's bytes are lost: whoever touches it gets SIGBUS. */
enum fill_result fill_poison(struct client *client, uint64_t page, struct slot slot, int cause);

/* Pages that come back may go on probation (order.h): whether those of a run of `window` pages do. */
bool fill_goes_on_probation(struct client *client, const struct fault *fault, unsigned window);

/*
 * COPY the expanded pages of a run to `page` and settle those that arrived; charged pages that did not are given back.
 * Returns how many arrived; for none what *ret_outcome means for the fault is said by fill_unfilled.
 */
uint64_t fill_copy_run(struct client *client, const uint8_t *pages, uint64_t page, const struct fill_run *run,
		       bool on_probation, enum fill_outcome *ret_outcome);
enum fill_result fill_unfilled(struct client *client, enum fill_outcome outcome, uint64_t page);

/* The same for a run that begins with the page that faulted, all of it from memory; which copies are kept is decided here. */
enum fill_result fill_give_back(struct client *client, const struct fault *fault, const uint8_t *pages, struct fill_run *run,
				bool on_probation);

/* The stream of the fault that is being answered goes on behind this page. */
void fill_stream_ends(struct client *client, const struct fault *fault, uint64_t end_page);

/* It was answered, and its page had this tag. */
void fill_note_answered(struct client *client, const struct fault *fault, enum slot_tag tag);

/* fill_open.c: have the run of a stream expanded with the gate open. False: it is too short for that, or of another kind. */
bool fill_open_begin(struct client *client, struct fill_scratch *scratch, const struct fault *fault, struct slot first,
		     unsigned window);
/* Is the page of an open run? Then the fault waits for that. */
bool fill_waits_for_open(struct client *client, uint64_t page);
bool fill_is_open(const struct client *client, uint64_t first_page, uint64_t end_page);
uint64_t fill_open_pages(const struct client *client);

/* fill_read.c: `word` names an extent. `window` 1: a lone fault. */
enum fill_result fill_from_spill(struct client *client, const struct fault *fault, struct slot word, unsigned window);

#endif
