/* SPDX-License-Identifier: MIT */
/* agent_client — see agent_client.h. One thread. Knows nothing of vswap. */
#define _GNU_SOURCE
#include "agent_client.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096u

static unsigned char *buffer;

static void answer(const char *text, long number)
{
	char line[64];
	int length = snprintf(line, sizeof line, "%s %ld\n", text, number);

	if (write(1, line, (size_t)length) != length)
		_exit(90);
}

static void fill(int seed)
{
	for (int i = 0; i < CLIENT_PAGES; i++)
		memset(buffer + (size_t)i * PAGE, seed + i, PAGE);
	answer("ok", 0);
}

static void check(int seed)
{
	for (int i = 0; i < CLIENT_PAGES; i++)
		for (unsigned j = 0; j < PAGE; j++)
			if (buffer[(size_t)i * PAGE + j] != (unsigned char)(seed + i)) {
				answer("bad", i);
				return;
			}
	answer("ok", 0);
}

static void grow(void)
{
	char *ballast = mmap(NULL, CLIENT_GROW_BYTES, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (ballast != MAP_FAILED)
		memset(ballast, 1, CLIENT_GROW_BYTES);
	answer("ok", 0);
}

static void fork_and_wait(void)
{
	int status;
	pid_t child = fork();

	if (child == 0) {
		answer("child", getpid());
		return; /* it goes on reading commands, its parent waits */
	}
	if (child < 0 || waitpid(child, &status, 0) != child)
		_exit(91);
	answer("ended", WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
}

static void seccomp_allow_all(void)
{
	struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = { 1, &allow };

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	answer("ok", syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
}

static void become(uid_t uid)
{
	int result = setgroups(0, NULL);

	result = result ? result : setresgid(uid, uid, uid);
	result = result ? result : setresuid(uid, uid, uid);
	answer(result == 0 && getuid() == uid ? "ok" : "bad", errno);
}

/* Has the agent replaced again and again, and reads a page each time ("fill 10" came before). */
static void follow(int times)
{
	int failed = 0;

	for (int i = 0; i < times; i++) {
		int page = i % CLIENT_PAGES;

		failed += setresuid((uid_t)-1, (uid_t)-1, (uid_t)-1) != 0;
		failed += buffer[(size_t)page * PAGE + 99] != (unsigned char)(10 + page);
	}
	answer("ok", failed);
}

/* Children that live too short to become anything. Answers how many did not end well. */
static void fork_many(int times)
{
	int status, failed = 0;

	for (int i = 0; i < times; i++) {
		pid_t child = fork();

		if (child == 0)
			_exit(buffer[0] == 10 ? 0 : 1);
		failed += waitpid(child, &status, 0) != child || status != 0;
	}
	answer("ok", failed);
}

/* A userfaultfd of its own for the buffer, through libc's ioctl. Answers the errno. */
static void watch_itself(void)
{
	struct uffdio_register buffer_range = { .range = { (uintptr_t)buffer, CLIENT_PAGES * PAGE },
						.mode = UFFDIO_REGISTER_MODE_MISSING };
	struct uffdio_api api = { .api = UFFD_API };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) != 0)
		_exit(93);
	answer("ok", ioctl(fd, UFFDIO_REGISTER, &buffer_range) == 0 ? 0 : errno);
	close(fd);
}

static void count_descriptors(void)
{
	DIR *directory = opendir("/proc/self/fd");
	long count = -3; /* dot, dot dot, the directory itself */

	while (directory && readdir(directory))
		count++;
	if (directory)
		closedir(directory);
	answer("ok", count);
}

static void obey(char *line)
{
	int argument = 0;
	char *space = strchr(line, ' ');

	if (space) {
		*space = 0;
		argument = atoi(space + 1);
	}
	if (!strcmp(line, "fill"))
		fill(argument);
	else if (!strcmp(line, "check"))
		check(argument);
	else if (!strcmp(line, "grow"))
		grow();
	else if (!strcmp(line, "fork"))
		fork_and_wait();
	else if (!strcmp(line, "close"))
		answer("ok", close_range(3, ~0u, 0));
	else if (!strcmp(line, "unshare"))
		answer("ok", unshare(CLONE_NEWUSER) == 0 ? 0 : errno);
	else if (!strcmp(line, "become"))
		become((uid_t)argument);
	else if (!strcmp(line, "follow"))
		follow(argument);
	else if (!strcmp(line, "forks"))
		fork_many(argument);
	else if (!strcmp(line, "seccomp"))
		seccomp_allow_all();
	else if (!strcmp(line, "mlockall"))
		answer("ok", mlockall(MCL_CURRENT | MCL_FUTURE));
	else if (!strcmp(line, "watch"))
		watch_itself();
	else if (!strcmp(line, "count"))
		count_descriptors();
	else if (!strcmp(line, "pthread_exit"))
		pthread_exit(NULL);
	else if (!strcmp(line, "raw_exit"))
		syscall(SYS_exit, argument);
	else if (!strcmp(line, "exit"))
		exit(argument);
	else
		answer("unknown", 0);
}

int agent_client_main(void)
{
	char line[64];
	unsigned used = 0;

	buffer = mmap(NULL, CLIENT_PAGES * PAGE, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (buffer == MAP_FAILED)
		return 92;
	answer("ready", (long)buffer);
	/* Byte by byte: what is behind the newline may be for a child. */
	while (read(0, line + used, 1) == 1) {
		if (line[used] != '\n' && used < sizeof line - 1) {
			used++;
			continue;
		}
		line[used] = 0;
		used = 0;
		obey(line);
	}
	return 0;
}
