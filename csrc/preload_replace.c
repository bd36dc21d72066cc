/* SPDX-License-Identifier: MIT */
/* preload_replace — see preload_replace.h. */
#include <errno.h>
#include <sys/prctl.h>

#include "preload_replace.h"

#include "agent_sys.h"

#define PARK_TRIES 2000 /* of a millisecond: how long a wrapper waits for an agent that is busy */
#define YIELD_TRIES 50
#define GONE_TRIES 20000 /* of 50 us: an exiting thread always gets there */
#define STACK_TOUCH_BYTES 2048 /* more than these functions use; small, for signal stacks */

struct agent_state *agent;

/* ---- lock ---- */

static uint32_t lock_word; /* futex; 0 free, 1 held, 2 held and awaited */
static uint32_t lock_owner; /* tid */

bool replace_lock(void)
{
	uint32_t tid = (uint32_t)raw_gettid(), expected = 0;

	if (atomic_get(&lock_owner) == tid)
		return false;
	if (!__atomic_compare_exchange_n(&lock_word, &expected, 1, false, __ATOMIC_SEQ_CST,
					 __ATOMIC_SEQ_CST))
		while (__atomic_exchange_n(&lock_word, 2, __ATOMIC_SEQ_CST) != 0)
			(void)raw_futex_wait(&lock_word, 2, AGENT_SLOW_NS, FUTEX_PRIVATE_FLAG);
	atomic_set(&lock_owner, tid);
	return true;
}

void replace_unlock(void)
{
	if (atomic_get(&lock_owner) != (uint32_t)raw_gettid())
		return;
	atomic_set(&lock_owner, 0);
	if (__atomic_exchange_n(&lock_word, 0, __ATOMIC_SEQ_CST) == 2)
		raw_futex_wake(&lock_word, FUTEX_PRIVATE_FLAG);
}

void replace_lock_reset(void)
{
	atomic_set(&lock_owner, 0);
	atomic_set(&lock_word, 0);
}

/* ---- replacing the agent ---- */

static void descriptors_close(int *descriptors)
{
	for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
		if (descriptors[i] >= 0)
			raw_close(descriptors[i]);
}

/* Bring the parked agent's descriptors into this table. */
static bool descriptors_take(uint32_t tid, int *ret_descriptors)
{
	int pidfd, fds[AGENT_DESCRIPTORS] = { -1, -1, -1 };
	bool all = true;

	if (RAW_1(__NR_prctl, PR_GET_SECCOMP) != 0)
		return false;
	pidfd = (int)RAW_2(__NR_pidfd_open, tid, RAW_PIDFD_THREAD);
	if (pidfd < 0)
		return false;
	for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++) {
		fds[i] = (int)RAW_3(__NR_pidfd_getfd, pidfd, agent->descriptors[i], 0);
		all = all && fds[i] >= 0;
	}
	raw_close(pidfd);
	if (!all) {
		descriptors_close(fds);
		return false;
	}
	for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
		ret_descriptors[i] = fds[i];
	return true;
}

static void agent_ask(enum agent_request request)
{
	atomic_set(&agent->request, request);
	raw_futex_wake(&agent->request, FUTEX_PRIVATE_FLAG);
	if (atomic_get(&agent->armed)) /* it may sleep on its ring instead */
		raw_futex_wake(&agent_ring(agent)->posted, 0);
}

/* Whether the agent came to rest; it may be waiting for the daemon, which nobody can hurry. */
static bool agent_park(void)
{
	for (unsigned i = 0; i < PARK_TRIES; i++) {
		/* Again and again: a wake may come a moment before its wait. */
		agent_ask(AGENT_PARK);
		(void)raw_futex_wait(&agent->parked, 0, 1000000, FUTEX_PRIVATE_FLAG);
		if (atomic_get(&agent->parked) || !atomic_get(&agent->tid))
			return true;
	}
	return false;
}

