/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "client.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "base.h"
#include "checkpoint.h"
#include "cow.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "fault_point.h"
#include "fill.h"
#include "sys.h"
#include "worker.h"

#define GATE_TRIES 8  /* between two looks at the clock */
#define GATE_PAUSES 8 /* between two tries: about a tenth of a microsecond */
#define AGENT_LOOK_MS 50 /* how often a waiter looks whether the agent is still there */
#define FREED_AT_ONCE 64 /* clusters */
#define ARENA_BYTES_MAX (1UL << 30)

/* ---- registry ---- */

static void close_if_open(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void client_free(struct client *client)
{
	VS_CHECK(client->dead && client->references == 0);
	io_queue_destroy(client->io); /* waits for reads in flight: their buffers are ours */
	fill_free_reads(client);
	if (client->ring)
		munmap(client->ring, VSWAP_RING_BYTES);
	close_if_open(&client->events_fd);
	close_if_open(&client->trash_fd);
	close_if_open(&client->ring_fd);
	close_if_open(&client->wake_fd);
	close_if_open(&client->pagemap_fd);
	close_if_open(&client->maps_fd);
	close_if_open(&client->mem_fd);
	close_if_open(&client->statm_fd);
	close_if_open(&client->pidfd);
	range_set_clear(&client->regions);
	range_set_clear(&client->quarantine);
	range_set_clear(&client->armed);
	probation_clear(&client->probation);
	cow_forget(client);
	cold_destroy(&client->cold);
	cold_destroy(&client->cold_raw);
	free(client->parked);
	pthread_cond_destroy(&client->batches_changed);
	pthread_rwlock_destroy(&client->region_lock);
	pthread_mutex_destroy(&client->gate);
	free(client);
}

static int client_allocate(struct engine *engine, struct client **ret_client)
{
	struct client *client = fault_point("client/create") ? NULL : calloc(1, sizeof *client);

	if (!client)
		return -ENOMEM;
	client->engine = engine;
	client->pidfd = client->events_fd = client->trash_fd = client->ring_fd = -1;
	client->pagemap_fd = client->maps_fd = client->mem_fd = client->statm_fd = -1;
	client->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (client->wake_fd < 0) {
		int error = errno;

		free(client);
		return -error;
	}
	pthread_mutex_init(&client->gate, NULL);
	pthread_rwlock_init(&client->region_lock, NULL);
	pthread_cond_init(&client->batches_changed, NULL);
	*ret_client = client;
	return 0;
}

/* Give it its place in the registry, which is locked. */
static void enlist(struct engine *engine, struct client *client, unsigned index, struct group *group)
{
	client->index = index;
	client->pid = client->record->pid;
	client->group = group;
	client->references = 2; /* the registry's and the caller's */
	engine->clients[index] = client;
	WRITE_ONCE(engine->clients_end, max_of(engine->clients_end, index + 1));
	group->client_count++;
	group->users++; /* until nobody refers to the client */
}

void client_set_phase(struct client *client, enum client_phase phase)
{
	__atomic_store_n(&client->record->phase, phase, __ATOMIC_RELEASE);
}

bool client_has_descriptor(struct engine *engine, int events_fd)
{
	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++)
		if (engine->clients[i] && engine->clients[i]->events_fd == events_fd)
			return true;
	return false;
}

