# SPDX-License-Identifier: MIT
"""`vswapctl check` over files of known segments: what it counts, finds, refuses, and reads again."""

from __future__ import annotations

import fcntl
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from unit.test_spillfile import MIB, file_of, sealed_segment, segment_bytes, three_objects
from vswapd import cli, spillcheck
from vswapd.failure import Failure

if TYPE_CHECKING:
    from pathlib import Path


def _check(capsys: pytest.CaptureFixture[str], path: Path) -> tuple[int, dict[str, Any]]:
    status = cli.main(["check", "--json", "--socket", "/nonexistent", str(path)])
    return status, json.loads(capsys.readouterr().out)


def test_sound_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = segment_bytes(4, three_objects()[:2], generation=10)  # two of the pages once more
    path = file_of(tmp_path / "spill", {1: segment_bytes(1, three_objects()), 4: again, 6: sealed_segment(6)}, 8 * MIB)
    status, document = _check(capsys, path)
    assert status == 0
    assert document["findings"] == []
    assert (document["segments"], document["encrypted_segments"], document["objects"]) == (3, 1, 8)
    assert document["object_bytes"] == (72 + 65) * 64
    assert document["superseded_objects"] == 2
    assert document["size_bytes"] == 8 * MIB
    assert (document["is_in_use"], document["is_device"], document["live_bytes"]) == (False, False, None)
    assert cli.main(["check", str(path)]) == 0
    text = capsys.readouterr().out
    for part in ("3 segments with 8 objects; 1 segments are encrypted", "without the key", "no damage found"):
        assert part in text
    assert cli.main(["check", str(file_of(tmp_path / "empty", {}, 1 << 40))]) == 0


def test_damage_is_named_and_the_rest_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segments = {number: segment_bytes(number, three_objects(100 * number)) for number in range(3)}
    segments |= {3: sealed_segment(3), 4: bytearray(b"something else, where a segment was")}
    segments[0][64 + 64 + 5] ^= 1  # the second object
    segments[1][24] ^= 1
    segments[3][3000] ^= 1
    path = file_of(tmp_path / "spill", segments, 5 * MIB)
    status, document = _check(capsys, path)
    assert status == 1
    assert (document["segments"], document["objects"]) == (2, 6)
    assert [(finding["segment"], finding["cause"]) for finding in document["findings"]] == [
        (0, "object at byte 128: checksum mismatch (page 0x1000 of client 0)"),
        (1, "checksum mismatch of header and table"),
        (3, "checksum mismatch of the encrypted segment"),
        (4, "holds something that is no segment"),
    ]
    assert cli.main(["check", str(path)]) == 1
    text = capsys.readouterr().out
    assert "segment 1: checksum mismatch of header and table\n" in text
    assert text.endswith("\n4 findings\n")


def test_what_is_no_spill_file_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").write_bytes(b"all my work" * 1000)
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "thesis", "fifo", "."):
        before = sorted(tmp_path.iterdir())
        assert cli.main(["check", str(tmp_path / name)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert "name a spill file" in captured.err
        assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "thesis").read_bytes() == b"all my work" * 1000
    with pytest.raises(Failure, match="it holds something else"):
        spillcheck.check(str(tmp_path / "thesis"))


def test_in_use_what_is_half_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage that settles is none; damage that stays is."""
    whole = segment_bytes(0, three_objects())
    broken = segment_bytes(1, three_objects())
    broken[24] ^= 1
    half = whole[:4096].replace(whole[3000:3010], bytes(10))
    path = file_of(tmp_path / "spill", {0: half, 1: broken}, 2 * MIB)
    rests = []

    def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 1:  # the write goes on
            with path.open("r+b") as file:
                file.write(whole)

    monkeypatch.setattr(spillcheck.time, "sleep", rest)
    with path.open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        report = spillcheck.check(str(path))
    assert report.is_in_use
    assert (report.segments, report.changing_segments) == (1, 0)
    assert [finding.segment for finding in report.findings] == [1]
    assert len(rests) == 2


def test_in_use_a_segment_that_never_settles_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = segment_bytes(0, three_objects())
    data[24] ^= 1
    path = file_of(tmp_path / "spill", {0: data}, MIB)

    def change(_: float) -> None:
        data[200] ^= 1
        data[300] = (data[300] + 1) % 256
        with path.open("r+b") as file:
            file.write(data)

    monkeypatch.setattr(spillcheck.time, "sleep", change)
    with path.open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        report = spillcheck.check(str(path))
    assert (report.findings, report.changing_segments) == ([], 1)
