/* SPDX-License-Identifier: MIT */
/*
 * state — what outlives a daemon: the layout of the state memfd.
 *
 * Everything here is named by offset or number, never by pointer, so that a successor can map it
 * anywhere. Only this and the objects are truth; free lists, streams and budgets are rebuilt
 * (recover.c). A daemon that is killed stops between two stores, and all stores before are seen by
 * its successor: so the order of stores is the crash order, and nothing needs a flush.
 *
 * Layout      superblock, groups, backends, clients | checkpoints | slot space (slot_table.h)
 * Crash order phases    a record is FORMING until all that is in it is true, and DEAD before anything
 *                       it names is closed or freed
 *             messages  read(2) targets record->messages, whose `event` fields were cleared before; so
 *                       what was read is seen even when the daemon dies inside read. The checkpoint
 *                       says how many of them are applied; the others are applied again, each as a
 *                       sequence of steps (checkpoint.h)
 *             batches   a batch is INTENT (pages and what they were) before its MOVE is posted; STAGED
 *                       once the MOVE was verified; RELEASING when every slot is settled; then FREE.
 *                       After a death in INTENT a page that is resident was not moved; every other page of
 *                       INTENT and STAGED has its bytes in the client's staging.
 *             epoch     one more for each daemon; goes to every ring.
 *             lineages  spill.h. The keys of sealed backends are here alone: not in a core dump, and gone with the
 *                       memfd.
 */
#ifndef VSWAP_STATE_H
#define VSWAP_STATE_H

#include <linux/userfaultfd.h>
#include <stddef.h>
#include <stdint.h>

#include "codec.h"
#include "counters.h"
#include "engine.h"
#include "limits.h"
#include "range_set.h"
#include "slot_table.h"
#include "spill.h"
#include "wire.h"

#define STATE_MAGIC 0x3154535057535600ULL
#define STATE_VERSION 10

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

/* Slots of a mapping that was moved to an address which is not vacated yet (remap.h). */
struct waiting_remap {
	uint64_t to, bytes;
	uint64_t limbo_page;
	uint64_t region_bytes, protection;
};

/* What is known of a client's address space: one of two, written whole, then switched to (checkpoint.h). */
struct checkpoint {
	uint32_t region_count, armed_count, quarantine_count, remap_count;
	uint32_t applied;  /* messages whose effects are in here and in the slot table */
	uint32_t flags;    /* CHECKPOINT_* */
	struct waiting_remap remaps[REMAPS_MAX];
	struct range ranges[CHECKPOINT_RANGES_MAX]; /* regions, armed, quarantine, one behind the other */
};

#define CHECKPOINT_REGISTERED 1u
#define CHECKPOINT_PSS 2u
#define CHECKPOINT_TOO_MANY 4u /* ranges did not fit: regions are to be discovered again */

/* Slots that are being moved by the step of that number: until it is finished, some are in both places. */
struct slot_move {
	uint64_t from_page, to_page, pages;
	uint64_t step;
};

enum client_phase {
	CLIENT_UNUSED,
	CLIENT_FORMING, /* nothing depends on it */
	CLIENT_ARMING,  /* its descriptors are here; to be armed (again) */
	CLIENT_LIVE,
	CLIENT_DEAD,    /* what it names may be closed and freed */
};

/* What a region (region.h) has instead of a process. */
struct region_record {
	uint32_t mode;       /* permission bits */
	uint32_t uid, gid;
	uint32_t is_unlinked; /* to be freed by a successor */
	uint32_t is_damaged;  /* not even poison found room: all of it is unreadable */
	uint64_t size_bytes;
	int64_t modified_ns;
	char name[ENGINE_REGION_NAME_BYTES];
};

struct client_record {
	uint32_t phase; /* enum client_phase */
	int32_t pid;
	uint64_t token;
	int32_t group;
	int32_t events_fd, trash_fd, ring_fd;
	int32_t socket_fd; /* the agent's connection, -1: not known */
	uint32_t uid;
	uint64_t started; /* sys_process_start: the number may be another's by now */
	uint64_t checkpoint_version; /* the lowest bit says which of its two checkpoints counts */
	uint64_t step;               /* version of the checkpoint << 16 | step of the message begun last */
	struct slot_move move;
	uint64_t arena, arena_bytes, beacon;
	uint64_t staging[VSWAP_PROTECTIONS];
	uint64_t trash[VSWAP_PROTECTIONS];
	struct slot_map map;
	struct region_record region;
	struct uffd_msg messages[MESSAGES_MAX]; /* those that were read come first; event 0 ends them */
	struct batch_record batches[VSWAP_WINDOWS];
};

struct group_record {
	uint32_t used;
	uint32_t flags;
	uint64_t limit_bytes, pool_limit_bytes, spill_limit_bytes;
	char name[32];
	int32_t session_fd; /* the connection it belongs to, -1: none */
	uint32_t reserved;
	char label[ENGINE_LABEL_BYTES]; /* the control plane's own */
	uint64_t usage_bytes_max, swapped_pages_max, faults;
};

struct backend_record {
	uint32_t used;
	int32_t fd;
	int32_t priority;
	uint32_t flags; /* ENGINE_BACKEND_* */
	uint64_t size_bytes;
	uint64_t rate_bytes;
	char path[256];
	struct spill_lineage lineage; /* wiped when it is used no more */
};

struct state {
	uint64_t magic;
	uint32_t version;
	uint32_t epoch;
	uint64_t token_next;
	uint8_t secret[CODEC_SECRET_BYTES];
	struct engine_counters counters;
	uint64_t latency_ns_sum[ENGINE_BACKING_COUNT];
	uint64_t latency[ENGINE_BACKING_COUNT][ENGINE_LATENCY_BUCKETS];
	struct group_record groups[GROUPS_MAX];
	struct backend_record backends[BACKENDS_MAX];
	struct client_record clients[CLIENTS_MAX];
};

#define STATE_BYTES (1ULL << 37) /* address space, sparse */
#define STATE_CHECKPOINTS (STATE_BYTES / 8)
#define STATE_SLOTS (STATE_BYTES / 2)

static inline struct checkpoint *state_checkpoints(struct state *state, unsigned client)
{
	return (struct checkpoint *)((char *)state + STATE_CHECKPOINTS) + client * 2;
}

static_assert(VSWAP_WINDOW_PAGES == BATCH_PAGES_MAX, "one batch fills one window");
static_assert(sizeof(struct state) == 86122688 && offsetof(struct state, groups) == 3224 &&
	      offsetof(struct state, backends) == 363672 && offsetof(struct state, clients) == 368832,
	      "another layout is another STATE_VERSION: a daemon must not take over what it reads differently");
static_assert(sizeof(struct state) < STATE_CHECKPOINTS, "records come before the checkpoints");
static_assert(sizeof(struct checkpoint) % PAGE_BYTES == 0, "each can be given back alone");
static_assert(STATE_CHECKPOINTS + CLIENTS_MAX * 2 * sizeof(struct checkpoint) <= STATE_SLOTS,
	      "checkpoints come before the slot space");

#endif
