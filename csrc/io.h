/* SPDX-License-Identifier: MIT */
/*
 * io — asynchronous reads and writes.
 *
 * An io_queue is io_uring where the kernel allows it, else a few pread/pwrite threads behind the
 * same interface (IO_THREADS). Its descriptor becomes readable when a completion waits, so a fault
 * thread polls it beside its userfaultfds and one slow read delays nothing else.
 *
 * Threads     any, but one at a time (a client's queue is used under its gate). Polling the
 *             descriptor needs no lock. The descriptor may be readable with nothing to reap.
 * Ownership   buffers belong to the caller and must stay valid until their completion is reaped.
 * Limits      at most `depth` requests in flight: more are refused with -EBUSY.
 * Errors      a request that was refused (io_read, io_write < 0) never touches its buffer. Short
 *             transfers are continued inside, EINTR and EAGAIN are retried; a completion's result
 *             is `length` or -errno (-EIO for an end of file inside the range).
 */
#ifndef VSWAP_IO_H
#define VSWAP_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define IO_DEPTH_MAX 64

struct io_queue;

enum io_backend { IO_AUTOMATIC = 0, IO_URING = 1, IO_THREADS = 2 };

struct io_completion {
	uint64_t cookie;
	int64_t result; /* bytes, or -errno */
};

/*
 * `depth` is 1..IO_DEPTH_MAX, else -EINVAL. IO_AUTOMATIC takes threads when there is no io_uring;
 * IO_URING fails then.
 */
int io_queue_create(unsigned depth, enum io_backend backend, struct io_queue **ret_queue);
void io_queue_destroy(struct io_queue *queue); /* waits for what is in flight; NULL ok */

int io_queue_fd(const struct io_queue *queue); /* poll for POLLIN */
enum io_backend io_queue_backend(const struct io_queue *queue);

int io_read(struct io_queue *queue, int fd, void *buffer, size_t length, uint64_t offset,
	    uint64_t cookie);
int io_write(struct io_queue *queue, int fd, const void *buffer, size_t length, uint64_t offset,
	     uint64_t cookie);

/* Reap at most `max` completions without waiting; returns how many (0..max). */
unsigned io_reap(struct io_queue *queue, struct io_completion *completions, unsigned max);

/* Wait for at least one completion, then as io_reap. 0 when nothing is in flight. */
unsigned io_wait(struct io_queue *queue, struct io_completion *completions, unsigned max);

/* The same without a queue, in the calling thread: 0 when all was transferred, or -errno. */
int io_read_wait(int fd, void *buffer, size_t length, uint64_t offset);
int io_write_wait(int fd, const void *buffer, size_t length, uint64_t offset);

#endif
