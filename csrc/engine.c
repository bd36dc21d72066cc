/* SPDX-License-Identifier: MIT */
/*
 * engine — lifecycle and ownership of the data plane, and what the control plane asks of it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

#include "base.h"
#include "checkpoint.h"
#include "crash_point.h"
#include "engine_internal.h"
#include "fill.h"
#include "region.h"
#include "shelve.h"
#include "sys.h"
#include "tier.h"
#include "worker.h"

#define CHANGEABLE_FLAGS (ENGINE_GROUP_NO_SPILL | ENGINE_GROUP_NO_RECOMPRESS)
#define COOL_MS 60000
#define FILL_BYTES_PER_MS (8ULL << 20) /* a CPU; 12 MiB by one thread, with huge pages that were in use just before */
#define FILL_CPUS_MAX 8                /* more share the same memory */
#define GROUP_LEAVE_MS 20 /* how long a group is waited for that something works on */

/* ---- small services for the other files ---- */

double engine_latency_bucket_us(int bucket)
{
	return exp2((double)(bucket + 1) / 4.0); /* four buckets an octave, from 1.19 us to 65 ms */
}

void engine_latency_add(struct engine *engine, enum engine_backing backing, uint64_t ns)
{
	double us = (double)ns / 1000.0;
	int bucket = us <= 1.0 ? 0 : (int)(log2(us) * 4.0);

	bucket = min_of(bucket, ENGINE_LATENCY_BUCKETS - 1);
	__atomic_fetch_add(&engine->state->latency[backing][bucket], 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&engine->state->latency_ns_sum[backing], ns, __ATOMIC_RELAXED);
}

void engine_event_push(struct engine *engine, const struct engine_event *event)
{
	pthread_mutex_lock(&engine->event_lock);
	if (engine->event_count == EVENTS_MAX) {
		engine->events_dropped++;
	} else {
		engine->events[(engine->event_head + engine->event_count++) % EVENTS_MAX] = *event;
	}
	pthread_mutex_unlock(&engine->event_lock);
	sys_eventfd_signal(engine->event_fd);
}

int engine_event_fd(struct engine *engine) { return engine->event_fd; }

int engine_event_next(struct engine *engine, struct engine_event *ret_event)
{
	SCOPED_LOCK(&engine->event_lock);
	if (engine->event_count == 0) {
		sys_eventfd_drain(engine->event_fd);
		return 0;
	}
	*ret_event = engine->events[engine->event_head];
	engine->event_head = (engine->event_head + 1) % EVENTS_MAX;
	engine->event_count--;
	return 1;
}

void engine_want_room(const struct client *client)
{
	struct engine *engine = client->engine;
	const struct group *group = client->group;

	if (READ_ONCE(client->keeps_cpu) && READ_ONCE(group->waiting) == 0 &&
	    group_room_bytes(group) >= (int64_t)group_reserve_bytes(group) / 2)
		work_ask_one(&engine->evicting, engine->evictor_count);
	else
		work_ask(&engine->evicting);
}

uint64_t engine_fill_bytes_per_ms(const struct engine *engine)
{
	return FILL_BYTES_PER_MS * min_of(engine->cpu_count, (uint32_t)FILL_CPUS_MAX);
}

void engine_room_made(struct engine *engine, struct group *group)
{
	if (READ_ONCE(group->waiting) == 0 || group_charge_room_bytes(group) < (int64_t)PAGE_BYTES)
		return;
	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++) {
		struct client *client = engine->clients[i];

		if (client && client->group == group && READ_ONCE(client->waiting))
			client_wake(client);
	}
}

/* ---- create and destroy ---- */

int engine_make_memfds(int *ret_state_fd, int *ret_pool_fd)
{
	int state_fd = sys_memfd("vswap-state", STATE_BYTES, false);
	int pool_fd = state_fd < 0 ? state_fd : sys_memfd("vswap-pool", 0, false);

	if (pool_fd < 0) {
		if (state_fd >= 0)
			close(state_fd);
		return pool_fd;
	}
	*ret_state_fd = state_fd;
	*ret_pool_fd = pool_fd;
	return 0;
}

/* Map the state, and begin it or see that it is one to go on with. */
static int make_state(struct engine *engine, char *message)
{
	struct state *state = mmap(NULL, STATE_BYTES, PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_NORESERVE, engine->state_fd, 0);

	if (state == MAP_FAILED)
		return -errno;
	(void)madvise(state, STATE_BYTES, MADV_DONTDUMP); /* there are keys in it */
	engine->state = state;
	engine->is_successor = __atomic_load_n(&state->magic, __ATOMIC_ACQUIRE) == STATE_MAGIC;
	if (engine->is_successor && state->version != STATE_VERSION) {
		snprintf(message, 256, "state format %u found, this version reads %u; start the version that wrote it",
			 state->version, STATE_VERSION);
		return -EPROTO;
	}
	state->epoch++;
	if (engine->is_successor)
		return 0;
	state->version = STATE_VERSION;
	state->token_next = 1;
	if (getrandom(state->secret, CODEC_SECRET_BYTES, 0) != CODEC_SECRET_BYTES)
		return -EIO;
	__atomic_store_n(&state->magic, STATE_MAGIC, __ATOMIC_RELEASE);
	return slot_space_create(engine->state_fd, STATE_SLOTS, (char *)state + STATE_SLOTS, STATE_BYTES - STATE_SLOTS,
				 &engine->slots);
}

static int make_pool(struct engine *engine, uint64_t capacity_bytes)
{
	struct sysinfo info;

	if (capacity_bytes == 0 && sysinfo(&info) == 0)
		capacity_bytes = (uint64_t)info.totalram * info.mem_unit;
	return pool_space_create(engine->pool_fd, capacity_bytes, &engine->pool_space);
}

