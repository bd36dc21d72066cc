# SPDX-License-Identifier: MIT
"""The independent reader of spill files, against bytes written by hand from the format's table."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from vswapd import spillfile
from vswapd.spillfile import Extent, SpillFileError, parse_segment, read_segments

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB = 1 << 20
IDENTITY = 0x1122334455667788


def little(value: int, count: int) -> bytes:
    return value.to_bytes(count, "little")


def sealed(data: bytearray) -> bytearray:
    """The same segment with the checksum that its header and table ask for."""
    table = int.from_bytes(data[40:44], "little")
    used = int.from_bytes(data[20:24], "little")
    data[24:32] = bytes(8)
    data[24:32] = little(xxhash.xxh3_64_intdigest(bytes(data[:64]) + bytes(data[table:used])), 8)
    return data


def segment_bytes(number: int, objects: list[tuple[int, bytes]], generation: int = 9) -> bytearray:
    """A segment of (owner, object) pairs, padded to a page: field by field, as csrc/spill.h has it."""
    body, table, unit = b"", b"", 1
    for owner, content in objects:
        units = len(content) // 64
        checksum = little(xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF, 4)
        table = little(owner, 8) + little(unit, 2) + little(units, 2) + checksum + table  # last object first
        body += content
        unit += units
    header = b"VSWPSEG2"  # 0
    header += little(generation, 8)  # 8
    header += little(len(objects), 4)  # 16
    header += little(64 + len(body) + len(table), 4)  # 20
    header += bytes(8)  # 24: checksum
    header += little(IDENTITY, 8)  # 32
    header += little(64 + len(body), 4)  # 40
    header += little(number, 4)  # 44
    header += bytes(16)  # 48
    data = sealed(bytearray(header + body + table))
    return data + bytes(-len(data) % 4096)


def place(extent: Extent) -> tuple[int, int, int]:
    return extent.owner, extent.extent, extent.units


def three_objects(first: int = 1) -> list[tuple[int, bytes]]:
    return [(first + i, bytes([first + i]) * 64 * units) for i, units in enumerate((1, 64, 7))]


def file_of(path: Path, segments: Mapping[int, bytes | bytearray], size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for place, data in segments.items():
            file.seek(place * MIB)
            file.write(data)
    return path


def test_numbers_agree_with_the_data_plane() -> None:
    source = Path(__file__).parents[2] / "csrc"
    limits = (source / "limits.h").read_text()
    assert re.search(r"#define SEGMENT_BYTES \(1UL << 20\)", limits)
    assert re.search(r"#define POOL_UNIT_BYTES 64UL", limits)
    assert re.search(r"#define POOL_UNITS_MAX 64\b", limits)
    assert spillfile.SEGMENT_BYTES == 1 << 20
    assert (spillfile.UNIT_BYTES, spillfile.UNITS_MAX) == (64, 64)
    assert (spillfile.HEADER.size, spillfile.ENTRY.size) == (64, 16)
    magics = f'magic "{spillfile.MAGIC.decode()}", of a sealed one "{spillfile.SEALED_MAGIC.decode()}"'
    assert magics in (source / "spill.h").read_text()


def test_segments_are_found_between_holes(tmp_path: Path) -> None:
    path = file_of(
        tmp_path / "spill",
        {0: segment_bytes(0, three_objects()), 5: segment_bytes(5, three_objects(50), generation=12)},
        8 * MIB,
    )
    first, second = read_segments(path)
    assert (first.number, first.generation, first.identity) == (0, 9, IDENTITY)
    assert [place(extent) for extent in first.extents] == [(1, 1, 1), (2, 2, 64), (3, 66, 7)]
    assert (second.number, second.generation) == (5, 12)
    base = 5 * MIB // 64
    assert [place(extent) for extent in second.extents] == [
        (50, base + 1, 1),
        (51, base + 2, 64),
        (52, base + 66, 7),
    ]
    assert first.damaged() == second.damaged() == []
    for segment, objects in ((first, three_objects()), (second, three_objects(50))):
        for extent, (_, content) in zip(segment.extents, objects, strict=True):
            assert segment.object_of(extent) == content


def test_file_may_end_behind_the_used_part(tmp_path: Path) -> None:
    data = segment_bytes(1, three_objects())
    path = file_of(tmp_path / "spill", {1: data}, MIB)
    (segment,) = read_segments(path)
    assert segment.number == 1
    assert path.stat().st_size == MIB + len(data)


def test_full_segment_of_smallest_objects() -> None:
    count = (MIB - 64) // (64 + 16)
    data = segment_bytes(3, [(i, little(i, 8) * 8) for i in range(count)])
    assert len(data) == MIB
    segment = parse_segment(3, bytes(data))
    assert segment is not None
    assert len(segment.extents) == count
    assert all(segment.object_of(extent)[:8] == little(extent.owner, 8) for extent in segment.extents)


@pytest.mark.parametrize("data", [b"", bytes(4096), b"VSWPSEG", b"VSWPSEG3" + bytes(4088), b"\xff" * 4096])
def test_other_content_is_no_segment(data: bytes) -> None:
    assert parse_segment(0, data) is None


@pytest.mark.parametrize(
    ("offset", "value", "cause"),
    [
        (16, little(0, 4), "no extents"),
        (16, little(4, 4), "4 extents"),
        (16, little(0xFFFFFFFF, 4), "4294967295 extents"),
        (20, little(MIB + 64, 4), "used bytes"),
        (40, little(0, 4), "table at byte 0"),
        (40, little(72, 4), "table at byte 72"),
        (40, little(0xFFFFFFC0, 4), "used bytes"),
        (44, little(1, 4), "was written as segment 1"),
        (48, b"\1", "reserved bytes"),
        (63, b"\1", "reserved bytes"),
        (64 + 72 * 64 + 8, little(65, 2), "does not end at unit 73"),
        (64 + 72 * 64 + 8, little(0xFFFF, 2), "does not end at unit 73"),
        (64 + 72 * 64 + 10, little(0, 2), "0 units"),
        (64 + 72 * 64 + 10, little(65, 2), "65 units"),
    ],
)
def test_wild_field_is_named_even_with_a_right_checksum(offset: int, value: bytes, cause: str) -> None:
    data = segment_bytes(0, three_objects())
    data[offset : offset + len(value)] = value
    with pytest.raises(SpillFileError, match=cause) as caught:
        parse_segment(0, bytes(sealed(data)))
    assert caught.value.number == 0


def test_gap_before_the_first_extent_is_refused() -> None:
    data = segment_bytes(0, three_objects())
    table = 64 + 72 * 64
    data[16:20] = little(2, 4)
    data[20:24] = little(table + 2 * 16, 4)
    with pytest.raises(SpillFileError, match="first extent is at unit 2"):
        parse_segment(0, bytes(sealed(data)))


@given(st.integers(0, 64 + 3 * 16 - 1), st.integers(0, 7))
def test_every_flipped_bit_of_header_and_table_is_seen(place: int, bit: int) -> None:
    data = segment_bytes(0, three_objects())
    offset = place if place < 64 else 72 * 64 + place
    data[offset] ^= 1 << bit
    if place < 8:
        assert parse_segment(0, bytes(data)) is None
    else:
        with pytest.raises(SpillFileError):
            parse_segment(0, bytes(data))


@given(st.integers(0, 72 * 64 - 1), st.integers(0, 7))
def test_every_flipped_bit_of_an_object_is_seen_in_that_object(place: int, bit: int) -> None:
    data = segment_bytes(0, three_objects())
    data[64 + place] ^= 1 << bit
    segment = parse_segment(0, bytes(data))
    assert segment is not None
    (damaged,) = segment.damaged()
    assert damaged.extent * 64 <= 64 + place < (damaged.extent + damaged.units) * 64


def sealed_segment(number: int, count: int = 3) -> bytearray:
    """What anybody without the key sees: noise between header and end, and one checksum over all of it."""
    body = hashlib.shake_256(b"%d" % number).digest(64 * 72 + 16 * count)
    header = b"VSWPSEAL" + little(9, 8) + little(count, 4) + little(64 + len(body), 4) + bytes(8)
    header += little(IDENTITY, 8) + little(64 + 64 * 72, 4) + little(number, 4) + bytes(range(16))
    data = bytearray(header + body)
    data[24:32] = little(xxhash.xxh3_64_intdigest(bytes(data)), 8)
    return data + bytes(-len(data) % 4096)


def test_sealed_segment_is_whole_or_not() -> None:
    data = sealed_segment(4)
    segment = parse_segment(4, bytes(data))
    assert segment is not None
    assert (segment.is_sealed, segment.extent_count, segment.extents) == (True, 3, ())
    assert segment.damaged() == []
    with pytest.raises(SpillFileError, match="written as segment 4"):
        parse_segment(5, bytes(data))


@given(st.integers(8, 64 + 72 * 64 + 3 * 16 - 1), st.integers(0, 7))
def test_every_flipped_bit_of_a_sealed_segment_is_seen(place: int, bit: int) -> None:
    data = sealed_segment(0)
    data[place] ^= 1 << bit
    with pytest.raises(SpillFileError):
        parse_segment(0, bytes(data))


@given(st.binary(max_size=300), st.integers(0, 100))
def test_anything_behind_the_magic_is_refused_in_order(tail: bytes, number: int) -> None:
    for magic in (b"VSWPSEG2", b"VSWPSEAL"):
        with pytest.raises(SpillFileError):
            parse_segment(number, magic + tail)


@pytest.mark.parametrize("length", [8, 63, 64, 65, 4096, 64 + 72 * 64 + 3 * 16 - 1])
def test_cut_segment_is_refused(length: int) -> None:
    with pytest.raises(SpillFileError, match="the file ends"):
        parse_segment(0, bytes(segment_bytes(0, three_objects())[:length]))


def test_broken_segment_is_raised_or_reported_and_the_rest_read(tmp_path: Path) -> None:
    broken = segment_bytes(1, three_objects())
    broken[24] ^= 1
    whole = {0: segment_bytes(0, three_objects()), 1: broken, 2: segment_bytes(2, three_objects())}
    path = file_of(tmp_path / "spill", whole, 3 * MIB)
    with pytest.raises(SpillFileError, match="segment 1: checksum mismatch"):
        list(read_segments(path))
    errors: list[SpillFileError] = []
    assert [segment.number for segment in read_segments(path, errors.append)] == [0, 2]
    assert [(error.number, error.cause) for error in errors] == [(1, "checksum mismatch of header and table")]


def test_empty_and_sparse_files_have_no_segments(tmp_path: Path) -> None:
    assert list(read_segments(file_of(tmp_path / "empty", {}, 0))) == []
    assert list(read_segments(file_of(tmp_path / "sparse", {}, 1 << 40))) == []
