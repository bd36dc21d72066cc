# SPDX-License-Identifier: MIT
"""The supervisor by itself: daemons that do nothing, signals at the worst moments, an upgrade that goes wrong.

Each test is a program: what it says last is the exit status of `supervise`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_SECONDS_MAX = 60.0
_HEAD = """
import os, signal, socket, sys, time
from vswapd import engine, notify, supervisor, takeover

class Log:
    def __getattr__(self, level):
        return lambda text, **fields: print(level, text, *fields.values(), file=sys.stderr, flush=True)
"""


def _run(tmp_path: Path, program: str, **options: object) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "program.py"
    script.write_text(_HEAD + program, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    result: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-I", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS_MAX,
        **{"env": environment, **options},  # type: ignore[call-overload]
    )
    return result


_STORM = """
takeover.hand_over = lambda *_: 0  # an upgrade that fails at once
memfds = engine.make_memfds()
supervisor_pid = os.getpid()
signal.signal(signal.SIGUSR2, lambda *_: None)  # until the first of them waits for it
storm = os.fork()
if storm == 0:
    while os.getppid() == supervisor_pid:
        os.kill(supervisor_pid, signal.SIGUSR2)
    os._exit(0)
for n in range(300):
    status = supervisor.supervise(lambda _: 7, Log(), memfds, {})
    assert status == 7, status
os.kill(storm, signal.SIGKILL)
"""


def test_no_signal_loses_a_wait_status(tmp_path: Path) -> None:
    """Upgrades are asked for all the time while daemons end."""
    result = _run(tmp_path, _STORM)
    assert result.returncode == 0, result.stderr[-2000:]


_TOLD_EARLY = """
def serve(inheritance):
    if inheritance.deaths:
        return 3  # the signal killed the first one
    os.kill(inheritance.supervisor_pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while signal.SIGTERM not in signal.sigpending() and time.monotonic() < deadline:
        time.sleep(0.001)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(5))
    supervisor.let_signals_in()
    time.sleep(20)
    return 4

sys.exit(supervisor.supervise(serve, Log()))
"""


def test_daemon_told_to_stop_as_it_starts(tmp_path: Path) -> None:
    """It stops when it can, and is not succeeded."""
    result = _run(tmp_path, _TOLD_EARLY)
    assert result.returncode == 5, result.stderr


_DYING = """
pauses = []
supervisor.time.sleep = pauses.append

def serve(inheritance):
    if inheritance.deaths == 20:
        return 0
    os.kill(os.getpid(), signal.{signal})

supervisor.supervise(serve, Log())
sys.exit(len(pauses))
"""


@pytest.mark.parametrize(("name", "pauses"), [("SIGABRT", 15), ("SIGKILL", 0)])
def test_pauses_between_young_deaths(tmp_path: Path, name: str, pauses: int) -> None:
    """A daemon that fails again and again is not started in a hurry; one that others kill is."""
    result = _run(tmp_path, _DYING.replace("{signal}", name))
    assert result.returncode == pauses, result.stderr


_HELD_UP = """
served, serves = os.pipe()

class HeldUp:
    def __getattr__(self, level):
        return lambda *_, **fields: os.read(served, 1)

def serve(inheritance):
    if inheritance.deaths == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os.write(serves, b"x")
    return 3

sys.exit(supervisor.supervise(serve, HeldUp()))
"""


def test_log_that_is_held_up_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Its other end may be a client that waits for the next daemon."""
    result = _run(tmp_path, _HELD_UP)
    assert result.returncode == 3, result.stderr


_IGNORED = """
def serve(inheritance):
    os.kill(inheritance.supervisor_pid, signal.SIGHUP)
    os.kill(inheritance.supervisor_pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while signal.SIGTERM not in signal.sigpending() and time.monotonic() < deadline:
        time.sleep(0.001)
    return 6 if signal.SIGHUP in signal.sigpending() else 5

sys.exit(supervisor.supervise(serve, Log()))
"""


def test_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As nohup(1) has it; and children's ends are seen though whoever started us ignores those of its own."""

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    result = _run(tmp_path, _IGNORED, preexec_fn=ignore)
    assert result.returncode == 5, result.stderr


# What a new version does once it is started, and the exit status that tells which daemon saw the end: 9, the one
# that asked for the upgrade, or 8, its successor.
_NEW_VERSIONS = {
    "ends": ("os._exit(1)", 9),
    "says nonsense": ("os.write(taken.channel, b'?'); time.sleep(60)", 9),
    "does not hear": (
        "sock = socket.socket(fileno=taken.channel); sock.shutdown(socket.SHUT_RD); sock.send(b'R'); time.sleep(60)",
        8,
    ),
    "ends as it takes over": (
        "os.write(taken.channel, b'R'); os.read(taken.channel, 1);notify.notify(f'MAINPID={os.getpid()}'); os._exit(1)",
        8,
    ),
}
_FAILED_UPGRADE = """
taken = takeover.asked()
if taken:
    %s

said = sys.argv[0] + ".said"

class Saying(Log):
    def error(self, text, **fields):
        open(said, "w").close()

def serve(inheritance):
    if inheritance.deaths:
        return 8
    os.kill(inheritance.supervisor_pid, signal.SIGUSR2)
    while not os.path.exists(said):
        time.sleep(0.001)
    return 9

print(os.getpid(), flush=True)
sys.exit(supervisor.supervise(serve, Saying(), None, {"listener": 1, "metrics": -1}))
"""


@pytest.mark.parametrize("kind", _NEW_VERSIONS)
def test_failed_upgrade(tmp_path: Path, kind: str) -> None:
    """Whatever the new version does, this one goes on: with its daemon, or a successor if that is dead already. The
    manager is told who the main process is, whatever it was told before.
    """
    new_version, status = _NEW_VERSIONS[kind]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(_SECONDS_MAX)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        result = _run(tmp_path, _FAILED_UPGRADE % new_version, env=environment)
        assert result.returncode == status, result.stderr
        told = [manager.recv(100)]
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                told.append(manager.recv(100))
    assert told[-1] == f"MAINPID={result.stdout.split()[0]}".encode()


_DONE_UPGRADE = """
taken = takeover.asked()
if taken:
    os.write(taken.channel, b"R"); os.read(taken.channel, 1)
    os.write(taken.channel, b"D")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    %s

def serve(inheritance):
    os.kill(inheritance.supervisor_pid, signal.SIGUSR2)
    time.sleep(60)

try:
    supervisor.supervise(serve, Log(), None, {"listener": 1, "metrics": -1})
finally:
    print("a supervisor that has handed over cleans up after its successor", flush=True)
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("os._exit(11)", 11), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL)],
)
def test_status_after_an_upgrade(tmp_path: Path, end: str, status: int) -> None:
    """Whoever started the old supervisor waits for the new one with it."""
    result = _run(tmp_path, _DONE_UPGRADE % end)
    assert (result.returncode, result.stdout) == (status, ""), result.stderr
