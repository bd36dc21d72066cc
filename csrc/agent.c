/* SPDX-License-Identifier: MIT */
/*
 * agent — the thread itself: how it starts, waits until the process is worth managing, and ends.
 *
 * Starting   preload.c clones it sharing the descriptor table; its first act is close_range with
 *            UNSHARE, which gives it an empty table of its own without ever holding a second
 *            reference to a file of the program (a copy of the table would, for a moment: a pipe
 *            would see its end late, a port or a device would still be in use).
 * Looking    anonymous resident size (statm, resident minus shared) against the minimum, the more
 *            often the nearer and the faster it grows: 1 ms to config.look_ns. getrusage says when
 *            there is nothing new to see.
 * Ending     refused; told to; it alone keeps the process alive; or it has other credentials or
 *            another seccomp mode than the program for two looks in a row (the program changed them
 *            behind preload.c's back, by raw system calls). Never when the daemon is merely away.
 * /proc      `self` is the process as its first thread sees it, which may have ended before the
 *            process (its statm then is all zeros), so sizes are read from `thread-self`.
 *
 * Compile flags: see agent.h.
 */
#include <linux/capability.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "agent.h"
#include "agent_sys.h"

#define LOOK_NS_MIN 1000000ULL
#define ADOPT_RETRY_NS 100000000ULL
#define STATUS_BYTES 4096

/* Threads of the process, own descriptor table soon, no TLS of its own. */
#define CLONE_FLAGS                                                                             \
	(0x00000100 /* VM */ | 0x00000200 /* FS */ | 0x00000400 /* FILES */ |                   \
	 0x00000800 /* SIGHAND */ | 0x00010000 /* THREAD */ | 0x00040000 /* SYSVSEM */ |        \
	 0x00100000 /* PARENT_SETTID */ | 0x00200000 /* CHILD_CLEARTID */)

/* ---- text ---- */

static unsigned text_append(char *buffer, unsigned used, unsigned size, const char *text)
{
	while (*text && used < size)
		buffer[used++] = *text++;
	return used;
}

static unsigned number_append(char *buffer, unsigned used, unsigned size, uint32_t number)
{
	char digits[11];
	unsigned i = sizeof digits - 1;

	digits[i] = 0;
	do {
		digits[--i] = (char)('0' + number % 10);
		number /= 10;
	} while (number);
	return text_append(buffer, used, size, digits + i);
}

/* A decimal number behind blanks; *text moves behind it. */
static uint64_t number_parse(const char **text)
{
	uint64_t number = 0;

	while (**text == ' ')
		(*text)++;
	while (**text >= '0' && **text <= '9')
		number = number * 10 + (uint64_t)(*(*text)++ - '0');
	return number;
}

/* Contents of a small file, NUL-terminated. Returns its length or -errno. */
static long file_read(const char *path, char *buffer, size_t size)
{
	int fd = raw_open(path, O_RDONLY);
	size_t used = 0;
	long got = 0;

	if (fd < 0)
		return fd;
	while (used < size - 1 && (got = raw_read(fd, buffer + used, size - 1 - used)) > 0)
		used += (size_t)got;
	raw_close(fd);
	buffer[used] = 0;
	return got < 0 ? got : (long)used;
}

/* ---- stderr ---- */

/* The program's descriptor 2, though this thread has another table; -errno when there is none. */
static int stderr_open(struct agent_state *state)
{
	int pidfd, fd = -1;

	/* A filter may kill for a system call as rare as pidfd_getfd. */
	if (RAW_1(__NR_prctl, PR_GET_SECCOMP) == 0) {
		pidfd = (int)RAW_2(__NR_pidfd_open, state->tgid, 0);
		if (pidfd >= 0) {
			fd = (int)RAW_3(__NR_pidfd_getfd, pidfd, 2, 0);
			raw_close(pidfd);
		}
	}
	if (fd < 0)
		fd = raw_open("/proc/self/fd/2", O_WRONLY | O_APPEND | O_NONBLOCK | O_NOCTTY);
	return fd;
}