static int start_threads(struct engine *engine, uint32_t evictor_count)
{
	pthread_attr_t attributes;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 256 * 1024);
	error = pthread_create(&engine->look_thread, &attributes, look_thread_main, engine);
	if (error == 0)
		error = pthread_create(&engine->recompressor_thread, &attributes, recompressor_main, engine);
	if (error == 0)
		error = pthread_create(&engine->host.thread, &attributes, host_thread_main, engine);
	if (error == 0)
		error = pthread_create(&engine->members_thread, &attributes, members_thread_main, engine);
	for (engine->evictor_count = 0; error == 0 && engine->evictor_count < evictor_count;
	     engine->evictor_count += error == 0)
		error = pthread_create(&engine->evictors[engine->evictor_count], &attributes,
				       evictor_main, engine);
	pthread_attr_destroy(&attributes);
	for (unsigned i = 0; error == 0 && i < BACKENDS_MAX; i++) { /* of the daemon before */
		struct writer *writer;

		if (!engine->backends[i].spill)
			continue;
		error = -writer_create(engine, &writer);
		if (error == 0)
			writer_begin(writer, i);
	}
	return -error;
}

/* A fork cannot be refused, a new client can: a part of the descriptors is kept for forked children. The kernel
 * gives the lowest number that is free, so a number says how many there are. */
static int descriptors_for_new(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur > 1 << 30)
		return 1 << 30;
	return (int)(limit.rlim_cur - min_of(limit.rlim_cur / 4, (rlim_t)DESCRIPTORS_RESERVED_MAX));
}

int engine_create(const struct engine_config *config, struct engine **ret_engine, char *message)
{
	struct engine *engine = calloc(1, sizeof *engine);
	uint32_t evictors = config->evictor_count;
	int result;

	if (!engine)
		return -ENOMEM;
	sys_prefer_this_thread(); /* and all that it starts */
	if (sys_lock_memory())
		shelve_unlock();
	if (config->state_fd) {
		result = recover_descriptors(config);
		if (result < 0) {
			snprintf(message, 256, "cannot read the state: %s", strerror(-result));
			return result;
		}
	}
	engine->accept_percent = config->accept_percent ? min_of(config->accept_percent, 100u) : 100;
	engine->recompress_age_ms = config->recompress_age_ms;
	engine->cpu_count = (uint32_t)max_of(sysconf(_SC_NPROCESSORS_ONLN), 1L);
	result = sys_probe(&engine->device_fd, message);
	if (result < 0) {
		free(engine);
		return result;
	}
	if (evictors == 0)
		evictors = engine->cpu_count;
	evictors = min_of(evictors, (uint32_t)EVICTORS_MAX);
	pthread_mutex_init(&engine->registry, NULL);
	pthread_mutex_init(&engine->event_lock, NULL);
	pthread_mutex_init(&engine->region_scratch_lock, NULL);
	block_cache_init(&engine->expand_blocks, FILL_PAGES_MAX * PAGE_BYTES);
	block_cache_init(&engine->read_blocks, READ_BLOCK_BYTES);
	work_init(&engine->evicting);
	pageouts_init(&engine->pageouts);
	work_init(&engine->writing);
	work_init(&engine->looking);
	work_init(&engine->recompressing);
	work_init(&engine->pressing);
	work_init(&engine->counting);
	host_create(&engine->host);
	message[0] = '\0';
	engine->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	engine->descriptors_end = descriptors_for_new();
	engine->state_fd = config->state_fd;
	engine->pool_fd = config->pool_fd;
	result = config->state_fd ? 0 : engine_make_memfds(&engine->state_fd, &engine->pool_fd);
	if (result == 0)
		result = make_state(engine, message);
	if (result == 0)
		result = make_pool(engine, config->pool_capacity_bytes);
	if (result == 0 && engine->is_successor)
		result = recover_engine(engine);
	if (result == 0) {
		awake_start(&engine->awake, engine->cpu_count);
		result = start_threads(engine, evictors);
	}
	if (result < 0) {
		if (!message[0])
			snprintf(message, 256, "the engine cannot start: %s", strerror(-result));
		return result; /* the caller ends; nothing is worth undoing piece by piece */
	}
	if (engine->is_successor)
		recover_start(engine);
	*ret_engine = engine;
	return 0;
}

int engine_check_state(int32_t pid, int state_fd)
{
	int pidfd = sys_pidfd(pid);
	int fd = pidfd < 0 ? pidfd : (int)syscall(SYS_pidfd_getfd, pidfd, state_fd, 0);
	struct { uint64_t magic; uint32_t version; } head = { 0 };
	int result = 0;

	if (fd < 0)
		result = pidfd < 0 ? pidfd : -errno;
	else if (pread(fd, &head, sizeof head, 0) != (ssize_t)sizeof head)
		result = -EIO;
	else if (head.magic != STATE_MAGIC || head.version != STATE_VERSION)
		result = -EPROTO;
	if (fd >= 0)
		close(fd);
	if (pidfd >= 0)
		close(pidfd);
	return result;
}

int engine_is_successor(struct engine *engine) { return engine->is_successor; }

static void destroy_clients(struct engine *engine)
{
	for (unsigned i = 0; i < READ_ONCE(engine->clients_end); i++) {
		struct client *client = client_get_index(engine, i);

		if (!client)
			continue;
		client_bury(client);
		client_put(client);
	}
	/* Fault threads hold the last references. */
	for (unsigned i = 0; i < engine->clients_end; i++)
		while (__atomic_load_n(&engine->state->clients[i].phase, __ATOMIC_ACQUIRE) != CLIENT_UNUSED)
			sys_sleep_ms(1);
}

