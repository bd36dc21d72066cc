/* SPDX-License-Identifier: MIT */
/*
 * io_threads — the half of io that needs no io_uring: blocking transfers, and threads to run them.
 *
 * Used by io.c only. A request is in exactly one place: with io.c, queued, in a worker's hands, or
 * done. Workers are started when there is work that no idle one can take, and stay.
 *
 * Locking     one mutex per set of threads, never held across a transfer.
 */
#ifndef VSWAP_IO_THREADS_H
#define VSWAP_IO_THREADS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define IO_RETRIES_MAX 1000 /* EINTR and EAGAIN of one request; then it fails with that */

struct io_request {
	struct io_request *next;
	int fd;
	bool is_write;
	uint32_t retry_count;
	uint8_t *buffer;
	size_t length;
	size_t done; /* bytes transferred so far */
	uint64_t offset;
	uint64_t cookie;
	int64_t result; /* once complete: length, or -errno */
};

/*
 * Take note of what one transfer of the rest gave: `count` bytes or -errno. True when the request
 * is complete (result is set), false when the rest must be asked for (again).
 */
bool io_request_advance(struct io_request *request, int64_t count);

/* Transfer the rest, blocking. */
void io_request_run(struct io_request *request);

struct io_threads;

int io_threads_create(struct io_threads **ret_threads);
void io_threads_destroy(struct io_threads *threads); /* nothing may be in flight; NULL ok */
int io_threads_fd(const struct io_threads *threads);

/* 0, or -errno when there is no thread to run it. */
int io_threads_submit(struct io_threads *threads, struct io_request *request);

/* The oldest complete request, or NULL. With `wait` never NULL: something must be in flight. */
struct io_request *io_threads_reap(struct io_threads *threads, bool wait);

#endif
