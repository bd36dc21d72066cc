/* SPDX-License-Identifier: MIT */
/*
 * client — one managed address space.
 *
 * The gate     One mutex. Whoever holds it may read the client's userfaultfd, fill its pages, have a
 *              MOVE of them executed, and change its slot map. All four exclude each other, which is
 *              what keeps three races of the kernel's interface away:
 *                late MOVE    an UNMAP read while a MOVE is in flight lets the address be reused
 *                late fill    a REMOVE read between a fill's decision and its COPY
 *                fill on MOVE ZEROPAGE of a run over a page that is being moved out
 *              It is held while waiting for the agent to answer a MOVE, never while waiting for
 *              anything else. An agent that is slow (its process stopped, or starved) does not hold
 *              an evictor: the batch is parked, the mutex released and the gate stays shut by
 *              `parked`, until the answer comes or the agent is proven dead. Never by a time-out.
 * Threads      worker_count fault threads (worker.c), which discover its mappings, too; evictors, writers and the
 *              recompressor come from outside.
 * Life         made by begin (or by a fork event), armed by arm, dead when its address
 *              space is gone; freed when dead and no thread holds a reference. Or made by a successor
 *              from the record it finds (recover.c): then `recovering`, and shut, until a thread of its
 *              own has finished what the daemon before had begun.
 * Quarantine   a range that madvise removed may not be evicted until its pages were populated again
 *              by a fill of ours, or until they are seen missing, or QUARANTINE_NS have passed:
 *              the event comes before the zap, and a MOVE in between would capture freed bytes.
 * Invariants   1 regions are a subset of armed, armed of what is registered with events_fd (but for
 *                events that are unread)
 *              2 a slot is STAGED exactly when a batch record names its page
 */
#ifndef VSWAP_CLIENT_H
#define VSWAP_CLIENT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "cold.h"
#include "engine.h"
#include "group.h"
#include "io.h"
#include "order.h"
#include "range_set.h"
#include "state.h"
#include "sys.h"
#include "wire.h"

#define QUARANTINE_NS 2000000000ULL
#define WORKERS_MAX 4
#define RECENT_FILLS 32
#define READS_MAX 32

struct engine;

struct fault {
	uint64_t page;
	uint64_t since_ns;
	uint32_t thread;
	bool write;
	bool synthetic; /* asked by pagein, nobody waits */
	bool alone;     /* a read of it and others failed: read nothing but it */
	bool is_protected; /* a write to a zero page (look.c) or a shared one (cow.c), and nothing is missing */
};

struct stream {
	uint32_t thread;
	uint32_t window;     /* pages to fill at the next hit, 0: unused entry */
	uint64_t next_page;
	uint64_t used;       /* for replacement */
};

/* Runtime half of a batch record. */
struct batch {
	const uint8_t *buffer; /* the evictor's copy of the window; valid once `copied` */
	uint64_t staged;       /* pages of the window not yet settled */
	bool copied;
	bool releasing;        /* RELEASE posted; free when the ring's done passes release_number */
	uint32_t release_number;
	uint32_t resident_pages; /* RAM the window holds: uncharged when released */
};

struct spill_read; /* fill.c: a read from a backend on its way */

/* What the agent touches at our command. */
struct populate_run {
	uint64_t first_page;
	uint32_t pages;
};

struct client {
	struct engine *engine;
	struct group *group;
	struct client_record *record;
	unsigned index;
	uint64_t number; /* of the clients ever made */
	int references; /* registry lock */
	pid_t pid;
	pid_t thread; /* look thread: one that lives on after the first has ended; 0: the first lives */
	int pidfd;

	pthread_mutex_t gate;
	pthread_rwlock_t region_lock; /* region.h */
	pthread_cond_t batches_changed; /* with the gate */
	bool serving;     /* fault threads run */
	bool registered;  /* regions are registered with events_fd */
	bool agent_gone;
	bool yielding; /* a thread gives up a range of it (yield.h) */
	bool leaving; /* it is being detached: nothing of it is evicted, nor counted. Changed with the gate */
	bool dead;
	bool stopping;    /* workers end */
	bool fork_pending; /* no new MOVE, no read, until nothing is staged */
	bool recovering;   /* the gate stays shut */
	bool resyncing;    /* pages that are present may have swapped slots (recover.c) */
	bool resync_held;  /* ... but first what the dead daemon had staged is stored */
	uint64_t resync_at; /* ... from this address on */
	struct parked_batch *parked; /* a MOVE its agent has not answered yet: the gate stays shut */
	bool wiped_unknown; /* a forked child: some of its slots may be of memory that was wiped */
	bool populating;   /* a POPULATE is in the ring: it may fault, so no MOVE behind it */
	uint32_t populate_number;
	struct populate_run populate_runs[VSWAP_RUNS_MAX]; /* BATCH_PAGES_MAX pages in all */
	unsigned populate_run_count;
	uint64_t populated_address; /* first page of the last POPULATE */

