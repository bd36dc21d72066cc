/* SPDX-License-Identifier: MIT */
/*
 * preload_replace — ends the agent on behalf of a wrapper, and starts a new one.
 *
 * How        the old agent's descriptors are in its private table; pidfd_getfd brings them into
 *            the program's (close-on-exec, for some 50 us), the old agent ends, the new one is
 *            cloned and takes them into a table of its own. Under a seccomp filter pidfd_getfd is
 *            not tried: the agent of a managed process then ends without a successor. After
 *            unshare(NEWPID) no thread can be cloned any more, with the same consequence: pages are
 *            served, but no longer evicted.
 * Lock       one, held while an agent is being replaced and across fork (so that a child never
 *            inherits the descriptors in passing).
 * Between begin and end
 *            all signals are blocked, and nothing may be touched that can be swapped out, for the
 *            daemon may be waiting for the agent: no malloc, no memory of the program.
 * Errors     none is reported: the program's call goes on in any case. errno is never touched.
 * Threads    any of the program. A vfork or raw clone child shares or copies this state but is not
 *            the process that it describes (agent->tgid): for it nothing is engaged.
 */
#ifndef VSWAP_PRELOAD_REPLACE_H
#define VSWAP_PRELOAD_REPLACE_H

#include <stdbool.h>
#include <stdint.h>

#include "agent.h"

#pragma GCC visibility push(hidden)

extern struct agent_state *agent; /* NULL: no address space for one */

struct replacement {
	uint64_t signals;
	bool engaged;   /* lock held, signals blocked */
	bool had_agent; /* and it has ended: replace_end starts a new one */
};

void replace_begin(struct replacement *replacement);
/* Let the agent end. `for_good`: without a successor, so that its descriptors may go with it. */
void replace_dismiss(struct replacement *replacement, bool for_good);
void replace_end(struct replacement *replacement);

/* Between begin and end, instead of dismiss: the agent moves nothing out until replace_unpark. False: it does
 * not come to rest, or there is none. */
bool replace_park(void);
void replace_unpark(void);

/* All of it at once: the new agent has what the calling thread has become. */
void replace_agent(void);

/* False when this thread holds it already: fork, or a wrapper, in a handler during fork. */
bool replace_lock(void);
void replace_unlock(void);
void replace_lock_reset(void); /* in a forked child */

#pragma GCC visibility pop

#endif
