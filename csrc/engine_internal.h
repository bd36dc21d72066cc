/* SPDX-License-Identifier: MIT */
/*
 * engine_internal — what the parts of the data plane share: the engine itself.
 *
 * Lock order (outermost first)
 *   client->region_lock
 *   client->gate      one at a time, but fork takes the child's inside the parent's
 *   registry lock     the tables of groups, clients, backends
 *   slot space share_lock, then its lock
 *   pool and spill mutexes
 *   event lock; region_scratch_lock; those of the block caches; the host's; that of the pageouts
 */
#ifndef VSWAP_ENGINE_INTERNAL_H
#define VSWAP_ENGINE_INTERNAL_H

#include <pthread.h>

#include "awake.h"
#include "block_cache.h"
#include "client.h"
#include "engine.h"
#include "host.h"
#include "members.h"
#include "pageout.h"
#include "spill.h"
#include "work.h"

#define EVICTORS_MAX 4
#define EVENTS_MAX 256

enum backend_state { BACKEND_ACTIVE, BACKEND_DRAINING, BACKEND_FAILED };

#define JOB_COMPACT_BACKGROUND 1000u /* of its writer, a moment at a time; not reported */

/*
 * An entry of the table is in use while `spill` is not NULL, and may be used by whoever
 *   - holds the registry lock (backends are removed under it), or
 *   - holds a live extent of it (a backend is removed when there is none), or
 *   - has pinned it (backend_pin): a removal waits for that. Reads and writes in flight are pins.
 */
struct backend {
	struct spill *spill;
	uint32_t pins;
	int32_t priority;
	bool is_device;
	char path[256];
	uint64_t errors; /* of writing */
	uint32_t state;  /* enum backend_state */
	struct writer *writer;     /* its thread (writeback.c); changed under the registry lock */
	uint64_t rate_bytes;       /* a second, of writeback to it; 0: as fast as it is */
	uint64_t write_next_ns;    /* ... so writers wait until then */
	bool lacks_room;           /* its file system has none */
	uint64_t room_look_ns;     /* ... which is asked for again then, by its writer */
	bool demotes;              /* tier.h: it is being brought down to its share; its writer's */
	uint64_t demote_from;      /* the segment where that goes on */
	uint64_t demote_next_ns;   /* ... and not before */
	uint32_t writing;          /* writes under way */
	uint64_t writing_since_ns; /* ... and when one began, or ended, last: a device that hangs is known by it */

	uint32_t job; /* enum engine_backend_job, or JOB_COMPACT_BACKGROUND; changed under the registry lock */
	bool job_cancelled, job_waiting; /* ended by request; for room */
	uint64_t job_since_ns, job_total_bytes, job_left_bytes;
};

struct engine {
	struct state *state;
	bool is_successor;
	int state_fd, pool_fd, device_fd;
	struct pool_space *pool_space;
	struct slot_space *slots;
	uint32_t cpu_count;
	int descriptors_end; /* new clients get none from here on: forked children may */

	pthread_mutex_t registry;
	struct group *groups[GROUPS_MAX];
	struct client *clients[CLIENTS_MAX];
	unsigned clients_end; /* highest index in use + 1 */
	struct backend backends[BACKENDS_MAX];
	unsigned backend_turn; /* the one that was written to last */

	bool stopping;
	struct awake awake;
	pthread_t evictors[EVICTORS_MAX], look_thread, recompressor_thread;
	unsigned evictor_count;
	/* Evictors look at all groups and requests, writers at all pools, look.c at all clients, the others at all there is. */
	struct work evicting, writing, looking, recompressing, pressing, counting;
	struct pageouts pageouts;
	/* members.h; the registry lock */
	pthread_t members_thread;
	uint64_t members_generation;
	pid_t members_noted[MEMBERS_NOTED_MAX]; /* that became clients since the look that is under way began */
	unsigned members_noted_count;
	struct host host;
	uint32_t recompress_age_ms; /* 0: never */
	bool tiering;               /* tier.h */
	struct ghosts waited_for;   /* on a backend, while there was a better one (tier.h); made when that is first switched on */
	uint32_t accept_percent;    /* of a pool's cap: what writeback brings it down to once it has begun */

	struct block_cache expand_blocks; /* FILL_PAGES_MAX pages each: fill_scratch */
	struct block_cache read_blocks;   /* READ_BLOCK_BYTES each: fill_read.c */

	struct region_scratch *region_scratch; /* those that no call uses */
	pthread_mutex_t region_scratch_lock;

	pthread_mutex_t event_lock;
	struct engine_event events[EVENTS_MAX];
	unsigned event_head, event_count;
	uint32_t events_dropped;
	int event_fd;
};

#define counter_add(engine, name, count) \
	__atomic_fetch_add(&(engine)->state->counters.name, (uint64_t)(count), __ATOMIC_RELAXED)

void engine_latency_add(struct engine *engine, enum engine_backing backing, uint64_t ns);
void engine_event_push(struct engine *engine, const struct engine_event *event);

/* NULL: there is none. The registry lock is held. */
struct group *group_at(const struct engine *engine, int group);
/* In a successor: a group for a record. 0 or -errno. */
int group_adopt(struct engine *engine, unsigned number);
/* In a successor: a backend for a record. */
int backend_adopt(struct engine *engine, unsigned number);
/* UFFDIO_API on both descriptors of a client (`events` false: the child's came out of its parent's, handshake
 * done; may_be_done: the daemon before may have), and its arena registered. 0 or -errno. */
