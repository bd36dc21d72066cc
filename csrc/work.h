/* SPDX-License-Identifier: MIT */
/*
 * work — threads that wait until they are asked for something.
 *
 * A request says nothing but that there is one: who was asked looks at everything that is its own. So requests that come
 * while it is at work are one, and none is lost: a thread says which it has seen before it waits.
 */
#ifndef VSWAP_WORK_H
#define VSWAP_WORK_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct work {
	pthread_mutex_t lock; /* innermost */
	pthread_cond_t asked;
	uint64_t requests;    /* ever */
	unsigned waiting;     /* threads */
};

void work_init(struct work *work);

/* Ask all threads that wait. */
void work_ask(struct work *work);
/* Ask one, unless fewer than all `thread_count` of them wait: who is at work will see it. */
void work_ask_one(struct work *work, unsigned thread_count);

/* Wait until there was a request since *seen, *stopping, or `ms` have passed. *stopping is set before a request. */
void work_wait(struct work *work, uint64_t *seen, const bool *stopping, unsigned ms);

#endif
