/* SPDX-License-Identifier: MIT */
/*
 * detach — let a client go: everything of it comes back, its agent ends, and the kernel serves its faults.
 *
 * Order      1 leaving: nothing more of it is evicted, and what it has does not count, as it is to have all
 *              2 all its pages are brought back by fault threads, what is in staging is stored and freed first
 *              3 LEAVE: a child forked from now on needs nobody
 *              4 with the gate: still nothing is out, no event is unread, no fork is under way. The ring is
 *                retired: from here on it is detached, whoever dies. The agent closes what it has and ends
 *              5 bury: the daemon closes what it has. Whose fault was not answered tries again, natively
 * Deaths     before the ring is retired the successor has a client like any other, whose agent it tells so by
 *            its epoch; after it, one that it buries (recover.c). At no time is the last userfaultfd closed while
 *            a page is out.
 * Failures   up to 4 it stays a client.
 */
#include <errno.h>

#include "base.h"
#include "client.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "sys.h"

#define ERRNO_MAX 4095u

/* All it has is with it, and nothing is about to change that. The gate is held. */
static bool is_complete(struct client *client)
{
	client_reap_releases(client);
	for (unsigned i = 0; i < VSWAP_WINDOWS; i++)
		if (client->record->batches[i].phase != BATCH_FREE)
			return false;
	return slot_map_swapped_pages(&client->record->map) == 0 && !client_is_shut(client) &&
	       !client->fork_pending && !client->resyncing && !client->wiped_unknown &&
	       !sys_userfaultfd_is_changing(client->events_fd);
}

static void set_leaving(struct client *client, bool leaving)
{
	SCOPED_LOCK(&client->gate);
	WRITE_ONCE(client->leaving, leaving);
	if (leaving && !client->dead)
		client_set_resident(client, 0, 0);
}

/* Have its agent know. The gate is not held. 0 or -errno. */
static int tell_agent(struct client *client, bool leaving, unsigned timeout_ms)
{
	/* One that does not know the command answers it as it is. */
	struct vswap_command command = { .operation = VSWAP_LEAVE, .window = leaving, .error = ENOSYS };
	uint32_t number, error;
	int result;

	pthread_mutex_lock(&client->gate);
	number = client_post(client, &command);
	pthread_mutex_unlock(&client->gate);
	result = client_wait(client, number, timeout_ms);
	if (result < 0)
		return result;
	error = READ_ONCE(client->ring->commands[number % VSWAP_RING_COMMANDS].error); /* the client's, who may write anything */
	return error <= ERRNO_MAX ? -(int)error : -EPROTO;
}

/* Steps 2 and 4: wait until it is complete, and retire its ring then if `retire`. 0 or -errno. */
static int complete(struct client *client, uint64_t deadline_ns, bool retire)
{
	uint64_t cursor = 0;

	while (sys_now_ns() < deadline_ns) {
		pthread_mutex_lock(&client->gate);
		if (client->dead || READ_ONCE(client->agent_gone)) {
			pthread_mutex_unlock(&client->gate);
			return client->dead ? -ESRCH : -EPIPE;
		}
		if (is_complete(client)) {
			if (retire)
				__atomic_store_n(&client->ring->retired, VSWAP_RETIRED_LEFT, __ATOMIC_SEQ_CST);
			pthread_mutex_unlock(&client->gate);
			return 0;
		}
		if (!client_is_shut(client))
			engine_ask_for_pages(client, &cursor);
		pthread_mutex_unlock(&client->gate);
		client_wake(client);
		sys_sleep_ms(1);
	}
	return -ETIMEDOUT;
}

static int leave(struct client *client, uint64_t deadline_ns, unsigned timeout_ms)
{
	int result = complete(client, deadline_ns, false);

	if (result < 0)
		return result;
	result = tell_agent(client, true, timeout_ms);
	crash_point(CRASH_DETACH_LEAVING);
	if (result == 0)
		result = complete(client, deadline_ns, true);
	if (result < 0)
		(void)tell_agent(client, false, 0); /* it comes to it sooner or later */
	return result;
}

static bool is_referenced(struct client *client)
{
	SCOPED_LOCK(&client->engine->registry);
	return client->references > 1;
}

int engine_client_detach(struct engine *engine, int32_t pid, int timeout_ms)
{
	struct client *client = client_get_pid(engine, pid);
	int result;

	if (!client)
		return -ESRCH;
	if (!__atomic_load_n(&client->ring, __ATOMIC_ACQUIRE) || client->trash_fd < 0 ||
	    READ_ONCE(client->agent_gone)) {
		client_put(client);
		return -EPIPE;
	}
	set_leaving(client, true);
	result = leave(client, sys_now_ns() + (uint64_t)timeout_ms * 1000000UL, (unsigned)timeout_ms);
	if (result < 0) {
		set_leaving(client, false);
		work_ask(&engine->looking);
	} else {
		crash_point(CRASH_DETACH_LEFT);
		sys_futex_wake(&client->ring->posted);
		WRITE_ONCE(client->agent_gone, true);
		/* It may be forking at this very moment. */
		for (client_bury(client); !READ_ONCE(client->dead); client_bury(client))
			sys_sleep_ms(1);
		/* Not before its fault threads have ended is its userfaultfd closed. */
		while (is_referenced(client))
			sys_sleep_ms(1);
	}
	client_put(client);
	return result;
}
