/* SPDX-License-Identifier: MIT */
/*
 * base — page arithmetic, checks and scoped locks used by every file of the data plane.
 *
 * VS_CHECK   always on, cheap: a broken invariant ends the daemon (its clients wait, a successor
 *            takes over) rather than risk a wrong byte.
 * VS_DCHECK  on in test builds (-DVSWAP_DEBUG): whole-structure checks call *_is_valid() under it.
 */
#ifndef VSWAP_BASE_H
#define VSWAP_BASE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "limits.h"

/* What top -H, ps -L and perf call the calling thread: at most 15 characters. */
void name_this_thread(const char *name);

/* Print the failed condition and abort. Never returns. */
_Noreturn void vs_check_failed(const char *condition, const char *file, int line);

#define VS_CHECK(condition)                                        \
	do {                                                       \
		if (__builtin_expect(!(condition), 0))             \
			vs_check_failed(#condition, __FILE__, __LINE__); \
	} while (0)

#ifdef VSWAP_DEBUG
#define VS_DCHECK(condition) VS_CHECK(condition)
#else
#define VS_DCHECK(condition) ((void)sizeof(condition))
#endif

/*
 * For what one thread writes, under some lock, and others look at without it: counters, hints, flags. A
 * look may be out of date, never torn. What a look then leads to is decided again under the lock.
 */
#define READ_ONCE(variable) __atomic_load_n(&(variable), __ATOMIC_RELAXED)
#define WRITE_ONCE(variable, value) __atomic_store_n(&(variable), (value), __ATOMIC_RELAXED)

#define min_of(a, b) ((a) < (b) ? (a) : (b))
#define max_of(a, b) ((a) > (b) ? (a) : (b))

static inline uint64_t align_up(uint64_t value, uint64_t alignment)
{
	return (value + alignment - 1) / alignment * alignment;
}

static inline uint64_t div_ceil(uint64_t value, uint64_t divisor)
{
	return (value + divisor - 1) / divisor;
}

static inline uint64_t page_of(uint64_t address) { return address >> PAGE_SHIFT; }
static inline uint64_t address_of(uint64_t page) { return page << PAGE_SHIFT; }

/* Mask with bits [first, first + count) set; count may be 64. */
static inline uint64_t mask_of(unsigned first, unsigned count)
{
	return count >= 64 ? ~0ULL : ((1ULL << count) - 1) << first;
}

static inline void mutex_unlock_cleanup(pthread_mutex_t **mutex)
{
	if (*mutex)
		pthread_mutex_unlock(*mutex);
}

/* Hold a mutex until the end of the enclosing scope. */
#define SCOPED_LOCK_NAME(line) scoped_lock_##line
#define SCOPED_LOCK_AT(mutex, line)                                                      \
	__attribute__((cleanup(mutex_unlock_cleanup), unused)) pthread_mutex_t *SCOPED_LOCK_NAME(line) = \
		(pthread_mutex_lock(mutex), (mutex))
#define SCOPED_LOCK_EXPAND(mutex, line) SCOPED_LOCK_AT(mutex, line)
#define SCOPED_LOCK(mutex) SCOPED_LOCK_EXPAND(mutex, __LINE__)

#endif
