/* SPDX-License-Identifier: MIT */
/*
 * drive — the data plane without Python: run a command under a limit.
 *
 *   drive [--limit BYTES] [--pool BYTES] [--spill PATH:BYTES [--encrypt]] [--torture] [--pageout-every MS]
 *         [--check-every MS] [--drain-every MS] [--stats] [--kill-every MS] [--crash POINT:CALL] [--slow-arm MS]
 *         [--detach-every MS] [--commands] [--host-reserve BYTES] [--synthetic-slots N] [--recompress MS] [--tiers] [--fail NAME:N:ERRNO[:all]]...
 *         [--delay NAME:N:MS[:all]]... --lib libvswap.so -- COMMAND...
 *   drive --crash-points
 *
 * A whole control plane in one thread: a socket, the handshake of wire.h, a group, nothing else. It is
 * what the sanitizers run, and what to put under a profiler. --drain-every: a second backend on the same
 * file system, and every so often the older of the two is compacted, drained and replaced. --detach-every: so
 * often one of the clients is detached. --synthetic-slots: beside the command there is a region of so many same-filled pages, which
 * nobody has written: only its slots are set. --recompress: pages out for so long are
 * compressed again. --host-reserve: while the machine has less available the command gives, below its limit. --tiers: above the spill file is a backend of 24 MiB, and pages move between the two. Exit status: the command's, 99 when an invariant was found broken, 98 for trouble of its own.
 *
 * With --kill-every (a random time, MS on average) or --crash (crash_point.h) the daemon is a child that is
 * killed and succeeded, as often as that happens; the last line then says how often, and how long
 * nobody served. --commands: see drive_commands.h. --slow-arm has every handshake rest for so long between WELCOME and ARM.
 *
 * SIGUSR1 has the command paged out, SIGUSR2 paged in. --fail makes the N-th call at a fault point fail (`all`: and
 * all later ones; ERRNO 0 only counts), --delay makes it late, and the calls are printed at the end: debug builds only.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "crash_point.h"
#include "drive_commands.h"
#include "drive_synthetic.h"
#include "engine.h"
#include "fault_point.h"
#include "supervise.h"
#include "wire.h"

#define PEERS_MAX 1024

struct peer {
	int fd; /* -1: unused */
	pid_t pid;
	uint64_t token;
	int armed;
};

/* What all daemons of a run share. */
struct shared {
	struct peer peers[PEERS_MAX];
	uint32_t started;   /* daemons */
	uint32_t is_ended;  /* the command has */
	int status;         /* its wait status */
	uint64_t serving_us; /* when the last daemon began to serve */
	int tiering;
};

static struct engine *engine;
static volatile sig_atomic_t asked_out, asked_in;
static int group;
static struct shared *shared;
static struct peer *peers;

static void fail(const char *what)
{
	fprintf(stderr, "drive: %s: %s\n", what, strerror(errno));
	exit(98);
}

static int receive(int fd, void *data, size_t size, int *fds, int max)
{
	char control[CMSG_SPACE(4 * sizeof(int))];
	struct iovec iov = { data, size };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof control };
	int count = 0;

	if (recvmsg(fd, &message, MSG_WAITALL | MSG_CMSG_CLOEXEC) != (ssize_t)size)
		return -1;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
		count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(c), (size_t)(count < max ? count : max) * sizeof(int));
	}
	return count;
}

static void send_with(int fd, const void *data, size_t size, const int *fds, int count)
{
	char control[CMSG_SPACE(4 * sizeof(int))] = { 0 };
	struct iovec iov = { (void *)data, size };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (count) {
		struct cmsghdr *c;

		message.msg_control = control;
		message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
		c = CMSG_FIRSTHDR(&message);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
		memcpy(CMSG_DATA(c), fds, (size_t)count * sizeof(int));
	}
	(void)!sendmsg(fd, &message, MSG_NOSIGNAL);
}