void engine_destroy(struct engine *engine)
{
	if (!engine)
		return;
	__atomic_store_n(&engine->stopping, true, __ATOMIC_RELEASE);
	work_ask(&engine->evicting);
	work_ask(&engine->writing);
	work_ask(&engine->looking);
	work_ask(&engine->recompressing);
	work_ask(&engine->pressing);
	work_ask(&engine->counting);
	for (unsigned i = 0; i < engine->evictor_count; i++)
		pthread_join(engine->evictors[i], NULL);
	for (unsigned i = 0; i < BACKENDS_MAX; i++)
		writer_destroy(engine->backends[i].writer);
	pthread_join(engine->recompressor_thread, NULL);
	pthread_join(engine->look_thread, NULL);
	pthread_join(engine->host.thread, NULL);
	pthread_join(engine->members_thread, NULL);
	destroy_clients(engine);
	awake_stop(&engine->awake);
	host_destroy(&engine->host);
	region_scratch_destroy(engine);
	block_cache_destroy(&engine->expand_blocks);
	block_cache_destroy(&engine->read_blocks);
	ghosts_destroy(&engine->waited_for);
	for (unsigned i = 0; i < GROUPS_MAX; i++)
		if (engine->groups[i]) {
			pool_destroy(engine->groups[i]->pool);
			ghosts_destroy(&engine->groups[i]->ghosts);
			members_destroy(engine->groups[i]->members);
			free(engine->groups[i]);
		}
	for (unsigned i = 0; i < BACKENDS_MAX; i++)
		spill_destroy(engine->backends[i].spill);
	pool_space_destroy(engine->pool_space);
	slot_space_destroy(engine->slots);
	munmap(engine->state, STATE_BYTES);
	close(engine->state_fd);
	close(engine->pool_fd);
	close(engine->device_fd);
	close(engine->event_fd);
	free(engine);
}

int engine_userfaultfd_device(struct engine *engine) { return engine->device_fd; }

/* ---- groups ---- */

struct group *group_at(const struct engine *engine, int group)
{
	return group >= 0 && group < GROUPS_MAX ? engine->groups[group] : NULL;
}

int engine_group_find(struct engine *engine, const char *name)
{
	SCOPED_LOCK(&engine->registry);
	for (int i = 0; i < GROUPS_MAX; i++)
		if (engine->groups[i] && strcmp(engine->groups[i]->name, name) == 0)
			return i;
	return -ENOENT;
}

/* A group with a pool, in no table yet. */
static int group_make(struct engine *engine, const struct group_record *record, struct group **ret_group)
{
	struct group *group = calloc(1, sizeof *group);
	int result;

	if (!group)
		return -ENOMEM;
	result = ghosts_create(&group->ghosts, record->limit_bytes);
	if (result == 0)
		result = pool_create(engine->pool_space, &group->pool);
	if (result < 0) {
		ghosts_destroy(&group->ghosts);
		free(group);
		return result;
	}
	memcpy(group->name, record->name, sizeof group->name);
	group->limit_bytes = record->limit_bytes;
	group->pool_limit_bytes = record->pool_limit_bytes;
	group->spill_limit_bytes = record->spill_limit_bytes;
	group->flags = record->flags;
	group->usage_bytes_max = record->usage_bytes_max;
	group->swapped_pages_max = record->swapped_pages_max;
	group->faults = record->faults;
	group->stream_percent = 50;
	*ret_group = group;
	return 0;
}

int group_adopt(struct engine *engine, unsigned number)
{
	int result = group_make(engine, &engine->state->groups[number], &engine->groups[number]);

	if (result == 0)
		engine->groups[number]->number = (int)number;
	return result;
}

int engine_group_create(struct engine *engine, const char *name, uint64_t limit_bytes,
			uint64_t pool_limit_bytes, uint32_t flags)
{
	struct group_record record = { .flags = flags, .limit_bytes = limit_bytes,
				       .pool_limit_bytes = pool_limit_bytes, .session_fd = -1 };
	struct group *group;
	int number = 0, result;

	if (strlen(name) == 0 || strlen(name) >= sizeof record.name || limit_bytes < (1 << 20))
		return -EINVAL;
	if (engine_group_find(engine, name) >= 0)
		return -EEXIST;
	strcpy(record.name, name);
	result = group_make(engine, &record, &group);
	if (result < 0)
		return result;
	SCOPED_LOCK(&engine->registry);
	while (number < GROUPS_MAX && engine->groups[number])
		number++;
	if (number == GROUPS_MAX) {
		pool_destroy(group->pool);
		ghosts_destroy(&group->ghosts);
		free(group);
		return -EMFILE;
	}
	group->number = number;
	engine->groups[number] = group;
	engine->state->groups[number] = record;
	__atomic_store_n(&engine->state->groups[number].used, 1, __ATOMIC_RELEASE);
	return number;
}

int engine_group_label(struct engine *engine, int number, const char *label, int session_fd)
{
	SCOPED_LOCK(&engine->registry);
	struct group_record *record;

	if (!group_at(engine, number))
		return -ENOENT;
	if (strlen(label) >= sizeof record->label)
		return -EMSGSIZE;
	/* A death in between leaves a group of nobody, which ends with its last client. */
	record = &engine->state->groups[number];
	record->label[0] = '\0';
	record->session_fd = session_fd;
	strcpy(record->label + 1, label[0] ? label + 1 : "");
	__atomic_store_n(&record->label[0], label[0], __ATOMIC_RELEASE);
	return 0;
}

