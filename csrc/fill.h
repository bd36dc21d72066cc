/* SPDX-License-Identifier: MIT */
/*
 * fill — give pages back to a client. The gate is held by the caller throughout.
 */
#ifndef VSWAP_FILL_H
#define VSWAP_FILL_H

#include "client.h"

#define FILL_READ_BYTES_MAX (FILL_PAGES_MAX * PAGE_BYTES + 2 * PAGE_BYTES)
#define READ_BUFFER_BYTES (1UL << 20)
#define READ_HEADER_BYTES (2 * PAGE_BYTES) /* what is known of a read lies before its buffer */
#define READ_BLOCK_BYTES (READ_HEADER_BYTES + READ_BUFFER_BYTES)

/* Extents of one backend, pinned, that are read at once. With only that filled in: none. */
struct fill_span {
	struct spill *spill;
	unsigned backend;
	uint64_t start_bytes, end_bytes; /* in the backend, aligned as a read has to be */
	uint64_t last_location;
};

/* One more, if it lies on the backend, not before the last and not further behind it than that. */
bool fill_span_add(struct fill_span *span, struct slot copy, uint64_t gap_bytes_max);

/* The page of a slot: 0; 1 when its backing is not in memory (SPILL) or it has none; or -errno. */
int fill_expand(struct client *client, struct slot slot, void *page);
/* The page of an object in memory: 0, -EBADMSG or -ENOMEM. */
int fill_expand_object(struct client *client, const void *object, struct slot slot, void *page);
/* The page of a SPILL slot, of which a span was read into `bytes`: as fill_expand_object. */
int fill_expand_read(struct client *client, const struct fill_span *span, const uint8_t *bytes, struct slot slot,
		     void *page);

enum fill_result {
	FILL_ANSWERED, /* the fault is answered, or needs no answer any more */
	FILL_PENDING,  /* a read from a backend is on its way, or an open run */
	FILL_DEFER,    /* no room, or an event is unread: try again later */
};

/* Pages that one COPY gives back: their slots, and whether the copies behind them are kept if there are any. */
struct fill_run {
	unsigned count;
	struct slot words[FILL_PAGES_MAX];
	bool keep[FILL_PAGES_MAX];
};

/* A run that is expanded with the gate open (fill_open.c). The client lists it; it is its fault thread's. */
struct fill_open {
	struct fill_open *next;
	struct fault fault;
	struct fill_run run; /* count 0: there is none */
	uint8_t *pages;      /* the block that was the scratch's: what is expanded, and behind that objects */
	unsigned window, expanded;
	int error;           /* why not more of it */
	bool is_awaited;     /* others have faulted on its pages */
};

/* Of a fault thread while it serves a client. */
struct fill_scratch {
	uint8_t *pages; /* a block of FILL_PAGES_MAX pages; NULL: taken when it is needed */
	struct fill_open open; /* begun by one of the faults */
};

enum fill_result fill_fault(struct client *client, struct fill_scratch *scratch,
			    const struct fault *fault);

/* Answer the faults whose reads have completed. */
void fill_reap_reads(struct client *client, struct fill_scratch *scratch);

/* Of a client that is dead: take what has completed. True when nothing is in flight any more. */
bool fill_drop_reads(struct client *client);

/* Whether a read or an open run for a page of [first, end) is under way. */
bool fill_is_under_way(const struct client *client, uint64_t first_page, uint64_t end_page);

/* The open run that a fault has left in the scratch: expand it, without the gate, and give it back, with the gate, which is not
 * shut and without a fork under way, or the client is dead. */
void fill_open_expand(struct client *client, struct fill_open *open);
void fill_open_finish(struct client *client, struct fill_open *open);

/* Not now: with the other faults that wait. */
void fill_defer(struct client *client, const struct fault *fault);

/* Whether nothing but what is under way is charged and not there (of a client that lives). For test builds. */
bool fill_is_charged_right(const struct client *client);

/* Forget reads that will not be delivered; none may be in flight. */
void fill_free_reads(struct client *client);

#endif
