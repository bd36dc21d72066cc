# SPDX-License-Identifier: MIT
"""Each finding of `vswapctl doctor`, out of facts; the facts, out of a fake root; the command."""

from __future__ import annotations

import ast
import dataclasses
import errno
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vswapd import __version__, cli, doctor, facts
from vswapd.doctor import NOTE, OK, PROBLEM, Finding
from vswapd.facts import Facts, Program

if TYPE_CHECKING:
    from collections.abc import Callable

_GIB = 1 << 30
_ALL_FEATURES = 0x1FFFF

_HEALTHY = Facts(
    release="6.18.0",
    capabilities=0x1FFFFFFFFFF,
    userfaultfd_errno=0,
    userfaultfd_features=_ALL_FEATURES,
    io_uring_errno=0,
    library_error="",
    spill_directory="/var/tmp",
    spill_errno=0,
    spill_type="ext4",
    spill_free_bytes=64 * _GIB,
    ram_bytes=16 * _GIB,
    available_bytes=8 * _GIB,
    memlock_bytes=8 << 20,
    fuse_errno=0,
    has_systemd=True,
    container="",
    socket_path="/run/vswapd/vswapd.sock",
    socket_errno=errno.ENOENT,
    daemon_version="",
)
_SERVED = {"socket_errno": 0, "daemon_version": __version__}

# (facts that differ, name, level, part of the text, part of the remedy)
_FINDINGS: list[tuple[dict[str, Any], str, str, str, str]] = [
    ({}, "kernel", OK, "Linux 6.18.0", ""),
    ({"release": "6.11.9"}, "kernel", PROBLEM, "too old", "6.12"),
    ({}, "daemon", OK, "starts a private one", ""),
    (_SERVED, "daemon", OK, f"version {__version__} answers", ""),
    (_SERVED | {"daemon_version": "9.9"}, "daemon", NOTE, "9.9 answers on /run/vswapd/vswapd.sock, but", "restart"),
    ({"socket_errno": errno.ECONNREFUSED}, "daemon", NOTE, "Connection refused", "start vswapd"),
    ({}, "privilege", OK, "CAP_SYS_PTRACE", ""),
    ({"capabilities": 0}, "privilege", PROBLEM, "needs root (CAP_SYS_PTRACE)", "sudo"),
    ({"capabilities": 0} | _SERVED, "privilege", OK, "none is needed", ""),
    ({}, "userfaultfd", OK, "can be opened", ""),
    ({"userfaultfd_errno": errno.ENOENT}, "userfaultfd", PROBLEM, "no /dev/userfaultfd", "--device=/dev/userfaultfd"),
    ({"userfaultfd_errno": errno.EACCES}, "userfaultfd", PROBLEM, "Permission denied", "root"),
    ({"userfaultfd_errno": errno.EACCES} | _SERVED, "userfaultfd", OK, "the system daemon has it", ""),
    ({}, "features", OK, "MOVE", ""),
    ({"userfaultfd_features": _ALL_FEATURES & ~(1 << 16)}, "features", PROBLEM, "lacks MOVE", "6.12 or later"),
    ({"userfaultfd_features": 0}, "features", PROBLEM, "lacks EVENT_FORK, EVENT_REMAP", "CONFIG_USERFAULTFD"),
    ({"userfaultfd_features": None}, "features", PROBLEM, "gives no userfaultfd", "security profile"),
    ({"userfaultfd_features": None, "userfaultfd_errno": errno.EACCES}, "features", NOTE, "not asked", "accessible"),
    ({"userfaultfd_features": None, "userfaultfd_errno": errno.EACCES} | _SERVED, "features", OK, "not asked", ""),
    ({}, "library", OK, "installed", ""),
    ({"library_error": "no libvswap.so; install it"}, "library", PROBLEM, "no libvswap.so", "install it"),
    ({}, "memory", OK, "8 GiB of 16 GiB", ""),
    ({"available_bytes": 1 << 20}, "memory", NOTE, "1 MiB of 16 GiB", "end something"),
    ({}, "spill", OK, "64 GiB free in /var/tmp (ext4)", ""),
    ({"spill_type": ""}, "spill", OK, "64 GiB free in /var/tmp", ""),
    ({"spill_errno": errno.EACCES}, "spill", PROBLEM, "Permission denied", "VSWAPD_SPILL_DIR"),
    ({"spill_type": "tmpfs"}, "spill", PROBLEM, "tmpfs: what is swapped there stays in RAM", "--no-spill"),
    ({"spill_type": "tmpfs"} | _SERVED, "spill", NOTE, "stays in RAM", "--no-spill"),
    ({"spill_errno": errno.EACCES} | _SERVED, "spill", NOTE, "Permission denied", "VSWAPD_SPILL_DIR"),
    ({"spill_free_bytes": 1 << 20}, "spill", PROBLEM, "1 MiB free in /var/tmp: no room", "--spill"),
    ({"spill_free_bytes": 2 * _GIB}, "spill", NOTE, "less than the RAM (16 GiB)", "free some"),
    ({}, "io_uring", OK, "available", ""),
    ({"io_uring_errno": errno.EPERM}, "io_uring", NOTE, "threads read spill files", "io_uring_disabled=0"),
    ({"io_uring_errno": errno.ENOSYS}, "io_uring", NOTE, "Function not implemented", "seccomp"),
    ({}, "memlock", OK, "limit 8 MiB", ""),
    ({"memlock_bytes": None}, "memlock", OK, "no limit", ""),
    ({"memlock_bytes": 64 << 10}, "memlock", NOTE, "64 KiB", "LimitMEMLOCK=1M"),
    ({}, "fuse", OK, "/dev/fuse", ""),
    ({"fuse_errno": errno.ENOENT}, "fuse", NOTE, "vswapd --fs", "modprobe fuse"),
    ({}, "systemd", OK, "runs", ""),
    ({"has_systemd": False}, "systemd", NOTE, "does not run here", "other means"),
    ({}, "container", OK, "none", ""),
    ({"container": "podman"}, "container", OK, "podman", ""),
    ({"container": "docker", "capabilities": 0}, "container", NOTE, "docker, which withholds", "--cap-add=SYS_PTRACE"),
    ({"container": "docker", "capabilities": 0} | _SERVED, "container", OK, "docker", ""),
    ({"program": Program("/x", error="no such thing")}, "program", PROBLEM, "no such thing", "as you would"),
    ({"program": Program("/x")}, "program", NOTE, "/x is no ELF file", "the program it starts"),
    ({"program": Program("/x", is_elf=True, is_native=False)}, "program", PROBLEM, "another architecture", "64-bit"),
    ({"program": Program("/x", is_elf=True)}, "program", NOTE, "statically linked: it is managed itself", "dynamically"),
    ({"program": Program("/x", is_elf=True, loader="/lib/ld-musl-x86_64.so.1")}, "program", NOTE, "musl: it is managed itself", "glibc"),
    ({"program": Program("/x", is_elf=True, loader="/lib64/ld.so", is_privileged=True)},
     "program", PROBLEM, "setuid", "as the user"),
    ({"program": Program("/py", is_elf=True, loader="/lib64/ld.so", script="/s")},
     "program", OK, "/py, which runs /s, can be managed", ""),
]  # fmt: skip


