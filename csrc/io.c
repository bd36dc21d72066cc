/* SPDX-License-Identifier: MIT */
/*
 * io — see io.h. Here: the requests of a queue, and io_uring; the threads are in io_threads.c.
 *
 * The ring's own descriptor is what a caller polls: it is readable while a completion waits. The
 * ring has no SINGLE_ISSUER, COOP_TASKRUN or DEFER_TASKRUN: with them completions appear only when
 * the thread that submitted enters the kernel, but here one thread submits and another may poll.
 *
 * A submission that fails must leave nothing behind: an entry that stays in the ring would go out
 * with the next submission, into a buffer that was freed long ago. It is made a NOP (cookie NULL).
 */
#define _GNU_SOURCE
#include "io.h"

#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include "base.h"
#include "fault_point.h"
#include "io_threads.h"

#define SUBMIT_TRIES_MAX 16

struct io_queue {
	enum io_backend backend;
	unsigned depth;
	unsigned in_flight;
	struct io_request *free;
	struct io_threads *threads; /* IO_THREADS */
	struct io_uring ring;       /* IO_URING */
	struct io_request requests[];
};

/* ---- io_uring ---- */

static int ring_submit_all(struct io_uring *ring)
{
	int result = 0;

	for (unsigned i = 0; i < SUBMIT_TRIES_MAX && io_uring_sq_ready(ring) > 0; i++) {
		int error = fault_point("io/submit");

		result = error ? -error : io_uring_submit(ring);
		if (result < 0 && result != -EINTR && result != -EAGAIN)
			return result;
	}
	if (io_uring_sq_ready(ring) == 0)
		return 0;
	return result < 0 ? result : -EAGAIN;
}

/* Ask for the rest of a request. On error nothing of it stays in the ring. */
static int ring_submit(struct io_uring *ring, struct io_request *request)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
	unsigned length = (unsigned)min_of(request->length - request->done, (size_t)1 << 30);
	uint8_t *buffer = request->buffer + request->done;
	uint64_t offset = request->offset + request->done;
	int result;

	if (!sqe) { /* NOPs of failed submissions fill it */
		result = ring_submit_all(ring);
		sqe = io_uring_get_sqe(ring);
		if (!sqe)
			return result < 0 ? result : -EAGAIN;
	}
	if (request->is_write)
		io_uring_prep_write(sqe, request->fd, buffer, length, offset);
	else
		io_uring_prep_read(sqe, request->fd, buffer, length, offset);
	io_uring_sqe_set_data(sqe, request);
	result = ring_submit_all(ring);
	if (result < 0) {
		io_uring_prep_nop(sqe);
		io_uring_sqe_set_data(sqe, NULL);
	}
	return result;
}

static int64_t ring_result(const struct io_request *request, const struct io_uring_cqe *cqe)
{
	int error = fault_point(request->is_write ? "io/write" : "io/read");

	return error ? -error : cqe->res;
}

/* A completion, or NULL: with `wait` only after an interruption. */
static struct io_uring_cqe *ring_next(struct io_uring *ring, bool wait)
{
	struct io_uring_cqe *cqe = NULL;
	int result = wait ? io_uring_wait_cqe(ring, &cqe) : io_uring_peek_cqe(ring, &cqe);

	/* Any other answer means that the ring is not ours any more: its buffers are not safe. */
	VS_CHECK(result == 0 || result == -EINTR || result == -EAGAIN);
	return result == 0 ? cqe : NULL;
}

/*
 * The next complete request, or NULL. One that must go on goes on by itself; if the ring does not
 * take it now, here and blocking: it was accepted, so it may not fail for want of a ring entry.
 */
static struct io_request *ring_reap(struct io_uring *ring, bool wait)
{
	for (;;) {
		struct io_uring_cqe *cqe = ring_next(ring, wait);
		struct io_request *request;
		int64_t count;

		if (!cqe && !wait)
			return NULL;
		if (!cqe)
			continue;
		request = io_uring_cqe_get_data(cqe);
		count = request ? ring_result(request, cqe) : 0;
		io_uring_cqe_seen(ring, cqe);
		if (!request)
			continue;
		if (io_request_advance(request, count))
			return request;
		if (ring_submit(ring, request) == 0)
			continue;
		io_request_run(request);
		return request;
	}
}

/* ---- queue ---- */

/* A ring is mapped where another one was before: the kernel orders the two, by system calls of liburing's own that
 * ThreadSanitizer does not see. */
#if defined(__SANITIZE_THREAD__)
static char mappings;
#define RINGS_UNMAPPED() __tsan_release(&mappings)
#define RINGS_MAPPED() __tsan_acquire(&mappings)
#else
#define RINGS_UNMAPPED() ((void)0)
#define RINGS_MAPPED() ((void)0)
#endif

