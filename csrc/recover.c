/* SPDX-License-Identifier: MIT */
/*
 * recover — go on where a dead daemon stopped.
 *
 * The successor has inherited all descriptors and both memfds. Before any thread runs:
 *   1 close every descriptor that no record names
 *   2 forget clients that were FORMING or DEAD: nothing depends on them
 *   3 open the slot space from the maps of the others; finish the move of slots that was under way
 *   4 make groups, backends and clients from their records; tell pools and backends which objects
 *     the slots name: whatever is not named is free
 * then each client by itself, in a thread of its own, its gate shut (an agent that is stopped keeps only
 * its own client waiting):
 *   5 tell its agent the new epoch. A batch in INTENT means that its MOVE may still be running: wait for
 *     the answer to what the dead daemon posted last, or for the agent's proven death
 *   6 find out where the pages of batches are; apply the events that were read and not applied
 *   7 wake all faults, for those that were read are not told again; open the gate
 *   8 store what is in staging, release the windows
 *   9 resync, as soon as no event is unread: a page that is present is resident, whatever its slot says (its
 *     fill was not settled). Until then such a page is not evicted, and does not fault
 *
 * Nothing is guessed: a slot that names what cannot be (an object twice, an extent outside of a segment)
 * becomes POISONED. What makes the whole state impossible refuses to start.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base.h"
#include "checkpoint.h"
#include "engine_internal.h"
#include "evict.h"
#include "region.h"
#include "sys.h"
#include "worker.h"

#define WAIT_MS 50
#define RESYNC_RANGES 64
#define ADDRESS_FIRST (1UL << 16) /* vm.mmap_min_addr: no page is below */
#define ADDRESS_END ((1UL << 47) - PAGE_BYTES)

/* ---- 1 descriptors ---- */

struct descriptor_set {
	int *fds;
	size_t count, capacity;
};

static int descriptor_keep(struct descriptor_set *set, int fd)
{
	if (fd < 0)
		return 0;
	if (set->count == set->capacity) {
		size_t capacity = set->capacity ? set->capacity * 2 : 256;
		int *fds = realloc(set->fds, capacity * sizeof *fds);

		if (!fds)
			return -ENOMEM;
		set->fds = fds;
		set->capacity = capacity;
	}
	set->fds[set->count++] = fd;
	return 0;
}

static int compare_fds(const void *a, const void *b)
{
	return *(const int *)a - *(const int *)b;
}

static bool client_is_kept(const struct client_record *record)
{
	return record->phase == CLIENT_ARMING || record->phase == CLIENT_LIVE;
}

static int keep_client(struct descriptor_set *set, const struct client_record *record)
{
	uint32_t count = fault_message_count(record);
	int result = descriptor_keep(set, record->events_fd);

	if (result == 0)
		result = descriptor_keep(set, record->trash_fd);
	if (result == 0)
		result = descriptor_keep(set, record->ring_fd);
	if (result == 0)
		result = descriptor_keep(set, record->socket_fd);
	for (uint32_t i = 0; result == 0 && i < count; i++)
		if (record->messages[i].event == UFFD_EVENT_FORK)
			result = descriptor_keep(set, (int)record->messages[i].arg.fork.ufd);
	return result;
}

static int keep_named(struct descriptor_set *set, const struct state *state,
		      const struct engine_config *config)
{
	int result = descriptor_keep(set, config->state_fd);

	if (result == 0)
		result = descriptor_keep(set, config->pool_fd);
	for (uint32_t i = 0; result == 0 && i < config->keep_count; i++)
		result = descriptor_keep(set, config->keep_fds[i]);
	for (unsigned i = 0; result == 0 && i < GROUPS_MAX; i++)
		if (state->groups[i].used)
			result = descriptor_keep(set, state->groups[i].session_fd);
	for (unsigned i = 0; result == 0 && i < BACKENDS_MAX; i++)
		if (state->backends[i].used)
			result = descriptor_keep(set, state->backends[i].fd);
	for (unsigned i = 0; result == 0 && i < CLIENTS_MAX; i++)
		if (client_is_kept(&state->clients[i]))
			result = keep_client(set, &state->clients[i]);
	return result;
}

/* Its agent may take a handshake for complete that the dead daemon did not finish: it is to begin anew. */
static void retire_ring(int fd)
{
	struct vswap_ring *ring = fd < 0 ? MAP_FAILED
					 : mmap(NULL, VSWAP_RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
						fd, 0);

	if (ring == MAP_FAILED)
		return;
	__atomic_store_n(&ring->retired, VSWAP_RETIRED_VOID, __ATOMIC_SEQ_CST);
	__atomic_fetch_add(&ring->epoch, 1, __ATOMIC_SEQ_CST);
	sys_futex_wake(&ring->posted);
	munmap(ring, VSWAP_RING_BYTES);
}

