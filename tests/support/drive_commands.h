/* SPDX-License-Identifier: MIT */
/*
 * drive_commands — `drive --commands`: the engine is told what to do on standard input, a line at a time, each behind a
 * number; it is answered by one on standard output, "NUMBER ok …" or "NUMBER error ERRNO". A daemon that dies answers
 * nothing: its supervisor writes "died", and the next daemon takes the lines that were not taken.
 *
 *   limit BYTES POOL          POOL 0: no limit of the pool's own; up to 2 MiB: all that can be is written back
 *   budget BYTES              on backends
 *   pageout PID [MS]          what has nowhere to go is waited for so long
 *   pagein PID [MS]
 *   cool PID ADDRESS BYTES
 *   swapon PRIORITY MIB       "ok BACKEND"; a file of its own, of the size of the first if MIB is 0
 *   tiers 0|1                 pages move between backends by themselves or do not; later daemons do likewise
 *   swapoff BACKEND           with `force` behind it: waits for room
 *   compact BACKEND
 *   statistics                "ok NAME=VALUE …": totals and counters
 *   client PID                the same of one client
 *   backend BACKEND           the same of one backend
 *   backends                  "ok BACKEND …"
 *   valid                     all invariants
 *   sync                      nothing
 *   die
 *   crash POINT CALL          at that call of a crash point
 */
#ifndef DRIVE_COMMANDS_H
#define DRIVE_COMMANDS_H

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "crash_point.h"
#include "engine.h"

#define PAGE_MS 20000
#define CLIENTS_LISTED 64

/* drive.c */
static int add_spill_of(int number, int priority, uint64_t bytes); /* a backend, or -errno */
static int set_tiering(int on);

static void reply_result(int result)
{
	if (result < 0)
		printf("error %d\n", -result);
	else
		printf("ok %d\n", result);
}

static void reply_statistics(struct engine *engine)
{
	static struct engine_statistics s;

	(void)engine_statistics(engine, &s);
	printf("ok virtual=%lu zero=%lu same=%lu pool=%lu spill=%lu staged=%lu kept=%lu poisoned=%lu clients=%u backends=%u"
	       " pool_bytes=%lu object_bytes=%lu",
	       s.virtual_pages, s.zero_pages, s.same_pages, s.pool_pages, s.spill_pages, s.staged_pages, s.kept_pages,
	       s.poisoned_pages, s.client_count, s.backend_count, s.pool_bytes, s.pool_object_bytes);
#define PRINT_COUNTER(name, meaning) printf(" %s=%lu", #name, s.counters.name);
	ENGINE_COUNTERS(PRINT_COUNTER)
#undef PRINT_COUNTER
	printf("\n");
}

static void reply_client(struct engine *engine, int pid)
{
	static struct engine_client_statistics clients[CLIENTS_LISTED];
	int count = engine_client_list(engine, clients, CLIENTS_LISTED);

	for (int i = 0; i < count && i < CLIENTS_LISTED; i++) {
		const struct engine_client_statistics *c = &clients[i];

		if (c->pid != pid)
			continue;
		printf("ok swapped=%lu zero=%lu same=%lu pool=%lu spill=%lu kept=%lu registered=%u faults=%lu\n",
		       c->swapped_pages, c->zero_pages, c->same_pages, c->pool_pages, c->spill_pages, c->kept_pages,
		       c->registered, c->faults);
		return;
	}
	printf("error %d\n", ESRCH);
}

static void reply_backend(struct engine *engine, int number)
{
	static struct engine_backend_statistics backends[16];
	int count = engine_backend_list(engine, backends, 16);

	for (int i = 0; i < count && i < 16; i++) {
		const struct engine_backend_statistics *b = &backends[i];

		if (b->backend != number)
			continue;
		printf("ok state=%u used=%lu live=%lu extents=%lu read=%lu written=%lu\n", b->state, b->used_bytes,
		       b->live_bytes, b->extent_count, b->read_bytes, b->written_bytes);
		return;
	}
	printf("error %d\n", ENOENT);
}

