# SPDX-License-Identifier: MIT
"""Programs that run already come under management and leave it again; their content is right all the time."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from support.limited import MIB, assert_honest, command_path, need_program, run_limited
from support.redis_client import RedisClient, RedisError
from vswapd import attachable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from integration.conftest import DaemonProcess

_SOURCE = os.path.join(os.path.dirname(__file__), "..", "support", "verify_memory.c")
_LIMIT = "24M"
_LIMIT_BYTES = 24 * MIB
_SIZE_MIB = 64

_PYTHON = """
import hashlib, os, sys
blocks = [os.urandom(1 << 20) for _ in range(64)]
sums = [hashlib.sha256(block).digest() for block in blocks]
progress = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
for number in range(1, 1 << 30):
    index = number % len(blocks)
    if hashlib.sha256(blocks[index]).digest() != sums[index]:
        sys.exit(3)
    os.pwrite(progress, (number * 256).to_bytes(8, "little"), 0)
"""


def _ctl(daemon: DaemonProcess, *arguments: str | int) -> subprocess.CompletedProcess[str]:
    verb, *rest = map(str, arguments)
    command = [command_path("vswapctl"), verb, "--socket", daemon.socket_path, *rest]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)


def _attach(daemon: DaemonProcess, pid: int) -> None:
    result = _ctl(daemon, "attach", "--limit", _LIMIT, pid)
    assert result.returncode == 0, result.stderr


def _detach(daemon: DaemonProcess, pid: int) -> None:
    result = _ctl(daemon, "detach", pid)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{pid}: detached\n"


def _client(daemon: DaemonProcess, pid: int) -> dict[str, int] | None:
    with daemon.control() as control:
        clients = control.status()["clients"]
    return next((client for client in clients if client["pid"] == pid), None)  # type: ignore[attr-defined]


def _wait_swapped(daemon: DaemonProcess, process: subprocess.Popen[bytes]) -> None:
    """Until it is within its limit, which it does not fit."""
    deadline = time.monotonic() + 60
    while True:
        client = _client(daemon, process.pid)
        if client and client["swapped_bytes"] > 0 and client["resident_bytes"] <= _LIMIT_BYTES:
            return
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline, f"nothing is swapped: {client}"
        time.sleep(0.02)  # polling another process's state


class Verifier:
    """A program that goes over its memory and says how far it is."""

    def __init__(self, argv: list[str], progress: Path) -> None:
        self._progress = progress
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        self.wait_pages(1)

    def _pages(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return int.from_bytes(self._progress.read_bytes()[:8], "little")
        return 0

    def wait_pages(self, count: int) -> None:
        """Until so many more pages are verified."""
        wanted = self._pages() + count
        deadline = time.monotonic() + 120
        while self._pages() < wanted:
            assert self.process.poll() is None, f"ended with {self.process.returncode}"
            assert time.monotonic() < deadline, "it does not go on"
            time.sleep(0.01)  # polling another process's state

    def end(self) -> None:
        """It was right up to the end."""
        assert self.process.poll() is None, f"ended with {self.process.returncode}"
        self.process.kill()
        self.process.wait()


def _compile(directory: Path, compiler: str, *flags: str) -> str:
    program = str(directory / "verify")
    subprocess.run([compiler, "-std=gnu11", "-O2", *flags, "-o", program, _SOURCE, "-pthread"], check=True)
    return program


def _argv(kind: str, directory: Path, progress: Path) -> list[str]:
    if kind == "python":
        return [sys.executable, "-c", _PYTHON, str(progress)]
    if kind == "musl":
        program = _compile(directory, need_program("musl-gcc"), "-static")
    else:
        program = _compile(directory, "cc", *(["-static"] if kind == "static" else []))
    argv = [program, "--mib", str(_SIZE_MIB), "--seconds", "3600", "--progress", str(progress)]
    return [*argv, "--threads", "4", "--order", "random"] if kind == "threads" else argv


@pytest.fixture(params=["python", "threads", "static", "musl"])
def verifier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Verifier]:
    """One of them, running natively."""
    progress = tmp_path / "progress"
    running = Verifier(_argv(request.param, tmp_path, progress), progress)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.mark.parametrize("cycles", [3, pytest.param(50, marks=pytest.mark.full)])
def test_attach_evict_detach(daemon: DaemonProcess, verifier: Verifier, cycles: int) -> None:
    pid = verifier.process.pid
    verifier.wait_pages(_SIZE_MIB * 256)
    for _ in range(cycles):
        _attach(daemon, pid)
        _wait_swapped(daemon, verifier.process)
        verifier.wait_pages(_SIZE_MIB * 256)
        _detach(daemon, pid)
        assert _client(daemon, pid) is None
        assert not attachable.has_agent(pid)
        with open(f"/proc/{pid}/smaps", encoding="ascii") as smaps:
            assert not re.search(r"^VmFlags:.* u[mw] ", smaps.read(), re.MULTILINE), "somebody watches it still"
        verifier.wait_pages(_SIZE_MIB * 256)
    verifier.end()
    daemon.wait_no_clients()


def test_detach_ends_the_agent_of_a_preloaded_program(
    daemon: DaemonProcess, verify_memory: str, tmp_path: Path
) -> None:
    progress = tmp_path / "progress"
    argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", _LIMIT, "--"]
    argv += [verify_memory, "--mib", str(_SIZE_MIB), "--seconds", "4", "--fork", "--progress", str(progress)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        pid = 0
        while not pid:
            with daemon.control() as control:
                clients = control.status()["clients"]
            pid = next((c["pid"] for c in clients if c["swapped_bytes"]), 0)  # type: ignore[attr-defined]
            assert time.monotonic() < deadline, "nothing is swapped"
            time.sleep(0.02)  # polling another process's state
        _detach(daemon, pid)
        refused = _ctl(daemon, "attach", "--limit", _LIMIT, pid)
        assert "has libvswap.so, but its agent has ended; " in refused.stderr, refused.stderr
        assert process.wait(120) == 0  # it has forked since, and its child found all right
    finally:
        process.kill()
        process.wait()


def test_a_stop_lets_go_of_all(daemon: DaemonProcess, verify_memory: str, tmp_path: Path) -> None:
    """Told to stop it waits; with all detached it has stopped, and they go on without it."""
    runs = []
    for seed in range(2):
        argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", _LIMIT, "--"]
        argv += [verify_memory, "--mib", str(_SIZE_MIB), "--seconds", "3600", "--seed", str(seed)]
        argv += ["--progress", str(tmp_path / f"progress.{seed}")]
        runs.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    try:
        deadline = time.monotonic() + 60
        clients: list[dict[str, int]] = []
        while len(clients) < 2:
            with daemon.control() as control:
                status = control.status()
            clients = [client for client in status["clients"] if client["swapped_bytes"]]  # type: ignore[attr-defined]
            assert time.monotonic() < deadline, "nothing is swapped"
            time.sleep(0.02)  # polling another process's state
        daemon.process.terminate()
        result = _ctl(daemon, "detach", "--all")
        assert (result.returncode, result.stderr) == (0, "")
        assert sorted(result.stdout.splitlines()) == sorted(f"{client['pid']}: detached" for client in clients)
        assert daemon.process.wait(30) == 0
        for seed, run in enumerate(runs):
            progress = tmp_path / f"progress.{seed}"
            before = progress.read_bytes()
            while progress.read_bytes() == before:
                assert run.poll() is None, run.communicate()
                assert time.monotonic() < deadline + 60, "it does not go on"
                time.sleep(0.01)  # polling another process's state
            run.terminate()
            said = "vswapctl: the daemon was stopped; whatever is left of the command has no limit any more\n"
            assert run.communicate(timeout=60)[1].decode() == said
            assert run.returncode == -signal.SIGTERM
    finally:
        for run in runs:
            run.terminate()  # which it passes on
            run.wait(60)


_FORKING = """
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#define PAGES (64 * 256)
static int is_right(const uint64_t *words, int from, int to)
{
	for (int page = from; page < to; page++)
		for (int i = 0; i < 512; i++)
			if (words[page * 512 + i] != page * 0x9e3779b97f4a7c15u + (uint64_t)i * (uint64_t)i)
				return 0;
	return 1;
}
int main(void)
{
	uint64_t *words = mmap(0, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int status = 0;
	for (int page = 0; page < PAGES; page++)
		for (int i = 0; i < 512; i++)
			words[page * 512 + i] = page * 0x9e3779b97f4a7c15u + (uint64_t)i * (uint64_t)i;
	printf("filled\\n");
	fflush(stdout);
	(void)getchar();
	if (fork() == 0)
		_exit(is_right(words, 0, 512) && is_right(words, PAGES - 512, PAGES) ? 0 : 3);
	wait(&status);
	return status ? 4 : is_right(words, 0, PAGES) ? 0 : 5;
}
"""


def test_a_child_of_an_attached_process_reads_what_its_parent_wrote(daemon: DaemonProcess, tmp_path: Path) -> None:
    """It has no agent, so nothing of it is evicted; what was out when it was forked it gets back."""
    source = tmp_path / "forking.c"
    source.write_text(_FORKING)
    subprocess.run(["cc", "-O2", "-static", "-o", str(tmp_path / "forking"), str(source)], check=True)
    with subprocess.Popen([str(tmp_path / "forking")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"filled\n"
            _attach(daemon, process.pid)
            _wait_swapped(daemon, process)
            process.communicate(b"\n", timeout=120)
            assert process.returncode == 0
        finally:
            process.kill()
    daemon.wait_no_clients()


# ---- redis ----


@pytest.mark.parametrize("cycles", [3, pytest.param(50, marks=pytest.mark.full)])
def test_redis(daemon: DaemonProcess, tmp_path: Path, cycles: int) -> None:
    path = tmp_path / "redis.sock"
    argv = [need_program("redis-server"), "--port", "0", "--unixsocket", str(path)]
    argv += ["--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError, RedisError):
                client = RedisClient(str(path))
                break
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)  # polling another process's state
        generator = random.Random(3)
        values = {f"key:{index}": generator.randbytes(4096) for index in range(12 * 1024)}
        with client:
            for key, value in values.items():
                client.command("SET", key, value)
            for _ in range(cycles):
                _attach(daemon, process.pid)
                _wait_swapped(daemon, process)
                for key in generator.sample(sorted(values), 1000):
                    assert client.command("GET", key) == values[key]
                _detach(daemon, process.pid)
            for key, value in values.items():
                assert client.command("GET", key) == value
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


# ---- run ----


@pytest.mark.parametrize(("compiler", "flags"), [("cc", ["-static"]), ("musl-gcc", ["-static"]), ("musl-gcc", [])])
def test_run_manages_what_cannot_be_preloaded(tmp_path: Path, compiler: str, flags: list[str]) -> None:
    """From its first instruction on: it never has more than its limit."""
    program = _compile(tmp_path, need_program(compiler), *flags)
    result = run_limited(_LIMIT_BYTES, [program, "--mib", "96", "--kind", "text"])
    assert result.status == 0, result.describe()
    assert_honest(result, _LIMIT_BYTES, demand_bytes=96 * MIB)


# ---- what it was doing ----

_WAITER = """
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
static volatile sig_atomic_t traps;
static void on_trap(int number) { (void)number; traps++; }
int main(void)
{
	struct timespec second = { .tv_sec = 2 }, begun, ended;
	char byte;
	signal(SIGTRAP, on_trap);
	printf("ready\\n");
	fflush(stdout);
	clock_gettime(CLOCK_MONOTONIC, &begun);
	if (nanosleep(&second, NULL) != 0)
		return 11;
	clock_gettime(CLOCK_MONOTONIC, &ended);
	if (ended.tv_sec - begun.tv_sec + (ended.tv_nsec - begun.tv_nsec) / 1e9 < 2)
		return 12;
	printf("slept\\n");
	fflush(stdout);
	if (read(0, &byte, 1) != 1 || byte != 'x')
		return 13;
	return traps ? 14 : 0;
}
"""


@pytest.mark.parametrize("call", ["nanosleep", "read"])
def test_an_interrupted_system_call_goes_on(daemon: DaemonProcess, tmp_path: Path, call: str) -> None:
    """Neither cut short nor failing with EINTR; and no signal handler sees anything of it."""
    source = tmp_path / "waiter.c"
    source.write_text(_WAITER)
    subprocess.run(["cc", "-O2", "-o", str(tmp_path / "waiter"), str(source)], check=True)
    with subprocess.Popen([str(tmp_path / "waiter")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            if call == "read":
                assert process.stdout.readline() == b"slept\n"
            _attach(daemon, process.pid)
            process.communicate(b"x", timeout=60)
            assert process.returncode == 0
        finally:
            process.kill()


# ---- refusals ----


@contextlib.contextmanager
def _sleeping(*prefix: str) -> Iterator[int]:
    process = subprocess.Popen([*prefix, "sleep", "600"])
    try:
        deadline = time.monotonic() + 30
        while _read(f"/proc/{process.pid}/comm") != "sleep\n":
            assert time.monotonic() < deadline, "it does not start"
            time.sleep(0.01)  # polling another process's state
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _refused(daemon: DaemonProcess, pid: int, text: str) -> None:
    result = _ctl(daemon, "attach", "--limit", _LIMIT, pid)
    assert result.returncode == 1, result.stdout
    assert result.stderr.count("\n") == 1, result.stderr
    assert text in result.stderr, result.stderr
    assert "; " in result.stderr, "no remedy"


def test_refusals(daemon: DaemonProcess) -> None:
    kernel_thread = 2 if _read("/proc/2/comm") == "kthreadd\n" else None  # not in every container
    _refused(daemon, 1, "process 1 is not to be managed")
    _refused(daemon, daemon.process.pid, "is the daemon or vswapctl itself")
    _refused(daemon, 1 << 21, "no process")
    if kernel_thread:
        _refused(daemon, kernel_thread, "is a thread of the kernel")
    with _sleeping() as pid:
        os.kill(pid, signal.SIGSTOP)
        _wait_state(pid, "T")
        _refused(daemon, pid, "is stopped")
        assert _state(pid) == "T"
    with _sleeping() as pid, _traced(pid) as tracer:
        _refused(daemon, pid, f"process {tracer} traces process {pid}")
    hidden = f'mount -t tmpfs none {os.path.dirname(daemon.socket_path)} && exec "$@"'
    with _sleeping("unshare", "--mount", "sh", "-c", hidden, "sh") as pid:
        _refused(daemon, pid, "does not see")
    with _sleeping(sys.executable, "-c", _FILTERED) as pid:
        _refused(daemon, pid, "has a seccomp filter")
    with _sleeping() as pid:
        _attach(daemon, pid)
        _refused(daemon, pid, "has an agent already")
        _detach(daemon, pid)
        refused = _ctl(daemon, "detach", pid)
        assert f"process {pid} is not managed" in refused.stderr


# An allow-all filter, then what follows.
_FILTERED = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7fff0000))
header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""

_TRACER = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
libc.ptrace.argtypes = [ctypes.c_long] * 4
assert libc.ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0
print("traces", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def _traced(pid: int) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", _TRACER, str(pid)], stdout=subprocess.PIPE) as tracer:
        try:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == b"traces\n"
            yield tracer.pid
        finally:
            tracer.kill()


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _state(pid: int) -> str:
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0]


def _wait_state(pid: int, wanted: str) -> None:
    deadline = time.monotonic() + 30
    while _state(pid) != wanted:
        assert time.monotonic() < deadline, f"it is {_state(pid)}"
        time.sleep(0.01)  # polling another process's state


# ---- deaths ----


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.full)])
def test_the_daemon_dies_while_it_detaches(daemon: DaemonProcess, tmp_path: Path, rounds: int) -> None:
    """Whenever that is, the process is a client or it is not; and each of its pages is right."""
    progress = tmp_path / "progress"
    running = Verifier(_argv("static", tmp_path, progress), progress)
    generator = random.Random(17)
    pid = running.process.pid
    try:
        running.wait_pages(_SIZE_MIB * 256)
        for _ in range(rounds):
            if _client(daemon, pid) is None:
                _attach(daemon, pid)
            _wait_swapped(daemon, running.process)
            with daemon.control() as control:
                serving = int(control.request("ping")["pid"])  # type: ignore[call-overload]
            command = [command_path("vswapctl"), "detach", "--socket", daemon.socket_path, str(pid)]
            detaching = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(generator.uniform(0.05, 0.3))  # a random moment is what is tested
            os.kill(serving, signal.SIGKILL)
            assert detaching.wait(120) in (0, 1)
            running.wait_pages(_SIZE_MIB * 256)
        running.end()
    finally:
        running.process.kill()
        running.process.wait()
    daemon.wait_no_clients()
