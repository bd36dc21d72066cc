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
 * Threads    one that writes to the memory, the caller's, and no signal handler runs in it meanwhile (all are blocked).
 */
#ifndef VSWAP_SHELVE_H
#define VSWAP_SHELVE_H

/*
 * Shelve private anonymous memory of the calling process in `fd`, an empty file open for reading and writing whose
 * pages the kernel can write back and drop. MiB of it, or -errno: -EMEDIUMTYPE for a file system that
 * is itself in RAM, -EBUSY when there are other threads. On failure all or some of the memory is as it was, and nothing is lost.
 */
int shelve_memory(int fd);

/*
 * Once more, to a file of its own: for a forked process that has written to much of it while it started, and to little since.
 * What all threads share, the heap and the program's own data, stays where it is; of the rest the caller is the only one that
 * writes to it: it has the interpreter's lock, and other threads are the data plane's (vswap-*) or wait for work ("Trio thread").
 * MiB, or -errno: -EBUSY, there are others; -ENOENT, nothing was shelved. On failure nothing is lost.
 */
int shelve_again(int fd);

/* After mlockall(): what was shelved is to leave RAM as before. Any thread. */
void shelve_unlock(void);

#define SHELVE_FDS_MAX 4

/*
 * Wait, with no more mapped than waiting needs, until one of the descriptors is readable, or a signal was handled. For a
 * process with one thread that has shelved its memory: what it has not written to since is unmapped, and so are the files that
 * its code is in, which the page cache keeps. (The kernel maps what lies around a page that is used: most of that is not.)
 */
void shelve_wait(const int *fds, unsigned count);
/* The same, for one of these signals, which are blocked. Its number, or -errno. */
int shelve_wait_signal(const int *signals, unsigned count);

/*
 * In a process with other threads: once the first one, the interpreter's, has not run for REST_LOOKS calls, what is mapped of
 * the interpreter's own code is unmapped; the page cache keeps it. From one thread only, again and again.
 */
void shelve_rest(void);

/* Have the kernel begin to write the file, and drop from RAM what it has written already: called twice, a moment apart, it
 * leaves what has been written to by this process. What is needed again is read, a page at a time. Any thread; blocks while
 * the device does. */
void shelve_page_out(int fd);

#endif
