# SPDX-License-Identifier: MIT
"""The host is short of memory: groups give some up, below their limits, and nobody is hurt by it.

The host is a memory cgroup with a limit, in which are the daemon, its programs and a hog that is none of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from support.limited import MIB, command_path, python_argv
from support.memory_cgroup import memory_cgroup
from support.sampler import answering_pid
from vswapd.sizes import format_size_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.cgroup import Cgroup
    from integration.conftest import DaemonProcess

_SECONDS_MAX = 60.0
_LIMIT = 512 * MIB
_RESERVE = 64 * MIB  # an eighth: the most that is kept of a cgroup

# Fills memory, says so, and waits for a line, at which it says whether all is as it was: idle meanwhile, or reading
# what it has, a part of it, again and again. `share`: of each page is random.
_PROGRAM = """
import mmap, random, select, sys
mib, share, busy = {mib}, {share}, {busy}
memory = mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def content(at): return random.Random(at).randbytes(4096 * share // 100).ljust(4096, b"x")
for at in range(0, len(memory), 4096): memory[at : at + 4096] = content(at)
print("filled", flush=True)
while busy and not select.select([sys.stdin], [], [], 0)[0]:
    for at in range(0, busy << 20, 4096): memory[at]
sys.stdin.readline()
wrong = sum(memory[at : at + 4096] != content(at) for at in range(0, len(memory), 4096))
print("wrong", wrong, flush=True)
"""


class _Program:
    """One that has filled its memory."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        assert self._line() == "filled\n"
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=_SECONDS_MAX)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def check(self) -> None:
        """All is as it was, and it ends."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self._line() == "wrong 0\n"
        assert self.process.wait(_SECONDS_MAX) == 0


class _Host:
    """The cgroup, and a daemon in it."""

    def __init__(self, cgroup: Cgroup, daemon: DaemonProcess) -> None:
        self.cgroup = cgroup
        self.daemon = daemon

    def program(self, limit: str, mib: int, share: int = 100, busy: int = 0) -> _Program:
        """In a group of its own."""
        run = [command_path("vswapctl"), "run", "--socket", self.daemon.socket_path, "--limit", limit, "--"]
        return _Program(self.cgroup.command([*run, *python_argv(_PROGRAM.format(mib=mib, share=share, busy=busy))]))

    def hog(self, more: int = 0) -> _Program:
        """Takes so much that half of the reserve is left, and so many MiB more."""
        mib = (self.available_bytes() - _RESERVE // 2) // MIB
        assert mib > 0
        return _Program(self.cgroup.command(python_argv(_PROGRAM.format(mib=mib - 8 + more, share=100, busy=0))))

    def available_bytes(self) -> int:
        """As far as programs are concerned: caches go."""
        return _LIMIT - self.cgroup.anonymous_bytes()

    def status(self) -> dict[str, Any]:
        """The daemon's."""
        with self.daemon.control() as control:
            return dict(control.status())

    def group(self, limit_bytes: int) -> dict[str, Any]:
        """The one with that limit."""
        [group] = [group for group in self.status()["groups"] if group["limit_bytes"] == limit_bytes]
        return dict(group)

    def wait(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Until the status is so. AssertionError."""
        deadline = time.monotonic() + _SECONDS_MAX
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.05)  # polling another process's state
        return status

    def pids(self) -> list[int]:
        """Supervisor and daemon."""
        with self.daemon.control() as control:
            return [self.daemon.process.pid, int(control.request("ping")["pid"])]


@pytest.fixture
def cgroup(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cgroup]:
    """Before the daemon, as it ends after it. Its parameter: how many processes the kernel is to kill."""
    with memory_cgroup(tmp_path, f"vswap-test-{os.getpid()}", _LIMIT) as made:
        yield made
        assert made.kill_count() == getattr(request, "param", 0), "killed by the kernel"


@pytest.fixture
def host_with(cgroup: Cgroup, daemon_with: Callable[..., DaemonProcess], tmp_path: Path) -> Callable[..., _Host]:
    """A function that starts a daemon in the cgroup, with these options."""

    def start(*options: str, reserve: int = _RESERVE) -> _Host:
        conf = tmp_path / "vswapd.conf"
        conf.write_text(f'[daemon]\nhost_reserve = "{format_size_argument(reserve)}"\n')
        return _Host(cgroup, daemon_with("--config", str(conf), *options, prefix=cgroup.command([])))

    return start


def _swapped(status: dict[str, Any], limit_mib: int) -> int:
    """Pages of the group with that limit."""
    return sum(int(group["swapped_pages"]) for group in status["groups"] if group["limit_bytes"] == limit_mib * MIB)


def _has_enough(status: dict[str, Any]) -> bool:
    """There was a shortage, and groups gave what was missing."""
    return bool(status["host"]["available_bytes"] >= _RESERVE and status["host"]["shortages"])


def _is_over(status: dict[str, Any]) -> bool:
    return not status["host"]["is_short"]


def test_largest_group_gives_to_a_hog(host_with: Callable[..., _Host]) -> None:
    """What it gives goes to the disk, incompressible as it is; a small group keeps all. It ends with the hog."""
    host = host_with("--spill", "{directory}/spill:1G")
    pids = host.pids()
    with host.program("80M", 40) as small, host.program("320M", 220) as large:
        before = host.status()
        assert (before["host"]["shortages"], before["spill_bytes"]) == (0, 0)
        assert all(group["swapped_pages"] == 0 for group in before["groups"])
        with host.hog():
            status = host.wait(_has_enough)
            assert status["host"]["reclaimed_pages"] > 0
            assert status["host"]["written_pages"] > 0
            assert status["spill_bytes"] > 16 * MIB
            given = host.group(320 * MIB)
            assert given["usage_bytes"] < 210 * MIB
            assert host.group(80 * MIB)["swapped_pages"] == 0
        host.wait(_is_over)
        assert host.status()["host"]["shortages"] == 1
        # The limits are what they were: all of it comes back, and stays.
        with host.daemon.control() as control:
            [pid] = [client["pid"] for client in control.status()["clients"] if client["limit_bytes"] == 320 * MIB]
            assert control.request("pagein", pid=pid, seconds_max=30)["ok"]
        assert host.group(320 * MIB)["resident_bytes"] > 220 * MIB, host.group(320 * MIB)
        assert host.group(320 * MIB)["swapped_pages"] == 0
        large.check()
        small.check()
    assert host.pids() == pids, "the daemon goes on"
    log = host.daemon.log.read_text()
    assert log.count("memory cgroup is short of memory") == 1, log
    assert log.count("memory cgroup has memory again") == 1, log


def test_what_is_idle_gives_first(host_with: Callable[..., _Host]) -> None:
    """Though it is the smaller one; it can give all that is missing. The other has it back at once, and that is seen."""
    host = host_with("--spill", "{directory}/spill:1G")
    with host.program("256M", 150, busy=150) as hot, host.program("160M", 110) as idle, host.hog(more=24):
        host.wait(_has_enough)
        host.wait(lambda status: _swapped(status, 160) > 4 * _swapped(status, 256))
        idle.check()
        hot.check()


def test_a_quarter_of_the_limit_stays(host_with: Callable[..., _Host]) -> None:
    """Whatever is wanted: the hog takes more than the group gives, and the shortage lasts as long as it does."""
    host = host_with("--spill", "{directory}/spill:1G")
    with host.program("256M", 200) as large:
        with host.hog(more=120):
            host.wait(lambda status: _swapped(status, 256) > 100 * MIB // 4096)
            swapped = -1
            while swapped != (now := host.group(256 * MIB)["swapped_pages"]):
                swapped = now
                time.sleep(0.5)  # until nothing more goes
            assert host.group(256 * MIB)["usage_bytes"] > 60 * MIB
            assert host.status()["host"]["is_short"]
        large.check()


def test_what_cannot_go_is_left_alone(host_with: Callable[..., _Host]) -> None:
    """Nothing compresses, and there is no backend: a little is tried, then no CPU is burnt for it, and nobody dies."""
    host = host_with()
    pids = host.pids()
    with host.program("320M", 220) as large:
        with host.hog():
            host.wait(lambda status: status["host"]["shortages"] == 1)
            evicted = -1
            while evicted != (now := host.status()["counters"]["evicted_pages"]):
                evicted = now
                time.sleep(1.0)  # until nothing more is tried
            assert evicted < 64 * MIB // 4096
            assert host.status()["host"]["is_short"]
        host.wait(_is_over)
        large.check()
        assert host.status()["counters"]["out_of_memory_kills"] == 0
    assert host.pids() == pids


def test_compressed_memory_gives_without_a_backend(host_with: Callable[..., _Host]) -> None:
    host = host_with()
    with host.program("320M", 220, share=20) as large, host.hog():
        host.wait(_has_enough)
        assert host.group(320 * MIB)["pool_bytes"] > 0
        large.check()


def test_pool_alone_is_written_where_programs_are_elsewhere(host_with: Callable[..., _Host]) -> None:
    """The cgroup has the daemon and the hog; to evict programs of another would fill it."""
    host = host_with("--spill", "{directory}/spill:1G")
    run = [command_path("vswapctl"), "run", "--socket", host.daemon.socket_path, "--limit"]
    program = python_argv(_PROGRAM.format(mib=220, share=40, busy=0))
    with _Program([*run, "320M", "--", *program]) as outside, _Program([*run, "384M", "--", *program]) as resident:
        with host.daemon.control() as control:
            [pid] = [client["pid"] for client in control.status()["clients"] if client["limit_bytes"] == 320 * MIB]
            control.request("pageout", pid=pid, seconds_max=30)
        before = host.status()
        assert before["pool_bytes"] > 64 * MIB
        with host.hog():
            status = host.wait(_has_enough)
            assert status["host"]["written_pages"] > 0
            assert status["counters"]["evicted_pages"] == before["counters"]["evicted_pages"]
        outside.check()
        resident.check()


def _lowest_score() -> str:
    """What a process that is started like a daemon here can have."""
    lower = "echo -900 2>/dev/null >/proc/self/oom_score_adj; cat /proc/self/oom_score_adj"
    return subprocess.run(["sh", "-c", lower], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("cgroup", [1], indirect=True)
def test_kernel_kills_the_hog(host_with: Callable[..., _Host]) -> None:
    """One that grows until the kernel has to kill somebody: it is as large as all others together."""
    host = host_with()
    pids = host.pids()
    with host.program("320M", 160, share=40) as large:
        for pid in pids:
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == _lowest_score()
        [client] = host.status()["clients"]
        assert Path(f"/proc/{client['pid']}/oom_score_adj").read_text() == Path("/proc/self/oom_score_adj").read_text()
        hog = host.cgroup.command(python_argv("all = [bytes(range(256)) * 4096 for _ in range(600)]"))
        killed = subprocess.run(hog, check=False)
        assert killed.returncode in (137, -9)
        large.check()
    assert host.pids() == pids


def test_successor_goes_on_with_it(host_with: Callable[..., _Host]) -> None:
    """Killed while groups give: nothing of it is in the state, and the next daemon looks anew."""
    host = host_with("--spill", "{directory}/spill:1G")
    with host.program("320M", 220) as large:
        with host.hog():
            host.wait(lambda status: status["host"]["shortages"] == 1)
            _, daemon = host.pids()
            os.kill(daemon, signal.SIGKILL)
            answering_pid(host.daemon.socket_path, _SECONDS_MAX, dead=daemon)
            host.wait(lambda status: status["host"]["available_bytes"] >= _RESERVE)
        host.wait(_is_over)
        large.check()
