# SPDX-License-Identifier: MIT
"""footprint — what a program that holds its memory costs under each system: disk set aside, written and in use; RAM.

Every system gets the same RAM: a limit for the program, and a pool beside it that holds half of what is swapped. The
kernel's zswap can be told its pool in whole percent of the machine's RAM only, so the pool is one percent,
and the program's memory follows from that.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import held, vmstat
from benchmarks.systems import Place, Vswapd, Zram, Zswap
from vswapd import connection

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.systems import System

MIB = 1 << 20
_PAGE_BYTES = 4096
_ZSWAP = "/sys/module/zswap/parameters"


@dataclass(frozen=True)
class Workload:
    """What a program fills its memory with. `pages_bytes`: how much."""

    title: str
    pages_bytes: int
    ratio: float = 3.0
    is_zero: bool = False

    def arguments(self) -> list[str]:
        """For held.c."""
        data = ["--zeros"] if self.is_zero else ["--ratio", str(self.ratio)]
        return ["--mib", str(self.pages_bytes // MIB), *data]


@dataclass(frozen=True)
class Footprint:
    """One system under one workload, all in bytes. `slots`: what is taken of a swap file; `pool`: of `ram`."""

    workload: str
    system: str
    swapped: int
    provisioned: int
    written: int
    in_use: int
    slots: int
    ram: int
    pool: int

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)


def _meminfo_bytes(name: str) -> int:
    with open("/proc/meminfo") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith(f"{name}:")), 0)


def one_percent_bytes() -> int:
    """The least that zswap's pool can be limited to."""
    return _meminfo_bytes("MemTotal") // 100


def _swap_used_bytes(path: str) -> int:
    with open("/proc/swaps") as file:
        lines = [line.split() for line in file.readlines()[1:]]
    return next(int(words[3]) << 10 for words in lines if words[0] == os.path.realpath(path))


def _allocated_bytes(path: str) -> int:
    return os.stat(path).st_blocks * 512 if os.path.exists(path) else 0


class _LimitedZswap(Zswap):
    """Its pool as small as can be, so that the file is reached."""

    def parameters(self) -> dict[str, str]:
        return {**super().parameters(), f"{_ZSWAP}/max_pool_percent": "1"}


class Footprints:
    """Measures. `limit_bytes`: of the program's RAM, `pool_bytes`: beside it."""

    def __init__(self, place: Place, program: str, vswapctl: str, *, limit_bytes: int, pool_bytes: int) -> None:
        self._place = place
        self._program = program
        self._vswapctl = vswapctl
        self._limit_bytes = limit_bytes
        self._pool_bytes = pool_bytes

    def _held(self, system: System, workload: Workload, limit_bytes: int, look: Callable[[int], None]) -> None:
        steps = ("fill", "hold", "verify")
        held.run(system, self._program, workload.arguments(), steps, limit_bytes, {"hold": look})

    def zram(self, workload: Workload) -> Footprint:
        """Everything that is swapped in RAM. ExecuteError."""
        system = Zram(self._place)
        found: list[Footprint] = []

        def look(_: int) -> None:
            area = system.swap_area()
            with open(f"/sys/block/{os.path.basename(area)}/mm_stat") as file:
                pool = int(file.read().split()[2])
            ram = self._place.cgroup.usage_bytes() + pool
            found.append(Footprint(workload.title, system.name, _swap_used_bytes(area), 0, 0, 0, 0, ram, pool))

        self._held(system, workload, self._limit_bytes, look)
        return found[0]

    def zswap(self, workload: Workload) -> Footprint:
        """A swap file with zswap before it. ExecuteError."""
        system = _LimitedZswap(self._place)
        found: list[Footprint] = []
        before = vmstat.count("pswpout")

        def look(_: int) -> None:
            area = system.swap_area()
            written = (vmstat.count("pswpout") - before) * _PAGE_BYTES
            used, pool = _swap_used_bytes(area), _meminfo_bytes("Zswap")
            blocks = _allocated_bytes(area)
            charged = 0 if self._place.cgroup.hierarchy.charges_zswap else pool
            ram = self._place.cgroup.usage_bytes() + charged
            found.append(Footprint(workload.title, system.name, used, blocks, written, blocks, used, ram, pool))

        limit_bytes = self._limit_bytes
        if self._place.cgroup.hierarchy.charges_zswap:
            limit_bytes += self._pool_bytes
        self._held(system, workload, limit_bytes, look)
        return found[0]

    def vswapd(self, workload: Workload) -> Footprint:
        """Ours. ExecuteError."""
        spill = os.path.join(self._place.directory, "spill")
        options = ["--pool", str(self._pool_bytes), "--spill", f"{spill}:{self._place.swap_bytes}"]
        system = Vswapd(self._place, self._vswapctl, options)
        found: list[Footprint] = []

        def look(pid: int) -> None:
            with connection.connect_serving(pid, None) as daemon:
                status = daemon.request("status")["status"]
            group = status["groups"][0]
            swapped = sum(status[f"{kind}_pages"] for kind in ("zero", "same", "pool", "spill")) * _PAGE_BYTES
            written = sum(backend["written_bytes"] for backend in status["backends"])
            ram = group["usage_bytes"] + status["daemon_bytes"]
            blocks = _allocated_bytes(spill)
            pool = group["pool_bytes"]
            found.append(Footprint(workload.title, system.name, swapped, 0, written, blocks, blocks, ram, pool))

        self._held(system, workload, self._limit_bytes + self._pool_bytes, look)
        os.unlink(spill)
        return found[0]


def write_json(path: str, footprints: list[Footprint]) -> None:
    """For whoever wants to draw them."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump([footprint.as_json() for footprint in footprints], file)


def missing_systems() -> list[str]:
    """Why the kernel does not offer a peer."""
    return [f"without {system.name}: {reason}" for system in (Zram, Zswap) if (reason := system.missing())]
