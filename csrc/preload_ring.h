/* SPDX-License-Identifier: MIT */
/*
 * preload_ring — the ring that the agent shares with the daemon, used by other threads of the program.
 *
 * Between replace_begin and replace_end: a signal handler that never came back would keep the agent from leaving.
 */
#ifndef VSWAP_PRELOAD_RING_H
#define VSWAP_PRELOAD_RING_H

#include "agent.h"
#include "agent_sys.h"
#include "preload_replace.h"

/* The ring, which stays mapped until ring_leave; NULL when there is none (any more). */
static inline struct vswap_ring *ring_enter(void)
{
	(void)__atomic_fetch_add(&agent->ring_users, 1, __ATOMIC_SEQ_CST);
	if (atomic_get(&agent->armed))
		return agent_ring(agent);
	(void)__atomic_fetch_sub(&agent->ring_users, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

static inline void ring_leave(void) { (void)__atomic_fetch_sub(&agent->ring_users, 1, __ATOMIC_SEQ_CST); }

#endif
