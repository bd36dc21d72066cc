/* SPDX-License-Identifier: MIT */
/*
 * base — a thread's name, and the end of a process whose invariant broke.
 *
 * The latter may run in any thread, under any lock, in a signal handler: no allocation, no stdio, no locale;
 * one writev so that the lines of two failing threads do not mix.
 */
#include "base.h"

#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/uio.h>

void name_this_thread(const char *name)
{
	(void)prctl(PR_SET_NAME, name);
}

/* The value in decimal at the end of `digits`; returns its first character. */
static char *decimal(unsigned value, char digits[static 12])
{
	char *at = digits + 11;

	*at = '\0';
	do
		*--at = (char)('0' + value % 10);
	while (value /= 10);
	return at;
}

static struct iovec part(const char *text)
{
	return (struct iovec){ .iov_base = (void *)(uintptr_t)text, .iov_len = strlen(text) };
}

_Noreturn void vs_check_failed(const char *condition, const char *file, int line)
{
	char digits[12];
	struct iovec parts[] = {
		part("vswapd: "), part(file), part(":"), part(decimal((unsigned)line, digits)),
		part(": invariant broken: "), part(condition), part("\n"),
	};
	/* Nobody is left to tell when this fails. */
	ssize_t written = writev(2, parts, sizeof parts / sizeof *parts);

	(void)written;
	abort();
}
