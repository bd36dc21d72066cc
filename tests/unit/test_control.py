# SPDX-License-Identifier: MIT
"""Control requests over real sockets: what they do, who may, and what hostile ones do not."""

from __future__ import annotations

import json
import os

import pytest
import trio
import trio.testing

from support.control_plane import LIMIT, ControlPeer, ControlPlane, control_plane
from vswapd import config, processes, records
from vswapd.accept import Peer

_STRANGER = Peer(pid=os.getpid(), uid=12345, gid=12345)
_MIB = config.MIB


async def _refused(peer: ControlPeer, code: str, op: str, **fields: object) -> None:
    reply = await peer.request(op, **fields)
    assert not reply["ok"]
    assert reply["code"] == code, reply
    assert reply["error"]
    assert reply["remedy"]
    assert "\n" not in reply["error"] + reply["remedy"]


async def test_ping() -> None:
    async with control_plane() as plane:
        reply = await plane.control().request("ping")
        assert reply["ok"]
        assert reply["pid"] == os.getpid()


async def test_requests_of_one_connection_are_answered_in_order() -> None:
    async with control_plane() as plane:
        peer = plane.control()
        await peer.send_all(b'{"op":"ping"}\n{"op":"nosuch"}\n{"op":"ping"}\n')
        assert [(await peer.line())["ok"] for _ in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"{}",
        b'{"op": 5}',
        b'{"op": "nosuch"}',
        b'{"op": "group_create"}',
        b'{"op": "__init__"}',
        b'{"op": "answer"}',
        b'{"op": "limit"}',
        b'{"op": "limit", "pid": true, "limit_bytes": 99999999}',
        b'{"op": "limit", "pid": -1, "limit_bytes": 99999999}',
        b'{"op": "group-create", "limit_bytes": 1}',
        b'{"op": "group-create", "limit_bytes": 99999999, "torture": 1}',
        b'{"op": "group-create", "limit_bytes": 99999999, "name": 7}',
        b'{"op": "pageout", "pid": 1, "timeout_ms": 1e99}',
        b"{" * 5000,
        b'{"op": "\xff\xfe"}',
    ],
)
async def test_malformed_requests_are_answered_and_survived(line: bytes) -> None:
    async with control_plane() as plane:
        peer = plane.control()
        await peer.send_all(line + b"\n")
        reply = await peer.line()
        assert (reply["ok"], reply["code"]) == (False, "bad-request")
        assert (await peer.request("ping"))["ok"]


async def test_request_without_end_is_not_collected() -> None:
    async with control_plane() as plane:
        peer = plane.control()
        await peer.send_all(b"{" + b" " * (config.REQUEST_BYTES_MAX + 65536))
        assert (await peer.line())["code"] == "too-long"
        with pytest.raises((EOFError, ConnectionResetError)):
            await peer.line()


# ---- groups ----


async def test_group_lives_as_long_as_its_session() -> None:
    async with control_plane() as plane:
        peer = plane.control()
        reply = await peer.request("group-create", limit_bytes=LIMIT, pool_limit_bytes=_MIB, torture=True)
        assert reply["group"] == f"run-{os.getpid()}"
        group = plane.engine.groups()[0]
        assert (group.limit_bytes, group.pool_limit_bytes, group.flags) == (
            LIMIT,
            _MIB,
            records.GROUP_TORTURE,
        )
        peer.sock.close()
        await plane.wait_calls("group_destroy")
        assert plane.engine.groups() == []
        assert list(plane.daemon.groups) == []


async def test_group_with_clients_outlives_its_session_until_the_last_ends() -> None:
    async with control_plane() as plane:
        peer = plane.control()
        name = (await peer.request("group-create", limit_bytes=LIMIT))["group"]
        agent = plane.agent()
        await agent.join(name)
        peer.sock.close()
        await plane.wait_calls("group_destroy")
        assert [group.name for group in plane.engine.groups()] == [name]
        agent.sock.close()
        await plane.wait_calls("group_destroy", 2)
        assert plane.engine.groups() == []


