/* SPDX-License-Identifier: MIT */
/* operations_process — rows: threads, signals, and processes that change what they are. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "operations.h"

#define NOBODY 65534
#define THREADS 8

/* ---- threads ---- */

struct racer {
	const struct area *area;
	pthread_barrier_t *barrier;
};

static void *race(void *argument)
{
	const struct racer *racer = argument;

	for (unsigned round = 0; round < 4; round++) {
		pthread_barrier_wait(racer->barrier); /* the main thread pages out */
		pthread_barrier_wait(racer->barrier);
		area_check(racer->area, 0, racer->area->pages, 0, "in one of many threads");
	}
	return NULL;
}

/* All on the same pages at once. */
static void threads_on_one_page(void)
{
	struct area area = area_make(AREA_PAGES);
	pthread_barrier_t barrier;
	struct racer racer = { &area, &barrier };
	pthread_t threads[THREADS];

	pthread_barrier_init(&barrier, NULL, THREADS + 1);
	for (unsigned i = 0; i < THREADS; i++)
		must(pthread_create(&threads[i], NULL, race, &racer) == 0, "no thread");
	for (unsigned round = 0; round < 4; round++) {
		pthread_barrier_wait(&barrier);
		bring_out(area.at, area.pages);
		pthread_barrier_wait(&barrier);
	}
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	pthread_barrier_destroy(&barrier);
	area_free(&area);
}

static void *count_up(void *argument)
{
	for (unsigned i = 0; i < 20000; i++)
		__atomic_fetch_add((uint64_t *)argument, 1, __ATOMIC_RELAXED);
	return NULL;
}

/* No addition is lost while the page goes out under it. */
static void threads_write_one_word(void)
{
	struct area area = area_make(AREA_PAGES);
	uint64_t *word = (uint64_t *)(void *)area_page(&area, 40);
	pthread_t threads[4];

	*word = 0;
	for (unsigned i = 0; i < 4; i++)
		must(pthread_create(&threads[i], NULL, count_up, word) == 0, "no thread");
	for (unsigned i = 0; i < 5; i++)
		page_out_try();
	for (unsigned i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	must(*word == 80000, "%lu additions instead of 80000", *word);
	area_check(&area, 0, 40, 0, "below");
	area_check(&area, 41, area.pages - 41, 0, "above");
	area_free(&area);
}

/* ---- stacks ---- */

static volatile sig_atomic_t handled;

static void on_signal(int number)
{
	volatile uint8_t room[2 * PAGE];

	room[0] = room[sizeof room - 1] = (uint8_t)number;
	handled = room[0] == room[sizeof room - 1];
}

static void signal_stack_out(void)
{
	struct area area = area_make(AREA_PAGES);
	stack_t stack = { .ss_sp = area.at, .ss_size = HALF * PAGE }, before;
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_ONSTACK }, old;

	must_call(sigaltstack(&stack, &before) == 0, "sigaltstack");
	must_call(sigaction(SIGUSR1, &action, &old) == 0, "sigaction");
	for (unsigned i = 0; i < 3; i++) {
		page_out(area.at, area.pages);
		handled = 0;
		raise(SIGUSR1);
		must(handled, "the handler did not run");
	}
	sigaction(SIGUSR1, &old, NULL);
	must_call(sigaltstack(&before, NULL) == 0, "sigaltstack");
	area_check(&area, HALF, HALF, 0, "above the stack");
	area_free(&area);
}

