# SPDX-License-Identifier: MIT
"""supervisor — keep a daemon's descriptors, and start another when it dies.

The supervisor does nothing but wait. Each daemon is its child and shares its descriptor table
(csrc/supervise.h), so that whatever a daemon held at its death is still open: both memfds with all
state, the listening socket, the connections, the userfaultfd of every client. The next daemon is a
fork of this process, which has loaded all code before the first one started: it is ready in
milliseconds, and an upgrade of the package on disk does not change what it runs.

A daemon that *ends*, by itself, is not succeeded: its exit status is the supervisor's. One that keeps
dying young is started again all the same, ever more slowly: its clients wait for it. Not so one that is killed
(SIGKILL): that is not its own doing, and its successor need not fare like it.

Signals are blocked, and taken one at a time where nothing is under way: no handler runs between a daemon's end
and the look at its status. A daemon starts with them blocked, too (let_signals_in): one that is told to stop
before it can deal with that stops later, rather than die of it and be succeeded.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from vswapd.log import Log

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
UPGRADE_SIGNAL = signal.SIGUSR2
_YOUNG_SECONDS = 1.0  # a daemon that lived no longer makes the next one wait
_PAUSE_SECONDS_MIN = 0.01
_PAUSE_SECONDS_MAX = 1.0
_PAUSE_FROM = 5  # young deaths in a row
_STATUS_OF_SIGNAL = 128  # as a shell says it


@dataclass(frozen=True)
class Inheritance:
    """What a daemon gets from its supervisor."""

    state_fd: int
    pool_fd: int
    supervisor_pid: int
    deaths: int  # of daemons before it


def supervise(
    serve: Callable[[Inheritance], int],
    log: Log,
    memfds: tuple[int, int] | None = None,
    upgradable: Mapping[str, int] | None = None,
) -> int:
    """Run `serve` in one daemon after the other; returns the exit status of the last. OSError.

    `memfds`: state and pool that another supervisor left. `upgradable`: descriptors that a new version
    has to know by name, when it may take over (takeover.py); once it has, this does not return. Nor does it in
    a daemon: `serve` says the exit status.
    """
    from vswapd import engine

    state_fd, pool_fd = memfds or engine.make_memfds()
    deaths, young = int(memfds is not None), 0
    signals = _block_signals()
    died_of = ""
    while True:
        inheritance = Inheritance(state_fd, pool_fd, os.getpid(), deaths)
        started = time.monotonic()
        pid = engine.fork_sharing_descriptors()
        if pid == 0:
            _run_daemon(serve, inheritance)
        if died_of:  # not before: a client may hold up the log, and waits for this daemon
            log.warning("the daemon died and is started again", signal=died_of, deaths=deaths)
        named = {"state": state_fd, "pool": pool_fd, **(upgradable or {})}
        upgrade = partial(_upgrade, pid, signals, named, log) if upgradable is not None else None
        status = _wait(pid, signals, upgrade)
        if os.WIFEXITED(status):
            return os.WEXITSTATUS(status)
        deaths += 1
        by_itself = os.WTERMSIG(status) != signal.SIGKILL
        young = young + 1 if by_itself and time.monotonic() - started < _YOUNG_SECONDS else 0
        died_of = signal.Signals(os.WTERMSIG(status)).name
        if young > _PAUSE_FROM:
            time.sleep(min(_PAUSE_SECONDS_MIN * 2 ** (young - _PAUSE_FROM), _PAUSE_SECONDS_MAX))


def let_signals_in() -> None:
    """In a daemon that can deal with them: what came since its start comes now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, UPGRADE_SIGNAL, *_FORWARDED})


def _block_signals() -> Collection[int]:
    """Those to be waited for. What whoever started us had ignored stays ignored."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would take the wait statuses with it
    asked = {UPGRADE_SIGNAL, *_FORWARDED}
    signals = {signal.SIGCHLD, *(number for number in asked if signal.getsignal(number) is not signal.SIG_IGN)}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    return signals


def _run_daemon(serve: Callable[[Inheritance], int], inheritance: Inheritance) -> None:
    status = 1
    try:
        # Out of the terminal's reach: what is typed there comes to the supervisor, which passes it on once.
        os.setpgid(0, 0)
        status = serve(inheritance)
    finally:
        # Not sys.exit: what the supervisor has prepared to do at its end is not the daemon's to do.
        os._exit(status)


def _wait(pid: int, signals: Collection[int], upgrade: Callable[[], int | None] | None = None) -> int:
    """Wait status of a child, to which signals are passed on. `upgrade`: what UPGRADE_SIGNAL is for; the wait status
    if that was its end.
    """
    from vswapd import engine

    while True:
        number = engine.wait_signal_shelved(signals)
        if number == signal.SIGCHLD:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended == pid:
                return status
        elif number == UPGRADE_SIGNAL and upgrade is not None:
            ended_status = upgrade()
            if ended_status is not None:
                return ended_status
        else:
            os.kill(pid, number)  # ended or not: until it is waited for the number is its own


def _upgrade(daemon_pid: int, signals: Collection[int], named: Mapping[str, int], log: Log) -> int | None:
    """Hand over. Returns when that failed: the wait status of the daemon, or None if it lives on."""
    from vswapd import takeover

    statuses: list[int] = []

    def kill_daemon() -> None:
        os.kill(daemon_pid, signal.SIGKILL)
        statuses.append(os.waitpid(daemon_pid, 0)[1])
        if os.WIFEXITED(statuses[0]):
            raise OSError("the daemon has ended meanwhile")

    pid = takeover.hand_over(named, kill_daemon, log)
    signal.sigtimedwait({UPGRADE_SIGNAL}, 0)  # once is enough
    if pid == 0:
        return statuses[0] if statuses else None
    if os.environ.get("NOTIFY_SOCKET"):
        os._exit(0)  # the manager knows its new main process
    takeover.let_go()
    status = _wait(pid, signals)
    # Nothing of what a supervisor does at its end: all that is another's now.
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else _STATUS_OF_SIGNAL + os.WTERMSIG(status))
