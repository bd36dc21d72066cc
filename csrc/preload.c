/* SPDX-License-Identifier: MIT */
/*
 * preload — the LD_PRELOAD library: starts the agent, starts it again in forked children, and makes
 * it step aside where a second thread is in the way.
 *
 * Everything else of the client is agent*.c. The library keeps nothing in the program's descriptor
 * table, changes no signal and writes nothing to stdout; what calls it interposes are those below.
 *
 *   unshare, setns   NEWUSER, NEWNS, NEWTIME and the like want a process with one task: the agent
 *                    ends before the call and a new one is started after it.
 *   set*id, setgroups, initgroups
 *                    after the call, when it succeeded, the agent is replaced by a new one, which has
 *                    the credentials of the thread it was cloned from: all of them, by construction.
 *                    (Keeping CAP_SETUID in the agent to follow would be the larger hole.)
 *   prctl, seccomp   a filter could kill the process for a system call of the agent: the agent ends
 *                    for good before one is installed. Its pages are served, but no longer evicted;
 *                    the same holds for its forked children.
 *   syscall          dispatches unshare, setns, prctl and seccomp to the above (libseccomp calls
 *                    seccomp in no other way); anything else goes straight to the kernel.
 *
 * Replacing  the old agent's descriptors are in its private table; pidfd_getfd brings them into the
 *            program's (close-on-exec, for some 50 us), the old agent ends, the new one is cloned and
 *            takes them into a table of its own. Under a seccomp filter pidfd_getfd is not tried: the
 *            agent of a managed process then ends without a successor. If unshare(NEWPID) came with
 *            the call no thread can be cloned any more, with the same consequence.
 * Lock       one, held while an agent is being replaced and across fork (so that a child never
 *            inherits the descriptors in passing). Holding it, a thread has all signals blocked and
 *            touches nothing that can be swapped out, for the daemon may be waiting for the agent:
 *            no malloc, no memory of the program.
 * Threads    any. A vfork or raw clone child shares or copies this state but is not the process that
 *            it describes (tgid): for it all wrappers are transparent.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <grp.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"
#include "agent_sys.h"

#define EXPORT __attribute__((visibility("default")))
#define SOCKET_DEFAULT "/run/vswapd/vswapd.sock"
#define MINIMUM_BYTES_DEFAULT (16ULL << 20)
#define LOOK_US_DEFAULT 10000
#define LOOK_US_MAX 1000000
#define PARK_TRIES 2000 /* of a millisecond: how long a wrapper waits for an agent that is busy */
#define YIELD_TRIES 50
#define GONE_TRIES 20000 /* of 50 us: an exiting thread always gets there */
#define STACK_TOUCH_BYTES 2048 /* more than this file's functions use; small, for signal stacks */
#define SINGLE_TASK_FLAGS \
	(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWTIME | CLONE_FS | CLONE_THREAD | CLONE_SIGHAND | CLONE_VM)

static struct agent_state *agent; /* NULL: no address space for one */

/* ---- lock ---- */

static uint32_t lock_word; /* futex; 0 free, 1 held, 2 held and awaited */
static uint32_t lock_owner; /* tid */

/* False when this thread holds it already: fork, or a wrapper, in a handler during fork. */
static bool lock(void)
{
	uint32_t tid = (uint32_t)raw_gettid(), expected = 0;

	if (atomic_get(&lock_owner) == tid)
		return false;
	if (!__atomic_compare_exchange_n(&lock_word, &expected, 1, false, __ATOMIC_SEQ_CST,
					 __ATOMIC_SEQ_CST))
		while (__atomic_exchange_n(&lock_word, 2, __ATOMIC_SEQ_CST) != 0)
			(void)raw_futex_wait(&lock_word, 2, AGENT_SLOW_NS, FUTEX_PRIVATE_FLAG);
	atomic_set(&lock_owner, tid);
	return true;
}