void agent_say(struct agent_state *state, const char *text, const char *detail)
{
	char line[AGENT_SAY_BYTES];
	struct timespec now = { 0, 0 };
	struct pollfd ready = { .events = POLLOUT };
	struct stat status;
	unsigned used;

	used = text_append(line, 0, sizeof line - 1, "vswap[");
	used = number_append(line, used, sizeof line - 1, state->tgid);
	used = text_append(line, used, sizeof line - 1, "]: ");
	used = text_append(line, used, sizeof line - 1, text);
	used = text_append(line, used, sizeof line - 1, detail);
	line[used++] = '\n';

	ready.fd = stderr_open(state);
	if (ready.fd < 0)
		return;
	/* Descriptor 2 may be a data file of the program by now: write only to what it was. Never
	 * wait for a reader. */
	if (RAW_2(__NR_fstat, ready.fd, &status) == 0 &&
	    status.st_dev == state->config.stderr_device &&
	    status.st_ino == state->config.stderr_inode &&
	    RAW_6(__NR_ppoll, &ready, 1, &now, 0, 0, 0) == 1 && (ready.revents & POLLOUT))
		(void)RAW_3(__NR_write, ready.fd, line, used);
	raw_close(ready.fd);
}

/* ---- ends ---- */

static _Noreturn void end_with(uint32_t code)
{
	for (;;)
		(void)RAW_1(__NR_exit, code);
}

void agent_end(void) { end_with(0); }

/* Not armed, and never again. */
static _Noreturn void leave(const struct agent_state *state)
{
	if (state->config.is_injected)
		raw_unmap_and_exit(state->arena, ARENA_BYTES);
	agent_end();
}

void agent_kill_process(struct agent_state *state, const char *why)
{
	agent_say(state, "killed: its swapped memory cannot be trusted: ", why);
	for (;;)
		(void)RAW_2(__NR_kill, raw_getpid(), SIGKILL);
}

void agent_rest(struct agent_state *state)
{
	uint32_t request;

	while ((request = atomic_get(&state->request)) != AGENT_GO_ON) {
		if (request == AGENT_LEAVE)
			agent_end();
		atomic_set(&state->parked, 1);
		raw_futex_wake(&state->parked, FUTEX_PRIVATE_FLAG);
		(void)raw_futex_wait(&state->request, AGENT_PARK, AGENT_SLOW_NS,
				     FUTEX_PRIVATE_FLAG);
	}
	atomic_set(&state->parked, 0);
}

/* Field `number` of a /proc/PID/stat whose third field begins at `at`. */
static uint64_t stat_field(const char *at, unsigned number)
{
	for (unsigned field = 3; field < number; field++) {
		while (*at && *at != ' ')
			at++;
		while (*at == ' ')
			at++;
	}
	return number_parse(&at);
}

/*
 * The first thread is a zombie and this one the only other: nobody else can end the process. Its
 * status is that of the thread that ends last: this one says what the first one had said.
 */
static void end_if_alone(void)
{
	char text[STATUS_BYTES];
	const char *behind_name = NULL;

	if (file_read("/proc/self/stat", text, sizeof text) <= 0)
		return;
	for (const char *at = text; *at; at++)
		if (*at == ')')
			behind_name = at;
	if (!behind_name || behind_name[1] != ' ' || behind_name[2] != 'Z')
		return;
	if (stat_field(behind_name + 2, 20 /* num_threads */) == 2)
		end_with((uint32_t)(stat_field(behind_name + 2, 52 /* exit_code */) >> 8 & 0xff));
}

/* The line of /proc/PID/status that begins with `name`, or NULL. */
static const char *status_line(const char *status, const char *name)
{
	while (*status) {
		unsigned i = 0;

		while (name[i] && status[i] == name[i])
			i++;
		if (!name[i])
			return status + i;
		while (*status && *status != '\n')
			status++;
		if (*status)
			status++;
	}
	return NULL;
}

static bool lines_differ(const char *mine, const char *theirs, const char *name)
{
	const char *a = status_line(mine, name), *b = status_line(theirs, name);

	if (!a || !b)
		return false;
	while (*a && *a == *b && *a != '\n') {
		a++;
		b++;
	}
	return *a != *b;
}

