/* SPDX-License-Identifier: MIT */
/*
 * yield — give up a range of a client's memory, to a userfaultfd of the program's own.
 *
 * The kernel lets one userfaultfd have a mapping at a time, and near the limit all large mappings are ours: so a
 * program's UFFDIO_REGISTER would be EBUSY. Its library asks for the range then (wire.h), and has the call repeated.
 *
 * Order      1 the range is withdrawn: it is in no region, so nothing of it is evicted any more, nor written to to make
 *              it exclusive. First, for a MOVE of ours works on memory that is registered by the program
 *            2 what is out of it is brought back by fault threads, while there is room; a batch that has pages of it
 *              is settled by that, too
 *            3 with the gate: nothing is out, and nothing that was begun can touch it any more: no event is unread, no
 *              remap waits, no POPULATE and no read is under way; faults that wait there are forgotten, as the kernel
 *              wakes them. A fill of ours would otherwise answer a fault of the program's
 *            4 UNREGISTER, piece by piece, of what is ours: REGISTER says so, for who has it already may have it again
 *            5 slots (kept copies) are forgotten, the checkpoint says that it is not registered, the client is told
 * Held off   from the request until its library has repeated the call no discovery registers the range. Afterwards the
 *            kernel's EBUSY keeps it away, until the program closes its descriptor or unregisters: then it is ours again
 * Deaths     the request is in the ring: a successor begins anew, and each step may be done twice. Until 5 the client
 *            waits; of a range that is unregistered nothing is out
 * Failures   -ENOMEM when it does not fit into the limit, as what a program has registered cannot be evicted: at once when
 *            all of it is larger, else when evictors have made no progress for a second. The range is then as before,
 *            once a look has found it
 * Limits     a program in which another thread moves memory of ours into the range (mremap) in the moment between the
 *            last look for events and UNREGISTER gets it back under our watch at once, but may have read zeros there.
 * Threads    one for each request, one request of a client at a time.
 */
#ifndef VSWAP_YIELD_H
#define VSWAP_YIELD_H

#include <stdbool.h>
#include <stdint.h>

struct client;

/* Start a thread for the request in the client's ring, if there is one. The look thread. */
void yield_look(struct client *client);

/* A range that no discovery may register: true, and which. Any thread. */
bool yield_holds(const struct client *client, uint64_t *ret_start, uint64_t *ret_end);

#endif
