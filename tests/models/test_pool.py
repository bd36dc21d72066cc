# SPDX-License-Identifier: MIT
"""The pool beside a dict of its objects: their bytes, where they lie, and what all of it costs."""

from __future__ import annotations

import errno
import random
import sys
from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.parts.pool import SLAB_BYTES, UNIT_BYTES, UNITS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable

    from support.parts.check import ModelCheck
    from support.parts.pool import Stored
    from support.parts.remote import RemotePart

_POOLS_MAX = 3
_SLABS_MAX = 40
_RESERVE_SLABS = 4  # free slabs that keep their memory
_SLAB_UNITS = SLAB_BYTES // UNIT_BYTES
# The largest sizes of which 31, 30 … 16 fit into a slab; below them, even sizes.
_LARGE_UNITS = [_SLAB_UNITS // capacity for capacity in range(31, 15, -1)]

_POOL = st.integers(0, _POOLS_MAX - 1)
_UNITS = st.integers(1, UNITS_MAX)
_SEED = st.integers(0, 1 << 32)


def _class_units(units: int) -> int:
    return units + units % 2 if units <= 32 else min(size for size in _LARGE_UNITS if size >= units)


class PoolMachine(RuleBasedStateMachine):
    """Some pools in one space; the objects of each by handle."""

    def __init__(self, part: RemotePart) -> None:
        super().__init__()
        self._part = part
        self._objects: dict[int, dict[int, bytes]] = {}
        self._evacuating: dict[int, set[int]] = {}  # slabs, by pool
        self._pools_made = 0

    @initialize(slabs=st.integers(1, _SLABS_MAX))
    def open(self, slabs: int) -> None:
        self._part.open("pool", slabs)
        self._slabs = slabs
        self.make()

    def teardown(self) -> None:
        if sys.exception() is not None or not self._pools_made:
            self._part.stop()
            return
        for pool, objects in self._objects.items():
            self._free(pool, list(objects))
        self.state_agrees()
        assert self._part.finish() <= _RESERVE_SLABS * SLAB_BYTES

    # ---- helpers ----

    def _pool(self, draw: int) -> int:
        numbers = sorted(self._objects)
        return numbers[draw % len(numbers)]

    def _some(self, pool: int, percent: int, seed: int) -> list[int]:
        """Handles of a random part of a pool's objects."""
        generator = random.Random(seed)
        return [handle for handle in sorted(self._objects[pool]) if generator.randrange(100) < percent]

    def _slabs_used(self) -> int:
        return sum(len(_slabs_of(objects)) for objects in self._objects.values())

    def _store(self, pool: int, objects: list[bytes]) -> list[Stored]:
        """Store each; those that were stored. What did not fit was refused for want of a slab."""
        stored: list[Stored] = self._part.store(pool, objects)
        for one, data in zip(stored, objects, strict=False):
            no_room = one.growth_bytes > 0 and self._slabs_used() == self._slabs
            assert one.result == (-errno.ENOSPC if no_room else 0)
            if one.result == 0:
                slabs = _slabs_of(self._objects[pool])
                assert one.growth_bytes == (0 if one.handle // _SLAB_UNITS in slabs else SLAB_BYTES)
                assert one.handle not in self._objects[pool]
                assert one.handle // _SLAB_UNITS not in self._evacuating[pool]
                self._objects[pool][one.handle] = data
        assert len(stored) == len(objects) or stored[-1].result != 0
        return [one for one in stored if one.result == 0]

    def _free(self, pool: int, handles: list[int]) -> None:
        self._check_bytes(pool, handles)
        self._part.free(pool, [(handle, _units(self._objects[pool].pop(handle))) for handle in handles])
        self._evacuating[pool] &= _slabs_of(self._objects[pool])

    def _check_bytes(self, pool: int, handles: Iterable[int]) -> None:
        expected = {handle: self._objects[pool][handle] for handle in handles}
        found = self._part.read([(handle, _units(data)) for handle, data in expected.items()])
        assert found == list(expected.values())

    def _surplus_slabs(self, pool: int) -> int:
        """How many slabs could be emptied into the others of their class."""
        used: Counter[int] = Counter()
        slabs: dict[int, set[int]] = {}
        for handle, data in self._objects[pool].items():
            size = _class_units(_units(data))
            used[size] += 1
            slabs.setdefault(size, set()).add(handle // _SLAB_UNITS)
        return sum(
            max(0, len(slabs[size] - self._evacuating[pool]) - -(-count // (_SLAB_UNITS // size)))
            for size, count in used.items()
        )

    # ---- rules ----

    @precondition(lambda self: len(self._objects) < _POOLS_MAX)
    @rule()
    def make(self) -> None:
        self._pools_made += 1
        self._objects[self._pools_made] = {}
        self._evacuating[self._pools_made] = set()
        self._part.make(self._pools_made)

    @precondition(lambda self: len(self._objects) > 1)
    @rule(draw=_POOL)
    def destroy(self, draw: int) -> None:
        pool = self._pool(draw)
        del self._objects[pool], self._evacuating[pool]
        self._part.destroy(pool)

    @rule(draw=_POOL, units=st.lists(_UNITS, min_size=1, max_size=40), seed=_SEED)
    def store_mixed(self, draw: int, units: list[int], seed: int) -> None:
        generator = random.Random(seed)
        self._store(self._pool(draw), [generator.randbytes(count * UNIT_BYTES) for count in units])

    @rule(draw=_POOL, units=_UNITS, count=st.integers(1, 150), seed=_SEED)
    def store_alike(self, draw: int, units: int, count: int, seed: int) -> None:
        generator = random.Random(seed)
        self._store(self._pool(draw), [generator.randbytes(units * UNIT_BYTES) for _ in range(count)])

    @rule(draw=_POOL, percent=st.sampled_from([2, 30, 60, 90, 100]), seed=_SEED)
    def free(self, draw: int, percent: int, seed: int) -> None:
        pool = self._pool(draw)
        handles = self._some(pool, percent, seed)
        random.Random(seed).shuffle(handles)
        self._free(pool, handles)

    @rule(draw=_POOL, slabs=st.integers(0, _SLABS_MAX), extra_bytes=st.integers(0, SLAB_BYTES - 1))
    def evacuate(self, draw: int, slabs: int, extra_bytes: int) -> None:
        pool = self._pool(draw)
        wanted = slabs + (extra_bytes > 0)
        expected = min(wanted, self._surplus_slabs(pool))
        assert self._part.evacuate(pool, slabs * SLAB_BYTES + extra_bytes) == expected
        before = self._evacuating[pool]
        self._evacuating[pool] = self._slabs_evacuating(pool)
        assert self._evacuating[pool] >= before
        assert len(self._evacuating[pool]) == len(before) + expected

    def _slabs_evacuating(self, pool: int) -> set[int]:
        handles = self._part.evacuating(pool, list(self._objects[pool]))
        return {handle // _SLAB_UNITS for handle in handles}

    def _move(self, pool: int, percent: int, seed: int, *, grows: bool) -> None:
        for handle in self._some(pool, percent, seed):
            if handle // _SLAB_UNITS not in self._evacuating[pool]:
                continue
            stored = self._store(pool, [self._objects[pool][handle]])
            assert grows or [one.growth_bytes for one in stored] == [0]
            if stored:
                self._free(pool, [handle])

    @rule(draw=_POOL, percent=st.sampled_from([10, 50, 100]), seed=_SEED)
    def move(self, draw: int, percent: int, seed: int) -> None:
        """A part of what is in slabs being evacuated goes elsewhere."""
        self._move(self._pool(draw), percent, seed, grows=True)

    @rule(draw=_POOL)
    def evacuate_end(self, draw: int) -> None:
        pool = self._pool(draw)
        self._part.evacuate_end(pool)
        self._evacuating[pool] = set()
        assert not self._slabs_evacuating(pool)

    @rule(draw=_POOL)
    def compact(self, draw: int) -> None:
        """All that can be saved is saved, and moving takes no new slab."""
        pool = self._pool(draw)
        self.evacuate_end(draw)
        surplus, before = self._surplus_slabs(pool), len(_slabs_of(self._objects[pool]))
        self.evacuate(draw, _SLABS_MAX, 0)
        self._move(pool, 100, 0, grows=False)
        assert not self._evacuating[pool]
        assert len(_slabs_of(self._objects[pool])) == before - surplus
        self.evacuate_end(draw)
        assert self._surplus_slabs(pool) == 0

    @rule(seed=_SEED)
    def reopen(self, seed: int) -> None:
        """The daemon dies; its successor knows the live objects, in some order, and some that are not."""
        generator = random.Random(seed)
        adoptions = [
            (pool, handle, _units(data)) for pool, objects in self._objects.items() for handle, data in objects.items()
        ]
        generator.shuffle(adoptions)
        wrong = [adoption for good in adoptions[:8] for adoption in self._wrong_adoptions(*good)]
        results = self._part.reopen(list(self._objects), adoptions + wrong)
        assert results == [0] * len(adoptions) + [-errno.EINVAL] * len(wrong)
        self._evacuating = {pool: set() for pool in self._objects}

    def _wrong_adoptions(self, pool: int, handle: int, units: int) -> list[tuple[int, int, int]]:
        """Once more, of another class, at no object's start, outside, and by every other pool."""
        other_class = units - 2 if units > 2 else units + 2
        outside = handle + self._slabs * _SLAB_UNITS
        wrong = [(handle, units), (handle, other_class), (handle + 1, units), (outside, units)]
        others = [(other, handle, units) for other in self._objects if other != pool]
        return [(pool, *where) for where in wrong] + others

    @invariant()
    def state_agrees(self) -> None:
        if not self._pools_made:
            return
        state = self._part.state()
        assert set(state.pools) == set(self._objects)
        for number, of in state.pools.items():
            objects = self._objects[number]
            slabs = _slabs_of(objects)
            assert of.is_valid
            assert of.object_count == len(objects)
            assert of.object_bytes == sum(_class_units(_units(data)) for data in objects.values()) * UNIT_BYTES
            assert of.slab_count == len(slabs)
            assert of.bytes == len(slabs) * SLAB_BYTES
            self._check_bytes(number, objects)
        held_bytes = self._slabs_used() * SLAB_BYTES
        assert held_bytes <= state.memfd_bytes <= held_bytes + _RESERVE_SLABS * SLAB_BYTES

    @invariant()
    def no_object_overlaps(self) -> None:
        slabs: dict[int, tuple[int, int]] = {}
        for pool, objects in self._objects.items():
            for handle, data in objects.items():
                size = _class_units(_units(data))
                slab, place = divmod(handle, _SLAB_UNITS)
                assert slab < self._slabs
                assert place % size == 0
                assert place + size <= _SLAB_UNITS
                # One class and one pool a slab: with distinct handles, nothing overlaps.
                assert slabs.setdefault(slab, (pool, size)) == (pool, size)


def _units(data: bytes) -> int:
    return len(data) // UNIT_BYTES


def _slabs_of(handles: Iterable[int]) -> set[int]:
    return {handle // _SLAB_UNITS for handle in handles}


def test_pool_is_its_model(check_model: ModelCheck) -> None:
    check_model(PoolMachine)
