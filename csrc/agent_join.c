/* SPDX-License-Identifier: MIT */
/*
 * agent_join — the agent's side of the handshake (wire.h), and the rest of the arena.
 *
 * Failures  before ARM was sent nothing depends on the daemon: everything is closed, and the caller
 *           looks again later (JOIN_ABSENT) or never (JOIN_REFUSED). When the daemon disappears
 *           after ARM was sent it may have registered memory: the descriptors are kept, as if READY
 *           had come, for closing the last userfaultfd would turn evicted pages into zeros.
 * Waiting   in slices of a second, with agent_look_around between; no time limit.
 * Limits    one byte stream, fixed sizes, at most WELCOME_DESCRIPTORS descriptors.
 *
 * Compile flags: see agent.h.
 */
#include <errno.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "agent.h"
#include "agent_sys.h"

#define WELCOME_DESCRIPTORS 3
#define RING_USED_NS 100000
#define STACK_LOCK_LIMIT_MIN (1u << 20) /* do not use up a small RLIMIT_MEMLOCK of the program */

/* Descriptors of a handshake under way; -1 when not open. */
struct join {
	int socket, device, ring, events, trash;
	const char *why;
};

static void close_if_open(int *fd)
{
	if (*fd >= 0)
		raw_close(*fd);
	*fd = -1;
}

/* ---- arena ---- */

static int pages_prepare(uint64_t address, uint64_t bytes, int protection)
{
	int result = raw_mprotect(address, bytes, protection);

	if (result < 0)
		return result;
	(void)raw_madvise(address, bytes, MADV_NOHUGEPAGE); /* EINVAL: a kernel without them */
	return raw_madvise(address, bytes, MADV_WIPEONFORK);
}

static void stack_lock(const struct agent_state *state)
{
	struct rlimit limit;

	if (RAW_4(__NR_prlimit64, 0, RLIMIT_MEMLOCK, 0, &limit) == 0 &&
	    limit.rlim_cur >= STACK_LOCK_LIMIT_MIN)
		(void)RAW_2(__NR_mlock, state->arena + ARENA_STACK, AGENT_STACK_BYTES);
}

/*
 * Make beacon, staging and trash accessible; where they are already (forked child) nothing changes.
 * *ret_executable: whether the second protection is allowed here.
 */
static int arena_prepare(const struct agent_state *state, bool forked, bool *ret_executable)
{
	int writable = PROT_READ | PROT_WRITE, result;

	stack_lock(state);
	/* mlockall(MCL_CURRENT) of the program would have every page of it populated. */
	(void)RAW_2(__NR_munlock, state->arena + ARENA_BEACON, ARENA_BYTES - ARENA_BEACON);
	result = pages_prepare(state->arena + ARENA_BEACON, AGENT_PAGE, writable);
	if (result == 0 && !forked) /* read as zero by this process, when it was forked unmanaged */
		result = raw_madvise(state->arena + ARENA_BEACON, AGENT_PAGE,
				     RAW_MADV_DONTNEED_LOCKED);
	if (result == 0)
		result = pages_prepare(agent_staging(state, 0), AGENT_STAGING_BYTES, writable);
	if (result == 0)
		result = pages_prepare(agent_trash(state, 0), AGENT_WINDOW_BYTES, writable);
	if (result < 0)
		return result;
	writable |= PROT_EXEC;
	*ret_executable =
		pages_prepare(agent_staging(state, 1), AGENT_STAGING_BYTES, writable) == 0 &&
		pages_prepare(agent_trash(state, 1), AGENT_WINDOW_BYTES, writable) == 0;
	return 0;
}

