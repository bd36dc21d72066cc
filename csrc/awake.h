/* SPDX-License-Identifier: MIT */
/*
 * awake — keep idle CPUs from halting while faults come one upon the other.
 *
 * A CPU of a virtual machine that has nothing to do halts, and to get it back takes its hypervisor ten to forty microseconds:
 * more than the whole fault, which wakes a thread twice. So while less than AWAKE_NS lie between two faults, one thread per CPU
 * runs at SCHED_IDLE: anything else of its control group that wants the CPU has it at once; where others have had it for a
 * while, the thread rests. Not on the CPU where the faults are: it has enough to do, and one thread more that could run there
 * makes each switch between the others dearer. docs/decisions/0013 has the figures, and where they have not been reached. With
 * more than AWAKE_CPUS_MAX CPUs it is not done: most of them would burn for nothing.
 *
 * Threads    awake_note: any. The rest: whoever owns the struct, one at a time.
 */
#ifndef VSWAP_AWAKE_H
#define VSWAP_AWAKE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#define AWAKE_CPUS_MAX 4
#define AWAKE_CPU_NONE UINT32_MAX
#define AWAKE_NS 200000
#define AWAKE_BUSY_NS 2000000 /* since the last of them */

struct awake {
	uint64_t noted_ns; /* the last fault */
	bool stopping;
	unsigned count;
	struct awake_thread {
		struct awake *awake;
		pthread_t thread;
		unsigned cpu;     /* its index, too */
		uint32_t asleep;  /* futex; 0: called */
		uint64_t busy_ns; /* the last fault of a thread that runs on this CPU */
	} threads[AWAKE_CPUS_MAX];
};

/* Start the threads, where they are of use. What cannot be started is not missed. */
void awake_start(struct awake *awake, unsigned cpu_count);
/* A fault has come, at `now_ns`, of a thread that runs on `cpu` and will have the next one soon. AWAKE_CPU_NONE: that need
 * not be soon, and the CPU is free for others meanwhile. */
void awake_note(struct awake *awake, uint64_t now_ns, unsigned cpu);
/* CPUs on which faults come one upon the other, a mask. What need not run there does better elsewhere. */
uint64_t awake_busy_cpus(const struct awake *awake, uint64_t now_ns);
/* End the threads and wait for them. */
void awake_stop(struct awake *awake);

#endif