int client_create(struct engine *engine, pid_t pid, struct group *group, struct client **ret_client)
{
	struct client *client = NULL;
	unsigned index = 0;
	uint64_t token;
	int result;

	/* A forked child shows by it who it is: nobody else may guess it. */
	if (getrandom(&token, sizeof token, 0) != sizeof token || token == 0)
		return -EAGAIN;
	result = client_allocate(engine, &client);
	if (result < 0)
		return result;
	SCOPED_LOCK(&engine->registry);
	while (index < CLIENTS_MAX &&
	       (engine->clients[index] ||
		__atomic_load_n(&engine->state->clients[index].phase, __ATOMIC_ACQUIRE) !=
			CLIENT_UNUSED))
		index++;
	if (index == CLIENTS_MAX) {
		close(client->wake_fd);
		free(client);
		return -EMFILE;
	}
	client->record = &engine->state->clients[index];
	memset(client->record, 0, sizeof *client->record);
	client->record->pid = pid;
	client->record->group = group->number;
	client->record->events_fd = client->record->trash_fd = client->record->ring_fd = -1;
	client->record->socket_fd = -1;
	client->record->token = token;
	client->number = engine->state->token_next++;
	client_set_phase(client, CLIENT_FORMING);
	enlist(engine, client, index, group);
	if (!client_is_region(client))
		counter_add(engine, clients_added, 1);
	*ret_client = client;
	return 0;
}

int client_adopt(struct engine *engine, unsigned index, struct client **ret_client)
{
	struct client *client = NULL;
	struct client_record *record = &engine->state->clients[index];
	int result = client_allocate(engine, &client);

	if (result < 0)
		return result;
	client->record = record;
	client->recovering = true;
	client->wiped_unknown = record->pid == 0; /* looked up again: that changes nothing twice */
	client->events_fd = record->events_fd;
	client->trash_fd = record->trash_fd;
	client->ring_fd = record->ring_fd;
	SCOPED_LOCK(&engine->registry);
	enlist(engine, client, index, engine->groups[record->group]);
	*ret_client = client;
	return 0;
}

static struct client *take(struct client *client)
{
	if (client)
		client->references++;
	return client;
}

struct client *client_get(struct engine *engine, uint64_t token)
{
	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++)
		if (engine->clients[i] && engine->clients[i]->record->token == token)
			return take(engine->clients[i]);
	return NULL;
}

struct client *client_get_pid(struct engine *engine, pid_t pid)
{
	struct client *newest = NULL; /* after exec the old address space may still be listed */

	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++) {
		struct client *client = engine->clients[i];

		if (client && client->pid == pid && !client_is_region(client) &&
		    (!newest || client->number > newest->number))
			newest = client;
	}
	return take(newest);
}

struct client *client_get_index(struct engine *engine, unsigned index)
{
	SCOPED_LOCK(&engine->registry);
	return take(engine->clients[index]);
}

void client_put(struct client *client)
{
	struct engine *engine = client->engine;
	struct client_record *record = client->record;
	struct group *group = client->group;
	bool last;

	pthread_mutex_lock(&engine->registry);
	last = --client->references == 0;
	pthread_mutex_unlock(&engine->registry);
	if (!last)
		return;
	checkpoint_discard(engine->state, engine->state_fd, client->index);
	client_free(client);
	pthread_mutex_lock(&engine->registry);
	group->users--;
	pthread_mutex_unlock(&engine->registry);
	__atomic_store_n(&record->phase, CLIENT_UNUSED, __ATOMIC_RELEASE);
}

/* ---- life ---- */

/*
 * A process can have connected as one program and be another one now: a setuid one, whose memory is none of
 * its user's business. What is opened here stays with the address space that was there, and it is the same
 * one before and after.
 */
static int open_memory_files(struct client *client, pid_t thread)
{
	struct address_space_name after;
	int result = sys_name_address_space(thread, &client->address_space);

	if (result < 0)
		return result;
	close_if_open(&client->pagemap_fd);
	close_if_open(&client->maps_fd);
	close_if_open(&client->mem_fd);
	client->pagemap_fd = sys_open_proc(thread, "pagemap");
	client->maps_fd = sys_open_proc(thread, "maps");
	client->mem_fd = sys_open_proc(thread, "mem");
	result = min_of(client->pagemap_fd, min_of(client->maps_fd, client->mem_fd));
	if (result < 0)
		return result;
	result = sys_name_address_space(thread, &after);
	return result == 0 && memcmp(&client->address_space, &after, sizeof after) ? -EPERM : result;
}

