# SPDX-License-Identifier: MIT
"""supervisor — keep a daemon's descriptors, and start another when it dies.

The supervisor does nothing but wait. Each daemon is its child and shares its descriptor table
(csrc/supervise.h), so that whatever a daemon held at its death is still open: both memfds with all
state, the listening socket, the connections, the userfaultfd of every client. The next daemon is a
fork of this process, which has loaded all code before the first one started: it is ready in
milliseconds, and an upgrade of the package on disk does not change what it runs.

A daemon that *ends*, by itself, is not succeeded: its exit status is the supervisor's. One that keeps
dying young is started again all the same, ever more slowly: its clients wait for it.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vswapd.log import Log

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
UPGRADE_SIGNAL = signal.SIGUSR2
_YOUNG_SECONDS = 1.0  # a daemon that lived no longer makes the next one wait
_PAUSE_SECONDS_MIN = 0.01
_PAUSE_SECONDS_MAX = 1.0
_PAUSE_FROM = 5  # young deaths in a row


@dataclass(frozen=True)
class Inheritance:
    """What a daemon gets from its supervisor."""

    state_fd: int
    pool_fd: int
    supervisor_pid: int
    deaths: int  # of daemons before it


class _UpgradeAskedError(Exception):
    """The supervisor got UPGRADE_SIGNAL."""


def supervise(
    serve: Callable[[Inheritance], int],
    log: Log,
    memfds: tuple[int, int] | None = None,
    upgradable: Mapping[str, int] | None = None,
) -> int:
    """Run `serve` in one daemon after the other; returns the exit status of the last. OSError.

    `memfds`: state and pool that another supervisor left. `upgradable`: descriptors that a new version
    has to know by name, when it may take over (takeover.py). In a daemon this does not return: `serve`
    says the exit status.
    """
    from vswapd import engine

    state_fd, pool_fd = memfds or engine.make_memfds()
    deaths, young = int(memfds is not None), 0
    while True:
        inheritance = Inheritance(state_fd, pool_fd, os.getpid(), deaths)
        started = time.monotonic()
        pid = engine.fork_sharing_descriptors()
        if pid == 0:
            _run_daemon(serve, inheritance)
        status: int | None = None
        while status is None:
            try:
                status = _wait(pid, upgradable is not None)
            except _UpgradeAskedError:
                named = {"state": state_fd, "pool": pool_fd, **(upgradable or {})}
                status = _upgrade(pid, named, log)
        if os.WIFEXITED(status):
            return os.WEXITSTATUS(status)
        deaths += 1
        young = young + 1 if time.monotonic() - started < _YOUNG_SECONDS else 0
        log.warning(
            "the daemon died and is started again",
            signal=signal.Signals(os.WTERMSIG(status)).name,
            deaths=deaths,
        )
        if young > _PAUSE_FROM:
            time.sleep(min(_PAUSE_SECONDS_MIN * 2 ** (young - _PAUSE_FROM), _PAUSE_SECONDS_MAX))


def _run_daemon(serve: Callable[[Inheritance], int], inheritance: Inheritance) -> None:
    status = 1
    try:
        # Out of the terminal's reach: what is typed there comes to the supervisor, which passes it on once.
        os.setpgid(0, 0)
        for number in (*_FORWARDED, UPGRADE_SIGNAL):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        status = serve(inheritance)
    finally:
        # Not sys.exit: what the supervisor has prepared to do at its end is not the daemon's to do.
        os._exit(status)


def _upgrade(daemon_pid: int, named: Mapping[str, int], log: Log) -> int | None:
    """Hand over. Wait status of the new supervisor; when it failed, of the daemon, or None if that
    lives on."""
    from vswapd import takeover

    statuses: list[int] = []

    def kill_daemon() -> None:
        os.kill(daemon_pid, signal.SIGKILL)
        statuses.append(os.waitpid(daemon_pid, 0)[1])

    signal.signal(UPGRADE_SIGNAL, signal.SIG_IGN)  # once is enough
    pid = takeover.hand_over(named, kill_daemon, log)
    if pid == 0:
        return statuses[0] if statuses else None
    takeover.let_go()
    if os.environ.get("NOTIFY_SOCKET"):
        os._exit(0)  # the manager knows its new main process
    return _wait(pid, can_upgrade=False)


def _wait(pid: int, can_upgrade: bool) -> int:
    """Wait status of the daemon; signals are passed on to it. _UpgradeAskedError."""

    def upgrade(_: int, __: object) -> None:
        raise _UpgradeAskedError

    def forward(number: int, _: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it has ended, and waitpid is about to say so

    for number in _FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    signal.signal(UPGRADE_SIGNAL, upgrade if can_upgrade else forward)
    while True:
        ended, status = os.waitpid(pid, 0)
        if ended == pid:
            return status