static void reply_backends(struct engine *engine)
{
	static struct engine_backend_statistics backends[16];
	int count = engine_backend_list(engine, backends, 16);

	printf("ok");
	for (int i = 0; i < count && i < 16; i++)
		printf(" %d", backends[i].backend);
	printf("\n");
}

static int swapoff(struct engine *engine, int number, int force)
{
	struct engine_room room;
	int result = engine_backend_drain_begin(engine, 1u << number, force, &room);

	return result < 0 ? result : engine_backend_drain(engine, number, force);
}

static int arm_crash(const char *line)
{
#ifdef VSWAP_FAULT_POINTS
	char name[64];
	unsigned call;

	return sscanf(line, "%*s %63s %u", name, &call) == 2 ? crash_point_arm(name, call) : -EINVAL;
#else
	(void)line;
	return -ENOSYS;
#endif
}

/* What answers with figures: true when it was that. */
static int command_ask(struct engine *engine, const char *verb, int number)
{
	if (strcmp(verb, "statistics") == 0)
		reply_statistics(engine);
	else if (strcmp(verb, "client") == 0)
		reply_client(engine, number);
	else if (strcmp(verb, "backend") == 0)
		reply_backend(engine, number);
	else if (strcmp(verb, "backends") == 0)
		reply_backends(engine);
	else
		return 0;
	return 1;
}

static int command_do(struct engine *engine, int group, const char *line, const char *verb)
{
	unsigned long long a = 0, b = 0, c = 0;
	char word[32] = "";
	static int files;

	(void)sscanf(line, "%*s %llu %llu %llu", &a, &b, &c);
	(void)sscanf(line, "%*s %*s %31s", word);
	if (strcmp(verb, "limit") == 0)
		return engine_group_set_limit(engine, group, a, b);
	if (strcmp(verb, "budget") == 0)
		return engine_group_set_spill_limit(engine, group, a);
	if (strcmp(verb, "pageout") == 0)
		return engine_client_pageout(engine, (int)a, b ? (int)b : PAGE_MS);
	if (strcmp(verb, "pagein") == 0)
		return engine_client_pagein(engine, (int)a, b ? (int)b : PAGE_MS);
	if (strcmp(verb, "cool") == 0)
		return engine_client_cool(engine, (int)a, b, c);
	if (strcmp(verb, "swapon") == 0)
		return add_spill_of(getpid() % 10000000 * 100 + ++files % 100, (int)a, b << 20);
	if (strcmp(verb, "tiers") == 0)
		return set_tiering(a != 0);
	if (strcmp(verb, "swapoff") == 0)
		return swapoff(engine, (int)a, strcmp(word, "force") == 0);
	if (strcmp(verb, "compact") == 0)
		return engine_backend_compact(engine, (int)a);
	if (strcmp(verb, "valid") == 0)
		return engine_is_valid(engine);
	if (strcmp(verb, "crash") == 0)
		return arm_crash(line);
	if (strcmp(verb, "die") == 0)
		return kill(getpid(), SIGKILL);
	return strcmp(verb, "sync") == 0 ? 0 : -EINVAL;
}

static void command_obey(struct engine *engine, int group, const char *line)
{
	char verb[32] = "";
	char *rest;
	unsigned long number = strtoul(line, &rest, 10);

	(void)sscanf(rest, "%31s", verb);
	printf("%lu ", number);
	if (!command_ask(engine, verb, atoi(rest + strcspn(rest, "0123456789"))))
		reply_result(command_do(engine, group, rest, verb));
	fflush(stdout);
}

/* One line of standard input, if there is one: byte by byte, for the next daemon has to find what this one has not read. */
static void command_take(struct engine *engine, int group)
{
	char line[256];
	size_t length = 0;

	while (length + 1 < sizeof line && read(STDIN_FILENO, line + length, 1) == 1)
		if (line[length++] == '\n') {
			line[length - 1] = '\0';
			command_obey(engine, group, line);
			return;
		}
}

#endif
