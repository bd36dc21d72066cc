/* SPDX-License-Identifier: MIT */
/*
 * fill — give pages back to a client. The gate is held by the caller throughout.
 */
#ifndef VSWAP_FILL_H
#define VSWAP_FILL_H

#include "client.h"

enum fill_result {
	FILL_ANSWERED, /* the fault is answered, or needs no answer any more */
	FILL_PENDING,  /* a read from a backend is on its way */
	FILL_DEFER,    /* no room, or an event is unread: try again later */
};

/* Scratch of one fault thread. */
struct fill_scratch {
	uint8_t *pages; /* FILL_PAGES_MAX pages */
};

enum fill_result fill_fault(struct client *client, struct fill_scratch *scratch,
			    const struct fault *fault);

/* Answer the faults whose reads have completed. */
void fill_reap_reads(struct client *client, struct fill_scratch *scratch);

/* Of a client that is dead: take what has completed. True when nothing is in flight any more. */
bool fill_drop_reads(struct client *client);

/* Forget reads that will not be delivered; none may be in flight. */
void fill_free_reads(struct client *client);

#endif
