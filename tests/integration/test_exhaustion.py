# SPDX-License-Identifier: MIT
"""What ends when there is no more of it: the group that wanted it, with a clear line, and nobody else."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

from support.limited import command_path, python_argv, run_limited

if TYPE_CHECKING:
    from collections.abc import Callable

    from integration.conftest import DaemonProcess

_SECONDS_MAX = 120.0


# ---- memory that a program keeps to itself ----

_OWN_USERFAULTFD = """
import ctypes, errno, fcntl, mmap, os, struct
area = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, len(area), 4096):
    area[page : page + 4096] = page.to_bytes(8, "little") * 512
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
userfaultfd = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC)
api = bytearray(struct.pack("QQQ", 0xAA, 0, 0))
fcntl.ioctl(userfaultfd, 0xC018AA3F, api)
def register(bytes):
    try:
        return fcntl.ioctl(userfaultfd, 0xC020AA00, bytearray(struct.pack("QQQQ", address, bytes, 2, 0)))
    except OSError as error:
        return errno.errorcode[error.errno]
print(register(len(area)))
for page in range(0, len(area), 4096):
    assert area[page : page + 4096] == page.to_bytes(8, "little") * 512, page
print(register(4 << 20))
for page in range(0, len(area), 4096):
    assert area[page : page + 4096] == page.to_bytes(8, "little") * 512, page
print("right")
"""


def test_own_userfaultfd_over_more_than_the_limit() -> None:
    """It is refused, everything is as before, and less of it is given."""
    result = run_limited("32M", python_argv(_OWN_USERFAULTFD), seconds_max=_SECONDS_MAX)
    assert result.status == 0, result.describe()
    assert result.stdout.decode().split() == ["ENOMEM", "0", "right"], result.describe()
    assert result.stats["counters"]["out_of_memory_kills"] == 0


# ---- room to swap to ----


def _run(daemon: DaemonProcess, limit: str, *command: str) -> subprocess.Popen[bytes]:
    argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", limit, "--", *command]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _end(command: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, errors = command.communicate(timeout=_SECONDS_MAX)
    return command.returncode, errors.decode()


def _assert_out_of_memory(command: subprocess.Popen[bytes], limit: str) -> None:
    status, said = _end(command)
    assert status in (137, -9), said
    [line] = [line for line in said.splitlines() if "out of memory" in line]
    assert f"limit {limit}" in line


def test_full_backend_ends_the_group_that_wants_more(
    daemon_with: Callable[..., DaemonProcess], verify_memory: str
) -> None:
    """Pool and spill file are full. A group that has what it needs goes on; so do those that come afterwards."""
    daemon = daemon_with("--spill", "{directory}/small:16M")
    neighbour = _run(daemon, "48M", verify_memory, "--mib", "64", "--kind", "text", "--seconds", "12")
    greedy = _run(daemon, "16M", verify_memory, "--mib", "96", "--kind", "random", "--passes", "1")
    _assert_out_of_memory(greedy, "16 MiB")
    after = _run(daemon, "24M", verify_memory, "--mib", "32", "--kind", "text", "--passes", "2")
    for command in (after, neighbour):
        status, said = _end(command)
        assert status == 0, said
    with daemon.control() as control:
        assert control.status()["counters"]["out_of_memory_kills"] == 1


def test_metadata_counts_and_ends_its_group(daemon: DaemonProcess, verify_memory: str) -> None:
    """Zeros cost no byte but what says that they are zeros: of enough of them that alone is the limit."""
    neighbour = _run(daemon, "24M", verify_memory, "--mib", "32", "--kind", "text", "--seconds", "6")
    greedy = _run(daemon, "16M", verify_memory, "--mib", "6144", "--kind", "zeros", "--passes", "1")
    try:
        _assert_out_of_memory(greedy, "16 MiB")
        status, said = _end(neighbour)
        assert status == 0, said
    finally:
        for command in (greedy, neighbour):
            command.kill()
            command.wait()


# ---- descriptors ----


def test_descriptors_run_out(daemon_with: Callable[..., DaemonProcess], verify_memory: str) -> None:
    """Who comes when there are none left runs, unmanaged, and is told of; who is there already notices nothing."""
    daemon = daemon_with(descriptors=160)
    argv = [verify_memory, "--mib", "24", "--kind", "text", "--seconds", "8"]
    commands = [_run(daemon, "20M", *argv) for _ in range(12)]
    with daemon.control() as control:
        managed = [0]
        deadline = time.monotonic() + 6
        while time.monotonic() < deadline:
            managed.append(len(control.status()["clients"]))
            time.sleep(0.05)  # polling another process's state
    ends = [_end(command) for command in commands]
    assert [status for status, _ in ends] == [0] * len(commands), ends
    assert 2 <= max(managed), "nobody was managed"
    with daemon.control() as control:
        counters = control.status()["counters"]
        assert counters["evicted_pages"] > 0
        assert counters["children_refused"] == 0
    assert "Too many open files" in daemon.log.read_text() or max(managed) >= 12, daemon.log.read_text()
