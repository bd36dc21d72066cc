/* SPDX-License-Identifier: MIT */
/*
 * agent_sys — raw system calls for code that has no libc: the agent and what starts it.
 *
 * Every function returns a result or -errno and touches neither errno nor thread-local storage, for
 * the agent runs on a thread without any of its own (the thread pointer is the program's). The
 * architecture lives in three places of this file, `raw_call`, `raw_clone` and `raw_unmap_and_exit`; x86_64 is tested,
 * aarch64 only written.
 */
#ifndef VSWAP_AGENT_SYS_H
#define VSWAP_AGENT_SYS_H

#include <asm/unistd.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/ioctl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/* <linux/userfaultfd.h> of Debian 12 ends before MOVE. */
struct raw_uffd_move {
	uint64_t destination, source, bytes, mode;
	int64_t moved; /* written by the kernel: bytes, or -errno */
};
#define RAW_UFFDIO_MOVE _IOWR(0xAA, 0x05, struct raw_uffd_move)
#define RAW_MOVE_ALLOW_HOLES (1ULL << 1)
#define RAW_USERFAULTFD_NEW _IO(0xAA, 0x00)

#define RAW_MADV_POPULATE_WRITE 23
#define RAW_MADV_DONTNEED_LOCKED 24
#define RAW_CLOSE_RANGE_UNSHARE 2u
#define RAW_PIDFD_THREAD O_EXCL
#define RAW_SIGSET_BYTES 8

