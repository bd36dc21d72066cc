/* SPDX-License-Identifier: MIT */
/*
 * shelve — have a process keep its idle memory in a file instead of in RAM.
 *
 * An interpreter that has loaded all its code touches little of that again, and whoever waits for a child touches next to
 * nothing. Yet all of it counts: RAM that the daemon takes is RAM that the programs in its care have not. So what is there
 * is written to an unlinked file and mapped from it again, privately, at the same addresses. What is read comes from the
 * page cache, what is written becomes the process's own page again, and the rest is no longer mapped at all.
 *
 * For the interpreter alone, before the engine starts: what is mapped later is memory as ever. A fault allocates nothing of
 * malloc's, and a read from a backend has blocks of its own (block_cache.h), so they do not wait for this file. A thread of the
 * data plane that does allocate may, where there are so many threads that libc gives them the first thread's arena. A file that
 * can no longer be read is SIGBUS. The daemon locks its memory (sys_lock_memory), but not this: it is here to leave RAM.
 *
 * Threads    one, the caller's, and no signal handler runs meanwhile (all are blocked).
 */
#ifndef VSWAP_SHELVE_H
#define VSWAP_SHELVE_H

/*
 * Shelve private anonymous memory of the calling process in `fd`, an empty file open for reading and writing whose
 * pages the kernel can write back and drop. MiB of it, or -errno: -EMEDIUMTYPE for a file system that
 * is itself in RAM, -EBUSY when there are other threads. On failure all or some of the memory is as it was, and nothing is lost.
 */
int shelve_memory(int fd);

/* After mlockall(): what was shelved is to leave RAM as before. Any thread. */
void shelve_unlock(void);

/* The kernel maps what lies around a page that is used. Unmap what has not been written to since; for a process with one
 * thread that is about to wait. */
void shelve_unmap_clean(void);

/* Have the kernel begin to write the file, and drop from RAM what it has written already: called twice, a moment apart, it
 * leaves what has been written to by this process. What is needed again is read. Any thread; blocks while the device does. */
void shelve_page_out(int fd);

#endif