int client_open_proc(struct client *client)
{
	pid_t thread = client->pid;
	int statm_fd, result;

	close_if_open(&client->pidfd); /* of a handshake that failed */
	client->pidfd = sys_pidfd(client->pid);
	if (client->pidfd < 0)
		return client->pidfd;
	result = open_memory_files(client, thread);
	if (result < 0 && result != -EPERM) {
		/* Its first thread may have ended already, which has no memory then. */
		thread = sys_live_thread(client->pid);
		result = thread > 0 ? open_memory_files(client, thread) : result;
	}
	if (result < 0)
		return result;
	statm_fd = sys_open_proc(thread, "statm");
	if (statm_fd < 0)
		return statm_fd;
	client->record->started = sys_process_start(client->pid);
	/* Last: the look thread takes it as the sign that there is something to look at. */
	__atomic_store_n(&client->statm_fd, statm_fd, __ATOMIC_RELEASE);
	return 0;
}

int client_make_ring(struct client *client)
{
	int fd = sys_memfd("vswap-ring", VSWAP_RING_BYTES, true);
	struct vswap_ring *ring;
	void *map;

	if (fd < 0)
		return fd;
	map = mmap(NULL, VSWAP_RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED) {
		close(fd);
		return -ENOMEM;
	}
	ring = map;
	ring->magic = VSWAP_MAGIC;
	ring->version = VSWAP_WIRE_VERSION;
	ring->features = VSWAP_FEATURES;
	ring->epoch = client->engine->state->epoch;
	client->ring_fd = client->record->ring_fd = fd;
	__atomic_store_n(&client->ring, ring, __ATOMIC_RELEASE);
	return 0;
}

/* Whether [start, start + bytes) lies in [from, to), for any numbers. */
static bool lies_in(uint64_t start, uint64_t bytes, uint64_t from, uint64_t to)
{
	return start % PAGE_BYTES == 0 && start >= from && start <= to && bytes <= to - start;
}

bool client_arena_is_sane(const struct engine_arena *arena)
{
	uint64_t end = arena->arena + arena->arena_bytes;

	if (arena->arena_bytes > ARENA_BYTES_MAX || arena->arena_bytes % PAGE_BYTES ||
	    !lies_in(arena->arena, arena->arena_bytes, 0, address_of(ADDRESS_PAGES_MAX)) ||
	    !lies_in(arena->beacon, PAGE_BYTES, arena->arena, end) || arena->staging[0] == 0)
		return false;
	for (int i = 0; i < VSWAP_PROTECTIONS; i++) {
		if (arena->staging[i] == 0 && arena->trash[i] == 0)
			continue;
		if (!lies_in(arena->staging[i], VSWAP_WINDOWS * VSWAP_WINDOW_PAGES * PAGE_BYTES, arena->arena, end) ||
		    !lies_in(arena->trash[i], VSWAP_WINDOW_PAGES * PAGE_BYTES, arena->arena, end))
			return false;
	}
	return true;
}

void client_lock_gate(struct client *client, uint64_t spin_ns)
{
	uint64_t until_ns;

	if (pthread_mutex_trylock(&client->gate) == 0)
		return;
	until_ns = sys_now_ns() + spin_ns;
	while (READ_ONCE(client->keeps_cpu) && sys_now_ns() < until_ns)
		for (unsigned i = 0; i < GATE_TRIES; i++) {
			for (unsigned k = 0; k < GATE_PAUSES; k++)
				sys_pause_cpu();
			if (pthread_mutex_trylock(&client->gate) == 0)
				return;
		}
	pthread_mutex_lock(&client->gate);
}

void client_wake(struct client *client) { sys_eventfd_signal(client->wake_fd); }

void client_forget_slots(struct client *client, uint64_t page, uint64_t pages)
{
	struct slot_map *map = &client->record->map;
	uint32_t list = client->forgotten;

	slot_map_detach(client->engine->slots, map, page, page + pages, &list);
	WRITE_ONCE(client->forgotten, list); /* looked at without the gate */
	crash_point(CRASH_SLOTS_DETACHED);
	slot_map_clear(client->engine->slots, map, page, page + pages, client_staged_gone, client_free_copy, client);
}

