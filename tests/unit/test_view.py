# SPDX-License-Identifier: MIT
"""What `vswapctl top` and `status --watch` make of two documents."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import TYPE_CHECKING, Any, Self

import pytest

from support.fake_engine import FakeEngine
from vswapd import connection, view
from vswapd.cli import status as status_command
from vswapd.document import build_status
from vswapd.failure import Failure
from vswapd.top import LimitScreen, RecordTable, TopApp

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.pilot import Pilot

_MIB = 1 << 20
_SECONDS_MAX = 10.0


def _document() -> dict[str, Any]:
    """Two groups: `a` with the larger usage, `b` with more faults."""
    engine = FakeEngine()
    try:
        for name, usage, faults in (("a", 60 * _MIB, 10), ("b", 30 * _MIB, 1000)):
            number = engine.group_create(name, 64 * _MIB)
            engine.set_group(number, usage_bytes=usage, faults=faults)
            token = engine.add_client(os.getpid() + number, number)
            engine.set_client(token, resident_bytes=usage, faults=faults)
        engine.backend_add(-1, "/spill", 1 << 30, -1)
        return build_status(engine, pids=[])  # type: ignore[arg-type]
    finally:
        engine.destroy()


def test_rates_are_differences() -> None:
    before, now = _document(), _document()
    now["groups"][0]["faults"] += 50
    now["clients"][1]["faults"] += 20
    now["backends"][0]["read_bytes"] += 4096
    shown = view.with_rates(now, before, 2.0)
    assert [group["faults_rate"] for group in shown["groups"]] == [25.0, 0.0]
    assert [client["faults_rate"] for client in shown["clients"]] == [0.0, 10.0]
    assert shown["backends"][0]["read_bytes_rate"] == 2048.0
    assert "faults_rate" not in now["groups"][0], "what came from the daemon stays as it came"


def test_rates_without_a_before_or_with_a_smaller_counter_are_0() -> None:
    before, now = _document(), _document()
    before["groups"][0]["faults"] += 50
    before["clients"] = []
    assert view.with_rates(now, None, 0.0)["groups"][0]["faults_rate"] == 0.0
    shown = view.with_rates(now, before, 1.0)
    assert shown["groups"][0]["faults_rate"] == 0.0
    assert shown["clients"][0]["faults_rate"] == 0.0


def test_order() -> None:
    groups = view.with_rates(_document(), None, 0.0)["groups"]

    def order(key: str, *, is_reversed: bool) -> str:
        column = next(column for column in view.GROUP_COLUMNS if column.key == key)
        return "".join(group["name"] for group in view.sort_entries(groups, column, is_reversed=is_reversed))

    assert order("usage_bytes", is_reversed=False) == "ab"
    assert order("usage_bytes", is_reversed=True) == "ba"
    assert order("name", is_reversed=False) == "ab"
    assert order("name", is_reversed=True) == "ba"


@pytest.mark.parametrize(
    ("count", "total", "text"),
    [(0, 0, "░░░░"), (0, 8, "░░░░"), (8, 8, "████"), (4, 8, "██░░"), (1, 1000, "█░░░"), (999, 1000, "████")],
)
def test_bar(count: int, total: int, text: str) -> None:
    assert view.bar(count, total, 4) == text


def test_latencies_are_of_the_interval() -> None:
    before, now = _document(), _document()
    before["latency_us"]["pool"] |= {"count": 100, "mean": 5.0}
    now["latency_us"]["pool"] |= {"count": 300, "mean": 15.0, "p99": 7.0}
    rows = {row[0]: row[1:] for row in view.latencies(now, before, 2.0)}
    assert rows["pool"] == (100.0, 20.0, 7.0)  # (300 * 15 - 100 * 5) / 200
    assert rows["spill"] == (0.0, 0.0, 0.0)
    assert view.latencies(now, None, 0.0)[2] == ("pool", 0.0, 0.0, 7.0)


def test_summary() -> None:
    document = _document()
    assert view.summary(document) == "2 processes in 2 groups, 0 B swapped"
    document |= {"pool_pages": 1024, "pool_bytes": _MIB, "zero_pages": 256}
    assert view.summary(document) == "2 processes in 2 groups, 5 MiB swapped in 1 MiB (5.0 : 1)"


# ---- the screen, without a terminal ----


class FakeDaemon:
    """Answers status, and remembers limits."""

    def __init__(self) -> None:
        self.document = _document()
        self.limits: dict[str, int] = {}
        self.failure: Failure | None = None

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        if self.failure:
            raise self.failure
        if op == "limit":
            if fields["limit_bytes"] < 16 * _MIB:
                raise Failure("too small", "give more")
            self.limits[fields["group"]] = fields["limit_bytes"]
        return {"ok": True, "status": self.document}


async def _wait(pilot: Pilot[Any], what: Callable[[], object]) -> None:
    for _ in range(int(_SECONDS_MAX / 0.01)):
        if what():
            return
        await pilot.pause(0.01)
    raise AssertionError("it never came about")


def _drive(daemon: FakeDaemon, drive: Callable[[TopApp, Pilot[Any]], Any]) -> TopApp:
    """A screen over `daemon` that `drive` has used."""

    async def run() -> TopApp:
        app = TopApp(daemon, 0.1)  # type: ignore[arg-type]
        async with app.run_test(size=(100, 40)) as pilot:
            await _wait(pilot, lambda: app.query_one("#groups", RecordTable).row_count == 2)
            await drive(app, pilot)
        return app

    return asyncio.run(run())


def _names(app: TopApp, table: str = "groups") -> str:
    found = app.query_one(f"#{table}", RecordTable)
    return "".join(str(found.get_row_at(row)[0]) for row in range(found.row_count))


def test_sorting_keeps_the_cursor_on_its_record() -> None:
    async def drive(app: TopApp, pilot: Pilot[Any]) -> None:
        assert _names(app) == "ab"
        await pilot.press("down")
        await pilot.press("r")
        assert _names(app) == "ba"
        assert app.query_one("#groups", RecordTable).cursor_row == 0
        for _ in range(4):  # resident, pool, swapped, faults/s: all equal here
            await pilot.press("s")
        await pilot.press("s", "s")  # procs, group
        assert _names(app) == "ab"

    _drive(FakeDaemon(), drive)


def test_limit_is_changed_and_mistakes_are_explained() -> None:
    daemon = FakeDaemon()

    async def drive(app: TopApp, pilot: Pilot[Any]) -> None:
        await pilot.press("l", *"12X", "enter")
        assert isinstance(app.screen, LimitScreen), "it asks again"
        daemon.document = {**daemon.document, "version": "another"}
        await _wait(pilot, lambda: "another" in str(app.screen_stack[0].query_one("#summary").render()))
        assert "'12X' is not a size" in str(app.screen.query_one("#mistake").render())
        await pilot.press(*["backspace"] * 3, *"128M", "enter")
        await _wait(pilot, lambda: daemon.limits == {"a": 128 * _MIB})
        await pilot.press("l", *"1M", "enter")
        await _wait(pilot, lambda: "too small; give more" in str(app.query_one("#message").render()))
        await pilot.press("l", "escape")
        assert not isinstance(app.screen, LimitScreen)

    _drive(daemon, drive)
    assert daemon.limits == {"a": 128 * _MIB}


def test_limit_of_a_process_is_that_of_its_group() -> None:
    daemon = FakeDaemon()

    async def drive(app: TopApp, pilot: Pilot[Any]) -> None:
        await pilot.press("tab", "down", "l", *"64M", "enter")
        await _wait(pilot, lambda: daemon.limits == {"b": 64 * _MIB})

    _drive(daemon, drive)


def test_end_of_the_daemon_ends_it_with_the_reason() -> None:
    daemon = FakeDaemon()

    async def drive(app: TopApp, pilot: Pilot[Any]) -> None:
        daemon.failure = Failure("the daemon is gone", "start it")
        await _wait(pilot, lambda: app.return_value is not None)

    assert _drive(daemon, drive).return_value == "the daemon is gone; start it"


def test_records_that_go_are_gone() -> None:
    daemon = FakeDaemon()

    async def drive(app: TopApp, pilot: Pilot[Any]) -> None:
        await pilot.press("down")
        daemon.document = {**_document(), "groups": [], "clients": [], "backends": []}
        await _wait(pilot, lambda: _names(app) == "" and _names(app, "clients") == "")
        await pilot.press("l", "s", "r")
        assert "choose a group" in str(app.query_one("#message").render())

    _drive(daemon, drive)


# ---- status --watch ----


class WatchedDaemon(FakeDaemon):
    """Is interrupted at the third status."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        self.limits[str(len(self.limits))] = 0
        if len(self.limits) == 3:
            raise KeyboardInterrupt
        return super().request(op, **fields)


def test_watch_prints_again_and_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(connection, "connect_any", lambda _: WatchedDaemon())
    assert status_command.main(argparse.Namespace(json=False, watch=0.0, socket=None)) == 0
    output = capsys.readouterr().out
    assert output.count("2 processes in 2 groups") == 2
    assert "\033" not in output
