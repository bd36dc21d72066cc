# SPDX-License-Identifier: MIT
"""The words for what the engine reports, and where they go."""

from __future__ import annotations

import pytest

from support.control_plane import control_plane
from vswapd import events, log, records

_MIB = 1 << 20
_GROUP = records.GroupStatistics(
    3,
    0,
    "run-1",
    64 * _MIB,
    0,
    resident_bytes=50 * _MIB,
    pool_bytes=9 * _MIB,
    metadata_bytes=_MIB,
    unmanaged_bytes=4 * _MIB,
)


def test_out_of_memory_names_the_figures() -> None:
    event = records.Event(records.EVENT_OUT_OF_MEMORY, 77, 3, 65 * _MIB, 64 * _MIB, 40 * _MIB)
    notice = events.describe(event, _GROUP, "sort")
    assert notice.text == (
        "out of memory: group run-1, limit 64 MiB, usage 65 MiB "
        "(now resident 50 MiB, unmanaged 4 MiB, pool 9 MiB, metadata 1 MiB); "
        "killed process 77 (sort), resident 40 MiB; raise the limit or add spill space"
    )
    assert (notice.level, notice.group, notice.pid) == ("error", "run-1", 77)


@pytest.mark.parametrize(
    ("event", "level", "part"),
    [
        (records.Event(records.EVENT_POISONED, 7, 3, 0x1000, (1 << 64) - 5), "error", "Input/output error"),
        (records.Event(records.EVENT_POISONED, 7, 3, 0x1000, 5), "error", "page 0x1000"),
        (records.Event(records.EVENT_CLIENT_ERROR, 7, 3, (1 << 64) - 1), "warning", "not permitted"),
        (records.Event(records.EVENT_BACKEND_ERROR, 0, -1, 2, (1 << 64) - 28), "error", "backend 2 failed"),
        (records.Event(records.EVENT_FORK_WAITS, 7, 3, (1 << 64) - 24), "error", "Too many open files"),
        (records.Event(records.EVENT_CHILD_REFUSED, 7, 3, (1 << 64) - 12, 8), "error", "allocate memory; 8 killed"),
        (records.Event(records.EVENT_CHILD_REFUSED, 7, 3, (1 << 64) - 12), "error", "it waits where"),
        (records.Event(records.EVENT_YIELD_REFUSED, 7, 3, 64 * _MIB), "warning", "registers 64 MiB"),
        (records.Event(records.EVENT_SHARED, 7, 3, 64 * _MIB), "warning", "has 64 MiB of shared memory"),
        (records.Event(records.EVENT_CLIENT_GONE, 7, 3), "info", "process 7 (x) ended"),
        (records.Event(records.EVENT_REGISTERED, 7, 3, 4, _MIB), "info", "4 regions, 1 MiB"),
        (records.Event(records.EVENT_HOST_SHORT, 0, -1, 9, 16, 64), "warning", "machine is short"),
        (records.Event(records.EVENT_HOST_SHORT, 0, -1, 9 * _MIB, 16 * _MIB, 0, 1), "warning", "cgroup is short"),
        (records.Event(records.EVENT_HOST_OVER, 0, -1, 99 * _MIB, 2500, 64 * _MIB), "info", "took 2.5 s, 64 MiB"),
        (records.Event(99, 7, 3), "debug", "event 99"),
        (records.Event(records.EVENT_POISONED, 7, 3, 1, 1 << 40), "error", "error 1099511627776"),
    ],
)
@pytest.mark.parametrize("group", [_GROUP, None])
def test_every_event_has_words(
    event: records.Event, level: str, part: str, group: records.GroupStatistics | None
) -> None:
    notice = events.describe(event, group, "x")
    assert notice.level == level
    assert level in log.LEVELS
    assert part in notice.text
    assert "\n" not in notice.text


def test_shortage_of_the_host_names_the_figures() -> None:
    event = records.Event(records.EVENT_HOST_SHORT, 0, -1, 9 * _MIB, 16 * _MIB, 64 * _MIB)
    assert events.describe(event, None, "").text == (
        "the machine is short of memory: 9 MiB are available, 16 MiB are to be (host_reserve); up to 64 MiB can be "
        "swapped out below the groups' limits; end something, lower limits, or add spill space"
    )
    nothing = records.Event(records.EVENT_HOST_SHORT, 0, -1, 9 * _MIB, 16 * _MIB, 0, place=2)
    assert "memory cgroup is short" in events.describe(nothing, None, "").text
    assert "; nothing more can be swapped out below" in events.describe(nothing, None, "").text


async def test_events_wake_the_daemon_and_are_logged() -> None:
    async with control_plane() as plane:
        plane.nursery.start_soon(plane.daemon._watch_events)
        plane.engine.add_client(1 << 22, plane.add_group())
        plane.engine.add_event(records.Event(records.EVENT_CLIENT_GONE, 1 << 22, 0))
        await plane.daemon.groups.wait_change(5)
        assert [event for _, event, _ in plane.log.lines if "ended" in event] == [
            f"process {1 << 22} (?) ended"
        ]


async def test_failed_task_is_started_again(autojump_clock: object) -> None:
    del autojump_clock
    runs = []

    async def task() -> None:
        runs.append(1)
        if len(runs) == 3:
            plane.nursery.cancel_scope.cancel()
        raise RuntimeError("a mistake")

    async with control_plane() as plane:
        await plane.daemon.keep_running(task)
    assert len(runs) == 3
    assert len(plane.log.worst()) == 3


def test_plain_log_writes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    plain = log.PlainLog("warning")
    plain.debug("a")
    plain.info("b")
    plain.warning("agent refused", pid=5, reason="no room")
    plain.error("c")
    assert capsys.readouterr().err == "vswapctl: agent refused (pid 5, reason no room)\nvswapctl: c\n"
