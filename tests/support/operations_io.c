/* SPDX-License-Identifier: MIT */
/* operations_io — rows: the kernel reads and writes memory that is out, for this process or for another. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "operations.h"

#define IO_PAGES 12UL /* fit a pipe, and a socket's buffer */

/* An unlinked file; O_DIRECT is not known to every file system. */
static int temporary_file(int flags)
{
	int fd = open("/var/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC | flags, 0600);

	must_call(fd >= 0, "open of a temporary file");
	return fd;
}

static void transferred(ssize_t bytes, size_t pages, const char *call)
{
	must_call(bytes >= 0, call);
	must((size_t)bytes == pages * PAGE, "%s: %zd bytes instead of %zu", call, bytes, pages * PAGE);
}

/* ---- files ---- */

static void io_file(void)
{
	struct area from = area_make(AREA_PAGES), to = area_make(AREA_PAGES);
	int fd = temporary_file(0);

	transferred(pwrite(fd, from.at, from.pages * PAGE, 0), from.pages, "pwrite");
	transferred(pread(fd, to.at, to.pages * PAGE, 0), to.pages, "pread");
	area_check_at(&from, 0, from.pages, 0, to.at, "what was read");
	page_out(to.at, to.pages);
	area_check_at(&from, 0, from.pages, 0, to.at, "what was read, out and back");
	area_check(&from, 0, from.pages, 0, "what was written");
	close(fd);
	area_free(&from);
	area_free(&to);
}

static void io_vectors(void)
{
	struct area from = area_make(AREA_PAGES), to = area_make(AREA_PAGES);
	struct iovec out[3] = { { from.at + 100, 5 * PAGE }, { area_page(&from, 100), 10 * PAGE },
				{ area_page(&from, 50), PAGE - 100 } };
	struct iovec in[2] = { { to.at, 5 * PAGE }, { area_page(&to, 70), 11 * PAGE - 100 } };
	int fd = temporary_file(0);
	static uint8_t wanted[16 * PAGE], got[16 * PAGE];

	must(pwritev(fd, out, 3, 0) == 16 * PAGE - 100, "pwritev is short");
	must(preadv(fd, in, 2, 0) == 16 * PAGE - 100, "preadv is short");
	memcpy(wanted, from.at + 100, 5 * PAGE);
	memcpy(wanted + 5 * PAGE, area_page(&from, 100), 10 * PAGE);
	memcpy(wanted + 15 * PAGE, area_page(&from, 50), PAGE - 100);
	memcpy(got, to.at, 5 * PAGE);
	memcpy(got + 5 * PAGE, area_page(&to, 70), 11 * PAGE - 100);
	must(memcmp(wanted, got, 16 * PAGE - 100) == 0, "what was read is not what was written");
	area_check(&from, 0, from.pages, 0, "what was written");
	area_check(&to, 5, 65, 0, "between what was read");
	close(fd);
	area_free(&from);
	area_free(&to);
}

static void io_direct(void)
{
	struct area from = area_make(AREA_PAGES), to = area_make(AREA_PAGES);
	int fd = temporary_file(O_DIRECT);

	for (unsigned round = 0; round < 3; round++) {
		page_out(from.at, from.pages);
		transferred(pwrite(fd, from.at, from.pages * PAGE, 0), from.pages, "O_DIRECT pwrite");
		page_out(to.at, to.pages);
		transferred(pread(fd, to.at, to.pages * PAGE, 0), to.pages, "O_DIRECT pread");
		area_check_at(&from, 0, from.pages, 0, to.at, "what was read");
	}
	area_check(&from, 0, from.pages, 0, "what was written");
	close(fd);
	area_free(&from);
	area_free(&to);
}

/* ---- pipes and sockets ---- */

static void io_pipe(void)
{
	struct area from = area_make(AREA_PAGES), to = area_make(AREA_PAGES);
	int fds[2];

	must_call(pipe(fds) == 0 && fcntl(fds[1], F_SETPIPE_SZ, 1 << 20) >= 0, "pipe");
	for (size_t at = 0; at + IO_PAGES <= from.pages; at += IO_PAGES) {
		transferred(write(fds[1], area_page(&from, at), IO_PAGES * PAGE), IO_PAGES, "write");
		transferred(read(fds[0], area_page(&to, at), IO_PAGES * PAGE), IO_PAGES, "read");
	}
	area_check_at(&from, 0, from.pages, 0, to.at, "what was read");
	close(fds[0]);
	close(fds[1]);
	area_free(&from);
	area_free(&to);
}

struct reader {
	int fd;
	const struct area *to;
	ssize_t got;
};

static void *read_blocked(void *argument)
{
	struct reader *reader = argument;

	reader->got = recv(reader->fd, reader->to->at, 8 * PAGE, MSG_WAITALL);
	return NULL;
}

/* The receiver waits already, and its buffer goes out meanwhile. */
static void io_socket(void)
{
	struct area from = area_make(AREA_PAGES), to = area_make(AREA_PAGES);
	struct reader reader;
	pthread_t thread;
	int fds[2], bytes = 1 << 20;

	must_call(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0, "socketpair");
	must_call(setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes) == 0, "SO_SNDBUF");
	reader = (struct reader){ fds[1], &to, 0 };
	must(pthread_create(&thread, NULL, read_blocked, &reader) == 0, "no thread");
	for (size_t i = 0; i < 8; i++) {
		page_out(from.at, from.pages);
		page_out_try();
		transferred(send(fds[0], area_page(&from, i), PAGE, 0), 1, "send");
	}
	pthread_join(thread, NULL);
	transferred(reader.got, 8, "recv");
	area_check_at(&from, 0, 8, 0, to.at, "what was received");
	area_check(&to, 8, to.pages - 8, 0, "behind it");
	close(fds[0]);
	close(fds[1]);
	area_free(&from);
	area_free(&to);
}

