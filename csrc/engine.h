/* SPDX-License-Identifier: MIT */
/*
 * engine — the data plane as the control plane sees it. Read by gcc and, expanded by the
 * preprocessor, by cffi: declarations only.
 *
 * Glossary, outermost first
 *   group    processes that share one budget
 *   client   one managed process (one address space)
 *   region   one registered range of a client
 *   page     4 KiB of a client; "page" always means this
 *   slot     a virtual swap slot: the word that says where a page's bytes are
 *   backing  ZERO, SAME, POOL, SPILL or the client itself (RESIDENT; a copy may be kept)
 *   object   a compressed page in the pool; extent: an object's place in a spill segment
 *   backend  one spill file or block device; region: also a file of memory in the FUSE tree (engine_region_create)
 *   agent    the client's own thread that moves pages out; staging: where it moves them
 *
 * Threads    every function may be called from any thread; none calls back into the caller. Calls
 *            may block for milliseconds (locks, system calls), never on a client. The engine runs
 *            its own threads: fault threads, evictors, one look thread, one recompressor, one for the host,
 *            a writer a backend.
 * Errors     0 or a positive result, else -errno; outputs (ret_*) are untouched on failure.
 * Events     things the control plane should log or act on are queued; engine_event_fd becomes
 *            readable. The queue drops the newest when full and counts it.
 */
#ifndef VSWAP_ENGINE_H
#define VSWAP_ENGINE_H

#ifndef VSWAP_CFFI
#include <stdint.h>
#endif

#include "counters.h"

struct engine;

struct engine_config {
	uint64_t pool_capacity_bytes; /* address space of the pool memfd; 0: total RAM */
	uint32_t evictor_count;       /* 0: as many as CPUs, at most 4 */
	uint32_t recompress_age_ms;   /* pages out for so long are compressed again; 0: never */
	uint32_t accept_percent;      /* of a pool's cap: writeback that has begun goes on until there; 0: 100 */
	uint32_t io_threads;          /* 1: use pread/pwrite threads even where io_uring works */
	int32_t state_fd, pool_fd;    /* memfds that outlive the daemon (engine_make_memfds); 0: its own */
	const int32_t *keep_fds;      /* descriptors above 2 that a successor is not to close, besides */
	uint32_t keep_count;          /* those that the engine knows of */
};

/*
 * Make both memfds, empty, in a process that shares its descriptors with the daemons to come. The first
 * engine that is created with them fills them; one that finds them filled is its successor: it
 * closes all descriptors that it cannot name, and goes on with the groups, backends and clients it finds
 * (recover.c). 0 or -errno.
 */
int engine_make_memfds(int *ret_state_fd, int *ret_pool_fd);

/* Whether the state that the process `pid` has open as state_fd is one that this version goes on with: 0, -EPROTO,
 * or another -errno. */
int engine_check_state(int32_t pid, int state_fd);

/* 1 when the engine went on from what another had left. */
int engine_is_successor(struct engine *engine);

/* Make the state and start the threads; the calling thread and they get a higher priority where that is
 * allowed, since programs wait for them. Returns 0 or -errno; message (256 bytes) says why and what to do. */
int engine_create(const struct engine_config *config, struct engine **ret_engine, char *message);

/* Stop all threads, forget all clients (they must have ended), close everything. */
void engine_destroy(struct engine *engine);

/* /dev/userfaultfd, opened by engine_create; to be passed to agents. Owned by the engine. */
int engine_userfaultfd_device(struct engine *engine);

/* ---- groups ---- */

#define ENGINE_LABEL_BYTES 256

/* Flags of a group */
#define ENGINE_GROUP_TORTURE 1u  /* evict random runs of pages all the time, whatever the limit */
#define ENGINE_GROUP_NO_SPILL 2u /* never write this group's pages to a backend */
#define ENGINE_GROUP_REGIONS 4u  /* it has regions and no processes: all of the limit is for the pool */
#define ENGINE_GROUP_NO_RECOMPRESS 8u /* do not compress old pages again (recompress.c) */