	int events_fd, trash_fd, ring_fd, wake_fd;
	int pagemap_fd, maps_fd, mem_fd; /* of one address space, whatever its process executes later */
	int statm_fd;
	struct address_space_name address_space; /* which one it is */
	struct vswap_ring *ring;
	uint32_t posted;
	struct batch batches[VSWAP_WINDOWS];

	struct range_set regions;    /* value: protection */
	struct range_set armed;      /* registered, until an UNMAP says otherwise */
	struct waiting_remap remaps[REMAPS_MAX];
	unsigned remap_count;
	uint64_t remap_changes;
	uint64_t checkpoint_changes; /* what the checkpoint that counts was made of */
	uint32_t checkpoint_applied, checkpoint_flags;
	uint64_t steps;              /* since then */
	struct range_set quarantine; /* value: sys_now_ns() of the event */
	uint32_t look_asked;         /* of its fault threads by the look thread (look.c) */
	uint64_t size_pages;         /* VmSize then */
	uint64_t size_pages_seen;    /* VmSize at the last discovery; 0: look again soon */
	uint64_t discover_next_ns;   /* a mapping can be replaced by another of its size */
	uint64_t discover_asked_ns;  /* not before, if the client asks for it */
	uint32_t discoveries;        /* as in its ring */
	uint64_t hand;               /* reclaim: next address to look at */
	uint64_t kept_pool_hand;     /* reclaim: next cluster of the index whose copies are given up, */
	uint64_t kept_spill_hand;    /* and the same for those on backends */
	struct probation probation;  /* reclaim: goes before what the hand finds */

	struct stream streams[STREAMS_MAX];
	uint64_t stream_clock;
	uint64_t recent[RECENT_FILLS]; /* pages that faulted last */
	unsigned recent_next;

	struct fault deferred[DEFERRED_MAX];
	unsigned deferred_count;
	bool retry_soon;  /* a fill was told EAGAIN */
	bool fork_waits;  /* an event cannot be read for want of a descriptor */
	bool waiting;     /* counted in group->waiting */

	struct io_queue *io;
	unsigned io_requests; /* of it, on their way */
	struct spill_read *reads[READS_MAX];
	struct fill_open *opens; /* runs that its fault threads expand (fill_open.c) */
	unsigned around_pages, around_reads, around_near; /* fill_read.c: read_around */

	uint32_t forgotten;     /* clusters of memory that is gone, on their way to be freed (slot_table.h) */
	unsigned freeing;       /* threads that free such */

	/* worker.c */
	unsigned worker_count;  /* fault threads, detached */
	uint32_t stand_by;      /* futex; 1: all but the first of them wait until it is 0 */
	unsigned fault_cpu;     /* where the thread that faults was seen last */
	unsigned fault_cpu_age; /* decisions since then */
	uint32_t fault_thread;  /* the last one */
	unsigned fault_count;   /* since it was decided who stands by */
	unsigned fault_changes; /* of those: by another thread than the one before */
	unsigned fault_reads_dense; /* reads that brought one less than AWAKE_NS after the one before */
	unsigned device_reads;  /* that were begun since it was decided who stands by */
	bool keeps_cpu;         /* the thread that faults hardly leaves its CPU: no stream is filled ahead for it, no device is waited for */
	uint64_t fault_ns;      /* the last read that brought one */

	struct cold_list cold;     /* clusters with objects in the pool */
	struct cold_list cold_raw; /* those of them that had incompressible ones */
	uint64_t relist_ns;        /* writers do not walk over its slots before (writeback.c) */

	uint64_t relative; /* token of the client that it was forked from, or that it forked last; 0: unknown */
	int64_t resident_pages;
	int64_t filling_pages; /* of these: charged, and perhaps not there yet */
	uint64_t zero_mapped_pages;  /* zero pages ever mapped: each may become a page unseen */
	uint64_t shared_next_ns;     /* how much of it is shared memory is not asked before; the look thread */
	int64_t growth_pages;        /* between the last two readings of Pss, and no fault told of it */
	/* cow.c */
	bool pss;           /* has, or had, forked relatives: resident is Pss */
	struct family *family; /* those of them that live; NULL: none, or nobody knows */
	uint64_t counted_with; /* token of its parent, since it was forked and until its Pss is read; 0: it counts itself */
	uint32_t forks;     /* of it, and its own */
	bool is_alone;      /* at the last reading nothing was shared */
	bool is_protecting; /* what was shared then is protected */
	uint64_t alone_since_ns; /* 0: it is not, or not yet seen */
	uint32_t alone_faults;   /* since then, of writes to what is still protected */
	int64_t copied_pages; /* let through since then */
	uint64_t pss_next_ns;
	uint64_t pss_alone_ns; /* instead, while next to nothing is shared, if that is later. The look thread's */
	uint64_t pss_cost_ns;    /* what the last reading took */
	uint64_t pss_round; /* the group's, of the last reading */
	int64_t pss_above_resident; /* pages, at the last reading or fork */
	int64_t shared_pages; /* about so many then */
	uint32_t pss_cost_factor; /* the next reading is so many times later than the last one took */
	uint64_t faults, evicted_pages;
	int64_t metadata_seen;
	int evict_error; /* errno that ended eviction of this client, 0: none */
};

