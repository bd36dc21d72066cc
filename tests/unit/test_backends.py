# SPDX-License-Identifier: MIT
"""Spill files: made, locked, sized, and never somebody's data."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

import pytest

from vswapd import backends
from vswapd.failure import Failure

if TYPE_CHECKING:
    from pathlib import Path

_MIB = 1 << 20
_LIMIT = 64 * _MIB


@pytest.mark.parametrize(
    ("text", "path", "size"),
    [
        ("/a/b", "/a/b", 0),
        ("/a/b:1G", "/a/b", 1 << 30),
        ("b:1.5GiB", "b", 3 << 29),
        ("/a:b/c", "/a:b/c", 0),
        ("/dev/disk/by-path/x:y/z:2M", "/dev/disk/by-path/x:y/z", 2 * _MIB),
    ],
)
def test_argument_is_split(text: str, path: str, size: int) -> None:
    assert backends.split_argument(text) == (path, size)


def test_existing_path_with_such_an_ending_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "file:1G"
    path.touch()
    assert backends.split_argument(str(path)) == (str(path), 0)


def test_file_is_made_for_its_user_only(tmp_path: Path) -> None:
    path = tmp_path / "spill"
    spill = backends.open_spill(str(path), 2 * _MIB, _LIMIT, -1)
    assert (spill.path, spill.size_bytes, spill.priority) == (str(path), 2 * _MIB, -1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not os.get_inheritable(spill.fd)
    spill.close()
    assert path.exists()


def test_size_fits_the_file_system(tmp_path: Path) -> None:
    spill = backends.open_spill(str(tmp_path / "spill"), 0, _LIMIT, 0)
    free = os.statvfs(tmp_path)
    assert 0 < spill.size_bytes <= free.f_bavail * free.f_frsize
    spill.close()


def test_former_spill_file_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "spill"
    for magic in (b"VSWPSEG1", b"VSWPSEG2", b"VSWPSEAL"):
        path.write_bytes(magic + bytes(100))
        backends.open_spill(str(path), 2 * _MIB, _LIMIT, 0).close()
        assert path.stat().st_size == 108
    path.write_bytes(bytes(4096))
    backends.open_spill(str(path), 2 * _MIB, _LIMIT, 0).close()


def test_other_content_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "thesis"
    path.write_bytes(bytes(4096) + b"all my work")
    with pytest.raises(Failure, match="holds something else, which would be lost"):
        backends.open_spill(str(path), 2 * _MIB, _LIMIT, 0)
    assert path.read_bytes().endswith(b"all my work")


def test_file_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spill"
    first = backends.open_spill(str(path), 2 * _MIB, _LIMIT, 0)
    with pytest.raises(Failure, match="in use: by another daemon"):
        backends.open_spill(str(path), 2 * _MIB, _LIMIT, 0)
    first.close()
    backends.open_spill(str(path), 2 * _MIB, _LIMIT, 0).close()


def test_all_files_are_opened_or_none_is_made(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    wanted = [(str(tmp_path / name), 2 * _MIB, 0, False, 0) for name in ("there", "new", "new")]
    with pytest.raises(Failure, match="named twice"):
        backends.open_spills(wanted, _LIMIT)
    assert list(tmp_path.iterdir()) == [there]
    first, second = backends.open_spills(wanted[:2], _LIMIT)
    first.close()
    second.close()


def test_refused_file_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(11, "locked")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with pytest.raises(Failure):
        backends.open_spill(str(tmp_path / "spill"), 2 * _MIB, _LIMIT, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "directory", "fifo", "missing/spill"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Failure, match="; name"):
        backends.open_spill(str(tmp_path / name), 2 * _MIB, _LIMIT, 0)


def test_private_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSWAPD_SPILL_DIR", str(tmp_path))
    before = os.umask(0)
    try:
        spill = backends.open_private_spill(_LIMIT)
    finally:
        os.umask(before)
    status = os.fstat(spill.fd)
    assert (status.st_nlink, stat.S_IMODE(status.st_mode), status.st_blocks) == (0, 0o600, 0)
    assert list(tmp_path.iterdir()) == []
    spill.close()


def test_private_file_without_tmpfile_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def without_tmpfile(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real_open(path, flags, mode)

    monkeypatch.setenv("VSWAPD_SPILL_DIR", str(tmp_path))
    monkeypatch.setattr(os, "open", without_tmpfile)
    spill = backends.open_private_spill(_LIMIT)
    assert os.fstat(spill.fd).st_nlink == 0
    assert list(tmp_path.iterdir()) == []
    spill.close()


def test_unwritable_directory_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSWAPD_SPILL_DIR", "/proc/self")
    with pytest.raises(Failure, match=r"cannot make a spill file in /proc/self.*set VSWAPD_SPILL_DIR"):
        backends.open_private_spill(_LIMIT)
