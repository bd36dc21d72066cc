/* SPDX-License-Identifier: MIT */
/*
 * floor — what the kernel and the codec ask for the steps that no user-space swap can leave out, each alone.
 *
 *   floor FILE      FILE: of at least 64 MiB, on the disk in question, not in the page cache's way (O_DIRECT)
 *
 * One line of JSON for each step:
 *
 *   step, p50_ns, p99_ns      of `count` measurements; for steps that are done for many pages at once: for each page
 *
 *   round_trip_same  a fault, seen by who faults: poll and read in another process, on the same CPU, COPY of a page that is ready
 *   round_trip_nice  ... by one that goes before the program (nice -10): docs/decisions/0013
 *   round_trip_other ... on another CPU, that was asleep
 *   touch            a first touch of memory that nobody watches, in order, and all of the page written
 *   copy             COPY of 64 pages at once for which nobody waits
 *   expand           LZ4 of the bench's data, 1.6 : 1, and the check of the page, as a fault from the pool has it (csrc/codec.h)
 *   compress         the same page the other way
 *   check            the check alone, as an eviction of an unchanged page has it
 *   wake             a futex there and back between two processes, where neither is on a CPU
 *   move             MOVE of one page among others that stay
 *   move_run         MOVE of 64 pages at once
 *   read             64 pages of another place's memory through /proc/PID/mem
 *   release          MOVE of 64 pages on to where MADV_DONTNEED takes them
 *   disk             4 KiB from FILE, at random
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "codec.h"
#include "content.h"
#include "latency.h"

#define PAGE 4096UL
#define FAULTS 8192UL
#define OBJECTS 2048UL
#define WINDOW 64UL
#define BATCHES 128UL
#define READS 2000UL
#define MOVE_TRIES_MAX 10000
#define FILE_BYTES (64UL << 20)

/* Linux 6.8; Debian's headers are older than its kernel may be. */
#ifndef UFFDIO_MOVE
struct uffdio_move {
	uint64_t dst, src, len, mode;
	int64_t move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif

static struct latency latency;

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t random_next(void)
{
	static uint64_t state = 1;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static void say(const char *step, uint64_t count)
{
	printf("{\"step\": \"%s\", \"count\": %lu, \"p50_ns\": %.0f, \"p99_ns\": %.0f}\n", step, count,
	       latency_quantile_ns(&latency, 0, 0.5), latency_quantile_ns(&latency, 0, 0.99));
	fflush(stdout);
	memset(&latency, 0, sizeof latency);
}

static uint8_t *map(size_t bytes, int flags)
{
	void *area = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);

	if (area == MAP_FAILED)
		fail("mmap");
	(void)madvise(area, bytes, MADV_NOHUGEPAGE);
	return area;
}

static void use_cpu(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set) != 0)
		fail("sched_setaffinity");
}

/* Two CPUs of those that may be used; the same one twice where there is one. */
static void find_cpus(int cpus[2])
{
	cpu_set_t set;
	int found = 0;

	if (sched_getaffinity(0, sizeof set, &set) != 0)
		fail("sched_getaffinity");
	for (int cpu = 0; cpu < CPU_SETSIZE && found < 2; cpu++)
		if (CPU_ISSET((size_t)cpu, &set))
			cpus[found++] = cpu;
	if (found == 1)
		cpus[1] = cpus[0];
}

/* A child that ends with its parent, on that CPU. */
static pid_t fork_to(int cpu)
{
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	if (pid == 0) {
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		use_cpu(cpu);
	}
	return pid;
}

static void end(pid_t pid)
{
	(void)kill(pid, SIGKILL);
	(void)waitpid(pid, NULL, 0);
}

/* ---- a fault ---- */

static int userfaultfd_open(void)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_THREAD_ID };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) != 0)
		fail("userfaultfd");
	return fd;
}

static void userfaultfd_watch(int fd, uint8_t *area, size_t bytes)
{
	struct uffdio_register watched = { .range = { (uintptr_t)area, bytes }, .mode = UFFDIO_REGISTER_MODE_MISSING };

	if (ioctl(fd, UFFDIO_REGISTER, &watched) != 0)
		fail("UFFDIO_REGISTER");
}

static _Noreturn void answer_faults(int fd, const uint8_t *ready)
{
	struct pollfd wait = { .fd = fd, .events = POLLIN };
	struct uffd_msg message;

	for (;;) {
		struct uffdio_copy copy = { .src = (uintptr_t)ready, .len = PAGE };

		(void)poll(&wait, 1, -1);
		if (read(fd, &message, sizeof message) != sizeof message)
			continue;
		copy.dst = message.arg.pagefault.address & ~(PAGE - 1);
		(void)ioctl(fd, UFFDIO_COPY, &copy);
	}
}