static void io_splice(void)
{
	struct area area = area_make(AREA_PAGES);
	struct iovec part = { area.at, IO_PAGES * PAGE };
	int fds[2], fd = temporary_file(0);
	uint8_t *map;

	must_call(pipe(fds) == 0, "pipe");
	transferred(vmsplice(fds[1], &part, 1, 0), IO_PAGES, "vmsplice");
	page_out_try(); /* the pipe holds the pages themselves */
	transferred(splice(fds[0], NULL, fd, NULL, IO_PAGES * PAGE, 0), IO_PAGES, "splice");
	map = mmap(NULL, IO_PAGES * PAGE, PROT_READ, MAP_SHARED, fd, 0);
	must_call(map != MAP_FAILED, "mmap");
	area_check_at(&area, 0, IO_PAGES, 0, map, "in the file");
	area_check(&area, 0, area.pages, 0, "what was spliced");
	munmap(map, IO_PAGES * PAGE);
	close(fds[0]);
	close(fds[1]);
	close(fd);
	area_free(&area);
}

static void io_vmsplice_and_read(void)
{
	struct area area = area_make(AREA_PAGES), to = area_make(AREA_PAGES);
	struct iovec part = { area_page(&area, 20), IO_PAGES * PAGE };
	int fds[2];

	must_call(pipe(fds) == 0, "pipe");
	transferred(vmsplice(fds[1], &part, 1, 0), IO_PAGES, "vmsplice");
	page_out_try();
	area_check(&area, 0, area.pages, 0, "while it is in the pipe");
	transferred(read(fds[0], to.at, IO_PAGES * PAGE), IO_PAGES, "read");
	area_check_at(&area, 20, IO_PAGES, 0, to.at, "out of the pipe");
	close(fds[0]);
	close(fds[1]);
	area_free(&area);
	area_free(&to);
}

/* ---- io_uring ---- */

struct ring {
	int fd;
	uint8_t *queues;
	struct io_uring_sqe *entries;
	struct io_uring_params parameters;
	size_t queue_bytes;
};

/* False where the kernel does not let this process have one. */
static bool ring_open(struct ring *ring)
{
	memset(ring, 0, sizeof *ring);
	ring->fd = (int)syscall(SYS_io_uring_setup, 4, &ring->parameters);
	if (ring->fd < 0 && (errno == EPERM || errno == ENOSYS))
		return false;
	must_call(ring->fd >= 0, "io_uring_setup");
	ring->queue_bytes = ring->parameters.cq_off.cqes +
			    ring->parameters.cq_entries * sizeof(struct io_uring_cqe);
	ring->queues = mmap(NULL, ring->queue_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd,
			    IORING_OFF_SQ_RING);
	ring->entries = mmap(NULL, ring->parameters.sq_entries * sizeof *ring->entries,
			     PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, IORING_OFF_SQES);
	must_call(ring->queues != MAP_FAILED && (void *)ring->entries != MAP_FAILED, "mmap of the ring");
	return true;
}

static void ring_close(struct ring *ring)
{
	munmap(ring->queues, ring->queue_bytes);
	munmap(ring->entries, ring->parameters.sq_entries * sizeof *ring->entries);
	close(ring->fd);
}

static uint32_t *ring_word(const struct ring *ring, uint32_t offset)
{
	return (uint32_t *)(void *)(ring->queues + offset);
}

