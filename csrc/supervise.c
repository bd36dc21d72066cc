/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "supervise.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * libc keeps the number of a thread where the kernel clears it at the thread's end, and fork(3) has it
 * written there in the child. With the same place and flags the child's libc cannot tell that it was
 * made by another call; only what pthread_atfork has registered does not run.
 */
int supervise_fork(void)
{
	int *thread_number = NULL;
	long pid;

	if (prctl(PR_GET_TID_ADDRESS, &thread_number) != 0 || !thread_number)
		return -ENOSYS;
	pid = syscall(SYS_clone, CLONE_FILES | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD, NULL,
		      NULL, thread_number, NULL);
	return pid < 0 ? -errno : (int)pid;
}

/* One descriptor. pidfd_getfd gives the lowest free number, which is then free again, or the right one. */
static int take_descriptor(int pidfd, int number)
{
	int fd = (int)syscall(SYS_pidfd_getfd, pidfd, number, 0), error = 0;

	if (fd < 0)
		return errno == EBADF ? 0 : -errno; /* closed meanwhile: what listed the others */
	if (fd == number)
		return 0;
	if (dup3(fd, number, O_CLOEXEC) < 0)
		error = -errno;
	close(fd);
	return error;
}

int supervise_take_descriptors(int pid, int below)
{
	char path[32];
	int pidfd = (int)syscall(SYS_pidfd_open, pid, 0), above, result = 0;
	const struct dirent *entry;
	DIR *directory;

	if (pidfd < 0)
		return -errno;
	/* Out of the way of the numbers to come. */
	above = fcntl(pidfd, F_DUPFD_CLOEXEC, below);
	close(pidfd);
	snprintf(path, sizeof path, "/proc/%d/fd", pid);
	directory = above < 0 ? NULL : opendir(path);
	if (!directory) {
		result = -errno;
		if (above >= 0)
			close(above);
		return result;
	}
	while (result == 0 && (entry = readdir(directory))) {
		int number = atoi(entry->d_name);

		/* Numbers above are those of this hand-over itself; ours for the directory is to be kept. */
		if (number > STDERR_FILENO && number < below && number != dirfd(directory))
			result = take_descriptor(above, number);
	}
	if (result == 0) { /* its number may be one that is wanted */
		int number = dirfd(directory);

		closedir(directory);
		result = take_descriptor(above, number);
	} else {
		closedir(directory);
	}
	close(above);
	return result;
}