/* What the dead daemon had opened for itself, and connections that had not come to anything. */
static int close_unnamed(const struct state *state, const struct engine_config *config)
{
	struct descriptor_set named = { 0 };
	int result = keep_named(&named, state, config);
	DIR *directory = result == 0 ? opendir("/proc/self/fd") : NULL;
	const struct dirent *entry;

	if (!directory) {
		free(named.fds);
		return result < 0 ? result : -errno;
	}
	qsort(named.fds, named.count, sizeof *named.fds, compare_fds);
	while ((entry = readdir(directory))) {
		int fd = atoi(entry->d_name);

		if (fd > STDERR_FILENO && fd != dirfd(directory) &&
		    !bsearch(&fd, named.fds, named.count, sizeof fd, compare_fds))
			close(fd);
	}
	closedir(directory);
	free(named.fds);
	return 0;
}

static bool descriptor_is(int fd, const char *name)
{
	char path[32], target[64];
	ssize_t length;

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	length = fd < 0 ? -1 : readlink(path, target, sizeof target - 1);
	if (length < 0)
		return false;
	target[length] = '\0';
	return strcmp(target, name) == 0;
}

/* ---- 4 groups, clients, objects ---- */

static int recover_groups(struct engine *engine)
{
	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		int result = engine->state->groups[i].used ? group_adopt(engine, i) : 0;

		if (result < 0)
			return result;
	}
	return 0;
}

/* Tell its pool or backend that this copy is live. */
static int claim_copy(struct client *client, struct slot copy)
{
	struct engine *engine = client->engine;
	int result;

	switch (copy.tag) {
	case SLOT_POOL:
	case SLOT_KEPT_POOL:
		return pool_adopt(client->group->pool, copy.location, copy.units);
	case SLOT_SPILL:
	case SLOT_KEPT_SPILL:
		if (copy.backend >= BACKENDS_MAX || !engine->backends[copy.backend].spill)
			return -EINVAL;
		result = spill_claim(engine->backends[copy.backend].spill, copy.location, copy.units);
		if (result == 0)
			group_spill_changed(client->group, copy.units);
		return result;
	default:
		return 0;
	}
}

/* Every copy that a slot names, once; a slot_claim_fn. */
static int claim_slot(void *context, uint64_t page, struct slot slot)
{
	struct client *client = context;
	uint64_t window = slot.location / BATCH_PAGES_MAX, i = slot.location % BATCH_PAGES_MAX;
	struct batch_record *batch;

	if (slot.tag == SLOT_POOL)
		client_cold_push(client, page >> CLUSTER_SHIFT, slot.units == POOL_UNITS_MAX); /* the writer finds it nowhere else */
	if (slot.tag != SLOT_STAGED)
		return claim_copy(client, slot);
	batch = &client->record->batches[window];
	if (window >= VSWAP_WINDOWS || i >= batch->page_count ||
	    (batch->phase != BATCH_INTENT && batch->phase != BATCH_STAGED))
		return -EINVAL;
	batch->pages[i] = page; /* it may have been moved by a remap that did not come to an end */
	return claim_copy(client, batch->before[i]);
}

/* And not one that has got its number. */
static bool is_same_process(const struct client_record *record)
{
	return record->started && sys_process_start(record->pid) == record->started;
}

/* The supervisor died, too, and what the manager kept is not all: this client's memory cannot be given back. Its
 * agent's own descriptor keeps it waiting rather than reading zeros; it is to end instead. */
static void end_lost_client(struct engine *engine, struct client_record *record)
{
	struct engine_event event = { .kind = ENGINE_EVENT_CLIENT_ERROR, .pid = record->pid,
				      .group = record->group, .a = (uint64_t)(int64_t)-EOWNERDEAD };
	int pidfd = record->pid > 0 ? sys_pidfd(record->pid) : -1;

	if (pidfd >= 0 && is_same_process(record))
		(void)syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
	if (pidfd >= 0)
		close(pidfd);
	__atomic_store_n(&record->phase, CLIENT_DEAD, __ATOMIC_RELEASE);
	engine_event_push(engine, &event);
}

/* Without these what is in its staging could be neither read nor freed. */
static bool has_agent(const struct client_record *record)
{
	return descriptor_is(record->trash_fd, "anon_inode:[userfaultfd]") &&
	       descriptor_is(record->ring_fd, "/memfd:vswap-ring (deleted)");
}

