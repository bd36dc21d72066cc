# SPDX-License-Identifier: MIT
"""scenarios — what is run: arguments of workloads.c or applications.py, and the rows that come out.

A working set is a multiple of M, the limit of the systems whose pool comes on top of it, or M and a fixed size.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_MIB = 1 << 20
_APPLICATIONS = Path(__file__).resolve().parent / "applications.py"

_TITLES = {
    "fill": "first fill",
    "seq_read": "sequential re-read",
    "seq_rewrite": "sequential rewrite",
    "rand_read": "random read",
    "rand_write": "random write",
    "hot": "hot 80/20 read",
    "zipf": "Zipf 0.99 read",
    "stride": "strided read",
    "chase": "pointer chase",
    "verify": "verify every byte",
    "usemem": "whole run",
    "fork": "fork, use, end",
    "munmap": "munmap of all",
    "exit": "exit with all",
    "out_dirty": "out by force, dirty",
    "back": "all read back",
    "out_same": "out, unchanged",
    "fault": "one fault",
    "redis_load": "SET, pipelined",
    "redis_get": "GET, random",
    "redis_verify": "MGET of all",
    "redis_set": "SET, random",
    "sort": "a page of lines",
    "sqlite_load": "INSERT",
    "sqlite_select": "SELECT, random",
    "sqlite_update": "UPDATE, random",
    "sqlite_scan": "scan, a row",
    "numpy_fill": "fill",
    "numpy_math": "^= in place",
    "numpy_columns": "sums of columns",
    "numpy_gather": "random rows",
    "gc_build": "build an object",
    "gc_collect": "collect, an object",
    "gc_churn": "replace an object",
    "compile": "make -j2",
}
_LATENCIES = ("ns", "p50_ns", "p99_ns", "p999_ns")


@dataclass(frozen=True)
class Scenario:
    """`working_set`: in M; `more_mib` on top. `ratio`: LZ4's, of the pages that are neither zero nor same-filled."""

    name: str
    title: str
    mode: tuple[str, ...]
    working_set: float = 2.0
    more_mib: int = 0
    memory_mib: int = 0  # an M of its own
    ratio: float = 1.6
    zero_percent: int = 0
    same_percent: int = 0
    systems: tuple[str, ...] = ()  # all that limit memory
    vswapd_options: tuple[str, ...] = ()
    figures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a phase; else its mean alone
    silent: tuple[str, ...] = ()  # phases that are no rows
    unit: str = "a page access"
    is_application: bool = False

    def argv(self, program: str, memory_bytes: int, directory: str) -> list[str]:
        """The command, for M = `memory_bytes`."""
        mib = max(1, self.working_set_bytes(memory_bytes) // _MIB)
        if self.is_application:
            options = ["--mib", str(mib), "--workloads", program, "--directory", directory]
            return [sys.executable, str(_APPLICATIONS), *self.mode, *options]
        data = {"--mib": mib, "--ratio": self.ratio, "--zero": self.zero_percent, "--same": self.same_percent}
        words = [str(word) for item in data.items() for word in item]
        return [program, *words, *self.mode]

    def limit_bytes(self, memory_bytes: int) -> int:
        """M: its own, or the one of the run."""
        return self.memory_mib * _MIB or memory_bytes

    def working_set_bytes(self, memory_bytes: int) -> int:
        """For M = `memory_bytes`, unless it has its own."""
        return int(self.limit_bytes(memory_bytes) * self.working_set) + self.more_mib * _MIB

    def estimated_pool_bytes(self, memory_bytes: int) -> int:
        """Where no peer's pool can be measured: what does not fit, compressed, and a twentieth of overhead."""
        excess = max(0, self.working_set_bytes(memory_bytes) - self.limit_bytes(memory_bytes))
        data = 1 - (self.zero_percent + self.same_percent) / 100
        return int(excess * data / self.ratio * 1.05)


def row_title(phase: str) -> str:
    """What people call a phase."""
    return _TITLES.get(phase, phase)


_ALL = (
    "fill,seq_read,seq_rewrite,rand_read:{half},rand_write:{half},hot:{full},zipf:{full},stride:{half},chase:{half},"
    "verify"
)
_SOME = ("access", "fill,seq_read,seq_rewrite,rand_read:50,rand_write:50,hot:50,verify")


def _access(half: int, full: int) -> Scenario:
    mode = ("access", _ALL.format(half=half, full=full))
    return Scenario("access", "one process, 1.6:1", mode, figures={"rand_read": _LATENCIES})


def _usemem(count: int) -> Scenario:
    return Scenario(f"usemem-{count}", f"usemem shape, {count} processes", ("usemem", str(count)))


def _teardown(more_mib: int, title: str) -> Scenario:
    working_set = 1.0 if more_mib else 2.0
    return Scenario("teardown", title, ("teardown",), working_set=working_set, more_mib=more_mib, unit="a page freed")


def _application(name: str, title: str, unit: str, **more: object) -> Scenario:
    return Scenario(name, title, (name,), is_application=True, unit=unit, **more)  # type: ignore[arg-type]


_FORK = Scenario("fork", "process with swapped memory forks 20 children", ("fork", "20"), unit="a child")
_FAULT = {"fault": ("p50_ns", "p99_ns", "p999_ns")}
_FAULT_POOL = Scenario(
    "fault-pool",
    "single faults, out by force, in RAM",
    ("fault", "50", "0"),
    working_set=0.5,
    systems=("zram-lz4", "zswap", "vswapd"),
    vswapd_options=("--no-spill",),
    figures=_FAULT,
)
_FAULT_DISK = Scenario(
    "fault-disk",
    "single faults, out by force, on disk",
    ("fault", "20", "200"),
    working_set=0.5,
    systems=("swap-file", "vswapd"),
    vswapd_options=("--pool", "4M"),
    figures=_FAULT,
)
_PAGEOUT = Scenario("pageout", "swapped out by force", ("pageout",), working_set=0.5, silent=("verify",), unit="a page")
_FITS = Scenario(
    "fits",
    "fits in memory: beside no limit at all",
    ("access", "fill,seq_read:800,rand_read:800,rand_write:800,verify"),
    working_set=0.5,
    systems=("native", "vswapd"),
    silent=("fill", "verify"),
)
_APPLICATIONS_ALL = (
    _application("redis", "redis, half resident", "a request", figures={"redis_get": ("ns", "request_p99_ns"),
                 "redis_set": ("ns", "request_p99_ns")}),
    _application("sort", "sort of lines, pipe to pipe", "4 KiB of lines"),
    _application("sqlite", "SQLite in memory", "a row"),
    _application("numpy", "NumPy array", "a page"),
    _application("gc", "Python objects, full collections", "an object"),
    _application(
        "compile",
        "make -j2 of binutils' libraries",
        "the whole run",
        memory_mib=96,
        working_set=2.0,
        figures={"compile": ("ns", "user_ns", "system_ns")},
        silent=("objects",),
    ),
)  # fmt: skip

QUICK = (_access(25, 75), _usemem(16), _FORK, _teardown(0, "teardown of swapped memory"), _FAULT_POOL, _PAGEOUT)

FULL = (
    _access(100, 200),
    *(_usemem(count) for count in (2, 4, 8, 16)),
    _FORK,
    _teardown(1024, "teardown, 1 GiB swapped"),
    _FAULT_POOL,
    _FAULT_DISK,
    _PAGEOUT,
    _FITS,
    *_APPLICATIONS_ALL,
    Scenario("data-1.2", "data 1.2:1", _SOME, ratio=1.2),
    Scenario("data-3", "data 3:1", _SOME, ratio=3.0),
    Scenario("data-mixed", "a third zero or same-filled", _SOME, zero_percent=25, same_percent=8),
    Scenario("size-1.25", "working set 1.25 M", _SOME, working_set=1.25),
    Scenario("size-4", "working set 4 M", _SOME, working_set=4.0),
)
