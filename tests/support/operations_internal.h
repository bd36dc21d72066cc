/* SPDX-License-Identifier: MIT */
/* operations_internal.h — what the program itself shares, and rows do not need. */
#ifndef OPERATIONS_INTERNAL_H
#define OPERATIONS_INTERNAL_H

#include <stdbool.h>

enum backing {
	BACKING_ZERO,
	BACKING_SAME,
	BACKING_POOL,
	BACKING_RAW,   /* in the pool, incompressible */
	BACKING_SPILL,
	BACKING_KEPT,  /* resident, unchanged, with its copy */
	BACKING_RESIDENT,
	BACKING_COUNT
};

extern enum backing backing;
extern bool is_tortured; /* pages leave at any time: what is resident cannot be counted on */

#endif