static bool differs_from_program(struct agent_state *state)
{
	char mine[STATUS_BYTES], theirs[STATUS_BYTES];

	if (file_read("/proc/thread-self/status", mine, sizeof mine) <= 0 ||
	    file_read("/proc/self/status", theirs, sizeof theirs) <= 0)
		return false;
	if (lines_differ(mine, theirs, "Seccomp:")) {
		state->sandboxed = 1;
		return true;
	}
	return lines_differ(mine, theirs, "Uid:") || lines_differ(mine, theirs, "Gid:") ||
	       lines_differ(mine, theirs, "Groups:");
}

void agent_look_around(struct agent_state *state)
{
	if (atomic_get(&state->request) == AGENT_LEAVE)
		agent_end();
	end_if_alone();
	/* Twice in a row: preload.c may be just about to replace this agent. */
	state->differed = differs_from_program(state) ? state->differed + 1 : 0;
	if (state->differed >= 2)
		agent_end();
	state->sandboxed = 0;
}

/* ---- waiting until the process is worth it ---- */

struct look {
	uint64_t bytes;  /* anonymous resident size */
	uint64_t faults; /* page faults of the process when it was read */
};

/*
 * Most looks cost one system call: where no page fault was, no memory was touched, and what was
 * resident at most, file pages included, bounds what is anonymous.
 */
static void look_take(const struct agent_config *config, struct look *look)
{
	char text[128];
	const char *at = text;
	struct rusage usage;
	uint64_t resident, shared, faults;

	if (RAW_2(__NR_getrusage, RUSAGE_SELF, &usage) < 0)
		return;
	faults = (uint64_t)usage.ru_minflt + (uint64_t)usage.ru_majflt;
	if (faults == look->faults)
		return;
	look->faults = faults;
	look->bytes = (uint64_t)usage.ru_maxrss * 1024;
	/* Without /proc the upper bound has to do. */
	if (look->bytes < config->minimum_bytes / 2 ||
	    file_read("/proc/thread-self/statm", text, sizeof text) <= 0)
		return;
	(void)number_parse(&at);
	resident = number_parse(&at);
	shared = number_parse(&at);
	look->bytes = resident > shared ? (resident - shared) * AGENT_PAGE : 0;
}

/* When to look again so that at the present rate only half of what is left is used by then. */
static uint64_t next_interval(const struct agent_config *config, uint64_t interval, uint64_t bytes,
			      uint64_t bytes_before)
{
	uint64_t shortest = config->look_ns < LOOK_NS_MIN ? config->look_ns : LOOK_NS_MIN;
	uint64_t left_kib = (config->minimum_bytes - bytes) / 1024 + 1;
	uint64_t grown_kib = bytes > bytes_before ? (bytes - bytes_before) / 1024 : 0;
	uint64_t next = grown_kib ? interval * left_kib / (2 * grown_kib) : 2 * interval;

	if (next > 2 * interval)
		next = 2 * interval;
	if (next > config->look_ns)
		next = config->look_ns;
	return next < shortest ? shortest : next;
}

static void wait_for(struct agent_state *state, uint64_t ns)
{
	(void)raw_futex_wait(&state->request, AGENT_GO_ON, ns, FUTEX_PRIVATE_FLAG);
	agent_rest(state);
}

/* Whoever waits in agent_hurry goes on. */
static void hurry_end(struct agent_state *state)
{
	atomic_set(&state->hurry, AGENT_HURRY_OVER);
	raw_futex_wake(&state->hurry, FUTEX_PRIVATE_FLAG);
}

static void wait_until_worth(struct agent_state *state)
{
	uint64_t interval = LOOK_NS_MIN, since_around = 0, before;
	struct look look = { 0, 0 };

	while (atomic_get(&state->hurry) != AGENT_HURRIED) {
		wait_for(state, interval);
		before = look.bytes;
		look_take(&state->config, &look);
		if (look.bytes >= state->config.minimum_bytes)
			return;
		since_around += interval;
		if (since_around >= AGENT_SLOW_NS) {
			since_around = 0;
			look.faults = 0; /* not all memory comes by a fault of its own process */
			agent_look_around(state);
		}
		interval = next_interval(&state->config, interval, look.bytes, before);
	}
}