#if defined(__x86_64__)
static inline long raw_call(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

/* A thread that runs entry(argument) on the stack that ends at `stack_end`; entry never returns. */
static inline long raw_clone(long flags, void *stack_end, uint32_t *tid, void (*entry)(void *),
			     void *argument)
{
	void **stack = (void **)stack_end - 2;
	register long r10 __asm__("r10") = (long)tid;
	register long r8 __asm__("r8") = 0;
	long result;

	stack[0] = (void *)entry;
	stack[1] = argument;
	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "pop %%rax\n\t"
			 "pop %%rdi\n\t"
			 "call *%%rax\n\t"
			 "ud2\n"
			 "1:"
			 : "=a"(result)
			 : "a"((long)__NR_clone), "D"(flags), "S"(stack), "d"(tid), "r"(r10),
			   "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}

/* Unmap the memory that the calling thread runs on, then end the thread. */
static inline _Noreturn void raw_unmap_and_exit(uint64_t address, uint64_t bytes)
{
	__asm__ volatile("syscall\n\t"
			 "xor %%edi, %%edi\n\t"
			 "mov %0, %%eax\n\t"
			 "syscall\n\t"
			 "ud2"
			 :
			 : "i"(__NR_exit), "a"((long)__NR_munmap), "D"(address), "S"(bytes)
			 : "rcx", "r11", "memory");
	__builtin_unreachable();
}
#elif defined(__aarch64__)
static inline long raw_call(long number, long a, long b, long c, long d, long e, long f)
{
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;

	__asm__ volatile("svc #0"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
			 : "memory");
	return x0;
}

static inline long raw_clone(long flags, void *stack_end, uint32_t *tid, void (*entry)(void *),
			     void *argument)
{
	void **stack = (void **)stack_end - 2;
	register long x8 __asm__("x8") = __NR_clone;
	register long x0 __asm__("x0") = flags;
	register long x1 __asm__("x1") = (long)stack;
	register long x2 __asm__("x2") = (long)tid;
	register long x3 __asm__("x3") = 0;
	register long x4 __asm__("x4") = (long)tid;

	stack[0] = (void *)entry;
	stack[1] = argument;
	__asm__ volatile("svc #0\n\t"
			 "cbnz x0, 1f\n\t"
			 "mov x29, xzr\n\t"
			 "ldp x9, x0, [sp], #16\n\t"
			 "blr x9\n\t"
			 "brk #1\n"
			 "1:"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
			 : "x9", "memory");
	return x0;
}

static inline _Noreturn void raw_unmap_and_exit(uint64_t address, uint64_t bytes)
{
	register long x8 __asm__("x8") = __NR_munmap;
	register long x0 __asm__("x0") = (long)address;
	register long x1 __asm__("x1") = (long)bytes;

	__asm__ volatile("svc #0\n\t"
			 "mov x0, #0\n\t"
			 "mov x8, %0\n\t"
			 "svc #0\n\t"
			 "brk #1"
			 :
			 : "i"(__NR_exit), "r"(x8), "r"(x0), "r"(x1)
			 : "memory");
	__builtin_unreachable();
}
#else
#error "agent_sys.h: write raw_call and raw_clone for this architecture"
#endif

/* Of a call that returns an address. */
static inline bool raw_is_error(long result) { return result < 0 && result >= -4095; }

#define RAW_1(number, a) raw_call(number, (long)(a), 0, 0, 0, 0, 0)
#define RAW_2(number, a, b) raw_call(number, (long)(a), (long)(b), 0, 0, 0, 0)
#define RAW_3(number, a, b, c) raw_call(number, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define RAW_4(number, a, b, c, d) \
	raw_call(number, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define RAW_6(number, a, b, c, d, e, f) \
	raw_call(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

static inline int raw_close(int fd) { return (int)RAW_1(__NR_close, fd); }
static inline int raw_getpid(void) { return (int)RAW_1(__NR_getpid, 0); }
static inline int raw_gettid(void) { return (int)RAW_1(__NR_gettid, 0); }

static inline int raw_open(const char *path, int flags)
{
	return (int)RAW_4(__NR_openat, AT_FDCWD, path, flags | O_CLOEXEC, 0);
}

static inline long raw_read(int fd, void *buffer, size_t bytes)
{
	return RAW_3(__NR_read, fd, buffer, bytes);
}

static inline long raw_ioctl(int fd, unsigned long request, void *argument)
{
	return RAW_3(__NR_ioctl, fd, request, argument);
}

static inline long raw_mmap(uint64_t address, uint64_t bytes, int protection, int flags, int fd)
{
	return RAW_6(__NR_mmap, address, bytes, protection, flags, fd, 0);
}

static inline int raw_madvise(uint64_t address, uint64_t bytes, int advice)
{
	return (int)RAW_3(__NR_madvise, address, bytes, advice);
}

static inline int raw_mprotect(uint64_t address, uint64_t bytes, int protection)
{
	return (int)RAW_3(__NR_mprotect, address, bytes, protection);
}

/* All signals of the calling thread: block, give back. */
static inline void raw_signals_block(uint64_t *ret_old)
{
	uint64_t all = ~0ULL;

	(void)RAW_4(__NR_rt_sigprocmask, 0 /* SIG_BLOCK */, &all, ret_old, RAW_SIGSET_BYTES);
}

static inline void raw_signals_restore(const uint64_t *old)
{
	(void)RAW_4(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, old, 0, RAW_SIGSET_BYTES);
}

/* Wait at most `ns` for `word` to leave `value`. `scope`: FUTEX_PRIVATE_FLAG, or 0 when shared. */
static inline int raw_futex_wait(const uint32_t *word, uint32_t value, uint64_t ns, int scope)
{
	struct timespec timeout = { .tv_sec = (time_t)(ns / 1000000000u),
				    .tv_nsec = (long)(ns % 1000000000u) };

	return (int)RAW_4(__NR_futex, word, FUTEX_WAIT | scope, value, &timeout);
}

static inline void raw_futex_wake(const uint32_t *word, int scope)
{
	(void)RAW_3(__NR_futex, word, FUTEX_WAKE | scope, 0x7fffffff);
}

static inline uint32_t atomic_get(const uint32_t *word)
{
	return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static inline void atomic_set(uint32_t *word, uint32_t value)
{
	__atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}

#endif
