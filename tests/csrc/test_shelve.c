/* SPDX-License-Identifier: MIT */
/*
 * test_shelve — memory that was shelved is what it was, and is no longer the process's own until it is written to.
 *
 * Build: tests/csrc/test_shelve.c csrc/shelve.c csrc/base.c; -Icsrc; threads
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "limits.h"
#include "shelve.h"

#define BLOCKS 4000u         /* of malloc, so that they lie in the heap */
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

/* Pages of the mapping that are present, and the process's own or not. */
static unsigned count_pages(bool own)
{
	uint64_t entries[MAPPING_PAGES];
	unsigned count = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	CHECK(fd >= 0);
	CHECK(pread(fd, entries, sizeof entries, (off_t)((uintptr_t)mapping / PAGE_BYTES * 8)) == sizeof entries);
	close(fd);
	for (unsigned i = 0; i < MAPPING_PAGES; i++)
		count += entries[i] >> 63 && (entries[i] >> 61 & 1) == !own;
	return count;
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
	shelve_unmap_clean(); /* nothing */
}

/* A file that cannot be written to: all of the memory stays what it was. */
static void test_failure(uint64_t seed)
{
	int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);

	CHECK(fd >= 0 && shelve_memory(fd) == -EBADF);
	close(fd);
	check_memory(seed, 0);
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
	shelve_unmap_clean();
	CHECK(count_pages(false) == 0 && count_pages(true) == (MAPPING_PAGES + 4) / 5);
	if (fork() == 0) { /* a child has the same, and writes to its own */
		check_memory(seed, seed * 3);
		memset(mapping, 0, MAPPING_PAGES * PAGE_BYTES);
		shelve_unmap_clean();
		_exit(mapping[0] == 0 ? 0 : 1);
	}
	CHECK(wait(&status) > 0 && status == 0);
	check_memory(seed, seed * 3);
	shelve_page_out(fd);
	CHECK(fdatasync(fd) == 0);
	shelve_page_out(fd);
	check_memory(seed, seed * 3);
	close(fd);
	check_memory(seed, seed * 3);
}

int main(int argc, char **argv)
{
	uint64_t seed = test_seed(argc, argv);

	make_memory(seed);
	test_refusals();
	if (!IS_THREAD_SANITIZED) {
		test_failure(seed);
		test_shelved(seed);
	}
	return 0;
}
