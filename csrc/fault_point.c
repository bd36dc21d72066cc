/* SPDX-License-Identifier: MIT */
/*
 * fault_point — see fault_point.h. One small table under one mutex: only test builds have it.
 */
#include "fault_point.h"

#include <pthread.h>
#include <string.h>

#include "base.h"

#ifdef VSWAP_FAULT_POINTS

struct point {
	const char *name;
	uint64_t calls, hits;
	uint64_t at_call_n;
	int errno_value;
	bool persistent;
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

int fault_point(const char *name)
{
	SCOPED_LOCK(&mutex);
	struct point *point = point_find(name);

	if (!point)
		return 0;
	point->calls++;
	if (point->errno_value == 0 || point->calls < point->at_call_n ||
	    (point->calls > point->at_call_n && !point->persistent))
		return 0;
	point->hits++;
	return point->errno_value;
}

void fault_point_set(const char *name, uint64_t at_call_n, int errno_value, bool persistent)
{
	SCOPED_LOCK(&mutex);
	struct point *point = point_find(name);

	if (!point) {
		VS_CHECK(point_count < FAULT_POINTS_MAX);
		point = &points[point_count++];
	}
	*point = (struct point){
		.name = name,
		.at_call_n = at_call_n,
		.errno_value = errno_value,
		.persistent = persistent,
	};
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
