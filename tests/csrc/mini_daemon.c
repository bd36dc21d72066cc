/* SPDX-License-Identifier: MIT */
/* mini_daemon — see mini_daemon.h. Threads: the test's own, and one server per armed peer. */
#define _GNU_SOURCE
#include "mini_daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define FEATURES                                                                                \
	(UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |       \
	 UFFD_FEATURE_EVENT_UNMAP)
#define FEATURE_MOVE (1ULL << 16)

static uint64_t token_next = 1000;

int daemon_listen(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	CHECK(fd >= 0 && strlen(path) < sizeof address.sun_path);
	strcpy(address.sun_path, path);
	unlink(path);
	CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0);
	CHECK(chmod(path, 0666) == 0 && listen(fd, 8) == 0);
	return fd;
}

static void wait_readable(int fd)
{
	struct pollfd ready = { .fd = fd, .events = POLLIN };

	CHECK(poll(&ready, 1, PATIENCE_MS) == 1);
}

static void send_message(int fd, const void *data, size_t bytes, const int *fds, unsigned count)
{
	char control[CMSG_SPACE(4 * sizeof(int))] __attribute__((aligned(8))) = { 0 };
	struct iovec part = { (void *)(uintptr_t)data, bytes };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	if (count) {
		struct cmsghdr *header = (struct cmsghdr *)control;

		message.msg_control = control;
		message.msg_controllen = CMSG_SPACE(count * sizeof(int));
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(count * sizeof(int));
		memcpy(CMSG_DATA(header), fds, count * sizeof(int));
	}
	CHECK(sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)bytes);
}

static unsigned receive_message(int fd, void *data, size_t bytes, int *fds)
{
	char control[CMSG_SPACE(4 * sizeof(int))] __attribute__((aligned(8)));
	struct iovec part = { data, bytes };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof control };
	struct cmsghdr *header;
	unsigned count;

	wait_readable(fd);
	CHECK(recvmsg(fd, &message, MSG_CMSG_CLOEXEC) == (ssize_t)bytes);
	header = CMSG_FIRSTHDR(&message);
	if (!header)
		return 0;
	count = (unsigned)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
	CHECK(count <= 2);
	memcpy(fds, CMSG_DATA(header), count * sizeof(int));
	return count;
}

struct peer *peer_accept(int listener)
{
	struct peer *peer = calloc(1, sizeof *peer);
	struct ucred credentials;
	socklen_t length = sizeof credentials;
	int fds[2];

