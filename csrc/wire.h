/* SPDX-License-Identifier: MIT */
/*
 * wire — everything a client and the daemon say to each other.
 *
 * Two channels:
 *
 *  socket  A stream Unix socket, used by the agent only to come under management:
 *
 *            agent                                   daemon
 *            HELLO (kind NEW or FORKED)  ─────────▶
 *                                        ◀─────────  WELCOME + descriptors
 *            ARM + descriptors           ─────────▶
 *                                        ◀─────────  READY
 *
 *          and from then on held open by both sides: end of file means the other side is gone.
 *          Descriptors with WELCOME:  NEW     /dev/userfaultfd, ring memfd
 *                                     FORKED  /dev/userfaultfd, ring memfd, the child's userfaultfd
 *          Descriptors with ARM:      NEW     raw userfaultfd (events), raw userfaultfd (trash)
 *                                     FORKED  raw userfaultfd (trash)
 *          Raw means UFFDIO_API has not been issued: the daemon does, because EVENT_FORK needs a
 *          capability that an unprivileged client has not. Every userfaultfd is made with
 *          O_CLOEXEC | O_NONBLOCK. A refused HELLO gets a WELCOME with a status and no
 *          descriptors, and the socket is closed.
 *          Control requests (vswapctl) use the same socket; their first byte is '{'.
 *
 *  ring    A sealed memfd mapped by both, for the commands that only the client itself can
 *          execute. Single producer (daemon), single consumer (agent), VSWAP_RING_COMMANDS slots:
 *          command number n lies in slot n % VSWAP_RING_COMMANDS, is complete when posted > n
 *          and answered when done > n (both counters wrap at 2^32). The daemon wakes `posted`,
 *          the agent wakes `done` (shared futexes; the wake of `posted` may be skipped while
 *          agent_sleeping is 0, the wake of `done` while daemon_waiting is 0). The agent writes
 *          result fields only. Nothing in the ring is trusted by the daemon: it keeps its own
 *          copy of what it asked and verifies what was moved with PAGEMAP_SCAN.
 *
 * Recovery: a daemon that takes over sets `epoch`; the agent copies it to `epoch_seen` whenever it
 * is between two commands. Until both agree a command of the old epoch may still be running. A handshake
 * that the daemon died in, before it took ARM, is void, though the agent may take it for complete: then
 * the successor sets `retired` to RETIRED_VOID (before `epoch`), and the agent begins anew. RETIRED_LEFT, after
 * LEAVE, ends the agent: it closes what it has, so that the kernel serves the client's faults again.
 *
 * A range given up: a program registers memory that is managed with a userfaultfd of its own. Its library writes
 * yield_start and yield_bytes, then the number of the request to yield_asked; the daemon brings back what is out there,
 * lets go of the range, writes yield_error, then the number to yield_answered; the library has the program's call
 * repeated and writes the number to yield_over. While yield_over differs from yield_asked the daemon registers nothing
 * in that range. One request at a time, and only of a daemon that says VSWAP_FEATURE_YIELD.
 *
 * A large mapping near the limit: a program can fill it faster than it is found. So its library asks for a discovery
 * and waits for one that began after the mapping was made, before the program gets it: a moment, or not at all
 * (VSWAP_FEATURE_DISCOVERY).
 *
 * The agent's arena in the client, one reservation made before HELLO, told in ARM:
 *     beacon   1 page, registered, never touched in the process that armed it. In a forked child
 *              the daemon answers its fault with a page whose first 8 bytes are the child's
 *              client token: this is how the child learns that it is managed, and as whom. A
 *              child that reads 0 there is not managed.
 *     staging  VSWAP_WINDOWS windows of VSWAP_WINDOW_PAGES pages for each protection: evicted
 *              pages are moved here; registered with the events userfaultfd.
 *     trash    VSWAP_WINDOW_PAGES pages for each protection; registered with the other one, so
 *              that MADV_DONTNEED there raises no event.
 *     stack and ring mapping of the agent: never registered.
 */
#ifndef VSWAP_WIRE_H
#define VSWAP_WIRE_H

#include <stddef.h>
#include <stdint.h>

#define VSWAP_MAGIC 0x50575356u /* "VSWP" */
#define VSWAP_WIRE_VERSION 1

#define VSWAP_GROUP_BYTES 32  /* group name, NUL-padded; empty: the daemon decides */
#define VSWAP_PROTECTIONS 2   /* 0: read-write, 1: read-write-execute */
#define VSWAP_WINDOWS 8
#define VSWAP_WINDOW_PAGES 64
#define VSWAP_RING_COMMANDS 16
#define VSWAP_RUNS_MAX 64
#define VSWAP_RING_BYTES 65536

enum vswap_hello_kind {
	VSWAP_HELLO_NEW = 1,
	VSWAP_HELLO_FORKED = 2, /* token: read from the beacon */
};

enum vswap_status {
	VSWAP_OK = 0,
	VSWAP_REFUSED_VERSION = 1,
	VSWAP_REFUSED_PEER = 2,  /* credentials, group or token do not allow it */
	VSWAP_REFUSED_LIMIT = 3, /* too many clients */
	VSWAP_REFUSED_KERNEL = 4,
};

struct vswap_hello {
	uint32_t magic;
	uint16_t version;
	uint16_t kind;
	uint64_t token; /* 0 for NEW */
	char group[VSWAP_GROUP_BYTES];
};

struct vswap_welcome {
	uint32_t magic;
	uint16_t version;
	uint16_t status;
	uint64_t token; /* this client's name from now on */
};

