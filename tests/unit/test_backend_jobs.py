# SPDX-License-Identifier: MIT
"""swapon, swapoff and compact over the control socket: what they refuse, tell, and do when nobody listens."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from support.control_plane import SECONDS_MAX, ControlPeer, ControlPlane, control_plane
from vswapd import config
from vswapd.accept import Peer
from vswapd.records import BACKEND_ENCRYPT, BACKEND_KEEP_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MIB = config.MIB
_STRANGER = Peer(pid=os.getpid(), uid=12345, gid=12345)


async def _refused(peer: ControlPeer, code: str, op: str, **fields: object) -> str:
    reply = await peer.request(op, **fields)
    assert not reply["ok"]
    assert reply["code"] == code, reply
    assert reply["remedy"]
    assert "\n" not in reply["error"] + reply["remedy"]
    return str(reply["error"])


async def _add(plane: ControlPlane, path: Path, **fields: object) -> dict[str, Any]:
    reply = await plane.control().request("swapon", path=str(path), **{"size_bytes": 2 * _MIB, **fields})
    assert reply["ok"], reply
    return reply



# ---- swapon ----


async def test_swapon_makes_a_file_and_adds_it(tmp_path: Path) -> None:
    async with control_plane() as plane:
        reply = await _add(plane, tmp_path / "a", priority=5, discard=True)
        assert (reply["path"], reply["size_bytes"], reply["priority"]) == (str(tmp_path / "a"), 2 * _MIB, 5)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
        assert plane.engine.calls[-1][0] == "backend_add"
        assert plane.engine.calls[-1][-1] == 0
        await _add(plane, tmp_path / "b")
        assert plane.engine.calls[-1][-1] == BACKEND_KEEP_BLOCKS
        await _add(plane, tmp_path / "c", rate_bytes=3 * _MIB)
        assert [record.rate_bytes for record in plane.engine.backends()] == [0, 0, 3 * _MIB]
        assert [record.priority for record in plane.engine.backends()] == [5, 4, 3]


async def test_swapon_encrypts_and_forgets_what_was_there(tmp_path: Path) -> None:
    async with control_plane() as plane:
        (tmp_path / "a").write_bytes(b"VSWPSEG2" + b"pages of a daemon that did not encrypt")
        reply = await _add(plane, tmp_path / "a", encrypt=True)
        assert reply["encrypted"] is True
        assert plane.engine.calls[-1][-1] == BACKEND_ENCRYPT | BACKEND_KEEP_BLOCKS
        assert (tmp_path / "a").read_bytes() == b""
        plain = await _add(plane, tmp_path / "b", encrypt=False)
        assert plain["encrypted"] is False
        shown = (await plane.control().request("status"))["status"]["backends"]
        assert [backend["encrypted"] for backend in shown] == [True, False]
        plane.engine.refuse["backend_add"] = errno.ENOTSUP
        error = await _refused(plane.control(), "refused", "swapon", path=str(tmp_path / "c"), encrypt=True)
        assert "AES" in error
        assert not (tmp_path / "c").exists()


async def test_swapon_is_for_root(tmp_path: Path) -> None:
    async with control_plane() as plane:
        peer = plane.control(_STRANGER)
        for op in ("swapon", "swapoff", "compact"):
            await _refused(peer, "denied", op, path=str(tmp_path / "a"))
        assert plane.engine.backends() == []
        assert list(tmp_path.iterdir()) == []


async def test_swapon_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    async with control_plane() as plane:
        peer = plane.control()
        await _add(plane, tmp_path / "a")
        (tmp_path / "link").symlink_to(tmp_path / "a")
        (tmp_path / "data").write_bytes(b"somebody's")
        (tmp_path / "directory").mkdir()
        names = sorted(path.name for path in tmp_path.iterdir())
        assert "already" in await _refused(peer, "in-use", "swapon", path=str(tmp_path / "a"))
        assert "already" in await _refused(peer, "in-use", "swapon", path=str(tmp_path / "link"))
        assert "something else" in await _refused(peer, "refused", "swapon", path=str(tmp_path / "data"))
        assert "neither" in await _refused(peer, "refused", "swapon", path=str(tmp_path / "directory"))
        assert "cannot use" in await _refused(peer, "refused", "swapon", path=str(tmp_path / "no" / "file"))
        await _refused(peer, "bad-request", "swapon", path="relative")
        await _refused(peer, "bad-request", "swapon", path=str(tmp_path / "b"), size_bytes=1)
        await _refused(peer, "bad-request", "swapon", path=str(tmp_path / "b"), priority=99999)
        assert "rate" in await _refused(peer, "bad-request", "swapon", path=str(tmp_path / "b"), rate_bytes=4096)
        error = await _refused(peer, "no-room", "swapon", path=str(tmp_path / "b"), size_bytes=1 << 60)
        assert "left" in error
        plane.engine.refuse["backend_add"] = errno.EMFILE
        await _refused(peer, "refused", "swapon", path=str(tmp_path / "b"))
        plane.engine.refuse["backend_add"] = errno.EIO
        await _refused(peer, "failed", "swapon", path=str(tmp_path / "b"))
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert len(plane.engine.backends()) == 1


# ---- swapoff ----


async def test_swapoff_removes(tmp_path: Path) -> None:
    async with control_plane() as plane:
        for name in "abc":
            await _add(plane, tmp_path / name)
        peer = plane.control()
        reply = await peer.request("swapoff", path=str(tmp_path / "b"))
        assert reply["paths"] == [str(tmp_path / "b")]
        assert [record.path for record in plane.engine.backends()] == [str(tmp_path / "a"), str(tmp_path / "c")]
        reply = await peer.request("swapoff", all=True)
        assert reply["ok"]
        assert plane.engine.backends() == []
        assert ("backend_drain_begin", [0, 2], False) in plane.engine.calls
        await _refused(peer, "no-backend", "swapoff", all=True)


async def test_swapoff_without_room_says_the_figures(tmp_path: Path) -> None:
    async with control_plane() as plane:
        await _add(plane, tmp_path / "a")
        plane.engine.set_backend(0, live_bytes=3 * _MIB)
        plane.engine.room_bytes = 1 * _MIB
        peer = plane.control()
        error = await _refused(peer, "no-room", "swapoff", path=str(tmp_path / "a"))
        assert "3 MiB" in error
        assert "1 MiB" in error
        assert [record.state for record in plane.engine.backends()] == [0]
        assert (await peer.request("swapoff", path=str(tmp_path / "a"), force=True))["ok"]


async def test_swapoff_of_what_is_no_backend(tmp_path: Path) -> None:
    async with control_plane() as plane:
        await _add(plane, tmp_path / "a")
        peer = plane.control()
        await _refused(peer, "no-backend", "swapoff", path=str(tmp_path / "b"))
        await _refused(peer, "no-backend", "swapoff", path="")
        await _refused(peer, "no-backend", "compact", path=str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "no-room"),
        (errno.EBADMSG, "damaged"),
        (errno.ECANCELED, "cancelled"),
        (errno.EIO, "failed"),
    ],
)
async def test_swapoff_that_does_not_finish(tmp_path: Path, number: int, code: str) -> None:
    async with control_plane() as plane:
        await _add(plane, tmp_path / "a")
        plane.engine.refuse["backend_drain"] = number
        error = await _refused(plane.control(), code, "swapoff", path=str(tmp_path / "a"))
        assert str(tmp_path / "a") in error


async def test_swapoff_tells_how_far_it_is(tmp_path: Path) -> None:
    async with control_plane() as plane:
        await _add(plane, tmp_path / "a")
        plane.engine.set_backend(0, live_bytes=4 * _MIB)
        plane.engine.jobs_end.clear()
        peer = plane.control()
        await peer.send_all(b'{"op": "swapoff", "all": true}\n')
        line = await peer.line()
        assert line["notice"] == "progress"
        (job,) = line["backends"]
        assert job["path"] == str(tmp_path / "a")
        assert (job["state"], job["job"]) == ("draining", "swapoff")
        assert (job["job_total_bytes"], job["job_left_bytes"]) == (4 * _MIB, 2 * _MIB)
        assert job["job_bytes_per_second"] == 2 * _MIB
        assert job["job_seconds_left"] == 1.0
        assert (await plane.control().request("status"))["status"]["backends"][0]["job"] == "swapoff"
        plane.engine.jobs_end.set()
        while "notice" in (line := await peer.line()):
            pass
        assert line["ok"]


@pytest.mark.parametrize("op", ["swapoff", "compact"])
async def test_job_is_cancelled_when_nobody_listens(tmp_path: Path, op: str) -> None:
    async with control_plane() as plane:
        await _add(plane, tmp_path / "a")
        plane.engine.jobs_end.clear()
        peer = plane.control()
        await peer.send_all(b'{"op": "%s", "path": "%s"}\n' % (op.encode(), bytes(tmp_path / "a")))
        await plane.wait_calls({"swapoff": "backend_drain", "compact": "backend_compact"}[op])
        peer.sock.close()
        await plane.wait_calls("backend_cancel")
        with trio.fail_after(SECONDS_MAX):
            while any(record.job for record in plane.engine.backends()):  # noqa: ASYNC110 -- a thread's work
                await trio.sleep(0.001)
        assert [record.path for record in plane.engine.backends()] == [str(tmp_path / "a")]
        plane.engine.jobs_end.set()
        assert (await plane.control().request(op, path=str(tmp_path / "a")))["ok"]


async def test_daemon_that_stops_cancels(tmp_path: Path) -> None:
    async with control_plane() as plane:
        await _add(plane, tmp_path / "a")
        plane.engine.jobs_end.clear()
        peer = plane.control()
        await peer.send_all(b'{"op": "swapoff", "all": true}\n')
        await plane.wait_calls("backend_drain")
    assert ("backend_cancel", 0) in plane.engine.calls


# ---- by number, as the file tree asks ----


async def _wait(is_so: Callable[[], object]) -> None:
    with trio.fail_after(SECONDS_MAX):
        while not is_so():  # noqa: ASYNC110 -- a thread's work
            await trio.sleep(0.001)


async def test_drain_that_nobody_waits_for(tmp_path: Path) -> None:
    async with control_plane() as plane:
        plane.nursery.start_soon(plane.daemon.control.operations.run_jobs)
        await _add(plane, tmp_path / "a")
        plane.engine.jobs_end.clear()
        peer = plane.control()
        assert (await peer.request("backend", backend=0, drain=True))["ok"]
        peer.sock.close()
        await plane.wait_calls("backend_drain")
        assert (await plane.control().request("backend", backend=0, drain=False))["ok"]
        await _wait(lambda: plane.engine.backends()[0].state == 0)
        assert ("backend_cancel", 0) in plane.engine.calls
        await _wait(lambda: plane.log.worst() == ["swapoff not finished"])
        assert (await plane.control().request("backend", backend=0, drain=False))["ok"], "nothing to stop"
        plane.engine.jobs_end.set()
        assert (await plane.control().request("backend", backend=0, drain=True))["ok"]
        await _wait(lambda: plane.engine.backends() == [])


async def test_stopping_a_drain_leaves_a_compaction_alone(tmp_path: Path) -> None:
    async with control_plane() as plane:
        await _add(plane, tmp_path / "a")
        plane.engine.jobs_end.clear()
        await plane.control().send_all(b'{"op": "compact", "path": "%s"}\n' % bytes(tmp_path / "a"))
        await plane.wait_calls("backend_compact")
        assert (await plane.control().request("backend", backend=0, drain=False))["ok"]
        assert not any(call[0] == "backend_cancel" for call in plane.engine.calls)
        plane.engine.jobs_end.set()


async def test_what_is_refused_by_number(tmp_path: Path) -> None:
    async with control_plane() as plane:
        await _add(plane, tmp_path / "a")
        peer = plane.control()
        await _refused(peer, "stopping", "backend", backend=0, drain=True)  # no jobs are run yet, or any more
        assert plane.engine.backends()[0].state == 0
        plane.nursery.start_soon(plane.daemon.control.operations.run_jobs)
        await trio.testing.wait_all_tasks_blocked()
        for fields in ({"drain": True}, {"drain": False}, {"priority": 1}):
            await _refused(peer, "no-backend", "backend", backend=3, **fields)
            await _refused(plane.control(_STRANGER), "denied", "backend", backend=0, **fields)
        await _refused(peer, "bad-request", "backend", backend=0, drain=1)
        await _refused(peer, "bad-request", "backend", backend=15, drain=True)
        plane.engine.set_backend(0, live_bytes=3 * _MIB)
        plane.engine.room_bytes = 0
        assert "3 MiB" in await _refused(peer, "no-room", "backend", backend=0, drain=True)
        plane.engine.refuse["backend_drain_begin"] = errno.EBUSY
        await _refused(peer, "busy", "backend", backend=0, drain=True)
        assert not any(call[0] == "backend_drain" for call in plane.engine.calls)


async def test_priority_is_changed(tmp_path: Path) -> None:
    async with control_plane() as plane:
        await _add(plane, tmp_path / "a")
        assert (await plane.control().request("backend", backend=0, priority=-7))["ok"]
        assert plane.engine.backends()[0].priority == -7
        for value in (1 << 15, "1", None):
            await _refused(plane.control(), "bad-request", "backend", backend=0, priority=value)


# ---- compact ----


async def test_compact_says_what_it_gained(tmp_path: Path) -> None:
    async with control_plane() as plane:
        await _add(plane, tmp_path / "a")
        plane.engine.set_backend(0, used_bytes=10 * _MIB, live_bytes=3 * _MIB)
        reply = await plane.control().request("compact", path=str(tmp_path / "a"))
        assert reply["ok"]
        assert (reply["used_before_bytes"], reply["live_bytes"]) == (10 * _MIB, 3 * _MIB)
        assert ("backend_compact", 0) in plane.engine.calls
        plane.engine.refuse["backend_compact"] = errno.EBUSY
        await _refused(plane.control(), "busy", "compact", path=str(tmp_path / "a"))
