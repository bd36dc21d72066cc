# SPDX-License-Identifier: MIT
"""A spill backend beside a dict of its extents, on a real file that fails and forgets."""

from __future__ import annotations

import errno
import random
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.parts.spill import PAGE_BYTES, SEGMENT_BYTES, UNIT_BYTES, Fault, Packed
from vswapd import spillfile

if TYPE_CHECKING:
    from support.parts.check import ModelCheck
    from support.parts.remote import RemotePart

_SEGMENTS_MAX = 5
_WRITERS_MAX = 2
_PAGES = 40
_HEADER_BYTES = 64
_ENTRY_BYTES = 16
_SEGMENT_UNITS = SEGMENT_BYTES // UNIT_BYTES
_IO_URING, _IO_THREADS = 1, 2
_LZ4, _ZSTD = 0, 1

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM})  # the medium is sound


def _faults(points: list[str], errors: list[int], calls_max: int = 1) -> st.SearchStrategy[Fault]:
    return st.builds(Fault, st.sampled_from(points), st.sampled_from(errors), st.integers(1, calls_max))


_ALLOCATE_FAULTS = _faults(["spill/allocate"], [*sorted(_NO_ROOM), errno.EIO, errno.EINTR, errno.EOPNOTSUPP])
_WRITE_FAULTS = _faults(["io/write"], [errno.ENOSPC, errno.EIO, errno.EINTR, errno.EINVAL])
_READ_FAULTS = _faults(["io/read", "io/submit"], [errno.EIO, errno.EINTR, errno.EAGAIN], calls_max=20)
_PUNCH_FAULTS = _faults(["spill/punch"], [errno.EIO, errno.EOPNOTSUPP])
_TRANSIENT = frozenset({errno.EINTR, errno.EAGAIN})

_WRITER = st.integers(0, _WRITERS_MAX - 1)
_SEED = st.integers(0, 1 << 32)
_PERCENT = st.sampled_from([3, 40, 90, 100])


@dataclass(frozen=True)
class Extent:
    """An object in a segment."""

    owner: int
    extent: int
    place: int  # in _pages and _packed