/* Blocked by all threads of the program it stays pending: no other task may take what is sent to the process. */
static void signal_waited_for(void)
{
	struct area area = area_make(AREA_PAGES);
	struct sigaction action = { .sa_handler = on_signal }, old;
	struct timespec longest = { 1, 0 };
	sigset_t waited_for, before;

	sigemptyset(&waited_for);
	sigaddset(&waited_for, SIGUSR1);
	must_call(sigaction(SIGUSR1, &action, &old) == 0, "sigaction");
	must_call(sigprocmask(SIG_BLOCK, &waited_for, &before) == 0, "sigprocmask");
	handled = 0;
	for (size_t i = 0; i < area.pages; i += PART) {
		siginfo_t *info = (siginfo_t *)(void *)area_page(&area, i);

		must_call(kill(getpid(), SIGUSR1) == 0, "kill");
		must_call(sigtimedwait(&waited_for, info, &longest) == SIGUSR1, "sigtimedwait");
		must(info->si_pid == getpid(), "a signal of process %d", info->si_pid);
		area_check(&area, i + 1, PART - 1, 0, "behind what the kernel wrote");
		page_out(area.at, area.pages);
	}
	must(!handled, "a blocked signal was handled");
	must_call(sigprocmask(SIG_SETMASK, &before, NULL) == 0, "sigprocmask");
	sigaction(SIGUSR1, &old, NULL);
	area_free(&area);
}

#define TLS_WORDS 1024

static _Thread_local uint64_t tls_words[TLS_WORDS];

struct sleeper {
	pthread_barrier_t barrier;
	bool is_right;
};

static void *sleep_on_own_stack(void *argument)
{
	struct sleeper *sleeper = argument;
	volatile uint64_t mine = 0x1234567;
	bool is_right = true;

	for (uint64_t i = 0; i < TLS_WORDS; i++)
		tls_words[i] = i * 3;
	for (unsigned round = 0; round < 3; round++) {
		pthread_barrier_wait(&sleeper->barrier); /* the main thread pages out */
		pthread_barrier_wait(&sleeper->barrier);
		for (uint64_t i = 0; i < TLS_WORDS; i++)
			is_right = is_right && tls_words[i] == i * 3;
	}
	sleeper->is_right = is_right && mine == 0x1234567;
	return NULL;
}

/* Stack, thread-local storage, rseq area and robust list of a thread, in memory that the program has chosen for them. */
static void thread_stack_and_tls_out(void)
{
	struct area area = area_map(AREA_PAGES);
	struct sleeper sleeper = { .is_right = false };
	pthread_attr_t attributes;
	pthread_t thread;

	pthread_barrier_init(&sleeper.barrier, NULL, 2);
	pthread_attr_init(&attributes);
	must(pthread_attr_setstack(&attributes, area.at, area.pages * PAGE) == 0, "pthread_attr_setstack");
	must(pthread_create(&thread, &attributes, sleep_on_own_stack, &sleeper) == 0, "no thread");
	for (unsigned round = 0; round < 3; round++) {
		pthread_barrier_wait(&sleeper.barrier);
		page_out(area.at, area.pages);
		pthread_barrier_wait(&sleeper.barrier);
	}
	pthread_join(thread, NULL);
	must(sleeper.is_right, "the stack or the thread-local storage has changed while it was out");
	pthread_attr_destroy(&attributes);
	pthread_barrier_destroy(&sleeper.barrier);
	area_free(&area);
}

static ucontext_t main_context, other_context;
static const struct area *context_area;

static void other_main(void)
{
	for (unsigned i = 0; i < 3; i++) {
		uint8_t mine[PAGE], again[PAGE];

		area_content(context_area, i, 7, mine);
		must_call(swapcontext(&other_context, &main_context) == 0, "swapcontext");
		area_content(context_area, i, 7, again);
		must(memcmp(mine, again, PAGE) == 0, "the stack has changed while it was out");
	}
}

/* A coroutine's stack is ordinary memory. */
static void coroutine_stack_out(void)
{
	struct area area = area_make(AREA_PAGES);

	context_area = &area;
	getcontext(&other_context);
	other_context.uc_stack.ss_sp = area.at;
	other_context.uc_stack.ss_size = area.pages * PAGE;
	other_context.uc_link = &main_context;
	makecontext(&other_context, other_main, 0);
	for (unsigned i = 0; i < 4; i++) {
		must_call(swapcontext(&main_context, &other_context) == 0, "swapcontext");
		page_out(area.at, area.pages);
	}
	area_free(&area);
}

/* ---- what the kernel writes when a thread ends ---- */

#define DEATH_WAIT_NS 300000000L /* for what the kernel does as a thread ends: natively at once */