/* Look, and connect once there is a reason and somebody to connect to. Returns when armed. */
static void come_under_management(struct agent_state *state)
{
	for (;;) {
		atomic_set(&state->phase, AGENT_LOOKING);
		wait_until_worth(state);
		atomic_set(&state->phase, AGENT_JOINING);
		switch (agent_join(state, 0)) {
		case JOIN_DONE:
			return;
		case JOIN_REFUSED:
			leave(state);
		case JOIN_ABSENT:
			break;
		}
		hurry_end(state);
		if (state->config.verbose && !(state->said & AGENT_SAID_ABSENT))
			agent_say(state, "runs natively, no daemon at ", state->config.socket_path);
		state->said |= AGENT_SAID_ABSENT;
		atomic_set(&state->phase, AGENT_LOOKING);
		wait_for(state, AGENT_SLOW_NS);
		agent_look_around(state);
	}
}

/*
 * A forked child: is it managed, and as whom? The daemon answers the fault on the beacon. From a
 * token on this process has no choice but to join: its pages are with the daemon.
 */
static void ask_beacon(struct agent_state *state)
{
	const volatile uint64_t *beacon = (const volatile uint64_t *)(state->arena + ARENA_BEACON);
	uint64_t token = *beacon, waited_ns = 0;
	enum join_outcome outcome;

	/* Its parent is managed, and it is not: nobody watches the memory that was swapped out of it. */
	if (token == 0 && state->parent_ready)
		agent_kill_process(state, "the daemon and its supervisor died as it was forked");
	if (token == 0) {
		atomic_set(&state->beacon_armed, 0);
		return;
	}
	state->forked = 1;
	atomic_set(&state->phase, AGENT_JOINING);
	while ((outcome = agent_join(state, token)) == JOIN_ABSENT) {
		bool is_due = state->config.absent_ns && waited_ns >= state->config.absent_ns;

		if ((state->config.verbose || is_due) && !(state->said & AGENT_SAID_ABSENT)) {
			agent_say(state, "waits for the daemon at ", state->config.socket_path);
			state->said |= AGENT_SAID_ABSENT;
		}
		wait_for(state, ADOPT_RETRY_NS);
		waited_ns += ADOPT_RETRY_NS;
	}
	if (outcome == JOIN_REFUSED)
		agent_kill_process(state, "the daemon does not take this forked process");
}

/* ---- start ---- */

/* An own descriptor table with nothing in it but what was handed over. */
static bool descriptors_separate(const struct agent_state *state)
{
	uint32_t above = 0, low = 0;

	if (!state->armed)
		return RAW_3(__NR_close_range, 0, ~0u, RAW_CLOSE_RANGE_UNSHARE) == 0;
	for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
		if ((uint32_t)state->descriptors[i] >= above)
			above = (uint32_t)state->descriptors[i] + 1;
	if (RAW_3(__NR_close_range, above, ~0u, RAW_CLOSE_RANGE_UNSHARE) != 0)
		return false;
	while (low < above) { /* once for each descriptor kept: close what lies below it */
		uint32_t next = above;

		for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
			if ((uint32_t)state->descriptors[i] >= low &&
			    (uint32_t)state->descriptors[i] < next)
				next = (uint32_t)state->descriptors[i];
		if (next > low)
			(void)RAW_3(__NR_close_range, low, next - 1, 0);
		low = next + 1;
	}
	return true;
}

/* Faults wait while a MOVE waits for this thread to get a CPU. Not allowed to most programs: a hint. */
static void priority_raise(void)
{
	(void)RAW_3(__NR_setpriority, 0 /* PRIO_PROCESS: this thread */, 0, -10);
}

static void capabilities_drop(void)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct none[2] = { { 0, 0, 0 }, { 0, 0, 0 } };

	(void)RAW_2(__NR_capset, &header, none);
}

