/* SPDX-License-Identifier: MIT */
/*
 * state — what outlives a daemon: the layout of the state memfd.
 *
 * Everything here is named by offset or number, never by pointer, so that a successor can map it
 * anywhere. Only this and the objects are truth; free lists, regions, streams and budgets are rebuilt.
 *
 * Layout      superblock | client records | slot space (slot_table.h)
 * Crash order messages  read(2) targets record->messages; message_count is set after the read and
 *                       cleared when the effects of all of them are in the slot table. Replay is
 *                       idempotent.
 *             batches   a batch is INTENT (pages and what they were) before its MOVE is posted; STAGED
 *                       once the MOVE was verified; RELEASING when every slot is settled; then FREE.
 *                       After a death in INTENT a page that is resident was not moved; every other page of
 *                       INTENT and STAGED has its bytes in the client's staging.
 *             epoch     one more for each daemon; goes to every ring.
 */
#ifndef VSWAP_STATE_H
#define VSWAP_STATE_H

#include <linux/userfaultfd.h>
#include <stdint.h>

#include "codec.h"
#include "limits.h"
#include "slot_table.h"
#include "wire.h"

#define STATE_MAGIC 0x3154535057535600ULL
#define STATE_VERSION 1

enum batch_phase { BATCH_FREE, BATCH_INTENT, BATCH_STAGED, BATCH_RELEASING };

#define BATCH_PAGE_GONE UINT64_MAX /* unmapped, removed or given back meanwhile */

/* One window of a client's staging. */
struct batch_record {
	uint32_t phase;
	uint32_t protection;
	uint32_t page_count;
	uint32_t reserved;
	uint64_t pages[BATCH_PAGES_MAX];      /* page numbers; follow mremap; BATCH_PAGE_GONE */
	struct slot before[BATCH_PAGES_MAX];  /* NONE or KEPT_* */
};

struct client_record {
	uint32_t used;
	int32_t pid;
	uint64_t token;
	int32_t group;
	int32_t events_fd, trash_fd, ring_fd;
	uint64_t arena, arena_bytes, beacon;
	uint64_t staging[VSWAP_PROTECTIONS];
	uint64_t trash[VSWAP_PROTECTIONS];
	struct slot_map map;
	uint32_t message_count;
	uint32_t reserved;
	struct uffd_msg messages[MESSAGES_MAX];
	struct batch_record batches[VSWAP_WINDOWS];
};

struct state {
	uint64_t magic;
	uint32_t version;
	uint32_t epoch;
	uint64_t token_next;
	uint8_t secret[CODEC_SECRET_BYTES];
	struct client_record clients[CLIENTS_MAX];
};

#define STATE_BYTES (1ULL << 36) /* address space, sparse */

static_assert(VSWAP_WINDOW_PAGES == BATCH_PAGES_MAX, "one batch fills one window");
static_assert(sizeof(struct state) < STATE_BYTES / 16, "records leave room for the slot space");

#endif
