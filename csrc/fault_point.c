/* SPDX-License-Identifier: MIT */
/*
 * fault_point — see fault_point.h. One small table under one mutex: only test builds have it.
 */
#define _GNU_SOURCE
#include "fault_point.h"

#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "base.h"

#ifdef VSWAP_FAULT_POINTS

/* The at_call_n-th call, and if `persistent` all later ones. */
struct effect {
	uint64_t at_call_n;
	bool persistent;
};

struct point {
	const char *name;
	uint64_t calls, hits;
	struct effect failure, delay;
	int errno_value;
	unsigned delay_ms;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct point points[FAULT_POINTS_MAX];
static unsigned point_count;

static struct point *point_find(const char *name)
{
	for (unsigned i = 0; i < point_count; i++)
		if (strcmp(points[i].name, name) == 0)
			return &points[i];
	return NULL;
}

static struct point *point_make(const char *name)
{
	struct point *point = point_find(name);

	if (!point) {
		VS_CHECK(point_count < FAULT_POINTS_MAX);
		point = &points[point_count++];
		*point = (struct point){ .name = name };
	}
	return point;
}

static bool concerns(struct effect effect, uint64_t call)
{
	return effect.at_call_n && (call == effect.at_call_n || (call > effect.at_call_n && effect.persistent));
}

int fault_point(const char *name)
{
	unsigned delay_ms = 0;
	int error = 0;
	struct point *point;

	pthread_mutex_lock(&mutex);
	point = point_find(name);
	if (point) {
		point->calls++;
		if (concerns(point->failure, point->calls))
			error = point->errno_value;
		if (concerns(point->delay, point->calls))
			delay_ms = point->delay_ms;
		point->hits += error || delay_ms;
	}
	pthread_mutex_unlock(&mutex);
	if (delay_ms)
		usleep(delay_ms * 1000);
	return error;
}

void fault_point_set(const char *name, uint64_t at_call_n, int errno_value, bool persistent)
{
	SCOPED_LOCK(&mutex);
	struct point *point = point_make(name);

	*point = (struct point){ .name = point->name, .delay = point->delay, .delay_ms = point->delay_ms };
	point->failure = (struct effect){ at_call_n, persistent };
	point->errno_value = errno_value;
}

void fault_point_delay(const char *name, uint64_t at_call_n, unsigned delay_ms, bool persistent)
{
	SCOPED_LOCK(&mutex);
	struct point *point = point_make(name);

	point->delay = (struct effect){ at_call_n, persistent };
	point->delay_ms = delay_ms;
}

uint64_t fault_point_calls(const char *name)
{
	SCOPED_LOCK(&mutex);
	struct point *point = point_find(name);

	return point ? point->calls : 0;
}

uint64_t fault_point_hits(const char *name)
{
	SCOPED_LOCK(&mutex);
	struct point *point = point_find(name);

	return point ? point->hits : 0;
}

void fault_point_clear(void)
{
	SCOPED_LOCK(&mutex);
	point_count = 0;
}

#endif
