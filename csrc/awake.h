/* SPDX-License-Identifier: MIT */
/*
 * awake — keep idle CPUs from halting while faults come one upon the other.
 *
 * A CPU of a virtual machine that has nothing to do halts, and to get it back takes its hypervisor ten to forty microseconds:
 * more than the whole fault, which wakes a thread twice. So while less than AWAKE_NS lie between two faults, one thread per CPU
 * runs at SCHED_IDLE: anything else of its control group that wants the CPU has it at once; where others have had it for a
 * while, the thread rests. docs/decisions/0013 has the figures, and where they have not been reached. With more than
 * AWAKE_CPUS_MAX CPUs it is not done: most of them would burn for nothing.
 *
 * Threads    awake_note: any. The rest: whoever owns the struct, one at a time.
 */
#ifndef VSWAP_AWAKE_H
#define VSWAP_AWAKE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define AWAKE_CPUS_MAX 4
#define AWAKE_NS 200000

struct awake {
	uint64_t noted_ns; /* the last fault */
	uint32_t calls;    /* futex: those who sleep are called */
	uint32_t asleep;   /* threads that do, or are about to */
	bool stopping;
	unsigned count;
	struct awake_thread {
		struct awake *awake;
		unsigned cpu;
		pthread_t thread;
	} threads[AWAKE_CPUS_MAX];
};

/* Start the threads, where they are of use. What cannot be started is not missed. */
void awake_start(struct awake *awake, unsigned cpu_count);
/* A fault has come, at `now_ns`. */
void awake_note(struct awake *awake, uint64_t now_ns);
/* End the threads and wait for them. */
void awake_stop(struct awake *awake);

#endif
