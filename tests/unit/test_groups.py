# SPDX-License-Identifier: MIT
"""Groups' members: found in /proc, charged when they are no clients."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from support.control_plane import control_plane
from support.fake_log import FakeLog
from vswapd import config, processes
from vswapd.accept import Peer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vswapd.groups import GroupRegistry

_CHILD_MIB = 8
_CHILD = f"""
import os, sys
data = bytearray(os.urandom({_CHILD_MIB} << 20))
sys.stdout.write("ready\\n"); sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A child with 8 MiB of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.communicate()


async def test_members_that_are_no_clients_are_charged_from_the_second_scan(
    child: subprocess.Popen[str],
) -> None:
    async with control_plane() as plane:
        number = plane.add_group(root_pid=os.getpid())
        registry = plane.daemon.groups
        registry.scan()
        assert plane.engine.groups()[0].unmanaged_bytes == 0
        registry.scan()
        charged = plane.engine.groups()[0].unmanaged_bytes
        assert charged >= _CHILD_MIB * config.MIB
        assert charged < 64 * config.MIB
        plane.engine.add_client(child.pid, number)
        registry.scan()
        assert plane.engine.groups()[0].unmanaged_bytes < _CHILD_MIB * config.MIB


async def test_member_that_becomes_a_client_is_not_counted_twice(child: subprocess.Popen[str]) -> None:
    async with control_plane() as plane:
        plane.add_group(root_pid=os.getpid())
        plane.daemon.groups.scan()
        plane.daemon.groups.scan()
        assert plane.engine.groups()[0].unmanaged_bytes >= _CHILD_MIB * config.MIB
        agent = plane.agent(Peer(child.pid, os.geteuid(), os.getegid()))
        await agent.join()
        assert plane.engine.groups()[0].unmanaged_bytes < _CHILD_MIB * config.MIB
        calls = [call[0] for call in plane.engine.calls]
        # Before the engine begins to count it: too little for an instant, never too much.
        assert calls.index("client_arm") > max(
            i for i, name in enumerate(calls) if name == "group_set_unmanaged"
        )


async def test_excluded_processes_are_no_members(child: subprocess.Popen[str]) -> None:
    async with control_plane() as plane:
        excluded = frozenset({child.pid})
        plane.daemon.groups.create("g", 0, 1 << 26, root_pid=os.getpid(), excluded=excluded)
        plane.daemon.groups.scan()
        plane.daemon.groups.scan()
        assert plane.engine.groups()[0].unmanaged_bytes == 0


async def test_detached_process_is_forgotten_when_it_has_ended(child: subprocess.Popen[str]) -> None:
    async with control_plane() as plane:
        group = plane.daemon.groups.create("g", 0, 1 << 26, root_pid=os.getpid())
        plane.daemon.groups.scan()
        plane.daemon.groups.exclude(child.pid)
        plane.daemon.groups.scan()
        assert group.excluded == {child.pid}
        child.kill()
        child.wait()
        plane.daemon.groups.scan()
        assert not group.excluded, "its number may be another process's"


async def test_scan_without_children_lists_finds_the_same(
    child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_lists = processes.tree(os.getpid(), frozenset())
    without = processes.tree(os.getpid(), frozenset(), processes.parents())
    assert with_lists == without
    assert with_lists[child.pid] == os.getpid()
    monkeypatch.setattr(processes, "has_children_lists", lambda: False)
    async with control_plane() as plane:
        plane.add_group(root_pid=os.getpid())
        plane.daemon.groups.scan()
        plane.daemon.groups.scan()
        assert plane.engine.groups()[0].unmanaged_bytes >= _CHILD_MIB * config.MIB


async def test_scan_is_more_frequent_near_the_limit() -> None:
    async with control_plane() as plane:
        number = plane.add_group()
        assert plane.daemon.groups.scan() >= config.SCAN_SECONDS
        plane.engine.set_group(number, usage_bytes=60 << 20)
        assert plane.daemon.groups.scan() < config.SCAN_SECONDS


async def test_scan_survives_a_group_that_the_engine_lost() -> None:
    async with control_plane() as plane:
        plane.add_group(root_pid=os.getpid())
        plane.engine.refuse["group_set_unmanaged"] = 22
        plane.daemon.groups.scan()
        assert plane.log.worst() == ["unmanaged memory not charged"]


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