/*
 * limit_bytes: resident + unmanaged + pool + metadata of the whole group; pool_limit_bytes: 0 for no limit of its
 * own. Returns the group's number (>= 0). Name: at most 31 characters, unique.
 */
int engine_group_create(struct engine *engine, const char *name, uint64_t limit_bytes,
			uint64_t pool_limit_bytes, uint32_t flags);
int engine_group_set_limit(struct engine *engine, int group, uint64_t limit_bytes,
			   uint64_t pool_limit_bytes);
/* Most that its clients may have on backends, 0: no limit. */
int engine_group_set_spill_limit(struct engine *engine, int group, uint64_t spill_limit_bytes);
/* Set and clear flags: NO_SPILL, NO_RECOMPRESS. */
int engine_group_set_flags(struct engine *engine, int group, uint32_t set, uint32_t clear);
int engine_group_find(struct engine *engine, const char *name); /* number or -ENOENT */
/* -EBUSY while it has clients, or objects of it are being written by a device that takes its time. */
int engine_group_destroy(struct engine *engine, int group);

/* For the control plane of a successor: a text of its own (NUL-terminated), and the descriptor of the
 * connection that the group belongs to, -1 for none. */
int engine_group_label(struct engine *engine, int group, const char *label, int session_fd);

/*
 * Charge to the budget what processes below `root` take that are no clients (too small, static), again and again from now on
 * (members.h); not those of `excluded`, nor what is below them. Copied. In a successor to be called again.
 */
int engine_group_set_members(struct engine *engine, int group, int32_t root, const int32_t *excluded, uint32_t count);
/* This process is about to become a client: it is no longer charged like that. Otherwise it would be counted twice until the
 * next look, which near the limit means needless eviction or worse. */
void engine_note_client(struct engine *engine, int32_t pid);

/* ---- backends ---- */

#define ENGINE_BACKEND_KEEP_BLOCKS 1u /* do not discard freed segments of a device */
#define ENGINE_BACKEND_ENCRYPT 2u     /* under a key of its own that is nowhere but in the state memfd */

/*
 * Use descriptor `fd` (ownership passes on success) as a spill backend. Higher priority first; backends of
 * equal priority are written to in turn. Returns the backend's number (>= 0), -EMFILE, or -ENOTSUP: libcrypto cannot encrypt it.
 */
int engine_backend_add(struct engine *engine, int fd, const char *path, uint64_t size_bytes,
		       int32_t priority, uint32_t flags, uint64_t rate_bytes);

/* Write back to it no more than so many bytes a second from now on; 0: no limit. -EINVAL: less than a segment. */
int engine_backend_set_rate(struct engine *engine, int backend, uint64_t rate_bytes);

/* Move pages between backends of different priority (csrc/tier.h), or no more, from now on; a new engine does not. */
void engine_set_tiering(struct engine *engine, int on);

struct engine_room {
	uint64_t live_bytes;    /* to be moved */
	uint64_t backend_bytes; /* room on other backends */
	uint64_t pool_bytes;    /* room for it in the pools, within the groups' limits */
};

/*
 * The backends of a set (bit n: number n) are about to be removed: nothing is written to them any more.
 * `force`: even when what they hold fits nowhere else now. Returns 0; -ENOENT; -EBUSY when one has a job;
 * -ENOSPC: nothing is changed. *ret_room is filled in unless -ENOENT. After 0 engine_backend_drain is
 * called for each.
 */
int engine_backend_drain_begin(struct engine *engine, uint32_t backends, int force,
			       struct engine_room *ret_room);

/*
 * Move everything off the backend while clients go on, then erase the file (or device), close it and
 * forget the backend: 0. Works in the calling thread; engine_backend_list says how far it is. `force`:
 * wait for room where there is none, else -ENOSPC. -ECANCELED; -EBADMSG when objects are left that cannot
 * be read back. On an error the backend is in use as before, and what was moved stays moved.
 */
