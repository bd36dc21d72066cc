# SPDX-License-Identifier: MIT
"""swapoff — how long it takes to have everything back off a disk: the kernel's swapoff of a swap file, and vswapd's of
a spill file, of the same pages on the same disk.

The program fills its memory under a small limit. Then both limits are raised alike, so that there is room for all of
it; caches are dropped; and the time of the command is taken. The kernel drains into RAM, vswapd into its pool.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks import held
from benchmarks.systems import Place, SwapFile, Vswapd
from vswapd import connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.systems import Outcome

MIB = 1 << 20
_READ_BYTES = MIB
_READERS = 2
_PAGE_BYTES = 4096
_PROBE_SECONDS = 0.4  # what is read comes back for good: in some seconds nothing would be left to drain


@dataclass(frozen=True)
class Drain:
    """One swapoff. `read_bytes_per_second`: of the disk, measured on the same file just before; 0: not. What the kernel
    writes to a swap file bypasses the file system, which then reads zeros there without any disk.
    """

    system: str
    shape: str
    page_bytes: int
    disk_bytes: int
    seconds: float
    read_bytes_per_second: float = 0.0
    p99_us_before: float = 0.0
    p99_us_during: float = 0.0

    @property
    def seconds_per_gib(self) -> float:
        """Of pages."""
        return self.seconds * (1 << 30) / self.page_bytes

    @property
    def part_of_read_rate(self) -> float:
        """How near it came to reading what is on the disk as fast as can be; 0: not known."""
        return self.disk_bytes / self.seconds / self.read_bytes_per_second if self.read_bytes_per_second else 0.0

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)


def _drop_caches() -> None:
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def read_rate(path: str, bytes_max: int = 512 * MIB) -> float:
    """Bytes per second of large sequential reads, two under way, past all caches."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    length = min(os.fstat(descriptor).st_blocks * 512, bytes_max)
    buffers = [mmap.mmap(-1, _READ_BYTES) for _ in range(_READERS)]

    def read_all(number: int) -> int:
        offsets = range(number * _READ_BYTES, length, _READERS * _READ_BYTES)
        return sum(os.preadv(descriptor, [buffers[number]], offset) for offset in offsets)

    try:
        with ThreadPoolExecutor(_READERS) as readers:
            started = time.monotonic()
            count = sum(readers.map(read_all, range(_READERS)))
            return count / (time.monotonic() - started)
    finally:
        os.close(descriptor)


class Measure:
    """Drains of one size. `mib`: of memory that is filled, `limit_mib`: under which limit, before it is raised."""

    def __init__(self, place: Place, program: str, vswapctl: str, *, mib: int, limit_mib: int) -> None:
        self._place = place
        self._program = program
        self._vswapctl = vswapctl
        self._mib = mib
        self._limit_bytes = limit_mib * MIB
        self._raised_bytes = (2 * mib + limit_mib) * MIB
        self._spill = os.path.join(place.directory, "spill")

    def _arguments(self, mapped_times: int) -> list[str]:
        return ["--mib", str(self._mib), "--ratio", "1.6", "--mapped-mib", str(self._mib * mapped_times)]

    def kernel(self, shape: str, mapped_times: int = 0) -> Drain:
        """The kernel's. ExecuteError."""
        system = SwapFile(self._place)
        found: list[Drain] = []

        def look(_: int) -> None:
            path = system.swap_area()
            self._place.cgroup.set_limit(self._raised_bytes)
            _drop_caches()
            used = _swap_used_bytes(path)
            started = time.monotonic()
            subprocess.run(["swapoff", path], check=True)
            found.append(Drain("kernel", shape, used, used, time.monotonic() - started))

        steps = ("fill", "hold", "verify")
        held.run(system, self._program, self._arguments(mapped_times), steps, self._limit_bytes, {"hold": look})
        return found[0]

    def vswapd(self, shape: str, mapped_times: int = 0) -> Drain:
        """Ours. ExecuteError."""
        found: list[Drain] = []
        looks = {"hold": lambda pid: found.append(self._drain(pid, shape, self._prepare(pid)))}
        self._run(("fill", "hold", "verify"), looks, mapped_times)
        return found[0]

    def vswapd_probed(self, shape: str) -> Drain:
        """Ours, with a program that faults at random for a while before, and then throughout: from the request to its
        answer, and not while the rate of the same disk is measured.
        """
        rates: list[float] = []
        found: list[Drain] = []
        looks: dict[str, Callable[[int], None]] = {
            "hold": lambda pid: rates.append(self._prepare(pid)),
            "probe_before": lambda _: time.sleep(_PROBE_SECONDS),
            "probe_during": lambda pid: found.append(self._drain(pid, shape, rates[0])),
        }
        outcome = self._run(("fill", *looks, "verify"), looks, 0)
        p99_us = [outcome.phases[f"probe_{when}"]["p99_ns"] / 1000 for when in ("before", "during")]
        return replace(found[0], p99_us_before=p99_us[0], p99_us_during=p99_us[1])

    def _run(self, steps: tuple[str, ...], looks: dict[str, Callable[[int], None]], mapped_times: int) -> Outcome:
        # Half full at most: the shape of the RFC.
        options = ["--spill", f"{self._spill}:{2 * self._mib * MIB}"]
        system = Vswapd(self._place, self._vswapctl, options)
        return held.run(system, self._program, self._arguments(mapped_times), steps, self._limit_bytes, looks)

    def _raise(self, pid: int) -> None:
        subprocess.run(
            [self._vswapctl, "limit", str(pid), str(self._raised_bytes)], check=True, stdout=subprocess.DEVNULL
        )

    def _prepare(self, pid: int) -> float:
        """Make room for all of it. Bytes per second that the disk reads."""
        self._raise(pid)
        _drop_caches()
        return read_rate(self._spill)

    def _drain(self, pid: int, shape: str, rate: float) -> Drain:
        with connection.connect_serving(pid, None) as daemon:
            status = daemon.request("status")["status"]
            started = time.monotonic()
            daemon.request("swapoff", path=self._spill)
            seconds = time.monotonic() - started
        page_bytes, disk_bytes = status["spill_pages"] * _PAGE_BYTES, status["spill_bytes"]
        return Drain("vswapd", shape, page_bytes, disk_bytes, seconds, rate)


def _swap_used_bytes(path: str) -> int:
    with open("/proc/swaps") as file:
        lines = [line.split() for line in file.readlines()[1:]]
    return next(int(words[3]) << 10 for words in lines if words[0] == os.path.realpath(path))
