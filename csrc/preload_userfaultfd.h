/* SPDX-License-Identifier: MIT */
/*
 * preload_userfaultfd — a program that registers memory with a userfaultfd of its own.
 *
 * The kernel's answer is asked first: where nothing is managed, or not that memory, it is all there is. At EBUSY, in a
 * process that is managed, the daemon is asked to give the range up (wire.h, yield.h), and the call is made again.
 *
 * Waits      for the daemon, as long as it takes: also for one that died, as every fault does. In a forked child until
 *            its agent has joined.
 * Errors     what the kernel says; ENOMEM: what is out of the range does not fit into the limit.
 * Threads    any of the program; one at a time asks. fork waits meanwhile.
 */
#ifndef VSWAP_PRELOAD_USERFAULTFD_H
#define VSWAP_PRELOAD_USERFAULTFD_H

#include <linux/userfaultfd.h>

#pragma GCC visibility push(hidden)

/* ioctl(fd, UFFDIO_REGISTER, argument): 0 or -errno. */
long userfaultfd_register(int fd, struct uffdio_register *argument);

#pragma GCC visibility pop

#endif