int engine_backend_drain(struct engine *engine, int backend, int force);

/*
 * Rewrite sparse segments, so that their room can be used again and is given back to the file system.
 * Works in the calling thread. 0; -ENOENT, -EBUSY, -ECANCELED; -ENOSPC without a free segment to write to.
 */
int engine_backend_compact(struct engine *engine, int backend);

/* Segments begun from now on are written in the new order; what is stored stays where it is. -ENOENT. */
int engine_backend_set_priority(struct engine *engine, int backend, int32_t priority);

/* End the job of a backend soon; it returns -ECANCELED. -ENOENT when there is none. */
int engine_backend_cancel(struct engine *engine, int backend);

/* ---- the host ---- */

#define ENGINE_HOST_RESERVE_AUTO 0xffffffffffffffff

/* A memory cgroup: its directory, and its name among the `version`s (1, 2) in /proc/PID/cgroup. */
struct engine_cgroup {
	const char *directory;
	const char *path;
	uint32_t version;
};

/*
 * What is to stay available of the machine, and of these cgroups where they have a limit: below that groups are brought
 * below their limits (csrc/host.h). 0: never, which is how a new engine begins; AUTO: a small part of each. 0 or -ENOMEM.
 */
int engine_set_host_reserve(struct engine *engine, uint64_t reserve_bytes, const struct engine_cgroup *cgroups,
			    int count);

/* ---- clients: the handshake of wire.h, step by step ---- */

/*
 * A peer said HELLO NEW. Makes a client of `pid` in `group` and its ring. Returns 0, the client's
 * token and the ring's memfd (owned by the engine).
 */
int engine_client_begin(struct engine *engine, int32_t pid, int group, uint64_t *ret_token,
			int *ret_ring_fd);

/*
 * A peer said HELLO FORKED: `token` was made when its parent forked. Checks that `pid` is a process
 * that may be it. Also gives the child's userfaultfd (owned by the engine).
 */
int engine_client_begin_forked(struct engine *engine, int32_t pid, uint64_t token, int *ret_ring_fd,
			       int *ret_userfaultfd);

/* Where the agent keeps things; same meaning as struct vswap_arm. */
struct engine_arena {
	uint64_t arena;
	uint64_t arena_bytes;
	uint64_t beacon;
	uint64_t staging[2];
	uint64_t trash[2];
};

/*
 * The agent sent ARM. Takes over the descriptors in every case (events_fd is -1 for FORKED), does
 * the UFFDIO_API handshake, registers the arena, and starts serving. Afterwards the client is
 * managed: its regions are registered when its group comes near its limit. -ESRCH: its process has ended.
 */
int engine_client_arm(struct engine *engine, uint64_t token, const struct engine_arena *arena,
		      int events_fd, int trash_fd);

/* The agent's socket closed, or the handshake failed half-way. Frees the client when its address
 * space is gone; else it is served on without eviction until it ends. */
int engine_client_lost(struct engine *engine, uint64_t token);

/* For the control plane of a successor: the agent's connection, and the user it belongs to. */
int engine_client_label(struct engine *engine, uint64_t token, int socket_fd, uint32_t uid);

/* Evict all that can be evicted / bring everything back; wait until done or `timeout_ms` passed.
 * Returns 0, -ESRCH, -ETIMEDOUT, -ENOMEM (pagein: does not fit the group's limit). */
int engine_client_pageout(struct engine *engine, int32_t pid, int timeout_ms);
/* The same of `bytes` at `start` alone, and of what the last batch takes behind it. */
int engine_client_cool(struct engine *engine, int32_t pid, uint64_t start, uint64_t bytes);
int engine_client_pagein(struct engine *engine, int32_t pid, int timeout_ms);

/* Bring everything back, whatever the limit, and let the client go: its agent ends, and its process is as if it
 * had never been managed. 0; -ESRCH; -ETIMEDOUT; -EPIPE: it has no agent any more; -ENOSYS: its agent is of a
 * version that cannot. On an error it stays a client. */
