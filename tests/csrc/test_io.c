/* SPDX-License-Identifier: MIT */
/*
 * io against a model file in memory, over both backends: random transfers, depth, end of file,
 * poll, a submitting thread that ends, and every fault point at every call.
 *
 * Build: this file, csrc/io.c, csrc/io_threads.c, csrc/fault_point.c, csrc/base.c; -luring
 *        -pthread. Fault points are tried with -DVSWAP_FAULT_POINTS.
 * Usage: test_io [SEED [bench]]; files in $TMPDIR or /var/tmp, unlinked at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include "check.h"

#include "base.h"
#include "fault_point.h"
#include "io.h"
#include "io_threads.h"

#define FILE_PAGES 64u
#define FILE_BYTES (FILE_PAGES * PAGE_BYTES)
#define DEPTH 8u
#define STEPS 3000
#define POLL_MS 30000

static uint64_t seed_state;

static int file_create(bool direct)
{
	const char *directory = getenv("TMPDIR");
	char path[4096];
	int fd;

	snprintf(path, sizeof path, "%s/vswap-io-XXXXXX", directory ? directory : "/var/tmp");
	fd = mkostemp(path, O_CLOEXEC);
	CHECK(fd >= 0);
	unlink(path);
	if (direct && fcntl(fd, F_SETFL, O_DIRECT) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

static void *pages_create(size_t pages)
{
	void *memory = aligned_alloc(PAGE_BYTES, pages * PAGE_BYTES);

	CHECK(memory);
	return memory;
}

static void pages_fill(uint8_t *memory, size_t bytes)
{
	for (size_t i = 0; i < bytes; i += 8) {
		uint64_t word = random_next(&seed_state);

		memcpy(memory + i, &word, 8);
	}
}

static struct io_queue *queue_create(unsigned depth, enum io_backend backend)
{
	struct io_queue *queue;

	CHECK(io_queue_create(depth, backend, &queue) == 0);
	CHECK(io_queue_backend(queue) == backend);
	return queue;
}

/* ---- random transfers ---- */

struct transfer {
	bool used, is_write;
	unsigned page, count;
	uint8_t *buffer;
};

static bool overlaps(const struct transfer *transfers, unsigned page, unsigned count)
{
	for (unsigned i = 0; i < DEPTH; i++)
		if (transfers[i].used && page < transfers[i].page + transfers[i].count &&
		    transfers[i].page < page + count)
			return true;
	return false;
}

static void transfer_complete(struct transfer *transfer, const uint8_t *model, int64_t result)
{
	size_t bytes = transfer->count * PAGE_BYTES;

	CHECK(transfer->used);
	CHECK(result == (int64_t)bytes);
	if (!transfer->is_write)
		CHECK(memcmp(transfer->buffer, model + transfer->page * PAGE_BYTES, bytes) == 0);
	transfer->used = false;
}

static void transfers_complete(struct transfer *transfers, const uint8_t *model,
			       const struct io_completion *completions, unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		transfer_complete(&transfers[completions[i].cookie], model, completions[i].result);
}

static void transfer_begin(struct io_queue *queue, int fd, struct transfer *transfers,
			   unsigned slot, uint8_t *model)
{
	unsigned count = 1 + random_below(&seed_state, 4);
	unsigned page = random_below(&seed_state, FILE_PAGES - count + 1);
	struct transfer *transfer = &transfers[slot];
	size_t bytes = count * PAGE_BYTES;

	if (overlaps(transfers, page, count))
		return;
	transfer->used = true;
	transfer->page = page;
	transfer->count = count;
	transfer->is_write = random_below(&seed_state, 3) == 0;
	if (transfer->is_write) {
		pages_fill(transfer->buffer, bytes);
		memcpy(model + page * PAGE_BYTES, transfer->buffer, bytes);
		CHECK(io_write(queue, fd, transfer->buffer, bytes, page * PAGE_BYTES, slot) == 0);
	} else {
		memset(transfer->buffer, 0xee, bytes);
		CHECK(io_read(queue, fd, transfer->buffer, bytes, page * PAGE_BYTES, slot) == 0);
	}
}

