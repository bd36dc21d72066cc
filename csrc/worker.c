/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "worker.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "awake.h"
#include "base.h"
#include "engine_internal.h"
#include "fill.h"
#include "sys.h"

#define RETRY_MS 1
#define STACK_BYTES (128 * 1024)
#define STAND_BY_MS 60000
#define CPU_UNKNOWN (-1)
#define GENTLE_TURNS 128
#define GENTLE_WAIT_NS 10000 /* a turn: more than the program mostly takes between two faults */
#define GENTLE_REST_NS 64000000ULL
#define PAUSE_MS 1
#define SHUT_PAUSE_MS_MAX 16u /* while an agent does not answer, which may be for hours */
#define GATE_SPIN_NS 150000 /* longer than a MOVE of 64 scattered pages */

/* So many faults are looked at before it is decided again who waits. One thread faults when at most so many of them
 * came from another thread than the one before. */
#define SAMPLE_FAULTS 16
#define CPU_SAMPLES 4 /* in a row of one thread, for which its CPU is asked once */
#define CHANGES_STAY_MAX 4 /* of a client whose workers stand by */
#define CHANGES_MAX 1      /* of one whose workers all wait */

/* ---- who waits; the gate is held ---- */

static void set_stand_by(struct client *client, bool stand_by)
{
	if (READ_ONCE(client->stand_by) == stand_by)
		return;
	__atomic_store_n(&client->stand_by, stand_by, __ATOMIC_RELEASE);
	if (stand_by)
		client_wake(client); /* the first worker may not know of reads that another one has begun */
	else
		sys_futex_wake(&client->stand_by);
}

/* Asking takes as long as most of a fault. */
static int cpu_of_fault_thread(struct client *client)
{
	if (client->stand_by && client->fault_changes == 0 && ++client->fault_cpu_age < CPU_SAMPLES)
		return (int)client->fault_cpu;
	client->fault_cpu_age = 0;
	return sys_thread_cpu(client->pid, (pid_t)client->fault_thread);
}

void worker_decide(struct client *client)
{
	unsigned changes_max = client->stand_by ? CHANGES_STAY_MAX : CHANGES_MAX;
	int cpu = CPU_UNKNOWN;

	if (client->worker_count <= 1 || client->fault_count < SAMPLE_FAULTS)
		return;
	if (client->fault_changes <= changes_max && client->fault_reads_dense >= SAMPLE_FAULTS / 2)
		cpu = cpu_of_fault_thread(client);
	if (cpu >= 0)
		WRITE_ONCE(client->fault_cpu, (unsigned)cpu);
	set_stand_by(client, cpu >= 0 && !client->stopping);
	WRITE_ONCE(client->keeps_cpu, client->stand_by && !group_is_streaming(client->group) && client->device_reads == 0);
	client->fault_count = client->fault_changes = client->fault_reads_dense = client->device_reads = 0;
}

void worker_note_faults(struct client *client, const struct uffd_msg *messages, uint32_t count, uint64_t now_ns)
{
	unsigned faults = 0;

	for (uint32_t i = 0; i < count; i++) {
		uint32_t thread = messages[i].arg.pagefault.feat.ptid;

		if (messages[i].event != UFFD_EVENT_PAGEFAULT)
			continue;
		faults++;
		client->fault_changes += thread != client->fault_thread;
		client->fault_thread = thread;
	}
	if (faults == 0)
		return;
	client->fault_count += faults;
	client->fault_reads_dense += now_ns - client->fault_ns < AWAKE_NS;
	client->fault_ns = now_ns;
	if (client->stand_by)
		awake_note(&client->engine->awake, now_ns, client->keeps_cpu ? client->fault_cpu : AWAKE_CPU_NONE);
}

void worker_stop_all(struct client *client)
{
	pthread_mutex_lock(&client->gate);
	set_stand_by(client, false);
	pthread_mutex_unlock(&client->gate);
	for (unsigned i = 0; i <= client->worker_count; i++)
		client_wake(client);
}

