/* SPDX-License-Identifier: MIT */
/*
 * puppet — a client that does to its memory what it is told, so that a test knows what every page must be.
 *
 *   puppet SOCKET PAGES
 *
 * It maps PAGES pages, connects to SOCKET and says "puppet PID ADDRESS". Then it obeys, a line at a time; each is answered by one
 * line, "ok" or what was wrong. Pages are numbered from 0; `every` EVERY-th of COUNT pages from FIRST on.
 *
 *   write KIND SEED FIRST COUNT EVERY   KIND: zero same text random; content is a function of kind, seed and page
 *   check KIND SEED FIRST COUNT EVERY   every byte; "wrong PAGE"
 *   discard FIRST COUNT                 MADV_DONTNEED: zeros from now on
 *   unmap FIRST COUNT, remap FIRST COUNT: another mapping in the same place, zeros, too
 *   fork                                the child connects to SOCKET like its parent did
 *   exit
 *
 * Nothing but the pages is in memory that is managed: state is on the stack. The process that was started is none of them: it
 * waits for all that come of it, so that any may end first.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / sizeof(uint64_t))

static uint8_t *memory;
static uint64_t page_count;

static uint64_t mix(uint64_t value)
{
	value += 0x9e3779b97f4a7c15u;
	value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
	value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
	return value ^ (value >> 31);
}

/* Word `i` of a page. */
static uint64_t word_of(char kind, uint64_t seed, uint64_t page, uint64_t i)
{
	uint64_t base = mix(seed * 1000003 + page);

	switch (kind) {
	case 'z': return 0;
	case 's': return base | 1;
	case 't': return i % 8 == 0 ? mix(base + i) : base + i / 32; /* several times smaller */
	default: return mix(base + i);
	}
}

static void page_write(char kind, uint64_t seed, uint64_t page)
{
	uint64_t *words = (uint64_t *)(void *)(memory + page * PAGE);

	for (uint64_t i = 0; i < WORDS; i++)
		words[i] = word_of(kind, seed, page, i);
}

static int page_is_right(char kind, uint64_t seed, uint64_t page)
{
	const uint64_t *words = (const uint64_t *)(const void *)(memory + page * PAGE);

	for (uint64_t i = 0; i < WORDS; i++)
		if (words[i] != word_of(kind, seed, page, i))
			return 0;
	return 1;
}

/* ---- the connection ---- */

static void say(int fd, const char *line)
{
	(void)!write(fd, line, strlen(line));
}

/* False at the end of the connection. */
static int hear(int fd, char *line, size_t size)
{
	size_t length = 0;

	while (length + 1 < size && read(fd, line + length, 1) == 1)
		if (line[length++] == '\n') {
			line[length - 1] = '\0';
			return 1;
		}
	return 0;
}

static int connect_to(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char line[64];
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
		_exit(1);
	snprintf(line, sizeof line, "puppet %d %llu\n", getpid(), (unsigned long long)(uintptr_t)memory);
	say(fd, line);
	return fd;
}

/* ---- obeying ---- */

static void obey_pages(int fd, const char *line, int writes)
{
	unsigned long long seed, first, count, every;
	char kind[16], reply[64] = "ok\n";

	if (sscanf(line, "%*s %15s %llu %llu %llu %llu", kind, &seed, &first, &count, &every) != 5 || every == 0 ||
	    first + count > page_count) {
		say(fd, "what?\n");
		return;
	}
	for (uint64_t page = first; page < first + count; page += every) {
		if (writes)
			page_write(kind[0], seed, page);
		else if (!page_is_right(kind[0], seed, page)) {
			snprintf(reply, sizeof reply, "wrong %llu\n", (unsigned long long)page);
			break;
		}
	}
	say(fd, reply);
}

static void obey_range(int fd, const char *line)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	unsigned long long first, count;
	uint8_t *start;
	size_t bytes;
	int result = 0;

	if (sscanf(line, "%*s %llu %llu", &first, &count) != 2 || count == 0 || first + count > page_count) {
		say(fd, "what?\n");
		return;
	}
	start = memory + first * PAGE;
	bytes = count * PAGE;
	if (line[0] == 'd')
		result = madvise(start, bytes, MADV_DONTNEED);
	else if (line[0] == 'u')
		result = munmap(start, bytes);
	else
		result = mmap(start, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == start ? 0 : -1;
	say(fd, result == 0 ? "ok\n" : "failed\n");
}

static void wait_for_all(void)
{
	while (wait(NULL) > 0 || errno == EINTR)
		;
}

int main(int argc, char **argv)
{
	char line[256];
	int fd = open("/dev/null", O_RDWR);

	if (argc != 3 || fd < 0)
		return 2;
	dup2(fd, STDIN_FILENO); /* whoever reads what drive says sees its end */
	dup2(fd, STDOUT_FILENO);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	if (fork() > 0) {
		wait_for_all();
		return 0;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGCHLD, SIG_IGN);
	page_count = strtoull(argv[2], NULL, 10);
	memory = mmap(NULL, page_count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	madvise(memory, page_count * PAGE, MADV_NOHUGEPAGE);
	fd = connect_to(argv[1]);
	while (hear(fd, line, sizeof line)) {
		if (strncmp(line, "write ", 6) == 0 || strncmp(line, "check ", 6) == 0) {
			obey_pages(fd, line, line[0] == 'w');
		} else if (strcmp(line, "fork") == 0) {
			if (fork() == 0) {
				close(fd);
				fd = connect_to(argv[1]);
				continue;
			}
			say(fd, "ok\n");
		} else if (strcmp(line, "exit") == 0) {
			break;
		} else {
			obey_range(fd, line);
		}
	}
	return 0;
}
