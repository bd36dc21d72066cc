/* SPDX-License-Identifier: MIT */
/*
 * test_shelve — memory that was shelved is what it was, and is no longer the process's own until it is written to.
 *
 * Build: tests/csrc/test_shelve.c csrc/shelve.c csrc/sys.c csrc/fault_point.c csrc/base.c; -Icsrc; threads
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "limits.h"
#include "shelve.h"

#define BLOCKS 4000u         /* of malloc, so that they lie in the heap */
#define CONSTANT_PAGES 64u
#define MAPPING_PAGES 1024u  /* of which every seventh run of eight is never touched */

#ifdef __SANITIZE_THREAD__
#define IS_THREAD_SANITIZED true /* its own memory changes with every call, and cannot be copied */
#else
#define IS_THREAD_SANITIZED false
#endif

static uint64_t *blocks[BLOCKS];
static uint64_t *mapping;

static unsigned block_words(unsigned i) { return 16 + i % 200; }
static bool is_touched(unsigned page) { return page / 8 % 7 != 3; }

/* Words of memory number `i`, all of them from one seed. */
static void fill(uint64_t *words, unsigned count, uint64_t seed)
{
	for (unsigned i = 0; i < count; i++)
		words[i] = random_next(&seed);
}

static void check_filled(const uint64_t *words, unsigned count, uint64_t seed)
{
	for (unsigned i = 0; i < count; i++)
		CHECK(words[i] == random_next(&seed));
}

