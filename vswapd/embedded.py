# SPDX-License-Identifier: MIT
"""embedded — start a private daemon for the life of one command.

The daemon's supervisor is a fork of vswapctl, in a process group of its own: the terminal's signals never stop it,
and when vswapctl is killed it goes on serving until the last process it serves has ended. vswapctl (the
*front*) talks to it over a socket pair with the same requests as to a system daemon; the daemon ends
some time after the front's end is closed. trio and the engine are imported in the fork only.

The command is started after the daemon answers. Starting it earlier would save some ms, but what it
touches until then is outside the limit: 0.2 s are enough for 700 MB.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys

from vswapd import backends, config, machine, paths
from vswapd.connection import Connection

_STOP_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP, signal.SIGTTOU)


class EmbeddedDaemon:
    """A running private daemon, seen from the front."""

    def __init__(self, pid: int, connection: Connection, directory: str) -> None:
        self.pid = pid
        self.connection = connection
        self.directory = directory
        self.socket_path = paths.private_socket(directory)


def start(spills: list[backends.Spill]) -> EmbeddedDaemon:
    """Fork a daemon that listens already. It takes over `spills`. Failure.

    Its first answer says whether it could start.
    """
    front_pid = os.getpid()
    directory = paths.make_private_directory()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path = paths.private_socket(directory)
        paths.check_socket_path(path)
        listener.bind(path)
        os.chmod(path, 0o666)
        listener.listen(config.LISTEN_BACKLOG)
        front_end, daemon_end = socket.socketpair()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed before we began
                stream.flush()
        pid = os.fork()
    except BaseException:
        listener.close()
        paths.remove_private_directory(directory)
        raise
    if pid == 0:
        front_end.close()
        _be_daemon(listener, daemon_end, spills, front_pid, directory)
    listener.close()
    daemon_end.close()
    for spill in spills:
        spill.close()
    return EmbeddedDaemon(pid, Connection(front_end), directory)


def _be_daemon(
    listener: socket.socket,
    session: socket.socket,
    spills: list[backends.Spill],
    front_pid: int,
    directory: str,
) -> None:
    """The forked process, from its first to its last instruction."""
    status = 1
    try:
        gc.disable()  # nothing that imports and start-up make is garbage; run_embedded turns it on
        # Not a session: the scheduler would weigh it against the command as a whole (docs/decisions/0013).
        os.setpgid(0, 0)
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _close_inherited({listener.fileno(), session.fileno(), *(spill.fd for spill in spills)})
        os.chdir("/")
        _write("/proc/self/comm", "vswapd")
        machine.avoid_oom_kill()
        from vswapd.daemon import run_embedded

        status = run_embedded(listener, session, spills, front_pid)
    except BaseException as error:
        from vswapd.daemon import report_start_failure

        report_start_failure(session, error)
    finally:
        paths.remove_private_directory(directory)
        # Not sys.exit: what the front has prepared to do at its exit is not ours to do.
        os._exit(status)


def _close_inherited(kept: set[int]) -> None:
    """Everything but stderr and `kept`: a pipe's reader must see its end when the command closes it."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor not in kept:
            try:
                os.close(descriptor)
            except OSError:
                pass  # the one listdir read from


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError:
        pass  # nice to have