static int queue_open(struct io_queue *queue, enum io_backend backend)
{
	int result;

	if (backend != IO_THREADS) {
		result = io_uring_queue_init(queue->depth, &queue->ring, 0);
		RINGS_MAPPED();
		queue->backend = IO_URING;
		if (result == 0 || backend == IO_URING)
			return min_of(result, 0);
	}
	queue->backend = IO_THREADS;
	return io_threads_create(&queue->threads);
}

int io_queue_create(unsigned depth, enum io_backend backend, struct io_queue **ret_queue)
{
	struct io_queue *queue;
	int result;

	if (depth == 0 || depth > IO_DEPTH_MAX)
		return -EINVAL;
	queue = calloc(1, sizeof *queue + depth * sizeof queue->requests[0]);
	if (!queue)
		return -ENOMEM;
	queue->depth = depth;
	result = queue_open(queue, backend);
	if (result < 0) {
		free(queue);
		return result;
	}
	for (unsigned i = 0; i < depth; i++) {
		queue->requests[i].next = queue->free;
		queue->free = &queue->requests[i];
	}
	*ret_queue = queue;
	return 0;
}

void io_queue_destroy(struct io_queue *queue)
{
	struct io_completion completion;

	if (!queue)
		return;
	while (queue->in_flight > 0)
		(void)io_wait(queue, &completion, 1);
	if (queue->backend == IO_URING) {
		RINGS_UNMAPPED(); /* from here on others may have the addresses */
		io_uring_queue_exit(&queue->ring);
	}
	io_threads_destroy(queue->threads);
	free(queue);
}

int io_queue_fd(const struct io_queue *queue)
{
	return queue->backend == IO_URING ? queue->ring.ring_fd : io_threads_fd(queue->threads);
}

enum io_backend io_queue_backend(const struct io_queue *queue)
{
	return queue->backend;
}

static int queue_submit(struct io_queue *queue, struct io_request request)
{
	struct io_request *slot = queue->free;
	int result;

	if (!slot)
		return -EBUSY;
	request.next = slot->next;
	queue->free = request.next;
	*slot = request;
	result = queue->backend == IO_URING ? ring_submit(&queue->ring, slot)
					    : io_threads_submit(queue->threads, slot);
	if (result < 0) {
		slot->next = queue->free;
		queue->free = slot;
		return result;
	}
	queue->in_flight++;
	VS_CHECK(queue->in_flight <= queue->depth);
	return 0;
}

int io_read(struct io_queue *queue, int fd, void *buffer, size_t length, uint64_t offset,
	    uint64_t cookie)
{
	return queue_submit(queue, (struct io_request){
					   .fd = fd,
					   .buffer = buffer,
					   .length = length,
					   .offset = offset,
					   .cookie = cookie,
				   });
}

int io_write(struct io_queue *queue, int fd, const void *buffer, size_t length, uint64_t offset,
	     uint64_t cookie)
{
	return queue_submit(queue, (struct io_request){
					   .fd = fd,
					   .is_write = true,
					   .buffer = (uint8_t *)(uintptr_t)buffer,
					   .length = length,
					   .offset = offset,
					   .cookie = cookie,
				   });
}

static unsigned queue_reap(struct io_queue *queue, struct io_completion *completions, unsigned max,
			   bool wait)
{
	unsigned count = 0;

	while (count < max && queue->in_flight > 0) {
		bool wait_now = wait && count == 0;
		struct io_request *request = queue->backend == IO_URING
						     ? ring_reap(&queue->ring, wait_now)
						     : io_threads_reap(queue->threads, wait_now);

		if (!request)
			break;
		completions[count++] = (struct io_completion){ request->cookie, request->result };
		request->next = queue->free;
		queue->free = request;
		queue->in_flight--;
	}
	return count;
}

unsigned io_reap(struct io_queue *queue, struct io_completion *completions, unsigned max)
{
	return queue_reap(queue, completions, max, false);
}

unsigned io_wait(struct io_queue *queue, struct io_completion *completions, unsigned max)
{
	return queue_reap(queue, completions, max, true);
}

/* ---- without a queue ---- */

int io_read_wait(int fd, void *buffer, size_t length, uint64_t offset)
{
	struct io_request request = {
		.fd = fd,
		.buffer = buffer,
		.length = length,
		.offset = offset,
	};

	io_request_run(&request);
	return (int)min_of(request.result, 0);
}

int io_write_wait(int fd, const void *buffer, size_t length, uint64_t offset)
{
	struct io_request request = {
		.fd = fd,
		.is_write = true,
		.buffer = (uint8_t *)(uintptr_t)buffer,
		.length = length,
		.offset = offset,
	};

	io_request_run(&request);
	return (int)min_of(request.result, 0);
}
