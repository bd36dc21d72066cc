/* SPDX-License-Identifier: MIT */
/*
 * pageout — memory that is swapped out by request, and single faults that bring it back while nothing else happens.
 *
 * Whoever asks is the system that the program runs on: under vswapd a request to the daemon that $VSWAPD_SOCKET names, else
 * madvise(MADV_PAGEOUT). What counts is what is no longer present afterwards, by /proc/self/pagemap.
 */
#ifndef BENCH_PAGEOUT_H
#define BENCH_PAGEOUT_H

#include <stdint.h>

/* The working set is out, as written; all back; and out once more, unchanged. An access is a page that went. */
void run_pageout(void);

/*
 * The working set goes out, then `percent` of its pages are touched in random order. Before that, `ballast_percent` of its
 * size are written and given up again, so that what is on its way to a disk gets there.
 */
void run_fault(unsigned percent, unsigned ballast_percent);

#endif