async def test_taken_names_get_a_number() -> None:
    async with control_plane() as plane:
        names = [
            (await plane.control().request("group-create", name="job", limit_bytes=LIMIT))["group"]
            for _ in range(3)
        ]
        assert names == ["job", "job.2", "job.3"]


@pytest.mark.parametrize("name", ["a b", "a/b", "x" * 32, "\n"])
async def test_impossible_names_are_refused(name: str) -> None:
    async with control_plane() as plane:
        await _refused(plane.control(), "refused", "group-create", name=name, limit_bytes=LIMIT)


async def test_unprivileged_users_get_a_bounded_number_of_groups() -> None:
    async with control_plane() as plane:
        peer = plane.control(_STRANGER)
        for index in range(config.GROUPS_PER_UID_MAX):
            assert (await peer.request("group-create", name=f"g{index}", limit_bytes=LIMIT))["ok"]
        await _refused(peer, "refused", "group-create", name="more", limit_bytes=LIMIT)


async def test_wait_ends_with_the_last_client() -> None:
    async with control_plane() as plane:
        peer, other = plane.control(), plane.control()
        name = (await peer.request("group-create", limit_bytes=LIMIT))["group"]
        assert (await other.request("group-wait", group=name, timeout_ms=0))["clients"] == 0
        agent = plane.agent()
        await agent.join(name)
        reply = await other.request("group-wait", group=name, timeout_ms=0)
        assert (reply["clients"], reply["pids"]) == (1, [os.getpid()])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.sock.send, b"?")  # a way to end it
            assert (await other.request("group-wait", group=name, timeout_ms=5000))["clients"] == 0


async def test_stop_says_for_whom_it_waits_and_then_good_bye() -> None:
    async with control_plane() as plane:
        peer = plane.control()
        group = (await peer.request("group-create", limit_bytes=LIMIT))["group"]
        agent = plane.agent()
        await agent.join(group)
        told: list[str] = []

        async def stop() -> None:
            await plane.daemon.wait_no_clients(told.append)
            await plane.daemon.control.say_goodbye()

        plane.nursery.start_soon(stop)
        await trio.testing.wait_all_tasks_blocked()
        name = processes.comm(os.getpid())
        assert told[0].startswith(f"Waiting for 1 process to end: {os.getpid()} ({name}); vswapctl detach --all ")
        agent.sock.close()
        line = await peer.line()
        assert (line["notice"], line["level"]) == ("daemon-stopped", "warning")
        assert len(told) == 1


async def test_stopping_daemon_makes_no_groups() -> None:
    async with control_plane() as plane:
        plane.daemon.clients.stopping.set()
        await _refused(plane.control(), "stopping", "group-create", limit_bytes=LIMIT)


# ---- processes ----


async def _plane_with_client(plane: ControlPlane, uid: int | None = None) -> None:
    plane.add_group(owner_uid=uid)
    peer = None if uid is None else Peer(os.getpid(), uid, uid)
    await plane.agent(peer).join()


async def test_pageout_and_pagein_say_what_is_where() -> None:
    async with control_plane() as plane:
        await _plane_with_client(plane)
        token = plane.engine.clients()[0].token
        plane.engine.set_client(token, resident_bytes=5 * _MIB, swapped_pages=256)
        for op in ("pageout", "pagein"):
            reply = await plane.control().request(op, pid=os.getpid(), timeout_ms=10)
            assert (reply["resident_bytes"], reply["swapped_bytes"]) == (5 * _MIB, _MIB)
            assert (op, os.getpid(), 10) in plane.engine.calls


async def test_cool_is_a_hint() -> None:
    async with control_plane() as plane:
        reply = await plane.control().request("cool", pid=os.getpid(), start=4096, bytes=8192)
        assert reply["swapped_bytes"] == 0
        await _plane_with_client(plane)
        await plane.control().request("cool", pid=os.getpid(), start=4096, bytes=8192)
        assert ("cool", os.getpid(), 4096, 8192) in plane.engine.calls
        await _refused(plane.control(), "bad-request", "cool", pid=os.getpid(), start=-1, bytes=1)