static void test_random(enum io_backend backend, bool direct)
{
	struct io_queue *queue = queue_create(DEPTH, backend);
	struct transfer transfers[DEPTH] = { 0 };
	struct io_completion completions[DEPTH];
	uint8_t *model = pages_create(FILE_PAGES);
	int fd = file_create(direct);

	if (fd < 0) {
		printf("skip: no O_DIRECT here\n");
		free(model);
		io_queue_destroy(queue);
		return;
	}
	memset(model, 0, FILE_BYTES);
	CHECK(ftruncate(fd, (off_t)FILE_BYTES) == 0);
	for (unsigned i = 0; i < DEPTH; i++)
		transfers[i].buffer = pages_create(4);
	for (int step = 0; step < STEPS; step++) {
		unsigned slot = random_below(&seed_state, DEPTH), count;

		if (!transfers[slot].used)
			transfer_begin(queue, fd, transfers, slot, model);
		if (step & 3)
			count = io_reap(queue, completions, 1 + random_below(&seed_state, DEPTH));
		else
			count = io_wait(queue, completions, DEPTH);
		transfers_complete(transfers, model, completions, count);
	}
	for (unsigned count; (count = io_wait(queue, completions, DEPTH)) > 0;)
		transfers_complete(transfers, model, completions, count);
	for (unsigned i = 0; i < DEPTH; i++) {
		CHECK(!transfers[i].used);
		free(transfers[i].buffer);
	}
	free(model);
	close(fd);
	io_queue_destroy(queue);
}

/* ---- limits and errors ---- */

static void test_depth(enum io_backend backend)
{
	struct io_queue *queue;
	struct io_completion completions[4];
	uint8_t *buffer = pages_create(4);
	int fd = file_create(false);
	unsigned reaped = 0;

	CHECK(ftruncate(fd, (off_t)FILE_BYTES) == 0);
	CHECK(io_queue_create(0, backend, &queue) == -EINVAL);
	CHECK(io_queue_create(IO_DEPTH_MAX + 1, backend, &queue) == -EINVAL);
	queue = queue_create(IO_DEPTH_MAX, backend);
	io_queue_destroy(queue);
	queue = queue_create(3, backend); /* a ring rounds it up to 4 */
	CHECK(io_wait(queue, completions, 4) == 0);
	CHECK(io_reap(queue, completions, 4) == 0);
	for (unsigned i = 0; i < 3; i++)
		CHECK(io_read(queue, fd, buffer + i * PAGE_BYTES, PAGE_BYTES, 0, i) == 0);
	CHECK(io_read(queue, fd, buffer + 3 * PAGE_BYTES, PAGE_BYTES, 0, 3) == -EBUSY);
	while (reaped < 3)
		reaped += io_wait(queue, completions, 4);
	CHECK(reaped == 3);
	CHECK(io_read(queue, fd, buffer, PAGE_BYTES, 0, 4) == 0);
	io_queue_destroy(queue); /* waits */
	io_queue_destroy(NULL);
	free(buffer);
	close(fd);
}

static int64_t read_one(struct io_queue *queue, int fd, void *buffer, size_t length,
			uint64_t offset)
{
	struct io_completion completion;

	CHECK(io_read(queue, fd, buffer, length, offset, 77) == 0);
	CHECK(io_wait(queue, &completion, 1) == 1);
	CHECK(completion.cookie == 77);
	return completion.result;
}

static void test_end_of_file(enum io_backend backend, bool direct)
{
	struct io_queue *queue = queue_create(1, backend);
	uint8_t *buffer = pages_create(2);
	int fd = file_create(direct);

	if (fd >= 0) {
		CHECK(ftruncate(fd, (off_t)(PAGE_BYTES + 100)) == 0);
		CHECK(read_one(queue, fd, buffer, PAGE_BYTES, 0) == (int64_t)PAGE_BYTES);
		CHECK(read_one(queue, fd, buffer, 0, 0) == 0);
		CHECK(read_one(queue, fd, buffer, 2 * PAGE_BYTES, 0) == -EIO);
		CHECK(read_one(queue, fd, buffer, PAGE_BYTES, PAGE_BYTES) == -EIO);
		CHECK(read_one(queue, fd, buffer, PAGE_BYTES, 16 * PAGE_BYTES) == -EIO);
		CHECK(io_read_wait(fd, buffer, PAGE_BYTES, 0) == 0);
		CHECK(io_read_wait(fd, buffer, 2 * PAGE_BYTES, 0) == -EIO);
		CHECK(io_write_wait(fd, buffer, PAGE_BYTES, PAGE_BYTES) == 0);
		CHECK(io_read_wait(fd, buffer, 2 * PAGE_BYTES, 0) == 0);
		close(fd);
	}
	CHECK(read_one(queue, -1, buffer, PAGE_BYTES, 0) == -EBADF);
	CHECK(io_write_wait(-1, buffer, PAGE_BYTES, 0) == -EBADF);
	free(buffer);
	io_queue_destroy(queue);
}

