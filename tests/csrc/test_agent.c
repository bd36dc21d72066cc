/* SPDX-License-Identifier: MIT */
/*
 * test_agent — libvswap.so against a miniature daemon: real agent, real userfaultfd, real
 * processes.
 *
 *     test_agent LIBRARY [NAME...]      path of libvswap.so; names of tests, all by default
 *
 * Needs root (EVENT_FORK wants CAP_SYS_PTRACE) and /dev/userfaultfd; exits 77 (skipped) without.
 *
 * Build (meson):
 *     agent_lib = static_library('agent', 'csrc/agent.c', 'csrc/agent_join.c', 'csrc/agent_ring.c',
 *         pic: true, gnu_symbol_visibility: 'hidden', override_options: ['b_sanitize=none'],
 *         c_args: ['-ffreestanding', '-fno-stack-protector', '-fno-builtin',
 *                  '-fno-tree-loop-distribute-patterns'])
 *     vswap = shared_module('vswap', 'csrc/preload.c', 'csrc/preload_replace.c',
 *         name_prefix: 'lib', c_args: ['-fvisibility=hidden'],
 *         objects: agent_lib.extract_all_objects(recursive: false),
 *         gnu_symbol_visibility: 'hidden', override_options: ['b_sanitize=none', 'b_lto=false'],
 *         link_args: ['-Wl,--version-script=' + meson.current_source_dir() / 'csrc/preload.map',
 *                     '-Wl,-z,now', '-Wl,-z,defs'], link_depends: 'csrc/preload.map')
 *     test('agent', executable('test_agent', 'tests/csrc/test_agent.c', 'tests/csrc/mini_daemon.c',
 *         'tests/csrc/agent_client.c', include_directories: 'csrc', dependencies: threads),
 *         args: [vswap], timeout: 120)
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent_client.h"
#include "mini_daemon.h"

#define MINIMUM "4194304"
#define RUN_SECONDS 60
#define min_of(a, b) ((a) < (b) ? (a) : (b))

static const char *library, *self;
static char directory[] = "/tmp/vswap-test-agent-XXXXXX", socket_path[64];
static const char *verbose = "0";

/* ---- a client process ---- */

struct program {
	pid_t pid;
	int in, out, err; /* write, read, read */
	uint64_t buffer;
};

static void environment_set(void)
{
	setenv("LD_PRELOAD", library, 1);
	setenv("VSWAPD_SOCKET", socket_path, 1);
	setenv("VSWAP_GROUP", "tests", 1);
	setenv("VSWAP_MIN_BYTES", MINIMUM, 1);
	setenv("VSWAP_VERBOSE", verbose, 1);
}

/* Run argv under the library with pipes for its descriptors; `extra` (or -1) is inherited as 9. */
static struct program run(char **argv, int extra)
{
	struct program program = { 0 };
	int in[2], out[2], err[2];

	CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0);
	CHECK(pipe2(err, O_CLOEXEC) == 0);
	program.pid = fork();
	CHECK(program.pid >= 0);
	if (program.pid == 0) {
		dup2(in[0], 0);
		dup2(out[1], 1);
		dup2(err[1], 2);
		if (extra >= 0)
			dup2(extra, 9);
		/* Whoever started the test may have left some, and they are counted. */
		close_range(3, 8, 0);
		close_range(extra >= 0 ? 10 : 9, ~0u, 0);
		environment_set();
		execvp(argv[0], argv);
		_exit(99);
	}
	close(in[0]);
	close(out[1]);
	close(err[1]);
	program.in = in[1];
	program.out = out[0];
	program.err = err[0];
	return program;
}

static void line_read(int fd, char *line, size_t size)
{
	size_t used = 0;

	for (;;) {
		struct pollfd ready = { .fd = fd, .events = POLLIN };

		CHECK(used < size && poll(&ready, 1, PATIENCE_MS) == 1);
		CHECK(read(fd, line + used, 1) == 1);
		if (line[used] == '\n')
			break;
		used++;
	}
	line[used] = 0;
}

/* The answer must begin with `expected`; returns its number. */
static long expect(struct program *program, const char *expected)
{
	char line[64];

	line_read(program->out, line, sizeof line);
	if (strncmp(line, expected, strlen(expected))) {
		fprintf(stderr, "expected \"%s\", got \"%s\"\n", expected, line);
		exit(1);
	}
	return strtol(line + strlen(expected), NULL, 10);
}

static void tell(struct program *program, const char *command)
{
	CHECK(write(program->in, command, strlen(command)) == (ssize_t)strlen(command));
	CHECK(write(program->in, "\n", 1) == 1);
}

static long ask(struct program *program, const char *command, const char *expected)
{
	tell(program, command);
	return expect(program, expected);
}

static struct program client_run(int extra)
{
	char *argv[] = { (char *)(uintptr_t)self, (char *)(uintptr_t)"--client", NULL };
	struct program program = run(argv, extra);

	program.buffer = (uint64_t)expect(&program, "ready");
	return program;
}

/* Closes its stdin, so that an interpreter ends; returns its wait status. */
static int program_end(struct program *program)
{
	struct pollfd ended = { .fd = -1, .events = POLLIN };
	int status;

	close(program->in);
	ended.fd = (int)syscall(SYS_pidfd_open, program->pid, 0);
	CHECK(poll(&ended, 1, PATIENCE_MS) == 1);
	close(ended.fd);
	CHECK(waitpid(program->pid, &status, 0) == program->pid);
	close(program->out);
	return status;
}

