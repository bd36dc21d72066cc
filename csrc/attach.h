/* SPDX-License-Identifier: MIT */
/*
 * attach — put the agent into a program that runs already, or is just about to: by ptrace, once.
 *
 * One thread of the program is stopped, makes a few system calls for us and starts the agent (agent_image.c); then
 * it goes on where it was: in its system call, if it was in one. All its signals are blocked meanwhile, and
 * none is used. Its other threads run on: no byte of what is theirs is changed, as the calls are made with an
 * instruction of the vDSO. x86-64 only, elsewhere -ENOSYS.
 *
 * Threads    a program is traced by the thread that calls; attach_hold and attach_inject after it come from
 *            the same one.
 * Errors     -errno, and `message` (ATTACH_MESSAGE_BYTES) says what could not be done. The program is then as
 *            it was before, or has ended.
 */
#ifndef VSWAP_ATTACH_H
#define VSWAP_ATTACH_H

#define ATTACH_MESSAGE_BYTES 256

struct attach_request {
	int pid;
	int held;              /* 1: attach_hold was called for it, and it executes its program now */
	const char *image;     /* file of the agent's image */
	const char *socket_path;
	const char *group;
	unsigned long minimum_bytes, look_us;  /* wire.h: VSWAP_MIN_BYTES, VSWAP_LOOK_US */
};

/* Start the agent in a program. -EBUSY: it is stopped, or traced; -ETIMEDOUT: it does not come to a stop. */
int attach_inject(const struct attach_request *request, char *message);

/* Have a child of the caller stop when it executes a program. 0 or -errno. */
int attach_hold(int pid);

#endif
