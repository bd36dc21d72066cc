# SPDX-License-Identifier: MIT
"""control_plane — the daemon's Python half over a fake engine, and both kinds of peers to talk to it.

`async with control_plane() as plane:` inside a test; peers connect over real socket pairs and sockets.
"""

from __future__ import annotations

import array
import json
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from support.fake_engine import FakeEngine
from support.fake_log import FakeLog
from vswapd import wire
from vswapd.daemon import Daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from vswapd.accept import Peer

SECONDS_MAX = 5.0
LIMIT = 64 << 20


def open_descriptors() -> int:
    """How many this process has: a test that leaks one notices."""
    return len(os.listdir("/proc/self/fd"))


class AgentPeer:
    """The agent's side of a handshake."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock

    async def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """One message."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        await self.sock.sendmsg([data], rights if descriptors else [])

    async def hello(self, kind: int = wire.HELLO_NEW, token: int = 0, group: str = "g") -> None:
        """HELLO."""
        await self.send(wire.HELLO.pack(wire.MAGIC, wire.VERSION, kind, token, group.encode()))

    async def welcome(self) -> tuple[int, int, list[int]]:
        """(status, token, descriptors); the descriptors are closed at once, their count is what counts."""
        with trio.fail_after(SECONDS_MAX):
            data, ancillary, _, _ = await self.sock.recvmsg(wire.WELCOME.size, 256)
        numbers = array.array("i")
        for _, _, rights in ancillary:
            numbers.frombytes(rights)
        for descriptor in numbers:
            os.close(descriptor)
        magic, version, status, token = wire.WELCOME.unpack(data)
        assert (magic, version) == (wire.MAGIC, wire.VERSION)
        return status, token, list(numbers)

    async def arm(self, descriptor_count: int = 2) -> None:
        """ARM, with descriptors that are closed here once they are sent."""
        descriptors = [os.memfd_create("fake userfaultfd", os.MFD_CLOEXEC) for _ in range(descriptor_count)]
        try:
            await self.send(wire.ARM.pack(wire.MAGIC, wire.VERSION, 0, 1, 2, 3, 4, 5, 6, 7), descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def ready(self) -> int:
        """The status of READY."""
        with trio.fail_after(SECONDS_MAX):
            data = await self.sock.recv(wire.READY.size)
        return int(wire.READY.unpack(data)[2])

    async def wait_closed(self) -> None:
        """Until the daemon has closed the connection."""
        with trio.fail_after(SECONDS_MAX):
            try:
                assert await self.sock.recv(1) == b""
            except ConnectionResetError:
                pass

    async def join(self, group: str = "g") -> int:
        """The whole handshake of a new client; its token."""
        await self.hello(group=group)
        status, token, _ = await self.welcome()
        assert status == wire.OK
        await self.arm()
        assert await self.ready() == wire.OK
        return token


class ControlPeer:
    """A control connection."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self._buffer = b""
        self.notices: list[dict[str, Any]] = []

    async def line(self) -> dict[str, Any]:
        """The next line, notice or answer."""
        with trio.fail_after(SECONDS_MAX):
            while b"\n" not in self._buffer:
                chunk = await self.sock.recv(65536)
                if not chunk:
                    raise EOFError
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        document: dict[str, Any] = json.loads(line)
        return document

    async def send_all(self, data: bytes) -> None:
        """Raw bytes."""
        while data:
            data = data[await self.sock.send(data) :]

    async def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """The answer; notices that come before it are kept."""
        await self.send_all(json.dumps({"op": op, **fields}).encode() + b"\n")
        while "notice" in (reply := await self.line()):
            self.notices.append(reply)
        return reply


class ControlPlane:
    """A Daemon over a FakeEngine."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.engine = FakeEngine()
        self.log = FakeLog()
        self.daemon = Daemon(self.engine, self.log)  # type: ignore[arg-type]
        self.daemon.clients.is_descriptor_valid = lambda descriptor: descriptor >= 0
        self.daemon.clients.is_process_of = lambda pid, user, group: True
        self.nursery = nursery
        self._peers: list[trio.socket.SocketType] = []

    def connect(self, peer: Peer | None = None) -> trio.socket.SocketType:
        """The peer's end of a new connection. `peer`: pretend to be that one."""
        ours, theirs = trio.socket.socketpair()
        self._peers.append(theirs)
        if peer is None:
            self.nursery.start_soon(self.daemon.acceptor.serve, ours)
        else:
            self.nursery.start_soon(self._serve_as, ours, peer)
        return theirs

    async def _serve_as(self, sock: trio.socket.SocketType, peer: Peer) -> None:
        with sock:
            first = await sock.recv(1, socket.MSG_PEEK)
            serve = self.daemon.control.serve if first == b"{" else self.daemon.clients.serve
            await serve(sock, peer)

    def close_peers(self) -> None:
        """Whatever a test left open."""
        for sock in self._peers:
            sock.close()

    def agent(self, peer: Peer | None = None) -> AgentPeer:
        """A new agent."""
        return AgentPeer(self.connect(peer))

    def control(self, peer: Peer | None = None) -> ControlPeer:
        """A new control connection."""
        return ControlPeer(self.connect(peer))

    def add_group(self, name: str = "g", owner_uid: int | None = None, root_pid: int = 0) -> int:
        """A group; its number."""
        owner = os.geteuid() if owner_uid is None else owner_uid
        return self.daemon.groups.create(name, owner, LIMIT, root_pid=root_pid).number

    async def wait_calls(self, name: str, count: int = 1) -> None:
        """Until the engine's method was called that often."""
        with trio.fail_after(SECONDS_MAX):
            # Calls come from worker threads, which tell nobody.
            while sum(call[0] == name for call in self.engine.calls) < count:  # noqa: ASYNC110
                await trio.sleep(0.001)


@asynccontextmanager
async def control_plane() -> AsyncIterator[ControlPlane]:
    """Everything started; everything stopped at the end."""
    async with trio.open_nursery() as nursery:
        plane = ControlPlane(nursery)
        try:
            yield plane
        finally:
            nursery.cancel_scope.cancel()
            plane.close_peers()
    plane.engine.destroy()
