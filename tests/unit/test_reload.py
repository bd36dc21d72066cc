# SPDX-License-Identifier: MIT
"""What a changed configuration does to a running daemon, and what it must leave alone."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio
import trio.testing

from support.control_plane import LIMIT, SECONDS_MAX, ControlPlane, control_plane
from vswapd import config, settings
from vswapd.accept import Peer
from vswapd.reload import Reloader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

_GROUP = '[[group]]\nname = "{0}"\nlimit = "{1}"\n'


class _Service:
    """A control plane with a configuration file."""

    def __init__(self, plane: ControlPlane, path: Path, text: str) -> None:
        self.plane = plane
        self._path = path
        self.write(text)
        self.levels: list[str] = []
        loaded = settings.load(str(path))
        self.reloader = Reloader(
            loaded,
            lambda: settings.load(str(path)),
            plane.engine,  # type: ignore[arg-type]
            plane.daemon.groups,
            plane.log,
            self.levels.append,
        )

    def write(self, text: str) -> None:
        self._path.write_text(text, encoding="utf-8")

    def reload(self, text: str) -> None:
        """With another text."""
        self.write(text)
        self.plane.log.lines.clear()
        self.reloader.reload()

    def limits(self) -> dict[str, int]:
        """Of all groups, MiB."""
        return {record.name: record.limit_bytes >> 20 for record in self.plane.engine.groups()}


@asynccontextmanager
async def _service(path: Path, text: str = "") -> AsyncIterator[_Service]:
    async with control_plane() as plane:
        yield _Service(plane, path / "vswapd.conf", text)


async def test_groups_come_change_and_go(tmp_path: Path) -> None:
    async with _service(tmp_path, _GROUP.format("a", "64M") + _GROUP.format("b", "64M")) as service:
        assert service.limits() == {"a": 64, "b": 64}
        service.reload(_GROUP.format("a", "128M") + _GROUP.format("c", "32M"))
        assert service.limits() == {"a": 128, "c": 32}
        assert service.plane.log.worst() == []


async def test_group_with_clients_ends_with_them_or_comes_back(tmp_path: Path) -> None:
    async with _service(tmp_path, _GROUP.format("a", "64M")) as service:
        group = service.plane.daemon.groups.find("a")
        assert group
        token = service.plane.engine.add_client(1, group.number)
        service.reload("")
        assert service.limits() == {"a": 64}
        service.reload(_GROUP.format("a", "32M"))
        assert service.limits() == {"a": 32}
        service.plane.engine.client_lost(token)
        service.plane.daemon.groups.note_change()
        assert service.limits() == {"a": 32}, "it was given up, and then wanted again"
        service.reload("")
        assert service.limits() == {}


async def test_what_did_not_change_is_left_alone(tmp_path: Path) -> None:
    async with _service(tmp_path, _GROUP.format("a", "64M")) as service:
        reply = await service.plane.control().request("limit", group="a", limit_bytes=256 << 20)
        assert reply["ok"]
        service.reload("# a comment\n" + _GROUP.format("a", "64M"))
        assert service.limits() == {"a": 256}


async def test_mistake_changes_nothing(tmp_path: Path) -> None:
    async with _service(tmp_path, _GROUP.format("a", "64M")) as service:
        service.reload(_GROUP.format("a", "128M") + "[daemon]\nx = 1\n")
        assert service.limits() == {"a": 64}
        [(level, text, fields)] = service.plane.log.lines
        assert (level, text) == ("error", "configuration not reloaded")
        assert fields["mistake"].startswith(f"{tmp_path}/vswapd.conf:5: unknown key 'x'; ")
        service.reload(_GROUP.format("a", "128M"))
        assert service.limits() == {"a": 128}


async def test_name_of_a_running_command_is_not_taken(tmp_path: Path) -> None:
    async with _service(tmp_path) as service:
        service.plane.add_group("a", root_pid=os.getpid())
        service.reload(_GROUP.format("a", "128M"))
        assert service.limits() == {"a": LIMIT >> 20}
        assert service.plane.log.worst() == ["group not made"]
        service.reload("")
        assert service.limits() == {"a": LIMIT >> 20}


async def test_refusals_of_the_engine_are_logged(tmp_path: Path) -> None:
    async with _service(tmp_path, _GROUP.format("a", "64M")) as service:
        service.plane.engine.refuse = {"group_create": errno.ENOSPC, "group_set_limit": errno.EINVAL}
        service.reload(_GROUP.format("a", "128M") + _GROUP.format("b", "64M"))
        assert service.plane.log.worst() == ["limit not changed", "group not made"]


async def test_log_level_is_applied_and_the_rest_needs_a_restart(tmp_path: Path) -> None:
    text = '[daemon]\nlog_level = "debug"\nevictors = 2\nsocket = "/x"\n'
    async with _service(tmp_path) as service:
        service.reload(text)
        assert service.levels == ["debug"]
        waits = [fields["key"] for level, _, fields in service.plane.log.lines if level == "warning"]
        assert waits == ["socket", "evictors"]
        service.reload(text)
        assert service.levels == ["debug"]
        assert service.plane.log.worst() == []


async def test_new_backend_is_added_and_others_need_a_restart(tmp_path: Path) -> None:
    first = f'[[backend]]\npath = "{tmp_path}/one"\nsize = "4M"\n'
    second = f'[[backend]]\npath = "{tmp_path}/two"\nsize = "2M"\npriority = 5\n'
    async with _service(tmp_path, first) as service:
        service.reload(first + second)
        [backend] = service.plane.engine.backends()
        assert (backend.path, backend.size_bytes, backend.priority) == (f"{tmp_path}/two", 2 << 20, 5)
        assert service.plane.log.worst() == []
        second = second.replace("priority = 5", "priority = 6")
        service.reload(first + second)
        assert [record.priority for record in service.plane.engine.backends()] == [6]
        assert service.plane.log.worst() == []
        second += 'rate = "4M"\n'
        service.reload(first + second)
        assert [record.rate_bytes for record in service.plane.engine.backends()] == [4 << 20]
        assert service.plane.log.worst() == []
        second = second.replace("2M", "3M")
        service.reload(first + second)
        assert service.plane.log.lines[0][2]["key"] == f"backend {tmp_path}/two"
        service.reload(second)
        assert service.plane.log.lines[0][2]["key"] == f"backend {tmp_path}/one"
        service.reload(second + '[[backend]]\npath = "/nonexistent/x"\n')
        assert service.plane.log.worst() == ["backend not added"]


async def test_tiers_are_switched_at_once(tmp_path: Path) -> None:
    async with _service(tmp_path) as service:
        assert ("set_tiering", False) in service.plane.engine.calls
        service.reload("[daemon]\ntiers = true\n")
        assert service.plane.engine.calls[-1] == ("set_tiering", True)
        assert service.plane.log.worst() == []


async def test_host_reserve_is_changed_at_once(tmp_path: Path) -> None:
    async with _service(tmp_path) as service:

        def reserves() -> list[object]:
            return [call[1] for call in service.plane.engine.calls if call[0] == "set_host_reserve"]

        assert reserves() == [config.HOST_RESERVE_AUTO]
        service.reload('[daemon]\nhost_reserve = "1G"\n')
        service.reload("[daemon]\nhost_reserve = 0\n")
        assert reserves() == [config.HOST_RESERVE_AUTO, 1 << 30, 0]
        assert service.plane.log.worst() == []


async def test_sighup_reloads(tmp_path: Path) -> None:
    async with _service(tmp_path, _GROUP.format("a", "64M")) as service:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            service.plane.nursery.start_soon(service.reloader.run)
            await trio.testing.wait_all_tasks_blocked()
            service.write(_GROUP.format("a", "128M"))
            os.kill(os.getpid(), signal.SIGHUP)
            with trio.fail_after(SECONDS_MAX):
                while service.limits() != {"a": 128}:  # noqa: ASYNC110 -- the reloader tells nobody
                    await trio.sleep(0.001)
        finally:
            service.plane.nursery.cancel_scope.cancel()
    signal.signal(signal.SIGHUP, before)


async def test_joined_session_hears_of_its_group_and_leaves_it_standing(tmp_path: Path) -> None:
    async with _service(tmp_path, _GROUP.format("a", "64M") + "owner = 12345\n") as service:
        stranger = service.plane.control(Peer(os.getpid(), 999, 999))
        assert (await stranger.request("group-join", group="a"))["code"] == "no-group"
        owner = service.plane.control(Peer(os.getpid(), 12345, 12345))
        reply = await owner.request("group-join", group="a")
        assert reply == {"ok": True, "group": "a", "limit_bytes": 64 << 20}
        owner.sock.close()
        await trio.testing.wait_all_tasks_blocked()
        assert service.limits() == {"a": 64}
