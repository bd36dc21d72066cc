/* SPDX-License-Identifier: MIT */
/*
 * region_deaths — regions under a daemon that dies.
 *
 *   region_deaths --spill PATH [--encrypt] [--seed N] [--operations N] [--crash POINT:CALL | --deaths N]
 *
 * Each of two threads writes, truncates, replaces and reads a region of its own at random, with a group so small that
 * most of it is spilled, while a third drains and compacts the backends. The daemon is killed at a named point
 * (crash_point.h) of its first life, or at random moments; each successor compares every byte with a model that
 * outlives them: a page may be as before the operation that was cut off or as after it, the size too. Prints how many
 * deaths there were. Exit status: 0; 99 for a wrong byte or a broken invariant; 98 for trouble of its own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "crash_point.h"
#include "engine.h"
#include "supervise.h"

#define WORKERS 2
#define PAGE 4096UL
#define REGION_BYTES (4UL << 20)
#define WRITE_BYTES_MAX (512UL << 10)
#define GROUP_BYTES (2UL << 20)
#define SPILL_BYTES (256UL << 20)
#define NOISE_BYTES (1UL << 20)
#define LISTED_MAX 16
#define VERIFY_MS_MAX 30000

enum operation { NOTHING, WRITE, TRUNCATE, REPLACE };

struct content {
	uint64_t size;
	uint8_t bytes[REGION_BYTES]; /* zero beyond the size */
};

/* What all daemons know. `under_way` is stored last, and first again when its outcome is in `before`. */
struct model {
	uint32_t under_way; /* enum operation */
	uint32_t done;
	unsigned seed;
	struct content before, after;
	uint8_t found[REGION_BYTES]; /* scratch */
};

static struct shared {
	uint32_t is_ended;
	uint32_t verified; /* successors that compared everything */
	struct model models[WORKERS];
} *shared;

static struct engine *engine;
static const char *spill_path, *crash;
static uint32_t spill_flags;
static unsigned operations = 150, deaths_wanted, seed = 1;
static uint8_t noise[NOISE_BYTES];
static int group;
static int drain_ends;