def _pages(seed: int) -> list[bytes]:
    """From incompressible to nearly empty; of every size between."""
    generator = random.Random(seed)
    pages = []
    for i in range(_PAGES):
        noise = generator.randbytes(PAGE_BYTES * i // (_PAGES - 1))
        rest = PAGE_BYTES - len(noise)
        pages.append(noise + (generator.randbytes(7) * PAGE_BYTES)[:rest])
    return pages


class SpillMachine(RuleBasedStateMachine):
    """Up to _WRITERS_MAX segments being filled, and what was written before."""

    def __init__(self, part: RemotePart, io_backend: int) -> None:
        super().__init__()
        self._part = part
        self._io_backend = io_backend
        self._is_open = False
        self._filling: dict[int, list[Extent]] = {}
        self._written: dict[int, list[Extent]] = {}  # all that LIVE segments were written with
        self._live: dict[int, dict[int, Extent]] = {}  # by segment and extent
        self._flipped: Counter[int] = Counter()  # bits changed behind the backend's back, by offset on the file
        self._stale: dict[int, bytes] = {}  # what was in a segment once
        self._claimed: dict[int, int] = {}  # segments written before the last take-over: the end of what is known
        self._counts: Counter[str] = Counter()
        self._can_allocate = True

    @initialize(
        segments=st.integers(1, _SEGMENTS_MAX),
        written=st.integers(0, _SEGMENTS_MAX),
        seed=_SEED,
        method=st.sampled_from([_LZ4, _ZSTD]),
    )
    def open(self, segments: int, written: int, seed: int, method: int) -> None:
        self._part.open("spill", segments, self._io_backend)
        self._segments = segments
        self._random = random.Random(seed)
        self._pages = _pages(seed)
        self._packed: list[Packed] = self._part.pack(self._pages, method)
        self._is_open = True
        for _ in range(min(written, segments)):
            self.begin()
            self.add(0, self._random.choices(range(_PAGES), k=20))
            self.write(0, None)

    def teardown(self) -> None:
        if sys.exception() is not None or not self._is_open:
            self._part.stop()
            return
        for writer in list(self._filling):
            self.abandon(writer)
        self._free([extent for live in self._live.values() for extent in live.values()])
        self.state_agrees()
        self.trim(None)
        self._part.finish()

    # ---- helpers ----

    def _units(self, extent: Extent) -> int:
        return self._packed[extent.place].units

    def _end_unit(self, extents: list[Extent]) -> int:
        """Where the next object goes, from the start of the segment."""
        return 1 + sum(map(self._units, extents))

    def _used_bytes(self, extents: list[Extent]) -> int:
        return self._end_unit(extents) * UNIT_BYTES + len(extents) * _ENTRY_BYTES

    def _all_live(self) -> list[Extent]:
        return [extent for live in self._live.values() for extent in live.values()]

    def _some(self, extents: list[Extent], percent: int) -> list[Extent]:
        return [extent for extent in extents if self._random.randrange(100) < percent]

    def _is_changed(self, start: int, end: int) -> bool:
        return any(bits and start <= offset < end for offset, bits in self._flipped.items())

    def _segments_used(self) -> int:
        return len(self._filling) + len(self._live) + self._counts["quarantined"]

    def _forget(self, number: int) -> None:
        """Nothing that was done to a segment matters any more."""
        for offset in [offset for offset in self._flipped if offset // SEGMENT_BYTES == number]:
            del self._flipped[offset]

    # ---- writing ----

    @precondition(lambda self: len(self._filling) < _WRITERS_MAX)
    @rule()
    def begin(self) -> None:
        writer = next(writer for writer in range(_WRITERS_MAX) if writer not in self._filling)
        is_full = self._segments_used() == self._segments
        assert self._part.begin(writer) == (-errno.ENOSPC if is_full else 0)
        if not is_full:
            self._filling[writer] = []

    @precondition(lambda self: self._filling)
    @rule(draw=_WRITER, places=st.lists(st.integers(0, _PAGES - 1), min_size=1, max_size=30))
    def add(self, draw: int, places: list[int]) -> None:
        self._add(self._writer(draw), places)

    @precondition(lambda self: self._filling)
    @rule(draw=_WRITER)
    def add_all(self, draw: int) -> None:
        """Until not even the smallest object fits."""
        writer = self._writer(draw)
        smallest = min(range(_PAGES), key=lambda place: self._packed[place].units)
        for places in (self._random.choices(range(_PAGES), k=_SEGMENT_UNITS // 8), [smallest] * _SEGMENT_UNITS):
            self._add(writer, places)

    def _writer(self, draw: int) -> int:
        writers = sorted(self._filling)
        return writers[draw % len(writers)]

    def _add(self, writer: int, places: list[int]) -> None:
        extents = self._filling[writer]
        owners = [self._random.getrandbits(64) for _ in places]
        results = self._part.add(writer, list(zip(owners, places, strict=True)))
        used_bytes = self._used_bytes(extents)
        for result, owner, place in zip(results, owners, places, strict=False):
            used_bytes += self._packed[place].units * UNIT_BYTES + _ENTRY_BYTES
            if used_bytes > SEGMENT_BYTES:
                assert result == -errno.ENOSPC
                break
            assert result >= 0
            if extents:
                assert result == extents[-1].extent + self._units(extents[-1])
            else:
                assert result % _SEGMENT_UNITS == 1
            extents.append(Extent(owner, result, place))
        else:
            assert len(results) == len(places)
        numbers = [extents[0].extent // _SEGMENT_UNITS for extents in self._filling.values() if extents]
        assert len({*numbers, *self._live}) == len(numbers) + len(self._live)
        assert all(number < self._segments for number in numbers)
        assert self._part.count(writer) == len(extents)

    @precondition(lambda self: self._filling)
    @rule(draw=_WRITER, fault=st.none() | _ALLOCATE_FAULTS | _WRITE_FAULTS)
    def write(self, draw: int, fault: Fault | None) -> None:
        writer = self._writer(draw)
        extents = self._filling.pop(writer)
        expected = self._expected_of_write(fault) if extents else 0
        assert self._part.write(writer, fault)[0] == expected
        if not extents:
            return
        number = extents[0].extent // _SEGMENT_UNITS
        self._forget(number)
        if expected == 0:
            self._claimed.pop(number, None)
            self._written[number] = extents
            self._live[number] = {extent.extent: extent for extent in extents}
            self._counts["written_bytes"] += -(-self._used_bytes(extents) // PAGE_BYTES) * PAGE_BYTES
        else:
            self._counts["write_errors"] += 1
            self._counts["quarantined"] += -expected not in _NO_ROOM

    def _expected_of_write(self, fault: Fault | None) -> int:
        if fault is None or fault.error == errno.EINTR:
            return 0
        if fault.point == "io/write":
            return 0 if fault.error == errno.EINVAL else -fault.error  # EINVAL: again without O_DIRECT
        if not self._can_allocate:
            return 0
        if fault.error == errno.EOPNOTSUPP:
            self._can_allocate = False
            return 0
        return -fault.error

    @precondition(lambda self: not self._filling and self._segments_used() < self._segments)
    @rule(is_full=st.booleans(), fault=st.none() | _ALLOCATE_FAULTS | _WRITE_FAULTS)
    def write_one(self, is_full: bool, fault: Fault | None) -> None:
        """A segment from its beginning to its end; a table of an earlier one there is not believed."""
        self.begin()
        self._add(0, self._random.choices(range(_PAGES), k=20))
        if is_full:
            self.add_all(0)
        number = self._filling[0][0].extent // _SEGMENT_UNITS
        self.write(0, fault)
        if number in self._live:
            self.verify(sorted(self._live).index(number))

    @precondition(lambda self: self._filling)
    @rule(draw=_WRITER)
    def abandon(self, draw: int) -> None:
        writer = self._writer(draw)
        del self._filling[writer]
        self._part.abandon(writer)

    # ---- freeing ----

    @rule(percent=_PERCENT)
    def free(self, percent: int) -> None:
        self._free(self._some(self._all_live(), percent))

    @precondition(lambda self: self._live)
    @rule(draw=st.integers(0, _SEGMENTS_MAX - 1))
    def free_segment(self, draw: int) -> None:
        numbers = sorted(self._live)
        number = numbers[draw % len(numbers)]
        self._stale[number] = self._part.read_segment(number)
        self._free(list(self._live[number].values()))

    def _free(self, extents: list[Extent]) -> None:
        self._random.shuffle(extents)
        self._part.free([(extent.extent, self._units(extent)) for extent in extents])
        for extent in extents:
            number = extent.extent // _SEGMENT_UNITS
            del self._live[number][extent.extent]
            if not self._live[number]:
                del self._live[number], self._written[number]
                self._claimed.pop(number, None)

    @rule(fault=st.none() | _PUNCH_FAULTS)
    def trim(self, fault: Fault | None) -> None:
        """All that is free is given back, unless the file system refuses."""
        self._counts["trim_errors"] += self._part.trim_wait(fault)
        state = self._part.state()
        assert state.statistics["untrimmed_bytes"] == 0
        if self._counts["trim_errors"] == 0:
            # An abandoned segment that was not trimmed before is still to be trimmed then.
            assert state.file_bytes <= (self._segments_used() + 1) * SEGMENT_BYTES

    # ---- recovery ----

    @precondition(lambda self: not self._filling)
    @rule(percent=_PERCENT)
    def take_over(self, percent: int) -> None:
        """A successor, which claims what its slots name, and some of it twice."""
        lost = {extent.extent for extent in self._all_live()}
        kept = self._some(self._all_live(), percent)
        self._random.shuffle(kept)
        lost -= {extent.extent for extent in kept}
        claims = [(extent.extent, self._units(extent)) for extent in kept]
        claims += self._random.sample(claims, min(len(claims), 2))
        results = self._part.take_over([*claims, (0, 1), (self._segments * _SEGMENT_UNITS + 1, 1)])
        assert results == [0] * len(kept) + [-errno.EINVAL] * (len(claims) - len(kept) + 2)
        for number, live in list(self._live.items()):
            for extent in lost & live.keys():
                del live[extent]
            if not live:
                del self._live[number], self._written[number]
        self._claimed = {
            number: max(extent.extent % _SEGMENT_UNITS + self._units(extent) for extent in live.values())
            for number, live in self._live.items()
        }
        self._counts.clear()
        self._can_allocate = True

    # ---- reading ----

    @rule(percent=_PERCENT, fault=st.none() | st.none() | _READ_FAULTS)
    def read(self, percent: int, fault: Fault | None) -> None:
        """The page as it was, or an error; never other bytes."""
        extents = self._some(self._all_live(), percent)
        wanted = [(extent.extent, self._units(extent), self._packed[extent.place].check) for extent in extents]
        pages, hits = self._part.read(wanted, fault)
        failed = 0
        for page, extent in zip(pages, extents, strict=True):
            start = extent.extent * UNIT_BYTES
            if page == self._pages[extent.place]:
                continue
            assert isinstance(page, int), "wrong bytes"
            if page == -errno.EBADMSG:
                assert self._is_changed(start, start + self._units(extent) * UNIT_BYTES)
            else:
                assert fault is not None
                assert page == -fault.error
                failed += 1
        assert failed == (0 if fault is None or self._is_retried(fault) else hits)
        self._counts["read_errors"] += failed

    def _is_retried(self, fault: Fault) -> bool:
        # Threads refuse a request for want of a thread only, whatever the error is.
        is_refused = fault.point == "io/submit" and self._io_backend == _IO_THREADS
        return fault.error in _TRANSIENT and not is_refused

    @precondition(lambda self: self._live)
    @rule(draw=st.integers(0, _SEGMENTS_MAX - 1), offset=st.integers(0, SEGMENT_BYTES - 1), bits=st.integers(1, 255))
    def flip(self, draw: int, offset: int, bits: int) -> None:
        """The medium changes a byte of what was written."""
        numbers = sorted(self._live)
        number = numbers[draw % len(numbers)]
        offset = number * SEGMENT_BYTES + offset % self._used_bytes(self._written[number])
        self._part.flip(offset, bits)
        self._flipped[offset] ^= bits

    @precondition(lambda self: self._live)
    @rule(draw=st.integers(0, _SEGMENTS_MAX - 1))
    def verify(self, draw: int) -> None:
        """A table is believed when it is what was written last, there, and only then."""
        numbers = sorted(self._live)
        number = numbers[draw % len(numbers)]
        data = self._part.read_segment(number)
        start = number * SEGMENT_BYTES
        written = self._written[number]
        table = range(self._end_unit(written) * UNIT_BYTES, self._used_bytes(written))
        if self._is_changed(start, start + _HEADER_BYTES) or self._is_changed(start + table.start, start + table.stop):
            self._assert_not_believed(number, data)
            return
        self._assert_believed(number, data)
        checked = [*range(_HEADER_BYTES), *table]
        for offset in self._random.sample(checked, 12):
            changed = bytearray(data)
            changed[offset] ^= self._random.randint(1, 255)
            self._assert_not_believed(number, bytes(changed))
        for other in range(self._segments):
            if other != number:
                assert self._part.verify(other, data) == -errno.EBADMSG
        if number in self._stale and number not in self._claimed:
            assert self._part.verify(number, self._stale[number]) == -errno.EBADMSG

    def _assert_believed(self, number: int, data: bytes) -> None:
        written = self._written[number]
        entries = self._part.verify(number, data)
        assert isinstance(entries, list)
        assert [entry[:3] for entry in entries] == [
            (extent.owner, extent.extent, self._units(extent)) for extent in written
        ]
        segment = spillfile.parse_segment(number, data)  # a reader that knows the format only
        assert segment is not None
        assert [(extent.owner, extent.extent, extent.units) for extent in segment.extents] == [
            entry[:3] for entry in entries
        ]
        damaged = {extent.extent for extent in segment.damaged()}
        for extent, (_, _, units, place) in zip(written, entries, strict=True):
            start = extent.extent * UNIT_BYTES
            is_changed = self._is_changed(start, start + units * UNIT_BYTES)
            assert is_changed == (extent.extent in damaged)
            if not is_changed:
                assert data[place : place + units * UNIT_BYTES] == self._packed[extent.place].data

    def _assert_not_believed(self, number: int, data: bytes) -> None:
        assert self._part.verify(number, data) == -errno.EBADMSG
        try:
            segment = spillfile.parse_segment(number, data)
        except spillfile.SpillFileError:
            return
        assert segment is None

    # ---- state ----

    @invariant()
    def state_agrees(self) -> None:
        if not self._is_open:
            return
        state = self._part.state()
        statistics = state.statistics
        live_bytes = {number: sum(map(self._units, live.values())) * UNIT_BYTES for number, live in self._live.items()}
        assert state.is_valid
        assert state.live_segments == sorted(self._live)
        assert statistics["size_bytes"] == self._segments * SEGMENT_BYTES
        assert statistics["used_bytes"] == self._segments_used() * SEGMENT_BYTES
        assert statistics["quarantined_bytes"] == self._counts["quarantined"] * SEGMENT_BYTES
        assert statistics["used_bytes"] + statistics["untrimmed_bytes"] <= statistics["size_bytes"]
        assert statistics["live_bytes"] == sum(live_bytes.values())
        assert statistics["extent_count"] == sum(map(len, self._live.values()))
        assert statistics["written_bytes"] == self._counts["written_bytes"]
        assert statistics["write_errors"] == self._counts["write_errors"]
        assert statistics["read_errors"] == self._counts["read_errors"]
        assert statistics["trim_errors"] == self._counts["trim_errors"]
        sparse = [number for number in sorted(self._live) if self._is_sparse(number)]
        assert state.sparse_segments == sparse
        assert state.sparse == (len(sparse), sum(live_bytes[number] for number in sparse))

    def _is_sparse(self, number: int) -> bool:
        """4 % of its objects are dead, or 4 % of the segment was never filled."""
        live = self._live[number].values()
        end_unit = self._claimed.get(number) or self._end_unit(self._written[number])
        table_units = -(-len(live) * _ENTRY_BYTES // UNIT_BYTES)
        is_dead = sum(map(self._units, live)) * 100 < (end_unit - 1) * 96
        return is_dead or (end_unit + table_units) * 100 < _SEGMENT_UNITS * 96


@pytest.mark.parametrize("io_backend", [_IO_URING, _IO_THREADS], ids=["io_uring", "threads"])
def test_spill_is_its_model(check_model: ModelCheck, io_backend: int) -> None:
    check_model(lambda part: SpillMachine(part, io_backend))