def _finding(changes: dict[str, Any], name: str) -> Finding:
    findings = doctor.examine(dataclasses.replace(_HEALTHY, **changes))
    return next(finding for finding in findings if finding.name == name)


@pytest.mark.parametrize(("changes", "name", "level", "text", "remedy"), _FINDINGS)
def test_finding(changes: dict[str, Any], name: str, level: str, text: str, remedy: str) -> None:
    finding = _finding(changes, name)
    assert finding.level == level
    assert text in finding.text
    assert remedy in finding.remedy
    assert bool(finding.remedy) == (level != OK), "a remedy where one is needed, and only there"


def test_table_has_every_finding() -> None:
    """Each place that makes a Finding makes one for some row above."""
    tree = ast.parse(Path(doctor.__file__).read_text(encoding="utf-8"))
    checks = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]
    assert [f"check_{name.name.removeprefix('check_')}" for name in checks] == [
        f"check_{check.__name__.removeprefix('check_')}"
        for check in sorted(doctor.CHECKS, key=lambda check: check.__code__.co_firstlineno)
    ]
    for check in checks:
        made = sum(
            isinstance(node, ast.Return) and not (isinstance(node.value, ast.Constant) and node.value.value is None)
            for node in ast.walk(check)
        )
        name = check.name.removeprefix("check_")
        rows = {(level, text) for _, row, level, text, _ in _FINDINGS if row == name}
        assert len(rows) >= made, f"{check.name} has {made} findings, the table {len(rows)}"


def test_healthy_machine_has_no_remedy() -> None:
    assert {finding.level for finding in doctor.examine(_HEALTHY)} == {OK}


