/* SPDX-License-Identifier: MIT */
#include "crash_point.h"

#ifdef VSWAP_FAULT_POINTS

#include <signal.h>
#include <string.h>
#include <unistd.h>

static const char *const names[CRASH_POINT_COUNT] = {
#define CRASH_NAME(name, meaning) [CRASH_##name] = #name,
	CRASH_POINTS(CRASH_NAME)
};

static enum crash_point armed = CRASH_POINT_COUNT;
static unsigned calls_left;

void crash_point(enum crash_point point)
{
	if (__atomic_load_n(&armed, __ATOMIC_RELAXED) == point &&
	    __atomic_sub_fetch(&calls_left, 1, __ATOMIC_RELAXED) == 0) {
		(void)kill(getpid(), SIGKILL);
		for (;;)
			(void)pause();
	}
}

int crash_point_arm(const char *name, unsigned at_call_n)
{
	for (enum crash_point i = 0; i < CRASH_POINT_COUNT; i++)
		if (strcmp(names[i], name) == 0) {
			calls_left = at_call_n;
			__atomic_store_n(&armed, i, __ATOMIC_RELEASE);
			return 0;
		}
	return -1;
}

const char *crash_point_name(enum crash_point point) { return names[point]; }

#endif
