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

static void pause_cpu(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

static void sleep_until_called(struct awake *awake, uint32_t calls)
{
	__atomic_fetch_add(&awake->asleep, 1, __ATOMIC_SEQ_CST);
	(void)sys_futex_wait(&awake->calls, calls, SLEEP_MS);
	__atomic_fetch_sub(&awake->asleep, 1, __ATOMIC_SEQ_CST);
}

static void *awake_main(void *argument)
{
	const struct awake_thread *self = argument;
	struct awake *awake = self->awake;
	const struct sched_param parameters = { 0 };
	uint64_t spun_ns = 0; /* when it last did, without a sleep since; 0: never */

	name_this_thread("vswap-awake");
	sys_pin_this_thread(self->cpu);
	/* Without it this would take the CPU from others. */
	if (sched_setscheduler(0, SCHED_IDLE, &parameters) < 0)
		return NULL;
	for (;;) {
		uint32_t calls = __atomic_load_n(&awake->calls, __ATOMIC_SEQ_CST);
		uint64_t noted_ns = __atomic_load_n(&awake->noted_ns, __ATOMIC_SEQ_CST), now_ns = sys_now_ns();

		if (__atomic_load_n(&awake->stopping, __ATOMIC_SEQ_CST))
			return NULL;
		if (now_ns >= noted_ns + AWAKE_NS) {
			sleep_until_called(awake, calls);
			spun_ns = 0;
		} else if (spun_ns && now_ns > spun_ns + WANTED_NS) {
			/* It does not halt anyway, and in a control group of its own this would have its share of it. */
			sys_sleep_ms(REST_MS);
			spun_ns = 0;
		} else {
			spun_ns = now_ns;
			for (unsigned i = 0; i < PAUSES; i++)
				pause_cpu();
		}
	}
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
		if (pthread_create(&thread->thread, &attributes, awake_main, thread) == 0)
			awake->count++;
	}
	pthread_attr_destroy(&attributes);
}

void awake_note(struct awake *awake, uint64_t now_ns)
{
	uint64_t before_ns = __atomic_exchange_n(&awake->noted_ns, now_ns, __ATOMIC_SEQ_CST);

	if (now_ns < before_ns + AWAKE_NS && __atomic_load_n(&awake->asleep, __ATOMIC_SEQ_CST) > 0) {
		__atomic_fetch_add(&awake->calls, 1, __ATOMIC_SEQ_CST);
		sys_futex_wake(&awake->calls);
	}
}

void awake_stop(struct awake *awake)
{
	__atomic_store_n(&awake->stopping, true, __ATOMIC_SEQ_CST);
	__atomic_fetch_add(&awake->calls, 1, __ATOMIC_SEQ_CST);
	sys_futex_wake(&awake->calls);
	for (unsigned i = 0; i < awake->count; i++)
		pthread_join(awake->threads[i].thread, NULL);
	awake->count = 0;
}
