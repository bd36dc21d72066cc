/* SPDX-License-Identifier: MIT */
/*
 * operations — the operation table: every memory operation of a program, while its pages are out.
 *
 *   operations --list                        names of all rows
 *   operations [--torture] BACKING [ROW...]  zero, same, pool, raw, spill, kept, resident; all rows by default
 *
 * Writes "ROW BACKING ok", or "ROW BACKING " and what was wrong, for each row. Rows run one after the
 * other in one process, a worker; those that leave it changed get one of their own. A worker that dies or
 * hangs costs its row only. Exit status 0: every row was right.
 *
 * Without VSWAPD_SOCKET in the environment nothing is ever paged out: the rows must be right then, too.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "operations.h"
#include "operations_internal.h"

#define ROWS_MAX 256
#define ROW_MS_MAX 30000
#define LINE_BYTES 512

extern char **environ;

static const char *const backing_names[BACKING_COUNT] = { "zero", "same", "pool", "raw",
							  "spill", "kept", "resident" };
static const struct row *const tables[] = { fork_rows, map_rows, advice_rows, lock_rows, io_rows, userfaultfd_rows,
					    process_rows };
const char *program_path;
static const char *row_name = "-";
static pid_t worker_pid;

/* ---- what rows call ---- */

static void say(const char *text)
{
	char line[LINE_BYTES];
	int length = snprintf(line, sizeof line, "%s %s %s\n", row_name, backing_names[backing], text);

	if (length >= (int)sizeof line)
		length = (int)sizeof line - 1;
	line[length - 1] = '\n';
	(void)!write(STDOUT_FILENO, line, (size_t)length);
}

void must(bool condition, const char *format, ...)
{
	char text[LINE_BYTES - 100];
	va_list list;
	int used = 0;

	if (condition)
		return;
	if (getpid() != worker_pid)
		used = snprintf(text, sizeof text, "in child %d: ", getpid());
	va_start(list, format);
	vsnprintf(text + used, sizeof text - (size_t)used, format, list);
	va_end(list);
	for (char *at = text; *at; at++)
		if (*at == '\n')
			*at = ' ';
	say(text);
	_exit(1);
}

void must_call(bool condition, const char *call) { must(condition, "%s: %s", call, strerror(errno)); }

void wait_for(pid_t pid, int status, const char *who)
{
	int got = 0;

	must_call(waitpid(pid, &got, 0) == pid, "waitpid");
	must(!WIFSIGNALED(got), "%s died of signal %d", who, WTERMSIG(got));
	must(WEXITSTATUS(got) == status, "%s ended with %d, not %d", who, WEXITSTATUS(got), status);
}

_Noreturn void child_done(void) { _exit(0); }

struct token token_make(void)
{
	struct token token;

	must_call(pipe(token.fds) == 0, "pipe");
	return token;
}

void token_send(const struct token *token) { must_call(write(token->fds[1], "x", 1) == 1, "write token"); }

void token_wait(const struct token *token)
{
	char byte;

	must(read(token->fds[0], &byte, 1) == 1, "no token: the other process ended");
}

/* ---- worker: runs rows in its own process ---- */

static const struct row *row_find(const char *name)
{
	for (size_t t = 0; t < sizeof tables / sizeof *tables; t++)
		for (const struct row *row = tables[t]; row->name; row++)
			if (strcmp(row->name, name) == 0)
				return row;
	return NULL;
}

static int work(char **names)
{
	worker_pid = getpid();
	for (; *names; names++) {
		const struct row *row = row_find(*names);

		row_name = *names;
		must(row, "no such row");
		row->run();
		say("ok");
	}
	return 0;
}

/* ---- supervisor: starts workers, reads their lines ---- */

struct output {
	int fd;
	char text[4 * LINE_BYTES];
	size_t used;
};

/* One line, without its end: 1; 0 at the end of output, -1 after ROW_MS_MAX. */
static int output_line(struct output *output, char line[static LINE_BYTES])
{
	for (;;) {
		struct pollfd ready = { output->fd, POLLIN, 0 };
		char *end = memchr(output->text, '\n', output->used);
		ssize_t got;

		if (end) {
			size_t length = (size_t)(end - output->text);

			memcpy(line, output->text, length < LINE_BYTES ? length : LINE_BYTES - 1);
			line[length < LINE_BYTES ? length : LINE_BYTES - 1] = '\0';
			output->used -= length + 1;
			memmove(output->text, end + 1, output->used);
			return 1;
		}
		if (poll(&ready, 1, ROW_MS_MAX) == 0)
			return -1;
		got = read(output->fd, output->text + output->used, sizeof output->text - output->used);
		if (got <= 0)
			return 0;
		output->used += (size_t)got;
	}
}

