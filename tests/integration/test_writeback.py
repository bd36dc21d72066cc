# SPDX-License-Identifier: MIT
"""What leaves the pool: of every client, whatever its pages did before, and also when the pool's limit is lowered."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from support.puppets import Puppet, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_MIB = 1 << 20
_LIMIT_BYTES = 64 * _MIB
_LARGE_BYTES = 512 * _MIB  # a tenth of it is for the pool when nothing compresses
_PAGES = 4096


def _wait(condition: Callable[[], bool], what: str, seconds_max: float = 30.0) -> None:
    deadline = time.monotonic() + seconds_max
    while not condition():
        assert time.monotonic() < deadline, f"never {what}"
        time.sleep(0.02)  # polling another process's state


def _figures(stage: Stage, puppet: Puppet) -> dict[str, int]:
    """Of the client, once all that was begun is done."""
    stage.settled()
    return stage.ask(f"client {puppet.pid}")


def _fill(stage: Stage, puppet: Puppet, seed: int, kind: str = "text") -> None:
    """All of its pages, which are then in the pool."""
    puppet.write(kind, seed, 0, _PAGES)
    stage.wait_managed(puppet)
    assert stage.page_out(puppet)["pool"] == _PAGES


def _lower_until_written(stage: Stage, pages: int) -> None:
    """The pool's limit, a little at a time."""
    pool_bytes = 32 * _MIB
    while stage.ask("statistics")["spill"] < pages:
        pool_bytes -= _MIB
        assert pool_bytes > 0
        stage.order(f"limit {_LIMIT_BYTES} {pool_bytes}")
        time.sleep(0.3)  # writers see it at the latest after a tenth of a second


@pytest.fixture
def stage(stage_programs: Mapping[str, str], client_library: str, tmp_path: Path) -> Stage:
    return Stage(stage_programs, client_library, tmp_path, pages=_PAGES, limit_bytes=_LIMIT_BYTES)


