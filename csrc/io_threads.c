/* SPDX-License-Identifier: MIT */
/*
 * io_threads — see io_threads.h.
 *
 * The eventfd is written when the first completion comes and read when the last one goes, both
 * under the mutex: it is readable exactly while a completion waits.
 */
#define _GNU_SOURCE
#include "io_threads.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base.h"
#include "fault_point.h"

#define WORKERS_MAX 4
#define WORKER_STACK_BYTES 65536UL

struct request_list {
	struct io_request *first, *last;
};

struct io_threads {
	pthread_mutex_t mutex;
	pthread_cond_t work, done; /* something queued or stopping; something complete */
	struct request_list queued, complete;
	unsigned queued_count, idle_count, worker_count;
	bool stopping;
	int event_fd;
	pthread_t workers[WORKERS_MAX];
};

/* ---- requests ---- */

static int64_t request_transfer(const struct io_request *request)
{
	int error = fault_point(request->is_write ? "io/write" : "io/read");
	uint8_t *buffer = request->buffer + request->done;
	size_t length = request->length - request->done;
	off_t offset = (off_t)(request->offset + request->done);
	ssize_t count;

	if (error)
		return -error;
	count = request->is_write ? pwrite(request->fd, buffer, length, offset)
				  : pread(request->fd, buffer, length, offset);
	return count < 0 ? -errno : count;
}

bool io_request_advance(struct io_request *request, int64_t count)
{
	/* ECANCELED: the thread that submitted to io_uring has ended. The request is still ours. */
	if (count == -EINTR || count == -EAGAIN || count == -ECANCELED) {
		if (request->retry_count++ < IO_RETRIES_MAX)
			return false;
	}
	if (count == 0 && request->done < request->length)
		count = -EIO; /* end of file, or a device that takes nothing more */
	if (count == -EINVAL && request->done > 0)
		count = -EIO; /* O_DIRECT: the file ended unaligned, so the rest is */
	if (count < 0) {
		request->result = count;
		return true;
	}
	VS_CHECK((uint64_t)count <= request->length - request->done);
	request->done += (size_t)count;
	request->result = (int64_t)request->length;
	return request->done == request->length;
}

void io_request_run(struct io_request *request)
{
	while (!io_request_advance(request, request_transfer(request)))
		;
}

static void list_push(struct request_list *list, struct io_request *request)
{
	request->next = NULL;
	if (list->first)
		list->last->next = request;
	else
		list->first = request;
	list->last = request;
}

static struct io_request *list_pop(struct request_list *list)
{
	struct io_request *request = list->first;

	if (request)
		list->first = request->next;
	return request;
}

/* ---- workers ---- */

static void request_complete(struct io_threads *threads, struct io_request *request)
{
	const uint64_t one = 1;

	if (!threads->complete.first)
		VS_CHECK(write(threads->event_fd, &one, sizeof one) == sizeof one);
	list_push(&threads->complete, request);
	pthread_cond_signal(&threads->done);
}

static void *worker_main(void *argument)
{
	struct io_threads *threads = argument;
	struct io_request *request;

	name_this_thread("vswap-io");
	SCOPED_LOCK(&threads->mutex);
	while (!threads->stopping) {
		request = list_pop(&threads->queued);
		if (!request) {
			threads->idle_count++;
			pthread_cond_wait(&threads->work, &threads->mutex);
			threads->idle_count--;
			continue;
		}
		threads->queued_count--;
		pthread_mutex_unlock(&threads->mutex);
		io_request_run(request);
		pthread_mutex_lock(&threads->mutex);
		request_complete(threads, request);
	}
	return NULL;
}

/* Every signal is blocked in a worker: they are the interpreter's, in threads that know them. */
static int worker_start(struct io_threads *threads)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int result;

	sigfillset(&all);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, WORKER_STACK_BYTES);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	result = pthread_create(&threads->workers[threads->worker_count], &attributes, worker_main,
				threads);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	if (result == 0)
		threads->worker_count++;
	return -result;
}

/* ---- the set ---- */

int io_threads_create(struct io_threads **ret_threads)
{
	struct io_threads *threads = calloc(1, sizeof *threads);

	if (!threads)
		return -ENOMEM;
	threads->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (threads->event_fd < 0) {
		int error = errno;

		free(threads);
		return -error;
	}
	pthread_mutex_init(&threads->mutex, NULL);
	pthread_cond_init(&threads->work, NULL);
	pthread_cond_init(&threads->done, NULL);
	*ret_threads = threads;
	return 0;
}

void io_threads_destroy(struct io_threads *threads)
{
	if (!threads)
		return;
	pthread_mutex_lock(&threads->mutex);
	VS_CHECK(!threads->queued.first && !threads->complete.first);
	threads->stopping = true;
	pthread_cond_broadcast(&threads->work);
	pthread_mutex_unlock(&threads->mutex);
	for (unsigned i = 0; i < threads->worker_count; i++)
		pthread_join(threads->workers[i], NULL);
	close(threads->event_fd);
	pthread_cond_destroy(&threads->work);
	pthread_cond_destroy(&threads->done);
	pthread_mutex_destroy(&threads->mutex);
	free(threads);
}

int io_threads_fd(const struct io_threads *threads)
{
	return threads->event_fd;
}

int io_threads_submit(struct io_threads *threads, struct io_request *request)
{
	int error = fault_point("io/submit");

	if (error)
		return -error;
	SCOPED_LOCK(&threads->mutex);
	if (threads->queued_count >= threads->idle_count && threads->worker_count < WORKERS_MAX)
		error = worker_start(threads);
	if (threads->worker_count == 0)
		return error; /* one that could not be started beside others is no loss */
	list_push(&threads->queued, request);
	threads->queued_count++;
	pthread_cond_signal(&threads->work);
	return 0;
}

struct io_request *io_threads_reap(struct io_threads *threads, bool wait)
{
	struct io_request *request;
	uint64_t value;

	SCOPED_LOCK(&threads->mutex);
	while (wait && !threads->complete.first)
		pthread_cond_wait(&threads->done, &threads->mutex);
	request = list_pop(&threads->complete);
	if (request && !threads->complete.first)
		VS_CHECK(read(threads->event_fd, &value, sizeof value) == sizeof value);
	return request;
}
