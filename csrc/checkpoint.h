/* SPDX-License-Identifier: MIT */
/*
 * checkpoint — what the daemon knows of a client's address space, kept for a successor.
 *
 * A client's range sets and waiting remaps live on the heap and are copied, whole, into the one of two
 * checkpoints that does not count; one store of checkpoint_version then makes it count. A checkpoint
 * also says how many of the messages that were read are applied, so both change in the same store.
 *
 * Applying a message (fault.c, remap.c) is a sequence of steps, each of which changes the slot table
 * in a way that may be begun again: clearing a range, or moving slots from one range to another. What
 * a message does is determined by the checkpoint before it, so a successor that applies it again
 * meets the same steps in the same order: those before the one that was begun last are not repeated
 * (clearing the target of a move again would lose what was moved), that one is continued.
 *
 * Locking   the client's gate.
 */
#ifndef VSWAP_CHECKPOINT_H
#define VSWAP_CHECKPOINT_H

#include <stdint.h>

#include "client.h"

/* Write and switch, if anything changed since; `applied`: messages that are dealt with. */
void checkpoint_write(struct client *client, uint32_t applied);

/* In a successor: make range sets, remaps and flags what they were. *ret_applied: see above. 0, or -ENOMEM
 * (nothing is known then but what discovery will find). */
int checkpoint_read(struct client *client, uint32_t *ret_applied);

enum step {
	STEP_FRESH,
	STEP_RESUMED, /* begun by the daemon before, maybe finished */
	STEP_DONE,    /* by the daemon before: to be left out */
};

/* Call before each change of slots while a message is applied. */
enum step checkpoint_step(struct client *client);

/* In a successor: a step outside of messages (remap_settle) was begun and its checkpoint not written. */
bool checkpoint_is_interrupted(const struct client *client);

/* Give back the memory of both, in the state that is mapped from state_fd; a new client begins with none. */
void checkpoint_discard(struct state *state, int state_fd, unsigned client_index);

#endif
