# SPDX-License-Identifier: MIT
"""What a machine has and allows, out of a fake root."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vswapd import machine
from vswapd.failure import Failure

if TYPE_CHECKING:
    from pathlib import Path

_GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """8 GiB, 6 available, no cgroup."""
    _write(
        tmp_path / "proc/meminfo",
        "MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 6291456 kB\nHugePages: 3\n",
    )
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def test_memory_of_the_machine(root: Path) -> None:
    assert machine.ram_bytes(str(root)) == 8 * _GIB
    assert machine.available_bytes(str(root)) == 6 * _GIB


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/job\n", "sys/fs/cgroup/job/memory.max"),
        ("0::/../elsewhere\n", "sys/fs/cgroup/memory.max"),
        ("4:memory:/job\n0::/\n", "sys/fs/cgroup/memory/job/memory.limit_in_bytes"),
        ("4:cpu,memory:/host/path\n", "sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ],
)
def test_memory_of_a_cgroup(root: Path, membership: str, file: str) -> None:
    _write(root / "proc/self/cgroup", membership)
    _write(root / file, f"{_GIB}\n")
    assert machine.ram_bytes(str(root)) == _GIB
    assert machine.available_bytes(str(root)) == _GIB


def test_cgroups_with_those_above_them(root: Path) -> None:
    """The least limit counts, whoever has it; what cannot be seen is left out."""
    _write(root / "proc/self/cgroup", "4:memory:/a/b\n0::/a/b\n")
    for directory, limit in (("a/b", 3), ("a", 2), ("", 1 << 20)):
        _write(root / "sys/fs/cgroup/memory" / directory / "memory.limit_in_bytes", f"{limit * _GIB}\n")
    _write(root / "sys/fs/cgroup/unified/a/memory.max", "max\n")
    cgroups = machine.memory_cgroups(str(root))
    found = [(cgroup.directory.removeprefix(f"{root}/sys/fs/cgroup/"), cgroup.path) for cgroup in cgroups]
    assert found == [
        ("memory/a/b", "/a/b"),
        ("memory/a", "/a"),
        ("memory", "/"),
        ("unified/a", "/a"),
    ]
    assert machine.ram_bytes(str(root)) == 2 * _GIB


def test_cgroup_of_a_container_is_at_the_top(root: Path) -> None:
    _write(root / "proc/self/cgroup", "4:memory:/docker/1\n")
    _write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{_GIB}\n")
    assert [cgroup.path for cgroup in machine.memory_cgroups(str(root))] == ["/docker/1"]


def test_cgroup_without_a_limit(root: Path) -> None:
    _write(root / "proc/self/cgroup", "0::/\n1:name=systemd:/\n")
    _write(root / "sys/fs/cgroup/memory.max", "max\n")
    assert machine.ram_bytes(str(root)) == 8 * _GIB


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.12.3-amd64", (6, 12)), ("6.18", (6, 18)), ("7.0-rc1", (7, 0)), ("6.1rc", (6, 1)), ("x", (0, 0))],
)
def test_kernel_version(release: str, version: tuple[int, int]) -> None:
    assert machine.kernel_version(release) == version


def test_old_kernel_is_refused() -> None:
    machine.check_kernel("6.12.0")
    with pytest.raises(Failure, match=r"Linux 6\.11\.9 is too old; vswapd needs 6\.12 or later"):
        machine.check_kernel("6.11.9")


def test_capabilities(tmp_path: Path) -> None:
    assert machine.capabilities(str(tmp_path)) == 0
    _write(tmp_path / "proc/self/status", "Name: x\nCapEff:\t000001ffffffffff\n")
    assert machine.capabilities(str(tmp_path)) == 0x1FFFFFFFFFF


@pytest.mark.parametrize(("before", "after"), [("0\n", "-900"), ("300\n", "-900"), ("-950\n", "-950\n")])
def test_last_to_be_killed(tmp_path: Path, before: str, after: str) -> None:
    machine.avoid_oom_kill(str(tmp_path / "none"))
    _write(tmp_path / "proc/self/oom_score_adj", before)
    machine.avoid_oom_kill(str(tmp_path))
    assert (tmp_path / "proc/self/oom_score_adj").read_text(encoding="ascii") == after


def test_privilege() -> None:
    machine.check_privilege(1 << 19)
    with pytest.raises(Failure, match=r"needs root \(CAP_SYS_PTRACE\).*; use sudo"):
        machine.check_privilege(0x1FFFFFFFFFF & ~(1 << 19))


def test_userfaultfd(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"no .*userfaultfd; use a kernel with CONFIG_USERFAULTFD"):
        machine.check_userfaultfd(machine.open_errno(str(tmp_path / "userfaultfd")))
    with pytest.raises(Failure, match=r"cannot open .*: Is a directory; run as root"):
        machine.check_userfaultfd(machine.open_errno(str(tmp_path)))
    (tmp_path / "userfaultfd").touch()
    machine.check_userfaultfd(machine.open_errno(str(tmp_path / "userfaultfd")))