static void unlock(void)
{
	if (atomic_get(&lock_owner) != (uint32_t)raw_gettid())
		return;
	atomic_set(&lock_owner, 0);
	if (__atomic_exchange_n(&lock_word, 0, __ATOMIC_SEQ_CST) == 2)
		raw_futex_wake(&lock_word, FUTEX_PRIVATE_FLAG);
}

/* ---- replacing the agent ---- */

struct replacement {
	uint64_t signals;
	bool engaged;    /* lock held, signals blocked */
	bool had_agent;  /* and it has ended: a new one is due */
};

static void descriptors_close(int *descriptors)
{
	for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
		if (descriptors[i] >= 0)
			raw_close(descriptors[i]);
}

/* Bring the parked agent's descriptors into this table. */
static bool descriptors_take(uint32_t tid, int *ret_descriptors)
{
	int pidfd, fds[AGENT_DESCRIPTORS] = { -1, -1, -1 };
	bool all = true;

	if (RAW_1(__NR_prctl, PR_GET_SECCOMP) != 0)
		return false;
	pidfd = (int)RAW_2(__NR_pidfd_open, tid, RAW_PIDFD_THREAD);
	if (pidfd < 0)
		return false;
	for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++) {
		fds[i] = (int)RAW_3(__NR_pidfd_getfd, pidfd, agent->descriptors[i], 0);
		all = all && fds[i] >= 0;
	}
	raw_close(pidfd);
	if (!all) {
		descriptors_close(fds);
		return false;
	}
	for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
		ret_descriptors[i] = fds[i];
	return true;
}

static void agent_ask(enum agent_request request)
{
	atomic_set(&agent->request, request);
	raw_futex_wake(&agent->request, FUTEX_PRIVATE_FLAG);
	if (atomic_get(&agent->armed)) /* it may sleep on its ring instead */
		raw_futex_wake(&agent_ring(agent)->posted, 0);
}

/* Whether the agent came to rest; it may be waiting for the daemon, which nobody can hurry. */
static bool agent_park(void)
{
	for (unsigned i = 0; i < PARK_TRIES; i++) {
		agent_ask(AGENT_PARK); /* again and again: a wake may come a moment before its wait */
		(void)raw_futex_wait(&agent->parked, 0, 1000000, FUTEX_PRIVATE_FLAG);
		if (atomic_get(&agent->parked) || !atomic_get(&agent->tid))
			return true;
	}
	return false;
}

/* Have the parked agent end, and wait until the kernel counts the thread no more. */
static void agent_wait_gone(uint32_t tid)
{
	struct timespec moment = { 0, 50000 };
	unsigned i = 0;

	do {
		agent_ask(AGENT_LEAVE);
		(void)raw_futex_wait(&agent->tid, tid, 1000000, 0); /* cleared as it ends: a shared wake */
	} while (atomic_get(&agent->tid) && ++i < PARK_TRIES);
	for (i = 0; i < GONE_TRIES && RAW_3(__NR_tgkill, agent->tgid, tid, 0) != -ESRCH; i++)
		(void)(i < YIELD_TRIES ? RAW_1(__NR_sched_yield, 0) : RAW_2(__NR_nanosleep, &moment, 0));
}

/*
 * A stack in ordinary memory may be swapped out, and from here on nobody may be there to bring it
 * back: the daemon may wait for the agent. A parked agent moves nothing out, so once is enough.
 */
static __attribute__((noinline)) void stack_touch(void)
{
	volatile char room[STACK_TOUCH_BYTES];

	room[0] = room[STACK_TOUCH_BYTES - 1] = 0;
}