/* The group has the room at once, not when all of it is done. */
static void free_clusters(struct client *client, uint32_t list)
{
	while (list != 0) {
		list = slot_clusters_free(client->engine->slots, list, FREED_AT_ONCE, client_free_copy, client);
		group_pool_changed(client->group);
		engine_room_made(client->engine, client->group);
	}
}

void client_free_forgotten(struct client *client)
{
	uint32_t list;

	if (READ_ONCE(client->forgotten) == 0)
		return;
	pthread_mutex_lock(&client->gate);
	list = client->forgotten;
	WRITE_ONCE(client->forgotten, 0);
	client->freeing++;
	pthread_mutex_unlock(&client->gate);
	free_clusters(client, list);
	pthread_mutex_lock(&client->gate);
	client->freeing--;
	pthread_cond_broadcast(&client->batches_changed);
	pthread_mutex_unlock(&client->gate);
}

void client_bury(struct client *client)
{
	struct engine *engine = client->engine;
	struct engine_event event = { .kind = ENGINE_EVENT_CLIENT_GONE, .pid = READ_ONCE(client->pid),
				      .group = client->group->number, .a = client->record->token };

	pthread_mutex_lock(&client->gate);
	while (client->freeing > 0) /* into a pool that may end with this client */
		pthread_cond_wait(&client->batches_changed, &client->gate);
	/* A forked child is about to share these slots, and would find none: the look thread comes again. */
	if (READ_ONCE(client->dead) || client->fork_pending || client->recovering) {
		pthread_mutex_unlock(&client->gate);
		return;
	}
	__atomic_store_n(&client->stopping, true, __ATOMIC_RELEASE);
	__atomic_store_n(&client->dead, true, __ATOMIC_SEQ_CST);
	WRITE_ONCE(client->agent_gone, true);
	cow_note_end(client);
	client_set_phase(client, CLIENT_DEAD);
	crash_point(CRASH_CLIENT_DEAD);
	(void)slot_clusters_free(engine->slots, client->forgotten, UINT32_MAX, client_free_copy, client);
	WRITE_ONCE(client->forgotten, 0);
	slot_map_clear(engine->slots, &client->record->map, 0, 2 * ADDRESS_PAGES_MAX, client_staged_gone,
		       client_free_copy, client);
	range_set_clear(&client->regions);
	client->deferred_count = 0;
	if (client->waiting)
		__atomic_fetch_sub(&client->group->waiting, 1, __ATOMIC_RELAXED);
	WRITE_ONCE(client->waiting, false);
	if (client->parked)
		__atomic_fetch_sub(&client->group->parked, 1, __ATOMIC_RELAXED);
	client_set_resident(client, 0, 0);
	client_metadata_changed(client);
	group_pool_changed(client->group);
	pthread_cond_broadcast(&client->batches_changed);
	pthread_mutex_unlock(&client->gate);

	worker_stop_all(client);
	pthread_mutex_lock(&engine->registry);
	engine->clients[client->index] = NULL;
	client->group->client_count--;
	pthread_mutex_unlock(&engine->registry);
	if (!client_is_region(client)) {
		counter_add(engine, clients_gone, 1);
		engine_event_push(engine, &event);
	}
	engine_room_made(engine, client->group);
	client_put(client); /* the registry's reference */
}

void client_set_resident(struct client *client, int64_t pages, int64_t growth_pages)
{
	int64_t old, old_growth;

	if (READ_ONCE(client->leaving))
		pages = growth_pages = 0;
	else if (!READ_ONCE(client->dead))
		pages += READ_ONCE(client->filling_pages);
	old = __atomic_exchange_n(&client->resident_pages, pages, __ATOMIC_SEQ_CST);
	old_growth = __atomic_exchange_n(&client->growth_pages, growth_pages, __ATOMIC_SEQ_CST);
	__atomic_fetch_add(&client->group->resident_pages, pages - old, __ATOMIC_RELAXED);
	__atomic_fetch_add(&client->group->growth_pages, growth_pages - old_growth, __ATOMIC_RELAXED);
}