static pid_t worker_start(const struct row *const *rows, size_t count, int *ret_fd)
{
	char *argv[ROWS_MAX + 5] = { "operations", "--work" };
	posix_spawn_file_actions_t actions;
	int fds[2], argc = 2;
	pid_t pid = -1;

	if (is_tortured)
		argv[argc++] = "--torture";
	argv[argc++] = (char *)(uintptr_t)backing_names[backing];
	for (size_t i = 0; i < count; i++)
		argv[argc++] = (char *)(uintptr_t)rows[i]->name;
	argv[argc] = NULL;
	if (pipe(fds) != 0)
		return -1;
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, fds[1], STDOUT_FILENO);
	posix_spawn_file_actions_addclose(&actions, fds[0]);
	posix_spawn_file_actions_addclose(&actions, fds[1]);
	if (posix_spawn(&pid, "/proc/self/exe", &actions, NULL, argv, environ) != 0)
		pid = -1;
	posix_spawn_file_actions_destroy(&actions);
	close(fds[1]);
	*ret_fd = fds[0];
	return pid;
}

/* Of the rows, all that the worker finishes: the first one without a good line ends it. */
static size_t run_in_worker(const struct row *const *rows, size_t count, bool *ret_right)
{
	struct output output = { .fd = -1 };
	pid_t pid = worker_start(rows, count, &output.fd);
	char line[LINE_BYTES];
	size_t done = 0;
	int status = 0, got = -1;

	while (pid > 0 && done < count && (got = output_line(&output, line)) > 0) {
		char good[LINE_BYTES];

		printf("%s\n", line);
		snprintf(good, sizeof good, "%s %s ok", rows[done]->name, backing_names[backing]);
		done++;
		if (strcmp(line, good) != 0) {
			*ret_right = false;
			count = done;
		}
	}
	if (done < count) {
		*ret_right = false;
		if (pid > 0 && got < 0)
			kill(pid, SIGKILL);
	}
	if (pid > 0)
		waitpid(pid, &status, 0);
	close(output.fd);
	if (done == count)
		return done;
	printf("%s %s %s %d\n", rows[done]->name, backing_names[backing],
	       got < 0               ? "hung, ended with"
	       : WIFSIGNALED(status) ? "died of signal"
				     : "ended with status",
	       WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
	return done + 1;
}

static int supervise(const struct row *const *rows, size_t count)
{
	bool right = true;

	/* A worker is managed from its start on, however small it is. */
	setenv("VSWAP_MIN_BYTES", "0", 1);
	for (size_t done = 0; done < count;) {
		size_t together = 1;

		if (!(rows[done]->flags & ROW_OWN))
			while (done + together < count && !(rows[done + together]->flags & ROW_OWN))
				together++;
		done += run_in_worker(rows + done, together, &right);
		fflush(stdout);
	}
	return right ? 0 : 1;
}

/* ---- arguments ---- */

static bool backing_parse(const char *name)
{
	for (int i = 0; i < BACKING_COUNT; i++)
		if (strcmp(name, backing_names[i]) == 0) {
			backing = (enum backing)i;
			return true;
		}
	return false;
}

static size_t all_rows(const struct row **rows)
{
	unsigned without = is_tortured ? ROW_CALM : 0;
	size_t count = 0;

	/* Those that can share a worker first: then one worker does for all of them. */
	for (unsigned own = 0; own < 2; own++)
		for (size_t t = 0; t < sizeof tables / sizeof *tables; t++)
			for (const struct row *row = tables[t]; row->name; row++)
				if (!(row->flags & ROW_OWN) == !own && !(row->flags & without))
					rows[count++] = row;
	return count;
}

static int usage(void)
{
	fprintf(stderr, "usage: operations [--torture] BACKING [ROW...], or operations --list\n");
	return 2;
}

int main(int argc, char **argv)
{
	const struct row *rows[ROWS_MAX];
	size_t count = 0;
	bool is_worker = argc > 1 && strcmp(argv[1], "--work") == 0;
	char **arguments = argv + 1 + is_worker;

	program_path = "/proc/self/exe";
	if (argc > 1 && strcmp(argv[1], "--exit") == 0)
		return argc > 2 ? atoi(argv[2]) : 0; /* what rows exec */
	if (argc > 1 && strcmp(argv[1], "--list") == 0) {
		count = all_rows(rows);
		for (size_t i = 0; i < count; i++)
			printf("%s\n", rows[i]->name);
		return 0;
	}
	if (*arguments && strcmp(*arguments, "--torture") == 0) {
		is_tortured = true;
		arguments++;
	}
	if (!*arguments || !backing_parse(*arguments))
		return usage();
	arguments++;
	if (is_worker)
		return work(arguments);
	if (!*arguments)
		count = all_rows(rows);
	for (; *arguments && count < ROWS_MAX; arguments++) {
		rows[count] = row_find(*arguments);
		if (!rows[count++])
			return usage();
	}
	return supervise(rows, count);
}