static void test_poll(enum io_backend backend)
{
	struct io_queue *queue = queue_create(4, backend);
	struct pollfd poll_fd = { .fd = io_queue_fd(queue), .events = POLLIN };
	struct io_completion completions[4];
	uint8_t *buffer = pages_create(4);
	int fd = file_create(false);

	CHECK(ftruncate(fd, (off_t)FILE_BYTES) == 0);
	CHECK(poll(&poll_fd, 1, 0) == 0);
	for (int round = 0; round < 50; round++) {
		unsigned count = 1 + random_below(&seed_state, 4), reaped = 0;

		for (unsigned i = 0; i < count; i++)
			CHECK(io_read(queue, fd, buffer + i * PAGE_BYTES, PAGE_BYTES,
				      i * PAGE_BYTES, i) == 0);
		while (reaped < count) {
			CHECK(poll(&poll_fd, 1, POLL_MS) == 1);
			reaped += io_reap(queue, completions, 1 + random_below(&seed_state, 4));
		}
		CHECK(poll(&poll_fd, 1, 0) == 0);
	}
	close(fd);
	free(buffer);
	io_queue_destroy(queue);
}

/* What one transfer gave, step by step: short ones go on, interruptions are repeated. */
static void test_advance(void)
{
	struct io_request request = { .length = 1000 };

	CHECK(!io_request_advance(&request, 1) && request.done == 1);
	CHECK(!io_request_advance(&request, -EINTR) && request.done == 1);
	CHECK(!io_request_advance(&request, -EAGAIN) && !io_request_advance(&request, -ECANCELED));
	CHECK(!io_request_advance(&request, 998) && request.done == 999);
	CHECK(io_request_advance(&request, 1) && request.result == 1000);
	request = (struct io_request){ .length = 1000 };
	CHECK(!io_request_advance(&request, 512));
	CHECK(io_request_advance(&request, 0) && request.result == -EIO);
	request = (struct io_request){ .length = 1000 };
	CHECK(!io_request_advance(&request, 512));
	CHECK(io_request_advance(&request, -EINVAL) && request.result == -EIO);
	request = (struct io_request){ .length = 1000 };
	CHECK(io_request_advance(&request, -EINVAL) && request.result == -EINVAL);
	request = (struct io_request){ .length = 1000 };
	for (int i = 0; i < IO_RETRIES_MAX; i++)
		CHECK(!io_request_advance(&request, -EAGAIN));
	CHECK(io_request_advance(&request, -EAGAIN) && request.result == -EAGAIN);
}

/* ---- a thread that submits and ends ---- */

struct hand_over {
	struct io_queue *queue;
	int fd;
	uint8_t *buffer;
};

static void *submit_and_end(void *argument)
{
	const struct hand_over *hand = argument;

	for (unsigned i = 0; i < DEPTH; i++)
		CHECK(io_read(hand->queue, hand->fd, hand->buffer + i * PAGE_BYTES, PAGE_BYTES,
			      i * PAGE_BYTES, i) == 0);
	return NULL;
}

static void test_other_thread(enum io_backend backend, bool direct)
{
	struct hand_over hand = {
		queue_create(DEPTH, backend),
		file_create(direct),
		pages_create(DEPTH),
	};
	struct io_completion completions[DEPTH];
	uint8_t *model = pages_create(DEPTH);

	pages_fill(model, DEPTH * PAGE_BYTES);
	CHECK(hand.fd < 0 || io_write_wait(hand.fd, model, DEPTH * PAGE_BYTES, 0) == 0);
	for (int round = 0; hand.fd >= 0 && round < 50; round++) {
		unsigned reaped = 0;
		pthread_t thread;

		memset(hand.buffer, 0, DEPTH * PAGE_BYTES);
		CHECK(pthread_create(&thread, NULL, submit_and_end, &hand) == 0);
		pthread_join(thread, NULL);
		while (reaped < DEPTH) {
			unsigned count = io_wait(hand.queue, completions, DEPTH);

			for (unsigned i = 0; i < count; i++)
				CHECK(completions[i].result == (int64_t)PAGE_BYTES);
			reaped += count;
		}
		CHECK(memcmp(hand.buffer, model, DEPTH * PAGE_BYTES) == 0);
	}
	if (hand.fd >= 0)
		close(hand.fd);
	io_queue_destroy(hand.queue);
	free(hand.buffer);
	free(model);
}