int engine_group_set_limit(struct engine *engine, int number, uint64_t limit_bytes,
			   uint64_t pool_limit_bytes)
{
	SCOPED_LOCK(&engine->registry);
	struct group *group = group_at(engine, number);

	if (!group || limit_bytes < (1 << 20))
		return group ? -EINVAL : -ENOENT;
	group->pool_limit_bytes = engine->state->groups[number].pool_limit_bytes = pool_limit_bytes;
	engine->state->groups[number].limit_bytes = limit_bytes;
	WRITE_ONCE(group->limit_bytes, limit_bytes);
	return 0;
}

int engine_group_set_spill_limit(struct engine *engine, int number, uint64_t spill_limit_bytes)
{
	SCOPED_LOCK(&engine->registry);
	struct group *group = group_at(engine, number);

	if (!group)
		return -ENOENT;
	engine->state->groups[number].spill_limit_bytes = spill_limit_bytes;
	WRITE_ONCE(group->spill_limit_bytes, spill_limit_bytes);
	return 0;
}

int engine_group_set_flags(struct engine *engine, int number, uint32_t set, uint32_t clear)
{
	SCOPED_LOCK(&engine->registry);
	struct group *group = group_at(engine, number);
	uint32_t flags;

	if (!group || (set | clear) & ~CHANGEABLE_FLAGS)
		return group ? -EINVAL : -ENOENT;
	flags = (group->flags & ~clear) | set;
	engine->state->groups[number].flags = flags;
	WRITE_ONCE(group->flags, flags);
	return 0;
}

int engine_group_destroy(struct engine *engine, int number)
{
	struct group *group;

	pthread_mutex_lock(&engine->registry);
	group = group_at(engine, number);
	for (unsigned ms = 0; ms < GROUP_LEAVE_MS && group && !group->client_count && group->users; ms++) {
		/* An evictor or a writer is just leaving a group without clients. */
		pthread_mutex_unlock(&engine->registry);
		sys_sleep_ms(1);
		pthread_mutex_lock(&engine->registry);
		group = group_at(engine, number);
	}
	/* Or a writer waits for a device that hangs: nobody is to wait for that with it. */
	if (!group || group->client_count || group->users) {
		pthread_mutex_unlock(&engine->registry);
		return group ? -EBUSY : -ENOENT;
	}
	engine->groups[number] = NULL;
	__atomic_store_n(&engine->state->groups[number].used, 0, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&engine->registry);
	pool_destroy(group->pool);
	ghosts_destroy(&group->ghosts);
	members_destroy(group->members);
	free(group);
	return 0;
}

/* ---- backends ---- */

/* A segment at a time is written: less than one a second would be none for a while, and reclaim would give up. */
static bool rate_is_possible(uint64_t rate_bytes) { return rate_bytes == 0 || rate_bytes >= SEGMENT_BYTES; }

static int backend_make(struct backend_record *record, struct backend *ret_backend)
{
	struct backend backend = { .priority = record->priority, .rate_bytes = record->rate_bytes };
	struct stat status;
	int result;

	if (fstat(record->fd, &status) != 0)
		return -errno;
	backend.is_device = S_ISBLK(status.st_mode);
	memcpy(backend.path, record->path, sizeof backend.path);
	result = spill_create(record->fd, record->size_bytes, &record->lineage, &backend.spill);
	if (result < 0)
		return result;
	if (spill_is_sealed(backend.spill))
		sys_refuse_core_dumps(); /* the cipher's working state and pages on their way are all over the memory */
	if (record->flags & ENGINE_BACKEND_KEEP_BLOCKS)
		spill_keep_blocks(backend.spill);
	*ret_backend = backend;
	return 0;
}

int backend_adopt(struct engine *engine, unsigned number)
{
	struct backend backend;
	int result = backend_make(&engine->state->backends[number], &backend);

	if (result == 0)
		backend_install(engine, number, &backend);
	return result;
}

/* The number, or -errno: then the descriptor is still the caller's. */
static int add_backend(struct engine *engine, const struct backend_record *wanted, struct writer *writer)
{
	SCOPED_LOCK(&engine->registry);
	struct backend_record *record;
	struct backend backend;
	unsigned number = 0;
	int result;

	while (number < BACKENDS_MAX && engine->backends[number].spill)
		number++;
	if (number == BACKENDS_MAX)
		return -EMFILE;
	record = &engine->state->backends[number];
	*record = *wanted;
	result = backend_make(record, &backend);
	if (result < 0) {
		spill_lineage_wipe(&record->lineage);
		return result;
	}
	__atomic_store_n(&record->used, 1, __ATOMIC_RELEASE);
	backend_install(engine, number, &backend);
	writer_begin(writer, number);
	return (int)number;
}

int engine_backend_add(struct engine *engine, int fd, const char *path, uint64_t size_bytes,
		       int32_t priority, uint32_t flags, uint64_t rate_bytes)
{
	struct backend_record record = { .fd = fd, .priority = priority, .flags = flags,
					 .size_bytes = size_bytes, .rate_bytes = rate_bytes };
	struct writer *writer;
	int result = rate_is_possible(rate_bytes) ? writer_create(engine, &writer) : -EINVAL;

	if (result < 0)
		return result;
	record.lineage.is_sealed = flags & ENGINE_BACKEND_ENCRYPT ? 1 : 0;
	snprintf(record.path, sizeof record.path, "%s", path);
	result = add_backend(engine, &record, writer);
	if (result < 0)
		writer_destroy(writer);
	return result;
}

int engine_backend_set_priority(struct engine *engine, int number, int32_t priority)
{
	SCOPED_LOCK(&engine->registry);

	if (number < 0 || number >= BACKENDS_MAX || !engine->backends[number].spill)
		return -ENOENT;
	/* A successor goes by the record: first that, or it would undo what was seen to be so. */
	WRITE_ONCE(engine->state->backends[number].priority, priority);
	WRITE_ONCE(engine->backends[number].priority, priority);
	return 0;
}

