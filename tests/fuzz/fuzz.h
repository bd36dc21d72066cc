/* SPDX-License-Identifier: MIT */
/*
 * fuzz — what a fuzz target has; scripts/fuzz builds and runs them.
 *
 * With clang libFuzzer drives a target and follows its coverage; with gcc main.c mutates the target's seeds
 * blindly. Either way under ASan and UBSan: whatever the bytes are, a target returns 0.
 */
#ifndef VSWAP_FUZZ_H
#define VSWAP_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define FUZZ_BYTES_MAX 4608 /* a page and what describes it */

#define MUST(condition)                                                                          \
	do {                                                                                     \
		if (!(condition)) {                                                              \
			fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition);  \
			abort();                                                                 \
		}                                                                                \
	} while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The index-th seed into `data` (FUZZ_BYTES_MAX): its size, 0 behind the last one. */
size_t fuzz_seed(unsigned index, uint8_t *data);

#endif