void client_metadata_changed(struct client *client)
{
	int64_t bytes = (int64_t)slot_map_metadata_bytes(&client->record->map);

	if (bytes == client->metadata_seen)
		return;
	__atomic_fetch_add(&client->group->metadata_bytes, bytes - client->metadata_seen,
			   __ATOMIC_RELAXED);
	client->metadata_seen = bytes;
}

void client_free_copy(void *context, struct slot slot)
{
	struct client *client = context;

	if (slot.tag == SLOT_POOL || slot.tag == SLOT_KEPT_POOL) {
		pool_free(client->group->pool, slot.location, slot.units);
	} else if (slot.tag == SLOT_SPILL || slot.tag == SLOT_KEPT_SPILL) {
		group_spill_changed(client->group, -(int)slot.units);
		spill_free(client->engine->backends[slot.backend].spill, slot.location, slot.units);
	}
}

/* ---- pages on their way out ---- */

void client_staged_gone(void *context, uint64_t page, struct slot slot)
{
	struct client *client = context;
	unsigned window = (unsigned)(slot.location / BATCH_PAGES_MAX);
	unsigned i = slot.location % BATCH_PAGES_MAX;
	struct batch_record *record = &client->record->batches[window];

	(void)page;
	if (slot_is_kept(record->before[i].tag))
		client_free_copy(client, record->before[i]);
	record->before[i] = (struct slot){ .tag = SLOT_NONE };
	record->pages[i] = BATCH_PAGE_GONE;
	client->batches[window].staged &= ~(1ULL << i);
}

void client_staged_moved(void *context, uint64_t page, struct slot slot)
{
	struct client *client = context;

	client->record->batches[slot.location / BATCH_PAGES_MAX].pages[slot.location % BATCH_PAGES_MAX] =
		page;
}

/* ---- what is cold ---- */

void client_cold_push(struct client *client, uint64_t cluster_number, bool is_raw)
{
	const struct slot_map *map = &client->record->map;
	uint64_t now_ms = sys_now_coarse_ms();

	cold_push(&client->cold, client->engine->slots, map, cluster_number, now_ms);
	if (is_raw)
		cold_push(&client->cold_raw, client->engine->slots, map, cluster_number, now_ms);
}

unsigned client_list_cold(struct engine *engine, const struct group *group, unsigned from, struct client **clients,
			  unsigned max)
{
	unsigned count = 0;

	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end && count < max; i++) {
		struct client *client = engine->clients[(from + i) % engine->clients_end];

		if (client && client->group == group && !READ_ONCE(client->dead) &&
		    !client_is_warm(client)) {
			client->references++;
			clients[count++] = client;
		}
	}
	return count;
}

/* ---- the ring ---- */

bool client_is_answered(const struct client *client, uint32_t number)
{
	uint32_t done = __atomic_load_n(&client->ring->done, __ATOMIC_ACQUIRE);

	return (int32_t)(done - number) > 0;
}

uint32_t client_enqueue(struct client *client, const struct vswap_command *command)
{
	uint32_t number = client->posted++;
	struct vswap_command *slot = &client->ring->commands[number % VSWAP_RING_COMMANDS];

	memcpy(slot, command, offsetof(struct vswap_command, runs) +
				      command->run_count * sizeof command->runs[0]);
	__atomic_store_n(&client->ring->posted, client->posted, __ATOMIC_SEQ_CST);
	return number;
}

void client_wake_agent(const struct client *client)
{
	if (__atomic_load_n(&client->ring->agent_sleeping, __ATOMIC_SEQ_CST))
		sys_futex_wake(&client->ring->posted);
}

uint32_t client_post(struct client *client, const struct vswap_command *command)
{
	uint32_t number = client_enqueue(client, command);

	client_wake_agent(client);
	return number;
}

