/* SPDX-License-Identifier: MIT */
/*
 * evict — move one batch of pages out of a client and store them.
 */
#ifndef VSWAP_EVICT_H
#define VSWAP_EVICT_H

#include "client.h"
#include "codec.h"

#define EVICTOR_TURN_NS 50000000ULL /* at one group or request: clients that answer slowly cost others no more than this */

/* Scratch of one evicting thread. */
struct evictor {
	uint8_t *buffer; /* a window's pages */
	uint8_t *object; /* one compressed page */
	struct codec_scratch *codec;
};

int evictor_create(struct evictor *ret_evictor);
void evictor_destroy(struct evictor *evictor);

/* How a page was stored: anew; by its kept copy, which was equal; by a forked relative's copy. */
enum evict_stored { EVICT_STORED, EVICT_REUSED, EVICT_SHARED };

/*
 * What the slot of a page with these bytes is to be. `before`: a kept copy, taken again when it is equal
 * (EVICT_REUSED). EVICT_STORED otherwise; or as pool_store: there is no room for an object now.
 */
int evict_store_page(struct client *client, struct evictor *evictor, const void *page, struct slot before,
		     struct slot *ret_slot);

struct evict_result {
	unsigned pages;   /* moved out */
	unsigned busy;    /* refused by MOVE: pinned, or shared after fork */
	unsigned untouched; /* zero pages unmapped, or gone meanwhile; or not tried, as an event was unread */
	bool wrapped;     /* the hand came to the end of the address space */
	bool event_unread; /* some were not tried: they are the next again. Then the others count with -EAGAIN, too */
};

/*
 * Evict up to BATCH_PAGES_MAX resident pages. `desperate`: from client->hand on, and also pages that were
 * filled a moment ago. Returns 0 and what happened; -EAGAIN when an event is unread or no
 * window is free; -EPIPE when the agent is gone; -ESRCH when the client is.
 */
int evict_batch(struct client *client, struct evictor *evictor, bool desperate,
		struct evict_result *ret_result);

/* Finish the batch that is parked, if its MOVE was answered. True when something was done. */
bool evict_resume(struct client *client, struct evictor *evictor);

/* Pages that are staged for good because staging cannot be read any more: their bytes are lost, and a
 * forked relative must not take them for untouched. Poison them. The gate is held. */
void evict_abandon(struct client *client);

/*
 * In a successor, for a client that is recovering. Batches: what is in which place; the gate is held, and
 * no MOVE is under way. Gives the windows that are not free (a mask), which nobody else touches; none, and
 * eviction has ended, when staging cannot be looked at. Store: those that have pages in staging, as
 * evict_batch would have, and take them out of the mask; the gate is not held. Release: all others, once the
 * agent has answered whatever was posted before.
 */
void evict_recover_batches(struct client *client, unsigned *ret_windows);
void evict_recover_store(struct client *client, struct evictor *evictor, unsigned *windows);
void evict_recover_release(struct client *client, unsigned windows);

/* Free the copies, KEPT_POOL or KEPT_SPILL, of about `pages` resident pages, from where the last call ended. Returns pages whose
 * copy was dropped: 0 when there is none. Takes the gate. */
unsigned evict_drop_kept(struct client *client, enum slot_tag kept, unsigned pages);

#endif