# ---- facts ----


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_file_system_of_a_path(tmp_path: Path) -> None:
    _write(
        tmp_path / "proc/self/mountinfo",
        "22 1 8:1 / / rw - ext4 /dev/vda1 rw\n"
        "23 22 0:5 / /var rw shared:1 - xfs /dev/vdb rw\n"
        "24 23 0:6 / /var/a\\040b rw - tmpfs tmpfs rw\n"
        "25 22 0:7 / /srv rw - ext4 /dev/vdc rw\n"
        "26 25 0:8 / /srv rw - btrfs /dev/vdd rw\n"
        "malformed\n",
    )
    root = str(tmp_path)
    assert facts.file_system_type("/etc", root) == "ext4"
    assert facts.file_system_type("/var/tmp", root) == "xfs"
    assert facts.file_system_type("/variant", root) == "ext4"
    assert facts.file_system_type("/var/a b/c", root) == "tmpfs"
    assert facts.file_system_type("/srv/x", root) == "btrfs"
    assert facts.file_system_type("/", str(tmp_path / "nosuch")) == ""


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("run/systemd/container", "systemd-nspawn\n", "systemd-nspawn"),
        ("proc/1/environ", "PATH=/bin\0container=lxc\0", "lxc"),
        (".dockerenv", "", "docker"),
        ("run/.containerenv", "", "podman"),
        ("var/run/secrets/kubernetes.io/serviceaccount", "", "kubernetes"),
        ("etc/hostname", "", ""),
    ],
)
def test_container(tmp_path: Path, file: str, text: str, name: str) -> None:
    _write(tmp_path / file, text)
    assert facts.container(str(tmp_path)) == name


def _elf(path: Path, *, loader: str = "", machine: int | None = None, bits: int = 2) -> Path:
    """The least that is an ELF program."""
    if machine is None:
        machine = {"x86_64": 62, "aarch64": 183, "riscv64": 243}[os.uname().machine]
    head = struct.pack("<4s5B7x2HI3QI6H", b"\177ELF", bits, 1, 1, 0, 0, 3, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<2I6Q", 1, 5, 0, 0, 0, 0, 0, 0)
    text = loader.encode() + b"\0"
    other = struct.pack("<2I6Q", 3 if loader else 4, 4, 176, 0, 0, len(text), len(text), 1)
    path.write_bytes(head + load + other + text)
    path.chmod(0o755)
    return path


def test_kinds_of_programs(tmp_path: Path) -> None:
    look = facts.look_at_program
    dynamic = _elf(tmp_path / "dynamic", loader="/lib64/ld-linux-x86-64.so.2")
    program = look(str(dynamic))
    assert (program.is_elf, program.is_native, program.loader) == (True, True, "/lib64/ld-linux-x86-64.so.2")
    assert not program.is_privileged
    dynamic.chmod(0o4755)
    assert look(str(dynamic)).is_privileged
    assert look(str(_elf(tmp_path / "static"))).loader == ""
    assert not look(str(_elf(tmp_path / "foreign", machine=8))).is_native
    assert not look(str(_elf(tmp_path / "32", bits=1))).is_native
    assert look(str(tmp_path / "nosuch")).error.startswith("command not found")
    (tmp_path / "text").write_text("hello")
    assert "not executable" in look(str(tmp_path / "text")).error


def test_scripts_are_their_interpreters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    dynamic = _elf(tmp_path / "interpreter", loader="/lib64/ld.so")
    for line in (f"#!{dynamic} -x", "#!/usr/bin/env interpreter", "#!/usr/bin/env -S A=1 interpreter -u"):
        script = tmp_path / "script"
        script.write_text(line + "\n")
        script.chmod(0o755)
        program = facts.look_at_program("script")
        assert (program.path, program.script, program.is_elf) == (str(dynamic), str(script), True)
    script.write_text("#!\n")
    assert facts.look_at_program("script").error


def test_facts_of_this_machine_can_be_had() -> None:
    found = facts.gather("sh", "/nonexistent/s")
    assert found.release == os.uname().release
    assert found.socket_errno == errno.ENOENT
    assert found.program
    assert found.program.is_elf


# ---- command ----


@pytest.mark.parametrize(("changes", "status"), [({}, 0), ({"has_systemd": False}, 0), ({"capabilities": 0}, 1)])
def test_status_is_1_with_a_problem(
    changes: dict[str, Any], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def gather(program: str | None, socket_path: str | None) -> Facts:
        asked.append((program, socket_path))
        return dataclasses.replace(_HEALTHY, **changes)

    monkeypatch.setattr(facts, "gather", gather)
    assert cli.main(["doctor", "--socket", "/s", "sort"]) == status
    assert asked == [("sort", "/s")]
    output = capsys.readouterr().out
    assert "\033" not in output
    assert all(line.split()[0] in (OK, NOTE, PROBLEM, "remedy:", "no", "1") for line in output.splitlines() if line)


@pytest.mark.parametrize(
    ("is_terminal", "variables", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),  # no-color.org: when not empty
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours(is_terminal: bool, variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    from vswapd import terminal

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = StringIO()
    isatty: Callable[[], bool] = lambda: is_terminal  # noqa: E731
    monkeypatch.setattr(stream, "isatty", isatty)
    assert terminal.has_colours(stream) == coloured
    assert ("\033[31m" in terminal.paint("x", terminal.RED, stream)) == coloured
