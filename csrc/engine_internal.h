/* SPDX-License-Identifier: MIT */
/*
 * engine_internal — what the parts of the data plane share: the engine itself.
 *
 * Lock order (outermost first)
 *   client->gate      one at a time, but fork takes the child's inside the parent's
 *   registry lock     the tables of groups, clients, backends
 *   slot space share_lock, then its lock
 *   pool and spill mutexes
 *   event lock
 */
#ifndef VSWAP_ENGINE_INTERNAL_H
#define VSWAP_ENGINE_INTERNAL_H

#include <pthread.h>

#include "client.h"
#include "engine.h"
#include "spill.h"

#define EVICTORS_MAX 4
#define EVENTS_MAX 256

enum backend_state { BACKEND_ACTIVE, BACKEND_DRAINING, BACKEND_FAILED };

struct backend {
	struct spill *spill; /* NULL: unused */
	int32_t priority;
	bool is_device;
	char path[256];
	uint64_t errors; /* of writing */
	uint32_t state;  /* enum backend_state */
};

struct engine {
	struct state *state;
	int state_fd, pool_fd, device_fd;
	struct pool_space *pool_space;
	struct slot_space *slots;
	uint32_t cpu_count;

	pthread_mutex_t registry;
	struct group *groups[GROUPS_MAX];
	struct client *clients[CLIENTS_MAX];
	unsigned clients_end; /* highest index in use + 1 */
	struct backend backends[BACKENDS_MAX];
	unsigned backend_count;

	bool stopping;
	pthread_t evictors[EVICTORS_MAX], look_thread, writer_thread;
	unsigned evictor_count;
	pthread_mutex_t work_lock; /* evictors and writer wait here */
	pthread_cond_t evict_work, write_work, look_work;
	uint64_t evict_requests, write_requests, look_requests;

	struct engine_counters counters;
	uint64_t latency_ns_sum[ENGINE_BACKING_COUNT];
	uint64_t latency[ENGINE_BACKING_COUNT][ENGINE_LATENCY_BUCKETS];

	pthread_mutex_t event_lock;
	struct engine_event events[EVENTS_MAX];
	unsigned event_head, event_count;
	uint32_t events_dropped;
	int event_fd;
};

#define counter_add(engine, name, count) \
	__atomic_fetch_add(&(engine)->counters.name, (uint64_t)(count), __ATOMIC_RELAXED)

void engine_latency_add(struct engine *engine, enum engine_backing backing, uint64_t ns);
void engine_event_push(struct engine *engine, const struct engine_event *event);

/* Ask for work: evictors look at all groups; the writer looks at all pools. */
void engine_kick_evictors(struct engine *engine);
void engine_kick_writer(struct engine *engine);
/* A client is new: do not sleep over its first megabytes. */
void engine_kick_look(struct engine *engine);

/* Wait until *requests is not *seen, the engine stops, or `ms` have passed. */
void engine_wait_for_requests(struct engine *engine, pthread_cond_t *work, const uint64_t *requests,
			      uint64_t *seen, unsigned ms);

/* Faults of this group that wait for room may try again. */
void engine_room_made(struct engine *engine, struct group *group);

/* fault.c */
void *fault_thread_main(void *client);
/* look.c */
void *look_thread_main(void *engine);
/* Find and register regions of a client now. Gate held. */
void look_discover(struct client *client);
/* reclaim.c */
void *evictor_main(void *engine);
/* Evict everything evictable of one client, once over its address space. Pages evicted. */
uint64_t reclaim_pageout(struct client *client);
/* writeback.c */
void *writer_main(void *engine);
/* True when the group's pages may be written to some backend that has room. */
bool writeback_is_possible(struct engine *engine, const struct group *group);

#endif