static void make_memory(uint64_t seed)
{
	mapping = mmap(NULL, MAPPING_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(mapping != MAP_FAILED);
	CHECK(madvise(mapping, MAPPING_PAGES * PAGE_BYTES, MADV_NOHUGEPAGE) == 0);
	for (unsigned i = 0; i < BLOCKS; i++) {
		blocks[i] = malloc(block_words(i) * sizeof **blocks);
		CHECK(blocks[i]);
		fill(blocks[i], block_words(i), seed + i);
	}
	for (unsigned page = 0; page < MAPPING_PAGES; page++)
		if (is_touched(page))
			fill(mapping + page * PAGE_BYTES / 8, PAGE_BYTES / 8, seed - page);
}

/* `changed`: mapping pages that are a multiple of 5 were written to with that seed; 0: none. */
static void check_memory(uint64_t seed, uint64_t changed)
{
	for (unsigned i = 0; i < BLOCKS; i++)
		check_filled(blocks[i], block_words(i), seed + i);
	for (unsigned page = 0; page < MAPPING_PAGES; page++) {
		const uint64_t *words = mapping + page * PAGE_BYTES / 8;

		if (changed && page % 5 == 0)
			check_filled(words, PAGE_BYTES / 8, changed + page);
		else if (is_touched(page))
			check_filled(words, PAGE_BYTES / 8, seed - page);
		else
			CHECK(words[0] == 0 && memcmp(words, words + 1, PAGE_BYTES - 8) == 0);
	}
}

/* Pages of a mapping that are present, and the process's own or not. */
static unsigned count_pages_of(const void *start, unsigned pages, bool own)
{
	uint64_t entries[MAPPING_PAGES];
	ssize_t bytes = (ssize_t)(pages * sizeof *entries);
	unsigned count = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	CHECK(fd >= 0);
	CHECK(pread(fd, entries, (size_t)bytes, (off_t)((uintptr_t)start / PAGE_BYTES * 8)) == bytes);
	close(fd);
	for (unsigned i = 0; i < pages; i++)
		count += entries[i] >> 63 && (entries[i] >> 61 & 1) == !own;
	return count;
}

static unsigned count_pages(bool own) { return count_pages_of(mapping, MAPPING_PAGES, own); }

/* A wait that is over at once. */
static void unmap(void)
{
	int pipe_fds[2];

	CHECK(pipe(pipe_fds) == 0 && write(pipe_fds[1], "", 1) == 1);
	shelve_wait(pipe_fds, 1);
	close(pipe_fds[0]);
	close(pipe_fds[1]);
}

static int open_shelf(const char *directory)
{
	int fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	CHECK(fd >= 0);
	return fd;
}

static void *wait_for_unlock(void *mutex)
{
	pthread_mutex_lock(mutex);
	pthread_mutex_unlock(mutex);
	return NULL;
}

/* Where it would be of no use, or could lose what another thread writes, nothing is done. */
static void test_refusals(void)
{
	pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
	int memory_fd = memfd_create("shelf", MFD_CLOEXEC), shelf_fd = open_shelf(".");
	pthread_t thread;

	CHECK(memory_fd >= 0 && shelve_memory(memory_fd) == -EMEDIUMTYPE);
	close(memory_fd);
	pthread_mutex_lock(&mutex);
	CHECK(pthread_create(&thread, NULL, wait_for_unlock, &mutex) == 0);
	CHECK(shelve_memory(shelf_fd) == -EBUSY);
	pthread_mutex_unlock(&mutex);
	pthread_join(thread, NULL);
	close(shelf_fd);
}

/* A file that cannot be written to: all of the memory stays what it was. */
static void test_failure(uint64_t seed)
{
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

	CHECK(fd >= 0 && shelve_memory(fd) == -EBADF);
	close(fd);
	check_memory(seed, 0);
}

/* A page that is read brings back hardly any of those around it. */
static void check_some_come_alone(uint64_t seed)
{
	for (unsigned page = 1; page < MAPPING_PAGES; page += 64)
		if (page % 5 != 0 && is_touched(page))
			check_filled(mapping + page * PAGE_BYTES / 8, PAGE_BYTES / 8, seed - page);
	CHECK(count_pages(false) < MAPPING_PAGES / 16);
}

static void test_shelved(uint64_t seed)
{
	int fd = open_shelf("."), status;
	unsigned touched = count_pages(true);

	CHECK(touched >= MAPPING_PAGES / 7 * 6);
	CHECK(shelve_memory(fd) >= (int)(MAPPING_PAGES * PAGE_BYTES >> 20));
	CHECK(count_pages(true) == 0);
	CHECK(shelve_memory(fd) == -EBUSY); /* once */
	check_memory(seed, 0);
	CHECK(count_pages(true) == 0 && count_pages(false) > touched / 2);

	for (unsigned page = 0; page < MAPPING_PAGES; page += 5)
		fill(mapping + page * PAGE_BYTES / 8, PAGE_BYTES / 8, seed * 3 + page);
	unmap();
	CHECK(count_pages(false) == 0 && count_pages(true) == (MAPPING_PAGES + 4) / 5);
	if (fork() == 0) { /* a child has the same, and writes to its own */
		check_memory(seed, seed * 3);
		memset(mapping, 0, MAPPING_PAGES * PAGE_BYTES);
		unmap();
		_exit(mapping[0] == 0 ? 0 : 1);
	}
	CHECK(wait(&status) > 0 && status == 0);
	check_memory(seed, seed * 3);
	shelve_page_out(fd);
	CHECK(fdatasync(fd) == 0);
	shelve_page_out(fd);
	check_some_come_alone(seed);
	check_memory(seed, seed * 3);
	close(fd);
	check_memory(seed, seed * 3);
}

struct named_thread {
	const char *name;
	pthread_t thread;
	pthread_mutex_t held;
	pthread_barrier_t named;
};

static void *wait_named(void *argument)
{
	struct named_thread *named = argument;

	pthread_setname_np(pthread_self(), named->name);
	pthread_barrier_wait(&named->named);
	return wait_for_unlock(&named->held);
}

/* shelve_again beside a thread of that name. */
static int shelve_again_beside(const char *name, int fd)
{
	struct named_thread named = { .name = name, .held = PTHREAD_MUTEX_INITIALIZER };
	int result;

	CHECK(pthread_barrier_init(&named.named, NULL, 2) == 0);
	pthread_mutex_lock(&named.held);
	CHECK(pthread_create(&named.thread, NULL, wait_named, &named) == 0);
	pthread_barrier_wait(&named.named);
	result = shelve_again(fd);
	pthread_mutex_unlock(&named.held);
	pthread_join(named.thread, NULL);
	pthread_barrier_destroy(&named.named);
	return result;
}

/* What was written to since the first time is the file's again, unless somebody else may be writing to it. `seed`: as test_shelved
 * leaves the memory. */
static void test_again(uint64_t seed)
{
	int fd = open_shelf("."), unwritable_fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
	unsigned own = count_pages(true);

	CHECK(own >= MAPPING_PAGES / 5);
	CHECK(shelve_again_beside("backend_drain", fd) == -EBUSY);
	CHECK(shelve_again(unwritable_fd) == -EBADF);
	CHECK(count_pages(true) == own);
	CHECK(shelve_again_beside("vswap-evict", fd) >= (int)(MAPPING_PAGES * PAGE_BYTES >> 20));
	CHECK(count_pages(true) == 0);
	check_memory(seed, seed * 3);
	memset(blocks[0], 0, sizeof **blocks); /* the heap is where it was, and is written to as ever */
	fill(blocks[0], block_words(0), seed);
	fill(mapping, PAGE_BYTES / 8, seed * 3);
	CHECK(shelve_again_beside("Trio thread 0", fd) == 0); /* nothing is left in the first file */
	shelve_page_out(fd);
	close(fd);
	close(unwritable_fd);
	check_memory(seed, seed * 3);
}

/* What nobody writes to any more: a file's own pages leave, what was changed in it before stays. */
static void test_constants(uint64_t seed)
{
	int fd = open_shelf(".");
	uint64_t *words, stored[PAGE_BYTES / 8];

	CHECK(ftruncate(fd, CONSTANT_PAGES * PAGE_BYTES) == 0);
	words = mmap(NULL, CONSTANT_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(words != MAP_FAILED);
	fill(words, CONSTANT_PAGES * PAGE_BYTES / 8, seed);
	munmap(words, CONSTANT_PAGES * PAGE_BYTES);
	words = mmap(NULL, CONSTANT_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	CHECK(words != MAP_FAILED);
	check_filled(words, CONSTANT_PAGES * PAGE_BYTES / 8, seed);
	fill(words, 3 * PAGE_BYTES / 8, seed + 1); /* as the loader does */
	CHECK(mprotect(words, CONSTANT_PAGES * PAGE_BYTES, PROT_READ) == 0);
	unmap();
	CHECK(count_pages_of(words, CONSTANT_PAGES, false) == 0 && count_pages_of(words, CONSTANT_PAGES, true) == 3);
	check_filled(words, 3 * PAGE_BYTES / 8, seed + 1);
	for (unsigned page = 3; page < CONSTANT_PAGES; page++) {
		CHECK(pread(fd, stored, sizeof stored, (off_t)(page * PAGE_BYTES)) == (ssize_t)sizeof stored);
		CHECK(memcmp(words + page * PAGE_BYTES / 8, stored, sizeof stored) == 0);
	}
	munmap(words, CONSTANT_PAGES * PAGE_BYTES);
	close(fd);
}

static void test_wait_for_signal(void)
{
	const int signals[] = { SIGUSR1, SIGUSR2 };
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0 && kill(getpid(), SIGUSR2) == 0);
	CHECK(shelve_wait_signal(signals, 2) == SIGUSR2);
	CHECK(sigprocmask(SIG_UNBLOCK, &set, NULL) == 0);
}

int main(int argc, char **argv)
{
	uint64_t seed = test_seed(argc, argv);

	make_memory(seed);
	CHECK(shelve_again(-1) == -ENOENT);
	test_refusals();
	if (!IS_THREAD_SANITIZED) {
		test_failure(seed);
		test_shelved(seed);
		test_again(seed);
		test_constants(seed);
		test_wait_for_signal();
	}
	return 0;
}
