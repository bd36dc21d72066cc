/* SPDX-License-Identifier: MIT */
/*
 * test_work — who is asked for work, and where it runs.
 *
 * Build: tests/csrc/test_work.c csrc/work.c csrc/awake.c csrc/sys.c csrc/fault_point.c csrc/base.c; -Icsrc; threads
 */
#define _GNU_SOURCE
#include <sched.h>
#include <unistd.h>

#include "awake.h"
#include "base.h"
#include "check.h"
#include "sys.h"
#include "work.h"

#define THREADS 3u
#define PATIENCE_NS 20000000000ULL
#define QUIET_US 20000 /* nothing that is wrong comes later than that, mostly */
#define FOREVER_MS 60000

/* ---- work ---- */

static struct {
	struct work work;
	bool stopping;
	unsigned turns; /* in all: how often one of them was asked */
	unsigned held;  /* those that are at work until it is 0 */
	bool hold;
} office;

static void *worker(void *argument)
{
	uint64_t seen = 0;

	(void)argument;
	while (!READ_ONCE(office.stopping)) {
		work_wait(&office.work, &seen, &office.stopping, FOREVER_MS);
		if (READ_ONCE(office.stopping))
			break;
		__atomic_fetch_add(&office.turns, 1, __ATOMIC_SEQ_CST);
		__atomic_fetch_add(&office.held, 1, __ATOMIC_SEQ_CST);
		while (READ_ONCE(office.hold))
			usleep(100);
		__atomic_fetch_sub(&office.held, 1, __ATOMIC_SEQ_CST);
	}
	return NULL;
}

static unsigned waiting(void)
{
	SCOPED_LOCK(&office.work.lock);
	return office.work.waiting;
}

static void until_waiting(unsigned count)
{
	uint64_t end_ns = test_now_ns() + PATIENCE_NS;

	while (waiting() != count) {
		CHECK(test_now_ns() < end_ns);
		usleep(100);
	}
}

/* One is at work, and stays there. */
static void until_held(void)
{
	uint64_t end_ns = test_now_ns() + PATIENCE_NS;

	while (READ_ONCE(office.held) != 1) {
		CHECK(test_now_ns() < end_ns);
		usleep(100);
	}
}

/* So many turns in all since the last call, and no more. */
static void expect_turns(unsigned count)
{
	uint64_t end_ns = test_now_ns() + PATIENCE_NS;

	while (READ_ONCE(office.turns) < count) {
		CHECK(test_now_ns() < end_ns);
		usleep(100);
	}
	until_waiting(THREADS);
	usleep(QUIET_US);
	CHECK(waiting() == THREADS && __atomic_exchange_n(&office.turns, 0, __ATOMIC_SEQ_CST) == count);
}

static void test_who_is_asked(void)
{
	pthread_t threads[THREADS];

	work_init(&office.work);
	for (unsigned i = 0; i < THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, worker, NULL) == 0);
	until_waiting(THREADS);

	work_ask_one(&office.work, THREADS);
	expect_turns(1);

	/* The others do not know of the first request, and have their turn now. */
	work_ask(&office.work);
	expect_turns(THREADS);

	/* While one is at work nobody else is asked, and it has a turn more for all that came meanwhile. */
	WRITE_ONCE(office.hold, true);
	work_ask_one(&office.work, THREADS);
	until_held();
	work_ask_one(&office.work, THREADS);
	work_ask_one(&office.work, THREADS);
	usleep(QUIET_US);
	CHECK(waiting() == THREADS - 1 && READ_ONCE(office.held) == 1);
	WRITE_ONCE(office.hold, false);
	expect_turns(2);

	WRITE_ONCE(office.stopping, true);
	work_ask(&office.work);
	for (unsigned i = 0; i < THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
}

static void test_a_wait_ends(void)
{
	struct work work;
	uint64_t seen = 0, began_ns = test_now_ns();
	bool stopping = false;

	work_init(&work);
	work_wait(&work, &seen, &stopping, 5);
	CHECK(test_now_ns() - began_ns >= 5000000 && seen == 0);
	work_ask_one(&work, 1); /* nobody waits: it is not lost */
	work_wait(&work, &seen, &stopping, FOREVER_MS);
	CHECK(seen == 1);
	stopping = true;
	work_wait(&work, &seen, &stopping, FOREVER_MS);
}

/* ---- awake ---- */

/* Faults come one upon the other on this CPU, until the thread of the other one runs. */
static void fault_until_awake(struct awake *awake, unsigned cpu, unsigned other)
{
	uint64_t end_ns = test_now_ns() + PATIENCE_NS;

	while (READ_ONCE(awake->threads[other].asleep)) {
		CHECK(test_now_ns() < end_ns);
		awake_note(awake, sys_now_ns(), cpu);
	}
}

