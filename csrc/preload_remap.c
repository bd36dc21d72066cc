/* SPDX-License-Identifier: MIT */
/* preload_remap — see preload_remap.h. */
#define _GNU_SOURCE
#include "preload_remap.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/utsname.h>

#include "agent_sys.h"
#include "preload_replace.h"
#include "procmap.h"

#define PIECES_MAX 64 /* on the stack, which may be a small one for signals */
#define TRIES_MAX 16  /* of a call beside which it is divided again and again */
#define KNOWN_FLAGS (MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP)
#define RESERVATION (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

struct pieces {
	uint64_t start[PIECES_MAX + 1]; /* start[count]: the end of the last */
	unsigned count;
};

static uint64_t piece_bytes(const struct pieces *pieces, unsigned i) { return pieces->start[i + 1] - pieces->start[i]; }

static uint64_t whole_pages(uint64_t bytes) { return (bytes + AGENT_PAGE - 1) & ~(uint64_t)(AGENT_PAGE - 1); }

static bool is_error(long result) { return result < 0 && result >= -4095; }

static long move(uint64_t from, uint64_t from_bytes, uint64_t to, uint64_t to_bytes, int flags)
{
	return RAW_6(__NR_mremap, from, from_bytes, to_bytes, flags | MREMAP_MAYMOVE | MREMAP_FIXED, to, 0);
}

/* ---- what there is ---- */

/* The mappings of [start, end). False: there is one, or it is not ours to divide. */
static bool find_pieces(int maps_fd, uint64_t start, uint64_t end, bool any_protection, struct pieces *ret)
{
	uint64_t flags = 0, mask = any_protection ? PROCMAP_SHARED : ~0ULL;

	ret->count = 0;
	for (uint64_t at = start; at < end;) {
		struct ioctl_procmap_query query = { .size = sizeof query, .query_addr = at };

		if (ret->count == PIECES_MAX || raw_ioctl(maps_fd, IOCTL_PROCMAP_QUERY, &query) < 0)
			return false;
		if (query.inode || query.dev_major || query.dev_minor || query.vma_flags & PROCMAP_SHARED)
			return false;
		if (at != start && (query.vma_flags ^ flags) & mask)
			return false;
		flags = query.vma_flags;
		ret->start[ret->count++] = at;
		at = query.vma_end < end ? query.vma_end : end;
	}
	ret->start[ret->count] = end;
	return ret->count > 1;
}

/* ---- moving it ---- */

/* Pieces [first, count) of `pieces` are at `target`, and their places are free, or empty: back. */
static void move_back(const struct pieces *pieces, unsigned first, uint64_t target, uint64_t bytes)
{
	uint64_t end = pieces->start[pieces->count] - pieces->start[0];

	if (first < pieces->count && bytes > end)
		(void)RAW_2(__NR_munmap, target + end, bytes - end);
	for (unsigned i = first; i < pieces->count; i++)
		if (is_error(move(target + (pieces->start[i] - pieces->start[0]), piece_bytes(pieces, i), pieces->start[i],
				  piece_bytes(pieces, i), 0)))
			(void)RAW_2(__NR_kill, raw_getpid(), SIGABRT);
}

/* Mappings that are made to be given up: a process may have so many, and what moves back needs some as well. */
static uint64_t spare_bytes(const struct pieces *pieces) { return (4 * (uint64_t)pieces->count + 5) * AGENT_PAGE; }

/* Not in the target, which may have gaps: of so much, what is on one side of it suffices. */
static long map_beside(uint64_t bytes, uint64_t target, uint64_t target_bytes)
{
	uint64_t all = 2 * bytes + target_bytes, first, start;
	long mapped = raw_mmap(0, all, PROT_NONE, RESERVATION, -1);

	if (is_error(mapped))
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

	if (is_error(spare))
		return spare;
	for (uint64_t at = AGENT_PAGE; at < bytes && result == 0; at += 2 * AGENT_PAGE)
		result = raw_mprotect((uint64_t)spare + at, AGENT_PAGE, PROT_READ);
	if (result == 0)
		return spare;
	(void)RAW_2(__NR_munmap, spare, bytes);
	return result;
}

/* `bytes` in all at the end: the last piece is as much larger. The target's own mappings go. */
static long move_all(const struct pieces *pieces, uint64_t target, uint64_t bytes, int flags)
{
	long spare = hold_spare(pieces, target, bytes), result = 0;
	uint64_t end = bytes;
	unsigned i = pieces->count;

	if (is_error(spare))
		return spare;
	while (i > 0 && !is_error(result)) {
		uint64_t offset = pieces->start[--i] - pieces->start[0];

		result = move(pieces->start[i], piece_bytes(pieces, i), target + offset, end - offset,
			      flags & MREMAP_DONTUNMAP);
		end = offset;
	}
	(void)RAW_2(__NR_munmap, spare, spare_bytes(pieces));
	if (!is_error(result))
		return (long)target;
	move_back(pieces, i + 1, target, bytes);
	return result;
}