int client_arm_descriptors(struct client *client, bool events, bool may_be_done);

/* The client's group is short of room. One evictor is enough for one thread that faults at random, until it falls behind. */
void engine_want_room(const struct client *client);
/* As fast as all programs together can fill memory. */
uint64_t engine_fill_bytes_per_ms(const struct engine *engine);
/* Hand the fault threads synthetic faults for swapped pages of the next clusters, once those of the last are answered; at
 * the end from the begin again. The gate is held. */
void engine_ask_for_pages(struct client *client, uint64_t *cursor);
/* The same for pages of [first, end) alone. */
void engine_ask_for_range(struct client *client, uint64_t *cursor, uint64_t first_page, uint64_t end_page);

/* Faults of this group that wait for room may try again. */
void engine_room_made(struct engine *engine, struct group *group);

/* backend.c */
/* The backend's spill, which stays until backend_unpin; NULL when there is no such backend (any more). */
struct spill *backend_pin(struct engine *engine, unsigned number);
void backend_install(struct engine *engine, unsigned number, const struct backend *backend);
void backend_unpin(struct engine *engine, unsigned number);
/* The backend to write to, pinned: of those with a free segment that do not hang the highest priority, in turn where
 * several have it. -ENOSPC when there is none. */
int backend_pick(struct engine *engine);
/* The same, of a lower priority than this one; and encrypted, if that is. */
int backend_pick_below(struct engine *engine, unsigned number);
/* Pin this one if it could be picked, now or in turn; else NULL. */
struct spill *backend_pin_to_write(struct engine *engine, unsigned number);
/* Write a segment that was filled for it: as spill_segment_write, with what the outcome says about the backend noted. */
int backend_write_segment(struct engine *engine, unsigned number, struct spill_segment *segment);
/* What can still be written to it: free segments, as far as the file system has blocks for them. */
uint64_t backend_room_bytes(const struct backend *backend, struct spill *spill);
/* Take a backend without live extents and without writers out of the table; erases and closes it. */
void backend_remove(struct engine *engine, unsigned number);

/* drain.c */
/* Compact a backend a little; false when there is nothing to gain. For its writer. */
bool drain_in_background(struct engine *engine, unsigned number);
/* Move what is in `segments` segments of it, from *from on, to backends of a lower priority; around at the end. For its
 * writer. False: nothing of that could be moved. */
bool drain_down(struct engine *engine, unsigned number, uint64_t *from, unsigned segments);

/* fault.c */
struct fill_scratch;
/* All that there is to do for a client: read, apply, answer. The gate is held, and not shut. */
void fault_serve(struct client *client, struct fill_scratch *scratch);
/* Messages in a record that were read by its daemon and not forgotten. */
uint32_t fault_message_count(const struct client_record *record);
/* In a successor: apply the events that were read and not applied. settle(context) is called before a fork:
 * nothing may be staged then. The gate is held. */
typedef void (*fault_settle_fn)(void *context);
void fault_replay(struct client *client, uint32_t applied, fault_settle_fn settle, void *context);
/* recover.c */
/* Before anything is opened: close what no record names. */
int recover_descriptors(const struct engine_config *config);
/* Groups, backends and clients from their records; before any thread runs. 0, or -errno: nothing can go on. */
int recover_engine(struct engine *engine);
/* Go on with resyncing a client, unless its mappings are changing. The gate is held. */
void recover_resync(struct client *client);
/* The threads that bring each client to where it was. */
void recover_start(struct engine *engine);
/* look.c */
void *look_thread_main(void *engine);
/* Find and register regions of a client now. Gate held. */
void look_discover(struct client *client);
/* What the look thread has asked for, if it has. The gate is held, and open. */
void look_serve(struct client *client);
/* The same, if it was seen to be gone. Without the gate. */
void look_serve_end(struct client *client);
/* The same for a client that has just come, if its group is near its limit. The gate is held. */
void look_at_new(struct client *client);
/* As adoption does it to a region. The gate is held. */
void look_protect_zero_pages(const struct client *client, uint64_t start, uint64_t end);
/* What was seen of it; a buried client has nothing. */
void look_set_resident(struct client *client, int64_t pages, int64_t growth_pages);
/* reclaim.c */
void *evictor_main(void *engine);
/* The pool is at its cap: have something leave it. True when eviction from this client may go on. */
bool reclaim_pool_has_room(struct engine *engine, struct group *group, struct client *client);
/* The end of a group that finds no room for OUT_OF_MEMORY_NS: SIGKILL to its largest member. */
#define OUT_OF_MEMORY_NS 3000000000ULL
void reclaim_kill_largest(struct engine *engine, struct group *group);
/* writeback.c */
/* A thread that waits for its backend. 0 or -errno. */
int writer_create(struct engine *engine, struct writer **ret_writer);
/* The backend is installed, or about to be: this is its writer. The registry lock is held, or nothing runs yet. */
void writer_begin(struct writer *writer, unsigned number);
/* Ends it; nobody has its backend pinned any more. No lock is held. NULL ok. */
void writer_destroy(struct writer *writer);
/* True when the group's pages may be written to some backend that has room. */
bool writeback_is_possible(struct engine *engine, const struct group *group);
/* recompress.c */
void *recompressor_main(void *engine);
/* Should the copy of a page that came back be given up? It is slow to expand, and needed often: LZ4 is to be next. */
bool recompress_is_regretted(const struct client *client, uint64_t page, struct slot copy);

#endif
