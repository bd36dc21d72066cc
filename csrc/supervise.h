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

#endif
