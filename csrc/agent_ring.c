/* SPDX-License-Identifier: MIT */
/*
 * agent_ring — executes the daemon's commands (wire.h): the system calls that only the process
 * itself can make.
 *
 * Order     commands one after the other, in the order of their numbers.
 * Sleeping  agent_sleeping is set, then posted, epoch and preload.c's request are read again, then
 *           the futex waits for `posted`: a command posted in between is either seen or wakes. At
 *           most a second, then the agent looks whether a daemon is there. If none is, nothing is
 *           closed: as long as a userfaultfd is open, faults wait and nobody reads zeros.
 * Trust     addresses and lengths come from the daemon, whom the process trusts with its memory
 *           anyway; they are checked against the window so that a bug there stays a refused
 *           command.
 * Parked    on request of preload_replace.c (wire.h knows nothing of it): MOVE_OUT is answered
 *           EAGAIN without trying, all else is executed. So the daemon gets its answers, and what
 *           the thread that is about to replace this agent has just touched stays in memory until
 *           it has done so.
 * Never     this thread touches no page of the program but in POPULATE, during which the daemon
 *           serves faults: it could wait for itself.
 *
 * Compile flags: see agent.h.
 */
#include <errno.h>
#include <sys/socket.h>

#include "agent.h"
#include "agent_sys.h"

/* Move what is there; *ret_moved is progress in bytes. 0 when all was done, else -errno. */
static int move_once(int fd, uint64_t destination, uint64_t source, uint64_t bytes,
		     uint64_t *ret_moved)
{
	struct raw_uffd_move move = { destination, source, bytes, RAW_MOVE_ALLOW_HOLES, 0 };
	long result = raw_ioctl(fd, RAW_UFFDIO_MOVE, &move);

	/* Older kernels leave `moved` alone when an event is unread, newer ones write -EAGAIN. */
	*ret_moved = result == 0 ? bytes : move.moved > 0 ? (uint64_t)move.moved : 0;
	return (int)result;
}

/*
 * Move a range, page by page where need be: EBUSY pages are passed over and counted. The range may
 * cross from one mapping into another, which the daemon cannot see and the kernel answers with EINVAL:
 * then in parts small enough to lie in one mapping. A page that is refused even alone (locked or read-only
 * by now) is passed over as a busy one, and EINVAL is the answer in the end. Any other failure
 * without progress ends it and is returned as a positive errno.
 */
static uint32_t move_range(int fd, uint64_t destination, uint64_t source, uint32_t pages,
			   uint32_t *moved, uint32_t *busy)
{
	uint32_t done = 0, most = pages, refused = 0;

	while (done < pages) {
		uint32_t count = pages - done < most ? pages - done : most;
		uint64_t bytes;
		int result = move_once(fd, destination + done * AGENT_PAGE,
				       source + done * AGENT_PAGE, count * AGENT_PAGE, &bytes);

		if (bytes) {
			done += (uint32_t)(bytes / AGENT_PAGE);
			*moved += (uint32_t)(bytes / AGENT_PAGE);
			most = most < pages ? most * 2 : most;
		} else if (result == -EINVAL && count > 1) {
			most = count / 2;
		} else if (result == -EBUSY || result == -EINVAL) {
			refused = result == -EINVAL ? EINVAL : refused;
			done++;
			(*busy)++;
		} else {
			return (uint32_t)-result;
		}
	}
	return refused;
}

static void run_clear(struct vswap_run *run)
{
	run->moved = run->busy = run->error = 0;
}

static bool window_is_valid(const struct vswap_command *command)
{
	return command->window < VSWAP_WINDOWS && command->protection < VSWAP_PROTECTIONS;
}

static uint64_t window_address(const struct agent_state *state, const struct vswap_command *command)
{
	return agent_staging(state, command->protection) + command->window * AGENT_WINDOW_BYTES;
}

/* `failed`: 0, or the errno that answers every run. */
static void execute_move_out(const struct agent_state *state, struct vswap_command *command,
			     uint32_t run_count, uint32_t failed)
{
	uint64_t destination = window_address(state, command);
	uint32_t used = 0;

	if (!failed && !window_is_valid(command))
		failed = EINVAL;

	for (uint32_t i = 0; i < run_count; i++) {
		struct vswap_run *run = &command->runs[i];
		uint64_t address = run->address;
		uint32_t pages = run->pages;

		run_clear(run);
		if (!failed && (pages > VSWAP_WINDOW_PAGES - used || address % AGENT_PAGE))
			failed = EINVAL; /* where later runs go is unknown then, too */
		run->error = failed;
		if (failed)
			continue;
		run->error = move_range(state->descriptors[AGENT_EVENTS],
					destination + used * AGENT_PAGE, address, pages,
					&run->moved, &run->busy);
		used += pages;
		/* An unread event: each further attempt would say the same. */
		if (run->error == EAGAIN)
			failed = EAGAIN;
	}
}

static void execute_release(const struct agent_state *state, struct vswap_command *command)
{
	uint64_t trash, window;
	uint32_t moved = 0, busy = 0;
	int result;

	command->error = EINVAL;
	if (!window_is_valid(command))
		return;
	trash = agent_trash(state, command->protection);
	window = window_address(state, command);
	command->error = move_range(state->descriptors[AGENT_TRASH], trash, window,
				    VSWAP_WINDOW_PAGES, &moved, &busy);
	if (command->error == EEXIST) {
		/* mlockall of the program has populated it (test_agent: mlockall) */
		(void)raw_madvise(trash, AGENT_WINDOW_BYTES, RAW_MADV_DONTNEED_LOCKED);
		command->error = move_range(state->descriptors[AGENT_TRASH], trash, window,
					    VSWAP_WINDOW_PAGES, &moved, &busy);
	}
	/* _LOCKED: after mlockall plain DONTNEED is EINVAL. */
	result = raw_madvise(trash, AGENT_WINDOW_BYTES, RAW_MADV_DONTNEED_LOCKED);
	if (!command->error && busy)
		command->error = EBUSY;
	if (!command->error && result < 0)
		command->error = (uint32_t)-result;
}