/* Let the agent end. `for_good`: without a successor, so that its descriptors may go with it. */
static void agent_dismiss(struct replacement *replacement, bool for_good)
{
	uint32_t tid = atomic_get(&agent->tid);
	int descriptors[AGENT_DESCRIPTORS];

	if (tid == 0)
		return;
	if (!agent_park()) {
		agent_ask(AGENT_LEAVE); /* when it can */
		return;
	}
	stack_touch();
	if (atomic_get(&agent->armed) && atomic_get(&agent->tid) && !for_good) {
		if (!descriptors_take(tid, descriptors))
			for_good = true;
		else
			for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
				agent->descriptors[i] = descriptors[i];
	}
	agent_wait_gone(tid);
	if (for_good)
		agent->armed = 0;
	replacement->had_agent = !for_good || !agent->beacon_armed;
}

static void replacement_begin(struct replacement *replacement)
{
	replacement->engaged = replacement->had_agent = false;
	if (!agent || agent->tgid != (uint32_t)raw_getpid())
		return;
	raw_signals_block(&replacement->signals);
	replacement->engaged = lock();
	if (!replacement->engaged)
		raw_signals_restore(&replacement->signals);
}

static void replacement_end(struct replacement *replacement)
{
	if (!replacement->engaged)
		return;
	if (replacement->had_agent) {
		int descriptors[AGENT_DESCRIPTORS] = { -1, -1, -1 };

		if (agent->armed)
			for (unsigned i = 0; i < AGENT_DESCRIPTORS; i++)
				descriptors[i] = agent->descriptors[i];
		if (agent_start(agent) == 0) {
			while (agent->armed && !atomic_get(&agent->settled) && atomic_get(&agent->tid))
				(void)raw_futex_wait(&agent->settled, 0, 1000000, FUTEX_PRIVATE_FLAG);
		} else {
			agent->armed = 0;
		}
		descriptors_close(descriptors);
	}
	unlock();
	raw_signals_restore(&replacement->signals);
}

/* After a successful change of credentials. errno is left alone: nothing here touches it. */
static void agent_follow(void)
{
	struct replacement replacement;

	replacement_begin(&replacement);
	if (replacement.engaged)
		agent_dismiss(&replacement, false);
	replacement_end(&replacement);
}

static int result_of(long result)
{
	if (result >= 0)
		return (int)result;
	errno = (int)-result;
	return -1;
}

/* ---- wrappers: namespaces ---- */

static long call_alone(long number, long a, long b)
{
	struct replacement replacement;
	long result;

	replacement_begin(&replacement);
	if (replacement.engaged)
		agent_dismiss(&replacement, false);
	result = raw_call(number, a, b, 0, 0, 0, 0);
	replacement_end(&replacement);
	return result;
}

static long unshare_raw(int flags)
{
	return flags & SINGLE_TASK_FLAGS ? call_alone(__NR_unshare, flags, 0)
					 : RAW_1(__NR_unshare, flags);
}

static long setns_raw(int fd, int type)
{
	/* Type 0 is whatever the descriptor says. */
	return type == 0 || (type & SINGLE_TASK_FLAGS) ? call_alone(__NR_setns, fd, type)
						       : RAW_2(__NR_setns, fd, type);
}

EXPORT int unshare(int flags) { return result_of(unshare_raw(flags)); }
EXPORT int setns(int fd, int type) { return result_of(setns_raw(fd, type)); }

/* ---- wrappers: seccomp ---- */

/* With the system call's pointer argument NULL a program only asks whether the call is there. */
static long call_sandboxing(long number, long a, long b, long c, bool asks_only)
{
	struct replacement replacement;
	bool due;
	long result;

	replacement_begin(&replacement);
	if (asks_only || !replacement.engaged) {
		replacement_end(&replacement);
		return RAW_3(number, a, b, c);
	}
	agent_dismiss(&replacement, true);
	due = replacement.had_agent;
	replacement.had_agent = false;
	agent->sandboxed = 1;
	/* Before the call: after it every system call that the program did not make counts. */
	replacement_end(&replacement);
	result = RAW_3(number, a, b, c);
	if (result < 0) {
		replacement_begin(&replacement);
		agent->sandboxed = 0;
		replacement.had_agent = due;
		replacement_end(&replacement);
	}
	return result;
}