static int hello(struct peer *peer)
{
	struct vswap_hello hello;
	struct vswap_welcome welcome = { VSWAP_MAGIC, VSWAP_WIRE_VERSION, VSWAP_OK, 0 };
	int fds[3] = { engine_userfaultfd_device(engine), -1, -1 }, none[4], result;

	if (receive(peer->fd, &hello, sizeof hello, none, 4) != 0 || hello.magic != VSWAP_MAGIC)
		return -1;
	if (hello.kind == VSWAP_HELLO_FORKED) {
		peer->token = hello.token;
		result = engine_client_begin_forked(engine, peer->pid, hello.token, &fds[1], &fds[2]);
	} else {
		result = engine_client_begin(engine, peer->pid, group, &peer->token, &fds[1]);
	}
	welcome.token = peer->token;
	if (result < 0) {
		welcome.status = VSWAP_REFUSED_PEER;
		send_with(peer->fd, &welcome, sizeof welcome, NULL, 0);
		fprintf(stderr, "drive: pid %d refused: %s\n", peer->pid, strerror(-result));
		return -1;
	}
	send_with(peer->fd, &welcome, sizeof welcome, fds, hello.kind == VSWAP_HELLO_FORKED ? 3 : 2);
	return 0;
}

static int arm(struct peer *peer)
{
	struct vswap_arm arm;
	struct vswap_ready ready = { VSWAP_MAGIC, VSWAP_WIRE_VERSION, VSWAP_OK };
	struct engine_arena arena;
	int fds[4] = { -1, -1, -1, -1 }, count = receive(peer->fd, &arm, sizeof arm, fds, 4), result;

	if (count < 1)
		return -1;
	arena = (struct engine_arena){ arm.arena, arm.arena_bytes, arm.beacon,
				       { arm.staging[0], arm.staging[1] },
				       { arm.trash[0], arm.trash[1] } };
	result = engine_client_arm(engine, peer->token, &arena, count == 2 ? fds[0] : -1,
				   count == 2 ? fds[1] : fds[0]);
	if (result < 0) {
		fprintf(stderr, "drive: arm of pid %d: %s\n", peer->pid, strerror(-result));
		ready.status = VSWAP_REFUSED_KERNEL; /* without an answer the agent would keep what it has */
		send_with(peer->fd, &ready, sizeof ready, NULL, 0);
		return -1;
	}
	engine_client_label(engine, peer->token, peer->fd, 0);
	peer->armed = 1;
	send_with(peer->fd, &ready, sizeof ready, NULL, 0);
	return 0;
}

static void accept_peer(int listener, unsigned slow_arm_ms)
{
	struct ucred credentials;
	socklen_t length = sizeof credentials;
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0 || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0)
		return;
	for (int i = 0; i < PEERS_MAX; i++)
		if (peers[i].fd < 0) {
			peers[i] = (struct peer){ fd, credentials.pid, 0, 0 };
			if (hello(&peers[i]) < 0 || usleep(slow_arm_ms * 1000) < 0 || arm(&peers[i]) < 0) {
				if (peers[i].token)
					engine_client_lost(engine, peers[i].token);
				peers[i].fd = -1;
				close(fd);
			}
			return;
		}
	close(fd);
}

static uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void print_events(void)
{
	struct engine_event event;

	while (engine_event_next(engine, &event) == 1)
		if (event.kind != ENGINE_EVENT_CLIENT_GONE && event.kind != ENGINE_EVENT_REGISTERED)
			fprintf(stderr, "drive: event %u pid %d a=%llx b=%lld c=%llu\n", event.kind,
				event.pid, (unsigned long long)event.a, (long long)event.b,
				(unsigned long long)event.c);
}

