/* SPDX-License-Identifier: MIT */
/* preload_remap — see preload_remap.h. */
#define _GNU_SOURCE
#include "preload_remap.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>

#include "agent_sys.h"
#include "preload_replace.h"
#include "procmap.h"

#define PIECES_MAX 32 /* on the stack, which may be a small one for signals */
#define TRIES_MAX 16  /* of a call beside which it is divided again and again */
#define NOT_DIVIDED 0
#define KNOWN_FLAGS (MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP)
#define RESERVATION (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

struct pieces {
	uint64_t start[PIECES_MAX + 1]; /* start[count]: the end of the last */
	unsigned count;
};

static uint64_t piece_bytes(const struct pieces *pieces, unsigned i) { return pieces->start[i + 1] - pieces->start[i]; }

static uint64_t whole_pages(uint64_t bytes) { return (bytes + AGENT_PAGE - 1) & ~(uint64_t)(AGENT_PAGE - 1); }

static long move(uint64_t from, uint64_t from_bytes, uint64_t to, uint64_t to_bytes, int flags)
{
	return RAW_6(__NR_mremap, from, from_bytes, to_bytes, flags | MREMAP_MAYMOVE | MREMAP_FIXED, to, 0);
}

/* ---- what there is ---- */

/* The mappings of [start, end). False: there is one, or it is not ours to divide. */
static bool find_pieces(int maps_fd, uint64_t start, uint64_t end, bool any_protection, struct pieces *ret)
{
	uint64_t flags = 0;

	ret->count = 0;
	for (uint64_t at = start; at < end;) {
		struct ioctl_procmap_query query = { .size = sizeof query, .query_addr = at };

		if (ret->count == PIECES_MAX || raw_ioctl(maps_fd, IOCTL_PROCMAP_QUERY, &query) < 0)
			return false;
		if (query.inode || query.dev_major || query.dev_minor || query.vma_flags & PROCMAP_SHARED)
			return false;
		if (at != start && !any_protection && query.vma_flags != flags)
			return false;
		flags = query.vma_flags;
		ret->start[ret->count++] = at;
		at = query.vma_end < end ? query.vma_end : end;
	}
	ret->start[ret->count] = end;
	return ret->count > 1;
}

/* ---- moving it ---- */

/* Pieces [first, count) of `pieces` are at `target`: back, if nobody has taken their places meanwhile. */
static void move_back(const struct pieces *pieces, unsigned first, uint64_t target, uint64_t bytes, bool is_empty)
{
	uint64_t end = pieces->start[pieces->count] - pieces->start[0];

	if (first < pieces->count && bytes > end)
		(void)RAW_2(__NR_munmap, target + end, bytes - end);
	for (unsigned i = first; i < pieces->count; i++) {
		uint64_t start = pieces->start[i], size = piece_bytes(pieces, i);

		if ((!is_empty && raw_is_error(raw_mmap(start, size, PROT_NONE, RESERVATION | MAP_FIXED_NOREPLACE, -1))) ||
		    raw_is_error(move(target + (start - pieces->start[0]), size, start, size, 0)))
			(void)RAW_2(__NR_kill, raw_getpid(), SIGKILL);
	}
}

/* Mappings that are made to be given up: a process may have so many, and what moves back needs some as well. */
static uint64_t spare_bytes(const struct pieces *pieces) { return (4 * (uint64_t)pieces->count + 5) * AGENT_PAGE; }

/* Not in the target, which may have gaps: of so much, what is on one side of it suffices. */
static long map_beside(uint64_t bytes, uint64_t target, uint64_t target_bytes)
{
	uint64_t all = 2 * bytes + target_bytes, first, start;
	long mapped = raw_mmap(0, all, PROT_NONE, RESERVATION, -1);

	if (raw_is_error(mapped))
		return mapped;
	first = (uint64_t)mapped;
	start = first + bytes <= target || first >= target + target_bytes ? first : target + target_bytes;
	if (start > first)
		(void)RAW_2(__NR_munmap, first, start - first);
	(void)RAW_2(__NR_munmap, start + bytes, first + all - start - bytes);
	return (long)start;
}

static long hold_spare(const struct pieces *pieces, uint64_t target, uint64_t target_bytes)
{
	uint64_t bytes = spare_bytes(pieces);
	long spare = map_beside(bytes, target, target_bytes), result = 0;

	if (raw_is_error(spare))
		return spare;
	for (uint64_t at = AGENT_PAGE; at < bytes && result == 0; at += 2 * AGENT_PAGE)
		result = raw_mprotect((uint64_t)spare + at, AGENT_PAGE, PROT_READ);
	if (result == 0)
		return spare;
	(void)RAW_2(__NR_munmap, spare, bytes);
	return result;
}

/* `bytes` in all at the end: the last piece is as much larger. The target's own mappings go. *ret_kept: so many bytes of the
 * target nothing was moved to when it failed. */
static long move_all(const struct pieces *pieces, uint64_t target, uint64_t bytes, int flags, uint64_t *ret_kept)
{
	/* A target of our own choice has no gaps. */
	long spare = hold_spare(pieces, target, flags & MREMAP_FIXED ? bytes : 0), result = 0;
	unsigned i = pieces->count;

	*ret_kept = bytes;
	if (raw_is_error(spare))
		return spare;
	while (i > 0 && !raw_is_error(result)) {
		uint64_t offset = pieces->start[--i] - pieces->start[0];

		result = move(pieces->start[i], piece_bytes(pieces, i), target + offset, *ret_kept - offset,
			      flags & MREMAP_DONTUNMAP);
		*ret_kept = offset;
	}
	(void)RAW_2(__NR_munmap, spare, spare_bytes(pieces));
	if (!raw_is_error(result))
		return (long)target;
	move_back(pieces, i + 1, target, bytes, flags & MREMAP_DONTUNMAP);
	return result;
}

