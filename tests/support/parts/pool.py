# SPDX-License-Identifier: MIT
"""pool — csrc/pool.h, called as the rest of the data plane calls it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

UNIT_BYTES = 64
UNITS_MAX = 64
SLAB_BYTES = 65536


class Stored(NamedTuple):
    """One pool_store()."""

    growth_bytes: int  # what pool_growth_bytes() said before
    result: int
    handle: int


class PoolState(NamedTuple):
    """What a pool says of itself."""

    is_valid: bool
    bytes: int
    object_bytes: int
    object_count: int
    slab_count: int


class SpaceState(NamedTuple):
    """What all pools say, and what the system says that they cost."""

    pools: dict[int, PoolState]
    memfd_bytes: int


class Pool:
    """A space of `slabs` slabs with pools, which are numbered by the caller."""

    def __init__(self, ffi: Any, functions: Any, slabs: int) -> None:
        self._ffi, self._c = ffi, functions
        self._size_bytes = slabs * SLAB_BYTES
        self._memfd = os.memfd_create("test-pool")
        self._dead: list[tuple[Any, dict[int, Any]]] = []  # spaces of predecessors
        self._open()

    def _open(self) -> None:
        space = self._ffi.new("struct pool_space **")
        result = self._c.pool_space_create(self._memfd, self._size_bytes, space)
        assert result == 0, result
        self._space = space[0]
        self._pools: dict[int, Any] = {}

    def finish(self) -> int:
        """The end of all pools and of the space. Bytes that the memfd still has then."""
        for pool in self._pools.values():
            self._c.pool_destroy(pool)
        self._c.pool_space_destroy(self._space)
        memfd_bytes = self._memfd_bytes()
        for space, pools in self._dead:
            for pool in pools.values():
                self._c.pool_destroy(pool)
            self._c.pool_space_destroy(space)
        os.close(self._memfd)
        return memfd_bytes

    def make(self, number: int) -> None:
        """A new empty pool."""
        pool = self._ffi.new("struct pool **")
        result = self._c.pool_create(self._space, pool)
        assert result == 0, result
        self._pools[number] = pool[0]

    def destroy(self, number: int) -> None:
        """pool_destroy(), whatever is in it."""
        self._c.pool_destroy(self._pools.pop(number))

    def store(self, number: int, objects: Sequence[bytes]) -> list[Stored]:
        """Store each. Stops behind the first that fails."""
        pool = self._pools[number]
        handle = self._ffi.new("uint64_t *")
        stored: list[Stored] = []
        for data in objects:
            units = len(data) // UNIT_BYTES
            growth_bytes = self._c.pool_growth_bytes(pool, units)
            stored.append(Stored(growth_bytes, self._c.pool_store(pool, data, units, handle), int(handle[0])))
            if stored[-1].result != 0:
                break
        return stored

    def read(self, objects: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (handle, units)."""
        return [
            bytes(self._ffi.buffer(self._c.pool_object(self._space, handle), units * UNIT_BYTES))
            for handle, units in objects
        ]

    def free(self, number: int, objects: Sequence[tuple[int, int]]) -> None:
        """pool_free() of each (handle, units)."""
        for handle, units in objects:
            self._c.pool_free(self._pools[number], handle, units)

    def evacuate(self, number: int, count_bytes: int) -> int:
        """pool_evacuate()."""
        return int(self._c.pool_evacuate(self._pools[number], count_bytes))

    def evacuating(self, number: int, handles: Sequence[int]) -> list[int]:
        """Those that lie in a slab being evacuated."""
        return [handle for handle in handles if self._c.pool_is_evacuating(self._pools[number], handle)]

    def evacuate_end(self, number: int) -> None:
        """pool_evacuate_end()."""
        self._c.pool_evacuate_end(self._pools[number])

    def reopen(self, numbers: Sequence[int], adoptions: Sequence[tuple[int, int, int]]) -> list[int]:
        """A successor takes over the memfd, and adopts each (number, handle, units). The results."""
        self._dead.append((self._space, self._pools))
        self._open()
        for number in numbers:
            self.make(number)
        return [int(self._c.pool_adopt(self._pools[number], *where)) for number, *where in adoptions]

    def _memfd_bytes(self) -> int:
        return os.fstat(self._memfd).st_blocks * 512

    def state(self) -> SpaceState:
        """Everything that can be seen."""
        statistics = self._ffi.new("struct pool_statistics *")
        pools = {}
        for number, pool in self._pools.items():
            is_valid = bool(self._c.pool_is_valid(pool))
            self._c.pool_statistics(pool, statistics)
            of = statistics[0]
            pools[number] = PoolState(is_valid, of.bytes, of.object_bytes, of.object_count, of.slab_count)
        return SpaceState(pools, self._memfd_bytes())
