# SPDX-License-Identifier: MIT
"""A run of faults is one COPY, wherever its pages are."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from support.puppets import Puppet, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_LIMIT_BYTES = 32 << 20
_PAGES = 2048
_RUN_PAGES = 128  # FILL_PAGES_MAX
_BEFORE = 2 * _RUN_PAGES - 1  # runs of 1, 2, 4, … 128 pages
_KINDS = ("random", "zero", "same", "random", "random", "text", "random", "random")
_SCATTERED, _OTHER_BACKEND, _POOL = 6, 3, 5  # which of eight pages are not written back first


def _wait(condition: Callable[[], bool], what: str, seconds_max: float = 30.0) -> None:
    deadline = time.monotonic() + seconds_max
    while not condition():
        assert time.monotonic() < deadline, f"never {what}"
        time.sleep(0.02)  # polling another process's state


class _Layout:
    """Which content each page of the run has."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.puppet: Puppet = stage.puppets[0]
        self._seeds = [1] * len(_KINDS)

    def write(self, lane: int) -> None:
        """Every eighth page, anew."""
        self._seeds[lane] += 1
        self.puppet.write(_KINDS[lane], self._seeds[lane], _BEFORE + lane, _RUN_PAGES - lane, len(_KINDS))

    def check(self) -> None:
        for lane, kind in enumerate(_KINDS):
            self.puppet.check(kind, self._seeds[lane], _BEFORE + lane, _RUN_PAGES - lane, len(_KINDS))

    def page_out(self) -> None:
        """Into the pool, but for what a backend has already."""
        self._stage.order(f"limit {_LIMIT_BYTES} 0")
        self._stage.page_out(self.puppet)

    def write_back(self) -> None:
        """All that is in the pool."""
        self.page_out()
        self._stage.order(f"limit {_LIMIT_BYTES} 1")
        _wait(lambda: self._stage.ask(f"client {self.puppet.pid}")["pool"] == 0, "written back")
        self._stage.order(f"limit {_LIMIT_BYTES} 0")


def _lay_out(stage: Stage) -> _Layout:
    """Of eight pages four on a backend, one there in another segment, one on another, one in the pool, two nowhere."""
    layout = _Layout(stage)
    layout.puppet.write("text", 1, 0, _BEFORE)
    for lane in range(len(_KINDS)):
        layout.write(lane)
    layout.puppet.write("text", 1, _BEFORE + _RUN_PAGES, _PAGES - _BEFORE - _RUN_PAGES)
    stage.wait_managed(layout.puppet)
    layout.write_back()
    layout.write(_SCATTERED)
    layout.write_back()
    other = int(stage.order("swapon 5")[0])
    layout.write(_OTHER_BACKEND)
    layout.write_back()
    layout.puppet.write("text", 2, 0, _BEFORE)
    layout.write(_POOL)
    layout.page_out()
    assert stage.ask(f"backend {other}")["extents"] >= _RUN_PAGES // len(_KINDS)
    return layout


@pytest.fixture
def stage(stage_programs: Mapping[str, str], client_library: str, tmp_path: Path) -> Stage:
    return Stage(stage_programs, client_library, tmp_path, pages=_PAGES, limit_bytes=_LIMIT_BYTES)


def test_mixed_run_is_one_copy(stage: Stage) -> None:
    """128 pages: all zero, same-filled, in the pool, and scattered over two backends."""
    with stage:
        layout = _lay_out(stage)
        puppet = layout.puppet
        figures = stage.ask(f"client {puppet.pid}")
        lane_pages = _RUN_PAGES // len(_KINDS)
        assert figures["zero"] == figures["same"] == lane_pages
        assert figures["pool"] == _BEFORE + lane_pages
        assert figures["spill"] == _PAGES - _BEFORE - 3 * lane_pages
        puppet.check("text", 2, 0, _BEFORE)
        before = stage.settled()
        puppet.check("random", 2, _BEFORE)
        after = stage.settled()
        grown = {name: after[name] - before[name] for name in after}
        assert grown["faults"] == 1
        assert grown["fill_calls"] == 1, grown
        assert grown["fill_pages"] == _RUN_PAGES
        assert grown["fill_mixed"] == 1
        assert grown["spill_read_pages"] == 5 * lane_pages
        assert 3 <= grown["spill_read_ranges"] <= 5 * lane_pages
        layout.check()
        assert stage.settled()["faults"] == after["faults"], "a page of the run was still missing"
        puppet.check("text", 1, _BEFORE + _RUN_PAGES, _PAGES - _BEFORE - _RUN_PAGES)
        stage.end(puppet)
    assert stage.status == 0, stage.log


def test_lone_fault_waits_for_nothing_else(stage: Stage) -> None:
    """One page in the middle of the same memory: one range, and no page that is not beside it there."""
    with stage:
        layout = _lay_out(stage)
        before = stage.settled()
        layout.puppet.check("random", 2, _BEFORE + len(_KINDS) * 4)
        after = stage.settled()
        assert after["spill_read_ranges"] - before["spill_read_ranges"] == 1
        assert after["fill_mixed"] == before["fill_mixed"]
        assert after["fill_pages"] - before["fill_pages"] <= 8
        layout.check()
        stage.end(layout.puppet)
    assert stage.status == 0, stage.log