static int ring_map(const struct agent_state *state, int fd)
{
	uint64_t address = state->arena + ARENA_RING;
	struct stat status;
	long result;

	/* A page behind the end of a file is SIGBUS. */
	if (RAW_2(__NR_fstat, fd, &status) < 0 || status.st_size < VSWAP_RING_BYTES)
		return -EINVAL;
	result = raw_mmap(address, VSWAP_RING_BYTES, PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_FIXED, fd);
	if (result < 0)
		return (int)result;
	(void)raw_madvise(address, VSWAP_RING_BYTES, MADV_DONTDUMP);
	if (agent_ring(state)->magic != VSWAP_MAGIC ||
	    agent_ring(state)->version != VSWAP_WIRE_VERSION)
		return -EPROTO;
	return 0;
}

static void ring_unmap(const struct agent_state *state)
{
	(void)raw_mmap(state->arena + ARENA_RING, VSWAP_RING_BYTES, PROT_NONE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1);
}

/* ---- socket ---- */

/* 0, or -errno */
static int socket_connect(const struct agent_state *state, int *ret_socket)
{
	struct sockaddr_un address;
	unsigned length = 0;
	long result;
	int fd;

	address.sun_family = AF_UNIX;
	do
		address.sun_path[length] = state->config.socket_path[length];
	while (state->config.socket_path[length++]);
	fd = (int)RAW_3(__NR_socket, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return fd;
	result = RAW_3(__NR_connect, fd, &address, offsetof(struct sockaddr_un, sun_path) + length);
	if (result < 0) {
		raw_close(fd);
		return (int)result;
	}
	*ret_socket = fd;
	return 0;
}

/* Wait until the socket is readable (or hung up) or writable. */
static void socket_wait(struct agent_state *state, int fd, short events)
{
	struct pollfd ready = { .fd = fd, .events = events };
	struct timespec second;

	for (;;) {
		second.tv_sec = 1;
		second.tv_nsec = 0;
		if (RAW_6(__NR_ppoll, &ready, 1, &second, 0, 0, 0) != 0)
			return;
		agent_look_around(state);
	}
}

union control {
	struct cmsghdr header;
	char bytes[CMSG_SPACE(WELCOME_DESCRIPTORS * sizeof(int))];
};

/* Take over what descriptors came with a message; more than `max` are closed. */
static void take_descriptors(struct msghdr *message, int *descriptors, unsigned max,
			     unsigned *count)
{
	struct cmsghdr *header = CMSG_FIRSTHDR(message);
	unsigned arrived;

	if (!header || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
		return;
	arrived = (unsigned)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
	for (unsigned i = 0; i < arrived; i++) {
		int fd = ((const int *)(const void *)CMSG_DATA(header))[i];

		if (*count < max)
			descriptors[(*count)++] = fd;
		else
			raw_close(fd);
	}
}

/* Read exactly `bytes`. 0, -EPIPE at end of file, or -errno. */
static int receive(struct agent_state *state, int fd, void *buffer, size_t bytes,
		   int *descriptors, unsigned max, unsigned *count)
{
	union control control;
	size_t used = 0;
	long got;

	while (used < bytes) {
		struct iovec part = { (char *)buffer + used, bytes - used };
		struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1,
					  .msg_control = control.bytes,
					  .msg_controllen = sizeof control.bytes };

		got = RAW_3(__NR_recvmsg, fd, &message, MSG_CMSG_CLOEXEC);
		if (got == -EAGAIN) {
			socket_wait(state, fd, POLLIN);
			continue;
		}
		if (got <= 0)
			return got == 0 || got == -ECONNRESET ? -EPIPE : (int)got;
		used += (size_t)got;
		take_descriptors(&message, descriptors, max, count);
	}
	return 0;
}

static int send_all(struct agent_state *state, int fd, const void *buffer, size_t bytes,
		    const int *descriptors, unsigned count)
{
	union control control;
	size_t used = 0;
	long sent;

	while (used < bytes) {
		struct iovec part = { (char *)(uintptr_t)buffer + used, bytes - used };
		struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

		if (used == 0 && count) {
			message.msg_control = control.bytes;
			message.msg_controllen = CMSG_SPACE(count * sizeof(int));
			control.header.cmsg_level = SOL_SOCKET;
			control.header.cmsg_type = SCM_RIGHTS;
			control.header.cmsg_len = CMSG_LEN(count * sizeof(int));
			for (unsigned i = 0; i < count; i++)
				((int *)(void *)CMSG_DATA(&control.header))[i] = descriptors[i];
		}
		sent = RAW_3(__NR_sendmsg, fd, &message, MSG_NOSIGNAL);
		if (sent == -EAGAIN)
			socket_wait(state, fd, POLLOUT);
		else if (sent < 0)
			return (int)sent;
		else
			used += (size_t)sent;
	}
	return 0;
}

/* ---- handshake ---- */

static bool is_absent(int error)
{
	return error == -ENOENT || error == -ECONNREFUSED || error == -EAGAIN || error == -EPIPE ||
	       error == -ECONNRESET || error == -EINTR;
}

static const char *status_text(uint16_t status)
{
	switch (status) {
	case VSWAP_REFUSED_VERSION:
		return "another protocol version";
	case VSWAP_REFUSED_PEER:
		return "credentials, group or token do not allow it";
	case VSWAP_REFUSED_LIMIT:
		return "too many clients";
	case VSWAP_REFUSED_KERNEL:
		return "the kernel lacks something";
	default:
		return "unknown status";
	}
}

/* HELLO, WELCOME. */
static enum join_outcome introduce(struct agent_state *state, struct join *join, uint64_t token)
{
	struct vswap_hello hello;
	struct vswap_welcome welcome;
	int fds[WELCOME_DESCRIPTORS];
	unsigned wanted = token ? 3 : 2, count = 0;
	int result;

	hello.magic = VSWAP_MAGIC;
	hello.version = VSWAP_WIRE_VERSION;
	hello.kind = token ? VSWAP_HELLO_FORKED : VSWAP_HELLO_NEW;
	hello.token = token;
	for (unsigned i = 0; i < VSWAP_GROUP_BYTES; i++)
		hello.group[i] = state->config.group[i];
	result = send_all(state, join->socket, &hello, sizeof hello, NULL, 0);
	if (result == 0)
		result = receive(state, join->socket, &welcome, sizeof welcome, fds, wanted,
				 &count);
	if (count > 0)
		join->device = fds[0];
	if (count > 1)
		join->ring = fds[1];
	if (count > 2)
		join->events = fds[2];
	if (result < 0) {
		join->why = "the connection failed";
		return is_absent(result) ? JOIN_ABSENT : JOIN_REFUSED;
	}
	if (welcome.magic != VSWAP_MAGIC || welcome.version != VSWAP_WIRE_VERSION) {
		join->why = status_text(VSWAP_REFUSED_VERSION);
		return JOIN_REFUSED;
	}
	join->why = welcome.status ? status_text(welcome.status) : "descriptors did not arrive";
	if (welcome.status != VSWAP_OK || count != wanted)
		return JOIN_REFUSED;
	state->token = welcome.token;
	return JOIN_DONE;
}

/* Userfaultfds, ring, arena: what ARM tells. */
static int equip(struct agent_state *state, struct join *join, bool forked,
		 struct vswap_arm *ret_arm)
{
	bool executable;
	int result;

	join->why = "a userfaultfd could not be made";
	join->trash = (int)raw_ioctl(join->device, RAW_USERFAULTFD_NEW,
				     (void *)(uintptr_t)(O_CLOEXEC | O_NONBLOCK));
	if (join->trash < 0)
		return join->trash;
	if (!forked)
		join->events = (int)raw_ioctl(join->device, RAW_USERFAULTFD_NEW,
					      (void *)(uintptr_t)(O_CLOEXEC | O_NONBLOCK));
	if (join->events < 0)
		return join->events;
	join->why = "its ring could not be mapped";
	result = ring_map(state, join->ring);
	if (result < 0)
		return result;
	join->why = "memory for evicted pages could not be mapped";
	result = arena_prepare(state, forked, &executable);
	if (result < 0)
		return result;
	ret_arm->magic = VSWAP_MAGIC;
	ret_arm->version = VSWAP_WIRE_VERSION;
	ret_arm->reserved = 0;
	ret_arm->arena = state->arena;
	ret_arm->arena_bytes = ARENA_BYTES;
	ret_arm->beacon = state->arena + ARENA_BEACON;
	for (uint32_t i = 0; i < VSWAP_PROTECTIONS; i++) {
		ret_arm->staging[i] = i == 0 || executable ? agent_staging(state, i) : 0;
		ret_arm->trash[i] = i == 0 || executable ? agent_trash(state, i) : 0;
	}
	return 0;
}

/* ARM, READY. */
static enum join_outcome arm(struct agent_state *state, struct join *join, bool forked,
			     const struct vswap_arm *message)
{
	int fds[2] = { forked ? join->trash : join->events, join->trash };
	struct vswap_ready ready;
	unsigned none = 0;
	int result;

	atomic_set(&state->beacon_armed, 1);
	result = send_all(state, join->socket, message, sizeof *message, fds, forked ? 1 : 2);
	if (result < 0)
		join->why = "the connection failed";
	else {
		result = receive(state, join->socket, &ready, sizeof ready, NULL, 0, &none);
		if (result < 0)
			return JOIN_DONE; /* memory may be registered: see the top of this file */
		if (ready.magic == VSWAP_MAGIC && ready.status == VSWAP_OK) {
			state->ready = 1;
			return JOIN_DONE;
		}
		join->why = status_text(ready.status);
	}
	if (!forked)
		atomic_set(&state->beacon_armed, 0);
	return is_absent(result) ? JOIN_ABSENT : JOIN_REFUSED;
}

static enum join_outcome shake_hands(struct agent_state *state, struct join *join, uint64_t token)
{
	struct vswap_arm message;
	enum join_outcome outcome;
	int result = socket_connect(state, &join->socket);

	if (result < 0) {
		join->why = "the socket cannot be reached";
		/* A new client may try again later whatever the reason was. */
		return is_absent(result) || !token ? JOIN_ABSENT : JOIN_REFUSED;
	}
	outcome = introduce(state, join, token);
	if (outcome != JOIN_DONE)
		return outcome;
	if (equip(state, join, token != 0, &message) < 0)
		return JOIN_REFUSED;
	return arm(state, join, token != 0, &message);
}

void agent_unjoin(struct agent_state *state)
{
	atomic_set(&state->armed, 0);
	for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
		close_if_open(&state->descriptors[i]);
	/* Who has not begun to use it finds that it is not armed. */
	while (atomic_get(&state->ring_users)) {
		const struct timespec moment = { .tv_nsec = RING_USED_NS };

		(void)RAW_2(__NR_nanosleep, &moment, 0);
	}
	ring_unmap(state);
}

enum join_outcome agent_join(struct agent_state *state, uint64_t token)
{
	struct join join = { -1, -1, -1, -1, -1, "" };
	enum join_outcome outcome = shake_hands(state, &join, token);

	close_if_open(&join.device);
	close_if_open(&join.ring);
	if (outcome == JOIN_DONE) {
		state->descriptors[AGENT_SOCKET] = join.socket;
		state->descriptors[AGENT_EVENTS] = join.events;
		state->descriptors[AGENT_TRASH] = join.trash;
		state->next_command = agent_ring(state)->done;
		atomic_set(&state->armed, 1);
		return outcome;
	}
	close_if_open(&join.socket);
	close_if_open(&join.events);
	close_if_open(&join.trash);
	ring_unmap(state);
	if (outcome == JOIN_REFUSED && (state->config.verbose || token))
		agent_say(state, "the daemon does not manage this process: ", join.why);
	return outcome;
}
