/* SPDX-License-Identifier: MIT */
/*
 * sys — the one boundary to the kernel for userfaultfd, /proc of a client, and shared futexes.
 *
 * Every function returns 0 or a count, else -errno; none logs, none retries but for EINTR. The
 * meaning of a userfaultfd errno is decided here and nowhere else: see enum fill_outcome.
 *
 * Debian 12's <linux/userfaultfd.h> ends before POISON and MOVE, and has no PROCMAP_QUERY: the
 * numbers needed are defined in sys.c and procmap.h, and probed when the engine starts (sys_probe).
 */
#ifndef VSWAP_SYS_H
#define VSWAP_SYS_H

#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What became of an attempt to fill pages of a client. */
enum fill_outcome {
	FILL_DONE,    /* all pages */
	FILL_PARTIAL, /* some; go on behind them */
	FILL_PRESENT, /* the first page is there already: wake its waiters */
	FILL_AGAIN,   /* an event is unread: read it, then look the page up again */
	FILL_MOVED,   /* no longer mapped or registered there: wake, forget */
	FILL_NO_MEMORY, /* the client's cgroup or the machine has none: make room, retry */
	FILL_GONE,    /* the address space is gone */
	FILL_BROKEN,  /* anything else: fail closed */
};

int sys_userfaultfd_api(int fd, uint64_t features);
/* Missing pages fault, and protected ones when they are written to. */
int sys_userfaultfd_register(int fd, uint64_t address, uint64_t bytes);
/* Registered only so that MOVE may go there: a missing page raises no fault (mlockall touches all). */
int sys_userfaultfd_register_quiet(int fd, uint64_t address, uint64_t bytes);
int sys_userfaultfd_unregister(int fd, uint64_t address, uint64_t bytes);
int sys_userfaultfd_wake(int fd, uint64_t address, uint64_t bytes);
int sys_userfaultfd_poison(int fd, uint64_t address, uint64_t bytes);

/* Fill pages [address, address + bytes) from `source` / with the zero page; *ret_bytes is progress. */
enum fill_outcome sys_userfaultfd_copy(int fd, uint64_t address, const void *source, uint64_t bytes,
				       uint64_t *ret_bytes);
enum fill_outcome sys_userfaultfd_zero(int fd, uint64_t address, uint64_t bytes,
				       uint64_t *ret_bytes);

/* Have writes to these pages fault, those that are mapped; and no more, which also wakes who waits. */
int sys_userfaultfd_protect(int fd, uint64_t address, uint64_t bytes);
enum fill_outcome sys_userfaultfd_unprotect(int fd, uint64_t address, uint64_t bytes);

/* True when the address space behind a userfaultfd is gone. */
bool sys_userfaultfd_is_gone(int fd);

/* Whether the anonymous mapping at an address is registered with this descriptor: 1, 0, or -EAGAIN while
 * an event is unread. */
int sys_userfaultfd_covers(int fd, uint64_t address);

/* True while an event of this address space is unread, or about to be queued. */
bool sys_userfaultfd_is_changing(int fd);

/* 0 when the running kernel has all that is needed, else -errno and a message of at most 256 bytes. */
int sys_probe(int *ret_device, char *message);

struct page_range {
	uint64_t start; /* addresses */
	uint64_t end;
	uint64_t categories;
};

/*
 * Ranges of pages in [start, end), at most `max` ranges and max_pages pages (0: no bound). *ret_walk_end is where to go on.
 *
 * Resident   has memory of its own, wherever that is: the kernel may swap as well, at any time, and what it has swapped, or is
 *            just migrating, is moved by MOVE as any other. Who took such a page for one that is gone would lose it
 * There      these, and the shared zero page
 * Mapped     what is in memory now: what is to be evicted. The zero page, too
 * Zero       the shared zero page alone
 * Unprotected  what is there and may be written to without a fault
 */
int sys_resident_ranges(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges,
			unsigned max, uint64_t max_pages, uint64_t *ret_walk_end);
int sys_there_ranges(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges, unsigned max,
		     uint64_t *ret_walk_end);
int sys_mapped_ranges(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges,
		      unsigned max, uint64_t max_pages, uint64_t *ret_walk_end);
int sys_zero_ranges(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges, unsigned max,
		    uint64_t *ret_walk_end);
int sys_unprotected_ranges(int pagemap_fd, uint64_t start, uint64_t end, struct page_range *ranges, unsigned max,
			   uint64_t *ret_walk_end);

/* True when the page is there, the zero page included. */
bool sys_page_is_present(int pagemap_fd, uint64_t address);

struct mapping {
	uint64_t start;
	uint64_t end;
	bool readable, writable, executable, shared, anonymous;
	char name[32];
};

/* The mapping at or after `address`: 1, or 0 when there is none, else -errno. */
int sys_mapping_next(int maps_fd, uint64_t address, struct mapping *ret_mapping);

/* When a process was started, in clock ticks since the machine was; 0: there is no such process. With its number it
 * names a process for good. */
uint64_t sys_process_start(pid_t pid);
/* 0: it has ended. */
pid_t sys_process_parent(pid_t pid);
/* Have two processes one address space, as a vfork child and its parent until it executes something? False also when it cannot be told. */
bool sys_shares_memory(pid_t pid, pid_t other);