@pytest.mark.parametrize(
    ("number", "code"), [(3, "no-process"), (110, "timeout"), (12, "no-room"), (5, "failed")]
)
async def test_what_the_engine_cannot_do_is_explained(number: int, code: str) -> None:
    async with control_plane() as plane:
        await _plane_with_client(plane)
        plane.engine.refuse["pagein"] = number
        await _refused(plane.control(), code, "pagein", pid=os.getpid())


async def test_processes_that_are_not_there_or_not_managed() -> None:
    async with control_plane() as plane:
        await _refused(plane.control(), "no-process", "pageout", pid=1 << 22)
        await _refused(plane.control(), "not-managed", "pageout", pid=os.getpid())
        await _refused(plane.control(), "not-managed", "limit", pid=os.getpid(), limit_bytes=LIMIT)


async def test_limit_changes_the_group_and_keeps_its_pool_limit() -> None:
    async with control_plane() as plane:
        await plane.control().request("group-create", name="job", limit_bytes=LIMIT, pool_limit_bytes=_MIB)
        # A member that is no client is in its group all the same.
        reply = await plane.control().request("limit", pid=os.getpid(), limit_bytes=2 * LIMIT)
        assert (reply["group"], reply["limit_bytes"]) == ("job", 2 * LIMIT)
        assert plane.engine.groups()[0].limit_bytes == 2 * LIMIT
        assert plane.engine.groups()[0].pool_limit_bytes == _MIB
        await _refused(plane.control(), "bad-request", "limit", pid=os.getpid(), limit_bytes=1)


async def test_limit_changes_what_it_names_and_nothing_else() -> None:
    async with control_plane() as plane:
        await plane.control().request("group-create", name="job", limit_bytes=LIMIT)
        pid = os.getpid()
        reply = await plane.control().request("limit", pid=pid, spill_limit_bytes=8 * _MIB, writeback=False)
        assert (reply["limit_bytes"], reply["spill_limit_bytes"]) == (LIMIT, 8 * _MIB)
        assert (reply["writeback"], reply["recompress"]) == (False, True)
        reply = await plane.control().request("limit", pid=pid, pool_limit_bytes=_MIB, writeback=True)
        assert (reply["pool_limit_bytes"], reply["writeback"]) == (_MIB, True)
        assert plane.engine.groups()[0].spill_limit_bytes == 8 * _MIB
        for wrong in ({"spill_limit_bytes": 1}, {"pool_limit_bytes": LIMIT}, {"writeback": 1}, {}):
            await _refused(plane.control(), "bad-request", "limit", pid=pid, **wrong)


@pytest.mark.parametrize("op", ["pageout", "pagein", "limit"])
async def test_others_processes_are_not_touched(op: str) -> None:
    async with control_plane() as plane:
        await _plane_with_client(plane, uid=777)
        await _refused(plane.control(_STRANGER), "denied", op, pid=os.getpid(), limit_bytes=LIMIT)
        assert not {"pageout", "pagein", "group_set_limit"} & {call[0] for call in plane.engine.calls}


async def test_others_groups_are_not_waited_for() -> None:
    async with control_plane() as plane:
        plane.add_group("secret", owner_uid=777)
        await _refused(plane.control(_STRANGER), "no-group", "group-wait", group="secret", timeout_ms=0)


async def test_owner_may_act_on_its_process() -> None:
    async with control_plane() as plane:
        await _plane_with_client(plane, uid=777)
        owner = plane.control(Peer(os.getpid(), 777, 777))
        assert (await owner.request("pageout", pid=os.getpid()))["ok"]
        assert (await owner.request("limit", pid=os.getpid(), limit_bytes=LIMIT))["ok"]
        await _refused(
            owner, "bad-request", "pageout", pid=os.getpid(), timeout_ms=config.PAGE_TIMEOUT_MS + 1
        )


# ---- status ----