static struct token thread_go;

static int end_when_told(void *argument)
{
	(void)argument;
	token_wait(&thread_go);
	syscall(SYS_exit, 0);
	return 0;
}

/* The word of CLONE_CHILD_CLEARTID, in ordinary memory: cleared, with a wake-up, as the thread ends. */
static void clear_tid(bool out)
{
	struct area area = area_make(AREA_PAGES), stack = area_map(AREA_PAGES);
	uint32_t *word = (uint32_t *)(void *)area_page(&area, 5);
	struct timespec longest = { 0, DEATH_WAIT_NS };
	int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
		    CLONE_CHILD_CLEARTID;
	pid_t tid;

	*word = 1;
	thread_go = token_make();
	tid = clone(end_when_told, stack.at + stack.pages * PAGE, flags, NULL, NULL, NULL, word);
	must_call(tid > 0, "clone");
	if (out)
		page_out(area.at, area.pages);
	token_send(&thread_go);
	if (out) {
		/* Without a look at the word, which would bring it back. */
		while (syscall(SYS_tgkill, getpid(), tid, 0) == 0)
			sched_yield();
	} else {
		(void)syscall(SYS_futex, word, FUTEX_WAIT, 1, &longest, NULL, 0);
	}
	must(*word == 0, "the word is %u when the thread has ended", *word);
	area_check(&area, 6, area.pages - 6, 0, "above");
	area_free(&area);
	area_free(&stack);
}

static void thread_clear_tid(void) { clear_tid(false); }
static void thread_clear_tid_out(void) { clear_tid(true); }

static void *lock_and_end(void *argument)
{
	must(pthread_mutex_lock(argument) == 0, "lock");
	token_wait(&thread_go);
	return NULL;
}

/* A thread ends with a robust mutex locked: the kernel marks it, for the next one who locks it. */
static void robust_mutex(bool out)
{
	struct area area = area_make(AREA_PAGES);
	pthread_mutex_t *mutex = (pthread_mutex_t *)(void *)area_page(&area, 9);
	pthread_mutexattr_t attributes;
	struct timespec deadline;
	pthread_t thread;

	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	must(pthread_mutex_init(mutex, &attributes) == 0, "mutex");
	page_out(area.at, area.pages);
	thread_go = token_make();
	must(pthread_create(&thread, NULL, lock_and_end, mutex) == 0, "no thread");
	while (pthread_mutex_trylock(mutex) == 0) {
		must(pthread_mutex_unlock(mutex) == 0, "unlock");
		sched_yield();
	}
	if (out)
		page_out(area.at, area.pages);
	token_send(&thread_go);
	pthread_join(thread, NULL);
	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_nsec += DEATH_WAIT_NS;
	deadline.tv_sec += deadline.tv_nsec / 1000000000L;
	deadline.tv_nsec %= 1000000000L;
	must(pthread_mutex_timedlock(mutex, &deadline) == EOWNERDEAD,
	     "the mutex does not say that its owner died");
	must(pthread_mutex_consistent(mutex) == 0 && pthread_mutex_unlock(mutex) == 0, "consistent");
	area_check(&area, 10, area.pages - 10, 0, "above");
	area_free(&area);
}

static void thread_robust_mutex(void) { robust_mutex(false); }
static void thread_robust_mutex_out(void) { robust_mutex(true); }

/* Condition variables and mutexes, all of whose words are out. */
struct shared_state {
	pthread_mutex_t mutex;
	pthread_cond_t condition;
	int ready;
};

static void *wait_ready(void *argument)
{
	struct shared_state *state = argument;

	pthread_mutex_lock(&state->mutex);
	while (!state->ready)
		pthread_cond_wait(&state->condition, &state->mutex);
	pthread_mutex_unlock(&state->mutex);
	return NULL;
}