/* A thread of the process that has not ended, 0 when there is none. The first thread may end before the
 * others: then the process cannot be looked at by its own number. */
pid_t sys_live_thread(pid_t pid);

/* The CPU that a thread of the process ran on last, or -errno. */
int sys_thread_cpu(pid_t pid, pid_t thread);

/* Call visit(context, range) for each mapping of a process that its forked children find wiped
 * (MADV_WIPEONFORK). Reads smaps: a walk over its page tables. 0, or -errno when not all of it was seen. */
typedef void (*sys_range_fn)(void *context, struct page_range range);
int sys_visit_wiped(pid_t pid, sys_range_fn visit, void *context);

/* A process whose private page at `address` begins with `word`: its PID, or -ESRCH. Looks at all processes. */
pid_t sys_find_page(uint64_t address, uint64_t word);

/* Read client memory from an open /proc/PID/mem; returns bytes read or -errno. */
ssize_t sys_read_client(int mem_fd, uint64_t address, void *buffer, size_t bytes);

/* Read the pages of `mask` (bit i: page i behind `address`) to the same places of `buffer`: 0 or -errno. */
int sys_read_client_pages(int mem_fd, uint64_t address, void *buffer, uint64_t mask);

/* The auxiliary vector of what a process executes: it names this one address space, by where it was laid out.
 * -EPERM for a program that was started with more rights than its caller had. */
struct address_space_name {
	uint64_t words[64];
};
int sys_name_address_space(pid_t pid, struct address_space_name *ret_name);
/* False also where that cannot be told, as of the next. */
bool sys_has_address_space(pid_t pid, const struct address_space_name *name);
/* Has `pid` executed nothing since it was forked from `parent`? */
bool sys_is_copy(pid_t pid, pid_t parent);

int sys_pidfd(pid_t pid);
bool sys_pidfd_is_dead(int pidfd);
void sys_pidfd_kill(int pidfd); /* SIGKILL; one that has ended is no error */

int sys_futex_wait(const uint32_t *word, uint32_t value, unsigned timeout_ms);
void sys_futex_wake(const uint32_t *word); /* all who wait */

int sys_memfd(const char *name, uint64_t bytes, bool sealed);
/* Give back the memory behind [offset, offset + bytes) of a memfd, whole pages, which is mapped at `at`: it reads as zeros. Through
 * the file, as MADV_REMOVE refuses what is locked; where that is refused too, zeroed where it is. */
void sys_discard(int memfd, uint64_t offset, void *at, uint64_t bytes);
int sys_open_proc(pid_t pid, const char *file);
/* What one read gives of a small file of the kernel's, with a NUL behind it: bytes or -errno. */
int sys_read_text(const char *path, char *text, size_t bytes);

/* Total size and resident sizes of a process in pages, from an open /proc/PID/statm. */
struct process_size {
	uint64_t pages;
	uint64_t anonymous_pages;
	uint64_t other_pages; /* of files and shared memory */
};

int sys_statm(int statm_fd, struct process_size *ret_size);

/* What a process has mapped and touched of shared memory (memfd, tmpfs, MAP_SHARED, System V) in bytes. */
int sys_shared_bytes(pid_t pid, uint64_t *ret_bytes);

/* Pss_Anon of a process in bytes. Walks its page tables. */
int sys_pss_anonymous(pid_t pid, uint64_t *ret_bytes);

/* Of a loop that waits for another CPU. */
static inline void sys_pause_cpu(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* A hint: it goes on where it is when that CPU is not to be had. */
void sys_pin_this_thread(unsigned cpu);

/* Keep the calling thread off these CPUs, a mask of the first 64, until another call says otherwise: a hint, and none
 * where it may use no other. */
void sys_keep_off_cpus(uint64_t cpus);

/* Let the calling thread, and those it starts, go before ordinary ones, where that is allowed. */
void sys_prefer_this_thread(void);
/* Let it run as soon as it has something to do, and that is little: before all of other users' and sessions' as well,
 * where that is allowed; else before others of its own. */
void sys_hurry_this_thread(void);
/* What this process has and will map stays in RAM once it was touched: programs wait for it. False: not allowed
 * (CAP_IPC_LOCK, RLIMIT_MEMLOCK), nothing is locked, and a kernel that swaps may swap it. Not inherited by a fork. */
bool sys_lock_memory(void);
int sys_nice_now(void); /* of this thread */
int sys_nice(int nice); /* the same from now on, where that is allowed; returns what it was */
void sys_refuse_core_dumps(void); /* of this process, from now on */

uint64_t sys_now_ns(void); /* monotonic */
uint64_t sys_now_coarse_ms(void); /* the same, some milliseconds late, and cheaper */
uint64_t sys_thread_cpu_ns(void); /* used by this thread */
/* How long it had to wait for a CPU, ever. 0, or -errno where the kernel does not say. */
int sys_thread_waited_ns(uint64_t *ret_ns);
void sys_sleep_ms(unsigned milliseconds);
void sys_sleep_us(unsigned microseconds);
void sys_eventfd_signal(int fd);
void sys_eventfd_drain(int fd);

#endif