static long move_anywhere(const struct pieces *pieces, uint64_t bytes, int flags)
{
	long target = raw_mmap(0, bytes, PROT_NONE, RESERVATION, -1), result;

	if (is_error(target))
		return target;
	result = move_all(pieces, (uint64_t)target, bytes, flags);
	if (is_error(result))
		(void)RAW_2(__NR_munmap, target, bytes);
	return result;
}

/* Where it is, if what lies behind it is free. */
static long grow_in_place(const struct pieces *pieces, uint64_t bytes)
{
	uint64_t last = pieces->start[pieces->count - 1];
	long result = RAW_6(__NR_mremap, last, piece_bytes(pieces, pieces->count - 1), bytes - (last - pieces->start[0]), 0,
			    0, 0);

	return is_error(result) ? result : (long)pieces->start[0];
}

/* ---- one call ---- */

struct call {
	uint64_t old, old_bytes, new_bytes, target;
	int flags;
};

static long call_plainly(const struct call *call)
{
	return RAW_6(__NR_mremap, call->old, call->old_bytes, call->new_bytes, call->flags, call->target, 0);
}

/* What the kernel would not refuse for its arguments alone, and what it does not do without a look at the mappings. */
static bool may_be_divided(const struct call *call)
{
	bool is_given = call->flags & MREMAP_FIXED, leaves = call->flags & MREMAP_DONTUNMAP;

	if (call->flags & ~KNOWN_FLAGS || (call->old | call->target * is_given) % AGENT_PAGE || !call->new_bytes ||
	    call->old_bytes <= AGENT_PAGE || call->old + call->old_bytes < call->old ||
	    ((is_given || leaves) && !(call->flags & MREMAP_MAYMOVE)) || (leaves && call->old_bytes != call->new_bytes))
		return false;
	if (is_given && call->target < call->old + call->old_bytes && call->old < call->target + call->new_bytes)
		return false;
	return is_given || leaves || call->new_bytes > call->old_bytes;
}

static long call_by_pieces(const struct call *call, const struct pieces *pieces)
{
	long result;

	if (call->flags & MREMAP_FIXED)
		return move_all(pieces, call->target, call->new_bytes, call->flags);
	if (call->flags & MREMAP_DONTUNMAP)
		return move_anywhere(pieces, call->new_bytes, call->flags);
	result = grow_in_place(pieces, call->new_bytes);
	return is_error(result) && call->flags & MREMAP_MAYMOVE ? move_anywhere(pieces, call->new_bytes, call->flags) : result;
}

/* Linux before 6.17 unmaps the given place before it looks at what is to move there: by now another thread may have it. */
static bool has_unmapped_target(const struct call *call)
{
	struct utsname name;
	unsigned version[2] = { 0 }, i = 0;

	if (!(call->flags & MREMAP_FIXED) || RAW_1(__NR_uname, &name) < 0)
		return call->flags & MREMAP_FIXED;
	for (const char *at = name.release; i < 2; at++)
		if (*at >= '0' && *at <= '9')
			version[i] = version[i] * 10 + (unsigned)(*at - '0');
		else
			i = *at ? i + 1 : 2;
	return version[0] < 6 || (version[0] == 6 && version[1] < 17);
}

/* Nobody but another thread, for whom it is no other than with mremap, sees it half done. */
static long call_by_pieces_alone(const struct call *call, const struct pieces *pieces, uint64_t moved)
{
	struct replacement replacement;
	long result;

	replace_begin(&replacement);
	result = call_by_pieces(call, pieces);
	if (!is_error(result) && moved < call->old_bytes)
		(void)RAW_2(__NR_munmap, call->old + moved, call->old_bytes - moved);
	replace_end(&replacement);
	return result;
}

/* What was divided between the look and the call is EFAULT after all: once more. */
static long call_divided(const struct call *call, int maps_fd)
{
	bool any_protection = call->flags & MREMAP_FIXED && call->old_bytes == call->new_bytes;
	uint64_t moved = call->old_bytes < call->new_bytes ? call->old_bytes : call->new_bytes;
	struct pieces pieces;
	long result = -EFAULT;

	for (unsigned i = 0; i < TRIES_MAX && result == -EFAULT; i++) {
		if (find_pieces(maps_fd, call->old, call->old + moved, any_protection, &pieces))
			result = call_by_pieces_alone(call, &pieces, moved);
		else if (i == 0)
			result = call_plainly(call);
		else
			break;
		if (result == -EFAULT && has_unmapped_target(call))
			break;
	}
	return result;
}

long remap(long old, unsigned long old_bytes, unsigned long new_bytes, int flags, long target)
{
	struct call call = { (uint64_t)old, whole_pages(old_bytes), whole_pages(new_bytes), (uint64_t)target, flags };
	int maps_fd = -1;
	long result;

	if (agent && !agent->sandboxed && atomic_get(&agent->beacon_armed) && may_be_divided(&call))
		maps_fd = raw_open("/proc/thread-self/maps", O_RDONLY);
	if (maps_fd < 0)
		return RAW_6(__NR_mremap, old, old_bytes, new_bytes, flags, target, 0);
	result = call_divided(&call, maps_fd);
	raw_close(maps_fd);
	return result;
}
