# SPDX-License-Identifier: MIT
"""Who gets a connection, and which protocol."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from support.fake_log import FakeLog
from vswapd import config
from vswapd.accept import Acceptor, Peer, peer_of

if TYPE_CHECKING:
    from pathlib import Path


class _Servers:
    """Records who was handed over, and holds them until released."""

    def __init__(self) -> None:
        self.agents: list[Peer] = []
        self.controls: list[Peer] = []
        self.release = trio.Event()

    async def agent(self, sock: trio.socket.SocketType, peer: Peer) -> None:
        self.agents.append(peer)
        await self.release.wait()

    async def control(self, sock: trio.socket.SocketType, peer: Peer) -> None:
        self.controls.append(peer)
        await self.release.wait()


async def test_first_byte_decides_and_stays_unread() -> None:
    servers = _Servers()
    servers.release.set()
    acceptor = Acceptor(servers.agent, servers.control, FakeLog())
    for first, served in ((b"{", servers.controls), (b"V", servers.agents)):
        ours, theirs = trio.socket.socketpair()
        await theirs.send(first)
        await acceptor.serve(ours)
        assert served == [Peer(os.getpid(), os.geteuid(), os.getegid())]
        theirs.close()


async def test_credentials_are_of_the_connecting_process(tmp_path: Path) -> None:
    servers = _Servers()
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as peer:
        listener.bind(path)
        listener.listen()
        peer.connect(path)
        accepted, _ = listener.accept()
        with trio.socket.from_stdlib_socket(accepted) as accepted_socket:
            assert peer_of(accepted_socket) == Peer(os.getpid(), os.geteuid(), os.getegid())
    assert not servers.agents


async def test_users_do_not_exhaust_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = _Servers()
    acceptor = Acceptor(servers.agent, servers.control, FakeLog())
    monkeypatch.setattr(config, "CONNECTIONS_PER_UID_MAX", 2)
    monkeypatch.setattr(config, "CONNECTIONS_MAX", 4)
    assert [acceptor._admit(Peer(1, 1000, 0)) for _ in range(3)] == [True, True, False]
    assert [acceptor._admit(Peer(1, 0, 0)) for _ in range(3)] == [True, True, False]


async def test_mistake_in_serving_one_peer_stays_there() -> None:
    async def broken(sock: trio.socket.SocketType, peer: Peer) -> None:
        raise RuntimeError("a mistake", sock, peer)

    log = FakeLog()
    acceptor = Acceptor(broken, broken, log)
    ours, theirs = trio.socket.socketpair()
    await theirs.send(b"V")
    await acceptor.serve(ours)
    assert log.worst() == ["connection failed"]
    assert acceptor._count_of_uid.total() == 0
    theirs.close()


async def test_accepts_from_a_listener(tmp_path: Path) -> None:
    servers = _Servers()
    acceptor = Acceptor(servers.agent, servers.control, FakeLog())
    path = str(tmp_path / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.run, listener)
            streams = [await trio.open_unix_socket(path) for _ in range(3)]
            for stream in streams:
                await stream.send_all(b"V")
            await trio.testing.wait_all_tasks_blocked()
            assert len(servers.agents) == 3
            servers.release.set()
            for stream in streams:
                # Its byte was not read: that is a reset.
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
                await stream.aclose()
            nursery.cancel_scope.cancel()
    listener.close()
