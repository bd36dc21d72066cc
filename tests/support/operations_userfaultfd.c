/* SPDX-License-Identifier: MIT */
/* operations_userfaultfd — rows: a program registers memory with a userfaultfd of its own. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "operations.h"

#define THREADS 4

static int userfaultfd_make(uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

	must_call(fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0, "userfaultfd");
	return fd;
}

static struct uffdio_register range_of(const struct area *area, size_t first, size_t count, uint64_t mode)
{
	return (struct uffdio_register){ .range = { (uintptr_t)area_page(area, first), count * PAGE }, .mode = mode };
}

/* A write to a protected page is all that the program wants to know of. */
static int watch(const struct area *area, size_t first, size_t count)
{
	struct uffdio_register range = range_of(area, first, count, UFFDIO_REGISTER_MODE_WP);
	int fd = userfaultfd_make(UFFD_FEATURE_PAGEFAULT_FLAG_WP);

	must_call(ioctl(fd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
	return fd;
}

/* ---- missing pages ---- */

struct own_faults {
	int fd;
	const struct area *area;
	volatile unsigned answered;
};

static void *answer_faults(void *argument)
{
	struct own_faults *own = argument;
	static uint8_t page[PAGE] __attribute__((aligned(4096)));
	struct uffd_msg message;

	while (read(own->fd, &message, sizeof message) == (ssize_t)sizeof message) {
		uint64_t address = message.arg.pagefault.address & ~(PAGE - 1);
		struct uffdio_copy copy = { .dst = address, .src = (uintptr_t)page, .len = PAGE };

		if (message.event != UFFD_EVENT_PAGEFAULT)
			break;
		area_content(own->area, (address - (uintptr_t)own->area->at) / PAGE, 3, page);
		if (ioctl(own->fd, UFFDIO_COPY, &copy) != 0 && errno != EEXIST)
			break;
		if (++own->answered == own->area->pages)
			break;
	}
	return NULL;
}

static void own_userfaultfd(bool managed_before)
{
	struct area area = managed_before ? area_make(AREA_PAGES) : area_map(AREA_PAGES);
	struct uffdio_register range = range_of(&area, 0, area.pages, UFFDIO_REGISTER_MODE_MISSING);
	struct own_faults own = { .area = &area, .fd = userfaultfd_make(0) };
	pthread_t thread;

	must_call(ioctl(own.fd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
	if (managed_before)
		area_check(&area, 0, area.pages, 0, "what was there");
	must_call(madvise(area.at, area.pages * PAGE, MADV_DONTNEED) == 0, "DONTNEED");
	must(pthread_create(&thread, NULL, answer_faults, &own) == 0, "no thread");
	area_check(&area, 0, HALF, 3, "answered by the program");
	page_out_try();
	area_check(&area, 0, area.pages, 3, "answered by the program, after eviction was tried");
	pthread_join(thread, NULL);
	must(own.answered == area.pages, "%u of %zu faults were the program's", own.answered, area.pages);
	close(own.fd);
	page_out(area.at, area.pages);
	area_check(&area, 0, area.pages, 3, "without userfaultfd, out and back");
	area_free(&area);
}

static void own_userfaultfd_fresh(void) { own_userfaultfd(false); }
static void own_userfaultfd_while_out(void) { own_userfaultfd(true); }

/* ---- by other ways, and of a part ---- */

static void own_userfaultfd_by_syscall(void)
{
	struct area area = area_make(AREA_PAGES);
	struct uffdio_register range = range_of(&area, 0, area.pages, UFFDIO_REGISTER_MODE_WP);
	int fd = userfaultfd_make(UFFD_FEATURE_PAGEFAULT_FLAG_WP);

	must_call(syscall(SYS_ioctl, fd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
	area_check(&area, 0, area.pages, 0, "registered by syscall()");
	must(syscall(SYS_ioctl, -1, UFFDIO_REGISTER, &range) == -1 && errno == EBADF, "no EBADF");
	close(fd);
	area_free(&area);
}

/* Its neighbours go out as before, and all of it does once it is unregistered. */
static void own_userfaultfd_of_a_part(void)
{
	struct area area = area_make(3 * PART);
	struct uffdio_range part = range_of(&area, PART, PART, 0).range;
	int fd = watch(&area, PART, PART);

	page_out(area.at, PART);
	page_out(area_page(&area, 2 * PART), PART);
	must(!is_managed() || pages_present(area_page(&area, PART), PART) > 0, "what is the program's was evicted");
	area_write(&area, PART, PART / 2, 1);
	page_out_try();
	area_check(&area, 0, PART, 0, "below");
	area_check(&area, PART, PART / 2, 1, "registered, written to");
	area_check(&area, PART + PART / 2, PART - PART / 2, 0, "registered");
	area_check(&area, 2 * PART, PART, 0, "above");
	must_call(ioctl(fd, UFFDIO_UNREGISTER, &part) == 0, "UFFDIO_UNREGISTER");
	page_out(area.at, area.pages);
	area_check(&area, PART, PART / 2, 1, "unregistered, out and back");
	area_check(&area, 2 * PART, PART, 0, "above, out and back");
	close(fd);
	area_free(&area);
}

/* A second time with the same descriptor, and more of it: what is registered already stays so. */
static void own_userfaultfd_extended(void)
{
	struct area area = area_make(AREA_PAGES);
	struct uffdio_register all = range_of(&area, 0, area.pages, UFFDIO_REGISTER_MODE_WP);
	int fd = watch(&area, PART, PART);
	int other;

	area_write(&area, PART, 1, 1);
	bring_out(area.at, PART);
	must_call(ioctl(fd, UFFDIO_REGISTER, &all) == 0, "UFFDIO_REGISTER of all of it");
	area_check(&area, 0, PART, 0, "registered later");
	area_check(&area, PART, 1, 1, "registered first, written to");
	area_check(&area, PART + 1, area.pages - PART - 1, 0, "the rest");
	other = userfaultfd_make(UFFD_FEATURE_PAGEFAULT_FLAG_WP);
	must(ioctl(other, UFFDIO_REGISTER, &all) == -1 && errno == EBUSY, "two descriptors have the same memory");
	area_check(&area, PART, 1, 1, "after EBUSY");
	close(other);
	close(fd);
	area_free(&area);
}

/* ---- protected pages ---- */

struct protected_write {
	int fd;
	volatile bool is_answered;
};

static void *answer_write(void *argument)
{
	struct protected_write *write = argument;
	struct uffd_msg message;
	struct uffdio_writeprotect protection = { .range.len = PAGE };

	if (read(write->fd, &message, sizeof message) != (ssize_t)sizeof message ||
	    message.event != UFFD_EVENT_PAGEFAULT || !(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP))
		return NULL;
	protection.range.start = message.arg.pagefault.address & ~(PAGE - 1);
	write->is_answered = true;
	(void)ioctl(write->fd, UFFDIO_WRITEPROTECT, &protection);
	return NULL;
}

/* Protection is the program's alone: nothing of ours is left of it, and nothing of ours takes it away. */
static void own_userfaultfd_protects(void)
{
	struct area area = area_make(AREA_PAGES);
	struct protected_write write = { .fd = watch(&area, 0, area.pages) };
	struct uffdio_writeprotect protection = { .range = { (uintptr_t)area_page(&area, 7), PAGE },
						  .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	pthread_t thread;

	area_write(&area, 0, 7, 1); /* not protected: no fault of the program's */
	must_call(ioctl(write.fd, UFFDIO_WRITEPROTECT, &protection) == 0, "UFFDIO_WRITEPROTECT");
	page_out_try();
	must(pthread_create(&thread, NULL, answer_write, &write) == 0, "no thread");
	area_check(&area, 7, 1, 0, "protected, read");
	area_write(&area, 7, 1, 1);
	pthread_join(thread, NULL);
	must(write.is_answered, "a write to a protected page was not the program's to answer");
	area_check(&area, 0, 8, 1, "written to");
	area_check(&area, 8, area.pages - 8, 0, "left alone");
	close(write.fd);
	area_free(&area);
}

/* ---- with relatives and threads ---- */

/* The child, whose pages are its parent's slots, registers them; then the parent does. */
static void own_userfaultfd_in_child(void)
{
	struct area area = area_make(AREA_PAGES);
	pid_t pid = fork();
	int fd;

	must_call(pid >= 0, "fork");
	if (pid == 0) {
		fd = watch(&area, 0, area.pages);
		area_check(&area, 0, area.pages, 0, "registered");
		area_write(&area, 0, HALF, 1);
		area_check(&area, 0, HALF, 1, "registered, written to");
		close(fd);
		page_out_try();
		area_check(&area, 0, HALF, 1, "written to");
		area_check(&area, HALF, area.pages - HALF, 0, "left alone");
		child_done();
	}
	wait_for(pid, 0, "child");
	fd = watch(&area, 0, area.pages);
	area_check(&area, 0, area.pages, 0, "registered after the child");
	close(fd);
	area_free(&area);
}

/* A child does not inherit the registration, as the program does not ask for fork events: it is managed anew. */
static void own_userfaultfd_before_fork(void)
{
	struct area area = area_make(AREA_PAGES);
	int fd = watch(&area, 0, area.pages);
	pid_t pid;

	area_write(&area, 0, HALF, 1);
	pid = fork();
	must_call(pid >= 0, "fork");
	if (pid == 0) {
		area_check(&area, 0, HALF, 1, "written to before the fork");
		area_write(&area, HALF, 1, 2);
		page_out_try();
		area_check(&area, 0, HALF, 1, "after eviction was tried");
		area_check(&area, HALF, 1, 2, "written to by the child");
		area_check(&area, HALF + 1, area.pages - HALF - 1, 0, "left alone");
		child_done();
	}
	page_out_try();
	area_check(&area, 0, HALF, 1, "beside the child");
	wait_for(pid, 0, "child");
	area_check(&area, HALF, area.pages - HALF, 0, "after the child");
	close(fd);
	area_free(&area);
}

static void *watch_and_check(void *argument)
{
	const struct area *area = argument;

	for (unsigned i = 0; i < 3; i++) {
		int fd = watch(area, 0, area->pages);

		area_check(area, 0, area->pages, 0, "registered by one of several threads");
		close(fd);
	}
	return NULL;
}

static void own_userfaultfd_by_threads(void)
{
	struct area areas[THREADS];
	pthread_t threads[THREADS];

	for (unsigned i = 0; i < THREADS; i++)
		areas[i] = area_make(PART);
	for (unsigned i = 0; i < THREADS; i++)
		must(pthread_create(&threads[i], NULL, watch_and_check, &areas[i]) == 0, "no thread");
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	for (unsigned i = 0; i < THREADS; i++)
		area_free(&areas[i]);
}

const struct row userfaultfd_rows[] = {
	{ "own_userfaultfd_fresh", own_userfaultfd_fresh, ROW_BOTH },
	{ "own_userfaultfd_while_out", own_userfaultfd_while_out, ROW_OWN },
	{ "own_userfaultfd_by_syscall", own_userfaultfd_by_syscall, 0 },
	{ "own_userfaultfd_of_a_part", own_userfaultfd_of_a_part, 0 },
	{ "own_userfaultfd_extended", own_userfaultfd_extended, 0 },
	{ "own_userfaultfd_protects", own_userfaultfd_protects, 0 },
	{ "own_userfaultfd_in_child", own_userfaultfd_in_child, 0 },
	{ "own_userfaultfd_before_fork", own_userfaultfd_before_fork, 0 },
	{ "own_userfaultfd_by_threads", own_userfaultfd_by_threads, ROW_OWN },
	{ NULL, NULL, 0 },
};