/* ---- a worker ---- */

struct worker {
	struct client *client;
	unsigned number, count;
	int cpu; /* pinned to; CPU_UNKNOWN: to none */
	int nice;       /* of all threads like it */
	bool is_gentle; /* it has that of ordinary threads */
	unsigned turns; /* since it was looked at what it has waited for the CPU */
	uint64_t waited_ns, gentle_next_ns;
};

static bool stands_by(const struct worker *worker)
{
	return worker->number > 0 && __atomic_load_n(&worker->client->stand_by, __ATOMIC_ACQUIRE);
}

static void set_gentle(struct worker *worker, bool gentle)
{
	(void)sys_nice(gentle ? max_of(worker->nice, 0) : worker->nice);
	worker->is_gentle = gentle;
	worker->turns = 0;
	if (!gentle)
		worker->gentle_next_ns = sys_now_ns() + GENTLE_REST_NS;
}

/* Since the last call, or ever. */
static uint64_t waited_ns(struct worker *worker)
{
	uint64_t before_ns = worker->waited_ns;

	return sys_thread_waited_ns(&worker->waited_ns) < 0 ? UINT64_MAX : worker->waited_ns - before_ns;
}

/*
 * Whoever goes before the program has the CPU in the middle of the fault, before the program's thread has gone to sleep: that is
 * one switch more, 1.3 us of 10. Where the two have a CPU to themselves it need not go before anybody. Whether they do is
 * tried: a thread that has to wait for the CPU goes before others again, for a while.
 */
static void settle_nice(struct worker *worker, bool keeps_cpu)
{
	if (!worker->is_gentle) {
		if (keeps_cpu && sys_now_ns() >= worker->gentle_next_ns && waited_ns(worker) != UINT64_MAX)
			set_gentle(worker, true);
	} else if (!keeps_cpu) {
		set_gentle(worker, false);
	} else if (++worker->turns >= GENTLE_TURNS) {
		worker->turns = 0;
		if (waited_ns(worker) > GENTLE_TURNS * GENTLE_WAIT_NS)
			set_gentle(worker, false);
	}
}

/* A hint: any CPU is right, this one is fast. */
static void settle_on_cpu(struct worker *worker)
{
	const struct client *client = worker->client;
	bool follows = worker->number == 0 && READ_ONCE(client->stand_by);
	unsigned cpu = follows ? READ_ONCE(client->fault_cpu) : worker->number % client->engine->cpu_count;

	if (worker->count > 1 && worker->cpu != (int)cpu) {
		sys_pin_this_thread(cpu);
		worker->cpu = (int)cpu;
	}
	settle_nice(worker, follows && READ_ONCE(client->keeps_cpu));
}

/* `retry` is what the last look under the gate saw; -1: wait for an event. */
static int poll_timeout_ms(const struct client *client)
{
	return READ_ONCE(client->retry_soon) ? RETRY_MS : -1;
}

static void wait_for_work(struct worker *worker)
{
	struct client *client = worker->client;
	struct pollfd fds[3] = {
		{ .fd = client->events_fd, .events = POLLIN },
		{ .fd = client->wake_fd, .events = POLLIN },
		{ .fd = -1, .events = POLLIN },
	};
	const struct io_queue *io;

	while (stands_by(worker))
		(void)sys_futex_wait(&client->stand_by, 1, STAND_BY_MS);
	io = __atomic_load_n(&client->io, __ATOMIC_ACQUIRE);
	if (io)
		fds[2].fd = io_queue_fd(io);
	(void)poll(fds, 3, poll_timeout_ms(client));
	if (fds[1].revents)
		sys_eventfd_drain(client->wake_fd);
	if (fds[1].revents && stands_by(worker))
		client_wake(client); /* it was meant for the first worker */
}

/* Reads of a dead client, whose buffers must stay. Here, in a thread of its own: whoever drops the last reference,
 * a thread of the whole engine perhaps, would wait for a device that hangs. */
