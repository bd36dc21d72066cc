/* SPDX-License-Identifier: MIT */
/*
 * agent — the client's own thread: moves the process's pages out when the daemon asks.
 *
 * Shared by preload.c, which starts it, and agent*.c, which are it. The agent uses no libc, no
 * errno, no thread-local storage and no writable static data: all it has is one struct agent_state,
 * which lies in its arena. So the same code is also an image that is put into running and static programs
 * (agent_image.c, attach.c).
 *
 * The agent's code must be compiled with
 *     -ffreestanding -fno-stack-protector -fno-builtin -fno-tree-loop-distribute-patterns
 *     -fPIC -fvisibility=hidden
 * for the stack protector reads thread-local storage and the others keep gcc from calling memcpy.
 *
 * Arena       one PROT_NONE reservation; only stack and state are made accessible at the start, the
 *             rest (arena_prepare) when the process comes under management. Order, lowest first:
 *             guard stack guard state guard ring beacon guard staging0 guard staging1 guard trash0
 *             guard trash1 guard.
 * After fork  the child keeps the arena, at the same place. Beacon, staging and trash are
 *             MADV_WIPEONFORK: the child has the mappings (so nothing of the program can come to
 *             lie there) and what the events userfaultfd watches stays watched, but no page:
 *             reading the beacon asks the daemon in every generation, and evicted pages are not
 *             inherited.
 * Life        STARTING -> LOOKING -> JOINING -> SERVING; a forked child of a managed process goes
 *             STARTING -> JOINING. From LOOKING and SERVING it may be parked (agent_rest).
 * Invariants  1 beacon_armed is set before ARM is sent, so in a child 0 means: not managed, and 1
 *               means: read the beacon, it knows
 *             2 the descriptors are open in the agent's private table only, but while preload.c
 *               replaces one agent by another
 *             3 a safe point (agent_rest) is never inside a command or a handshake
 */
#ifndef VSWAP_AGENT_H
#define VSWAP_AGENT_H

#include <stdbool.h>
#include <stdint.h>

#include "wire.h"

#define AGENT_PAGE 4096UL
#define AGENT_WINDOW_BYTES (VSWAP_WINDOW_PAGES * AGENT_PAGE)
#define AGENT_STAGING_BYTES (VSWAP_WINDOWS * AGENT_WINDOW_BYTES)
#define AGENT_STACK_BYTES 32768UL

/* Offsets in the arena */
#define ARENA_STACK AGENT_PAGE
#define ARENA_STATE (ARENA_STACK + AGENT_STACK_BYTES + AGENT_PAGE)
#define ARENA_RING (ARENA_STATE + 2 * AGENT_PAGE)
#define ARENA_BEACON (ARENA_RING + VSWAP_RING_BYTES)
#define ARENA_STAGING0 (ARENA_BEACON + 2 * AGENT_PAGE)
#define ARENA_STAGING1 (ARENA_STAGING0 + AGENT_STAGING_BYTES + AGENT_PAGE)
#define ARENA_TRASH0 (ARENA_STAGING1 + AGENT_STAGING_BYTES + AGENT_PAGE)
#define ARENA_TRASH1 (ARENA_TRASH0 + AGENT_WINDOW_BYTES + AGENT_PAGE)
#define ARENA_BYTES (ARENA_TRASH1 + AGENT_WINDOW_BYTES + AGENT_PAGE)

#define AGENT_PATH_BYTES 108 /* of a Unix socket's address */
#define AGENT_SLOW_NS 1000000000ULL
#define AGENT_HURRY_NS_MAX 1000000000ULL
#define AGENT_SAY_BYTES 200

enum agent_phase { AGENT_STARTING, AGENT_LOOKING, AGENT_JOINING, AGENT_SERVING };

/* What preload.c wants of the agent at its next safe point. */
enum agent_request {
	AGENT_GO_ON = 0,
	AGENT_PARK = 1,  /* set `parked`, then wait for another request */
	AGENT_LEAVE = 2, /* end the thread */
};

/* Whether a thread of the program waits until it is known if the process is managed: once in its life. */
enum agent_hurry { AGENT_UNHURRIED, AGENT_HURRIED, AGENT_HURRY_OVER };

/* The descriptors that an armed agent keeps. */
enum agent_descriptor { AGENT_SOCKET, AGENT_EVENTS, AGENT_TRASH, AGENT_DESCRIPTORS };

