# SPDX-License-Identifier: MIT
"""Hostile and unlucky peers, and storage that lies: whoever is concerned is harmed alone."""

from __future__ import annotations

import array
import contextlib
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from support.limited import MIB, LimitedProgram, command_path, python_argv, run_limited
from support.sampler import ControlClient
from vswapd import wire

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from integration.conftest import DaemonProcess
    from support.limited import GoingOn

_NOBODY = 65534
_SEGMENT_BYTES = 1 << 20
_PAGE_BYTES = 4096

# Fills memory with noise, waits, and reads it back page by page. A page that is poisoned is SIGBUS in user mode
# and EFAULT for a system call that reads it: so it is read by one. What the program needs itself is locked: it would be
# among what is damaged, as the interpreter's coldest pages are the first to be written back.
_READER = """
import ctypes, json, mmap, os, random, sys
pages = int(sys.argv[1])
assert ctypes.CDLL(None).mlockall(1) == 0  # MCL_CURRENT
memory = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
content = lambda page: random.Random(page).randbytes(4096)
for page in range(pages):
    memory[page * 4096 : (page + 1) * 4096] = content(page)
print("filled", file=sys.stderr, flush=True)
open(sys.argv[2]).read()
copy, view, lost, wrong = os.memfd_create("copy"), memoryview(memory), 0, 0
for page in range(pages):
    try:
        os.pwrite(copy, view[page * 4096 : (page + 1) * 4096], 0)
    except OSError:
        lost += 1
        continue
    wrong += os.pread(copy, 4096, 0) != content(page)
print(json.dumps({"lost": lost, "wrong": wrong}))
"""


def _wait_spilled(socket_path: str, count_bytes: int, seconds_max: float = 60.0) -> None:
    deadline = time.monotonic() + seconds_max
    with ControlClient(socket_path, 30.0) as control:
        while control.status(30.0)["spill_bytes"] < count_bytes:
            assert time.monotonic() < deadline, "nothing was spilled"
            time.sleep(0.05)  # polling another process's state


def _full_segments(spill: Path, count: int) -> list[int]:
    """So many that are full of whole pages: half-full ones are soon compacted, and what is in their places is nothing.

    The first have some of the interpreter's.
    """
    full = []
    with spill.open("rb") as file:
        for segment in range(spill.stat().st_size // _SEGMENT_BYTES):
            file.seek(segment * _SEGMENT_BYTES)
            magic, _generation, extents = struct.unpack("<8sQI", file.read(20))
            if magic.startswith(b"VSWPSE") and extents > 250:
                full.append(segment)
    middle = len(full) // 2
    assert len(full[middle:]) >= count, full
    return full[middle : middle + count]


@pytest.mark.parametrize("encrypt", [False, True])
def test_flipped_bits_cost_their_pages_alone(tmp_path: Path, encrypt: bool) -> None:
    spill, fifo = tmp_path / "spill", tmp_path / "fifo"
    os.mkfifo(fifo)
    flips = 5
    argv = [sys.executable, "-c", _READER, str(64 * MIB // _PAGE_BYTES), str(fifo)]
    options = ["--private", "--pool", "1M", "--spill", f"{spill}:256M", *["--encrypt"] * encrypt]
    extent_bytes = _PAGE_BYTES + 64 * encrypt  # a sealed one has its tag behind it
    with LimitedProgram(24 * MIB, argv, options=options) as program:
        _wait_spilled(program.socket_path, (flips + 1) * _SEGMENT_BYTES)
        program.wait_said(b"filled")
        segments = _full_segments(spill, flips)
        with spill.open("r+b") as file:
            for bit, segment in enumerate(segments):  # noise is stored raw: whole pages behind a header of 64 bytes
                at = segment * _SEGMENT_BYTES + 64 + 100 * extent_bytes
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << bit]))
        fifo.write_text("go on\n")
        result = program.wait()
    assert result.status == 0, result.describe()
    answer = json.loads(result.stdout)
    assert answer["wrong"] == 0, "a wrong byte was given back"
    assert 1 <= answer["lost"] <= flips, answer  # some may have been the interpreter's
    assert result.stderr.count(b"cannot be given back: Bad message") == answer["lost"], result.describe()