static void print_statistics(void)
{
	static struct engine_statistics s;
	struct engine_group_statistics g;

	engine_statistics(engine, &s);
	engine_group_list(engine, &g, 1);
	fprintf(stderr,
		"drive: virtual %lu zero %lu same %lu pool %lu spill %lu staged %lu kept %lu poisoned %lu\n"
		"drive: pool_bytes %lu objects %lu spill_bytes %lu metadata %lu usage_max %lu limit %lu "
		"swapped_max %lu\n",
		s.virtual_pages, s.zero_pages, s.same_pages, s.pool_pages, s.spill_pages, s.staged_pages,
		s.kept_pages, s.poisoned_pages, s.pool_bytes, s.pool_object_bytes, s.spill_bytes,
		s.metadata_bytes, g.usage_bytes_max, g.limit_bytes, g.swapped_pages_max);
#define PRINT(name, meaning) \
	if (s.counters.name) \
		fprintf(stderr, " %s=%lu", #name, s.counters.name);
	ENGINE_COUNTERS(PRINT)
	fprintf(stderr, "\n");
	for (int b = 0; b < ENGINE_BACKING_COUNT; b++) {
		uint64_t count = 0, seen = 0;
		double p50 = 0, p99 = 0;

		for (int i = 0; i < ENGINE_LATENCY_BUCKETS; i++)
			count += s.latency[b][i];
		for (int i = 0; i < ENGINE_LATENCY_BUCKETS && count; i++) {
			seen += s.latency[b][i];
			if (p50 == 0 && seen * 2 >= count)
				p50 = engine_latency_bucket_us(i);
			if (p99 == 0 && seen * 100 >= count * 99)
				p99 = engine_latency_bucket_us(i);
		}
		if (count)
			fprintf(stderr, "drive: backing %d count %lu mean %.1f us p50 %.1f p99 %.1f\n", b,
				count, (double)s.latency_ns_sum[b] / (double)count / 1000, p50, p99);
	}
}

#ifdef VSWAP_FAULT_POINTS

static char *point_names[FAULT_POINTS_MAX];
static unsigned point_count;

static void set_fault_point(char *text, int is_delay)
{
	char *number = strchr(text, ':'), *rest;
	uint64_t at_call_n;
	long value;

	if (!number || point_count == FAULT_POINTS_MAX)
		exit(2);
	*number++ = '\0';
	at_call_n = strtoull(number, &rest, 10);
	value = *rest == ':' ? strtol(rest + 1, &rest, 10) : EIO;
	point_names[point_count++] = text;
	if (is_delay)
		fault_point_delay(text, at_call_n, (unsigned)value, strcmp(rest, ":all") == 0);
	else
		fault_point_set(text, at_call_n, (int)value, strcmp(rest, ":all") == 0);
}

static void print_fault_points(void)
{
	for (unsigned i = 0; i < point_count; i++)
		fprintf(stderr, "drive: %s calls %lu hits %lu\n", point_names[i],
			fault_point_calls(point_names[i]), fault_point_hits(point_names[i]));
}

#else

static void set_fault_point(char *text, int is_delay)
{
	fprintf(stderr, "drive: --%s %s: built without fault points\n", is_delay ? "delay" : "fail", text);
	exit(2);
}

static void print_fault_points(void) {}

#endif

static void on_signal(int number)
{
	if (number == SIGUSR1)
		asked_out = 1;
	else
		asked_in = 1;
}

static void page_as_asked(pid_t command)
{
	if (asked_out) {
		asked_out = 0;
		engine_client_pageout(engine, command, 10000);
	}
	if (asked_in) {
		asked_in = 0;
		engine_client_pagein(engine, command, 10000);
	}
}

struct options {
	uint64_t limit_bytes, pool_bytes, pageout_every_ms, check_every_ms, kill_every_ms, slow_arm_ms, drain_every_ms,
		detach_every_ms, synthetic_slots, recompress_age_ms, host_reserve_bytes;
	const char *library, *crash;
	char *spill;
	int torture, stats, commands, tiers;
	char **command;
};

static char *spill_path;
static uint64_t spill_bytes = 4ULL << 30;
static uint32_t spill_flags;

#define UPPER_SPILL_BYTES (24ULL << 20)
#define UPPER_SPILL_NUMBER 999999999

/* A backend on the spill file itself, or on one of the same name with a number behind it. */
static int add_spill_of(int number, int priority, uint64_t bytes)
{
	char path[256];
	int fd, backend;

	snprintf(path, sizeof path, number ? "%s.%d" : "%s", spill_path, number);
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	backend = fd < 0 ? -errno : engine_backend_add(engine, fd, path, bytes ? bytes : spill_bytes, priority,
							     spill_flags, 0);
	if (number)
		unlink(path);
	return backend;
}

static int add_spill(int number, int priority) { return add_spill_of(number, priority, 0); }

static int set_tiering(int on)
{
	shared->tiering = on;
	engine_set_tiering(engine, on);
	return 0;
}

static void spill_must(int backend)
{
	if (backend < 0)
		fail(spill_path);
}

static void parse_spill(char *spill)
{
	char *colon = strrchr(spill, ':');

	if (colon) {
		spill_bytes = strtoull(colon + 1, NULL, 0);
		*colon = '\0';
	}
	spill_path = spill;
}

/* ---- backends that come and go ---- */

static int draining_ends;
static unsigned drained, compacted, drains_refused, detached;

/* Compact a backend, then drain it when there is another one, and have a new one come. */
static void drain_one(int number)
{
	struct engine_room room;
	int result = engine_backend_compact(engine, number);

	compacted += result == 0;
	if (result < 0 && result != -ENOSPC)
		fprintf(stderr, "drive: compact: %s\n", strerror(-result));
	result = engine_backend_drain_begin(engine, 1u << number, 0, &room);
	if (result == 0)
		result = engine_backend_drain(engine, number, 0);
	if (result == -ENOSPC) {
		drains_refused++;
	} else if (result < 0) {
		fprintf(stderr, "drive: drain: %s\n", strerror(-result));
		exit(97);
	}
	drained += result == 0;
}

/* Two backends of equal priority, each in its turn. */
static void *drain_main(void *argument)
{
	unsigned turn = 0;

	while (!__atomic_load_n(&draining_ends, __ATOMIC_ACQUIRE)) {
		static struct engine_backend_statistics backends[16];
		int count = engine_backend_list(engine, backends, 16);

		if (count < 2)
			spill_must(add_spill((int)(now_ms() % 1000000000) + 1, 0));
		else
			drain_one(backends[turn++ % 2].backend);
		usleep((useconds_t)(uintptr_t)argument * 1000);
	}
	return NULL;
}

/* A client at a time, in turn. */
static void *detach_main(void *argument)
{
	static struct engine_client_statistics clients[PEERS_MAX];
	unsigned turn = 0;

	while (!__atomic_load_n(&draining_ends, __ATOMIC_ACQUIRE)) {
		int count = engine_client_list(engine, clients, PEERS_MAX);
		const struct engine_client_statistics *client = &clients[count > 0 ? turn++ % (unsigned)count : 0];

		usleep((useconds_t)(uintptr_t)argument * 1000);
		if (count > 0 && client->pid > 0 && client->swapped_pages > 0)
			detached += engine_client_detach(engine, client->pid, 2000) == 0;
	}
	return NULL;
}

static pid_t start_command(const struct options *options, const char *socket_path)
{
	char text[32];
	pid_t pid;

	setenv("LD_PRELOAD", options->library, 1);
	setenv("VSWAPD_SOCKET", socket_path, 1);
	setenv("VSWAP_GROUP", "drive", 1);
	setenv("VSWAP_VERBOSE", "1", 1);
	snprintf(text, sizeof text, "%lu",
		 options->torture ? 1UL << 20 : options->limit_bytes / 8 < 16UL << 20
							? options->limit_bytes / 8
							: 16UL << 20);
	setenv("VSWAP_MIN_BYTES", text, 1);
	setenv("VSWAP_LOOK_US", "5000", 1);
	pid = fork();
	if (pid != 0)
		return pid;
	/* These take a while, and then somebody is to be there. */
	while (options->synthetic_slots && !__atomic_load_n(&shared->serving_us, __ATOMIC_ACQUIRE))
		usleep(1000);
	execvp(options->command[0], options->command);
	perror(options->command[0]);
	_exit(127);
}

/* The daemon is a child that may die. */
static int is_supervised(const struct options *options)
{
	return options->kill_every_ms || options->crash || options->commands;
}

/* The command is a child of the supervisor, when there is one. */
static int command_has_ended(const struct options *options, pid_t command, int *status)
{
	if (!is_supervised(options))
		return waitpid(command, status, WNOHANG) == command;
	*status = shared->status;
	return (int)__atomic_load_n(&shared->is_ended, __ATOMIC_ACQUIRE);
}

/* Serve until the command has ended. Returns its wait status. */
static int serve(const struct options *options, int listener, pid_t command)
{
	uint64_t next_pageout = now_ms() + options->pageout_every_ms, next_check = now_ms();
	struct pollfd fds[PEERS_MAX + 2];
	int status = 0;

	for (;;) {
		if (command_has_ended(options, command, &status))
			return status;
		fds[0] = (struct pollfd){ listener, POLLIN, 0 };
		for (int i = 0; i < PEERS_MAX; i++)
			fds[i + 1] = (struct pollfd){ peers[i].fd, POLLIN, 0 };
		fds[PEERS_MAX + 1] = (struct pollfd){ options->commands ? STDIN_FILENO : -1, POLLIN, 0 };
		(void)poll(fds, PEERS_MAX + 2, 5);
		if (fds[PEERS_MAX + 1].revents & POLLIN)
			command_take(engine, group);
		if (fds[0].revents)
			accept_peer(listener, (unsigned)options->slow_arm_ms);
		for (int i = 0; i < PEERS_MAX; i++)
			if (peers[i].fd >= 0 && fds[i + 1].fd == peers[i].fd && fds[i + 1].revents) {
				int fd = peers[i].fd;

				engine_client_lost(engine, peers[i].token);
				peers[i].fd = -1; /* first: closed, the number may soon be another's */
				close(fd);
			}
		print_events();
		page_as_asked(command);
		if (options->pageout_every_ms && now_ms() >= next_pageout) {
			engine_client_pageout(engine, command, 10000);
			next_pageout = now_ms() + options->pageout_every_ms;
		}
		if (options->check_every_ms && now_ms() >= next_check) {
			if (engine_is_valid(engine) < 0) {
				fprintf(stderr, "drive: engine is not valid\n");
				exit(99);
			}
			next_check = now_ms() + options->check_every_ms;
		}
	}
}

static void print_crash_points(void)
{
#define PRINT_POINT(name, meaning) printf("%s\t%s\n", #name, meaning);
	CRASH_POINTS(PRINT_POINT)
}

static void parse(int argc, char **argv, struct options *options)
{
	static const struct option longs[] = {
		{ "limit", 1, 0, 'l' }, { "pool", 1, 0, 'p' }, { "spill", 1, 0, 's' },
		{ "torture", 0, 0, 't' }, { "lib", 1, 0, 'L' }, { "pageout-every", 1, 0, 'P' },
		{ "check-every", 1, 0, 'c' }, { "stats", 0, 0, 'S' }, { "kill-every", 1, 0, 'k' },
		{ "crash", 1, 0, 'C' }, { "crash-points", 0, 0, 'N' }, { "fail", 1, 0, 'F' }, { "delay", 1, 0, 'D' },
		{ "drain-every", 1, 0, 'd' }, { "commands", 0, 0, 'm' }, { "slow-arm", 1, 0, 'a' },
		{ "detach-every", 1, 0, 'e' }, { "synthetic-slots", 1, 0, 'y' }, { "encrypt", 0, 0, 'E' },
		{ "recompress", 1, 0, 'r' }, { "tiers", 0, 0, 'i' }, { "host-reserve", 1, 0, 'H' }, { 0, 0, 0, 0 } };
	int option;

	while ((option = getopt_long(argc, argv, "+", longs, NULL)) != -1)
		switch (option) {
		case 'l': options->limit_bytes = strtoull(optarg, NULL, 0); break;
		case 'p': options->pool_bytes = strtoull(optarg, NULL, 0); break;
		case 's': parse_spill(options->spill = optarg); break;
		case 'E': spill_flags = ENGINE_BACKEND_ENCRYPT; break;
		case 't': options->torture = 1; break;
		case 'L': options->library = optarg; break;
		case 'P': options->pageout_every_ms = strtoull(optarg, NULL, 0); break;
		case 'c': options->check_every_ms = strtoull(optarg, NULL, 0); break;
		case 'S': options->stats = 1; break;
		case 'k': options->kill_every_ms = strtoull(optarg, NULL, 0); break;
		case 'C': options->crash = optarg; break;
		case 'N': print_crash_points(); exit(0);
		case 'F': set_fault_point(optarg, 0); break;
		case 'D': set_fault_point(optarg, 1); break;
		case 'd': options->drain_every_ms = strtoull(optarg, NULL, 0); break;
		case 'e': options->detach_every_ms = strtoull(optarg, NULL, 0); break;
		case 'm': options->commands = 1; break;
		case 'y': options->synthetic_slots = strtoull(optarg, NULL, 0); break;
		case 'i': options->tiers = 1; break;
		case 'H': options->host_reserve_bytes = strtoull(optarg, NULL, 0); break;
		case 'r': options->recompress_age_ms = strtoull(optarg, NULL, 0); break;
		case 'a': options->slow_arm_ms = strtoull(optarg, NULL, 0); break;
		default: exit(2);
		}
	options->command = argv + optind;
	if (!options->library || !*options->command)
		exit(2);
}

static uint64_t now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* One daemon: serve until the command has ended. Returns the exit status of the run. */
static int run_daemon(const struct options *options, const struct engine_config *config, int listener,
		      pid_t command)
{
	char message[256] = "";
	int result = engine_create(config, &engine, message), status;
	pthread_t drainer, detacher;

	if (result < 0) {
		fprintf(stderr, "drive: %s\n", message);
		return 98;
	}
	if (engine_is_successor(engine)) {
		group = engine_group_find(engine, "drive");
		for (int i = 0; i < PEERS_MAX; i++)
			/* Cut off in its handshake it comes again; of a client that is gone the engine has closed
			 * the connection. */
			if (peers[i].fd >= 0 && (!peers[i].armed ||
						 engine_client_label(engine, peers[i].token, peers[i].fd, 0) < 0))
				peers[i].fd = -1;
	} else {
		group = engine_group_create(engine, "drive", options->limit_bytes, options->pool_bytes,
					    options->torture ? ENGINE_GROUP_TORTURE : 0);
		if (options->spill)
			spill_must(add_spill(0, 0));
		if (options->tiers)
			spill_must(add_spill_of(UPPER_SPILL_NUMBER, 10, UPPER_SPILL_BYTES));
		if (options->synthetic_slots)
			drive_add_synthetic_slots(engine, options->synthetic_slots);
	}
	(void)set_tiering(shared->tiering);
	(void)engine_set_host_reserve(engine, options->host_reserve_bytes, NULL, 0);
	if (options->drain_every_ms &&
	    pthread_create(&drainer, NULL, drain_main, (void *)(uintptr_t)options->drain_every_ms) != 0)
		fail("thread");
	if (options->detach_every_ms &&
	    pthread_create(&detacher, NULL, detach_main, (void *)(uintptr_t)options->detach_every_ms) != 0)
		fail("thread");
	__atomic_store_n(&shared->serving_us, now_us(), __ATOMIC_RELEASE);
	status = serve(options, listener, command);
	__atomic_store_n(&draining_ends, 1, __ATOMIC_RELEASE);
	if (options->detach_every_ms) {
		pthread_join(detacher, NULL);
		fprintf(stderr, "drive: %u detached by the last daemon\n", detached);
	}
	if (options->drain_every_ms) {
		pthread_join(drainer, NULL);
		fprintf(stderr, "drive: %u drained, %u refused, %u compacted by the last daemon\n", drained,
			drains_refused, compacted);
	}
	if (options->stats)
		print_statistics();
	print_events();
	print_fault_points();
	if (engine_is_valid(engine) < 0) {
		fprintf(stderr, "drive: engine is not valid at the end\n");
		return 99;
	}
	engine_destroy(engine);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static pid_t start_daemon(const struct options *options, const struct engine_config *config, int listener,
			  pid_t command)
{
	pid_t pid = supervise_fork();

	if (pid < 0)
		fail("supervise_fork");
	if (pid > 0)
		return pid;
#ifdef VSWAP_FAULT_POINTS
	if (options->crash && shared->started == 1) {
		char name[64] = "";
		unsigned call = 1;

		sscanf(options->crash, "%63[^:]:%u", name, &call);
		if (crash_point_arm(name, call) < 0)
			fail(name);
	}
#endif
	_exit(run_daemon(options, config, listener, command));
}

/* Start daemons, kill them, start others, until the command has ended. */
static int supervise(const struct options *options, struct engine_config *config, int listener)
{
	int32_t keep[1] = { listener };
	char path[64];
	uint64_t pause_us_max = 0, died_us = 0, kill_at_ms = 0;
	unsigned seed = (unsigned)getpid(), kills = 0;
	pid_t command, daemon;

	config->keep_fds = keep;
	config->keep_count = 1;
	if (engine_make_memfds(&config->state_fd, &config->pool_fd) < 0)
		fail("memfds");
	snprintf(path, sizeof path, "/tmp/vswap-drive-%d.sock", getpid());
	command = start_command(options, path);
	for (shared->started = 1;; shared->started++) {
		int status = 0;

		daemon = start_daemon(options, config, listener, command);
		kill_at_ms = options->kill_every_ms ? now_ms() + (unsigned)rand_r(&seed) %
								       (2 * options->kill_every_ms)
						    : UINT64_MAX;
		while (waitpid(daemon, &status, WNOHANG) == 0) {
			uint64_t serving_us = __atomic_load_n(&shared->serving_us, __ATOMIC_ACQUIRE);

			if (died_us && serving_us > died_us) {
				pause_us_max = serving_us - died_us > pause_us_max ? serving_us - died_us
										   : pause_us_max;
				died_us = 0;
			}
			if (!shared->is_ended && waitpid(command, &shared->status, WNOHANG) == command) {
				__atomic_store_n(&shared->is_ended, 1, __ATOMIC_RELEASE);
				kill_at_ms = UINT64_MAX;
			}
			if (now_ms() >= kill_at_ms) {
				kill(daemon, SIGKILL);
				kill_at_ms = UINT64_MAX;
			}
			usleep(500);
		}
		if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
			if (WIFSIGNALED(status))
				fprintf(stderr, "drive: the daemon ended by signal %d\n", WTERMSIG(status));
			fprintf(stderr, "drive: %u deaths, longest pause %lu us\n", kills,
				(unsigned long)pause_us_max);
			return WIFEXITED(status) ? WEXITSTATUS(status) : 98;
		}
		kills++;
		if (options->commands) {
			printf("died\n");
			fflush(stdout);
		}
		died_us = died_us ? died_us : now_us();
	}
}

int main(int argc, char **argv)
{
	struct options options = { .limit_bytes = 256UL << 20 };
	struct engine_config config = { 0 };
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int listener, status;

	parse(argc, argv, &options);
	config.recompress_age_ms = (uint32_t)options.recompress_age_ms;
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		fail("mmap");
	shared->tiering = options.tiers;
	peers = shared->peers;
	for (int i = 0; i < PEERS_MAX; i++)
		peers[i].fd = -1;
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	snprintf(address.sun_path, sizeof address.sun_path, "/tmp/vswap-drive-%d.sock", getpid());
	unlink(address.sun_path); /* of a drive that was killed */
	listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 64) != 0)
		fail("socket");
	signal(SIGINT, SIG_IGN);
	signal(SIGUSR1, on_signal);
	signal(SIGUSR2, on_signal);
	if (is_supervised(&options))
		status = supervise(&options, &config, listener);
	else
		status = run_daemon(&options, &config, listener, start_command(&options, address.sun_path));
	unlink(address.sun_path);
	return status;
}