static void futex_words_out(void)
{
	struct area area = area_make(AREA_PAGES);
	struct shared_state *state = (struct shared_state *)(void *)area_page(&area, 11);
	pthread_t threads[3];

	memset(state, 0, sizeof *state);
	pthread_mutex_init(&state->mutex, NULL);
	pthread_cond_init(&state->condition, NULL);
	for (unsigned i = 0; i < 3; i++)
		must(pthread_create(&threads[i], NULL, wait_ready, state) == 0, "no thread");
	page_out(area.at, area.pages);
	pthread_mutex_lock(&state->mutex);
	state->ready = 1;
	page_out_try();
	pthread_cond_broadcast(&state->condition);
	pthread_mutex_unlock(&state->mutex);
	for (unsigned i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	area_check(&area, 12, area.pages - 12, 0, "above");
	area_free(&area);
}

/* ---- the main thread ends first ---- */

static struct area left_area;
static pthread_t main_thread;

static void *go_on_alone(void *argument)
{
	struct area later;

	(void)argument;
	must(pthread_join(main_thread, NULL) == 0, "join of the main thread");
	area_check(&left_area, 0, HALF, 0, "after the main thread ended");
	area_write(&left_area, 0, HALF, 1);
	page_out(left_area.at, left_area.pages);
	area_check(&left_area, 0, HALF, 1, "out and back");
	area_check(&left_area, HALF, HALF, 0, "out and back");
	later = area_make_resident(AREA_PAGES);
	page_out(later.at, later.pages);
	area_check(&later, 0, later.pages, 0, "mapped later, out and back");
	exit(0);
}

static void main_thread_ends(void)
{
	pid_t pid;

	left_area = area_make(AREA_PAGES);
	pid = fork();
	must_call(pid >= 0, "fork");
	if (pid == 0) {
		pthread_t thread;

		page_out(left_area.at, left_area.pages);
		page_out_prepare();
		main_thread = pthread_self();
		must(pthread_create(&thread, NULL, go_on_alone, NULL) == 0, "no thread");
		pthread_exit(NULL);
	}
	wait_for(pid, 0, "child");
	area_check(&left_area, 0, left_area.pages, 0, "in the parent");
	area_free(&left_area);
}

/* ---- descriptors ---- */

static void close_range_all(void)
{
	struct area area = area_make(AREA_PAGES);

	must_call(syscall(SYS_close_range, 3, ~0u, 0) == 0, "close_range");
	area_check(&area, 0, HALF, 0, "without descriptors");
	area_write(&area, 0, HALF, 1);
	area_check(&area, 0, HALF, 1, "without descriptors");
	area_check(&area, HALF, HALF, 0, "without descriptors");
	page_out_anew();
	page_out(area.at, area.pages);
	area_check(&area, 0, HALF, 1, "without descriptors, out and back");
	area_check(&area, HALF, HALF, 0, "without descriptors, out and back");
}

static void daemon_double_fork(void)
{
	struct area area = area_make(AREA_PAGES);
	struct token done = token_make();
	pid_t pid = fork();

	must_call(pid >= 0, "fork");
	if (pid == 0) {
		must_call(setsid() >= 0, "setsid");
		pid = fork();
		must_call(pid >= 0, "fork");
		if (pid != 0)
			_exit(0);
		must_call(chdir("/") == 0, "chdir");
		/* All but what it reports with: a daemon closes what it inherited. */
		dup2(done.fds[1], 3);
		syscall(SYS_close_range, 4, ~0u, 0);
		area_check(&area, 0, area.pages, 0, "daemon");
		area_write(&area, 0, HALF, 1);
		area_check(&area, 0, HALF, 1, "daemon, its own");
		must_call(write(3, "x", 1) == 1, "write");
		_exit(0);
	}
	wait_for(pid, 0, "child");
	close(done.fds[1]);
	token_wait(&done);
	area_check(&area, 0, area.pages, 0, "whom it left");
	area_free(&area);
}

/* ---- what a process may do ---- */

/* Content, then as before with eviction, then new memory. */
static void check_afterwards(const struct area *area)
{
	struct area later;

	area_check(area, 0, area->pages, 0, "afterwards");
	area_write(area, 0, HALF, 1);
	page_out_try();
	area_check(area, 0, HALF, 1, "afterwards, own changes");
	area_check(area, HALF, HALF, 0, "afterwards, after eviction was tried");
	later = area_make_resident(AREA_PAGES);
	page_out_try();
	area_check(&later, 0, later.pages, 0, "mapped later");
}

static void chroot_later(void)
{
	struct area area = area_make(AREA_PAGES);
	char directory[] = "/tmp/vswap-operations-XXXXXX";

	page_out_prepare();
	must_call(mkdtemp(directory) != NULL, "mkdtemp");
	must_call(chroot(directory) == 0 && chdir("/") == 0, "chroot");
	check_afterwards(&area);
	/* Out again, to leave nothing behind. */
	must_call(chroot(".") == 0, "chroot");
}

/* Every task of this process, not its own threads alone: one that keeps what was given up is a way back to it. */
static void all_tasks_are(uid_t uid)
{
	DIR *tasks = opendir("/proc/self/task");

	must_call(tasks != NULL, "opendir");
	for (struct dirent *task; (task = readdir(tasks));) {
		char path[64], status[2048];
		const char *line;
		uid_t uids[4];
		ssize_t bytes;
		int fd;

		if (task->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, "/proc/self/task/%.20s/status", task->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		must_call(fd >= 0, path);
		bytes = read(fd, status, sizeof status - 1);
		must_call(bytes > 0, path);
		close(fd);
		status[bytes] = '\0';
		line = strstr(status, "\nUid:");
		must(line && sscanf(line, "\nUid: %u %u %u %u", &uids[0], &uids[1], &uids[2], &uids[3]) == 4,
		     "%s has no users", path);
		for (unsigned i = 0; i < 4; i++)
			must(uids[i] == uid, "task %s is user %u, not %u", task->d_name, uids[i], uid);
	}
	closedir(tasks);
}

static void setuid_drop(void)
{
	struct area area = area_make(AREA_PAGES);
	pid_t pid;

	page_out_prepare();
	must_call(setgroups(0, NULL) == 0 && setresgid(NOBODY, NOBODY, NOBODY) == 0 &&
			  setresuid(NOBODY, NOBODY, NOBODY) == 0,
		  "setresuid");
	all_tasks_are(NOBODY);
	check_afterwards(&area);
	pid = fork();
	must_call(pid >= 0, "fork");
	if (pid == 0) {
		area_check(&area, 0, HALF, 1, "child without rights");
		area_write(&area, 0, HALF, 2);
		area_check(&area, 0, HALF, 2, "child without rights, its own");
		child_done();
	}
	wait_for(pid, 0, "child");
	area_check(&area, 0, HALF, 1, "after the child");
}

/* A filter that kills for an ioctl, which the agent makes and the rows do not. */
static struct sock_filter no_ioctl_code[] = {
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 1),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
};
static struct sock_fprog no_ioctl = { sizeof no_ioctl_code / sizeof *no_ioctl_code, no_ioctl_code };

static void seccomp_later(void)
{
	struct area area = area_make(AREA_PAGES);

	page_out_prepare();
	must_call(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "NO_NEW_PRIVS");
	must_call(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &no_ioctl, 0, 0) == 0, "seccomp");
	check_afterwards(&area);
}