int engine_backend_set_rate(struct engine *engine, int number, uint64_t rate_bytes)
{
	SCOPED_LOCK(&engine->registry);

	if (number < 0 || number >= BACKENDS_MAX || !engine->backends[number].spill)
		return -ENOENT;
	if (!rate_is_possible(rate_bytes))
		return -EINVAL;
	WRITE_ONCE(engine->state->backends[number].rate_bytes, rate_bytes);
	WRITE_ONCE(engine->backends[number].rate_bytes, rate_bytes);
	return 0;
}

void engine_set_tiering(struct engine *engine, int on)
{
	SCOPED_LOCK(&engine->registry);
	if (on && !engine->waited_for.entries)
		(void)ghosts_create(&engine->waited_for, TIER_GHOSTS * PAGE_BYTES); /* without memory less goes up */
	__atomic_store_n(&engine->tiering, on != 0, __ATOMIC_RELEASE);
}

/* ---- clients ---- */

int engine_client_begin(struct engine *engine, int32_t pid, int number, uint64_t *ret_token,
			int *ret_ring_fd)
{
	struct client *client;
	struct group *group;
	int result;

	pthread_mutex_lock(&engine->registry);
	group = group_at(engine, number);
	if (group && group->flags & ENGINE_GROUP_REGIONS)
		group = NULL;
	if (group)
		group->users++;
	pthread_mutex_unlock(&engine->registry);
	if (!group)
		return -ENOENT;
	result = client_create(engine, pid, group, &client);
	pthread_mutex_lock(&engine->registry);
	group->users--;
	pthread_mutex_unlock(&engine->registry);
	if (result < 0)
		return result;
	result = client_open_proc(client);
	if (result == 0)
		result = client_make_ring(client);
	if (result == 0 && client->ring_fd >= engine->descriptors_end)
		result = -EMFILE;
	if (result < 0) {
		client_bury(client);
	} else {
		*ret_token = client->record->token;
		*ret_ring_fd = client->ring_fd;
	}
	crash_point(CRASH_CLIENT_BEGUN);
	client_put(client);
	return result;
}

int engine_client_begin_forked(struct engine *engine, int32_t pid, uint64_t token, int *ret_ring_fd,
			       int *ret_userfaultfd)
{
	struct client *client = client_get(engine, token);
	int result = 0;

	if (!client)
		return -ENOENT;
	pthread_mutex_lock(&client->gate);
	/* Made by a fork event and not yet claimed: only the child that read the token off its beacon
	 * can know it. */
	if (client->dead || client->pid != 0 || client->events_fd < 0)
		result = -EPERM;
	if (result == 0) {
		WRITE_ONCE(client->pid, pid);
		client->record->pid = pid;
		result = client_open_proc(client);
	}
	if (result == 0)
		result = client_make_ring(client);
	if (result == 0) {
		*ret_ring_fd = client->ring_fd;
		*ret_userfaultfd = client->events_fd;
	} else if (result != -EPERM) {
		WRITE_ONCE(client->pid, 0);
		client->record->pid = 0; /* nobody yet; the look thread finds its end */
	}
	pthread_mutex_unlock(&client->gate);
	client_put(client);
	return result;
}

/* One descriptor's UFFDIO_API; a second one is EINVAL. */
static int handshake(int fd, uint64_t features, bool may_be_done)
{
	int result = sys_userfaultfd_api(fd, features);

	return result == -EINVAL && may_be_done ? 0 : result;
}

int client_arm_descriptors(struct client *client, bool events, bool may_be_done)
{
	const struct client_record *record = client->record;
	uint64_t features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
			    UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP |
			    UFFD_FEATURE_THREAD_ID;
	int result = events ? handshake(client->events_fd, features, may_be_done) : 0;

	if (result == 0)
		result = handshake(client->trash_fd, 0, may_be_done);
	if (result == 0)
		result = sys_userfaultfd_register(client->events_fd, record->beacon, PAGE_BYTES);
	for (int i = 0; result == 0 && i < VSWAP_PROTECTIONS; i++) {
		if (record->staging[i] == 0)
			continue;
		result = sys_userfaultfd_register(client->events_fd, record->staging[i],
						  VSWAP_WINDOWS * BATCH_PAGES_MAX * PAGE_BYTES);
		if (result == 0)
			result = sys_userfaultfd_register_quiet(client->trash_fd, record->trash[i],
								VSWAP_WINDOW_PAGES * PAGE_BYTES);
	}
	return result;
}

/* Regions that lie in the new arena, or in the old one, are not to be evicted. */
static void store_arena(struct client *client, const struct engine_arena *arena)
{
	struct client_record *record = client->record;

	record->arena = arena->arena;
	record->arena_bytes = arena->arena_bytes;
	record->beacon = arena->beacon;
	for (int i = 0; i < VSWAP_PROTECTIONS; i++) {
		record->staging[i] = arena->staging[i];
		record->trash[i] = arena->trash[i];
	}
	(void)range_set_remove(&client->regions, arena->arena, arena->arena + arena->arena_bytes,
			       2 * REGIONS_MAX);
}

/* 0 or -errno. A client is armed once; a forked one has its userfaultfd already. The gate is held. */
static int check_arm(const struct client *client, const struct engine_arena *arena, int events_fd, int trash_fd)
{
	bool may_arm = client->trash_fd < 0 && client->ring && client_arena_is_sane(arena) && trash_fd >= 0 &&
		       (client->events_fd < 0) == (events_fd >= 0);

	if (client->dead)
		return -ESRCH;
	return may_arm ? 0 : -EINVAL;
}