static long prctl_raw(long option, long a, long b, long c, long d)
{
	if (option != PR_SET_SECCOMP)
		return raw_call(__NR_prctl, option, a, b, c, d, 0);
	return call_sandboxing(__NR_prctl, option, a, b, a == SECCOMP_MODE_FILTER && b == 0);
}

static long seccomp_raw(long operation, long flags, long argument)
{
	if (operation != SECCOMP_SET_MODE_STRICT && operation != SECCOMP_SET_MODE_FILTER)
		return RAW_3(__NR_seccomp, operation, flags, argument);
	return call_sandboxing(__NR_seccomp, operation, flags, argument,
			       operation == SECCOMP_SET_MODE_FILTER && argument == 0);
}

EXPORT int prctl(int option, ...)
{
	va_list list;
	long argument[4];

	va_start(list, option);
	for (unsigned i = 0; i < 4; i++)
		argument[i] = va_arg(list, long);
	va_end(list);
	return result_of(prctl_raw(option, argument[0], argument[1], argument[2], argument[3]));
}

/* What the assembly below does not send to the kernel itself. */
__attribute__((used, visibility("hidden"))) long vswap_syscall(long number, long a, long b, long c,
							       long d, long e)
{
	long result = number == __NR_unshare ? unshare_raw((int)a)
		      : number == __NR_setns ? setns_raw((int)a, (int)b)
		      : number == __NR_prctl ? prctl_raw(a, b, c, d, e)
					     : seccomp_raw(a, b, c);

	if (result >= 0)
		return result;
	errno = (int)-result;
	return -1;
}

__attribute__((used, visibility("hidden"))) long vswap_syscall_failed(long result)
{
	errno = (int)-result;
	return -1;
}

#if defined(__x86_64__)
/*
 * In assembly, without a frame, as libc's: a program that makes a system call which returns twice
 * (vfork, clone) finds the stack as it would there.
 */
_Static_assert(__NR_prctl == 157 && __NR_unshare == 272 && __NR_setns == 308 && __NR_seccomp == 317,
	       "numbers in the text below");
__asm__(".text\n"
	".globl syscall\n"
	".type syscall, @function\n"
	"syscall:\n\t"
	".cfi_startproc\n\t"
	"cmp $317, %rdi\n\t"
	"je vswap_syscall\n\t"
	"cmp $272, %rdi\n\t"
	"je vswap_syscall\n\t"
	"cmp $308, %rdi\n\t"
	"je vswap_syscall\n\t"
	"cmp $157, %rdi\n\t"
	"je vswap_syscall\n\t"
	"mov %rdi, %rax\n\t"
	"mov %rsi, %rdi\n\t"
	"mov %rdx, %rsi\n\t"
	"mov %rcx, %rdx\n\t"
	"mov %r8, %r10\n\t"
	"mov %r9, %r8\n\t"
	"mov 8(%rsp), %r9\n\t"
	"syscall\n\t"
	"cmp $-4095, %rax\n\t"
	"jae 1f\n\t"
	"ret\n"
	"1:\n\t"
	"mov %rax, %rdi\n\t"
	"jmp vswap_syscall_failed\n\t"
	".cfi_endproc\n"
	".size syscall, .-syscall\n");
#endif

/* ---- wrappers: credentials ---- */

/*
 * libc's function is needed, for it changes all threads of the program. Looked up at the first
 * call: most programs never make one, and the constructor has to be quick.
 */
