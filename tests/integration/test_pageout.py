# SPDX-License-Identifier: MIT
"""What is to go out because somebody asked: by all evictors at once, to the end, whoever ends or forks meanwhile."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.limited import python_argv, run_limited
from support.puppets import Stage
from vswapd import processes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from support.puppets import Puppet

_MIB = 1 << 20
_LIMIT_BYTES = 256 * _MIB
_PAGES = 24576  # 96 MiB
_PAGE_BYTES = 4096
_HALVES = f"""
import ctypes, mmap, sys, threading, time
import vswapd

BYTES, HALF_PAGES = {_PAGES * _PAGE_BYTES}, {_PAGES // 2}
area = mmap.mmap(-1, BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
halves = [memoryview(area)[: BYTES // 2], memoryview(area)[BYTES // 2 :]]


def text_of(page):
    return page.to_bytes(8, "little") * {_PAGE_BYTES // 8}


def present_pages(half):
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(ctypes.addressof(ctypes.c_char.from_buffer(half)) // {_PAGE_BYTES} * 8)
        return sum(entry >> 7 for entry in pagemap.read(HALF_PAGES * 8)[7::8])


def ask(half, wait_ms):
    time.sleep(wait_ms / 1000)  # what is asked for meanwhile is the point
    vswapd.cold(half)
    left.append(present_pages(half))


for page in range({_PAGES}):
    area[page * {_PAGE_BYTES} : (page + 1) * {_PAGE_BYTES}] = text_of(page)
left = []
threads = [threading.Thread(target=ask, args=pair) for pair in ((halves[0], 0), (halves[1], int(sys.argv[1])))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*left)
assert all(area[page * {_PAGE_BYTES} : (page + 1) * {_PAGE_BYTES}] == text_of(page) for page in range({_PAGES}))
"""

_NEVER_STILL = f"""
import mmap, threading
import vswapd

area = mmap.mmap(-1, {_PAGES * _PAGE_BYTES}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
stops = threading.Event()


def change():
    while not stops.is_set():
        other = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        other[0] = area[0] = 1
        other.close()
        for page in range(1, {_PAGES}, 64):
            assert area[page * {_PAGE_BYTES}] == page % 256


for page in range({_PAGES}):
    area[page * {_PAGE_BYTES} : (page + 1) * {_PAGE_BYTES}] = bytes([page % 256]) * {_PAGE_BYTES}
vswapd.cold(area)
threads = [threading.Thread(target=change) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    vswapd.cold(area)
stops.set()
for thread in threads:
    thread.join()
"""


@pytest.fixture
def stage(stage_programs: Mapping[str, str], client_library: str, tmp_path: Path) -> Stage:
    return Stage(stage_programs, client_library, tmp_path, pages=_PAGES, limit_bytes=_LIMIT_BYTES)


def _evictors_ns() -> dict[int, int]:
    """What each evictor of a daemon that this process has started has had of a CPU, by thread."""
    threads = (
        (pid, int(path.name)) for pid in processes.tree(os.getpid(), set()) for path in Path(f"/proc/{pid}/task").iterdir()
    )
    return {
        thread: int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
        for pid, thread in threads
        if processes.thread_name(pid, thread) == "vswap-evict"
    }


def _fork_full(stage: Stage) -> tuple[Puppet, Puppet]:
    """The first one, with something in all of its pages, and its child."""
    [puppet] = stage.puppets
    puppet.write("text", 1, 0, _PAGES)
    stage.wait_managed(puppet)
    child = stage.fork(puppet)
    stage.wait_managed(child)
    return puppet, child


def test_all_evictors_do_it(stage: Stage) -> None:
    """Who asks does nothing of it. Without their help one CPU compresses, and the others wait."""
    with stage:
        [puppet] = stage.puppets
        puppet.write("text", 1, 0, _PAGES)
        stage.wait_managed(puppet)
        before = _evictors_ns()
        assert len(before) == os.cpu_count()
        assert stage.page_out(puppet)["swapped"] == _PAGES
        spent = [now - before[thread] for thread, now in _evictors_ns().items()]
        assert min(spent) > sum(spent) / len(spent) / 4, spent
        puppet.check("text", 1, 0, _PAGES)
        stage.end(puppet)
    assert stage.status == 0, stage.log


def test_what_forked_relatives_share_goes_out_at_the_end_too(stage: Stage) -> None:
    """A batch that finds it busy puts the hand back, maybe after another evictor has been around."""
    with stage:
        parent, child = _fork_full(stage)
        assert stage.page_out(parent)["swapped"] == _PAGES
        assert stage.page_out(child)["swapped"] == _PAGES
        for puppet in (child, parent):
            puppet.check("text", 1, 0, _PAGES)
            stage.end(puppet)
    assert stage.status == 0, stage.log


@pytest.mark.parametrize("after_ms", [0, 5, 20, 60, 150])
def test_program_that_ends_meanwhile(stage: Stage, after_ms: int) -> None:
    """Nobody waits for it any longer, and the evictors are there for others."""
    with stage:
        first, second = _fork_full(stage)
        ends = threading.Timer(after_ms / 1000, lambda: stage.kill(first))
        begun = time.monotonic()
        stage.order(f"pageout {first.pid} 20000", ends.start)
        assert time.monotonic() - begun < 10
        ends.join()
        assert stage.page_out(second)["swapped"] == _PAGES
        second.check("text", 1, 0, _PAGES)
        stage.end(second)
    assert stage.status == 0, stage.log


def test_program_that_ends_while_nothing_can_go(stage: Stage) -> None:
    """Its relative's pages leave no room in the pool, and go on doing so."""
    with stage:
        first, second = _fork_full(stage)
        second.write("random", 2, 0, _PAGES)
        stage.order("budget 1")
        stage.order(f"limit {_LIMIT_BYTES} {4 * _MIB}")
        with pytest.raises(TimeoutError):
            stage.order(f"pageout {second.pid} 1000")
        ends = threading.Timer(0.3, lambda: stage.kill(first))
        begun = time.monotonic()
        stage.order(f"pageout {first.pid} 25000", ends.start)
        assert 0.2 < time.monotonic() - begun < 10
        ends.join()
        stage.order("budget 0")
        second.check("random", 2, 0, _PAGES)
        stage.end(second)
    assert stage.status == 0, stage.log


def test_one_that_cannot_go_on_leaves_the_evictors_to_others(stage: Stage) -> None:
    """While one of them tries, and the request waits for its time to be over, a program beyond its limit swaps on."""
    with stage:
        [puppet] = stage.puppets
        puppet.write("random", 1, 0, _PAGES)
        stage.wait_managed(puppet)
        stage.order("budget 1")
        stage.order(f"limit {_LIMIT_BYTES} {4 * _MIB}")
        with pytest.raises(TimeoutError):
            stage.order(f"pageout {puppet.pid} 1000", lambda: puppet.write("zero", 0, 0, _PAGES // 2))
        stage.order("budget 0")
        assert stage.page_out(puppet)["swapped"] == _PAGES
        puppet.check("zero", 0, 0, _PAGES // 2)
        puppet.check("random", 1, _PAGES // 2, _PAGES // 2)
        stage.end(puppet)
    assert stage.status == 0, stage.log


@pytest.mark.parametrize("after_ms", [0, 10, 20, 40])
def test_two_who_ask_at_once_are_told_when_it_is_done(after_ms: int) -> None:
    """They share the client's hand, so the second begins when the first has come to its end. And it has all, though what the
    first does meanwhile are events, which stop a MOVE while they are unread."""
    result = run_limited("256M", [*python_argv(_HALVES), str(after_ms)])
    assert result.status == 0, result.describe()
    assert [int(pages) for pages in result.stdout.split()] == [0, 0], result.describe()


def test_program_that_is_never_still() -> None:
    """It maps, unmaps and touches all the time, so that a MOVE is refused now and then: requests end, and its bytes are right."""
    result = run_limited("256M", python_argv(_NEVER_STILL), seconds_max=120)
    assert result.status == 0, result.describe()
    assert result.stats["counters"]["evict_again"] > 0, result.describe()
