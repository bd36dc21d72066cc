/* SPDX-License-Identifier: MIT */
/*
 * preload — the LD_PRELOAD library: starts the agent, starts it again in forked children, and
 * makes it step aside where a second thread is in the way.
 *
 * Everything else of the client is agent*.c. The library keeps nothing in the program's descriptor
 * table, changes no signal and writes nothing to stdout; what calls it interposes are those below.
 *
 *   unshare, setns   NEWUSER, NEWNS, NEWTIME and the like want a process with one task: the agent
 *                    ends before the call and a new one is started after it.
 *   set*id, setgroups, initgroups
 *                    after the call, when it succeeded, the agent is replaced by a new one, which
 *                    has the credentials of the thread it was cloned from: all, by construction.
 *                    (Keeping CAP_SETUID in the agent to follow would be the larger hole.)
 *   prctl, seccomp   a filter could kill the process for a system call of the agent: the agent ends
 *                    for good before one is installed. Its pages are served, but no longer evicted;
 *                    the same holds for its forked children.
 *   mlockall         locks the staging of the agent as well, and pages move from locked memory to
 *                    locked memory: without a move meanwhile, staging is unlocked again.
 *   mmap, madvise    what populates private memory does so piece by piece. In one go it keeps the lock of
 *                    the address space, and all of it is there before it can be registered: beyond the
 *                    limit, however large it is. And the first mapping that is large in itself is not
 *                    returned before the process is managed, a later one near the limit not before it was found. Neither behind a seccomp filter, for which
 *                    these are system calls that the program did not make.
 *   mremap           what is one mapping to the program is moved piece by piece where only a part of it is managed
 *                    (preload_remap.h). Not behind a seccomp filter.
 *   ioctl            a program's own userfaultfd: memory that is managed is given up to it
 *                    (preload_userfaultfd.h).
 *   syscall          dispatches UFFDIO_REGISTER, unshare, setns, prctl, seccomp and mlockall to the above (libseccomp
 *                    calls seccomp in no other way); anything else goes straight to the kernel.
 *
 * Threads    any.
 */
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS /* mmap and mmap64 are two names here, not one */
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
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"
#include "agent_sys.h"
#include "preload_discovery.h"
#include "preload_remap.h"
#include "preload_replace.h"
#include "preload_userfaultfd.h"

#define EXPORT __attribute__((visibility("default")))
#define SOCKET_DEFAULT "/run/vswapd/vswapd.sock"
#define MINIMUM_BYTES_DEFAULT (16ULL << 20)
#define LOOK_US_DEFAULT 10000
#define LOOK_US_MAX 1000000
#define ABSENT_S_DEFAULT 10
#define ABSENT_S_MAX 86400
#define POPULATE_BYTES (2UL << 20) /* a huge page; at most so much is populated before others get the lock */
#define SINGLE_TASK_FLAGS \
	(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWTIME | CLONE_FS | CLONE_THREAD | CLONE_SIGHAND | \
	 CLONE_VM)

static int result_of(long result)
{
	if (result >= 0)
		return (int)result;
	errno = (int)-result;
	return -1;
}

static void *address_of(long result)
{
	if (!raw_is_error(result))
		return (void *)result;
	errno = (int)-result;
	return MAP_FAILED;
}

/* ---- wrappers: namespaces ---- */

static long call_alone(long number, long a, long b)
{
	struct replacement replacement;
	long result;

	replace_begin(&replacement);
	if (replacement.engaged)
		replace_dismiss(&replacement, false);
	result = raw_call(number, a, b, 0, 0, 0, 0);
	replace_end(&replacement);
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

/* ---- wrappers: locked memory ---- */

static long mlockall_raw(int flags)
{
	struct replacement replacement;
	bool parked;
	long result;

	replace_begin(&replacement);
	parked = replacement.engaged && replace_park();
	result = RAW_1(__NR_mlockall, flags);
	/* From here on MOVE refuses what the program has locked: staging differs from it. */
	if (replacement.engaged)
		(void)RAW_2(__NR_munlock, agent->arena + ARENA_BEACON, ARENA_BYTES - ARENA_BEACON);
	if (parked)
		replace_unpark();
	replace_end(&replacement);
	return result;
}

EXPORT int mlockall(int flags) { return result_of(mlockall_raw(flags)); }

/* ---- wrappers: populating ---- */

/* And system calls of ours may stand between the program's. */
static bool may_have_agent(void) { return agent && agent->tgid && !agent->sandboxed; }

static bool populates_by_pieces(unsigned long length) { return length > POPULATE_BYTES && may_have_agent(); }

/* As the kernel does it in one go: up to the first error. The pause is for those who wait for the lock: without it
 * each gets it some milliseconds later, and joining the daemon takes it a dozen times. */
static long populate(long address, unsigned long length, int advice)
{
	const struct timespec pause = { .tv_nsec = 1000 };

	for (unsigned long done = 0; done < length; done += POPULATE_BYTES) {
		unsigned long piece = length - done < POPULATE_BYTES ? length - done : POPULATE_BYTES;
		long result = RAW_3(__NR_madvise, address + (long)done, (long)piece, advice);

		if (result < 0)
			return result;
		(void)RAW_2(__NR_nanosleep, (long)&pause, 0);
	}
	return 0;
}

EXPORT int madvise(void *address, size_t length, int advice)
{
	bool is_populating = advice == MADV_POPULATE_READ || advice == MADV_POPULATE_WRITE;
	bool is_valid = (uintptr_t)address % AGENT_PAGE == 0 && (uintptr_t)address + length >= (uintptr_t)address;

	if (!is_populating || !is_valid || !populates_by_pieces(length))
		return result_of(RAW_3(__NR_madvise, (long)address, (long)length, advice));
	return result_of(populate((long)address, length, advice));
}

static bool is_private_populating(int flags)
{
	const int bits = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE;

	return (flags & bits) == bits && !(flags & (MAP_LOCKED | MAP_NONBLOCK | MAP_HUGETLB));
}

/* Of a size that makes the process worth managing: touched before it is, all of it would be beyond the limit. */
static bool is_large_private(unsigned long length, int protection, int flags)
{
	const int bits = MAP_PRIVATE | MAP_ANONYMOUS;

	return (flags & bits) == bits && !(flags & MAP_HUGETLB) && protection & PROT_WRITE && may_have_agent() &&
	       length >= agent->config.minimum_bytes && agent->tgid == (uint32_t)raw_getpid();
}

EXPORT void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
	bool by_pieces = is_private_populating(flags) && populates_by_pieces(length);
	long result = raw_call(__NR_mmap, (long)address, (long)length, protection,
			       by_pieces ? flags & ~MAP_POPULATE : flags, fd, offset);

	if (raw_is_error(result))
		return address_of(result);
	if (is_large_private(length, protection, flags)) {
		agent_hurry(agent);
		discovery_wait();
	}
	/* Like MAP_POPULATE it tells nobody what it could not do. */
	if (by_pieces)
		(void)populate(result, length, protection & PROT_WRITE ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
	return (void *)result;
}

EXPORT void *mmap64(void *address, size_t length, int protection, int flags, int fd, off_t offset)
	__attribute__((alias("mmap")));

/* ---- wrappers: moving ---- */

EXPORT void *mremap(void *old, size_t old_bytes, size_t new_bytes, int flags, ...)
{
	long target = 0;
	va_list list;

	va_start(list, flags);
	if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))
		target = (long)va_arg(list, void *);
	va_end(list);
	return address_of(remap((long)old, old_bytes, new_bytes, flags, target));
}