static bool has_process(const struct client_record *record)
{
	return descriptor_is(record->events_fd, "anon_inode:[userfaultfd]") &&
	       (record->trash_fd < 0 || has_agent(record));
}

static int recover_clients(struct engine *engine)
{
	for (unsigned i = 0; i < CLIENTS_MAX; i++) {
		struct client_record *record = &engine->state->clients[i];
		struct client *client;
		int result;

		if (!client_is_kept(record))
			continue;
		if (!engine->groups[record->group] ||
		    (!(engine->groups[record->group]->flags & ENGINE_GROUP_REGIONS) && !has_process(record))) {
			end_lost_client(engine, record);
			continue;
		}
		for (unsigned w = 0; w < VSWAP_WINDOWS; w++)
			record->batches[w].page_count =
				min_of(record->batches[w].page_count, (uint32_t)BATCH_PAGES_MAX);
		result = client_adopt(engine, i, &client);
		if (result < 0)
			return result;
		/* The caller's reference is for the recovery thread. */
	}
	return 0;
}

int recover_descriptors(const struct engine_config *config)
{
	struct state *state = mmap(NULL, STATE_BYTES, PROT_READ, MAP_SHARED | MAP_NORESERVE,
				   config->state_fd, 0);
	int result = 0;

	if (state == MAP_FAILED)
		return -errno;
	if (state->magic == STATE_MAGIC && state->version == STATE_VERSION) {
		for (unsigned i = 0; i < CLIENTS_MAX; i++)
			if (state->clients[i].phase == CLIENT_FORMING && state->clients[i].trash_fd < 0)
				retire_ring(state->clients[i].ring_fd);
		result = close_unnamed(state, config);
	}
	munmap(state, STATE_BYTES);
	return result;
}

/* The slots of a remap that was under way are in two places: finish it before anything is counted. */
static int finish_moves(struct engine *engine)
{
	for (unsigned i = 0; i < engine->clients_end; i++) {
		struct client *client = engine->clients[i];
		struct client_record *record = client ? client->record : NULL;
		int result;

		if (!client || !checkpoint_is_interrupted(client) || record->move.step != record->step)
			continue;
		result = slot_map_move(engine->slots, &record->map, record->move.from_page,
				       record->move.to_page, record->move.pages, client_staged_moved,
				       client);
		if (result < 0)
			return result;
	}
	return 0;
}

static void forget_clients(struct engine *engine)
{
	for (unsigned i = 0; i < CLIENTS_MAX; i++) {
		struct client_record *record = &engine->state->clients[i];

		if (record->phase == CLIENT_UNUSED || client_is_kept(record))
			continue;
		checkpoint_discard(engine->state, engine->state_fd, i);
		__atomic_store_n(&record->phase, CLIENT_UNUSED, __ATOMIC_RELEASE);
	}
}

/*
 * Forks whose event was read and that are not to be applied: the child is there already, or its descriptor was lost
 * with the supervisor and the number is nobody's, or another's. Now, for once the threads run a child may end, and
 * its descriptor's number be another's when its parent's turn comes.
 */
static void settle_forks(struct engine *engine)
{
	for (unsigned i = 0; i < engine->clients_end; i++) {
		struct client_record *record = engine->clients[i] ? engine->clients[i]->record : NULL;
		uint32_t count = record ? fault_message_count(record) : 0;

		for (uint32_t k = 0; k < count; k++) {
			int child_fd = (int)record->messages[k].arg.fork.ufd;

			if (record->messages[k].event == UFFD_EVENT_FORK &&
			    (client_has_descriptor(engine, child_fd) ||
			     !descriptor_is(child_fd, "anon_inode:[userfaultfd]")))
				WRITE_ONCE(record->messages[k].event, UFFD_EVENT_PAGEFAULT);
		}
	}
}

static int claim_all(struct engine *engine)
{
	for (unsigned i = 0; i < engine->clients_end; i++) {
		struct client *client = engine->clients[i];
		int result = client ? slot_map_claim(engine->slots, &client->record->map, claim_slot, client)
				    : 0;

		if (result < 0)
			return result;
	}
	slot_space_claimed(engine->slots);
	pool_space_adopt_end(engine->pool_space);
	for (unsigned i = 0; i < BACKENDS_MAX; i++)
		if (engine->backends[i].spill)
			spill_claims_end(engine->backends[i].spill);
	return 0;
}

