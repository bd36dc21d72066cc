/* SPDX-License-Identifier: MIT */
/*
 * supervise — a daemon whose descriptors outlive it.
 *
 * The supervisor makes each daemon as a child that shares its descriptor table: whatever a daemon
 * opened the instant before it died stays open, above all the userfaultfd of a forked client, which
 * comes into being inside read(2) and which nobody else holds.
 */
#ifndef VSWAP_SUPERVISE_H
#define VSWAP_SUPERVISE_H

/*
 * As fork(2), but parent and child have one descriptor table. For a process with one thread; the caller
 * does what its runtime needs around a fork. -ENOSYS when the kernel does not tell where libc keeps
 * the thread's number (CONFIG_CHECKPOINT_RESTORE).
 */
int supervise_fork(void);

/* Open every descriptor above 2 and below `below` that the process `pid` has open here as well, under the same
 * number, replacing what was there; from `below` on two numbers are needed. 0 or -errno. */
int supervise_take_descriptors(int pid, int below);

#endif
