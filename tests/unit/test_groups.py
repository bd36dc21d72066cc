# SPDX-License-Identifier: MIT
"""Groups: who is in them, and how they end. (What members are charged: tests/csrc/test_members.c.)"""

from __future__ import annotations

import errno
import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from support.control_plane import ControlPlane, control_plane
from support.fake_log import FakeLog
from vswapd import config
from vswapd.accept import Peer
from vswapd.records import GROUP_LABEL_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vswapd.groups import GroupRegistry


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def _of(plane: ControlPlane, name: str) -> list[tuple[object, ...]]:
    return [call[1:] for call in plane.engine.calls if call[0] == name]


async def test_members_are_the_engine_s_to_charge() -> None:
    async with control_plane() as plane:
        plane.daemon.groups.create("standing", 0, 1 << 26)
        assert not _of(plane, "group_set_members"), "it has no root"
        group = plane.daemon.groups.create("g", 0, 1 << 26, root_pid=os.getpid(), excluded=frozenset({1}))
        assert _of(plane, "group_set_members") == [(group.number, os.getpid(), {1})]


async def test_member_that_becomes_a_client_is_not_counted_twice() -> None:
    async with control_plane() as plane:
        plane.add_group(root_pid=os.getpid())
        agent = plane.agent(Peer(os.getpid(), os.geteuid(), os.getegid()))
        await agent.join()
        names = [call[0] for call in plane.engine.calls]
        # Before the engine begins to count it: too little for an instant, never too much.
        assert names.index("note_client") < names.index("client_arm")
        assert _of(plane, "note_client") == [(os.getpid(),)]


async def test_detached_process_is_excluded_until_it_has_ended(child: subprocess.Popen[bytes]) -> None:
    async with control_plane() as plane:
        group = plane.daemon.groups.create("g", 0, 1 << 26, root_pid=os.getpid())
        plane.daemon.groups.exclude(child.pid)
        assert group.excluded == {child.pid}
        child.kill()
        child.wait()
        plane.daemon.groups.exclude(os.getppid())
        assert group.excluded == {child.pid}, "no member of it"
        with subprocess.Popen(["sleep", "60"]) as other:
            plane.daemon.groups.exclude(other.pid)
            assert group.excluded == {other.pid}, "the first one's number may be another process's"
            other.kill()
        assert _of(plane, "group_set_members")[1:] == [
            (group.number, os.getpid(), {child.pid}),
            (group.number, os.getpid(), {other.pid}),
        ]


async def test_more_are_detached_than_a_successor_can_be_told_of() -> None:
    """None of them is charged, and the group ends as any other."""
    async with control_plane() as plane:
        group = plane.daemon.groups.create("g", 0, 1 << 26, root_pid=os.getpid())
        children = [subprocess.Popen(["sleep", "60"]) for _ in range(60)]
        try:
            for process in children:
                plane.daemon.groups.exclude(process.pid)
            numbers = {process.pid for process in children}
            assert group.excluded == numbers
            assert _of(plane, "group_set_members")[-1] == (group.number, os.getpid(), numbers)
            assert len(group.label()) < GROUP_LABEL_BYTES
            told = set(json.loads(group.label())["excluded"])
            assert len(told) > 20
            assert told < numbers
            plane.daemon.groups.doom(group)
            assert plane.daemon.groups.find("g") is None
        finally:
            for process in children:
                process.kill()
                process.wait()


async def test_doomed_group_that_is_busy_is_destroyed_later(autojump_clock: object) -> None:
    """Something is still at work on it; nobody looks while there is none."""
    del autojump_clock
    async with control_plane() as plane, trio.open_nursery() as nursery:
        nursery.start_soon(plane.daemon.groups.watch_doomed)
        plane.add_group()
        await trio.sleep(1000)
        assert not _of(plane, "group_destroy")
        plane.engine.refuse["group_destroy"] = errno.EBUSY
        group = plane.daemon.groups.find("g")
        assert group is not None
        plane.daemon.groups.doom(group)
        await trio.sleep(10 * config.DOOMED_SECONDS)
        assert plane.daemon.groups.find("g") is group
        del plane.engine.refuse["group_destroy"]
        await trio.sleep(2 * config.DOOMED_SECONDS)
        assert plane.daemon.groups.find("g") is None
        nursery.cancel_scope.cancel()


async def test_waiting_for_a_change_wakes_all_waiting() -> None:
    async with control_plane() as plane:
        registry: GroupRegistry = plane.daemon.groups
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(registry.wait_change, 1000)
                await trio.testing.wait_all_tasks_blocked()
                registry.note_change()


async def test_group_whose_destruction_fails_is_given_up() -> None:
    async with control_plane() as plane:
        plane.add_group()
        plane.engine.refuse["group_destroy"] = 5
        group = plane.daemon.groups.find("g")
        assert group is not None
        plane.daemon.groups.doom(group)
        assert plane.daemon.groups.find("g") is None
        assert isinstance(plane.log, FakeLog)
        assert plane.log.worst() == ["group not destroyed"]