int recover_engine(struct engine *engine)
{
	int result = recover_groups(engine);

	for (unsigned i = 0; result == 0 && i < BACKENDS_MAX; i++)
		if (engine->state->backends[i].used)
			result = backend_adopt(engine, i);
		else /* the daemon before may just have removed it */
			spill_lineage_wipe(&engine->state->backends[i].lineage);
	if (result == 0)
		result = recover_clients(engine);
	forget_clients(engine);
	settle_forks(engine);
	if (result == 0)
		result = slot_space_open(engine->state_fd, STATE_SLOTS, (char *)engine->state + STATE_SLOTS,
					 STATE_BYTES - STATE_SLOTS, &engine->slots);
	for (unsigned i = 0; result == 0 && i < engine->clients_end; i++)
		if (engine->clients[i])
			result = slot_space_adopt(engine->slots, &engine->clients[i]->record->map);
	if (result == 0)
		result = slot_space_ready(engine->slots);
	if (result == 0)
		result = finish_moves(engine);
	if (result == 0)
		result = claim_all(engine);
	return result;
}

/* ---- 5 to 8: one client ---- */

/* The ring of the dead daemon: its numbers go on, in an epoch of their own. */
static int attach_ring(struct client *client)
{
	struct vswap_ring *ring = mmap(NULL, VSWAP_RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
				       client->ring_fd, 0);

	if (ring == MAP_FAILED)
		return -errno;
	client->posted = ring->posted;
	client->discoveries = (ring->discoveries + 1) & ~1U; /* one that was under way ends with the next */
	ring->features = VSWAP_FEATURES; /* the daemon before may have been another version */
	ring->epoch = client->engine->state->epoch;
	__atomic_store_n(&client->ring, ring, __ATOMIC_RELEASE);
	return 0;
}

/* A forked child whose handshake was cut off begins it anew. */
static void reset_handshake(struct client *client)
{
	if (client->trash_fd >= 0)
		return;
	if (client->ring_fd >= 0) {
		retire_ring(client->ring_fd);
		if (descriptor_is(client->ring_fd, "/memfd:vswap-ring (deleted)"))
			close(client->ring_fd);
		client->ring_fd = client->record->ring_fd = -1;
	}
	WRITE_ONCE(client->pid, 0);
	client->record->pid = 0;
}

/* 5: until no MOVE of the dead daemon can be running. False when the client is gone. */
static bool wait_for_agent(struct client *client, uint32_t last)
{
	for (;;) {
		int result = client_wait(client, last, WAIT_MS);

		if (result != -ETIMEDOUT)
			return true; /* answered, or the agent is gone and its last command has ended */
		if (READ_ONCE(client->dead) || READ_ONCE(client->engine->stopping))
			return false;
	}
}

static bool has_intent(const struct client *client)
{
	for (unsigned w = 0; w < VSWAP_WINDOWS; w++)
		if (client->record->batches[w].phase == BATCH_INTENT)
			return true;
	return false;
}

/* ---- 9 resync ---- */

/* A page that is present is resident: its fill by a dead daemon was not settled. */
static void resync_page(struct client *client, uint64_t page)
{
	struct slot_space *space = client->engine->slots;
	struct slot slot, next = { .tag = SLOT_NONE };

	if (slot_get(space, &client->record->map, page, &slot) < 0 || !slot_is_swapped(slot.tag) ||
	    slot.tag == SLOT_STAGED)
		return;
	if (slot.tag == SLOT_POOL || slot.tag == SLOT_SPILL)
		next = slot_kept(slot);
	VS_CHECK(slot_set(space, &client->record->map, page, next) == 0);
	if (slot.tag == SLOT_INDIRECT)
		slot_shared_put(space, slot.location, client_free_copy, client);
}

void recover_resync(struct client *client)
{
	struct page_range ranges[RESYNC_RANGES];
	const struct range *armed;

	if (client->pagemap_fd < 0 || client->resync_held)
		return;
	while ((armed = range_set_at(&client->armed, client->resync_at))) {
		uint64_t start = max_of(client->resync_at, armed->start), walk_end = armed->end;
		int count = sys_there_ranges(client->pagemap_fd, start, armed->end, ranges, RESYNC_RANGES,
					      &walk_end);

		/* Mappings that changed since, or are about to: slots are where pages are not, until their
		 * event is read. What was seen before any such change is true. */
		if (count < 0 || sys_userfaultfd_is_changing(client->events_fd))
			return;
		for (int k = 0; k < count; k++)
			for (uint64_t at = ranges[k].start; at < ranges[k].end; at += PAGE_BYTES)
				resync_page(client, page_of(at));
		client->resync_at = max_of(walk_end, start + PAGE_BYTES);
	}
	client->resyncing = false;
}

