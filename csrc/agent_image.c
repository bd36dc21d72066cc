/* SPDX-License-Identifier: MIT */
/*
 * agent_image — the agent as one block of code that runs wherever it is copied to (attach.c does).
 *
 * Linked with agent*.c by agent_image.ld, which refuses whatever would need a loader: relocations, writable
 * data, symbols of somebody else. Its first byte is its entry. It runs once, on a thread of the program and
 * a stack of its own, and touches no register but the general ones, which are all that its caller restores.
 *
 * Compile flags: see agent.h, and -mgeneral-regs-only.
 */
#include "agent_image.h"

#include <errno.h>

#include "agent.h"
#include "agent_sys.h"

/* Start the agent. 0 or -errno; then nothing is left behind. */
__attribute__((used)) static long image_start(const struct agent_config *config)
{
	struct agent_state *state = agent_create(config);
	int result;

	if (!state)
		return -ENOMEM;
	result = agent_start(state);
	if (result < 0)
		(void)RAW_2(__NR_munmap, state->arena, ARENA_BYTES);
	return result;
}

#define TEXT_OF(number) #number
#define TEXT(number) TEXT_OF(number)

/* entry(config): its result is the argument of a system call that does not exist. */
#if defined(__x86_64__)
__asm__(".section .text.entry, \"ax\", @progbits\n"
	".globl image_entry\n"
	"image_entry:\n\t"
	"call image_start\n\t"
	"mov %rax, %rdi\n\t"
	"mov $" TEXT(IMAGE_DONE) ", %eax\n\t"
	"syscall\n\t"
	"ud2\n"
	".previous\n");
#else
__asm__(".section .text.entry, \"ax\", @progbits\n"
	".globl image_entry\n"
	"image_entry:\n\t"
	"bl image_start\n\t"
	"ldr x8, =" TEXT(IMAGE_DONE) "\n\t"
	"svc #0\n\t"
	"brk #1\n"
	".previous\n");
#endif