int engine_client_detach(struct engine *engine, int32_t pid, int timeout_ms);

/* ---- regions: files of memory, each a page map without a process (region.h) ---- */

#define ENGINE_REGION_NAME_BYTES 256
#define ENGINE_REGION_BYTES_MAX 0x800000000000

struct engine_region {
	uint64_t number; /* unlike any other's, ever; 0: to be made */
	int32_t group;
	uint32_t mode; /* permission bits */
	uint32_t uid, gid;
	uint32_t is_unlinked;
	uint32_t is_damaged;
	uint64_t size_bytes;
	int64_t modified_ns; /* since 1970 */
	uint64_t same_pages, pool_pages, spill_pages, poisoned_pages;
	uint64_t metadata_bytes;
	char name[ENGINE_REGION_NAME_BYTES];
};

/* An empty one, in a group made with ENGINE_GROUP_REGIONS. -ENOENT: no such group; -EINVAL; -EMFILE: too many. */
int engine_region_create(struct engine *engine, const struct engine_region *region, uint64_t *ret_number);

/*
 * Bytes [offset, offset + bytes), which lie inside of the region (read: else fewer, down to 0; write: else it grows).
 * Reads return how many, or -EIO: what is there was lost. Writes return 0; -ENOSPC: the group has no room; then the pages
 * that were not stored are lost, since the page cache takes them for written. -ENOENT: no such region. Without a
 * buffer: all of them are to be.
 */
int engine_region_read(struct engine *engine, uint64_t number, uint64_t offset, void *buffer, uint32_t bytes);
int engine_region_write(struct engine *engine, uint64_t number, uint64_t offset, const void *buffer, uint32_t bytes);

/* What is beyond is freed, what is new is zero. 0, -ENOENT, -EFBIG, or as write. */
int engine_region_truncate(struct engine *engine, uint64_t number, uint64_t size_bytes);

int engine_region_change(struct engine *engine, uint64_t number, uint32_t mode, uint32_t gid, int64_t modified_ns);

/* Unlink: its name is free, a successor frees it. Destroy: free it now. */
int engine_region_unlink(struct engine *engine, uint64_t number);
int engine_region_destroy(struct engine *engine, uint64_t number);

int engine_region_get(struct engine *engine, uint64_t number, struct engine_region *ret_region);
/* Fill at most `max` records; returns how many there are. */
int engine_region_list(struct engine *engine, struct engine_region *records, int max);

/* ---- statistics ---- */

enum engine_backing {
	ENGINE_BACKING_ZERO,
	ENGINE_BACKING_SAME,
	ENGINE_BACKING_POOL,
	ENGINE_BACKING_SPILL,
	ENGINE_BACKING_STAGED,
	ENGINE_BACKING_COUNT
};

#define ENGINE_LATENCY_BUCKETS 64 /* bucket b counts faults of less than latency_bucket_us(b) */

struct engine_counters {
#define COUNTER_FIELD(name, meaning) uint64_t name;
	ENGINE_COUNTERS(COUNTER_FIELD)
};

struct engine_statistics {
	uint64_t virtual_pages;   /* pages that have a slot: swapped, or resident with a kept copy */
	uint64_t zero_pages;      /* swapped, by backing; pages shared by forked relatives count once per client */
	uint64_t same_pages;
	uint64_t pool_pages;
	uint64_t spill_pages;
	uint64_t staged_pages;    /* on their way out */
	uint64_t poisoned_pages;
	uint64_t kept_pages;      /* resident with a copy kept in pool or spill */
	uint64_t pool_bytes;      /* RAM of the pools, whole slabs */
	uint64_t pool_object_bytes;
	uint64_t spill_bytes;     /* live extents, all backends */
	uint64_t resident_bytes;  /* anonymous memory of all groups' members */
	uint64_t metadata_bytes;  /* slot table, indexes, slab and segment tables */
	uint32_t group_count;
	uint32_t client_count;
	uint32_t backend_count;
	uint32_t region_count;
	uint32_t events_dropped;
	uint32_t host_is_short;        /* 1: less than the reserve is available, or was seconds ago */
	uint64_t host_available_bytes; /* of the place that is nearest to its reserve, */
	uint64_t host_reserve_bytes;   /* and that */
	uint64_t host_shortages;       /* since this daemon started, as the next two */
	uint64_t host_reclaimed_pages; /* moved out of programs for that */
	uint64_t host_written_pages;   /* written back for that */
	struct engine_counters counters;
	uint64_t latency_ns_sum[ENGINE_BACKING_COUNT];
	uint64_t latency[ENGINE_BACKING_COUNT][ENGINE_LATENCY_BUCKETS];
};
int engine_statistics(struct engine *engine, struct engine_statistics *ret_statistics);