/* ---- fault points ---- */

#ifdef VSWAP_FAULT_POINTS

struct fault_run {
	struct io_queue *queue;
	int fd;
	uint8_t *file;   /* what the file holds, page by page */
	uint8_t *buffer; /* DEPTH pages */
};

/*
 * DEPTH reads, then DEPTH writes. A request is refused, or fails, or is done, and then wholly; a
 * refused one's buffer is never touched. Returns how many were not done.
 */
static unsigned fault_round(struct fault_run *run, bool is_write, int error)
{
	int64_t results[DEPTH];
	struct io_completion completions[DEPTH];
	unsigned failed = 0;

	if (is_write)
		pages_fill(run->buffer, DEPTH * PAGE_BYTES);
	else
		memset(run->buffer, 0xee, DEPTH * PAGE_BYTES);
	for (unsigned i = 0; i < DEPTH; i++) {
		uint8_t *page = run->buffer + i * PAGE_BYTES;

		if (is_write)
			results[i] = io_write(run->queue, run->fd, page, PAGE_BYTES,
					      i * PAGE_BYTES, i);
		else
			results[i] = io_read(run->queue, run->fd, page, PAGE_BYTES,
					     i * PAGE_BYTES, i);
		CHECK(results[i] == 0 || results[i] == -error);
	}
	for (unsigned count; (count = io_wait(run->queue, completions, DEPTH)) > 0;)
		for (unsigned i = 0; i < count; i++)
			results[completions[i].cookie] = completions[i].result;
	for (unsigned i = 0; i < DEPTH; i++) {
		uint8_t *page = run->buffer + i * PAGE_BYTES, *file = run->file + i * PAGE_BYTES;

		CHECK(results[i] == (int64_t)PAGE_BYTES || results[i] == -error);
		failed += results[i] < 0;
		if (is_write) /* a failed write may have happened: look */
			CHECK(io_read_wait(run->fd, file, PAGE_BYTES, i * PAGE_BYTES) == 0);
		if (results[i] > 0)
			CHECK(memcmp(page, file, PAGE_BYTES) == 0);
		else if (!is_write && fault_point_calls("io/submit") > 0)
			CHECK(page[0] == 0xee && page[PAGE_BYTES - 1] == 0xee);
	}
	return failed;
}

static void fault_at_each_call(struct fault_run *run, const char *name, int error, bool persistent)
{
	bool is_write = strcmp(name, "io/write") == 0;
	bool retried = error == EINTR || error == EAGAIN;

	for (uint64_t n = 1;; n++) {
		unsigned failed;

		fault_point_clear();
		fault_point_set(name, n, error, persistent);
		failed = fault_round(run, is_write, error);
		if (fault_point_hits(name) == 0) {
			CHECK(failed == 0);
			return;
		}
		CHECK(persistent ? failed > 0 : failed == (retried ? 0u : 1u));
		fault_point_clear();
		CHECK(fault_round(run, false, error) == 0); /* nothing left over */
		CHECK(n < 100);
	}
}

/* A read that was accepted, must go on, and finds the ring shut, is done all the same. */
static void test_resubmit(struct fault_run *run)
{
	struct io_completion completion;

	memset(run->buffer, 0xee, PAGE_BYTES);
	fault_point_clear();
	CHECK(io_read(run->queue, run->fd, run->buffer, PAGE_BYTES, 0, 5) == 0);
	fault_point_set("io/read", 1, EAGAIN, false);
	fault_point_set("io/submit", 1, ENOMEM, true);
	CHECK(io_wait(run->queue, &completion, 1) == 1);
	CHECK(completion.cookie == 5 && completion.result == (int64_t)PAGE_BYTES);
	CHECK(memcmp(run->buffer, run->file, PAGE_BYTES) == 0);
	fault_point_clear();
	CHECK(fault_round(run, false, EIO) == 0);
}