static long move_anywhere(const struct pieces *pieces, uint64_t hint, uint64_t bytes, int flags)
{
	long target = raw_mmap(hint, bytes, PROT_NONE, RESERVATION, -1), result;
	uint64_t kept;

	if (raw_is_error(target))
		return target;
	result = move_all(pieces, (uint64_t)target, bytes, flags, &kept);
	/* What was moved to is a gap again, and may be another's by now. */
	if (raw_is_error(result) && kept > 0)
		(void)RAW_2(__NR_munmap, target, kept);
	return result;
}

/* Where it is, if what lies behind it is free. */
static long grow_in_place(const struct pieces *pieces, uint64_t bytes)
{
	uint64_t last = pieces->start[pieces->count - 1];
	long result = RAW_6(__NR_mremap, last, piece_bytes(pieces, pieces->count - 1), bytes - (last - pieces->start[0]), 0,
			    0, 0);

	return raw_is_error(result) ? result : (long)pieces->start[0];
}

/* ---- one call ---- */

struct call {
	uint64_t old, old_bytes, new_bytes, target;
	int flags;
};

/* What the kernel would not refuse for its arguments alone, and what it does not do without a look at the mappings. */
static bool may_be_divided(const struct call *call)
{
	bool is_given = call->flags & MREMAP_FIXED, leaves = call->flags & MREMAP_DONTUNMAP;

	if (call->flags & ~KNOWN_FLAGS || (call->old | call->target * is_given) % AGENT_PAGE || !call->new_bytes ||
	    call->old_bytes <= AGENT_PAGE || call->old + call->old_bytes < call->old ||
	    ((is_given || leaves) && !(call->flags & MREMAP_MAYMOVE)) || (leaves && call->old_bytes != call->new_bytes))
		return false;
	if (is_given && (call->target + call->new_bytes < call->target ||
			 (call->target < call->old + call->old_bytes && call->old < call->target + call->new_bytes)))
		return false;
	return is_given || leaves || call->new_bytes > call->old_bytes;
}

static long call_by_pieces(const struct call *call, const struct pieces *pieces)
{
	uint64_t kept;
	long result;

	if (call->flags & MREMAP_FIXED)
		return move_all(pieces, call->target, call->new_bytes, call->flags, &kept);
	if (call->flags & MREMAP_DONTUNMAP)
		return move_anywhere(pieces, call->target, call->new_bytes, call->flags);
	result = grow_in_place(pieces, call->new_bytes);
	return raw_is_error(result) && call->flags & MREMAP_MAYMOVE ? move_anywhere(pieces, 0, call->new_bytes, call->flags)
								: result;
}

/* Nobody but another thread, for whom it is no other than with mremap, sees it half done. */
static long call_once_divided(const struct call *call, int maps_fd)
{
	bool any_protection = call->flags & MREMAP_FIXED && call->old_bytes == call->new_bytes;
	uint64_t moved = call->old_bytes < call->new_bytes ? call->old_bytes : call->new_bytes;
	struct pieces pieces;

	if (!find_pieces(maps_fd, call->old, call->old + moved, any_protection, &pieces))
		return NOT_DIVIDED;
	if (moved < call->old_bytes) { /* first, as the kernel does it */
		long result = RAW_2(__NR_munmap, call->old + moved, call->old_bytes - moved);

		if (raw_is_error(result))
			return result;
	}
	return call_by_pieces(call, &pieces);
}

/* To a place that is given it is tried once: a part of that may be a gap after a failure, and then another's. */
static long call_divided(const struct call *call)
{
	unsigned tries = call->flags & MREMAP_FIXED ? 1 : TRIES_MAX;
	struct replacement replacement;
	long result = -EFAULT;
	int maps_fd;

	replace_begin(&replacement);
	maps_fd = replacement.engaged ? raw_open("/proc/thread-self/maps", O_RDONLY) : -1;
	if (maps_fd < 0)
		result = NOT_DIVIDED;
	while (result == -EFAULT && tries-- > 0)
		result = call_once_divided(call, maps_fd);
	if (maps_fd >= 0)
		raw_close(maps_fd);
	replace_end(&replacement);
	return result;
}

long remap(long old, unsigned long old_bytes, unsigned long new_bytes, int flags, long target)
{
	struct call call = { (uint64_t)old, whole_pages(old_bytes), whole_pages(new_bytes), (uint64_t)target, flags };
	bool is_candidate = agent && !agent->sandboxed && atomic_get(&agent->beacon_armed) && may_be_divided(&call);
	long result = NOT_DIVIDED;

	/* The kernel may unmap a given place, or move a part there, before it says EFAULT: so that is looked at before. */
	if (is_candidate && flags & MREMAP_FIXED)
		result = call_divided(&call);
	if (result != NOT_DIVIDED)
		return result;
	result = RAW_6(__NR_mremap, old, old_bytes, new_bytes, flags, target, 0);
	if (result != -EFAULT || !is_candidate || flags & MREMAP_FIXED)
		return result;
	result = call_divided(&call);
	return result == NOT_DIVIDED ? -EFAULT : result;
}