	CHECK(peer);
	wait_readable(listener);
	peer->socket = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	peer->events = peer->trash = peer->ring_fd = -1;
	pthread_mutex_init(&peer->gate, NULL);
	CHECK(peer->socket >= 0);
	CHECK(getsockopt(peer->socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0);
	peer->pid = credentials.pid;
	CHECK(receive_message(peer->socket, &peer->hello, sizeof peer->hello, fds) == 0);
	CHECK(peer->hello.magic == VSWAP_MAGIC && peer->hello.version == VSWAP_WIRE_VERSION);
	return peer;
}

void peer_refuse(struct peer *peer, uint16_t status)
{
	struct vswap_welcome welcome = { VSWAP_MAGIC, VSWAP_WIRE_VERSION, status, 0 };

	send_message(peer->socket, &welcome, sizeof welcome, NULL, 0);
	close(peer->socket);
	peer->socket = -1;
}

/* ---- serving ---- */

static void fill(struct peer *peer, uint64_t address)
{
	unsigned char page[TEST_PAGE] = { 0 };
	struct uffdio_copy copy = { .dst = address, .src = (uintptr_t)page, .len = TEST_PAGE };

	if (address == peer->arm.beacon)
		memcpy(page, &peer->token, sizeof peer->token);
	for (unsigned i = peer->stored_count; i-- > 0;)
		if (peer->stored[i].address == address) {
			memcpy(page, peer->stored[i].bytes, TEST_PAGE);
			break;
		}
	/* Any failure but an unread event is somebody else's success, or the process's end. */
	while (ioctl(peer->events, UFFDIO_COPY, &copy) < 0 && errno == EAGAIN)
		copy.copy = 0;
}

static void *serve(void *argument);

static void adopt(struct peer *peer, int fd)
{
	struct peer *child = calloc(1, sizeof *child);

	CHECK(child);
	child->socket = child->trash = child->ring_fd = -1;
	child->events = fd;
	child->token = token_next++;
	child->arm = peer->arm;
	child->stored = calloc(STORED_MAX, sizeof *child->stored);
	CHECK(child->stored);
	memcpy(child->stored, peer->stored, peer->stored_count * sizeof *peer->stored);
	child->stored_count = peer->stored_count;
	pthread_mutex_init(&child->gate, NULL);
	CHECK(pthread_create(&child->server, NULL, serve, child) == 0);
	peer->forked = child;
	__atomic_store_n(&peer->forked_token, child->token, __ATOMIC_RELEASE);
}

static void *serve(void *argument)
{
	struct peer *peer = argument;
	struct uffd_msg message;

	while (!__atomic_load_n(&peer->stopping, __ATOMIC_ACQUIRE)) {
		struct pollfd ready = { .fd = peer->events, .events = POLLIN };

		if (poll(&ready, 1, 20) <= 0)
			continue;
		pthread_mutex_lock(&peer->gate);
		while (read(peer->events, &message, sizeof message) == sizeof message) {
			if (message.event == UFFD_EVENT_FORK)
				adopt(peer, (int)message.arg.fork.ufd);
			else if (message.event == UFFD_EVENT_PAGEFAULT)
				fill(peer, message.arg.pagefault.address & ~(TEST_PAGE - 1));
		}
		pthread_mutex_unlock(&peer->gate);
	}
	return NULL;
}

/* ---- arming ---- */

static void api(int fd, uint64_t features)
{
	struct uffdio_api request = { .api = UFFD_API, .features = features };

	CHECK(ioctl(fd, UFFDIO_API, &request) == 0);
}

static void watch(int fd, uint64_t address, uint64_t bytes, uint64_t mode)
{
	struct uffdio_register request = { .range = { address, bytes }, .mode = mode };

	CHECK(ioctl(fd, UFFDIO_REGISTER, &request) == 0);
}

void peer_register(struct peer *peer, uint64_t address, uint64_t pages)
{
	watch(peer->events, address, pages * TEST_PAGE, UFFDIO_REGISTER_MODE_MISSING);
}

void peer_unregister(struct peer *peer, uint64_t address, uint64_t pages)
{
	struct uffdio_range range = { address, pages * TEST_PAGE };

	CHECK(ioctl(peer->events, UFFDIO_UNREGISTER, &range) == 0);
}

static void ring_make(struct peer *peer)
{
	peer->ring_fd = memfd_create("ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	CHECK(peer->ring_fd >= 0 && ftruncate(peer->ring_fd, VSWAP_RING_BYTES) == 0);
	CHECK(fcntl(peer->ring_fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) == 0);
	peer->ring = mmap(NULL, VSWAP_RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, peer->ring_fd,
			  0);
	CHECK(peer->ring != MAP_FAILED);
	peer->ring->magic = VSWAP_MAGIC;
	peer->ring->version = VSWAP_WIRE_VERSION;
}

static void arena_check(const struct vswap_arm *arm)
{
	uint64_t end = arm->arena + arm->arena_bytes;

	CHECK(arm->magic == VSWAP_MAGIC && arm->version == VSWAP_WIRE_VERSION);
	CHECK(arm->arena && arm->arena % TEST_PAGE == 0);
	CHECK(arm->beacon > arm->arena && arm->beacon < end);
	for (int i = 0; i < VSWAP_PROTECTIONS; i++) {
		CHECK(arm->staging[i] > arm->beacon && arm->trash[i] > arm->staging[i]);
		CHECK(arm->trash[i] + VSWAP_WINDOW_PAGES * TEST_PAGE < end);
	}
}

void peer_arm(struct peer *peer, struct peer *parent)
{
	struct vswap_welcome welcome = { VSWAP_MAGIC, VSWAP_WIRE_VERSION, VSWAP_OK, 0 };
	struct vswap_ready ready = { VSWAP_MAGIC, VSWAP_WIRE_VERSION, VSWAP_OK };
	struct peer *found = parent ? parent->forked : NULL;
	bool forked = peer->hello.kind == VSWAP_HELLO_FORKED;
	int fds[3] = { open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), -1, -1 };

	CHECK(fds[0] >= 0 && forked == (found != NULL));
	ring_make(peer);
	fds[1] = peer->ring_fd;
	if (forked) {
		CHECK(peer->hello.token == found->token);
		/* From here the accepted peer takes the place of the one that the fork made. */
		found->stopping = true;
		pthread_join(found->server, NULL);
		peer->events = fds[2] = found->events;
		peer->stored = found->stored;
		peer->stored_count = found->stored_count;
	} else {
		peer->stored = calloc(STORED_MAX, sizeof *peer->stored);
		CHECK(peer->stored);
	}
	welcome.token = peer->token = forked ? found->token : token_next++;
	send_message(peer->socket, &welcome, sizeof welcome, fds, forked ? 3 : 2);
	close(fds[0]);

	CHECK(receive_message(peer->socket, &peer->arm, sizeof peer->arm, fds) ==
	      (forked ? 1u : 2u));
	arena_check(&peer->arm);
	if (!forked) {
		peer->events = fds[0];
		api(peer->events, FEATURES | FEATURE_MOVE);
	}
	peer->trash = fds[forked ? 0 : 1];
	api(peer->trash, FEATURE_MOVE);
	watch(peer->events, peer->arm.beacon, TEST_PAGE, UFFDIO_REGISTER_MODE_MISSING);
	for (int i = 0; i < VSWAP_PROTECTIONS; i++) {
		watch(peer->events, peer->arm.staging[i],
		      VSWAP_WINDOWS * VSWAP_WINDOW_PAGES * TEST_PAGE,
		      UFFDIO_REGISTER_MODE_MISSING);
		/* MOVE only wants its destination registered. Nobody reads this userfaultfd, so
		 * it must have no missing faults: mlockall of the program would wait for ever. */
		watch(peer->trash, peer->arm.trash[i], VSWAP_WINDOW_PAGES * TEST_PAGE,
		      UFFDIO_REGISTER_MODE_WP);
	}
	CHECK(pthread_create(&peer->server, NULL, serve, peer) == 0);
	send_message(peer->socket, &ready, sizeof ready, NULL, 0);
}

uint64_t peer_wait_forked(struct peer *peer)
{
	for (int i = 0; i < PATIENCE_MS; i++) {
		uint64_t token = __atomic_load_n(&peer->forked_token, __ATOMIC_ACQUIRE);

		if (token)
			return token;
		usleep(1000);
	}
	CHECK(!"the process forked");
	return 0;
}

/* ---- commands ---- */

static void execute_gated(struct peer *peer, struct vswap_command *command)
{
	struct vswap_ring *ring = peer->ring;
	uint32_t number = ring->posted, done;
	struct timespec patience = { PATIENCE_MS / 1000, 0 };

	ring->commands[number % VSWAP_RING_COMMANDS] = *command;
	__atomic_store_n(&ring->posted, number + 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&ring->agent_sleeping, __ATOMIC_SEQ_CST))
		syscall(SYS_futex, &ring->posted, FUTEX_WAKE, 1, NULL);
	__atomic_store_n(&ring->daemon_waiting, 1, __ATOMIC_SEQ_CST);
	while ((done = __atomic_load_n(&ring->done, __ATOMIC_SEQ_CST)) != number + 1)
		CHECK(syscall(SYS_futex, &ring->done, FUTEX_WAIT, done, &patience) == 0 ||
		      errno != ETIMEDOUT);
	__atomic_store_n(&ring->daemon_waiting, 0, __ATOMIC_SEQ_CST);
	*command = ring->commands[number % VSWAP_RING_COMMANDS];
}

