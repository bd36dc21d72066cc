# SPDX-License-Identifier: MIT
"""The agent's handshake over real sockets: regular, refused, hostile, and ended half-way."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from support.control_plane import AgentPeer, control_plane, open_descriptors
from vswapd import clients, config, processes, wire
from vswapd.accept import Peer

_STRANGER = Peer(pid=os.getpid(), uid=12345, gid=12345)


async def test_new_client_is_served_until_its_agent_goes() -> None:
    async with control_plane() as plane:
        group = plane.add_group()
        agent = plane.agent()
        await agent.hello()
        status, token, descriptors = await agent.welcome()
        assert (status, len(descriptors)) == (wire.OK, 2)
        assert plane.engine.clients()[0].pid == os.getpid()
        assert plane.engine.clients()[0].group == group
        await agent.arm()
        assert await agent.ready() == wire.OK
        assert plane.engine.armed[token] == wire.Arena(1, 2, 3, (4, 5), (6, 7))
        assert plane.daemon.clients.by_token(token) is not None
        agent.sock.close()
        await plane.wait_calls("client_lost")
        assert plane.engine.clients() == []
        assert plane.log.worst() == []


async def test_forked_child_gets_its_userfaultfd_and_sends_one() -> None:
    async with control_plane() as plane:
        plane.engine.forked_tokens[5] = plane.add_group()
        agent = plane.agent()
        await agent.hello(wire.HELLO_FORKED, 5, group="")
        status, token, descriptors = await agent.welcome()
        assert (status, token, len(descriptors)) == (wire.OK, 5, 3)
        await agent.arm(1)
        assert await agent.ready() == wire.OK
        name, *arguments = next(call for call in plane.engine.calls if call[0] == "client_arm")
        assert (name, arguments[2]) == ("client_arm", -1)


async def test_forked_child_comes_in_while_the_daemon_stops() -> None:
    async with control_plane() as plane:
        plane.engine.forked_tokens[5] = plane.add_group()
        plane.daemon.clients.stopping.set()
        stopped, forked = plane.agent(), plane.agent()
        await stopped.hello()
        assert (await stopped.welcome())[0] == wire.REFUSED_LIMIT
        await forked.hello(wire.HELLO_FORKED, 5)
        assert (await forked.welcome())[0] == wire.OK


@pytest.mark.parametrize(
    ("kind", "token", "group"),
    [(wire.HELLO_NEW, 0, "nosuch"), (wire.HELLO_NEW, 0, ""), (wire.HELLO_FORKED, 4711, "g")],
)
async def test_unknown_group_or_token_is_refused(kind: int, token: int, group: str) -> None:
    async with control_plane() as plane:
        plane.add_group()
        agent = plane.agent()
        await agent.hello(kind, token, group)
        status, _, descriptors = await agent.welcome()
        assert (status, descriptors) == (wire.REFUSED_PEER, [])
        await agent.wait_closed()
        assert plane.engine.clients() == []


async def test_other_users_do_not_enter_a_group() -> None:
    async with control_plane() as plane:
        plane.add_group(owner_uid=777)
        agent = plane.agent(_STRANGER)
        await agent.hello()
        assert (await agent.welcome())[0] == wire.REFUSED_PEER


async def test_member_that_changed_its_user_still_enters() -> None:
    """It descends from the group's root: a service that gave up root stays inside the limit."""
    async with control_plane() as plane:
        plane.add_group(owner_uid=777, root_pid=os.getppid())
        agent = plane.agent(_STRANGER)
        await agent.hello()
        assert (await agent.welcome())[0] == wire.OK


async def test_process_that_became_another_users_is_refused() -> None:
    """It connected, handed the socket on, and executed a setuid program: that one's memory is not its user's."""
    async with control_plane() as plane:
        plane.add_group(owner_uid=_STRANGER.uid)
        plane.daemon.clients.is_process_of = processes.is_of
        agent = plane.agent(_STRANGER)  # this process is not of that user
        await agent.hello()
        assert (await agent.welcome())[0] == wire.REFUSED_PEER
        await plane.wait_calls("client_lost")
        assert plane.engine.clients() == []


async def test_doomed_group_takes_nobody() -> None:
    async with control_plane() as plane:
        plane.engine.add_client(1, plane.add_group())
        group = plane.daemon.groups.find("g")
        assert group is not None
        plane.daemon.groups.doom(group)
        agent = plane.agent()
        await agent.hello()
        assert (await agent.welcome())[0] == wire.REFUSED_PEER


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n" + bytes(64),
        bytes(wire.HELLO.size),
        wire.HELLO.pack(wire.MAGIC, 99, 1, 0, b"g"),
    ],
)
async def test_other_protocols_are_refused(data: bytes) -> None:
    async with control_plane() as plane:
        plane.add_group()
        agent = plane.agent()
        await agent.send(data)
        assert (await agent.welcome())[0] == wire.REFUSED_VERSION
        await agent.wait_closed()


async def test_short_hello_ends_the_connection() -> None:
    async with control_plane() as plane:
        agent = plane.agent()
        await agent.send(b"VSWP")
        agent.sock.shutdown(trio.socket.SHUT_WR)
        assert (await agent.welcome())[0] == wire.REFUSED_PEER
        await agent.wait_closed()


async def test_hello_in_pieces_is_read() -> None:
    async with control_plane() as plane:
        plane.add_group()
        agent = plane.agent()
        data = wire.HELLO.pack(wire.MAGIC, wire.VERSION, wire.HELLO_NEW, 0, b"g")
        for index in range(len(data)):
            await agent.send(data[index : index + 1])
        assert (await agent.welcome())[0] == wire.OK