/* One operation with registered buffer 0, to its end. Returns its result. */
static int ring_run(struct ring *ring, uint8_t operation, int fd, void *memory, size_t pages)
{
	uint32_t tail = *ring_word(ring, ring->parameters.sq_off.tail);
	uint32_t mask = *ring_word(ring, ring->parameters.sq_off.ring_mask);
	uint32_t head = *ring_word(ring, ring->parameters.cq_off.head);
	uint32_t cq_mask = *ring_word(ring, ring->parameters.cq_off.ring_mask);
	struct io_uring_cqe *done;

	memset(&ring->entries[tail & mask], 0, sizeof *ring->entries);
	ring->entries[tail & mask] = (struct io_uring_sqe){ .opcode = operation, .fd = fd,
							    .addr = (uintptr_t)memory,
							    .len = (uint32_t)(pages * PAGE) };
	ring_word(ring, ring->parameters.sq_off.array)[tail & mask] = tail & mask;
	__atomic_store_n(ring_word(ring, ring->parameters.sq_off.tail), tail + 1, __ATOMIC_RELEASE);
	must_call(syscall(SYS_io_uring_enter, ring->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1,
		  "io_uring_enter");
	done = (struct io_uring_cqe *)(void *)(ring->queues + ring->parameters.cq_off.cqes) + (head & cq_mask);
	__atomic_store_n(ring_word(ring, ring->parameters.cq_off.head), head + 1, __ATOMIC_RELEASE);
	return done->res;
}

/* Registered while out; from then on its pages are pinned, and the kernel writes to them directly. */
static void io_uring_registered(void)
{
	struct area area = area_make(AREA_PAGES), from = area_make(AREA_PAGES);
	struct iovec buffer = { area.at, area.pages * PAGE };
	int fd = temporary_file(0);
	struct ring ring;

	if (!ring_open(&ring))
		return;
	must_call(syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &buffer, 1) == 0,
		  "register of buffers");
	area_write(&from, 0, from.pages, 5);
	transferred(pwrite(fd, from.at, from.pages * PAGE, 0), from.pages, "pwrite");
	for (unsigned i = 0; i < 5; i++)
		page_out_try();
	must(!is_managed() || pages_present(area.at, area.pages) == area.pages,
	     "only %zu of %zu pinned pages are left", pages_present(area.at, area.pages), area.pages);
	area_check(&area, 0, area.pages, 0, "pinned");
	transferred(ring_run(&ring, IORING_OP_READ_FIXED, fd, area.at, HALF), HALF, "READ_FIXED");
	area_check_at(&from, 0, HALF, 5, area.at, "what was read");
	area_check(&area, HALF, HALF, 0, "behind it");
	ring_close(&ring);
	area_write(&area, 0, HALF, 1);
	page_out(area.at, area.pages);
	area_check(&area, 0, HALF, 1, "no longer pinned, out and back");
	close(fd);
	area_free(&area);
	area_free(&from);
}

static void io_uring_plain(void)
{
	struct area area = area_make(AREA_PAGES), to = area_make(AREA_PAGES);
	int fd = temporary_file(O_DIRECT);
	struct ring ring;

	if (!ring_open(&ring))
		return;
	transferred(ring_run(&ring, IORING_OP_WRITE, fd, area.at, area.pages), area.pages, "WRITE");
	page_out(to.at, to.pages);
	transferred(ring_run(&ring, IORING_OP_READ, fd, to.at, to.pages), to.pages, "READ");
	area_check_at(&area, 0, area.pages, 0, to.at, "what was read");
	area_check(&area, 0, area.pages, 0, "what was written");
	ring_close(&ring);
	close(fd);
	area_free(&area);
	area_free(&to);
}

/* ---- another process ---- */

static void io_process_vm(void)
{
	struct area area = area_make(AREA_PAGES);
	struct token to_child = token_make();
	pid_t parent = getpid(), pid = fork();

	must_call(pid >= 0, "fork");
	if (pid == 0) {
		struct area copy = area_map(AREA_PAGES), fresh = area;
		struct iovec local = { copy.at, copy.pages * PAGE }, remote = { area.at, area.pages * PAGE };

		token_wait(&to_child);
		transferred(process_vm_readv(parent, &local, 1, &remote, 1, 0), copy.pages,
			    "process_vm_readv");
		area_check_at(&area, 0, area.pages, 0, copy.at, "read out of the parent");
		area_content(&fresh, 9, 1, copy.at);
		local.iov_len = PAGE;
		remote = (struct iovec){ area_page(&area, 9), PAGE };
		transferred(process_vm_writev(parent, &local, 1, &remote, 1, 0), 1, "process_vm_writev");
		child_done();
	}
	page_out(area.at, area.pages);
	token_send(&to_child);
	wait_for(pid, 0, "child");
	area_check(&area, 9, 1, 1, "written by the child");
	page_out(area.at, area.pages);
	area_check(&area, 0, 9, 0, "below, out and back");
	area_check(&area, 9, 1, 1, "written by the child, out and back");
	area_check(&area, 10, area.pages - 10, 0, "above, out and back");
	area_free(&area);
}

const struct row io_rows[] = {
	{ "io_file", io_file, 0 },
	{ "io_vectors", io_vectors, 0 },
	{ "io_direct", io_direct, 0 },
	{ "io_pipe", io_pipe, 0 },
	{ "io_socket", io_socket, 0 },
	{ "io_splice", io_splice, 0 },
	{ "io_vmsplice_and_read", io_vmsplice_and_read, 0 },
	{ "io_uring_registered", io_uring_registered, 0 },
	{ "io_uring_plain", io_uring_plain, 0 },
	{ "io_process_vm", io_process_vm, 0 },
	{ NULL, NULL, 0 },
};