void peer_execute(struct peer *peer, struct vswap_command *command)
{
	bool gated = command->operation == VSWAP_MOVE_OUT;

	if (gated)
		pthread_mutex_lock(&peer->gate);
	execute_gated(peer, command);
	if (gated)
		pthread_mutex_unlock(&peer->gate);
}

bool page_is_present(pid_t pid, uint64_t address)
{
	char path[64];
	uint64_t entry = 0;
	int fd;

	snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0);
	CHECK(pread(fd, &entry, 8, (off_t)(address / TEST_PAGE * 8)) == 8);
	close(fd);
	return entry >> 63;
}

unsigned peer_evict(struct peer *peer, uint64_t address, uint32_t pages)
{
	struct vswap_command command = { .operation = VSWAP_MOVE_OUT, .run_count = 1,
					 .runs = { { .address = address, .pages = pages } } };
	unsigned stored = 0;

	pthread_mutex_lock(&peer->gate);
	execute_gated(peer, &command);
	for (uint32_t i = 0; i < pages; i++) {
		struct stored_page *page = &peer->stored[peer->stored_count];
		struct iovec here = { page->bytes, TEST_PAGE };
		struct iovec there = { (void *)(peer->arm.staging[0] + i * TEST_PAGE), TEST_PAGE };

		if (!page_is_present(peer->pid, peer->arm.staging[0] + i * TEST_PAGE))
			continue;
		CHECK(peer->stored_count < STORED_MAX);
		CHECK(process_vm_readv(peer->pid, &here, 1, &there, 1, 0) == (ssize_t)TEST_PAGE);
		page->address = address + i * TEST_PAGE;
		peer->stored_count++;
		stored++;
	}
	command.operation = VSWAP_RELEASE;
	execute_gated(peer, &command);
	CHECK(command.error == 0);
	pthread_mutex_unlock(&peer->gate);
	return stored;
}

void peer_close(struct peer *peer)
{
	peer->stopping = true;
	pthread_join(peer->server, NULL);
	close(peer->socket);
	close(peer->events);
	close(peer->trash);
	close(peer->ring_fd);
	munmap(peer->ring, VSWAP_RING_BYTES);
	free(peer->stored);
	free(peer);
}