async def test_silent_peers_are_not_waited_for(autojump_clock: object) -> None:
    del autojump_clock
    async with control_plane() as plane:
        plane.add_group()
        silent, slow = plane.agent(), plane.agent()
        await slow.send(b"VSWP")
        started = trio.current_time()
        assert len(await slow.sock.recv(100)) == wire.WELCOME.size  # it says that it refuses
        assert await slow.sock.recv(1) == b""
        assert trio.current_time() - started >= config.HANDSHAKE_SECONDS_MAX
        assert await silent.sock.recv(1) == b""


async def _hello_with_descriptors(agent: AgentPeer, count: int) -> None:
    descriptors = [os.memfd_create("uninvited", os.MFD_CLOEXEC) for _ in range(count)]
    data = wire.HELLO.pack(wire.MAGIC, wire.VERSION, wire.HELLO_NEW, 0, b"g")
    await agent.send(data, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("count", [1, 4, 5, 200])
async def test_uninvited_descriptors_are_closed(count: int) -> None:
    async with control_plane() as plane:
        plane.add_group()
        before = open_descriptors()
        agent = plane.agent()
        await _hello_with_descriptors(agent, count)
        assert (await agent.welcome())[0] == wire.REFUSED_PEER
        await agent.wait_closed()
        agent.sock.close()
        assert open_descriptors() == before


@pytest.mark.parametrize("count", [0, 1, 3, 4])
async def test_wrong_number_of_descriptors_ends_the_client(count: int) -> None:
    async with control_plane() as plane:
        plane.add_group()
        before = open_descriptors()
        agent = plane.agent()
        await agent.hello()
        await agent.welcome()
        await agent.arm(count)
        await agent.wait_closed()
        await plane.wait_calls("client_lost")
        agent.sock.close()
        assert plane.engine.clients() == []
        assert open_descriptors() == before
        assert plane.log.worst() == ["handshake given up"]


async def test_descriptors_of_another_kind_are_refused() -> None:
    async with control_plane() as plane:
        plane.daemon.clients.is_descriptor_valid = clients.is_userfaultfd
        plane.add_group()
        agent = plane.agent()
        await agent.hello()
        await agent.welcome()
        await agent.arm()
        await agent.wait_closed()
        await plane.wait_calls("client_lost")
        assert not plane.engine.armed


@pytest.mark.parametrize(("refusal", "worst"), [(errno.EINVAL, ["handshake given up"]), (errno.ESRCH, [])])
async def test_engine_that_refuses_to_arm_is_told_to_the_agent(refusal: int, worst: list[str]) -> None:
    """And to whoever reads the log, unless it is because the process has ended meanwhile."""
    async with control_plane() as plane:
        plane.add_group()
        plane.engine.refuse["client_arm"] = refusal
        before = open_descriptors()
        agent = plane.agent()
        await agent.hello()
        await agent.welcome()
        await agent.arm()
        assert await agent.ready() == wire.REFUSED_KERNEL
        await agent.wait_closed()
        await plane.wait_calls("client_lost")
        agent.sock.close()
        assert open_descriptors() == before
        assert plane.log.worst() == worst


async def test_engine_without_room_refuses_with_limit() -> None:
    async with control_plane() as plane:
        plane.add_group()
        plane.engine.refuse["client_begin"] = 28
        agent = plane.agent()
        await agent.hello()
        assert (await agent.welcome())[0] == wire.REFUSED_LIMIT


async def test_agent_that_talks_after_ready_is_dropped() -> None:
    async with control_plane() as plane:
        plane.add_group()
        agent = plane.agent()
        await agent.join()
        await agent.send(b"?")
        await agent.wait_closed()
        await plane.wait_calls("client_lost")


async def test_agent_that_dies_before_arm_leaves_nothing() -> None:
    async with control_plane() as plane:
        plane.add_group()
        agent = plane.agent()
        await agent.hello()
        await agent.welcome()
        agent.sock.close()
        await plane.wait_calls("client_lost")
        assert plane.engine.clients() == []


async def test_clients_are_ended_when_the_daemon_is() -> None:
    async with control_plane() as plane:
        plane.add_group()
        await plane.agent().join()
        plane.nursery.cancel_scope.cancel()
    assert "client_lost" in [call[0] for call in plane.engine.calls]


async def test_a_thousand_clients_come_and_go_without_growth() -> None:
    async with control_plane() as plane:
        plane.add_group()
        before = open_descriptors()
        for _ in range(1000):
            agent = plane.agent()
            await agent.join()
            agent.sock.close()
        await plane.wait_calls("client_lost", 1000)
        assert plane.engine.clients() == []
        with trio.fail_after(5):
            while open_descriptors() > before:  # noqa: ASYNC110 -- worker threads close some
                await trio.sleep(0.001)
        assert not plane.daemon.clients._clients
        assert plane.daemon.acceptor._count_of_uid.total() == 0


async def test_name_of_an_ended_client_is_remembered() -> None:
    async with control_plane() as plane:
        plane.add_group()
        agent = plane.agent()
        await agent.join()
        name = plane.daemon.clients.comm(os.getpid())
        assert name
        agent.sock.close()
        await plane.wait_calls("client_lost")
        assert plane.daemon.clients.comm(os.getpid()) == name
        assert plane.daemon.clients.comm(1) == ""