/* ---- wrappers: a userfaultfd of the program's own ---- */

EXPORT int ioctl(int fd, unsigned long request, ...)
{
	va_list list;
	void *argument;

	va_start(list, request);
	argument = va_arg(list, void *);
	va_end(list);
	return result_of((uint32_t)request == UFFDIO_REGISTER ? userfaultfd_register(fd, argument)
							     : RAW_3(__NR_ioctl, fd, request, argument));
}

/* ---- wrappers: seccomp ---- */

/* With the system call's pointer argument NULL a program only asks whether the call is there. */
static long call_sandboxing(long number, long a, long b, long c, bool asks_only)
{
	struct replacement replacement;
	bool due;
	long result;

	replace_begin(&replacement);
	if (asks_only || !replacement.engaged) {
		replace_end(&replacement);
		return RAW_3(number, a, b, c);
	}
	replace_dismiss(&replacement, true);
	due = replacement.had_agent;
	replacement.had_agent = false;
	agent->sandboxed = 1;
	/* Before the call: after it every system call that the program did not make counts. */
	replace_end(&replacement);
	result = RAW_3(number, a, b, c);
	if (result < 0) {
		replace_begin(&replacement);
		agent->sandboxed = 0;
		replacement.had_agent = due;
		replace_end(&replacement);
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
		      : number == __NR_mlockall ? mlockall_raw((int)a)
		      : number == __NR_ioctl ? userfaultfd_register((int)a, (struct uffdio_register *)c)
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
_Static_assert(__NR_ioctl == 16 && UFFDIO_REGISTER == 0xc020aa00 && __NR_mlockall == 151 && __NR_prctl == 157 && __NR_unshare == 272 && __NR_setns == 308 &&
		       __NR_seccomp == 317,
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
	"cmp $151, %rdi\n\t"
	"je vswap_syscall\n\t"
	"cmp $16, %rdi\n\t"
	"jne 1f\n\t"
	"cmpl $0xc020aa00, %edx\n\t"
	"je vswap_syscall\n"
	"1:\n\t"
	"mov %rdi, %rax\n\t"
	"mov %rsi, %rdi\n\t"
	"mov %rdx, %rsi\n\t"
	"mov %rcx, %rdx\n\t"
	"mov %r8, %r10\n\t"
	"mov %r9, %r8\n\t"
	"mov 8(%rsp), %r9\n\t"
	"syscall\n\t"
	"cmp $-4095, %rax\n\t"
	"jae 2f\n\t"
	"ret\n"
	"2:\n\t"
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
			replace_agent();                                                         \
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
		replace_agent();
	return before;
}

EXPORT int setfsuid(uid_t uid) { return filesystem_id(__NR_setfsuid, uid); }
EXPORT int setfsgid(gid_t gid) { return filesystem_id(__NR_setfsgid, gid); }

/* ---- fork ---- */

static void fork_prepare(void) { (void)replace_lock(); }

static void fork_in_parent(void) { replace_unlock(); }

static void fork_in_child(void)
{
	replace_lock_reset();
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
	uint64_t absent_s = number_from("VSWAP_ABSENT_S", ABSENT_S_DEFAULT);
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
	absent_s = absent_s > ABSENT_S_MAX ? ABSENT_S_MAX : absent_s;
	ret_config->absent_ns = absent_s * AGENT_SLOW_NS;
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
	if (pthread_atfork(fork_prepare, fork_in_parent, fork_in_child) != 0 ||
	    agent_start(agent) < 0)
		agent->tgid = 0;
}
