# SPDX-License-Identifier: MIT
"""takeover — a live upgrade: a supervisor of the new version takes over from the old one.

    old supervisor                          new supervisor, started by the old one
    start it           ──────────────────▶  load all code, read the configuration, check what it can read
                       ◀──────────────────  ready      (or it ends: then nothing has happened)
    kill the daemon    ──────────────────▶  go
                                            copy every descriptor, to the number it has
                       ◀──────────────────  done
    close them all                          start a daemon, which is a successor like any other

The clients wait from the daemon's death until the next one serves: loading code is no part of it. Until
`done` the old supervisor can start a daemon of its own again. Afterwards it is a process that waits for
the new one and passes signals on, so that whoever started it keeps a process to wait for; under a service
manager it tells of the new main process and ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vswapd import notify
from vswapd.failure import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vswapd.log import Log

_VARIABLE = "VSWAPD_TAKE_OVER"
_READY, _GO, _DONE = b"R", b"G", b"D"
_READY_SECONDS_MAX = 60.0
_DONE_SECONDS_MAX = 10.0
_RESERVED = 16  # numbers below the limit that are no descriptor of a daemon


def _above_all() -> int:
    """From here on numbers are free for the hand-over itself."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _RESERVED


# ---- the old supervisor ----


def hand_over(descriptors: Mapping[str, int], kill_daemon: Callable[[], None], log: Log) -> int:
    """Start a new supervisor and let it take over; its PID. 0: it did not, and the daemon is as before,
    or dead. `descriptors`: those that it has to know by name. `kill_daemon`: OSError when nothing is to be
    handed over any more.
    """
    pid = 0
    try:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                pid = _start(theirs, {"pid": os.getpid(), **descriptors})
            _expect(ours, _READY, _READY_SECONDS_MAX, "the new version does not take over")
            kill_daemon()
            ours.sendall(_GO)
            _expect(ours, _DONE, _DONE_SECONDS_MAX, "the new version failed as it took over")
    except OSError as error:
        log.error("not upgraded, this version goes on", error=str(error))  # noqa: TRY400 -- the text says it
        if pid:
            _end(pid)
            notify.notify(f"MAINPID={os.getpid()}")  # it may have said that it was
        return 0
    log.info("upgraded", supervisor=pid)
    return pid


def _start(theirs: socket.socket, named: dict[str, int]) -> int:
    """The new supervisor, with our arguments; what we have open it gets later. Signals stay blocked in it until
    it waits for them. Those of the terminal come to us, and are passed on once.
    """
    environment = {**os.environ, _VARIABLE: json.dumps({**named, "channel": theirs.fileno()})}
    argv = [sys.executable, *sys.orig_argv[1:]]  # as we were started: what is installed there now
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            theirs.set_inheritable(True)
            os.execve(sys.executable, argv, environment)
        finally:
            os._exit(127)
    return pid


def _expect(sock: socket.socket, word: bytes, seconds_max: float, otherwise: str) -> None:
    """Wait for this word. OSError that says `otherwise`."""
    sock.settimeout(seconds_max)
    try:
        received = sock.recv(1)
    except OSError as error:
        raise OSError(f"{otherwise}: {error}") from None
    if received != word:
        raise OSError(otherwise)


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def let_go() -> None:
    """Close all that the new supervisor has now."""
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


# ---- the new supervisor ----


@dataclass(frozen=True)
class Takeover:
    """What the old supervisor said."""

    pid: int
    channel: int
    listener: int
    metrics: int  # -1: none
    state: int
    pool: int
    activated: int = 0  # 1: the manager opened the listener, and its path is not ours to remove

    def check(self) -> None:
        """That its state can be read. Failure: nothing has happened."""
        from vswapd import engine

        try:
            engine.check_state(self.pid, self.state)
        except OSError as error:
            raise Failure(f"the running daemon's state cannot be taken over: {error.strerror}") from None

    def listeners(self) -> dict[str, socket.socket]:
        """What it listens on, by the names of notify.py."""
        descriptors = {notify.CLIENTS: self.listener, notify.METRICS: self.metrics}
        return {name: socket.socket(fileno=fd) for name, fd in descriptors.items() if fd >= 0}

    def complete(self) -> None:
        """Get all descriptors, under the numbers they have. Failure."""
        from vswapd import engine

        channel = fcntl.fcntl(self.channel, fcntl.F_DUPFD_CLOEXEC, _above_all())
        os.closerange(3, _above_all())
        with socket.socket(fileno=channel) as sock:
            try:
                sock.sendall(_READY)
                _expect(sock, _GO, _DONE_SECONDS_MAX, "the running daemon does not hand over")
                engine.take_descriptors(self.pid, _above_all())
                notify.notify(f"MAINPID={os.getpid()}")
                sock.sendall(_DONE)
            except OSError as error:
                raise Failure(f"taking over: {error.strerror or error}") from None


def asked() -> Takeover | None:
    """Whether this process is to take over. The variable is consumed."""
    text = os.environ.pop(_VARIABLE, "")
    if not text:
        return None
    named = json.loads(text)
    known = named.keys() & Takeover.__dataclass_fields__.keys()
    return Takeover(**{name: int(named[name]) for name in known})