struct recovery {
	struct client *client;
	struct evictor evictor;
	unsigned windows; /* to be stored or released */
};

/* Before a fork is applied again: nothing may be staged. The gate is held, and is shut besides. */
static void store_staged(void *context)
{
	struct recovery *recovery = context;

	pthread_mutex_unlock(&recovery->client->gate);
	evict_recover_store(recovery->client, &recovery->evictor, &recovery->windows);
	pthread_mutex_lock(&recovery->client->gate);
}

/* 6 and 7; the gate is held. */
static void catch_up(struct recovery *recovery)
{
	struct client *client = recovery->client;
	uint32_t applied = 0;

	/* What cannot be read back is found again: registered mappings keep their slots (look.c). */
	if (checkpoint_read(client, &applied) < 0)
		WRITE_ONCE(client->registered, false);
	if (client->pagemap_fd >= 0 && client->ring)
		evict_recover_batches(client, &recovery->windows);
	fault_replay(client, applied, store_staged, recovery);
	client->resyncing = client->resync_held = true;
	(void)sys_userfaultfd_wake(client->events_fd, ADDRESS_FIRST, ADDRESS_END - ADDRESS_FIRST);
	client_metadata_changed(client);
	client->recovering = false;
}

static void *recovery_main(void *argument)
{
	struct recovery recovery = { .client = argument };
	struct client *client = argument;
	uint32_t last = client->posted - 1; /* command of the dead daemon */

	VS_CHECK(evictor_create(&recovery.evictor) == 0);
	name_this_thread("vswap-recover");
	if (client->ring) {
		/* A POPULATE may be under way, and fault: no MOVE behind that. */
		pthread_mutex_lock(&client->gate);
		client_may_populate(client);
		pthread_mutex_unlock(&client->gate);
	}
	if (!client->ring || !has_intent(client) || wait_for_agent(client, last)) {
		pthread_mutex_lock(&client->gate);
		if (!client->dead)
			catch_up(&recovery);
		pthread_mutex_unlock(&client->gate);
		client_wake(client);
		evict_recover_store(client, &recovery.evictor, &recovery.windows);
		pthread_mutex_lock(&client->gate);
		client->resync_held = false;
		pthread_mutex_unlock(&client->gate);
		client_wake(client);
		if (client->ring && wait_for_agent(client, last))
			evict_recover_release(client, recovery.windows);
	}
	if (READ_ONCE(client->agent_gone) && (client->leaving || sys_userfaultfd_is_gone(client->events_fd)))
		client_bury(client);
	evictor_destroy(&recovery.evictor);
	client_put(client);
	return NULL;
}

static int begin_recovery(struct client *client)
{
	struct client_record *record = client->record;
	int result = 0;

	reset_handshake(client);
	/* Its process may have ended, and left us the event of a fork before: the child is to be served. */
	if (client->pid > 0 && (sys_userfaultfd_is_gone(client->events_fd) || !is_same_process(record) ||
				client_open_proc(client) < 0))
		WRITE_ONCE(client->agent_gone, true);
	if (client->ring_fd >= 0)
		result = attach_ring(client);
	/* Detached (detach.c): all its pages are with it, and its agent has ended, or does so at once. */
	if (result == 0 && client->ring && client->ring->retired == VSWAP_RETIRED_LEFT)
		client->leaving = client->agent_gone = true;
	if (result == 0 && client->trash_fd >= 0 && !client->agent_gone &&
	    client_arm_descriptors(client, record->phase == CLIENT_ARMING, true) < 0)
		WRITE_ONCE(client->agent_gone, true);
	if (result == 0)
		client_set_phase(client, CLIENT_LIVE);
	return result;
}

void recover_start(struct engine *engine)
{
	pthread_attr_t attributes;
	pthread_t thread;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 256 * 1024);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	for (unsigned i = 0; i < CLIENTS_MAX; i++) {
		struct client *client = engine->clients[i];

		if (!client || !client->recovering)
			continue;
		group_pool_changed(client->group);
		if (client_is_region(client)) {
			region_recover(client);
			continue;
		}
		pthread_mutex_lock(&client->gate);
		if (begin_recovery(client) == 0)
			(void)worker_start_all(client);
		pthread_mutex_unlock(&client->gate);
		if (!client->serving || pthread_create(&thread, &attributes, recovery_main, client) != 0) {
			/* Its process has ended; or nothing can be started, then it waits for the next daemon. */
			if (sys_userfaultfd_is_gone(client->events_fd)) {
				client->recovering = false;
				client_bury(client);
			}
			client_put(client);
		}
	}
	pthread_attr_destroy(&attributes);
}