static _Noreturn __attribute__((format(printf, 2, 3))) void end(int status, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("region_deaths: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	_exit(status);
}

static void check(int result, const char *what)
{
	if (result < 0)
		end(98, "%s: %s", what, strerror(-result));
}

static unsigned chance(struct model *model, unsigned below) { return (unsigned)rand_r(&model->seed) % below; }

/* ---- comparing ---- */

static int page_is(const uint8_t *page, const struct content *content, uint64_t at, uint64_t bytes)
{
	return memcmp(page, content->bytes + at, bytes) == 0;
}

/* What is there is as before or as after, page by page; then it is the model. */
static void compare(struct model *model, unsigned worker, uint64_t number)
{
	uint8_t *found = model->found;
	struct engine_region region;
	uint64_t size;
	int is_after_alone, is_before_alone;

	check(engine_region_get(engine, number, &region), "get");
	size = region.size_bytes;
	if (size != model->before.size && (model->under_way == NOTHING || size != model->after.size))
		end(99, "region %u has %lu bytes", worker, size);
	if (engine_region_read(engine, number, 0, found, REGION_BYTES) != (int)size)
		end(99, "region %u cannot be read", worker);
	/* The size says which: of a truncation, and of a write that made it larger. */
	is_after_alone = model->under_way != NOTHING && size != model->before.size;
	is_before_alone = model->under_way == NOTHING ||
			  (model->under_way != WRITE && size != model->after.size);
	for (uint64_t at = 0; at < size; at += PAGE) {
		uint64_t bytes = size - at < PAGE ? size - at : PAGE;

		if (!(!is_after_alone && page_is(found + at, &model->before, at, bytes)) &&
		    !(!is_before_alone && page_is(found + at, &model->after, at, bytes)))
			end(99, "region %u of %lu bytes is wrong in page %lu (operation %u, under way %u)", worker, size,
			    at / PAGE, model->done, model->under_way);
	}
	memset(found + size, 0, REGION_BYTES - size);
	memcpy(model->before.bytes, found, REGION_BYTES);
	model->before.size = size;
	__atomic_store_n(&model->under_way, NOTHING, __ATOMIC_RELEASE);
}

/* ---- operations ---- */

static uint64_t create(unsigned worker)
{
	struct engine_region region = { .group = group, .mode = 0600 };
	uint64_t number;

	snprintf(region.name, sizeof region.name, "%u", worker);
	check(engine_region_create(engine, &region, &number), "create");
	return number;
}

static void fill(struct model *model, uint8_t *bytes, uint64_t count)
{
	unsigned kind = chance(model, 5), start = chance(model, NOISE_BYTES - WRITE_BYTES_MAX);

	for (uint64_t i = 0; i < count; i++)
		bytes[i] = kind == 0 ? 0 : kind == 1 ? (uint8_t)start : i % 3 == 0 ? noise[start + i] : (uint8_t)kind;
	if (kind == 2) /* what does not compress */
		memcpy(bytes, noise + start, count);
}

static void begin(struct model *model, enum operation operation)
{
	__atomic_store_n(&model->under_way, operation, __ATOMIC_RELEASE);
}

static void finish(struct model *model)
{
	memcpy(&model->before, &model->after, sizeof model->before);
	model->done++;
	__atomic_store_n(&model->under_way, NOTHING, __ATOMIC_RELEASE);
}

static void write_some(struct model *model, uint64_t number)
{
	struct content *after = &model->after;
	uint64_t bytes = 1 + chance(model, WRITE_BYTES_MAX), at = chance(model, REGION_BYTES - WRITE_BYTES_MAX);

	if (chance(model, 2))
		at -= at % PAGE;
	if (chance(model, 2))
		bytes = (bytes + PAGE - 1) / PAGE * PAGE;
	fill(model, after->bytes + at, bytes);
	after->size = after->size < at + bytes ? at + bytes : after->size;
	begin(model, WRITE);
	check(engine_region_write(engine, number, at, after->bytes + at, (uint32_t)bytes), "write");
}

static void truncate_some(struct model *model, uint64_t number)
{
	struct content *after = &model->after;
	uint64_t size = chance(model, REGION_BYTES);

	if (size < after->size)
		memset(after->bytes + size, 0, after->size - size);
	after->size = size;
	begin(model, TRUNCATE);
	check(engine_region_truncate(engine, number, size), "truncate");
}

static uint64_t replace(struct model *model, unsigned worker, uint64_t number)
{
	memset(&model->after, 0, sizeof model->after);
	begin(model, REPLACE);
	check(engine_region_unlink(engine, number), "unlink");
	check(engine_region_destroy(engine, number), "destroy");
	return create(worker);
}

static uint64_t operate(struct model *model, unsigned worker, uint64_t number)
{
	memcpy(&model->after, &model->before, sizeof model->after);
	switch (chance(model, 12)) {
	case 0:
		number = replace(model, worker, number);
		break;
	case 1 ... 3:
		truncate_some(model, number);
		break;
	default:
		write_some(model, number);
	}
	finish(model);
	return number;
}

/* ---- threads of a daemon ---- */

/* Its region as the daemon before has left it. */
static uint64_t find(struct model *model, unsigned worker)
{
	static struct engine_region listed[LISTED_MAX];
	int count = engine_region_list(engine, listed, LISTED_MAX);
	uint64_t number = 0;

	for (int i = 0; i < count && i < LISTED_MAX; i++) {
		if (listed[i].is_unlinked)
			end(99, "an unlinked region is still there");
		if ((unsigned)atoi(listed[i].name) != worker)
			continue;
		if (number)
			end(99, "region %u is there twice", worker);
		number = listed[i].number;
	}
	if (number || model->under_way != REPLACE)
		return number;
	memset(&model->before, 0, sizeof model->before);
	begin(model, NOTHING);
	return 0;
}

struct work {
	unsigned worker;
	uint64_t number;
};

static void *work_main(void *argument)
{
	struct work *work = argument;
	struct model *model = &shared->models[work->worker];

	while (deaths_wanted ? !__atomic_load_n(&shared->is_ended, __ATOMIC_ACQUIRE) : model->done < operations) {
		work->number = operate(model, work->worker, work->number);
		if (model->done % 8 == 0)
			compare(model, work->worker, work->number);
	}
	compare(model, work->worker, work->number);
	return NULL;
}

static void add_backend(void)
{
	int fd = open(spill_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	check(fd < 0 ? -errno : engine_backend_add(engine, fd, spill_path, SPILL_BYTES, 0, spill_flags, 0), spill_path);
	unlink(spill_path);
}

static void *drain_main(void *argument)
{
	static struct engine_backend_statistics backends[16];
	struct engine_room room;

	(void)argument;
	for (unsigned turn = 0; !__atomic_load_n(&drain_ends, __ATOMIC_ACQUIRE); turn++) {
		int count = engine_backend_list(engine, backends, 16), number = backends[turn % 2].backend, result;

		usleep(20000);
		if (count < 2) {
			add_backend();
			continue;
		}
		result = engine_backend_compact(engine, number);
		if (result == 0 || result == -ENOSPC)
			result = engine_backend_drain_begin(engine, 1u << number, 0, &room);
		if (result == 0)
			result = engine_backend_drain(engine, number, 0);
		if (result != -ENOSPC)
			check(result, "drain");
	}
	return NULL;
}

/* ---- daemons ---- */

static void begin_state(struct work *works)
{
	if (engine_is_successor(engine) && engine_group_find(engine, "regions") >= 0) {
		group = engine_group_find(engine, "regions");
	} else {
		group = engine_group_create(engine, "regions", GROUP_BYTES, 0, ENGINE_GROUP_REGIONS);
		check(group, "group");
		add_backend();
	}
	for (unsigned i = 0; i < WORKERS; i++) {
		works[i] = (struct work){ i, find(&shared->models[i], i) };
		if (works[i].number == 0 && shared->models[i].before.size > 0)
			end(99, "region %u is gone", i);
		works[i].number = works[i].number ? works[i].number : create(i);
		compare(&shared->models[i], i, works[i].number);
	}
	if (engine_is_valid(engine) < 0)
		end(99, "engine is not valid");
	__atomic_fetch_add(&shared->verified, 1, __ATOMIC_RELEASE);
}

/* But what the writer has in its hands yet. */
static int something_is_held(struct engine_statistics *statistics)
{
	check(engine_statistics(engine, statistics), "statistics");
	return statistics->virtual_pages || statistics->pool_object_bytes || statistics->spill_bytes ||
	       statistics->region_count;
}

static void assert_nothing_is_left(const struct work *works)
{
	static struct engine_statistics statistics;
	int left_ms = 10000;

	for (unsigned i = 0; i < WORKERS; i++)
		check(engine_region_destroy(engine, works[i].number), "destroy");
	while (something_is_held(&statistics) && left_ms-- > 0)
		usleep(1000);
	if (left_ms < 0)
		end(99, "held at the end: %lu pages, %lu and %lu bytes, %u regions", statistics.virtual_pages,
		    statistics.pool_object_bytes, statistics.spill_bytes, statistics.region_count);
	if (engine_is_valid(engine) < 0)
		end(99, "engine is not valid at the end");
}

static int run_daemon(const struct engine_config *config)
{
	struct work works[WORKERS];
	pthread_t threads[WORKERS], drainer;
	char message[256] = "";

	if (engine_create(config, &engine, message) < 0)
		end(98, "%s", message);
	begin_state(works);
	check(-pthread_create(&drainer, NULL, drain_main, NULL), "thread");
	for (unsigned i = 0; i < WORKERS; i++)
		check(-pthread_create(&threads[i], NULL, work_main, &works[i]), "thread");
	for (unsigned i = 0; i < WORKERS; i++)
		pthread_join(threads[i], NULL);
	__atomic_store_n(&drain_ends, 1, __ATOMIC_RELEASE);
	pthread_join(drainer, NULL);
	assert_nothing_is_left(works);
	engine_destroy(engine);
	return 0;
}

static pid_t start_daemon(const struct engine_config *config, int is_first)
{
	pid_t pid = supervise_fork();

	check(pid, "supervise_fork");
	if (pid > 0)
		return pid;
#ifdef VSWAP_FAULT_POINTS
	if (crash && is_first) {
		char name[64] = "";
		unsigned call = 1;

		sscanf(crash, "%63[^:]:%u", name, &call);
		if (crash_point_arm(name, call) < 0)
			end(98, "no crash point %s", name);
	}
#else
	(void)is_first;
#endif
	_exit(run_daemon(config));
}

static void parse(int argc, char **argv)
{
	static const struct option longs[] = {
		{ "spill", 1, 0, 's' }, { "seed", 1, 0, 'r' }, { "operations", 1, 0, 'o' },
		{ "crash", 1, 0, 'c' }, { "deaths", 1, 0, 'd' }, { "encrypt", 0, 0, 'e' }, { 0, 0, 0, 0 } };
	int option;

	while ((option = getopt_long(argc, argv, "", longs, NULL)) != -1)
		switch (option) {
		case 's': spill_path = optarg; break;
		case 'r': seed = (unsigned)strtoul(optarg, NULL, 0); break;
		case 'o': operations = (unsigned)strtoul(optarg, NULL, 0); break;
		case 'c': crash = optarg; break;
		case 'e': spill_flags = ENGINE_BACKEND_ENCRYPT; break;
		case 'd': deaths_wanted = (unsigned)strtoul(optarg, NULL, 0); break;
		default: exit(2);
		}
	if (!spill_path)
		exit(2);
}

/* At a random moment, every other time once it has compared everything. After so many deaths one goes on to the end. */
static void kill_soon(pid_t daemon, unsigned *state, unsigned deaths)
{
	uint32_t verified = __atomic_load_n(&shared->verified, __ATOMIC_ACQUIRE);

	if (deaths < deaths_wanted) {
		for (int ms = 0; deaths % 2 == 0 && ms < VERIFY_MS_MAX; ms++) {
			if (__atomic_load_n(&shared->verified, __ATOMIC_ACQUIRE) > verified)
				break;
			usleep(1000);
		}
		usleep((useconds_t)rand_r(state) % 150000);
		kill(daemon, SIGKILL);
	} else if (deaths_wanted) {
		__atomic_store_n(&shared->is_ended, 1, __ATOMIC_RELEASE);
	}
}

int main(int argc, char **argv)
{
	struct engine_config config = { 0 };
	unsigned deaths = 0, state;

	parse(argc, argv);
	state = seed;
	for (uint64_t i = 0; i < NOISE_BYTES; i++)
		noise[i] = (uint8_t)(rand_r(&state) >> 7);
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		end(98, "no memory");
	for (unsigned i = 0; i < WORKERS; i++)
		shared->models[i].seed = seed * 2 + i;
	check(engine_make_memfds(&config.state_fd, &config.pool_fd), "memfds");
	for (;; deaths++) {
		int status = 0;
		pid_t daemon = start_daemon(&config, deaths == 0);

		kill_soon(daemon, &state, deaths);
		waitpid(daemon, &status, 0);
		if (WIFEXITED(status)) {
			printf("%u deaths, %u times verified, %u operations\n", deaths, shared->verified,
			       shared->models[0].done + shared->models[1].done);
			return WEXITSTATUS(status);
		}
		if (WTERMSIG(status) != SIGKILL)
			end(98, "the daemon ended by signal %d", WTERMSIG(status));
	}
}