int engine_client_arm(struct engine *engine, uint64_t token, const struct engine_arena *arena,
		      int events_fd, int trash_fd)
{
	struct client *client = client_get(engine, token);
	bool forked = events_fd < 0;
	int result = -ESRCH; /* it was begun, and is buried */

	if (client) {
		pthread_mutex_lock(&client->gate);
		result = check_arm(client, arena, events_fd, trash_fd);
	}
	if (result < 0) {
		if (events_fd >= 0)
			close(events_fd);
		if (trash_fd >= 0)
			close(trash_fd);
		if (client) {
			pthread_mutex_unlock(&client->gate);
			client_put(client);
		}
		return result;
	}
	store_arena(client, arena);
	if (!forked)
		client->events_fd = client->record->events_fd = events_fd;
	client->trash_fd = client->record->trash_fd = trash_fd;
	/* From here on the agent may take itself for armed, whatever becomes of us (agent_join.c). */
	if (!forked)
		client_set_phase(client, CLIENT_ARMING);
	crash_point(CRASH_CLIENT_ARMING);
	result = client_arm_descriptors(client, !forked, false);
	WRITE_ONCE(client->size_pages_seen, 0); /* look at its mappings again */
	if (result == 0)
		result = worker_start_all(client);
	crash_point(CRASH_CLIENT_ARMED);
	if (result == 0) {
		checkpoint_write(client, 0);
		client_set_phase(client, CLIENT_LIVE);
		look_at_new(client);
	}
	pthread_mutex_unlock(&client->gate);
	/* Nothing of it is out yet, and nobody would read the events of what is registered. A forked child is
	 * served already. */
	if (result < 0 && !forked)
		client_bury(client);
	work_ask(&engine->looking);
	client_put(client);
	return result;
}

int engine_client_label(struct engine *engine, uint64_t token, int socket_fd, uint32_t uid)
{
	struct client *client = client_get(engine, token);

	if (!client)
		return -ENOENT;
	client->record->uid = uid;
	WRITE_ONCE(client->record->socket_fd, socket_fd);
	client_put(client);
	return 0;
}

int engine_client_lost(struct engine *engine, uint64_t token)
{
	struct client *client = client_get(engine, token);

	if (!client)
		return -ENOENT;
	__atomic_store_n(&client->agent_gone, true, __ATOMIC_RELEASE);
	if (client->events_fd < 0 || sys_userfaultfd_is_gone(client->events_fd))
		client_bury(client);
	client_put(client);
	return 0;
}

/* All of it is managed already. The gate is held. */
static bool is_within_region(const struct client *client, uint64_t start, uint64_t end)
{
	const struct range *region = client->registered ? range_set_at(&client->regions, start) : NULL;

	return region && region->start <= start && region->end >= end;
}

static int page_out(struct engine *engine, int32_t pid, uint64_t start, uint64_t end, int timeout_ms)
{
	struct client *client = client_get_pid(engine, pid);
	int result;

	if (!client)
		return -ESRCH;
	if (client->ring && client->serving) { /* what it has mapped since the last look, too */
		pthread_mutex_lock(&client->gate);
		if (!client->dead && !client_is_shut(client) && !is_within_region(client, start, end))
			look_discover(client);
		pthread_mutex_unlock(&client->gate);
	}
	result = pageout_range(client, start, end, timeout_ms);
	client_put(client);
	return result;
}

int engine_client_pageout(struct engine *engine, int32_t pid, int timeout_ms)
{
	return page_out(engine, pid, 0, UINT64_MAX, timeout_ms);
}

int engine_client_cool(struct engine *engine, int32_t pid, uint64_t start, uint64_t bytes)
{
	int result = page_out(engine, pid, start, bytes < UINT64_MAX - start ? start + bytes : UINT64_MAX, COOL_MS);

	return result == -ETIMEDOUT ? 0 : result; /* advice */
}

static void ask_from(struct client *client, uint64_t *cursor, uint64_t first_page, uint64_t end_page)
{
	uint64_t first;

	while (client->deferred_count < DEFERRED_MAX / 2 &&
	       slot_map_next(client->engine->slots, &client->record->map, cursor, &first))
		for (unsigned i = 0; i < CLUSTER_PAGES && client->deferred_count < DEFERRED_MAX / 2; i++) {
			struct slot slot;

			if (first + i < first_page || first + i >= end_page)
				continue;
			if (slot_get(client->engine->slots, &client->record->map, first + i, &slot) < 0 ||
			    !slot_is_swapped(slot.tag))
				continue;
			client->deferred[client->deferred_count++] = (struct fault){
				.page = first + i, .since_ns = sys_now_ns(), .synthetic = true };
			break; /* the fill takes the rest of the cluster along */
		}
}

void engine_ask_for_range(struct client *client, uint64_t *cursor, uint64_t first_page, uint64_t end_page)
{
	uint64_t before = *cursor;

	if (client->deferred_count > 0)
		return;
	ask_from(client, cursor, first_page, end_page);
	if (client->deferred_count == 0 && before > 0)
		*cursor = 0;
}

void engine_ask_for_pages(struct client *client, uint64_t *cursor)
{
	engine_ask_for_range(client, cursor, 0, UINT64_MAX);
}

int engine_client_pagein(struct engine *engine, int32_t pid, int timeout_ms)
{
	struct client *client = client_get_pid(engine, pid);
	uint64_t cursor = 0, pages, deadline_ns = sys_now_ns() + (uint64_t)timeout_ms * 1000000UL;
	int result = 0;

	if (!client)
		return -ESRCH;
	for (;;) {
		pthread_mutex_lock(&client->gate);
		pages = slot_map_swapped_pages(&client->record->map);
		if (client->dead)
			result = -ESRCH;
		else if (group_room_bytes(client->group) + (int64_t)group_reserve_bytes(client->group) <
			 (int64_t)(min_of(pages, 64UL) * PAGE_BYTES))
			result = -ENOMEM;
		else if (pages > 0)
			engine_ask_for_pages(client, &cursor);
		pthread_mutex_unlock(&client->gate);
		if (result < 0 || pages == 0)
			break;
		client_wake(client);
		sys_sleep_ms(1);
		if (sys_now_ns() > deadline_ns) {
			result = -ETIMEDOUT;
			break;
		}
	}
	client_put(client);
	return result;
}