/* ---- registry (engine's list of clients) ---- */

int client_create(struct engine *engine, pid_t pid, struct group *group, struct client **ret_client);
/* In a successor: a client for a record it found; as client_create, but nothing in the record changes. */
int client_adopt(struct engine *engine, unsigned index, struct client **ret_client);
/* One store: see enum client_phase. */
void client_set_phase(struct client *client, enum client_phase phase);
/* Whether some client has this userfaultfd. */
bool client_has_descriptor(struct engine *engine, int events_fd);
/* A file of memory: no process, no descriptors, no threads (region.h). */
static inline bool client_is_region(const struct client *client)
{
	return client->group->flags & ENGINE_GROUP_REGIONS;
}
/* The gate is shut: a MOVE may be under way, or what a dead daemon began is not finished. */
static inline bool client_is_shut(const struct client *client)
{
	return client->parked || client->recovering;
}
/* With a reference each; release with client_put. NULL when there is none. */
struct client *client_get(struct engine *engine, uint64_t token);
struct client *client_get_pid(struct engine *engine, pid_t pid);
struct client *client_get_index(struct engine *engine, unsigned index);
void client_put(struct client *client);

/* Take the gate. While one thread faults again and again (keeps_cpu), whoever waits tries for this long before it sleeps: to
 * wake it takes longer than the gate is mostly held, for those who open it, too. */
void client_lock_gate(struct client *client, uint64_t spin_ns);

/* Open /proc files and pidfd of client->pid. 0 or -errno: -EPERM when it is not to be trusted with what can be
 * read there, for it executes, or has just executed, another program. */
int client_open_proc(struct client *client);
int client_make_ring(struct client *client);
/* Whether the addresses that an agent sent are inside of its arena, and that of an address space. */
bool client_arena_is_sane(const struct engine_arena *arena);
void client_wake(struct client *client); /* its fault threads look at deferred faults */

/* What was in these pages is gone. Fast, however much it is: most of it is freed by client_free_forgotten. The gate is held. */
void client_forget_slots(struct client *client, uint64_t page, uint64_t pages);
/* Without the gate. */
void client_free_forgotten(struct client *client);

/* Its address space is gone: free all it held. Idempotent. */
void client_bury(struct client *client);

/* Its resident pages as they were seen, for itself and for its group, and by how much they grow unseen. What was charged
 * and is on its way, for many processes at once much, is counted with them. Any thread. */
void client_set_resident(struct client *client, int64_t pages, int64_t growth_pages);

/* Memory of the slot map changed: tell the group. Gate held. */
void client_metadata_changed(struct client *client);

/* Frees pool object or extent of a slot of this client; a slot_free_fn. */
void client_free_copy(void *client, struct slot slot);

/* The gate is held by the caller in all of the following. */

/* A page of a batch was unmapped, removed (page GONE) or moved by mremap; a slot_visit_fn each. */
void client_staged_gone(void *client, uint64_t page, struct slot slot);
void client_staged_moved(void *client, uint64_t page, struct slot slot);

/* Pages of this cluster went to the pool just now, incompressible ones maybe. */
void client_cold_push(struct client *client, uint64_t cluster_number, bool is_raw);
/* There is nothing of it to be written back. */
static inline bool client_is_warm(const struct client *client)
{
	return READ_ONCE(client->cold.count) == 0 && READ_ONCE(client->cold_raw.count) == 0;
}
/* Clients of a group that have something, with a reference each: those from this index on first. */
unsigned client_list_cold(struct engine *engine, const struct group *group, unsigned from, struct client **clients,
			  unsigned max);

/* Post a command. Returns its number. */
uint32_t client_post(struct client *client, const struct vswap_command *command);
/* The same in two steps: whoever is woken may have the CPU at once, and who waits for the gate waits for it, too. The
 * second needs no gate. */
uint32_t client_enqueue(struct client *client, const struct vswap_command *command);
void client_wake_agent(const struct client *client);
bool client_is_answered(const struct client *client, uint32_t number);
/* From now on command `number` is under way, which populates. `command` may lie in memory of the client's. */
void client_populates(struct client *client, uint32_t number, const struct vswap_command *command);
/* In a successor: a POPULATE of the daemon before may be under way, and others' RELEASEs behind it. It is over with all that
 * was posted. */
void client_may_populate(struct client *client);
/* Whether the agent is touching this page, or about to. */
bool client_is_populated(const struct client *client, uint64_t page);
/* Has the agent answered `number`? 0, -EPIPE when it is gone and never will, -ETIMEDOUT: not yet. */
int client_answer(const struct client *client, uint32_t number);
/* Wait until it has: as client_answer. */
int client_wait(struct client *client, uint32_t number, unsigned timeout_ms);
/* Settle windows whose RELEASE was answered. */
void client_reap_releases(struct client *client);

#endif