struct agent_config {
	char socket_path[AGENT_PATH_BYTES]; /* NUL-terminated; empty: never connect */
	char group[VSWAP_GROUP_BYTES];
	uint64_t minimum_bytes;
	uint64_t look_ns;
	uint64_t absent_ns; /* without a daemon for so long, it says so; 0: never */
	uint64_t stderr_device, stderr_inode; /* of descriptor 2 at the start; 0, 0: it had none */
	uint32_t verbose;
	uint32_t is_injected; /* by attach.c: nobody but the agent knows of the arena */
};

struct agent_state {
	struct agent_config config;
	uint64_t arena;
	uint64_t token;
	uint32_t tid;          /* futex; 0: no agent. Cleared by the kernel when the thread ends */
	uint32_t tgid;
	uint32_t request;      /* futex; enum agent_request, written by preload.c */
	uint32_t parked;       /* futex */
	uint32_t settled;      /* futex; 1: has its own descriptor table */
	uint32_t phase;        /* enum agent_phase */
	uint32_t beacon_armed;
	uint32_t armed;        /* descriptors valid, ring mapped */
	uint32_t ready;        /* READY came: what it has is registered, beyond doubt */
	uint32_t leaving;      /* LEAVE came: all it has is here, and a child needs nobody */
	uint32_t parent_ready; /* READY, and no LEAVE, of the process that this one was forked from */
	uint32_t forked;       /* joined with the token of its beacon, and has no choice but to again */
	uint32_t sandboxed;    /* left for good: seccomp. Forked children have no agent either */
	uint32_t next_command; /* number of the next command of the ring */
	uint32_t hurry;        /* futex; enum agent_hurry */
	uint32_t ring_users;   /* threads of the program that use the ring: it stays mapped meanwhile */
	uint32_t differed;     /* looks in a row at which the program had other credentials */
	uint32_t beat;         /* of the ring, when it was last looked at */
	uint32_t absent_looks; /* in a row, AGENT_SLOW_NS apart, at which it was the same */
	uint32_t said;         /* bits AGENT_SAID_*: lines not to be repeated */
	int32_t descriptors[AGENT_DESCRIPTORS];
};

#define AGENT_SAID_ABSENT 1u
#define AGENT_SAID_HANGUP 2u
#define AGENT_SAID_WAITS 4u

_Static_assert(sizeof(struct agent_state) <= AGENT_PAGE, "the state is one page of the arena");
_Static_assert(ARENA_STATE % AGENT_PAGE == 0 && ARENA_TRASH1 % AGENT_PAGE == 0, "page aligned");

static inline struct vswap_ring *agent_ring(const struct agent_state *state)
{
	return (struct vswap_ring *)(state->arena + ARENA_RING);
}

static inline uint64_t agent_staging(const struct agent_state *state, uint32_t protection)
{
	return state->arena + (protection ? ARENA_STAGING1 : ARENA_STAGING0);
}

static inline uint64_t agent_trash(const struct agent_state *state, uint32_t protection)
{
	return state->arena + (protection ? ARENA_TRASH1 : ARENA_TRASH0);
}

/* ---- for preload.c: any thread of the program, one at a time ---- */

/* Reserve the arena; NULL when there is no address space for it. */
struct agent_state *agent_create(const struct agent_config *config);
/* Start the thread; 0 or -errno. An armed state's descriptors are open in the caller's table. */
int agent_start(struct agent_state *state);
/* Have the agent join now, and wait until it has, or found nobody, or for AGENT_HURRY_NS_MAX. The first time only. */
void agent_hurry(struct agent_state *state);
/* In a forked child, before anything else runs there: forget the parent's agent. */
void agent_forget_parent(struct agent_state *state);

/* ---- agent.c: for the agent's other files ---- */

_Noreturn void agent_end(void);
_Noreturn void agent_kill_process(struct agent_state *state, const char *why);
/* The safe point: serves requests of preload.c. May not return. */
void agent_rest(struct agent_state *state);
/* About once a second, anywhere: ends the agent when it alone keeps the process alive, or when it
 * holds other credentials than the program. */
void agent_look_around(struct agent_state *state);
/* One line on stderr, if that still is what it was at the start. */
void agent_say(struct agent_state *state, const char *text, const char *detail);

/* ---- agent_join.c ---- */

enum join_outcome { JOIN_DONE, JOIN_ABSENT, JOIN_REFUSED };

/* Come under management: NEW when token is 0, else FORKED. Nothing is left behind but by DONE. */
enum join_outcome agent_join(struct agent_state *state, uint64_t token);
/* Undo it: its ring is retired. */
void agent_unjoin(struct agent_state *state);

/* ---- agent_ring.c ---- */

/* Execute commands; returns when the ring is retired, and how: VSWAP_RETIRED_*. */
uint32_t agent_serve(struct agent_state *state);

#endif
