# SPDX-License-Identifier: MIT
"""spillfile — the segments of a spill file or device, read without the engine.

A second reader of the format in csrc/spill.h, written from that comment alone: the oracle of tests,
and what `vswapctl check` believes. A place without the magic holds no segment; one with it must be
sound throughout but for its objects, and what is not raises SpillFileError. What is read was on disk, so it
may be anything: no count or offset is used before it is within bounds.

Of a sealed segment nobody but its daemon can read the table or the objects. Its one checksum is over all
of it, so what can be told is whether it is what was written.

What this cannot tell: which extents of a segment are still live, or that a segment is not the remains
of an earlier use (then its identity or generation differs from its neighbours'). Reading a file that a
daemon is writing to can find a segment half written.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEGMENT_BYTES = 1 << 20
UNIT_BYTES = 64
UNITS_MAX = 64  # of one extent
MAGIC = b"VSWPSEG2"
SEALED_MAGIC = b"VSWPSEAL"

# magic, generation, extent count, used bytes, checksum, identity, table offset, segment number, tag
HEADER = struct.Struct("<8sQIIQQII16s")
# owner, unit offset in the segment, units, checksum
ENTRY = struct.Struct("<QHHI")

_SEGMENT_UNITS = SEGMENT_BYTES // UNIT_BYTES
_CHECKSUM = slice(24, 32)


class SpillFileError(Exception):
    """Segment `number` has the magic but is not sound; `cause` says what is wrong with it."""

    def __init__(self, number: int, cause: str) -> None:
        super().__init__(f"segment {number}: {cause}")
        self.number = number
        self.cause = cause


@dataclass(frozen=True)
class Extent:
    """The place of one object, as the segment's table has it."""

    owner: int
    extent: int  # in units, from the start of the backend
    units: int
    checksum: int


@dataclass(frozen=True)
class Segment:
    """A sound segment. Extents are in order of their place; none are known of a sealed one."""

    number: int
    generation: int
    identity: int
    is_sealed: bool
    extent_count: int
    extents: tuple[Extent, ...]
    used: bytes = field(repr=False)  # header, objects, table

    def object_of(self, extent: Extent) -> bytes:
        """The object's bytes, in the form they have in the pool (csrc/codec.h)."""
        start = (extent.extent - self.number * _SEGMENT_UNITS) * UNIT_BYTES
        return self.used[start : start + extent.units * UNIT_BYTES]

    def damaged(self) -> list[Extent]:
        """Extents whose object is not what was written."""
        digest = xxhash.xxh3_64_intdigest
        return [
            extent for extent in self.extents if digest(self.object_of(extent)) & 0xFFFFFFFF != extent.checksum
        ]


def _table(number: int, table: bytes, end_unit: int) -> tuple[Extent, ...]:
    """The entries of a table, which come last object first and leave no gap before `end_unit`."""
    extents = []
    for owner, unit, units, checksum in ENTRY.iter_unpack(table):
        if not 1 <= units <= UNITS_MAX:
            raise SpillFileError(number, f"an extent of {units} units")
        if unit + units != end_unit:
            raise SpillFileError(number, f"an extent at unit {unit} does not end at unit {end_unit}")
        end_unit = unit
        extents.append(Extent(owner, number * _SEGMENT_UNITS + unit, units, checksum))
    if end_unit != HEADER.size // UNIT_BYTES:
        raise SpillFileError(number, f"the first extent is at unit {end_unit}")
    return tuple(reversed(extents))


def parse_segment(number: int, data: bytes) -> Segment | None:
    """The segment in `data` (what lies at its place, at most SEGMENT_BYTES), None when there is none."""
    if data[: len(MAGIC)] not in (MAGIC, SEALED_MAGIC):
        return None
    if len(data) < HEADER.size:
        raise SpillFileError(number, "the file ends in its header")
    magic, generation, count, used, checksum, identity, table_start, written_as, tag = HEADER.unpack_from(data)
    is_sealed = magic == SEALED_MAGIC
    if any(tag) and not is_sealed:
        raise SpillFileError(number, "the header's reserved bytes are not zero")
    if count < 1:
        raise SpillFileError(number, "no extents")
    if table_start < HEADER.size or table_start % UNIT_BYTES:
        raise SpillFileError(number, f"table at byte {table_start}")
    if table_start + count * ENTRY.size != used or used > SEGMENT_BYTES:
        raise SpillFileError(number, f"{count} extents, table at byte {table_start}, {used} used bytes")
    if used > len(data):
        raise SpillFileError(number, f"the file ends before its {used} used bytes")
    table = data[table_start:used]
    header = bytearray(data[: HEADER.size])
    header[_CHECKSUM] = bytes(8)
    rest = data[HEADER.size : used] if is_sealed else table
    if xxhash.xxh3_64_intdigest(bytes(header) + rest) != checksum:
        whole = "the encrypted segment" if is_sealed else "header and table"
        raise SpillFileError(number, f"checksum mismatch of {whole}")
    if written_as != number:
        raise SpillFileError(number, f"was written as segment {written_as}")
    extents = () if is_sealed else _table(number, table, table_start // UNIT_BYTES)
    return Segment(number, generation, identity, is_sealed, count, extents, data[:used])


def _next_data(descriptor: int, position: int, size: int) -> int:
    """The first position from `position` on that may hold data: holes of sparse files are skipped."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return position
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        if error.errno == errno.EINVAL:  # the file system does not know
            return position
        raise


def read_place(descriptor: int, number: int) -> bytes:
    """A segment's bytes; fewer at the end of the file. A place without the magic is read no further."""
    position = number * SEGMENT_BYTES
    data = os.pread(descriptor, HEADER.size, position)
    while len(data) < SEGMENT_BYTES and data.startswith((MAGIC, SEALED_MAGIC)):
        more = os.pread(descriptor, SEGMENT_BYTES - len(data), position + len(data))
        if not more:
            break
        data += more
    return data


def numbers(descriptor: int) -> Iterator[int]:
    """The places that may hold a segment, in order."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    number = 0
    while (position := _next_data(descriptor, number * SEGMENT_BYTES, size)) < size:
        number = position // SEGMENT_BYTES
        yield number
        number += 1


def read_segments(
    path: str | os.PathLike[str], on_error: Callable[[SpillFileError], None] | None = None
) -> Iterator[Segment]:
    """All sound segments, in order. One that is not goes to `on_error`; without that it is raised."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for number in numbers(descriptor):
            try:
                segment = parse_segment(number, read_place(descriptor, number))
            except SpillFileError as error:
                if on_error is None:
                    raise
                on_error(error)
            else:
                if segment is not None:
                    yield segment
    finally:
        os.close(descriptor)
