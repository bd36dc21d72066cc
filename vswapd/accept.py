# SPDX-License-Identifier: MIT
"""accept — the daemon's socket: who connects, and which of the two protocols it speaks.

The socket of a system daemon is open to every user (mode 0666): unprivileged programs must be able
to come under management. So the peer's credentials, which the kernel fills in at connect(2), are
the only authority; what each user may do is decided in clients.py and control.py. A first byte '{'
is a control request, anything else an agent. Connections are bounded, in all and for each
unprivileged user, and one that says nothing is closed.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from vswapd import config

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from vswapd.log import Log

    Server = Callable[["trio.socket.SocketType", "Peer"], Awaitable[None]]

_CREDENTIALS = struct.Struct("=3i")


@dataclass(frozen=True)
class Peer:
    """Who connected; pid 0: not visible from the daemon's PID namespace."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: trio.socket.SocketType | socket.socket) -> Peer:
    """Credentials of the process at the other end."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(data))


class Acceptor:
    """Accepts connections and hands them to `serve_agent` or `serve_control`."""

    def __init__(self, serve_agent: Server, serve_control: Server, log: Log) -> None:
        self._serve_agent = serve_agent
        self._serve_control = serve_control
        self._log = log
        self._count_of_uid: Counter[int] = Counter()

    async def run(self, listener: socket.socket) -> None:
        """Accept for ever."""
        sock = trio.socket.from_stdlib_socket(listener)
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    connection, _ = await sock.accept()
                except OSError as error:  # out of descriptors or memory: those who wait stay in the backlog
                    self._log.error("accept failed", error=str(error))
                    await trio.sleep(config.ACCEPT_PAUSE_SECONDS)
                    continue
                nursery.start_soon(self.serve, connection)

    async def serve(self, sock: trio.socket.SocketType, server: Server | None = None) -> None:
        """One connection, from its first byte to its end; the first byte says whose it is, unless
        `server` does. Never raises for what a peer does."""
        with sock:
            try:
                peer = peer_of(sock)
            except OSError as error:
                self._log.warning("peer without credentials", error=str(error))
                return
            if not self._admit(peer):
                return
            try:
                await (server or self._dispatch)(sock, peer)
            except OSError as error:  # it closed while we wrote, or the like
                self._log.debug("connection ended", pid=peer.pid, error=str(error))
            except Exception as error:
                # A mistake of ours in serving one peer must not end the others' memory.
                self._log.error("connection failed", pid=peer.pid, error=repr(error))
            finally:
                self._count_of_uid[peer.uid] -= 1

    def _admit(self, peer: Peer) -> bool:
        total = self._count_of_uid.total()
        of_uid = self._count_of_uid[peer.uid]
        if total >= config.CONNECTIONS_MAX or (peer.uid != 0 and of_uid >= config.CONNECTIONS_PER_UID_MAX):
            self._log.warning("too many connections", uid=peer.uid, of_user=of_uid, total=total)
            return False
        self._count_of_uid[peer.uid] += 1
        return True

    async def _dispatch(self, sock: trio.socket.SocketType, peer: Peer) -> None:
        first = b""
        with trio.move_on_after(config.HANDSHAKE_SECONDS_MAX):
            # MSG_PEEK delivers duplicates of descriptors too if a control buffer is given: plain recv.
            first = await sock.recv(1, socket.MSG_PEEK)
        if first == b"{":
            await self._serve_control(sock, peer)
        elif first:
            await self._serve_agent(sock, peer)
