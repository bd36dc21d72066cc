# SPDX-License-Identifier: MIT
"""floor — how fast swapping in user space can be here: the steps that cannot be left out, each alone, and their sums.

A figure of the bench that is near its floor cannot be mended by better code of this kind, only by leaving a step out. What is
measured is told in floor.c. The sums leave out all bookkeeping, every lock, whoever else wants the CPU, and the daemon's
memory; and they know beforehand which pages will be needed. So nothing gets there.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, field

from benchmarks.build import build
from benchmarks.execute import ExecuteError

_FILE_BYTES = 64 << 20
_BATCH_PAGES = 64  # pages of one closing of the gate (BATCH_PAGES_MAX)
_CPUS = 2
_PAGES = 131072  # of the bench's working set; half of them fit, if the daemon itself takes no memory


@dataclass(frozen=True)
class Step:
    """As floor.c says it."""

    count: int
    p50_ns: float
    p99_ns: float


@dataclass(frozen=True)
class Sum:
    """A row of the bench: how often each step is in it, for each page. `waited`: the program itself does it, or waits
    for it. `beside`: others may do that, but on the same CPUs.
    """

    title: str
    waited: dict[str, float]
    beside: dict[str, float] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, float]:
        """Both."""
        return {name: self.waited.get(name, 0) + self.beside.get(name, 0) for name in {**self.waited, **self.beside}}

    def us(self, steps: dict[str, Step]) -> float:
        """What the medians add up to, in microseconds, where all CPUs are busy with it all the time."""

        def total(parts: dict[str, float]) -> float:
            return sum(steps[name].p50_ns * times for name, times in parts.items()) / 1000

        return max(total(self.waited), total(self.parts) / _CPUS)


def _zipf_tail(exponent: float) -> float:
    """Of the accesses, what is not to the half of the pages that is used most."""
    weights = [rank**-exponent for rank in range(1, _PAGES + 1)]
    return sum(weights[_PAGES // 2 :]) / sum(weights)


def _random(title: str, misses: float, *, is_written: bool = False) -> Sum:
    """`misses`: of the accesses, with those pages in memory that are used most. While a page is moved out none is given
    back (the gate, csrc/client.h), and the program's next access needs one."""
    out = {"read": misses, "check": misses, "release": misses}
    if is_written:
        out["compress"] = misses
    return Sum(title, {"round_trip_same": misses, "expand": misses, "move": misses}, out)


_IN = {"copy": 1.0, "expand": 1.0}
_OUT = {"move_run": 1.0, "read": 1.0, "check": 1.0, "release": 1.0}

SUMS = (
    Sum("first fill", {"touch": 1}, {name: 0.5 for name in (*_OUT, "compress")}),
    Sum("sequential re-read", {}, {**_IN, **_OUT}),
    Sum("sequential rewrite", {}, {**_IN, **_OUT, "compress": 1}),
    _random("random read", 0.5),
    _random("random write", 0.5, is_written=True),
    _random("hot 80/20 read", 0.2 * (1 - 0.3 / 0.8)),  # 20 of 100 pages are hot, and 30 of the others fit
    _random("Zipf 0.99 read", _zipf_tail(0.99)),
    Sum("one random fault from the pool, p50", {"round_trip_same": 1, "expand": 1}),
    Sum("one random fault from disk, p50", {"round_trip_same": 1, "disk": 1, "expand": 1}),
    Sum(
        "swap-out of an unchanged page",
        {"move": 1, "read": 1, "check": 1, "release": 1, "wake": 2 / _BATCH_PAGES},
    ),
)


def _write_file(path: str) -> None:
    """Noise, and on the disk: a hole would be read from nowhere."""
    with open(path, "wb") as file:
        for _ in range(_FILE_BYTES >> 20):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())


def measure(place: str) -> dict[str, Step]:
    """All steps; some seconds. `place`: a directory on the disk in question. ExecuteError, OSError."""
    with tempfile.TemporaryDirectory(prefix="vswap-floor-", dir=place) as directory:
        path = os.path.join(directory, "noise")
        _write_file(path)
        done = subprocess.run([build(directory, "floor"), path], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise ExecuteError(done.stderr.strip() or f"floor.c ended with {done.returncode}")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return {record.pop("step"): Step(**record) for record in records}


def table_of(steps: dict[str, Step]) -> list[str]:
    """For a terminal."""
    lines = [f"{'step, microseconds':<40} {'p50':>8} {'p99':>10}"]
    lines += [f"{name:<40} {step.p50_ns / 1000:8.2f} {step.p99_ns / 1000:10.2f}" for name, step in steps.items()]
    lines += ["", "floor: what the medians of its steps add up to, microseconds a page"]
    for row in SUMS:
        parts = " + ".join(name if times == 1 else f"{times:.2g} {name}" for name, times in row.parts.items())
        lines += [f"{row.title:<40} {row.us(steps):8.2f}", f"    {parts}"]
    return lines
