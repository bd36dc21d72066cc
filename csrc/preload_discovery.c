/* SPDX-License-Identifier: MIT */
/* preload_discovery — see preload_discovery.h. */
#include "preload_discovery.h"

#include <stdbool.h>

#include "preload_ring.h"

#define WAIT_NS 1000000ULL
#define WAITS_MAX 200 /* a daemon that is dead or held up looks later, as ever */

/* `discoveries` from which one has come to its end that began after now. */
static uint32_t number_wanted(uint32_t now) { return now + (now & 1 ? 3 : 2); }

static void wait_for_one(struct vswap_ring *ring)
{
	uint32_t now = atomic_get(&ring->discoveries), wanted = number_wanted(now);

	atomic_set(&ring->discovery_asked, 1);
	for (unsigned i = 0; i < WAITS_MAX && (int32_t)(now - wanted) < 0; i++) {
		(void)raw_futex_wait(&ring->discoveries, now, WAIT_NS, 0);
		now = atomic_get(&ring->discoveries);
	}
}

void discovery_wait(void)
{
	struct replacement replacement;
	struct vswap_ring *ring;

	replace_begin(&replacement);
	ring = replacement.engaged ? ring_enter() : NULL;
	if (ring && ring->features & VSWAP_FEATURE_DISCOVERY && atomic_get(&ring->is_near))
		wait_for_one(ring);
	if (ring)
		ring_leave();
	replace_end(&replacement);
}