static _Noreturn void agent_main(void *argument)
{
	struct agent_state *state = argument;
	bool separate = descriptors_separate(state), left;

	atomic_set(&state->settled, 1);
	raw_futex_wake(&state->settled, FUTEX_PRIVATE_FLAG);
	if (!separate)
		agent_end();
	priority_raise();
	capabilities_drop();
	(void)RAW_2(__NR_prctl, PR_SET_NAME, "vswap-agent");
	for (;;) {
		if (!state->armed && atomic_get(&state->beacon_armed))
			ask_beacon(state);
		if (!state->armed)
			come_under_management(state);
		atomic_set(&state->phase, AGENT_SERVING);
		hurry_end(state);
		left = agent_serve(state) == VSWAP_RETIRED_LEFT;
		/* All pages are here, or the daemon died before it took our ARM: then nothing is registered but what
		 * another did. */
		agent_unjoin(state);
		if (!state->forked || left)
			atomic_set(&state->beacon_armed, 0);
		if (left)
			leave(state);
	}
}

int agent_start(struct agent_state *state)
{
	uint64_t signals;
	long tid;

	state->request = AGENT_GO_ON;
	state->parked = state->settled = state->differed = 0;
	state->hurry = state->armed ? AGENT_HURRY_OVER : AGENT_UNHURRIED;
	state->phase = AGENT_STARTING;
	state->tgid = (uint32_t)raw_getpid();
	raw_signals_block(&signals);
	tid = raw_clone(CLONE_FLAGS, (void *)(state->arena + ARENA_STACK + AGENT_STACK_BYTES),
			&state->tid, agent_main, state);
	raw_signals_restore(&signals);
	if (tid < 0)
		atomic_set(&state->tid, 0);
	return tid < 0 ? (int)tid : 0;
}

void agent_hurry(struct agent_state *state)
{
	uint32_t expected = AGENT_UNHURRIED;

	(void)__atomic_compare_exchange_n(&state->hurry, &expected, AGENT_HURRIED, false, __ATOMIC_SEQ_CST,
					  __ATOMIC_SEQ_CST);
	for (uint64_t waited = 0; waited < AGENT_HURRY_NS_MAX; waited += LOOK_NS_MIN) {
		if (atomic_get(&state->hurry) != AGENT_HURRIED || !atomic_get(&state->tid))
			return;
		/* Again and again: a wake may come a moment before its wait. */
		raw_futex_wake(&state->request, FUTEX_PRIVATE_FLAG);
		(void)raw_futex_wait(&state->hurry, AGENT_HURRIED, LOOK_NS_MIN, FUTEX_PRIVATE_FLAG);
	}
	atomic_set(&state->hurry, AGENT_HURRY_OVER);
}

struct agent_state *agent_create(const struct agent_config *config)
{
	long arena = raw_mmap(0, ARENA_BYTES, PROT_NONE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
	struct agent_state *state;
	int writable = PROT_READ | PROT_WRITE;

	if (arena < 0)
		return NULL;
	(void)raw_madvise((uint64_t)arena, ARENA_BYTES, MADV_DONTDUMP);
	if (raw_mprotect((uint64_t)arena + ARENA_STACK, AGENT_STACK_BYTES, writable) < 0 ||
	    raw_mprotect((uint64_t)arena + ARENA_STATE, AGENT_PAGE, writable) < 0) {
		(void)RAW_2(__NR_munmap, arena, ARENA_BYTES);
		return NULL;
	}
	state = (struct agent_state *)((uint64_t)arena + ARENA_STATE);
	for (unsigned i = 0; i < sizeof *config; i++) /* the page is zero otherwise */
		((char *)&state->config)[i] = ((const char *)config)[i];
	state->arena = (uint64_t)arena;
	return state;
}

void agent_forget_parent(struct agent_state *state)
{
	/* The mapping of the parent's ring is the parent's business. */
	(void)raw_mmap(state->arena + ARENA_RING, VSWAP_RING_BYTES, PROT_NONE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1);
	state->tid = 0;
	state->armed = 0;
	state->parent_ready = state->ready && !state->leaving;
	state->leaving = 0;
	state->ready = 0;
	state->forked = 0;
	state->token = 0;
	state->said = 0;
	state->ring_users = 0;
	state->absent_looks = 0;
	state->next_command = 0;
}