struct vswap_arm {
	uint32_t magic;
	uint16_t version;
	uint16_t reserved;
	uint64_t arena; /* address; everything below lies in [arena, arena + arena_bytes) */
	uint64_t arena_bytes;
	uint64_t beacon;
	uint64_t staging[VSWAP_PROTECTIONS];
	uint64_t trash[VSWAP_PROTECTIONS];
};

struct vswap_ready {
	uint32_t magic;
	uint16_t version;
	uint16_t status;
};

enum vswap_operation {
	/* For each run in order: UFFDIO_MOVE of its pages to the next pages of the window (run i
	 * goes behind all pages of the runs before it, whatever became of them), holes allowed.
	 * A page that cannot be moved (EBUSY: pinned or shared after fork; EINVAL: its mapping was
	 * locked or made read-only) is skipped and counted in `busy`, EINVAL is the run's `error` then;
	 * any other error ends that run with the positive errno in `error`. On EAGAIN with
	 * an event unread (no progress) the whole command ends: this and later runs get EAGAIN. */
	VSWAP_MOVE_OUT = 1,
	/* UFFDIO_MOVE of the whole window to the trash, holes allowed, then MADV_DONTNEED there. */
	VSWAP_RELEASE = 2,
	/* madvise(MADV_POPULATE_WRITE) of each run: makes pages shared after fork exclusive. */
	VSWAP_POPULATE = 3,
	/* Nothing; answers. */
	VSWAP_PING = 4,
	/* window 1: the ring may be retired at any moment, as all pages are with the client; 0: it stays after
	 * all. `error` is set to 0 by an agent that knows it. A new epoch undoes it. */
	VSWAP_LEAVE = 5,
};

#define VSWAP_RETIRED_VOID 1u
#define VSWAP_RETIRED_LEFT 2u

#define VSWAP_FEATURE_YIELD 1u
#define VSWAP_FEATURE_BEAT 2u
#define VSWAP_FEATURE_DISCOVERY 4u
#define VSWAP_FEATURES (VSWAP_FEATURE_YIELD | VSWAP_FEATURE_BEAT | VSWAP_FEATURE_DISCOVERY)

struct vswap_run {
	uint64_t address;
	uint32_t pages;
	/* results */
	uint32_t moved; /* pages of the run for which MOVE reported success, holes included */
	uint32_t busy;  /* pages skipped because of EBUSY */
	uint32_t error; /* errno of the first other failure, else 0 */
};

struct vswap_command {
	uint32_t operation;
	uint32_t window;     /* 0 .. VSWAP_WINDOWS - 1 */
	uint32_t protection; /* 0 .. VSWAP_PROTECTIONS - 1 */
	uint32_t run_count;  /* 0 .. VSWAP_RUNS_MAX */
	/* result of RELEASE and LEAVE: errno or 0 */
	uint32_t error;
	uint32_t reserved;
	struct vswap_run runs[VSWAP_RUNS_MAX];
};

struct vswap_ring {
	uint32_t magic;
	uint32_t version;
	uint32_t epoch;          /* daemon */
	uint32_t epoch_seen;     /* agent */
	uint32_t posted;         /* daemon; futex */
	uint32_t agent_sleeping; /* agent: 1 while it is, or is about to be, in futex wait */
	uint32_t retired;        /* daemon: VSWAP_RETIRED_*, nobody serves this ring; 0: somebody does */
	uint32_t features;       /* daemon: VSWAP_FEATURE_* */
	uint32_t beat;           /* daemon: another number at least every second, while it looks after its clients */
	uint32_t is_near;        /* daemon: the group is near its limit */
	uint32_t discoveries;    /* daemon; futex: odd while one is under way, and two more at its end than before it */
	uint8_t pad0[20];
	uint32_t done;           /* agent; futex */
	uint32_t daemon_waiting; /* daemon: 1 while it is, or is about to be, in futex wait */
	uint64_t yield_start, yield_bytes; /* client: a range to be given up */
	uint32_t yield_asked;    /* client */
	uint32_t yield_answered; /* daemon; futex */
	uint32_t yield_error;    /* daemon: errno, 0: the range is the program's */
	uint32_t yield_over;     /* client */
	uint32_t discovery_asked; /* client sets it, the daemon clears it when it begins one */
	uint8_t pad1[20];
	struct vswap_command commands[VSWAP_RING_COMMANDS];
};

_Static_assert(sizeof(struct vswap_hello) == 48, "wire layout");
_Static_assert(sizeof(struct vswap_welcome) == 16, "wire layout");
_Static_assert(sizeof(struct vswap_arm) == 64, "wire layout");
_Static_assert(sizeof(struct vswap_ready) == 8, "wire layout");
_Static_assert(sizeof(struct vswap_run) == 24, "wire layout");
_Static_assert(offsetof(struct vswap_ring, done) == 64 && offsetof(struct vswap_ring, commands) == 128, "wire layout");
_Static_assert(sizeof(struct vswap_ring) <= VSWAP_RING_BYTES, "ring fits its memfd");

/*
 * Environment of a client (set by `vswapctl run`):
 *   VSWAPD_SOCKET       path of the daemon's socket (default /run/vswapd/vswapd.sock)
 *   VSWAP_GROUP         group name for HELLO
 *   VSWAP_MIN_BYTES     anonymous resident size from which the agent asks to be managed (default 16 MiB)
 *   VSWAP_LOOK_US       longest time between two looks of the agent at its own size (default 10000)
 *   VSWAP_ABSENT_S      seconds without a daemon after which a managed process says so on stderr (default 10; 0: never)
 *   VSWAP_VERBOSE       1: say on stderr, in one line, when the daemon is absent or refuses
 */

#endif