def test_copies_of_resident_pages_leave_a_pool_that_shrinks(stage: Stage) -> None:
    """When there is nothing else in it: eviction goes on, and nobody is out of memory."""
    with stage:
        [puppet] = stage.puppets
        stage.order(f"limit {_LARGE_BYTES} 0")
        _fill(stage, puppet, 1, "random")
        puppet.check("random", 1, 0, _PAGES)
        assert _figures(stage, puppet)["kept"] > _PAGES // 2
        stage.order(f"limit {_LARGE_BYTES} {4 * _MIB}")
        puppet.write("random", 2, 0, _PAGES // 8)
        figures = stage.page_out(puppet)
        assert figures["swapped"] == _PAGES, figures
        puppet.check("random", 2, 0, _PAGES // 8)
        puppet.check("random", 1, _PAGES // 8, _PAGES - _PAGES // 8)
        stage.end(puppet)
    assert stage.status == 0, stage.log


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_slabs_that_are_mostly_empty_are_given_back(stage: Stage, *, shared: bool) -> None:
    """Where three pages of four leave the pool, from all of its slabs."""
    every = 4
    with stage:
        [puppet] = stage.puppets
        _fill(stage, puppet, 1)
        puppets = [puppet, *([stage.fork(puppet)] if shared else [])]
        full = stage.ask("statistics")
        for one in puppets:
            for first in range(1, _PAGES, every):
                one.obey(f"discard {first} {every - 1}")
        assert stage.ask("statistics")["pool_bytes"] == full["pool_bytes"]
        # So that it is near, but not short: each process takes some of it.
        stage.order(f"limit {full['pool_bytes'] + (_MIB * 11 if shared else _MIB * 7) // 8} 0")

        def is_packed() -> bool:
            figures = stage.ask("statistics")
            unused = figures["pool_bytes"] - figures["object_bytes"]
            return figures["object_bytes"] < full["pool_bytes"] // 2 and unused < figures["pool_bytes"] // 3

        _wait(is_packed, "given back")
        figures = stage.ask("statistics")
        assert figures["virtual"] == figures["pool"] == len(puppets) * _PAGES // every
        for one in puppets:
            one.check("text", 1, 0, _PAGES, every)
            stage.order("valid")
        for one in puppets:
            stage.end(one)
    assert stage.status == 0, stage.log


@pytest.mark.parametrize("spills", [False, True], ids=["pool", "spill"])
def test_no_copy_is_kept_of_what_is_written_to(stage: Stage, *, spills: bool) -> None:
    """Scattered pages, for those around them are another matter: a read from disk brings them along."""
    every = 64
    count = _PAGES // every
    with stage:
        [puppet] = stage.puppets
        _fill(stage, puppet, 1)
        if spills:
            stage.order(f"limit {_LIMIT_BYTES} 1")
            _wait(lambda: _figures(stage, puppet)["pool"] == 0, "written back")
            stage.order(f"limit {_LIMIT_BYTES} 0")
        puppet.write("text", 2, 0, _PAGES, every)
        along = _PAGES - _figures(stage, puppet)["swapped"] - count
        assert _figures(stage, puppet)["kept"] <= along
        puppet.check("text", 1, every // 2, _PAGES - every // 2, every)
        figures = _figures(stage, puppet)
        assert figures["kept"] >= count // 2
        assert figures["kept"] <= _PAGES - figures["swapped"] - count
        stage.page_out(puppet)
        puppet.check("text", 2, 0, _PAGES, every)
        stage.end(puppet)
    assert stage.status == 0, stage.log


def test_unchanged_pages_are_written_back(stage: Stage) -> None:
    """They were resident when the writer came by, and went out again without being stored."""
    half = _PAGES // 2
    with stage:
        [puppet] = stage.puppets
        puppet.write("text", 1, 0, half)
        stage.wait_managed(puppet)
        stage.page_out(puppet)
        puppet.write("text", 1, half, _PAGES - half)
        stage.page_out(puppet)
        puppet.check("text", 1, 0, half)
        stage.order(f"limit {_LIMIT_BYTES} 1")
        _wait(lambda: _figures(stage, puppet)["pool"] == 0, "the other half written, and so all of the list seen")
        stage.order(f"limit {_LIMIT_BYTES} 0")
        figures = stage.page_out(puppet)
        assert figures["pool"] > half // 2
        stage.order(f"limit {_LIMIT_BYTES} 1")
        _wait(lambda: _figures(stage, puppet)["pool"] == 0, "written back")
        assert stage.ask("statistics")["writeback_relisted"] == 0
        puppet.check("text", 1, 0, _PAGES)
        stage.end(puppet)
    assert stage.status == 0, stage.log


def test_copies_of_resident_pages_do_not_use_up_a_budget(stage: Stage) -> None:
    """Another program's either: they are given up when the room is needed."""
    with stage:
        [first] = stage.puppets
        _fill(stage, first, 1)
        stage.order(f"limit {_LIMIT_BYTES} 1")
        _wait(lambda: _figures(stage, first)["pool"] == 0, "written back")
        stage.order(f"limit {_LIMIT_BYTES} 0")
        first.check("text", 1, 0, _PAGES)
        copies_bytes = stage.ask("backend 0")["live"]
        assert copies_bytes > 2 * _MIB
        second = stage.fork(first)
        second.write("text", 2, 0, _PAGES)
        stage.order(f"budget {copies_bytes + _MIB // 2}")
        stage.order(f"limit {_LIMIT_BYTES} {4 * _MIB}")
        assert stage.page_out(second)["swapped"] == _PAGES
        assert _figures(stage, second)["spill"] > _PAGES // 8
        assert stage.ask("backend 0")["live"] <= copies_bytes + _MIB // 2
        first.check("text", 1, 0, _PAGES)
        second.check("text", 2, 0, _PAGES)
        stage.end(second)
        stage.end(first)
    assert stage.status == 0, stage.log


def test_clients_take_turns(stage: Stage) -> None:
    """The first one has enough to fill every segment, but the others' pages are as old."""
    with stage:
        [first] = stage.puppets
        _fill(stage, first, 1)
        second = stage.fork(first)
        _fill(stage, first, 2)
        _fill(stage, second, 3)
        _lower_until_written(stage, _PAGES // 2)
        assert _figures(stage, first)["spill"] > 256
        assert _figures(stage, second)["spill"] > 256
        first.check("text", 2, 0, _PAGES)
        second.check("text", 3, 0, _PAGES)
        stage.end(second)
        stage.end(first)
    assert stage.status == 0, stage.log


def test_pages_of_a_forked_child_are_written_back(stage: Stage) -> None:
    """Those that it has of its parent, which alone had them listed, and has ended."""
    with stage:
        [first] = stage.puppets
        parent = stage.fork(first)
        _fill(stage, parent, 1)
        child = stage.fork(parent)
        stage.wait_managed(child)
        stage.end(parent)
        assert _figures(stage, child)["pool"] == _PAGES
        stage.order(f"limit {_LIMIT_BYTES} 1")
        _wait(lambda: _figures(stage, child)["pool"] == 0, "written back")
        assert stage.ask("statistics")["writeback_relisted"] > 0
        child.check("text", 1, 0, _PAGES)
        stage.end(child)
        stage.end(first)
    assert stage.status == 0, stage.log


def test_pageout_says_what_it_had_no_room_for(stage: Stage) -> None:
    """After the time that it was given, and what was done stays done."""
    with stage:
        [puppet] = stage.puppets
        puppet.write("random", 1, 0, _PAGES)
        stage.wait_managed(puppet)
        stage.order("budget 1")
        stage.order(f"limit {_LIMIT_BYTES} {4 * _MIB}")
        with pytest.raises(TimeoutError):
            stage.order(f"pageout {puppet.pid} 300")
        assert 0 < _figures(stage, puppet)["swapped"] < _PAGES
        stage.order("budget 0")
        assert stage.page_out(puppet)["swapped"] == _PAGES
        puppet.check("random", 1, 0, _PAGES)
        stage.end(puppet)
    assert stage.status == 0, stage.log
