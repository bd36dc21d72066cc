# SPDX-License-Identifier: MIT
"""What scripts/bench changes goes back: after the end, an exception, and kill -9."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cgroup import Cgroup, CgroupError, Hierarchy, find_hierarchy
from benchmarks.journal import Journal, JournalError, read, restore


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "journal")


@pytest.fixture
def parameter(tmp_path: Path) -> Path:
    file = tmp_path / "page-cluster"
    file.write_text("3\n")
    return file


def change_parameter(journal: Journal, parameter: Path) -> None:
    journal.note("parameter", path=str(parameter), was="3", set="0")
    parameter.write_text("0\n")


def leave_behind(path: str, parameter: Path, directory: Path) -> None:
    """As a run does that is killed."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    owner = {"kind": "owner", "pid": process.pid, "start_time": "1"}
    changes = [
        {"kind": "parameter", "path": str(parameter), "was": "3", "set": "0"},
        {"kind": "directory", "path": str(directory)},
    ]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in (owner, *changes)))
    parameter.write_text("0\n")
    directory.mkdir()


def test_everything_goes_back_last_first(path: str, parameter: Path, tmp_path: Path) -> None:
    directory = tmp_path / "inside"
    with Journal(path) as journal:
        journal.note("directory", path=str(directory))
        directory.mkdir()
        change_parameter(journal, parameter)
        assert [change["kind"] for change in read(path)[1]] == ["directory", "parameter"]
    assert parameter.read_text() == "3"
    assert not directory.exists()
    assert not os.path.exists(path)


def test_an_exception_puts_it_back_too(path: str, parameter: Path) -> None:
    def interrupted() -> None:
        with Journal(path) as journal:
            change_parameter(journal, parameter)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert parameter.read_text() == "3"


def test_what_was_noted_but_not_done_is_no_problem(path: str, tmp_path: Path) -> None:
    with Journal(path) as journal:
        journal.note("directory", path=str(tmp_path / "never made"))
        journal.note("cgroup", path=str(tmp_path / "never made"))
        journal.note("swap", path=str(tmp_path / "never made"))
        journal.note("zram", number=None)
        journal.note("parameter", path=str(tmp_path / "never there"), was="1", set="2")
    assert journal.problems == []


def test_what_somebody_else_changed_meanwhile_stays(path: str, parameter: Path) -> None:
    with Journal(path) as journal:
        change_parameter(journal, parameter)
        parameter.write_text("7\n")
    assert parameter.read_text() == "7\n"


def test_what_cannot_be_undone_is_reported_and_kept(path: str, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with Journal(path) as journal:
        journal.note("cgroup", path=str(full))  # rmdir: ENOTEMPTY
    assert len(journal.problems) == 1
    assert str(full) in journal.problems[0]
    assert read(path)[1] == [{"kind": "cgroup", "path": str(full)}]


def test_a_killed_run_is_detected_and_restored(path: str, parameter: Path, tmp_path: Path) -> None:
    directory = tmp_path / "inside"
    leave_behind(path, parameter, directory)
    with pytest.raises(JournalError, match=r"left behind: parameter .*directory .*--restore"), Journal(path):
        pass
    assert restore(path) == []
    assert parameter.read_text() == "3"
    assert not directory.exists()
    assert not os.path.exists(path)
    assert restore(path) == []


def test_a_run_that_was_killed_before_it_did_anything_is_forgotten(path: str) -> None:
    Path(path).write_text(json.dumps({"kind": "owner", "pid": 1, "start_time": "never"}) + "\n")
    with Journal(path):
        pass


def test_two_at_a_time(path: str) -> None:
    with Journal(path) as journal:
        journal.note("directory", path="/nonexistent")
        with pytest.raises(JournalError, match=f"PID {os.getpid()}"), Journal(path):
            pass
        with pytest.raises(JournalError, match="still runs"):
            restore(path)


# ---- which hierarchy ----


def machine(root: Path, mounts: str, own: str) -> str:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mounts").write_text(mounts)
    (root / "proc/self/cgroup").write_text(own)
    return str(root)


def test_version_1(tmp_path: Path) -> None:
    mounts = (
        "cgroup /cg/cpu cgroup rw,cpu 0 0\ncgroup /cg/memory cgroup rw,memory 0 0\ncgroup2 /cg/unified cgroup2 rw 0 0\n"
    )
    found = find_hierarchy(machine(tmp_path, mounts, "4:memory:/a\n1:cpu:/\n0::/\n"))
    assert (found.version, found.mount, found.own) == (1, "/cg/memory", "/a")
    assert not found.charges_zswap


def test_version_2(tmp_path: Path) -> None:
    root = machine(tmp_path, "cgroup2 /cg cgroup2 rw 0 0\n", "0::/user.slice\n")
    (tmp_path / "cg").mkdir()
    (tmp_path / "cg/cgroup.controllers").write_text("cpu memory pids\n")
    found = find_hierarchy(root)
    assert (found.version, found.mount, found.own) == (2, "/cg", "/user.slice")
    assert found.charges_zswap


def test_neither(tmp_path: Path) -> None:
    with pytest.raises(CgroupError):
        find_hierarchy(machine(tmp_path, "proc /proc proc rw 0 0\n", "0::/\n"))


@pytest.mark.parametrize(
    ("version", "limit", "expected"), [(1, None, "-1"), (1, 7, "7"), (2, None, "max"), (2, 7, "7")]
)
def test_a_run_begins_with_a_limit_and_no_past(
    tmp_path: Path, path: str, version: int, limit: int | None, expected: str
) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    with Journal(path) as journal:
        group = Cgroup(Hierarchy(version, str(tmp_path), "/"), journal, "bench")
        group.begin(limit)
        made = {file.name: file.read_text() for file in Path(group.path).iterdir()}
        assert made["memory.limit_in_bytes" if version == 1 else "memory.max"] == expected
        assert ("memory.force_empty" in made) == (version == 1)
        for file in Path(group.path).iterdir():
            file.unlink()  # the kernel's go with their group