/* Upper bound of a latency bucket in microseconds (a geometric scale from 1 us). */
double engine_latency_bucket_us(int bucket);

struct engine_group_statistics {
	int32_t group;
	uint32_t flags;
	char name[32];
	uint64_t limit_bytes;
	uint64_t pool_limit_bytes;
	uint64_t spill_limit_bytes;
	uint64_t usage_bytes;      /* what the limit bounds: resident + unmanaged + pool + metadata */
	uint64_t usage_bytes_max;  /* highest usage seen */
	uint64_t resident_bytes;   /* of managed clients */
	uint64_t unmanaged_bytes;
	uint64_t pool_bytes;
	uint64_t metadata_bytes;
	uint64_t swapped_pages;
	uint64_t swapped_pages_max;
	uint64_t spill_bytes; /* live extents of its clients, kept copies included */
	/* Pages that have a slot; the sum of the following. Those that forked relatives share are in pool or spill. */
	uint64_t virtual_pages;
	uint64_t zero_pages, same_pages, pool_pages, spill_pages, shared_pages, staged_pages, poisoned_pages, kept_pages;
	uint32_t client_count;
	uint32_t managed_count; /* clients whose regions are registered */
	uint64_t faults;
	int32_t session_fd;     /* engine_group_label */
	char label[ENGINE_LABEL_BYTES];
};
/* Fill at most `max` records; returns how many there are. */
int engine_group_list(struct engine *engine, struct engine_group_statistics *records, int max);

struct engine_client_statistics {
	uint64_t token;
	int32_t pid;   /* 0: forked child that has not said hello yet */
	int32_t group;
	uint64_t resident_bytes;
	uint64_t swapped_pages;
	uint64_t zero_pages;
	uint64_t same_pages;
	uint64_t pool_pages;
	uint64_t spill_pages;
	uint64_t kept_pages;
	uint64_t metadata_bytes;
	uint64_t faults;
	uint64_t evicted_pages;
	uint32_t region_count;
	uint32_t registered; /* 1 when its regions are registered */
	uint32_t uid;        /* engine_client_label */
	int32_t socket_fd;
};
int engine_client_list(struct engine *engine, struct engine_client_statistics *records, int max);

#define ENGINE_BACKENDS_MAX 15

/* Pages that are out by where they are, and copies kept of pages that are resident. Backends by number. */
struct engine_client_tiers {
	uint64_t zero_pages;
	uint64_t same_pages;
	uint64_t pool_pages;
	uint64_t pool_kept_pages;
	uint64_t backend_pages[ENGINE_BACKENDS_MAX];
	uint64_t backend_kept_pages[ENGINE_BACKENDS_MAX];
};
/* Counted now: as long as there are many pages (slow). -ESRCH: no such client. */
int engine_client_tiers(struct engine *engine, uint64_t token, struct engine_client_tiers *ret_tiers);

enum engine_backend_job { ENGINE_JOB_NONE, ENGINE_JOB_DRAIN, ENGINE_JOB_COMPACT };