static void execute_populate(struct vswap_command *command, uint32_t run_count)
{
	for (uint32_t i = 0; i < run_count; i++) {
		struct vswap_run *run = &command->runs[i];
		uint32_t pages = run->pages;
		int result;

		run_clear(run);
		result = raw_madvise(run->address, pages * AGENT_PAGE, RAW_MADV_POPULATE_WRITE);
		run->error = result < 0 ? (uint32_t)-result : 0;
		run->moved = result < 0 ? 0 : pages;
	}
}

static void execute(struct agent_state *state, struct vswap_command *command, bool parked)
{
	uint32_t run_count = command->run_count;

	if (run_count > VSWAP_RUNS_MAX)
		run_count = VSWAP_RUNS_MAX;
	switch (command->operation) {
	case VSWAP_MOVE_OUT:
		execute_move_out(state, command, run_count, parked ? EAGAIN : 0);
		break;
	case VSWAP_RELEASE:
		execute_release(state, command);
		break;
	case VSWAP_POPULATE:
		execute_populate(command, run_count);
		break;
	case VSWAP_LEAVE:
		atomic_set(&state->leaving, command->window);
		command->error = 0;
		break;
	default: /* PING */
		break;
	}
}

static bool is_hung_up(const struct agent_state *state)
{
	char byte;
	long got = RAW_6(__NR_recvfrom, state->descriptors[AGENT_SOCKET], &byte, 1,
			 MSG_PEEK | MSG_DONTWAIT, 0, 0);

	return got == 0 || (got < 0 && got != -EAGAIN && got != -EINTR);
}

static void daemon_is_there(struct agent_state *state)
{
	if (!(state->said & AGENT_SAID_WAITS))
		return;
	agent_say(state, "a daemon is there again", "");
	state->said &= ~AGENT_SAID_WAITS;
}

/* About once a second, while nothing is asked for. By the beat, for others may keep the socket of a dead daemon open. */
static void look_for_daemon(struct agent_state *state, struct vswap_ring *ring)
{
	uint32_t beat = atomic_get(&ring->beat);
	bool is_hung = is_hung_up(state);
	bool is_absent = ring->features & VSWAP_FEATURE_BEAT ? beat == state->beat : is_hung;

	state->beat = beat;
	state->absent_looks = is_absent ? state->absent_looks + 1 : 0;
	if (is_hung && state->config.verbose && !(state->said & AGENT_SAID_HANGUP)) {
		agent_say(state, "the daemon is gone; waits for another", "");
		state->said |= AGENT_SAID_HANGUP;
	}
	if (is_absent && state->config.absent_ns && !(state->said & AGENT_SAID_WAITS) &&
	    state->absent_looks * AGENT_SLOW_NS >= state->config.absent_ns) {
		agent_say(state, "no daemon answers; what is swapped out waits for one", "");
		state->said |= AGENT_SAID_WAITS;
	}
	if (!is_absent)
		daemon_is_there(state);
}

/* `posted`, `request`: what they were when there was nothing to do. */
static void sleep_until_posted(struct agent_state *state, struct vswap_ring *ring, uint32_t posted,
			       uint32_t request)
{
	int result = 0;

	atomic_set(&ring->agent_sleeping, 1);
	if (atomic_get(&ring->posted) == posted &&
	    atomic_get(&ring->epoch) == atomic_get(&ring->epoch_seen) &&
	    atomic_get(&state->request) == request)
		result = raw_futex_wait(&ring->posted, posted, AGENT_SLOW_NS, 0);
	atomic_set(&ring->agent_sleeping, 0);
	if (result != -ETIMEDOUT || request != AGENT_GO_ON)
		return;
	look_for_daemon(state, ring);
	agent_look_around(state);
}

/* What preload.c asks; true while parked. */
static bool is_parked(struct agent_state *state, uint32_t request)
{
	if (request == AGENT_LEAVE)
		agent_end();
	if (atomic_get(&state->parked) != (request == AGENT_PARK)) {
		atomic_set(&state->parked, request == AGENT_PARK);
		raw_futex_wake(&state->parked, FUTEX_PRIVATE_FLAG);
	}
	return request == AGENT_PARK;
}

uint32_t agent_serve(struct agent_state *state)
{
	struct vswap_ring *ring = agent_ring(state);

	for (;;) {
		uint32_t epoch = atomic_get(&ring->epoch), request = atomic_get(&state->request);
		bool parked = is_parked(state, request);
		uint32_t posted = atomic_get(&ring->posted);

		/* Before a successor is answered, and read after its epoch: a process that was let go is not taken
		 * back by one that comes to bury it, and what it forks meanwhile needs nobody. */
		if (atomic_get(&ring->retired))
			return atomic_get(&ring->retired);
		if (epoch != ring->epoch_seen) {
			atomic_set(&state->leaving, 0);
			atomic_set(&ring->epoch_seen, epoch);
			raw_futex_wake(&ring->done, 0);
		}
		if (posted - state->next_command - 1 >= VSWAP_RING_COMMANDS) {
			/* nothing posted, or nonsense */
			sleep_until_posted(state, ring, posted, request);
			continue;
		}
		daemon_is_there(state);
		execute(state, &ring->commands[state->next_command % VSWAP_RING_COMMANDS], parked);
		state->next_command++;
		atomic_set(&ring->done, state->next_command);
		if (atomic_get(&ring->daemon_waiting))
			raw_futex_wake(&ring->done, 0);
	}
}
