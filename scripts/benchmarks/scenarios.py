# SPDX-License-Identifier: MIT
"""scenarios — what is run: arguments of workloads.c, and the rows that come out.

A working set is a multiple of M, the limit of the systems whose pool comes on top of it.
"""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1 << 20

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
    "munmap": "munmap of half",
    "exit": "exit with the rest",
}


@dataclass(frozen=True)
class Scenario:
    """`working_set`: in M. `ratio`: LZ4's, of the pages that are neither zero nor same-filled."""

    name: str
    title: str
    mode: tuple[str, ...]
    working_set: float = 2.0
    ratio: float = 1.6
    zero_percent: int = 0
    same_percent: int = 0
    has_latencies: bool = False  # one random fault, p50 … p999: of its rand_read

    def argv(self, program: str, memory_bytes: int) -> list[str]:
        """The command, for M = `memory_bytes`."""
        options = {
            "--mib": max(1, round(memory_bytes * self.working_set / _MIB)),
            "--ratio": self.ratio,
            "--zero": self.zero_percent,
            "--same": self.same_percent,
        }
        words = [str(word) for item in options.items() for word in item]
        return [program, *words, *self.mode]

    def working_set_bytes(self, memory_bytes: int) -> int:
        """For M = `memory_bytes`."""
        return int(memory_bytes * self.working_set)

    def estimated_pool_bytes(self, memory_bytes: int) -> int:
        """Where no peer's pool can be measured: what does not fit, compressed, and a twentieth of overhead."""
        excess = max(0, self.working_set_bytes(memory_bytes) - memory_bytes)
        data = 1 - (self.zero_percent + self.same_percent) / 100
        return int(excess * data / self.ratio * 1.05)


def row_title(phase: str) -> str:
    """What people call a phase."""
    return _TITLES.get(phase, phase)


_ALL = (
    "fill,seq_read,seq_rewrite,rand_read:{half},rand_write:{half},hot:{full},zipf:{full},stride:{half},chase:{half},"
    "verify"
)
_SOME = "fill,seq_read,seq_rewrite,rand_read:50,verify"


def _access(**percent: int) -> tuple[str, ...]:
    return ("access", _ALL.format(**percent))


_TEARDOWN = Scenario("teardown", "teardown of swapped memory", ("teardown",))
_FORK = Scenario("fork", "process with swapped memory forks 20 children", ("fork", "20"))
_USEMEM_16 = Scenario("usemem-16", "usemem shape, 16 processes", ("usemem", "16"))

QUICK = (
    Scenario("access", "one process, 1.6:1", _access(half=25, full=75), has_latencies=True),
    _USEMEM_16,
    _FORK,
    _TEARDOWN,
)

FULL = (
    Scenario("access", "one process, 1.6:1", _access(half=100, full=200), has_latencies=True),
    *(Scenario(f"usemem-{count}", f"usemem shape, {count} processes", ("usemem", str(count))) for count in (2, 4)),
    _USEMEM_16,
    _FORK,
    _TEARDOWN,
    Scenario("data-1.2", "data 1.2:1", ("access", _SOME), ratio=1.2),
    Scenario("data-3", "data 3:1", ("access", _SOME), ratio=3.0),
    Scenario("data-mixed", "a third zero or same-filled", ("access", _SOME), zero_percent=25, same_percent=8),
    Scenario("size-1.25", "working set 1.25 M", ("access", _SOME), working_set=1.25),
    Scenario("size-4", "working set 4 M", ("access", _SOME), working_set=4.0),
)