/* ---- statistics ---- */

static uint64_t client_pool_pages(const struct slot_map *map)
{
	return slot_map_count(map, SLOT_POOL) + slot_map_count(map, SLOT_INDIRECT);
}

static void add_client(struct engine_statistics *statistics, const struct client *client)
{
	const struct slot_map *map = &client->record->map;

	statistics->zero_pages += slot_map_count(map, SLOT_ZERO);
	statistics->same_pages += slot_map_count(map, SLOT_SAME);
	statistics->pool_pages += client_pool_pages(map);
	statistics->spill_pages += slot_map_count(map, SLOT_SPILL);
	statistics->staged_pages += slot_map_count(map, SLOT_STAGED);
	statistics->poisoned_pages += slot_map_count(map, SLOT_POISONED);
	statistics->kept_pages += slot_map_count(map, SLOT_KEPT_POOL) + slot_map_count(map, SLOT_KEPT_SPILL);
	statistics->resident_bytes += (uint64_t)max_of(READ_ONCE(client->resident_pages), 0) * PAGE_BYTES;
}

static void add_storage(struct engine *engine, struct engine_statistics *statistics)
{
	for (unsigned i = 0; i < GROUPS_MAX; i++) {
		struct pool_statistics pool;

		if (!engine->groups[i])
			continue;
		pool_statistics(engine->groups[i]->pool, &pool);
		statistics->group_count++;
		statistics->pool_bytes += pool.bytes;
		statistics->pool_object_bytes += pool.object_bytes;
		statistics->metadata_bytes += pool.metadata_bytes;
		statistics->resident_bytes += engine->groups[i]->unmanaged_bytes;
	}
	for (unsigned i = 0; i < BACKENDS_MAX; i++) {
		struct spill_statistics spill;

		if (!engine->backends[i].spill)
			continue;
		spill_statistics(engine->backends[i].spill, &spill);
		statistics->backend_count++;
		statistics->spill_bytes += spill.live_bytes;
		statistics->metadata_bytes += spill.metadata_bytes;
	}
}

int engine_statistics(struct engine *engine, struct engine_statistics *ret_statistics)
{
	struct engine_statistics statistics = { 0 };
	uint64_t shared_spill;

	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++)
		if (engine->clients[i]) {
			bool is_region = client_is_region(engine->clients[i]);

			add_client(&statistics, engine->clients[i]);
			statistics.client_count += !is_region;
			statistics.region_count += is_region;
		}
	shared_spill = min_of(slot_space_shared_spill_pages(engine->slots), statistics.pool_pages);
	statistics.pool_pages -= shared_spill;
	statistics.spill_pages += shared_spill;
	statistics.virtual_pages = statistics.zero_pages + statistics.same_pages + statistics.pool_pages +
				   statistics.spill_pages + statistics.staged_pages +
				   statistics.poisoned_pages + statistics.kept_pages;
	statistics.metadata_bytes = slot_space_metadata_bytes(engine->slots);
	add_storage(engine, &statistics);
	statistics.events_dropped = engine->events_dropped;
	statistics.host_is_short = READ_ONCE(engine->host.is_short);
	statistics.host_available_bytes = READ_ONCE(engine->host.available_bytes);
	statistics.host_reserve_bytes = READ_ONCE(engine->host.available_reserve_bytes);
	statistics.host_shortages = READ_ONCE(engine->host.shortages);
	statistics.host_reclaimed_pages = READ_ONCE(engine->host.reclaimed_pages);
	statistics.host_written_pages = READ_ONCE(engine->host.written_pages);
	statistics.counters = engine->state->counters;
	memcpy(statistics.latency_ns_sum, engine->state->latency_ns_sum, sizeof statistics.latency_ns_sum);
	memcpy(statistics.latency, engine->state->latency, sizeof statistics.latency);
	*ret_statistics = statistics;
	return 0;
}

static void add_pages(struct engine_group_statistics *record, const struct slot_map *map)
{
	uint64_t counts[SLOT_TAG_COUNT];

	for (int tag = 0; tag < SLOT_TAG_COUNT; tag++)
		counts[tag] = slot_map_count(map, (enum slot_tag)tag);
	record->swapped_pages += slot_map_swapped_pages(map);
	record->zero_pages += counts[SLOT_ZERO];
	record->same_pages += counts[SLOT_SAME];
	record->pool_pages += counts[SLOT_POOL];
	record->spill_pages += counts[SLOT_SPILL];
	record->shared_pages += counts[SLOT_INDIRECT];
	record->staged_pages += counts[SLOT_STAGED];
	record->poisoned_pages += counts[SLOT_POISONED];
	record->kept_pages += counts[SLOT_KEPT_POOL] + counts[SLOT_KEPT_SPILL];
	record->virtual_pages = record->zero_pages + record->same_pages + record->pool_pages + record->spill_pages +
				record->shared_pages + record->staged_pages + record->poisoned_pages + record->kept_pages;
}

