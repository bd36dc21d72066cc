/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "awake.h"

#include <sched.h>

#include "base.h"
#include "sys.h"

#define SLEEP_MS 60000
#define WANTED_NS 2000000 /* others had the CPU for longer than an eviction takes it */
#define REST_MS 50
#define PAUSES 64 /* between two looks at the clock: some microseconds */

static bool is_wanted(const struct awake_thread *self, uint64_t now_ns)
{
	return now_ns < __atomic_load_n(&self->awake->noted_ns, __ATOMIC_SEQ_CST) + AWAKE_NS &&
	       now_ns >= READ_ONCE(self->busy_ns) + AWAKE_NS;
}

static void sleep_until_called(struct awake_thread *self)
{
	__atomic_store_n(&self->asleep, 1, __ATOMIC_SEQ_CST);
	/* Again, for a call in between found nobody asleep. */
	if (!is_wanted(self, sys_now_ns()) && !__atomic_load_n(&self->awake->stopping, __ATOMIC_SEQ_CST))
		(void)sys_futex_wait(&self->asleep, 1, SLEEP_MS);
	__atomic_store_n(&self->asleep, 0, __ATOMIC_SEQ_CST);
}

static void call(struct awake_thread *thread)
{
	if (__atomic_load_n(&thread->asleep, __ATOMIC_SEQ_CST) &&
	    __atomic_exchange_n(&thread->asleep, 0, __ATOMIC_SEQ_CST))
		sys_futex_wake(&thread->asleep);
}

static void *awake_main(void *argument)
{
	struct awake_thread *self = argument;
	const struct sched_param parameters = { 0 };
	uint64_t spun_ns = 0; /* when it last did, without a sleep since; 0: never */

	name_this_thread("vswap-awake");
	sys_pin_this_thread(self->cpu);
	/* Without it this would take the CPU from others. */
	if (sched_setscheduler(0, SCHED_IDLE, &parameters) < 0)
		return NULL;
	while (!__atomic_load_n(&self->awake->stopping, __ATOMIC_SEQ_CST)) {
		uint64_t now_ns = sys_now_ns();

		if (!is_wanted(self, now_ns)) {
			sleep_until_called(self);
			spun_ns = 0;
		} else if (spun_ns && now_ns > spun_ns + WANTED_NS) {
			/* It does not halt anyway, and in a control group of its own this would have its share of it. */
			sys_sleep_ms(REST_MS);
			spun_ns = 0;
		} else {
			spun_ns = now_ns;
			for (unsigned i = 0; i < PAUSES; i++)
				sys_pause_cpu();
		}
	}
	return NULL;
}

void awake_start(struct awake *awake, unsigned cpu_count)
{
	pthread_attr_t attributes;

	*awake = (struct awake){ 0 };
	if (cpu_count < 2 || cpu_count > AWAKE_CPUS_MAX)
		return;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 64 * 1024);
	for (unsigned cpu = 0; cpu < cpu_count; cpu++) {
		struct awake_thread *thread = &awake->threads[awake->count];

		*thread = (struct awake_thread){ .awake = awake, .cpu = cpu };
		if (pthread_create(&thread->thread, &attributes, awake_main, thread) != 0)
			break;
		awake->count++;
	}
	pthread_attr_destroy(&attributes);
}

void awake_note(struct awake *awake, uint64_t now_ns, unsigned cpu)
{
	uint64_t before_ns = __atomic_exchange_n(&awake->noted_ns, now_ns, __ATOMIC_SEQ_CST);

	if (cpu < awake->count)
		WRITE_ONCE(awake->threads[cpu].busy_ns, now_ns);
	for (unsigned i = 0; i < awake->count && now_ns < before_ns + AWAKE_NS; i++)
		if (i != cpu)
			call(&awake->threads[i]);
}

uint64_t awake_busy_cpus(const struct awake *awake, uint64_t now_ns)
{
	uint64_t cpus = 0;

	for (unsigned i = 0; i < awake->count; i++)
		if (now_ns < READ_ONCE(awake->threads[i].busy_ns) + AWAKE_BUSY_NS)
			cpus |= 1ULL << i;
	return cpus;
}

void awake_stop(struct awake *awake)
{
	__atomic_store_n(&awake->stopping, true, __ATOMIC_SEQ_CST);
	for (unsigned i = 0; i < awake->count; i++)
		call(&awake->threads[i]);
	for (unsigned i = 0; i < awake->count; i++)
		pthread_join(awake->threads[i].thread, NULL);
	awake->count = 0;
}
