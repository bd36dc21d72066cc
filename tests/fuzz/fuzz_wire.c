/* SPDX-License-Identifier: MIT */
/*
 * fuzz_wire — the addresses of ARM (wire.h), which a client chooses: what is accepted lies where it says.
 *
 * Input: struct vswap_arm. The messages' form is Python's business: fuzz_wire.py.
 */
#include <string.h>

#include "client.h"
#include "fuzz.h"
#include "wire.h"

static bool lies_in(uint64_t start, uint64_t bytes, const struct engine_arena *arena)
{
	unsigned __int128 end = (unsigned __int128)start + bytes;

	return start >= arena->arena && end <= (unsigned __int128)arena->arena + arena->arena_bytes &&
	       end <= address_of(ADDRESS_PAGES_MAX) && start % PAGE_BYTES == 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct vswap_arm arm = { 0 };
	struct engine_arena arena;

	memcpy(&arm, data, size < sizeof arm ? size : sizeof arm);
	arena = (struct engine_arena){ arm.arena, arm.arena_bytes, arm.beacon,
				       { arm.staging[0], arm.staging[1] }, { arm.trash[0], arm.trash[1] } };
	if (!client_arena_is_sane(&arena))
		return 0;
	MUST(lies_in(arena.beacon, PAGE_BYTES, &arena));
	MUST(arena.staging[0] != 0);
	for (int i = 0; i < VSWAP_PROTECTIONS; i++)
		if (arena.staging[i] || arena.trash[i])
			MUST(lies_in(arena.staging[i], VSWAP_WINDOWS * VSWAP_WINDOW_PAGES * PAGE_BYTES, &arena) &&
			     lies_in(arena.trash[i], VSWAP_WINDOW_PAGES * PAGE_BYTES, &arena));
	return 0;
}

size_t fuzz_seed(unsigned index, uint8_t *data)
{
	uint64_t base = index == 1 ? 0x7ffff0000000 : index == 2 ? 0 : 0x10000000;
	uint64_t windows = VSWAP_WINDOWS * VSWAP_WINDOW_PAGES * PAGE_BYTES, trash = VSWAP_WINDOW_PAGES * PAGE_BYTES;
	struct vswap_arm arm = {
		.magic = VSWAP_MAGIC, .version = VSWAP_WIRE_VERSION, .arena = base, .arena_bytes = 64 << 20,
		.beacon = base + PAGE_BYTES, .staging = { base + (1 << 20), base + (1 << 20) + windows },
		.trash = { base + (32 << 20), base + (32 << 20) + trash },
	};

	if (index > 3)
		return 0;
	if (index == 3)
		arm.staging[1] = arm.trash[1] = 0;
	memcpy(data, &arm, sizeof arm);
	return sizeof arm;
}