async def test_status_shows_others_only_to_root_and_owner() -> None:
    async with control_plane() as plane:
        plane.add_group("mine", owner_uid=777)
        plane.add_group("theirs", owner_uid=888)
        await plane.agent(Peer(os.getpid(), 777, 777)).join("mine")
        for peer, groups, clients in (
            (None, ["mine", "theirs"], 1),
            (Peer(1, 777, 0), ["mine"], 1),
            (_STRANGER, [], 0),
        ):
            status = (await plane.control(peer).request("status"))["status"]
            assert [group["name"] for group in status["groups"]] == groups
            assert len(status["clients"]) == clients


async def test_status_answers_while_page_operations_take_long() -> None:
    async with control_plane() as plane:
        await _plane_with_client(plane)
        release = trio.Event()
        operations = plane.daemon.control.operations
        async with trio.open_nursery() as nursery:

            async def occupy() -> None:
                async with operations._page_workers:
                    await release.wait()

            for _ in range(int(operations._page_workers.total_tokens)):
                nursery.start_soon(occupy)
            assert (await plane.control().request("status"))["ok"]
            release.set()


# ---- notices ----


async def test_session_is_told_of_its_group_only() -> None:
    async with control_plane() as plane:
        session, other, visitor = plane.control(), plane.control(), plane.control()
        name = (await session.request("group-create", name="a", limit_bytes=LIMIT))["group"]
        await other.request("group-create", name="b", limit_bytes=LIMIT)
        await visitor.request("ping")
        number = next(group.group for group in plane.engine.groups() if group.name == name)
        event = records.Event(
            records.EVENT_OUT_OF_MEMORY, os.getpid(), number, 70 * _MIB, 64 * _MIB, 60 * _MIB
        )
        plane.engine.add_event(event)
        plane.daemon.drain_events()
        notice = await session.line()
        assert (notice["notice"], notice["group"], notice["pid"]) == ("out-of-memory", "a", os.getpid())
        for part in ("group a", "limit 64 MiB", "usage 70 MiB", "resident 60 MiB", str(os.getpid()), "pool"):
            assert part in notice["text"], part
        assert "\n" not in notice["text"]
        for peer in (other, visitor):
            await peer.request("ping")
            assert peer.notices == []


async def test_notices_come_before_the_answer_that_was_asked_after_them() -> None:
    async with control_plane() as plane:
        session = plane.control()
        await session.request("group-create", name="a", limit_bytes=LIMIT)
        plane.engine.add_event(records.Event(records.EVENT_BACKEND_ERROR, 0, -1, 0, (1 << 64) - 5))
        await session.request("status")
        assert [notice["notice"] for notice in session.notices] == ["backend-error"]
        assert "Input/output error" in session.notices[0]["text"]


async def test_session_that_does_not_read_costs_a_bounded_queue() -> None:
    async with control_plane() as plane:
        session = plane.control()
        await session.request("group-create", name="a", limit_bytes=LIMIT)
        for _ in range(1000):
            plane.engine.add_event(records.Event(records.EVENT_BACKEND_ERROR, 0, -1, 0, 5))
        plane.daemon.drain_events()
        (server_session,) = plane.daemon.control._sessions
        assert len(server_session._notices) == config.NOTICES_QUEUED_MAX


# ---- test operations ----


async def test_test_operations_need_a_test_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSWAPD_TEST_OPERATIONS", raising=False)
    async with control_plane() as plane:
        await _refused(plane.control(), "denied", "test-check")
        await _refused(plane.control(), "denied", "test-hold-gil", ms=1)
    monkeypatch.setenv("VSWAPD_TEST_OPERATIONS", "1")
    async with control_plane() as plane:
        assert (await plane.control().request("test-check"))["valid"]
        assert (await plane.control().request("test-hold-gil", ms=1))["ok"]
        await _refused(plane.control(_STRANGER), "denied", "test-check")


async def test_every_line_is_json_with_one_newline() -> None:
    async with control_plane() as plane:
        sock = plane.control().sock
        await sock.send(b'{"op":"status"}\n')
        data = b""
        with trio.fail_after(5):
            while not data.endswith(b"\n"):
                data += await sock.recv(65536)
        assert data.count(b"\n") == 1
        assert json.loads(data)["ok"]
