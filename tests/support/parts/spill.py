# SPDX-License-Identifier: MIT
"""spill — csrc/spill.h on a real file, called as writeback and fill call it.

What is written are pages in their pool form (csrc/codec.h), and what is read is expanded and checked:
that is who notices wrong bytes of an object.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PAGE_BYTES = 4096
UNIT_BYTES = 64
SEGMENT_BYTES = 1 << 20
_READS_AT_ONCE = 8
_READ_BYTES_MAX = 2 * PAGE_BYTES
_SECRET_BYTES = 192


class Packed(NamedTuple):
    """A page as it is stored."""

    data: bytes
    check: int

    @property
    def units(self) -> int:
        return len(self.data) // UNIT_BYTES


class Fault(NamedTuple):
    """The `call`-th system call at a fault point (csrc/fault_point.h) fails."""

    point: str
    error: int
    call: int = 1


class SpillState(NamedTuple):
    """What a backend says of itself."""

    is_valid: bool
    statistics: dict[str, int]
    sparse: tuple[int, int]  # segments, their live bytes
    sparse_segments: list[int]
    live_segments: list[int]
    file_bytes: int  # blocks of the file


class Spill:
    """One backend; segments being filled are numbered by the caller."""

    def __init__(self, ffi: Any, functions: Any, segments: int, io_backend: int) -> None:
        self._ffi, self._c = ffi, functions
        self._file = tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp"))  # noqa: SIM115 - until finish
        queue = ffi.new("struct io_queue **")
        self._segments = segments
        self._create()
        result = functions.io_queue_create(_READS_AT_ONCE, io_backend, queue)
        assert result == 0, result
        self._queue = queue[0]
        self._memory = mmap.mmap(-1, SEGMENT_BYTES)  # aligned for O_DIRECT
        self._buffer = ffi.from_buffer(self._memory)
        self._secret = ffi.new(f"uint8_t[{_SECRET_BYTES}]", bytes(range(_SECRET_BYTES)))
        self._packed: list[Packed] = []
        self._writers: dict[int, Any] = {}
        self._point_names: dict[str, Any] = {}  # the C side keeps the pointers

    def _create(self) -> None:
        spill = self._ffi.new("struct spill **")
        result = self._c.spill_create(os.dup(self._file.fileno()), self._segments * SEGMENT_BYTES, self._ffi.NULL, spill)
        assert result == 0, result
        self._spill = spill[0]

    def take_over(self, extents: Sequence[tuple[int, int]]) -> list[int]:
        """A new daemon on the same file: its answers to the claims of (extent, units)."""
        self._c.spill_destroy(self._spill)
        self._create()
        results = [int(self._c.spill_claim(self._spill, extent, units)) for extent, units in extents]
        self._c.spill_claims_end(self._spill)
        return results

    def finish(self) -> None:
        """The end of the backend and its file."""
        self._c.io_queue_destroy(self._queue)
        self._c.spill_destroy(self._spill)
        self._ffi.release(self._buffer)
        self._memory.close()
        self._file.close()

    # ---- faults ----

    def _arm(self, fault: Fault | None) -> None:
        if fault is not None:
            name = self._point_names.setdefault(fault.point, self._ffi.new("char[]", fault.point.encode()))
            self._c.fault_point_set(name, fault.call, fault.error, False)

    def _disarm(self, fault: Fault | None) -> int:
        """How often it happened."""
        if fault is None:
            return 0
        hits = int(self._c.fault_point_hits(self._point_names[fault.point]))
        self._c.fault_point_clear()
        return hits

    # ---- pages ----

    def pack(self, pages: Sequence[bytes], method: int) -> list[Packed]:
        """Compress pages, which are then known by their place in all that were packed."""
        scratch = self._c.codec_scratch_create()
        first = len(self._packed)
        for page in pages:
            units = self._c.codec_compress(scratch, method, self._aligned(page), self._buffer + PAGE_BYTES)
            data = self._memory[PAGE_BYTES : PAGE_BYTES + units * UNIT_BYTES]
            self._packed.append(Packed(data, self._c.codec_check(self._buffer, self._secret)))
        self._c.codec_scratch_destroy(scratch)
        return self._packed[first:]

    def _aligned(self, page: bytes) -> Any:
        self._memory[:PAGE_BYTES] = page
        return self._buffer

    def _expand(self, data: bytes, check: int) -> bytes | int:
        """As fill.c does it: the page, or -EBADMSG."""
        page = self._ffi.new(f"uint64_t[{PAGE_BYTES // 8}]")
        result = int(self._c.codec_expand(data, len(data) // UNIT_BYTES, page))
        if result == 0 and self._c.codec_check(page, self._secret) != check:
            result = -errno.EBADMSG
        return bytes(self._ffi.buffer(page)) if result == 0 else result

    # ---- writing ----

    def begin(self, writer: int) -> int:
        """spill_segment_begin()."""
        segment = self._ffi.new("struct spill_segment **")
        result = int(self._c.spill_segment_begin(self._spill, True, segment))
        if result == 0:
            self._writers[writer] = segment[0]
        return result

    def add(self, writer: int, objects: Sequence[tuple[int, int]]) -> list[int]:
        """Add each (owner, place in packed). Their extents; stops behind the first that does not fit."""
        extents: list[int] = []
        for owner, place in objects:
            packed = self._packed[place]
            extents.append(self._c.spill_segment_add(self._writers[writer], owner, packed.data, packed.units))
            if extents[-1] < 0:
                break
        return extents

    def count(self, writer: int) -> int:
        """spill_segment_count()."""
        return int(self._c.spill_segment_count(self._writers[writer]))

    def write(self, writer: int, fault: Fault | None) -> tuple[int, int]:
        """spill_segment_write(): its result, and how often the fault happened."""
        self._arm(fault)
        result = int(self._c.spill_segment_write(self._writers.pop(writer)))
        return result, self._disarm(fault)

    def abandon(self, writer: int) -> None:
        """spill_segment_abandon()."""
        self._c.spill_segment_abandon(self._writers.pop(writer))

    def free(self, extents: Sequence[tuple[int, int]]) -> None:
        """spill_free() of each (extent, units)."""
        for extent, units in extents:
            self._c.spill_free(self._spill, extent, units)

    def trim_wait(self, fault: Fault | None) -> int:
        """spill_trim_wait(); how often the fault happened."""
        self._arm(fault)
        self._c.spill_trim_wait(self._spill)
        return self._disarm(fault)

    # ---- reading ----

    def _read(self, slot: int, extent: int, units: int) -> tuple[int, Any]:
        """Start a read into a slot of the buffer."""
        wanted = self._c.spill_range_of(self._spill, extent, units)
        assert wanted.offset_bytes % PAGE_BYTES == 0 == wanted.length_bytes % PAGE_BYTES
        assert wanted.length_bytes <= _READ_BYTES_MAX
        fd, at = self._c.spill_fd(self._spill), self._buffer + slot * _READ_BYTES_MAX
        return self._c.io_read(self._queue, fd, at, wanted.length_bytes, wanted.offset_bytes, slot), wanted

    def _completions(self) -> Iterator[tuple[int, int]]:
        completions = self._ffi.new(f"struct io_completion[{_READS_AT_ONCE}]")
        while count := self._c.io_wait(self._queue, completions, _READS_AT_ONCE):
            for completion in completions[0:count]:
                yield completion.cookie, completion.result

    def _read_some(self, extents: Sequence[tuple[int, int, int]]) -> list[bytes | int]:
        pages: list[bytes | int] = []
        ranges = []
        for slot, (extent, units, _) in enumerate(extents):
            result, wanted = self._read(slot, extent, units)
            ranges.append(wanted)
            pages.append(result)
            if result < 0:
                self._c.spill_count_read(self._spill, 0, result)
        for slot, result in self._completions():
            self._c.spill_count_read(self._spill, ranges[slot].length_bytes, min(result, 0))
            assert result < 0 or result == ranges[slot].length_bytes
            _, units, check = extents[slot]
            start = slot * _READ_BYTES_MAX + ranges[slot].object_bytes_in
            data = self._memory[start : start + units * UNIT_BYTES]
            pages[slot] = self._expand(data, check) if result > 0 else result
        return pages

    def read(self, extents: Sequence[tuple[int, int, int]], fault: Fault | None) -> tuple[list[bytes | int], int]:
        """The page, or -errno, of each (extent, units, check); how often the fault happened."""
        self._arm(fault)
        pages: list[bytes | int] = []
        for i in range(0, len(extents), _READS_AT_ONCE):
            pages += self._read_some(extents[i : i + _READS_AT_ONCE])
        return pages, self._disarm(fault)

    def read_segment(self, number: int) -> bytes:
        """All bytes of a segment's place."""
        fd = self._c.spill_fd(self._spill)
        result = self._c.io_read_wait(fd, self._buffer, SEGMENT_BYTES, number * SEGMENT_BYTES)
        assert result == 0, result
        return self._memory[:]

    def verify(self, number: int, data: bytes) -> int | list[tuple[int, int, int, int]]:
        """spill_table_verify(): the (owner, extent, units, place in `data`) of its entries, or -errno."""
        count = int(self._c.spill_table_verify(self._spill, number, data))
        if count < 0:
            return count
        entries = [self._c.spill_table_entry(data, i) for i in range(count)]
        return [(entry.owner, entry.extent, entry.units, entry.object_bytes_in) for entry in entries]

    def flip(self, offset_bytes: int, bits: int) -> None:
        """Change bits of one byte on the file."""
        start = offset_bytes // PAGE_BYTES * PAGE_BYTES
        fd = self._c.spill_fd(self._spill)
        result = self._c.io_read_wait(fd, self._buffer, PAGE_BYTES, start)
        assert result == 0, result
        self._memory[offset_bytes - start] ^= bits
        result = self._c.io_write_wait(fd, self._buffer, PAGE_BYTES, start)
        assert result == 0, result

    # ---- state ----

    def _live_segments(self) -> list[int]:
        found: list[int] = []
        while (number := self._c.spill_next_segment(self._spill, found[-1] + 1 if found else 0)) >= 0:
            found.append(number)
        assert number == -errno.ENOENT
        return found

    def state(self) -> SpillState:
        """Everything that can be seen."""
        is_valid = bool(self._c.spill_is_valid(self._spill))
        statistics, live_bytes = self._ffi.new("struct spill_statistics *"), self._ffi.new("uint64_t *")
        self._c.spill_statistics(self._spill, statistics)
        values = {name: int(getattr(statistics, name)) for name, _ in self._ffi.typeof(statistics[0]).fields}
        sparse = int(self._c.spill_sparse_segments(self._spill, live_bytes)), int(live_bytes[0])
        live = self._live_segments()
        sparse_segments = [number for number in live if self._c.spill_is_sparse(self._spill, number)]
        file_bytes = os.fstat(self._file.fileno()).st_blocks * 512
        return SpillState(is_valid, values, sparse, sparse_segments, live, file_bytes)
