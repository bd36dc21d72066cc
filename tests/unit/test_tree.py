# SPDX-License-Identifier: MIT
"""The system as files: what each says, who may do what, and which errno a refusal is."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

import pytest
import trio.testing

from support.control_plane import LIMIT, ControlPlane, control_plane
from vswapd.tree import Pressure, Tree

if TYPE_CHECKING:
    from vswapd.tree import Node, Path

_STRANGER = 12345


def _tree(plane: ControlPlane) -> Tree:
    return Tree(plane.engine, plane.daemon.groups, plane.daemon.control.operations)  # type: ignore[arg-type]


def _node(tree: Tree, *path: str) -> Node:
    node = tree.node(path)
    assert node, path
    return node


def _text(tree: Tree, *path: str) -> str:
    read = _node(tree, *path).read
    assert read
    return read()


def _fields(text: str) -> dict[str, str]:
    return dict(line.split(":\t") for line in text.splitlines())


async def _plane_with_client(plane: ControlPlane) -> Tree:
    """Group g with this process in it, and a backend."""
    number = plane.add_group()
    token = await plane.agent().join()
    plane.engine.set_client(token, swapped_pages=256, resident_bytes=5 << 20, faults=3)
    plane.engine.set_group(number, usage_bytes=6 << 20)
    plane.engine.backend_add(-1, "/var/tmp/a b\n", 1 << 30, -2)
    plane.nursery.start_soon(plane.daemon.control.operations.run_jobs)
    await trio.testing.wait_all_tasks_blocked()
    return _tree(plane)


async def _refused(tree: Tree, number: int, text: str, uid: int, *path: str) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        await tree.write(_node(tree, *path), text, uid, os.getpid())
    assert caught.value.errno == number, caught.value


async def test_everything_listed_is_there_and_nothing_else() -> None:
    async with control_plane() as plane:
        tree = await _plane_with_client(plane)
        pid = str(os.getpid())

        def walk(path: Path) -> list[str]:
            node = _node(tree, *path)
            if node.names is None:
                assert stat.S_ISREG(node.mode)
                return ["/".join(path)]
            assert stat.S_ISDIR(node.mode)
            return [found for name in node.names() for found in walk((*path, name))]

        assert sorted(walk(())) == sorted(
            ["swaps", "stat", "pressure"]
            + [f"groups/g/{name}" for name in ("status", "limit")]
            + [f"clients/{pid}/{name}" for name in ("status", "limit", "tiers", "pageout", "pagein")]
            + [f"backends/0/{name}" for name in ("status", "priority", "drain")]
        )
        for path in (
            ("nosuch",),
            ("swaps", "x"),
            ("groups", "nosuch"),
            ("groups", "g", "nosuch"),
            ("groups", "g", "limit", "x"),
            ("clients", "1"),
            ("clients", "0" + pid),
            ("clients", pid, "nosuch"),
            ("backends", "1"),
            ("backends", "0", "nosuch"),
        ):
            assert tree.node(path) is None, path


async def test_texts() -> None:
    async with control_plane() as plane:
        tree = await _plane_with_client(plane)
        pid = str(os.getpid())
        header, line = _text(tree, "swaps").splitlines()
        assert header.split() == ["Filename", "Type", "Size", "Used", "Priority"]
        assert line.split() == ["/var/tmp/a\\040b\\012", "file", "1048576", "0", "-2"]
        figures = dict(line.split(" ") for line in _text(tree, "stat").splitlines())
        assert (figures["faults"], figures["pool_bytes"]) == ("100", "0")
        assert _fields(_text(tree, "groups", "g", "status"))["Usage"] == "6144 kB"
        assert _text(tree, "groups", "g", "limit") == f"{LIMIT}\n"
        client = _fields(_text(tree, "clients", pid, "status"))
        assert (client["Pid"], client["Group"], client["Swapped"]) == (pid, "g", "1024 kB")
        assert _text(tree, "clients", pid, "limit") == f"{LIMIT}\n"
        tiers = [line.split("\t") for line in _text(tree, "clients", pid, "tiers").splitlines()]
        assert tiers[0] == ["Tier", "Swapped_kB", "Kept_kB"]
        assert [row[0] for row in tiers[1:]] == ["zero", "same", "pool", "backends/0"]
        assert tiers[4][2] == "28"
        assert _fields(_text(tree, "backends", "0", "status"))["Path"] == "/var/tmp/a b\\n"
        assert _text(tree, "backends", "0", "priority") == "-2\n"
        assert _text(tree, "backends", "0", "drain") == "0\n"


async def test_owners_and_modes() -> None:
    async with control_plane() as plane:
        tree = await _plane_with_client(plane)
        group = plane.daemon.groups.find("g")
        assert group
        group.owner_uid = _STRANGER
        for path, mode, uid in (
            (("swaps",), 0o444, 0),
            (("groups",), 0o555, 0),
            (("groups", "g"), 0o500, _STRANGER),
            (("groups", "g", "status"), 0o400, _STRANGER),
            (("groups", "g", "limit"), 0o600, _STRANGER),
            (("clients", str(os.getpid()), "pageout"), 0o200, os.getuid()),
            (("backends", "0", "status"), 0o444, 0),
            (("backends", "0", "priority"), 0o644, 0),
            (("backends", "0", "drain"), 0o644, 0),
        ):
            node = _node(tree, *path)
            assert (stat.S_IMODE(node.mode), node.uid) == (mode, uid), path


async def test_writes_are_carried_out() -> None:
    async with control_plane() as plane:
        tree = await _plane_with_client(plane)
        pid = str(os.getpid())
        await tree.write(_node(tree, "groups", "g", "limit"), "96M\n", os.getuid(), 1)
        assert _text(tree, "clients", pid, "limit") == f"{96 << 20}\n"
        await tree.write(_node(tree, "clients", pid, "limit"), "33554432", os.getuid(), 1)
        assert _text(tree, "groups", "g", "limit") == "33554432\n"
        for name in ("pageout", "pagein"):
            await tree.write(_node(tree, "clients", pid, name), "1\n", os.getuid(), 1)
            assert any(call[:2] == (name, os.getpid()) for call in plane.engine.calls)
        await tree.write(_node(tree, "backends", "0", "priority"), "7\n", os.getuid(), 1)
        assert _text(tree, "backends", "0", "priority") == "7\n"
        plane.engine.jobs_end.clear()
        await tree.write(_node(tree, "backends", "0", "drain"), "1\n", os.getuid(), 1)
        assert _text(tree, "backends", "0", "drain") == "1\n"
        await tree.write(_node(tree, "backends", "0", "drain"), "0\n", os.getuid(), 1)
        await plane.wait_calls("backend_cancel")
        plane.engine.jobs_end.set()


async def test_refusals_have_their_errno() -> None:
    async with control_plane() as plane:
        tree = await _plane_with_client(plane)
        client = ("clients", str(os.getpid()))
        me = os.getuid()
        await _refused(tree, errno.EINVAL, "12X", me, "groups", "g", "limit")
        await _refused(tree, errno.EINVAL, "1M", me, "groups", "g", "limit")
        await _refused(tree, errno.EINVAL, "", me, *client, "limit")
        await _refused(tree, errno.EINVAL, "2", me, *client, "pageout")
        await _refused(tree, errno.EACCES, "x", me, "swaps")
        await _refused(tree, errno.EACCES, "1", me, "backends", "0", "status")
        for text in ("", "x", "40000", "1.5"):
            await _refused(tree, errno.EINVAL, text, me, "backends", "0", "priority")
        await _refused(tree, errno.EINVAL, "2", me, "backends", "0", "drain")
        for name in ("priority", "drain"):
            await _refused(tree, errno.EACCES, "1", _STRANGER, "backends", "0", name)
        plane.engine.set_backend(0, live_bytes=1)
        plane.engine.room_bytes = 0
        await _refused(tree, errno.ENOMEM, "1", me, "backends", "0", "drain")
        plane.engine.refuse["backend_drain_begin"] = errno.EBUSY
        await _refused(tree, errno.EBUSY, "1", me, "backends", "0", "drain")
        await _refused(tree, errno.ENOENT, "96M", _STRANGER, "groups", "g", "limit")
        await _refused(tree, errno.EACCES, "96M", _STRANGER, *client, "limit")
        await _refused(tree, errno.EACCES, "1", _STRANGER, *client, "pageout")
        for number, expected in (
            (errno.ENOMEM, errno.ENOMEM),
            (errno.ETIMEDOUT, errno.ETIMEDOUT),
            (errno.ESRCH, errno.ESRCH),
            (errno.EUCLEAN, errno.EIO),
        ):
            plane.engine.refuse = {"pagein": number}
            await _refused(tree, expected, "1", me, *client, "pagein")


# ---- pressure ----


def _shares(pressure: Pressure) -> list[float]:
    return [float(word.partition("=")[2]) for word in pressure.text().split()[1:4]]


def test_pressure_is_written_as_the_kernel_does() -> None:
    pressure = Pressure()
    assert pressure.text() == "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    pressure.update(5_000_000, 100.0)
    assert pressure.text() == "some avg10=0.00 avg60=0.00 avg300=0.00 total=5000000\n"


def test_pressure_follows_the_load_and_decays() -> None:
    pressure = Pressure()
    pressure.update(0, 0.0)
    for second in range(2, 602, 2):  # half of the time is waited
        pressure.update(second * 500_000, float(second))
    assert _shares(pressure)[0] == pytest.approx(50.0, abs=0.1)
    assert _shares(pressure)[2] == pytest.approx(50.0 * (1 - 2.718281828**-2), abs=0.1)
    pressure.update(300_000_000, 610.0)
    assert _shares(pressure)[0] == pytest.approx(50.0 / 2.718281828, abs=0.5)


def test_pressure_of_many_threads_is_100() -> None:
    pressure = Pressure()
    pressure.update(0, 0.0)
    for second in range(2, 602, 2):
        pressure.update(second * 8_000_000, float(second))
    assert max(_shares(pressure)) == pytest.approx(100.0, abs=0.1)