static void seccomp_tsync(void)
{
	struct area area = area_make(AREA_PAGES);

	page_out_prepare();
	must_call(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "NO_NEW_PRIVS");
	must_call(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &no_ioctl) == 0,
		  "seccomp");
	check_afterwards(&area);
}

/* One that kills for what the client library would populate with, when the program has asked mmap for that. */
static struct sock_filter no_madvise_code[] = {
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 1, 0),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_nanosleep, 0, 1),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
};
static struct sock_fprog no_madvise = { sizeof no_madvise_code / sizeof *no_madvise_code, no_madvise_code };

static void seccomp_populate(void)
{
	const size_t bytes = 4 << 20; /* more than one piece */
	struct area area = area_make(AREA_PAGES);

	page_out_prepare();
	must_call(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "NO_NEW_PRIVS");
	must_call(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &no_madvise, 0, 0) == 0, "seccomp");
	must_call(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0) !=
			  MAP_FAILED,
		  "mmap");
	check_afterwards(&area);
}

static void dumpable_off(void)
{
	struct area area = area_make(AREA_PAGES);

	page_out_prepare();
	must_call(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0, "PR_SET_DUMPABLE");
	check_afterwards(&area);
	page_out(area.at, area.pages);
	area_check(&area, 0, HALF, 1, "out and back");
}

