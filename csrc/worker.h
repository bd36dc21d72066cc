/* SPDX-License-Identifier: MIT */
/*
 * worker — the fault threads of a client: how many of them wait for its faults, and on which CPU.
 *
 * All that a userfaultfd has to say wakes all who wait for it. To wake a thread on the CPU where the fault happened costs a
 * microsecond, on another one up to forty, whether it then finds anything to do or not. So while one thread of the
 * client faults, and often, the first worker alone waits, on the CPU where that thread was last seen, and the others stand by.
 * While several fault, every worker waits, each on a CPU of its own; and so they do while faults are rare, for each then
 * brings so many pages, or matters so little, that it is better done beside the thread than in its place.
 * docs/decisions/0013 has the figures.
 *
 * Locking    worker_note_faults, worker_decide: the gate. The rest: any thread.
 */
#ifndef VSWAP_WORKER_H
#define VSWAP_WORKER_H

#include <stdint.h>

struct client;
struct uffd_msg;

/* Start a client's fault threads, if it has none: 0, -ESRCH when it is buried, -EAGAIN: no thread to be had. The gate is held. */
int worker_start_all(struct client *client);
/* These messages were read: who faults? And, once they are answered, for it may take as long as a fault: who waits for the next? */
void worker_note_faults(struct client *client, const struct uffd_msg *messages, uint32_t count, uint64_t now_ns);
void worker_decide(struct client *client);
/* The client is `stopping`: nobody stands by any longer. */
void worker_stop_all(struct client *client);

#endif