#define FOLLOWED(name, parameters, arguments)                                                   \
	EXPORT int name parameters                                                              \
	{                                                                                       \
		static int(*real) parameters;                                                   \
		int result;                                                                     \
                                                                                                \
		if (!real)                                                                      \
			real = (int(*) parameters)(uintptr_t)dlsym(RTLD_NEXT, #name);           \
		result = real arguments;                                                        \
		if (result == 0)                                                                \
			agent_follow();                                                         \
		return result;                                                                  \
	}

FOLLOWED(setuid, (uid_t uid), (uid))
FOLLOWED(setgid, (gid_t gid), (gid))
FOLLOWED(seteuid, (uid_t uid), (uid))
FOLLOWED(setegid, (gid_t gid), (gid))
FOLLOWED(setreuid, (uid_t real_uid, uid_t effective), (real_uid, effective))
FOLLOWED(setregid, (gid_t real_gid, gid_t effective), (real_gid, effective))
FOLLOWED(setresuid, (uid_t real_uid, uid_t effective, uid_t saved), (real_uid, effective, saved))
FOLLOWED(setresgid, (gid_t real_gid, gid_t effective, gid_t saved), (real_gid, effective, saved))
FOLLOWED(setgroups, (size_t count, const gid_t *groups), (count, groups))
FOLLOWED(initgroups, (const char *user, gid_t group), (user, group))

/* Of one thread only, and returning the old value: the agent follows the first thread. */
static int filesystem_id(long number, uint32_t id)
{
	int before = (int)RAW_1(number, id);

	if ((uint32_t)before != id && raw_gettid() == raw_getpid())
		agent_follow();
	return before;
}

EXPORT int setfsuid(uid_t uid) { return filesystem_id(__NR_setfsuid, uid); }
EXPORT int setfsgid(gid_t gid) { return filesystem_id(__NR_setfsgid, gid); }

/* ---- fork ---- */

static void fork_prepare(void) { (void)lock(); }

static void fork_in_parent(void) { unlock(); }

static void fork_in_child(void)
{
	lock_owner = lock_word = 0;
	agent_forget_parent(agent);
	if (agent->sandboxed)
		agent->tgid = 0; /* no agent: no wrapper has anything to do */
	else
		(void)agent_start(agent);
}

/* ---- constructor ---- */

static uint64_t number_from(const char *name, uint64_t otherwise)
{
	const char *text = getenv(name);
	char *end;
	uint64_t number;

	if (!text || *text < '0' || *text > '9')
		return otherwise;
	number = strtoull(text, &end, 10);
	return *end ? otherwise : number;
}

static void config_read(struct agent_config *ret_config)
{
	const char *path = getenv("VSWAPD_SOCKET"), *group = getenv("VSWAP_GROUP");
	uint64_t look_us = number_from("VSWAP_LOOK_US", LOOK_US_DEFAULT);
	struct stat status;

	memset(ret_config, 0, sizeof *ret_config);
	if (!path || !*path)
		path = SOCKET_DEFAULT;
	/* A path that is too long names nothing: the process runs natively. */
	if (strlen(path) < AGENT_PATH_BYTES)
		strcpy(ret_config->socket_path, path);
	if (group && strlen(group) < VSWAP_GROUP_BYTES)
		strcpy(ret_config->group, group);
	ret_config->minimum_bytes = number_from("VSWAP_MIN_BYTES", MINIMUM_BYTES_DEFAULT);
	look_us = look_us < 100 ? 100 : look_us > LOOK_US_MAX ? LOOK_US_MAX : look_us;
	ret_config->look_ns = look_us * 1000;
	ret_config->verbose = number_from("VSWAP_VERBOSE", 0) != 0;
	if (RAW_2(__NR_fstat, 2, &status) == 0) {
		ret_config->stderr_device = status.st_dev;
		ret_config->stderr_inode = status.st_ino;
	}
}

__attribute__((constructor)) static void preload_start(void)
{
	struct agent_config config;

	config_read(&config);
	agent = agent_create(&config);
	if (!agent)
		return;
	if (pthread_atfork(fork_prepare, fork_in_parent, fork_in_child) != 0 || agent_start(agent) < 0)
		agent->tgid = 0;
}