/*
 * Have the parked agent end, and wait until the kernel counts the thread no more. False when it is
 * still there: in the middle of POPULATE, waiting for the daemon. It ends later, then.
 */
static bool agent_wait_gone(uint32_t tid)
{
	struct timespec moment = { 0, 50000 };
	unsigned i = 0;

	do {
		agent_ask(AGENT_LEAVE);
		/* Cleared by the kernel as it ends, with a shared wake. */
		(void)raw_futex_wait(&agent->tid, tid, 1000000, 0);
	} while (atomic_get(&agent->tid) && ++i < PARK_TRIES);
	if (atomic_get(&agent->tid))
		return false;
	for (i = 0; i < GONE_TRIES && RAW_3(__NR_tgkill, agent->tgid, tid, 0) != -ESRCH; i++)
		(void)(i < YIELD_TRIES ? RAW_1(__NR_sched_yield, 0)
				       : RAW_2(__NR_nanosleep, &moment, 0));
	return true;
}

/*
 * A stack in ordinary memory may be swapped out, and from here on nobody may be there to bring it
 * back: the daemon may wait for the agent. A parked agent moves nothing out, so once is enough.
 */
static __attribute__((noinline)) void stack_touch(void)
{
	volatile char room[STACK_TOUCH_BYTES];

	room[0] = room[STACK_TOUCH_BYTES - 1] = 0;
}

void replace_dismiss(struct replacement *replacement, bool for_good)
{
	uint32_t tid = atomic_get(&agent->tid);
	int descriptors[AGENT_DESCRIPTORS] = { -1, -1, -1 };
	bool was_armed, taken = false;

	if (tid == 0)
		return;
	if (!agent_park()) {
		agent_ask(AGENT_LEAVE); /* when it can */
		return;
	}
	stack_touch();
	was_armed = atomic_get(&agent->armed);
	if (was_armed && !for_good)
		taken = descriptors_take(tid, descriptors); /* false, too, when it has just ended */
	if (!agent_wait_gone(tid)) {
		descriptors_close(descriptors);
		return;
	}
	for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
		agent->descriptors[i] = descriptors[i];
	atomic_set(&agent->armed, taken ? 1 : 0);
	/* Without its descriptors a managed process can have no agent any more. */
	replacement->had_agent = taken || !was_armed;
}

bool replace_park(void)
{
	if (atomic_get(&agent->tid) == 0 || !agent_park())
		return false;
	stack_touch();
	return true;
}

void replace_unpark(void) { agent_ask(AGENT_GO_ON); }

void replace_begin(struct replacement *replacement)
{
	replacement->engaged = replacement->had_agent = false;
	if (!agent || agent->tgid != (uint32_t)raw_getpid())
		return;
	raw_signals_block(&replacement->signals);
	replacement->engaged = replace_lock();
	if (!replacement->engaged)
		raw_signals_restore(&replacement->signals);
}

/* 0, or -errno when there can be no thread any more. */
static int agent_start_again(void)
{
	int result = agent_start(agent);

	if (result < 0)
		return result;
	/* It takes its descriptors from this table: not to be closed before. */
	while (agent->armed && !atomic_get(&agent->settled) && atomic_get(&agent->tid))
		(void)raw_futex_wait(&agent->settled, 0, 1000000, FUTEX_PRIVATE_FLAG);
	return 0;
}

void replace_end(struct replacement *replacement)
{
	int descriptors[AGENT_DESCRIPTORS] = { -1, -1, -1 };

	if (!replacement->engaged)
		return;
	if (replacement->had_agent) {
		if (agent->armed)
			for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
				descriptors[i] = agent->descriptors[i];
		if (agent_start_again() < 0)
			agent->armed = 0;
		descriptors_close(descriptors);
	}
	replace_unlock();
	raw_signals_restore(&replacement->signals);
}

void replace_agent(void)
{
	struct replacement replacement;

	replace_begin(&replacement);
	if (replacement.engaged)
		replace_dismiss(&replacement, false);
	replace_end(&replacement);
}
