/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "supervise.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
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
