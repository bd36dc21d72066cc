# SPDX-License-Identifier: MIT
"""Machines that lack something, made here: `vswapctl doctor` sees it and says what to do, and `run` does as it says."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support.limited import command_path, need_program

if TYPE_CHECKING:
    from pathlib import Path

_PROGRAM = "memory = bytearray(96 << 20); memory[::4096] = b'x' * (96 << 8); print(memory.count(b'x'))"

# Runs what follows with a system call that fails with EPERM; SECOND: only with this second argument.
_WITHOUT_CALL = """
import ctypes, os, struct, sys
number, second = int(sys.argv[1]), int(sys.argv[2])
allow = (6, 0, 0, 0x7fff0000)
lines = [(0x20, 0, 0, 0), (0x15, 0, 3, number)]  # the number; another: allowed
lines += [(0x20, 0, 0, 24), (0x15, 0, 1, second)] if second else [(0x20, 0, 0, 24), (0x05, 0, 0, 0)]
lines += [(6, 0, 0, 0x00050001), allow]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
os.execv(sys.argv[3], sys.argv[3:])
"""
_IO_URING_SETUP, _IOCTL = 425, {"x86_64": 16}.get(os.uname().machine, 29)
_USERFAULTFD_IOC_NEW = 0xAA00


def _without_call(number: int, second: int = 0) -> list[str]:
    return [sys.executable, "-Ic", _WITHOUT_CALL, str(number), str(second)]


def _mounted(text: str) -> list[str]:
    """With other mounts, which nobody else sees."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f'{text}\nexec "$@"', "sh"]


def _vswapctl(prefix: list[str], *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, command_path("vswapctl"), *arguments]
    environment = {**os.environ, "VSWAPD_SOCKET": "/nonexistent/vswapd.sock", **variables}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)


def _finding(prefix: list[str], name: str, *arguments: str, **variables: str) -> tuple[str, str, str, int]:
    """(level, text, remedy, exit status) of one of the doctor's findings."""
    result = _vswapctl(prefix, "doctor", *arguments, **variables)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    index = next(index for index, line in enumerate(lines) if line.split()[1:2] == [name])
    level, _, text = lines[index].split(maxsplit=2)
    _, found, remedy = lines[index + 1].partition("remedy: ")
    return level, text, remedy if found else "", result.returncode


def _run(prefix: list[str], *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    arguments = ["run", "--private", "--limit", "64M", *options, "--", sys.executable, "-Ic", _PROGRAM]
    return _vswapctl(prefix, *arguments, **variables)


# (how, finding, part of its text, part of the remedy): `run` refuses, with the same words
_REFUSED = [
    (["setarch", os.uname().machine, "--uname-2.6"], "kernel", "is too old", "6.12 or later"),
    (["setpriv", "--bounding-set=-sys_ptrace"], "privilege", "needs root (CAP_SYS_PTRACE)", "use sudo"),
    (_mounted("mount -t tmpfs none /dev"), "userfaultfd", "no /dev/userfaultfd", "--device=/dev/userfaultfd"),
]


@pytest.mark.parametrize(("prefix", "name", "text", "remedy"), _REFUSED, ids=[row[1] for row in _REFUSED])
def test_what_run_cannot_do_without(prefix: list[str], name: str, text: str, remedy: str) -> None:
    need_program(prefix[0])
    found = _finding(prefix, name)
    assert (found[0], found[3]) == ("problem", 1)
    assert text in found[1]
    assert remedy in found[2]
    result = _run(prefix)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"vswapctl: {found[1]}; {found[2]}\n"


_NO_FUSE = """
mount -t tmpfs none /mnt
for name in null zero random urandom tty userfaultfd; do
  touch /mnt/$name
  mount --bind /dev/$name /mnt/$name
done
mount --move /mnt /dev
"""

# `run` works all the same
_WORKS = [
    (_without_call(_IO_URING_SETUP), "io_uring", "threads read spill files", "seccomp profile"),
    (_mounted("mount -t tmpfs none /run"), "systemd", "does not run here", "by other means"),
    (_mounted(_NO_FUSE), "fuse", "vswapd --fs cannot work; all else does", "--device=/dev/fuse"),
    (["prlimit", "--memlock=65536"], "memlock", "may be swapped out by the kernel", "ulimit -l"),
]


@pytest.mark.parametrize(("prefix", "name", "text", "remedy"), _WORKS, ids=[row[1] for row in _WORKS])
def test_what_run_works_without(prefix: list[str], name: str, text: str, remedy: str) -> None:
    found = _finding(prefix, name)
    assert (found[0], found[3]) == ("note", 0)
    assert text in found[1]
    assert remedy in found[2]
    result = _run(prefix, "--pool", "4M")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{96 << 8}\n", "")


def test_userfaultfd_that_a_profile_forbids() -> None:
    """The device opens, and that is all."""
    prefix = _without_call(_IOCTL, _USERFAULTFD_IOC_NEW)
    level, text, remedy, status = _finding(prefix, "features")
    assert (level, status) == ("problem", 1)
    assert "opens, but gives no userfaultfd" in text
    assert "security profile" in remedy
    result = _run(prefix)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("vswapctl: "), result.stderr


def test_spill_directory_in_ram() -> None:
    prefix = _mounted("mount -t tmpfs none /var/tmp")
    level, text, remedy, status = _finding(prefix, "spill")
    assert (level, status) == ("problem", 1)
    assert text == "/var/tmp is a tmpfs: what is swapped there stays in RAM"
    assert "--no-spill" in remedy
    result = _run(prefix)
    assert (result.returncode, result.stdout) == (0, f"{96 << 8}\n")
    assert result.stderr.startswith("vswapctl: /var/tmp is a tmpfs, and so RAM itself: nothing is spilled")
    assert result.stderr.count("\n") == 1
    assert _run(prefix, "--no-spill").stderr == ""
    assert _finding(prefix, "spill", VSWAPD_SPILL_DIR="/nonexistent")[1].startswith("no file can be made in")


def test_container_that_withholds_the_device() -> None:
    podman = "mount -t tmpfs none /run; mkdir /run/systemd; echo podman > /run/systemd/container"
    assert _finding(_mounted(podman), "container")[:2] == ("ok", "podman")
    level, text, remedy, _ = _finding(_mounted(f"{podman}; mount -t tmpfs none /dev"), "container")
    assert (level, text) == ("note", "podman, which withholds what a private daemon needs")
    assert "--device=/dev/userfaultfd --cap-add=SYS_PTRACE" in remedy


@pytest.mark.parametrize(
    ("compiler", "flags", "mode", "level", "text"),
    [
        ("cc", [], 0o755, "ok", "can be managed"),
        ("cc", ["-static"], 0o755, "note", "is statically linked: it is managed itself"),
        ("musl-gcc", [], 0o755, "note", "uses musl: it is managed itself"),
        ("cc", [], 0o4755, "problem", "is setuid"),
    ],
)
def test_programs(tmp_path: Path, compiler: str, flags: list[str], mode: int, level: str, text: str) -> None:
    (tmp_path / "true.c").write_text("int main(void) { return 0; }\n")
    program = tmp_path / "program"
    command = [need_program(compiler), *flags, "-o", str(program), str(tmp_path / "true.c")]
    subprocess.run(command, check=True)
    program.chmod(mode)
    found = _finding([], "program", str(program))
    assert (found[0], found[3]) == (level, int(level == "problem"))
    assert text in found[1]
    assert _vswapctl([], "run", "--private", "--limit", "64M", "--", str(program)).returncode == 0
