# SPDX-License-Identifier: MIT
"""What is read out of /proc, and that a process which ends meanwhile does no harm."""

from __future__ import annotations

import os
import subprocess
import sys

from vswapd import processes

_NOBODY = 1 << 22  # no PID is as large


def test_own_process() -> None:
    pid = os.getpid()
    assert processes.exists(pid)
    assert processes.parent(pid) == os.getppid()
    assert processes.uid(pid) == os.geteuid()
    assert processes.descends(pid, os.getppid())
    assert not processes.descends(pid, pid)
    assert processes.comm(pid)
    assert processes.anonymous_bytes(pid) > 1 << 20
    assert processes.own_bytes() > 1 << 20


def test_process_that_is_not_there() -> None:
    assert not processes.exists(_NOBODY)
    assert not processes.exists(0)
    assert processes.parent(_NOBODY) == 0
    assert processes.uid(_NOBODY) is None
    assert processes.comm(_NOBODY) == ""
    assert processes.anonymous_bytes(_NOBODY) == 0
    assert processes.own_bytes(_NOBODY) == 0
    assert processes.environment_value(_NOBODY, "PATH") is None
    assert not processes.descends(_NOBODY, 1)
    assert processes.tree(_NOBODY, frozenset()) == {}


def test_name_with_parentheses_and_newlines_confuses_nobody() -> None:
    code = "open('/proc/self/comm', 'w').write('a) R 1 (\\n'); print(); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        assert processes.parent(process.pid) == os.getpid()
        assert processes.comm(process.pid).startswith("a) R 1 (")
        assert processes.comm(process.pid).isprintable()
    finally:
        process.communicate(b"\n")


def test_environment_is_read() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "print(); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "VSWAPD_SOCKET": "/some/where", "XVSWAPD_SOCKET": "no"},
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        assert processes.environment_value(process.pid, "VSWAPD_SOCKET") == "/some/where"
        assert processes.environment_value(process.pid, "NOSUCH") is None
    finally:
        process.communicate(b"\n")


def test_shared_memory_is_not_the_daemons_own() -> None:
    """Pool and slot table are memfds: counted as pool_bytes and metadata_bytes, not as daemon_bytes."""
    code = """
import mmap, os
from vswapd import processes
before = processes.own_bytes()
fd = os.memfd_create("pool")
os.ftruncate(fd, 64 << 20)
memory = mmap.mmap(fd, 64 << 20)
for offset in range(0, 64 << 20, 4096):
    memory[offset] = 1
assert processes.own_bytes() - before < 1 << 20, processes.own_bytes() - before
private = bytearray(os.urandom(8 << 20))
assert processes.own_bytes() - before > 8 << 20
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_a_process_is_of_its_user_and_group_alone() -> None:
    pid, user, group = os.getpid(), os.getuid(), os.getgid()
    assert processes.is_of(pid, user, group)
    assert not processes.is_of(pid, user + 1, group)
    assert not processes.is_of(pid, user, group + 1)
    assert not processes.is_of(1 << 23, user, group), "no such process"