struct engine_backend_statistics {
	int32_t backend;
	int32_t priority;
	uint32_t state; /* 0 active, 1 draining, 2 failed */
	uint32_t is_device;
	char path[256];
	uint32_t is_encrypted;
	uint64_t size_bytes;
	uint64_t used_bytes;   /* segments in use, whole */
	uint64_t room_bytes;   /* what can still be written: less than the rest of the size when the disk is full */
	uint64_t live_bytes;   /* of used_bytes: in live extents */
	uint64_t sparse_bytes; /* of used_bytes: in segments that compaction would empty */
	uint64_t extent_count;
	uint64_t written_bytes;
	uint64_t read_bytes;
	uint64_t trimmed_bytes;
	uint64_t errors;
	uint64_t rate_bytes;   /* a second, of writeback; 0: no limit */
	uint64_t lacks_room;   /* 1: nothing is written to it, its file system is full */
	uint64_t writing_ms;   /* since a write that is under way began, 0: none is */
	uint32_t job;          /* enum engine_backend_job */
	uint32_t job_waiting;  /* 1: it waits for room */
	uint64_t job_ms;       /* since it began */
	uint64_t job_total_bytes;
	uint64_t job_left_bytes;
};
int engine_backend_list(struct engine *engine, struct engine_backend_statistics *records, int max);

/* ---- what a successor needs ---- */

/* Descriptors that the records name, for a service manager to keep in case the supervisor dies too. The same
 * number with another owner is another descriptor. */
struct engine_descriptor {
	int32_t fd;
	uint32_t reserved;
	uint64_t owner; /* token of the client; 0: the engine */
};
/* Fill at most `max` records; returns how many there are. */
int engine_descriptor_list(struct engine *engine, struct engine_descriptor *records, int max);

/* ---- events ---- */

enum engine_event_kind {
	ENGINE_EVENT_NONE,
	ENGINE_EVENT_OUT_OF_MEMORY, /* pid was killed; a = usage_bytes, b = limit_bytes, c = its resident bytes */
	ENGINE_EVENT_POISONED,      /* a page of pid was poisoned; a = address, b = -errno of the cause, c = tag of its slot */
	ENGINE_EVENT_CLIENT_GONE,   /* pid ended, all it held is freed; a = token */
	ENGINE_EVENT_CLIENT_ERROR,  /* pid: eviction stopped; a = -errno */
	ENGINE_EVENT_BACKEND_ERROR, /* a = backend, b = -errno */
	ENGINE_EVENT_REGISTERED,    /* pid's regions were registered; a = regions, b = bytes */
	ENGINE_EVENT_FORK_WAITS,    /* pid forks, and waits until its child can be taken over; a = -errno */
	ENGINE_EVENT_CHILD_REFUSED, /* a forked child of pid cannot be served; a = -errno, b = its PID: it was
				     * killed; 0: it was not found, and waits where it touches a page that is out */
	ENGINE_EVENT_YIELD_REFUSED, /* pid registers memory with a userfaultfd of its own, for which it has no room; a = bytes */
	ENGINE_EVENT_HOST_SHORT,    /* a = bytes available, b = reserve, c = what the groups can give */
	ENGINE_EVENT_HOST_OVER,     /* a = bytes available, b = milliseconds that it took, c = bytes moved out of programs */
	ENGINE_EVENT_SHARED         /* pid has much shared memory, which is neither swapped nor counted; a = bytes */
};

struct engine_event {
	uint32_t kind;
	int32_t pid;
	int32_t group;
	uint32_t place; /* HOST_…: 0 the machine, else a memory cgroup that the daemon is in */
	uint64_t a, b, c;
};

int engine_event_fd(struct engine *engine);
/* 1 and the oldest event, or 0 when there is none. */
int engine_event_next(struct engine *engine, struct engine_event *ret_event);

/* ---- test support ---- */

/* Check all invariants of all structures (stops the world for as long as it takes). 0 or -EUCLEAN. */
int engine_is_valid(struct engine *engine);

/* Sleep in C without releasing the GIL (cffi callers hold it when `hold_gil` is wrapped so): used by
 * the test that no Python runs on the hot path. */
void engine_sleep_ms(int milliseconds);

#endif
