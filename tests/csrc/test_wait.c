/* SPDX-License-Identifier: MIT */
/*
 * test_wait — waiting for an agent whose ring is its own: it may answer, end, or wake us for nothing.
 *
 * Build: tests/csrc/test_wait.c and the data plane; -Icsrc; threads
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base.h"
#include "check.h"
#include "client.h"
#include "sys.h"

#define WAIT_MS 100u
#define ANSWER_AFTER_US 20000

static struct vswap_ring ring;
static bool wakes_for_nothing;

static void *wake_for_nothing(void *argument)
{
	(void)argument;
	while (READ_ONCE(wakes_for_nothing))
		sys_futex_wake(&ring.done);
	return NULL;
}

static void *answer(void *argument)
{
	(void)argument;
	usleep(ANSWER_AFTER_US);
	__atomic_store_n(&ring.done, 1, __ATOMIC_SEQ_CST);
	sys_futex_wake(&ring.done);
	return NULL;
}

/* Its own CPU or not: whoever is woken again and again looks at the time. */
static void test_woken_for_nothing(struct client *client)
{
	pthread_t thread;
	uint64_t since = test_now_ns();

	WRITE_ONCE(wakes_for_nothing, true);
	CHECK(pthread_create(&thread, NULL, wake_for_nothing, NULL) == 0);
	CHECK(client_wait(client, 0, WAIT_MS) == -ETIMEDOUT);
	CHECK(test_now_ns() - since >= WAIT_MS * 1000000ULL);
	WRITE_ONCE(wakes_for_nothing, false);
	CHECK(pthread_join(thread, NULL) == 0);
}

static void test_answer(struct client *client)
{
	pthread_t thread;

	CHECK(client_answer(client, 0) == -ETIMEDOUT);
	CHECK(pthread_create(&thread, NULL, answer, NULL) == 0);
	CHECK(client_wait(client, 0, 60000) == 0 && client_answer(client, 0) == 0);
	CHECK(client_wait(client, 1, 0) == -ETIMEDOUT); /* the next one */
	CHECK(pthread_join(thread, NULL) == 0);
}

static void test_end(struct client *client, pid_t child)
{
	CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
	CHECK(client_answer(client, 1) == -EPIPE && client_wait(client, 1, 60000) == -EPIPE);
	CHECK(client_answer(client, 0) == 0); /* it was answered before */
}

int main(void)
{
	struct client *client = calloc(1, sizeof *client);
	pid_t child = fork();

	CHECK(client && child >= 0);
	if (child == 0)
		for (;;)
			pause();
	alarm(60); /* of one that waits for ever */
	client->ring = &ring;
	client->pidfd = sys_pidfd(child);
	CHECK(client->pidfd >= 0);
	test_woken_for_nothing(client);
	test_answer(client);
	test_end(client, child);
	CHECK(close(client->pidfd) == 0);
	free(client);
	return 0;
}
