# SPDX-License-Identifier: MIT
"""connection — vswapctl's end of the control protocol (control.py), blocking, standard library only."""

from __future__ import annotations

import json
import os
import socket

from vswapd import config, paths, processes
from vswapd.failure import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self

_CONNECT_SECONDS_MAX = 5.0


class Connection:
    """A control connection. Requests are answered in order; notices go to `on_notice`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._asked: dict[str, Any] = {}  # the request whose answer is awaited
        self.on_notice: Callable[[dict[str, Any]], None] = lambda _: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """For poll."""
        return self._sock.fileno()

    def close(self) -> None:
        """End the session."""
        self._sock.close()

    def send(self, op: str, **fields: Any) -> None:
        """Send a request; its answer comes from receive(). OSError."""
        self._asked = {"op": op, "id": int(self._asked.get("id", 0)) + 1, **fields}
        self._send_request()

    def _send_request(self) -> None:
        self._sock.settimeout(config.SEND_SECONDS_MAX)
        self._sock.sendall(json.dumps(self._asked).encode() + b"\n")

    def _is_answer(self, line: dict[str, Any]) -> bool:
        """Whether it answers what was asked last; "start" answers anything: there is no daemon."""
        return line.get("id") == self._asked.get("id") or line.get("code") == "start"

    def _take_line(self, line: bytes) -> dict[str, Any] | None:
        """The answer, if it is that. Notices are passed on; what a daemon that died left half is dropped."""
        try:
            reply = json.loads(line)
        except ValueError:
            return None
        if "notice" not in reply:
            return reply if self._is_answer(reply) else None
        if reply["notice"] == "daemon-restarted" and self._asked:
            self._send_request()
        self.on_notice(reply)
        return None

    def receive(self, seconds_max: float | None) -> dict[str, Any] | None:
        """The next answer, or None when there is none yet. EOFError when the daemon is gone."""
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                reply = self._take_line(bytes(line))
                if reply is not None:
                    return reply
                continue
            if len(self._buffer) > config.REPLY_BYTES_MAX:
                raise EOFError("the answer does not end")
            self._sock.settimeout(seconds_max)
            try:
                chunk = self._sock.recv(1 << 18)
            except (TimeoutError, BlockingIOError):
                return None
            except OSError as error:
                raise EOFError(str(error)) from None
            if not chunk:
                raise EOFError("the daemon closed the connection")
            self._buffer += chunk

    def request(self, op: str, *, seconds_max: float = 60.0, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Failure for everything that goes wrong."""
        try:
            self.send(op, **fields)
            reply = self.receive(seconds_max)
        except (OSError, EOFError) as error:
            raise Failure(
                f"the daemon does not answer: {error}", "see its log (journalctl -u vswapd)"
            ) from None
        if reply is None:
            raise Failure(
                f"the daemon has not answered for {seconds_max:g} s", "see its log (journalctl -u vswapd)"
            )
        return check_reply(reply)


def check_reply(reply: dict[str, Any]) -> dict[str, Any]:
    """The reply, or Failure with the daemon's words."""
    if not reply.get("ok"):
        raise Failure(str(reply.get("error", "refused")), str(reply.get("remedy", "")))
    return reply


def open_connection(path: str) -> Connection:
    """Connect to the daemon at `path`. OSError."""
    paths.check_socket_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(_CONNECT_SECONDS_MAX)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return Connection(sock)


def connect_named(path: str) -> Connection:
    """Connect to the daemon the user named with --socket. Failure."""
    try:
        return open_connection(path)
    except OSError as error:
        raise Failure(
            f"no daemon answers on {path} ({error.strerror or error})", "start vswapd, or leave --socket out"
        ) from None


def connect_default() -> Connection | None:
    """Connect to the system daemon, or the one this process runs under; None when there is none."""
    try:
        return open_connection(paths.default_socket())
    except OSError:
        return None


def _connect_private() -> Connection:
    """Connect to the embedded daemon of this user, if there is exactly one."""
    answering = []
    for path in paths.private_sockets():
        try:
            answering.append((path, open_connection(path)))
        except OSError:
            continue
    if len(answering) == 1:
        return answering[0][1]
    for _, connection in answering:
        connection.close()
    if answering:
        raise Failure(
            f"{len(answering)} private daemons run",
            "name one: --socket " + " | ".join(path for path, _ in answering),
        )
    raise Failure(
        f"no daemon answers on {paths.default_socket()}, and none runs for a command of yours",
        "start vswapd, or a command with vswapctl run",
    )


def connect_any(path: str | None) -> Connection:
    """The daemon at `path` if given, else the system's, else the only private one. Failure."""
    if path is not None:
        return connect_named(path)
    return connect_default() or _connect_private()


def connect_serving(pid: int, path: str | None) -> Connection:
    """The daemon that serves the process `pid`. Failure."""
    if path is not None:
        return connect_named(path)
    if not processes.exists(pid):
        raise Failure(f"no process {pid}", "give the PID of a running process")
    of_process = processes.environment_value(pid, "VSWAPD_SOCKET")
    if of_process:
        try:
            return open_connection(of_process)
        except OSError:
            pass
    connection = connect_default()
    if connection is None:
        uid = processes.uid(pid)
        if of_process is None and uid is not None and os.geteuid() not in (0, uid):
            raise Failure(f"process {pid} is not yours", "run vswapctl as root or as its owner")
        raise Failure(f"process {pid} is not managed", "start it with vswapctl run")
    return connection