/* Faults go on on this CPU until its thread sleeps. False when there was a pause between two of them: that says nothing. */
static bool fault_until_asleep(struct awake *awake, unsigned cpu)
{
	uint64_t end_ns = test_now_ns() + PATIENCE_NS, before_ns = sys_now_ns(), now_ns;
	bool paused = false;

	do {
		now_ns = sys_now_ns();
		CHECK(now_ns < end_ns);
		paused |= now_ns - before_ns >= AWAKE_NS;
		awake_note(awake, now_ns, cpu);
		before_ns = now_ns;
	} while (!READ_ONCE(awake->threads[cpu].asleep));
	return !paused && sys_now_ns() - before_ns < AWAKE_NS;
}

static void until_asleep(struct awake *awake)
{
	uint64_t end_ns = test_now_ns() + PATIENCE_NS;

	while (!READ_ONCE(awake->threads[0].asleep) || !READ_ONCE(awake->threads[1].asleep)) {
		CHECK(test_now_ns() < end_ns);
		usleep(1000);
	}
}

static void test_who_is_kept_awake(void)
{
	struct awake awake;
	uint64_t now_ns;

	awake_start(&awake, 2);
	CHECK(awake.count == 2);
	until_asleep(&awake);

	fault_until_awake(&awake, 0, 1);
	CHECK(READ_ONCE(awake.threads[0].asleep));
	now_ns = sys_now_ns();
	awake_note(&awake, now_ns, 0);
	CHECK(awake_busy_cpus(&awake, now_ns) == 1);
	CHECK(awake_busy_cpus(&awake, now_ns + AWAKE_BUSY_NS) == 0);
	until_asleep(&awake);

	fault_until_awake(&awake, 1, 0);
	now_ns = sys_now_ns();
	awake_note(&awake, now_ns, 1);
	CHECK(awake_busy_cpus(&awake, now_ns) & 2);
	usleep(2 * AWAKE_BUSY_NS / 1000);
	until_asleep(&awake);

	/* On none of them: both. */
	fault_until_awake(&awake, AWAKE_CPU_NONE, 0);
	fault_until_awake(&awake, AWAKE_CPU_NONE, 1);
	CHECK(awake_busy_cpus(&awake, sys_now_ns()) == 0);

	/* One that runs where faults come from now on goes to sleep, for all that they go on. */
	until_asleep(&awake);
	fault_until_awake(&awake, AWAKE_CPU_NONE, 0);
	for (uint64_t end_ns = test_now_ns() + PATIENCE_NS; !fault_until_asleep(&awake, 0);) {
		CHECK(test_now_ns() < end_ns);
		fault_until_awake(&awake, AWAKE_CPU_NONE, 0);
	}
	awake_stop(&awake);
}

/* ---- where a thread runs ---- */

static cpu_set_t allowed_now(void)
{
	cpu_set_t set;

	CHECK(sched_getaffinity(0, sizeof set, &set) == 0);
	return set;
}

static void test_who_keeps_off(void)
{
	cpu_set_t all = allowed_now(), now;
	unsigned cpu = 0;

	while (!CPU_ISSET(cpu, &all))
		cpu++;
	CHECK(cpu < 64);
	sys_keep_off_cpus(1ULL << cpu);
	now = allowed_now();
	CHECK(CPU_COUNT(&all) == 1 ? CPU_EQUAL(&now, &all)
				   : !CPU_ISSET(cpu, &now) && CPU_COUNT(&now) == CPU_COUNT(&all) - 1);
	sys_keep_off_cpus(~0ULL); /* there would be none left, on a machine with 64 */
	now = allowed_now();
	CHECK(CPU_COUNT(&now) > 0 && (CPU_COUNT(&all) > 64 || CPU_EQUAL(&now, &all)));
	sys_keep_off_cpus(0);
	now = allowed_now();
	CHECK(CPU_EQUAL(&now, &all));
}

/* Spins, and says how long it had to wait for its CPU meanwhile. */
static void *spin(void *argument)
{
	uint64_t *waited_ns = argument, before_ns, end_ns = test_now_ns() + 100000000;

	sys_pin_this_thread((unsigned)sched_getcpu());
	CHECK(sys_thread_waited_ns(&before_ns) == 0);
	while (test_now_ns() < end_ns)
		;
	CHECK(sys_thread_waited_ns(waited_ns) == 0 && *waited_ns >= before_ns);
	*waited_ns -= before_ns;
	return NULL;
}

static void test_who_waits_for_a_cpu(void)
{
	cpu_set_t all = allowed_now();
	uint64_t waited_ns[2] = { 0 };
	pthread_t threads[2];

	sys_pin_this_thread((unsigned)sched_getcpu()); /* and the two that it starts */
	for (unsigned i = 0; i < 2; i++)
		CHECK(pthread_create(&threads[i], NULL, spin, &waited_ns[i]) == 0);
	for (unsigned i = 0; i < 2; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK(sched_setaffinity(0, sizeof all, &all) == 0);
	CHECK(waited_ns[0] + waited_ns[1] > 50000000 && waited_ns[0] + waited_ns[1] < PATIENCE_NS);
}

int main(void)
{
	test_who_is_asked();
	test_a_wait_ends();
	test_who_is_kept_awake();
	test_who_keeps_off();
	test_who_waits_for_a_cpu();
	return 0;
}
