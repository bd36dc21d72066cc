# SPDX-License-Identifier: MIT
"""redis_client — as much of a Redis client as the tests need: commands over a Unix socket, pipelined."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_Argument = bytes | str | int


class RedisError(Exception):
    """The server's -ERR."""


def _encode(command: Sequence[_Argument]) -> bytes:
    parts = [part if isinstance(part, bytes) else str(part).encode() for part in command]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


class RedisClient:
    """One connection."""

    def __init__(self, path: str, seconds_max: float = 120.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(seconds_max)
        try:
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise
        self._reader = self._socket.makefile("rb", buffering=1 << 18)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._socket.close()

    def _reply(self) -> Any:
        line = self._reader.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError("the server closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise RedisError(rest.decode())
        if kind == b"+":
            return rest.decode()
        if kind == b":":
            return int(rest)
        if rest == b"-1":
            return None
        if kind == b"$":
            return self._reader.read(int(rest) + 2)[:-2]
        return [self._reply() for _ in range(int(rest))]

    def command(self, *arguments: _Argument) -> Any:
        """One command and its answer. RedisError."""
        self._socket.sendall(_encode(arguments))
        return self._reply()

    def pipeline(self, commands: Iterable[Sequence[_Argument]], batch: int = 1000) -> None:
        """Many commands whose answers do not matter, but for errors."""
        pending: list[bytes] = []
        for command in commands:
            pending.append(_encode(command))
            if len(pending) == batch:
                self._flush(pending)
        self._flush(pending)

    def _flush(self, pending: list[bytes]) -> None:
        self._socket.sendall(b"".join(pending))
        for _ in pending:
            self._reply()
        pending.clear()

    def wait_background_save(self, seconds_max: float) -> bool:
        """Until no BGSAVE runs; returns whether the last one went well."""
        deadline = time.monotonic() + seconds_max
        while True:
            info = self.command("INFO", "persistence").decode()
            figures = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
            if figures["rdb_bgsave_in_progress"] == "0":
                return bool(figures["rdb_last_bgsave_status"] == "ok")
            if time.monotonic() > deadline:
                raise TimeoutError(f"BGSAVE still runs after {seconds_max} s")
            time.sleep(0.05)  # polling another program's state