void client_populates(struct client *client, uint32_t number, const struct vswap_command *command)
{
	uint32_t run_count = min_of(READ_ONCE(command->run_count), (uint32_t)VSWAP_RUNS_MAX), left = BATCH_PAGES_MAX;

	for (uint32_t i = 0; i < run_count; i++) {
		struct populate_run *run = &client->populate_runs[i];

		run->first_page = page_of(READ_ONCE(command->runs[i].address));
		run->pages = min_of(READ_ONCE(command->runs[i].pages), left);
		left -= run->pages;
	}
	client->populate_run_count = run_count;
	client->populate_number = number;
	client->populating = true;
}

void client_may_populate(struct client *client)
{
	static const struct vswap_command nothing;
	const struct vswap_command *found = &nothing;
	uint32_t last = client->posted - 1;

	for (uint32_t back = 0; back < VSWAP_RING_COMMANDS && !client_is_answered(client, last - back); back++) {
		const struct vswap_command *command = &client->ring->commands[(last - back) % VSWAP_RING_COMMANDS];

		if (READ_ONCE(command->operation) == VSWAP_POPULATE) {
			found = command;
			break;
		}
	}
	client_populates(client, last, found);
}

bool client_is_populated(const struct client *client, uint64_t page)
{
	for (unsigned i = 0; client->populating && i < client->populate_run_count; i++)
		if (page - client->populate_runs[i].first_page < client->populate_runs[i].pages)
			return true;
	return false;
}

int client_answer(const struct client *client, uint32_t number)
{
	bool is_gone = __atomic_load_n(&client->agent_gone, __ATOMIC_ACQUIRE) || sys_pidfd_is_dead(client->pidfd);

	/* Agent gone: its last store to `done` is visible by now. */
	if (client_is_answered(client, number))
		return 0;
	return is_gone ? -EPIPE : -ETIMEDOUT;
}

int client_wait(struct client *client, uint32_t number, unsigned timeout_ms)
{
	uint64_t deadline_ns = sys_now_ns() + timeout_ms * 1000000ULL;

	while (!client_is_answered(client, number)) {
		bool is_woken;
		uint32_t done;

		__atomic_store_n(&client->ring->daemon_waiting, 1, __ATOMIC_SEQ_CST);
		done = __atomic_load_n(&client->ring->done, __ATOMIC_SEQ_CST);
		if ((int32_t)(done - number) > 0)
			break;
		is_woken = sys_futex_wait(&client->ring->done, done, AGENT_LOOK_MS) == 0;
		if (!is_woken && client_answer(client, number) == -EPIPE)
			return -EPIPE;
		/* Woken or not: the word is the client's too, which may wake us for ever. */
		if (sys_now_ns() > deadline_ns && !client_is_answered(client, number))
			return -ETIMEDOUT;
	}
	return 0;
}

void client_reap_releases(struct client *client)
{
	uint64_t pages = 0;

	if (!client->ring)
		return;
	for (unsigned i = 0; i < VSWAP_WINDOWS; i++) {
		struct batch *batch = &client->batches[i];

		if (!batch->releasing || !client_is_answered(client, batch->release_number))
			continue;
		if (client->ring->commands[batch->release_number % VSWAP_RING_COMMANDS].error) {
			/* Pages left in the window would be taken for those of the next batch. */
			struct vswap_command again = {
				.operation = VSWAP_RELEASE,
				.window = i,
				.protection = client->record->batches[i].protection,
			};

			batch->release_number = client_post(client, &again);
			continue;
		}
		pages += batch->resident_pages;
		*batch = (struct batch){ 0 };
		client->record->batches[i].phase = BATCH_FREE;
	}
	if (pages == 0)
		return;
	group_uncharge(client->group, pages);
	__atomic_fetch_sub(&client->resident_pages, (int64_t)pages, __ATOMIC_RELAXED);
	__atomic_fetch_add(&client->group->progress, pages, __ATOMIC_RELAXED);
}