@pytest.mark.parametrize("encrypt", [False, True])
def test_misdirected_segment_gives_no_page_of_another(tmp_path: Path, encrypt: bool) -> None:
    """A disk that wrote one segment in the place of another: what was there is lost, and nobody gets what is there now."""
    spill, fifo = tmp_path / "spill", tmp_path / "fifo"
    os.mkfifo(fifo)
    argv = [sys.executable, "-c", _READER, str(64 * MIB // _PAGE_BYTES), str(fifo)]
    options = ["--private", "--pool", "1M", "--spill", f"{spill}:256M", *["--encrypt"] * encrypt]
    with LimitedProgram(24 * MIB, argv, options=options) as program:
        _wait_spilled(program.socket_path, 6 * _SEGMENT_BYTES)
        program.wait_said(b"filled")
        source, target = _full_segments(spill, 2)
        with spill.open("r+b") as file:
            file.seek(source * _SEGMENT_BYTES)
            segment = file.read(_SEGMENT_BYTES)
            file.seek(target * _SEGMENT_BYTES)
            file.write(segment)
        fifo.write_text("go on\n")
        result = program.wait()
    assert result.status == 0, result.describe()
    answer = json.loads(result.stdout)
    assert answer["wrong"] == 0, "a wrong byte was given back"
    assert 1 <= answer["lost"] <= 255, answer  # no more were in it


# ---- peers ----


def _connect(path: str) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(5)
    peer.connect(path)
    return peer


def _hello(group: str) -> bytes:
    return wire.HELLO.pack(wire.MAGIC, wire.VERSION, wire.HELLO_NEW, 0, group.encode())


def _be_hostile(path: str, group: str, generator: random.Random) -> None:
    """One connection that breaks the protocol somewhere."""
    peer = _connect(path)
    kind = generator.randrange(6)
    try:
        if kind == 0:  # noise
            peer.sendall(generator.randbytes(200))
        elif kind == 1:  # a HELLO that does not end
            peer.sendall(_hello(group)[: generator.randrange(48)])
        elif kind == 2:  # somebody's token
            peer.sendall(wire.HELLO.pack(wire.MAGIC, wire.VERSION, wire.HELLO_FORKED, generator.randrange(1, 50), b""))
            assert peer.recv(16)[6] != wire.OK
        elif kind == 3:  # a request that does not end
            peer.sendall(b'{"op":' + b"[" * 70000)
        else:  # ARM with descriptors that are none, or wild addresses
            peer.sendall(_hello(group))
            peer.recvmsg(16, 256)
            numbers = array.array("i", [os.memfd_create("x") for _ in range(2)])
            arm = struct.pack("=IHH7Q", wire.MAGIC, wire.VERSION, 0, *(generator.getrandbits(64) for _ in range(7)))
            peer.sendmsg([arm], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
            for number in numbers:
                os.close(number)
    except OSError:
        pass  # the daemon has had enough of us
    peer.close()


def test_others_go_on_beside_hostile_peers(daemon: DaemonProcess, verify_memory: str) -> None:
    generator = random.Random(11)
    descriptors = daemon.descriptor_count()
    command = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "32M", "--"]
    command += [verify_memory, "--mib", "96", "--kind", "mixed", "--passes", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    with daemon.control() as control:
        group = str(control.request("group-create", limit_bytes=64 * MIB)["group"])
        for _ in range(300):
            _be_hostile(daemon.socket_path, group, generator)
        flood = [_connect(daemon.socket_path) for _ in range(300)]
        assert control.request("ping")["ok"]
        output, _ = process.communicate(timeout=120)
        for peer in flood:
            peer.close()
    assert process.returncode == 0
    assert json.loads(output)["wrong_pages"] == 0
    daemon.wait_no_clients()
    deadline = time.monotonic() + 20
    while daemon.descriptor_count() > descriptors + 4:  # a queue or two may stay
        assert time.monotonic() < deadline, f"{descriptors} -> {daemon.descriptor_count()} descriptors"
        time.sleep(0.05)  # polling another process's state


def test_others_go_on_beside_a_stopped_client(daemon: DaemonProcess, verify_memory: str) -> None:
    """Stopped while its pages go out, its agent answers nothing; its group is short all the time."""
    command = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "32M", "--"]
    stopped = subprocess.Popen([*command, verify_memory, "--mib", "128", "--kind", "text", "--seconds", "100"])
    try:
        pid = daemon.wait_client("swapped_pages", seconds_max=30.0)
        os.kill(pid, signal.SIGSTOP)
        argv = [verify_memory, "--mib", "96", "--kind", "mixed", "--passes", "3"]
        result = run_limited(32 * MIB, argv, options=["--socket", daemon.socket_path])
        assert result.status == 0, result.describe()
        os.kill(pid, signal.SIGKILL)
        assert stopped.wait(30) in (137, -9)
    finally:
        stopped.kill()
        stopped.wait()
    daemon.wait_no_clients()


_SIBLINGS = """
import subprocess, sys
children = [subprocess.Popen(arguments.split()) for arguments in sys.argv[1:]]
print(*(child.pid for child in children), flush=True)
print(*(child.wait() for child in reversed(children)), flush=True)
"""


@contextlib.contextmanager
def _siblings(daemon: DaemonProcess, limit: str, commands: list[str]) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """They, in one group; the statuses of the last ones first. The pids, in their order."""
    argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", limit, "--"]
    with subprocess.Popen([*argv, *python_argv(_SIBLINGS), *commands], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        try:
            yield process, pids
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


def test_its_group_goes_on_beside_a_stopped_program(daemon: DaemonProcess, verify_memory: str) -> None:
    """The largest, with a batch of its that its agent does not answer: what is evicted is the other's, and nobody is killed."""
    commands = [
        f"{verify_memory} --mib 96 --kind text --passes 8",
        f"{verify_memory} --mib 144 --kind text --passes 3",
    ]
    with _siblings(daemon, "112M", commands) as (process, pids):
        daemon.wait_client("swapped_pages", pid=pids[0], seconds_max=60.0)
        os.kill(pids[0], signal.SIGSTOP)
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())  # of the one that goes on
        assert told["wrong_pages"] == 0
        os.kill(pids[0], signal.SIGCONT)
        told, statuses = json.loads(process.stdout.readline()), process.stdout.readline()
        assert (told["wrong_pages"], statuses) == (0, "0 0\n")
    daemon.wait_no_clients()


def test_small_program_among_many_that_was_stopped(
    daemon: DaemonProcess, verify_memory: str, going_on: GoingOn
) -> None:
    """The batch that its agent had not answered is settled when it has, though nobody would evict from one so small."""
    commands = [f"{verify_memory} --mib 20 --kind third {' '.join(going_on.options)}"]
    commands += [f"{verify_memory} --mib 24 --kind same --seconds 3600 --seed {seed}" for seed in range(17)]
    with _siblings(daemon, "1G", commands) as (process, pids):
        for pid in pids:
            daemon.wait_client("resident_bytes", 18 * MIB, pid, seconds_max=60.0)
        os.kill(pids[0], signal.SIGSTOP)
        with daemon.control() as control, pytest.raises(TimeoutError):
            control.request("pageout", 2.0, pid=pids[0])
        os.kill(pids[0], signal.SIGCONT)
        going_on.end()
        assert process.stdout is not None
        told = select.select([process.stdout], [], [], 60)[0]
        for pid in pids[0 if not told else 1 :]:
            os.kill(pid, signal.SIGKILL)
        assert told, "its faults are never answered"
        assert json.loads(process.stdout.readline())["wrong_pages"] == 0
    daemon.wait_no_clients()


# ---- other users ----

_STRANGER = """
import json, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
answers = {}
for request in json.loads(sys.argv[2]):
    sock.sendall(json.dumps(request).encode() + b"\\n")
    data = b""
    while not data.endswith(b"\\n"):
        data += sock.recv(65536)
    answers[request["op"]] = json.loads(data)
print(json.dumps(answers))
"""


def test_one_user_cannot_touch_anothers_pages(daemon: DaemonProcess, verify_memory: str, tmp_path: Path) -> None:
    command = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "32M", "--"]
    process = subprocess.Popen([*command, verify_memory, "--mib", "64", "--seconds", "60"])
    directory = os.open(tmp_path, os.O_PATH)
    try:
        with daemon.control() as control:
            deadline = time.monotonic() + 30
            while not (clients := control.status()["clients"]):
                assert time.monotonic() < deadline, "no client"
                time.sleep(0.02)  # polling another process's state
        pid = clients[0]["pid"]
        tmp_path.chmod(0o711)
        requests = [{"op": "status"}, {"op": "pageout", "pid": pid}, {"op": "pagein", "pid": pid}]
        requests += [{"op": "limit", "pid": pid, "limit_bytes": 16 * MIB}, {"op": "test-check"}]
        requests += [{"op": "group-wait", "group": clients[0].get("group", ""), "timeout_ms": 0}]
        socket_path = f"/proc/self/fd/{directory}/vswapd.sock"
        stranger = subprocess.run(
            [sys.executable, "-c", _STRANGER, socket_path, json.dumps(requests)],
            user=_NOBODY, group=_NOBODY, extra_groups=[], pass_fds=[directory], capture_output=True, check=False,
        )  # fmt: skip
        assert stranger.returncode == 0, stranger.stderr.decode()
        answers = json.loads(stranger.stdout)
    finally:
        os.close(directory)
        process.terminate()
        process.wait(30)
    assert answers["status"]["status"]["clients"] == []
    assert answers["status"]["status"]["groups"] == []
    for operation in ("pageout", "pagein", "limit", "test-check"):
        assert answers[operation].get("code") == "denied", answers[operation]
    assert answers["group-wait"].get("code") == "no-group", answers["group-wait"]


def test_spill_files_are_private(tmp_path: Path, verify_memory: str) -> None:
    spill = tmp_path / "spill"
    argv = [verify_memory, "--mib", "32", "--seconds", "1"]
    result = run_limited(24 * MIB, argv, options=["--private", "--spill", f"{spill}:64M"])
    assert result.status == 0, result.describe()
    assert spill.stat().st_mode & 0o777 == 0o600