static void unshare_later(void)
{
	struct area area = area_make(AREA_PAGES);

	page_out_prepare();
	must_call(unshare(CLONE_NEWNS | CLONE_NEWIPC) == 0, "unshare");
	check_afterwards(&area);
	page_out(area.at, area.pages);
	area_check(&area, 0, HALF, 1, "out and back");
}

static void unshare_user(void)
{
	struct area area = area_make(AREA_PAGES);

	page_out_prepare();
	if (unshare(CLONE_NEWUSER) != 0)
		must_call(errno == EPERM || errno == ENOSPC, "unshare");
	check_afterwards(&area);
}

static void limit_to(int resource, rlim_t count)
{
	struct rlimit limit = { count, count };

	must_call(setrlimit((__rlimit_resource_t)resource, &limit) == 0, "setrlimit");
}

static void rlimits(void)
{
	struct area area = area_make(AREA_PAGES);

	page_out_prepare();
	limit_to(RLIMIT_NOFILE, 8);
	limit_to(RLIMIT_NPROC, 1);
	limit_to(RLIMIT_MEMLOCK, 0);
	limit_to(RLIMIT_CORE, 0);
	limit_to(RLIMIT_FSIZE, 0);
	check_afterwards(&area);
}

/* The address space is full: a program that gets ENOMEM natively gets it here. */
static void rlimit_address_space(void)
{
	struct area area = area_make(AREA_PAGES);
	size_t bytes = 64UL << 20;
	void *got;

	page_out_prepare();
	limit_to(RLIMIT_AS, bytes);
	got = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(got == MAP_FAILED && errno == ENOMEM, "more than the address space may be");
	area_check(&area, 0, area.pages, 0, "afterwards");
	page_out_try();
	area_check(&area, 0, area.pages, 0, "after eviction was tried");
}

const struct row process_rows[] = {
	{ "threads_on_one_page", threads_on_one_page, 0 },
	{ "threads_write_one_word", threads_write_one_word, 0 },
	{ "signal_stack_out", signal_stack_out, 0 },
	{ "signal_waited_for", signal_waited_for, 0 },
	{ "coroutine_stack_out", coroutine_stack_out, 0 },
	{ "thread_stack_and_tls_out", thread_stack_and_tls_out, ROW_CALM },
	{ "thread_clear_tid_out", thread_clear_tid_out, 0 },
	{ "thread_robust_mutex", thread_robust_mutex, ROW_CALM },
	{ "thread_clear_tid", thread_clear_tid, ROW_CALM },
	{ "thread_robust_mutex_out", thread_robust_mutex_out, 0 },
	{ "futex_words_out", futex_words_out, 0 },
	{ "main_thread_ends", main_thread_ends, ROW_OWN },
	{ "close_range_all", close_range_all, ROW_OWN },
	{ "daemon_double_fork", daemon_double_fork, 0 },
	{ "chroot_later", chroot_later, ROW_OWN },
	{ "setuid_drop", setuid_drop, ROW_OWN },
	{ "seccomp_later", seccomp_later, ROW_OWN },
	{ "seccomp_tsync", seccomp_tsync, ROW_OWN },
	{ "seccomp_populate", seccomp_populate, ROW_OWN },
	{ "dumpable_off", dumpable_off, ROW_OWN },
	{ "unshare_later", unshare_later, ROW_OWN },
	{ "unshare_user", unshare_user, ROW_OWN },
	{ "rlimits", rlimits, ROW_OWN },
	{ "rlimit_address_space", rlimit_address_space, ROW_OWN },
	{ NULL, NULL, 0 },
};