static void test_faults(enum io_backend backend)
{
	static const char *const names[] = { "io/submit", "io/read", "io/write" };
	static const int errors[] = { EIO, ENOMEM, EAGAIN, EINTR };
	struct fault_run run = {
		queue_create(DEPTH, backend),
		file_create(false),
		pages_create(DEPTH),
		pages_create(DEPTH),
	};

	pages_fill(run.file, DEPTH * PAGE_BYTES);
	CHECK(io_write_wait(run.fd, run.file, DEPTH * PAGE_BYTES, 0) == 0);
	for (unsigned i = 0; i < 3; i++) {
		for (unsigned j = 0; j < 4; j++) {
			/* Threads submit by taking a lock: there is nothing to repeat. */
			if (backend == IO_THREADS && i == 0 && errors[j] != EIO)
				continue;
			fault_at_each_call(&run, names[i], errors[j], false);
			fault_at_each_call(&run, names[i], errors[j], true);
		}
	}
	fault_point_clear();
	if (backend == IO_URING) /* a thread may be done before the fault is set */
		test_resubmit(&run);
	io_queue_destroy(run.queue);
	close(run.fd);
	free(run.file);
	free(run.buffer);
}

#else

static void test_faults(enum io_backend backend)
{
	(void)backend;
	printf("skip: fault points are not built in\n");
}

#endif

/* ---- bench: one random 4 KiB read at a time, as a fault thread does it ---- */

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void bench(enum io_backend backend, unsigned pages)
{
	enum { COUNT = 4000 };
	static uint64_t ns[COUNT];
	struct io_queue *queue = queue_create(1, backend);
	struct pollfd poll_fd = { .fd = io_queue_fd(queue), .events = POLLIN };
	struct io_completion completion;
	uint8_t *buffer = pages_create(256);
	int fd = file_create(true);

	CHECK(fd >= 0);
	pages_fill(buffer, 256 * PAGE_BYTES);
	for (unsigned i = 0; i < 256; i++)
		CHECK(io_write_wait(fd, buffer, 256 * PAGE_BYTES, i * 256 * PAGE_BYTES) == 0);
	for (unsigned i = 0; i < COUNT; i++) {
		uint64_t offset = random_below(&seed_state, 65536 - pages) * PAGE_BYTES;
		uint64_t start = test_now_ns();

		CHECK(io_read(queue, fd, buffer, pages * PAGE_BYTES, offset, 0) == 0);
		do
			CHECK(poll(&poll_fd, 1, POLL_MS) == 1);
		while (io_reap(queue, &completion, 1) == 0);
		ns[i] = test_now_ns() - start;
	}
	qsort(ns, COUNT, sizeof *ns, compare_u64);
	printf("read %u KiB %s: p50 %.1f us, p99 %.1f us\n", pages * 4,
	       backend == IO_URING ? "io_uring" : "threads ", (double)ns[COUNT / 2] / 1e3,
	       (double)ns[COUNT * 99 / 100] / 1e3);
	close(fd);
	free(buffer);
	io_queue_destroy(queue);
}

static void test_backend(enum io_backend backend)
{
	test_random(backend, false);
	test_random(backend, true);
	test_depth(backend);
	test_end_of_file(backend, false);
	test_end_of_file(backend, true);
	test_poll(backend);
	test_other_thread(backend, false);
	test_other_thread(backend, true);
	test_faults(backend);
}

int main(int argc, char **argv)
{
	struct io_queue *queue;

	seed_state = test_seed(argc, argv);
	if (test_is_bench(argc, argv)) {
		for (unsigned pages = 1; pages <= 2; pages++) {
			bench(IO_URING, pages);
			bench(IO_THREADS, pages);
		}
		return 0;
	}
	test_advance();
	test_backend(IO_THREADS);
	if (io_queue_create(1, IO_URING, &queue) == 0) {
		io_queue_destroy(queue);
		test_backend(IO_URING);
	} else {
		printf("skip: no io_uring here\n");
	}
	CHECK(io_queue_create(1, IO_AUTOMATIC, &queue) == 0);
	io_queue_destroy(queue);
	printf("passed\n");
	return 0;
}