static void wait_for_reads(struct client *client)
{
	struct pollfd completed = { .events = POLLIN };
	bool done = false;

	while (!done) {
		pthread_mutex_lock(&client->gate);
		done = fill_drop_reads(client);
		if (client->io)
			completed.fd = io_queue_fd(client->io);
		pthread_mutex_unlock(&client->gate);
		if (!done)
			(void)poll(&completed, 1, -1);
	}
}

/* What a fault of a stream has begun. True: it is to be tried again, after a moment. */
static bool end_open_run(struct client *client, struct fill_open *open)
{
	unsigned pause_ms = PAUSE_MS;
	bool again;

	fill_open_expand(client, open);
	client_lock_gate(client, GATE_SPIN_NS);
	while (!client->dead && (client->fork_pending || client_is_shut(client))) {
		pthread_mutex_unlock(&client->gate);
		sys_sleep_ms(pause_ms);
		pause_ms = min_of(2 * pause_ms, SHUT_PAUSE_MS_MAX);
		pthread_mutex_lock(&client->gate);
	}
	fill_open_finish(client, open);
	again = client->retry_soon;
	pthread_mutex_unlock(&client->gate);
	return again;
}

static void *worker_main(void *argument)
{
	struct worker worker = *(struct worker *)argument;
	struct client *client = worker.client;
	struct block_cache *blocks = &client->engine->expand_blocks;

	free(argument);
	name_this_thread("vswap-fault");
	worker.nice = sys_nice_now();
	while (!__atomic_load_n(&client->stopping, __ATOMIC_ACQUIRE)) {
		struct fill_scratch scratch;
		bool waits;

		scratch.pages = NULL;
		scratch.open.run.count = 0;
		client_free_forgotten(client);
		settle_on_cpu(&worker);
		wait_for_work(&worker);
		client_lock_gate(client, GATE_SPIN_NS);
		waits = client->fork_pending || client_is_shut(client);
		if (!waits && !client->stopping) {
			scratch.pages = block_take(blocks); /* not before: who waits for the gate needs none */
			waits = !scratch.pages;
			if (waits)
				WRITE_ONCE(client->retry_soon, true); /* what woke this one may be told to no other */
			else
				fault_serve(client, &scratch);
			look_serve(client);
		}
		waits |= client->fork_waits;
		pthread_mutex_unlock(&client->gate);
		if (scratch.open.run.count > 0)
			waits |= end_open_run(client, &scratch.open);
		block_give(blocks, scratch.pages);
		look_serve_end(client);
		if (waits)
			sys_sleep_ms(PAUSE_MS); /* poll would return at once, for nothing */
	}
	if (worker.number == 0)
		wait_for_reads(client);
	client_wake(client); /* this one may have drained the wake-up meant for all */
	client_put(client);
	return NULL;
}

/* ---- start ---- */

static int start_one(struct client *client, const pthread_attr_t *attributes, unsigned number, unsigned count)
{
	struct worker *worker = malloc(sizeof *worker);
	pthread_t thread;

	if (!worker)
		return -ENOMEM;
	*worker = (struct worker){ .client = client, .number = number, .count = count, .cpu = CPU_UNKNOWN };
	client_get_index(client->engine, client->index);
	if (pthread_create(&thread, attributes, worker_main, worker) == 0)
		return 0;
	free(worker);
	client_put(client);
	return -EAGAIN;
}

int worker_start_all(struct client *client)
{
	unsigned want = min_of(client->engine->cpu_count, (uint32_t)WORKERS_MAX);
	pthread_attr_t attributes;

	if (client->serving)
		return 0;
	if (client->dead) /* buried meanwhile: there is no reference to take */
		return -ESRCH;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	while (client->worker_count < want && start_one(client, &attributes, client->worker_count, want) == 0)
		client->worker_count++;
	pthread_attr_destroy(&attributes);
	if (client->worker_count == 0)
		return -EAGAIN;
	__atomic_store_n(&client->serving, true, __ATOMIC_RELEASE);
	return 0;
}
