/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "work.h"

#include <time.h>

#include "base.h"

void work_init(struct work *work)
{
	*work = (struct work){ .lock = PTHREAD_MUTEX_INITIALIZER, .asked = PTHREAD_COND_INITIALIZER };
}

void work_ask(struct work *work)
{
	SCOPED_LOCK(&work->lock);
	work->requests++;
	pthread_cond_broadcast(&work->asked);
}

void work_ask_one(struct work *work, unsigned thread_count)
{
	SCOPED_LOCK(&work->lock);
	work->requests++;
	if (work->waiting == thread_count)
		pthread_cond_signal(&work->asked);
}

void work_wait(struct work *work, uint64_t *seen, const bool *stopping, unsigned ms)
{
	struct timespec deadline;

	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_nsec += (long)ms * 1000000L;
	deadline.tv_sec += deadline.tv_nsec / 1000000000L;
	deadline.tv_nsec %= 1000000000L;
	SCOPED_LOCK(&work->lock);
	work->waiting++;
	while (*seen == work->requests && !READ_ONCE(*stopping))
		if (pthread_cond_clockwait(&work->asked, &work->lock, CLOCK_MONOTONIC, &deadline) != 0)
			break;
	work->waiting--;
	*seen = work->requests;
}