/* All that was written to its stderr, to the end: counts lines. */
static int stderr_lines(struct program *program, char *text, size_t size)
{
	size_t used = 0;
	ssize_t got;
	int lines = 0;

	while (used < size - 1 && (got = read(program->err, text + used, size - 1 - used)) > 0)
		used += (size_t)got;
	text[used] = 0;
	for (const char *at = text; *at; at++)
		lines += *at == '\n';
	close(program->err);
	return lines;
}

static void expect_quiet_end(struct program *program)
{
	char text[1024];
	int status = program_end(program);

	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	CHECK(stderr_lines(program, text, sizeof text) == 0);
}

/* ---- looking at a process ---- */

/* The agent's thread id, or 0. *ret_tasks: how many tasks there are. */
static pid_t agent_find(pid_t pid, int *ret_tasks)
{
	char path[300], name[32] = "";
	struct dirent *entry;
	DIR *tasks;
	pid_t agent = 0;

	*ret_tasks = 0;
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	tasks = opendir(path);
	while (tasks && (entry = readdir(tasks))) {
		FILE *file;

		if (entry->d_name[0] == '.')
			continue;
		(*ret_tasks)++;
		snprintf(path, sizeof path, "/proc/%d/task/%s/comm", pid, entry->d_name);
		file = fopen(path, "re");
		if (file && fgets(name, sizeof name, file) && !strcmp(name, "vswap-agent\n"))
			agent = atoi(entry->d_name);
		if (file)
			fclose(file);
	}
	if (tasks)
		closedir(tasks);
	return agent;
}

static int entries_of(const char *path)
{
	DIR *opened = opendir(path);
	int count = -2;

	CHECK(opened);
	while (readdir(opened))
		count++;
	closedir(opened);
	return count;
}

static void wait_agent(pid_t pid, bool wanted)
{
	int tasks = 0;

	for (int i = 0; i < PATIENCE_MS; i++) {
		if ((agent_find(pid, &tasks) != 0) == wanted && (wanted || tasks == 1))
			return;
		usleep(1000);
	}
	CHECK(!"the agent is there, or gone, as expected");
}

/* One line of /proc/PID/status of a task. */
static void status_line(pid_t pid, const char *name, char *line, size_t size)
{
	char path[64];
	FILE *file;

	snprintf(path, sizeof path, "/proc/%d/status", pid);
	file = fopen(path, "re");
	CHECK(file);
	while (fgets(line, (int)size, file))
		if (!strncmp(line, name, strlen(name))) {
			fclose(file);
			return;
		}
	CHECK(!"the line is there");
}

/* A managed client whose pages are filled from 10 on and registered. */
static struct peer *managed(struct program *program, int listener)
{
	struct peer *peer;

	ask(program, "fill 10", "ok");
	ask(program, "grow", "ok");
	peer = peer_accept(listener);
	CHECK(peer->pid == program->pid && peer->hello.kind == VSWAP_HELLO_NEW);
	CHECK(!strcmp(peer->hello.group, "tests") && peer->hello.token == 0);
	peer_arm(peer, NULL);
	peer_register(peer, program->buffer, CLIENT_PAGES);
	return peer;
}

#include "test_agent_cases.h"

/* ---- main ---- */

struct test_case {
	const char *name;
	void (*run)(void);
};

static const struct test_case cases[] = {
	{ "exec", test_exec },
	{ "absent", test_absent },
	{ "refused", test_refused },
	{ "descriptors", test_descriptors },
	{ "move", test_move },
	{ "close_range", test_close_range },
	{ "fork_managed", test_fork_managed },
	{ "fork_interleaved", test_fork_interleaved },
	{ "fork_again", test_fork_again },
	{ "fork_unmanaged", test_fork_unmanaged },
	{ "fork_refused", test_fork_refused },
	{ "last_thread", test_last_thread },
	{ "unshare", test_unshare },
	{ "setuid", test_setuid },
	{ "replace_storm", test_replace_storm },
	{ "fork_storm", test_fork_storm },
	{ "seccomp", test_seccomp },
	{ "mlockall", test_mlockall },
	{ "hangup", test_hangup },
	{ "left_while_asking", test_left_while_asking },
};

static bool is_wanted(const char *name, char **names)
{
	if (!*names)
		return true;
	while (*names)
		if (!strcmp(*names++, name))
			return true;
	return false;
}

int main(int argc, char **argv)
{
	unsigned passed = 0;

	if (argc == 2 && !strcmp(argv[1], "--client"))
		return agent_client_main();
	if (argc < 2) {
		fprintf(stderr, "usage: %s LIBRARY [NAME...]\n", argv[0]);
		return 2;
	}
	if (geteuid() != 0 || access("/dev/userfaultfd", R_OK | W_OK) != 0) {
		puts("skipped: needs root and /dev/userfaultfd");
		return 77;
	}
	library = realpath(argv[1], NULL);
	self = realpath(argv[0], NULL);
	CHECK(library && self && mkdtemp(directory) && chmod(directory, 0755) == 0);
	snprintf(socket_path, sizeof socket_path, "%s/socket", directory);
	signal(SIGPIPE, SIG_IGN);
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		if (!is_wanted(cases[i].name, argv + 2))
			continue;
		alarm(RUN_SECONDS);
		printf("%s\n", cases[i].name);
		fflush(stdout);
		verbose = "0";
		cases[i].run();
		unlink(socket_path);
		passed++;
	}
	rmdir(directory);
	printf("%u passed, 0 failed\n", passed);
	return 0;
}