static void measure_round_trip(const char *step, const int cpus[2], bool same, int nice)
{
	uint8_t *area = map(FAULTS * PAGE, MAP_PRIVATE), *ready = map(PAGE, MAP_PRIVATE);
	int fd = userfaultfd_open();
	pid_t pid;

	memset(ready, 1, PAGE);
	userfaultfd_watch(fd, area, FAULTS * PAGE);
	use_cpu(cpus[0]);
	pid = fork_to(cpus[same ? 0 : 1]);
	if (pid == 0) {
		(void)setpriority(PRIO_PROCESS, 0, nice); /* root may */
		answer_faults(fd, ready);
	}
	usleep(20000);
	for (uint64_t i = 0; i < FAULTS; i++) {
		volatile uint8_t *page = area + i * 4099 % FAULTS * PAGE; /* an odd number: each once */
		uint64_t started = now_ns();

		(void)*page;
		latency_add(&latency, now_ns() - started);
		if (!same && i % 8 == 0)
			usleep(50); /* it sleeps again */
	}
	end(pid);
	close(fd);
	munmap(area, FAULTS * PAGE);
	say(step, FAULTS);
}

/* ---- runs of pages ---- */

/* A page of some runs, that are filled by COPY, or without a descriptor by whoever needs them. */
static void measure_runs(const char *step, int fd)
{
	size_t bytes = BATCHES * WINDOW * PAGE;
	uint8_t *area = map(bytes, MAP_PRIVATE), *ready = map(WINDOW * PAGE, MAP_PRIVATE);

	memset(ready, 1, WINDOW * PAGE);
	if (fd >= 0)
		userfaultfd_watch(fd, area, bytes);
	for (size_t at = 0; at < bytes; at += WINDOW * PAGE) {
		struct uffdio_copy copy = { .src = (uintptr_t)ready, .dst = (uintptr_t)area + at, .len = WINDOW * PAGE };
		uint64_t started = now_ns();

		if (fd < 0)
			memcpy(area + at, ready, WINDOW * PAGE);
		else if (ioctl(fd, UFFDIO_COPY, &copy) != 0)
			fail("UFFDIO_COPY");
		latency_add(&latency, (now_ns() - started) / WINDOW);
	}
	munmap(area, bytes);
	munmap(ready, WINDOW * PAGE);
	say(step, BATCHES);
}

static void measure_touch_and_copy(void)
{
	int fd = userfaultfd_open();

	measure_runs("touch", -1);
	measure_runs("copy", fd);
	close(fd);
}

/* ---- the codec ---- */

static void measure_codec(void)
{
	static uint8_t secret[CODEC_SECRET_BYTES], objects[OBJECTS][PAGE];
	static unsigned units[OBJECTS];
	const struct content_options content = { .seed = 1, .ratio = 1.6, .page_count = OBJECTS };
	struct codec_scratch *scratch = codec_scratch_create();
	uint64_t page[PAGE / 8], sum = 0, started;

	if (!scratch)
		fail("memory");
	for (size_t i = 0; i < sizeof secret; i++)
		secret[i] = (uint8_t)random_next();
	content_init(&content);
	for (size_t i = 0; i < OBJECTS; i++) {
		content_write(page, i, 1);
		started = now_ns();
		units[i] = codec_compress(scratch, CODEC_LZ4, page, objects[i]);
		latency_add(&latency, now_ns() - started);
	}
	say("compress", OBJECTS);
	for (size_t i = 0; i < OBJECTS; i++) {
		size_t k = i * 1031 % OBJECTS;

		started = now_ns();
		if (codec_expand(objects[k], units[k], page) != 0)
			exit(1);
		sum += codec_check(page, secret);
		latency_add(&latency, now_ns() - started);
	}
	say("expand", OBJECTS);
	for (size_t i = 0; i < OBJECTS; i++) {
		started = now_ns();
		sum += codec_check(objects[i], secret);
		latency_add(&latency, now_ns() - started);
	}
	say("check", OBJECTS);
	codec_scratch_destroy(scratch);
	if (sum == 1) /* it was needed */
		exit(1);
}

/* ---- an eviction ---- */

