/* SPDX-License-Identifier: MIT */
/* preload_userfaultfd — see preload_userfaultfd.h. */
#include "preload_userfaultfd.h"

#include <errno.h>

#include "agent_sys.h"
#include "preload_replace.h"
#include "preload_ring.h"

#define WAIT_NS 1000000L
#define ANSWER_NS 100000000ULL /* how often a waiter looks whether there still is somebody to answer */
#define LEFT_TRIES 2000        /* of WAIT_NS: a daemon that has detached the process closes what it has */

static long try_once(int fd, struct uffdio_register *argument)
{
	return RAW_3(__NR_ioctl, fd, UFFDIO_REGISTER, argument);
}

static void wait_a_moment(void)
{
	const struct timespec moment = { .tv_nsec = WAIT_NS };

	(void)RAW_2(__NR_nanosleep, &moment, 0);
}

/* Its memory is with the daemon, and its agent may not have joined yet. False: it is not managed. */
static bool wait_until_armed(void)
{
	while (!atomic_get(&agent->armed)) {
		if (!atomic_get(&agent->beacon_armed) || !atomic_get(&agent->tid))
			return false;
		wait_a_moment();
	}
	return true;
}

/* 0: it is the program's; -errno; -EAGAIN: the process is not managed any more. */
static long ask(struct vswap_ring *ring, const struct uffdio_range *range)
{
	uint32_t number = ring->yield_asked + 1, answered;

	ring->yield_start = range->start;
	ring->yield_bytes = range->len;
	atomic_set(&ring->yield_asked, number);
	while ((answered = atomic_get(&ring->yield_answered)) != number) {
		if (!atomic_get(&agent->armed) || atomic_get(&ring->retired))
			return -EAGAIN;
		(void)raw_futex_wait(&ring->yield_answered, answered, ANSWER_NS, 0);
	}
	/* Buried, says the daemon, and yet here it is: it was let go meanwhile. */
	return ring->yield_error == ESRCH ? -EAGAIN : -(long)ring->yield_error;
}

/* Detached, or about to be: the daemon and the agent close their userfaultfd. Waited for once: afterwards what is busy is
 * so for another reason. */
static long try_until_left(int fd, struct uffdio_register *argument)
{
	static uint32_t left_tgid; /* the process for which it was waited for */
	long result = try_once(fd, argument);

	for (unsigned i = 0; result == -EBUSY && i < LEFT_TRIES && left_tgid != agent->tgid; i++) {
		wait_a_moment();
		result = try_once(fd, argument);
	}
	left_tgid = agent->tgid;
	return result;
}

static long have_it_given_up(int fd, struct uffdio_register *argument)
{
	struct vswap_ring *ring = wait_until_armed() ? ring_enter() : NULL;
	long result = -EBUSY;

	if (!ring) /* by now it may be let go */
		return atomic_get(&agent->leaving) ? try_until_left(fd, argument) : try_once(fd, argument);
	if (ring->features & VSWAP_FEATURE_YIELD) {
		result = ask(ring, &argument->range);
		if (result == 0)
			result = try_once(fd, argument);
		atomic_set(&ring->yield_over, ring->yield_asked);
	}
	ring_leave();
	return result == -EAGAIN ? try_until_left(fd, argument) : result;
}

long userfaultfd_register(int fd, struct uffdio_register *argument)
{
	struct replacement replacement;
	long result = try_once(fd, argument);

	if (result != -EBUSY || !agent || agent->sandboxed)
		return result;
	replace_begin(&replacement);
	if (replacement.engaged)
		result = have_it_given_up(fd, argument);
	replace_end(&replacement);
	return result;
}