int engine_group_list(struct engine *engine, struct engine_group_statistics *records, int max)
{
	int count = 0;

	SCOPED_LOCK(&engine->registry);
	for (unsigned g = 0; g < GROUPS_MAX; g++) {
		const struct group *group = engine->groups[g];
		struct engine_group_statistics record = { 0 };

		if (!group || count++ >= max)
			continue;
		record.group = group->number;
		record.flags = group->flags;
		memcpy(record.name, group->name, sizeof record.name);
		record.limit_bytes = group->limit_bytes;
		record.pool_limit_bytes = group->pool_limit_bytes;
		record.spill_limit_bytes = group->spill_limit_bytes;
		record.usage_bytes = group_usage_bytes(group);
		record.usage_bytes_max = group->usage_bytes_max;
		record.resident_bytes = (uint64_t)max_of(READ_ONCE(group->resident_pages), 0) * PAGE_BYTES;
		record.unmanaged_bytes = group->unmanaged_bytes;
		record.pool_bytes = pool_bytes(group->pool);
		record.metadata_bytes = (uint64_t)max_of(group->metadata_bytes, 0);
		record.swapped_pages_max = group->swapped_pages_max;
		record.spill_bytes = (uint64_t)max_of(READ_ONCE(group->spill_bytes), 0);
		record.client_count = group->flags & ENGINE_GROUP_REGIONS ? 0 : group->client_count;
		record.faults = group->faults;
		record.session_fd = engine->state->groups[g].session_fd;
		memcpy(record.label, engine->state->groups[g].label, sizeof record.label);
		for (unsigned i = 0; i < engine->clients_end; i++)
			if (engine->clients[i] && engine->clients[i]->group == group) {
				add_pages(&record, &engine->clients[i]->record->map);
				record.managed_count += READ_ONCE(engine->clients[i]->registered);
			}
		records[count - 1] = record;
	}
	return count;
}

int engine_client_list(struct engine *engine, struct engine_client_statistics *records, int max)
{
	int count = 0;

	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < engine->clients_end; i++) {
		const struct client *client = engine->clients[i];
		const struct slot_map *map;

		if (!client || client_is_region(client) || count++ >= max)
			continue;
		map = &client->record->map;
		records[count - 1] = (struct engine_client_statistics){
			.token = client->record->token,
			.pid = client->pid,
			.group = client->group->number,
			.resident_bytes = (uint64_t)max_of(READ_ONCE(client->resident_pages), 0) * PAGE_BYTES,
			.swapped_pages = slot_map_swapped_pages(map),
			.zero_pages = slot_map_count(map, SLOT_ZERO),
			.same_pages = slot_map_count(map, SLOT_SAME),
			.pool_pages = client_pool_pages(map),
			.spill_pages = slot_map_count(map, SLOT_SPILL),
			.kept_pages = slot_map_count(map, SLOT_KEPT_POOL) + slot_map_count(map, SLOT_KEPT_SPILL),
			.metadata_bytes = slot_map_metadata_bytes(map),
			.faults = client->faults,
			.evicted_pages = client->evicted_pages,
			.region_count = (uint32_t)client->regions.count,
			.registered = READ_ONCE(client->registered),
			.uid = client->record->uid,
			.socket_fd = client->record->socket_fd,
		};
	}
	return count;
}

/* ---- what a successor needs ---- */

struct descriptor_list {
	struct engine_descriptor *records;
	int count, max;
};

static void list_descriptor(struct descriptor_list *list, int fd, uint64_t owner)
{
	if (fd < 0)
		return;
	if (list->count < list->max)
		list->records[list->count] = (struct engine_descriptor){ .fd = fd, .owner = owner };
	list->count++;
}

int engine_descriptor_list(struct engine *engine, struct engine_descriptor *records, int max)
{
	struct descriptor_list list = { records, 0, max };

	list_descriptor(&list, engine->state_fd, 0);
	list_descriptor(&list, engine->pool_fd, 0);
	SCOPED_LOCK(&engine->registry);
	for (unsigned i = 0; i < BACKENDS_MAX; i++)
		if (engine->state->backends[i].used)
			list_descriptor(&list, engine->state->backends[i].fd, 0);
	for (unsigned i = 0; i < GROUPS_MAX; i++)
		if (engine->groups[i])
			list_descriptor(&list, engine->state->groups[i].session_fd, 0);
	for (unsigned i = 0; i < engine->clients_end; i++) {
		const struct client_record *record = engine->clients[i] ? engine->clients[i]->record : NULL;

		if (!record || (record->phase != CLIENT_ARMING && record->phase != CLIENT_LIVE))
			continue;
		list_descriptor(&list, record->events_fd, record->token);
		list_descriptor(&list, record->trash_fd, record->token);
		list_descriptor(&list, record->ring_fd, record->token);
		list_descriptor(&list, record->socket_fd, record->token);
	}
	return list.count;
}

/* ---- test support ---- */

int engine_is_valid(struct engine *engine)
{
	int result = 0;

	for (unsigned i = 0; i < READ_ONCE(engine->clients_end); i++) {
		struct client *client = client_get_index(engine, i);

		if (!client)
			continue;
		pthread_mutex_lock(&client->gate);
		if (!slot_map_is_valid(engine->slots, &client->record->map) ||
		    !range_set_is_valid(&client->regions) || !range_set_is_valid(&client->quarantine) ||
		    !pool_is_valid(client->group->pool) || (!client->dead && !fill_is_charged_right(client)))
			result = -EUCLEAN;
		pthread_mutex_unlock(&client->gate);
		client_put(client);
	}
	if (!slot_space_is_valid(engine->slots))
		result = -EUCLEAN;
	for (unsigned i = 0; i < BACKENDS_MAX; i++) {
		struct spill *spill = backend_pin(engine, i);

		if (spill && !spill_is_valid(spill))
			result = -EUCLEAN;
		if (spill)
			backend_unpin(engine, i);
	}
	return result;
}

void engine_sleep_ms(int milliseconds) { sys_sleep_ms((unsigned)max_of(milliseconds, 0)); }