static void futex(uint32_t *word, int operation, uint32_t value)
{
	(void)syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

/* Waits for its turn, which an even or an odd number is. */
static void take_turn(uint32_t *turn, uint32_t parity)
{
	uint32_t now;

	while (((now = __atomic_load_n(turn, __ATOMIC_SEQ_CST)) & 1) != parity)
		futex(turn, FUTEX_WAIT, now);
}

static void give_turn(uint32_t *turn)
{
	__atomic_fetch_add(turn, 1, __ATOMIC_SEQ_CST);
	futex(turn, FUTEX_WAKE, 1);
}

static void measure_wake(const int cpus[2])
{
	uint32_t *turn = (uint32_t *)map(PAGE, MAP_SHARED);
	pid_t pid;

	use_cpu(cpus[0]);
	pid = fork_to(cpus[0]); /* where the other sleeps anyway it is the faster way */
	for (; pid == 0; give_turn(turn))
		take_turn(turn, 1);
	usleep(20000);
	for (unsigned i = 0; i < OBJECTS; i++) {
		uint64_t started = now_ns();

		give_turn(turn);
		take_turn(turn, 0);
		latency_add(&latency, now_ns() - started);
	}
	end(pid);
	say("wake", OBJECTS);
}

static void move(int fd, uint8_t *to, uint8_t *from, size_t bytes)
{
	for (unsigned tries = 0; bytes > 0; tries++) {
		struct uffdio_move moved = { .dst = (uintptr_t)to, .src = (uintptr_t)from, .len = bytes };
		int result = ioctl(fd, UFFDIO_MOVE, &moved);
		size_t done = result == 0 ? bytes : moved.move > 0 ? (size_t)moved.move : 0;

		if (result != 0 && errno == EEXIST && done == 0)
			done = PAGE; /* Linux 6.18 says so of a page that it moved while it was migrated */
		else if (result != 0 && ((errno != EAGAIN && errno != EBUSY) || tries == MOVE_TRIES_MAX))
			fail("UFFDIO_MOVE");
		else if (result != 0) /* the kernel migrates a page, or is about to */
			usleep(100);
		to += done;
		from += done;
		bytes -= done;
	}
}

/* A MOVE of as many pages as a window has; which is empty again then. */
static uint64_t move_run_ns(int fd, uint8_t *window, uint8_t *from)
{
	uint64_t started = now_ns(), ended;

	move(fd, window, from, WINDOW * PAGE);
	ended = now_ns();
	if (madvise(window, WINDOW * PAGE, MADV_DONTNEED) != 0)
		fail("MADV_DONTNEED");
	return ended - started;
}

static void measure_eviction(void)
{
	static struct latency moves, reads, releases, runs;
	size_t bytes = 3 * BATCHES * WINDOW * PAGE; /* one and one for `move`, one for `move_run` */
	uint8_t *area = map(bytes, MAP_PRIVATE), *window = map(WINDOW * PAGE, MAP_PRIVATE);
	uint8_t *trash = map(WINDOW * PAGE, MAP_PRIVATE), *buffer = map(WINDOW * PAGE, MAP_PRIVATE);
	int fd = userfaultfd_open(), memory_fd = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);

	if (memory_fd < 0)
		fail("/proc/self/mem");
	memset(area, 1, bytes);
	memset(buffer, 1, WINDOW * PAGE);
	userfaultfd_watch(fd, area, bytes);
	userfaultfd_watch(fd, window, WINDOW * PAGE);
	userfaultfd_watch(fd, trash, WINDOW * PAGE);
	for (size_t batch = 0; batch < BATCHES; batch++) {
		uint8_t *from = area + 2 * batch * WINDOW * PAGE;
		uint64_t started = now_ns(), moved, read_at, released;

		for (size_t i = 0; i < WINDOW; i++)
			move(fd, window + i * PAGE, from + 2 * i * PAGE, PAGE);
		moved = now_ns();
		if (pread(memory_fd, buffer, WINDOW * PAGE, (off_t)(uintptr_t)window) != (ssize_t)(WINDOW * PAGE))
			fail("pread of memory");
		read_at = now_ns();
		move(fd, trash, window, WINDOW * PAGE);
		if (madvise(trash, WINDOW * PAGE, MADV_DONTNEED) != 0)
			fail("MADV_DONTNEED");
		released = now_ns();
		latency_add(&runs, move_run_ns(fd, window, area + (2 * BATCHES + batch) * WINDOW * PAGE) / WINDOW);
		latency_add(&moves, (moved - started) / WINDOW);
		latency_add(&reads, (read_at - moved) / WINDOW);
		latency_add(&releases, (released - read_at) / WINDOW);
	}
	latency = moves;
	say("move", BATCHES);
	latency = reads;
	say("read", BATCHES);
	latency = releases;
	say("release", BATCHES);
	latency = runs;
	say("move_run", BATCHES);
	close(memory_fd);
	close(fd);
}

/* ---- a disk ---- */

static void measure_disk(const char *path)
{
	uint8_t *buffer = map(PAGE, MAP_PRIVATE);
	int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);

	if (fd < 0)
		fail(path);
	for (size_t i = 0; i < READS; i++) {
		off_t at = (off_t)(random_next() % (FILE_BYTES / PAGE) * PAGE);
		uint64_t started = now_ns();

		if (pread(fd, buffer, PAGE, at) != (ssize_t)PAGE)
			fail(path);
		latency_add(&latency, now_ns() - started);
	}
	close(fd);
	say("disk", READS);
}

int main(int argc, char **argv)
{
	int cpus[2];

	if (argc != 2) {
		fprintf(stderr, "usage: floor FILE\n");
		return 2;
	}
	find_cpus(cpus);
	measure_round_trip("round_trip_same", cpus, true, 0);
	measure_round_trip("round_trip_nice", cpus, true, -10);
	measure_round_trip("round_trip_other", cpus, false, 0);
	measure_touch_and_copy();
	measure_codec();
	measure_wake(cpus);
	measure_eviction();
	measure_disk(argv[1]);
	return 0;
}
