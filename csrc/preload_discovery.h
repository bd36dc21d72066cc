/* SPDX-License-Identifier: MIT */
/* preload_discovery — a large mapping is registered before the program has it (wire.h: a large mapping near the limit). */
#ifndef VSWAP_PRELOAD_DISCOVERY_H
#define VSWAP_PRELOAD_DISCOVERY_H

#pragma GCC visibility push(hidden)

/* Wait until the daemon has looked for mappings once more, if the group is near its limit: a fifth of a second at most. */
void discovery_wait(void);

#pragma GCC visibility pop

#endif
