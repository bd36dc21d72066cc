# SPDX-License-Identifier: MIT
"""systems — what the workloads run on: zram, zswap and a swap file of the kernel, and vswapd.

Each run sets its system up, runs one command under its limit, and takes the system down again, so that only one
swap area is on at a time. What a run changes is in the journal before it is changed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.execute import ExecuteError, execute
from vswapd import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.cgroup import Cgroup
    from benchmarks.journal import Change, Journal

_ZSWAP = "/sys/module/zswap/parameters"
_PRIORITY = 32767  # above whatever swap the machine has
_SETTLED_SECONDS = 2.0  # of a command that runs: by then vswapd's processes have shelved what they do not use


@dataclass
class Outcome:
    """One run. `pool_bytes`: most the system kept in RAM beside the limit it was given; `inside_bytes`: most that
    was charged to its cgroup, which for vswapd is all that there is, its daemon too.
    """

    phases: dict[str, dict[str, Any]]
    limit_bytes: int
    pool_bytes: int = 0
    inside_bytes: int = 0
    daemon_bytes: int = 0
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """What every system gets: where changes are noted, the cgroup, a directory on disk, the sizes of swap areas."""

    journal: Journal
    cgroup: Cgroup
    directory: str
    swap_bytes: int
    run_seconds_max: float = math.inf


class System:
    """One system. `is_ram`: a peer that keeps what it swaps in RAM, whose pool decides how much memory all get."""

    name: ClassVar[str]
    is_ram: ClassVar[bool] = False
    is_unlimited: ClassVar[bool] = False  # nothing to compare with under a limit

    def __init__(self, place: Place) -> None:
        self.place = place

    @classmethod
    def missing(cls) -> str:
        """Why the machine does not offer it; '' when it does."""
        return ""

    def describe(self) -> str:
        """Its settings, for the table's footnotes."""
        raise NotImplementedError

    def run(
        self, argv: list[str], limit_bytes: int, on_phase: Callable[[str], None], options: Sequence[str] = ()
    ) -> Outcome:
        """Run a command. `options`: of vswapctl run, for whom it may concern. ExecuteError."""
        raise NotImplementedError


class Native(System):
    """No limit, and nothing is swapped."""

    name = "native"
    is_unlimited = True

    def describe(self) -> str:
        """As the base class says."""
        return "no limit and no swap, for what fits in memory"

    def run(
        self, argv: list[str], limit_bytes: int, on_phase: Callable[[str], None], options: Sequence[str] = ()
    ) -> Outcome:
        """As the base class says."""
        phases, seconds = execute(argv, on_phase, self.place.run_seconds_max)
        return Outcome(phases, 0, seconds=seconds)


# ---- kernel ----


def _read(path: str) -> str:
    with open(path) as file:
        return file.read().strip()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


@contextlib.contextmanager
def _parameters(journal: Journal, values: dict[str, str]) -> Iterator[None]:
    """Files in /proc/sys and /sys with other values, inside the block."""
    changes: list[Change] = []
    try:
        for path, value in values.items():
            changes.append(journal.note("parameter", path=path, was=_read(path), set=value))
            _write(path, value)
        yield
    finally:
        for change in reversed(changes):
            journal.undo(change)


@contextlib.contextmanager
def _swapped_on(journal: Journal, path: str) -> Iterator[None]:
    change = journal.note("swap", path=path)
    try:
        subprocess.run(["swapon", "-p", str(_PRIORITY), path], check=True)
        yield
    finally:
        journal.undo(change)


class _KernelSystem(System):
    page_cluster: ClassVar[int]
    zswap_enabled: ClassVar[str] = "N"

    def parameters(self) -> dict[str, str]:
        """What the kernel is told while it runs."""
        values = {"/proc/sys/vm/page-cluster": str(self.page_cluster)}
        if os.path.exists(f"{_ZSWAP}/enabled"):
            values[f"{_ZSWAP}/enabled"] = self.zswap_enabled
        return values

    def swap_area(self) -> str:
        """Path of a made swap area."""
        raise NotImplementedError

    def before(self) -> None:
        """Just before the command starts."""

    def after(self, outcome: Outcome) -> None:
        """Just after it ended: measure."""

    def run(
        self, argv: list[str], limit_bytes: int, on_phase: Callable[[str], None], options: Sequence[str] = ()
    ) -> Outcome:
        """As the base class says."""
        cgroup = self.place.cgroup
        cgroup.begin(limit_bytes)
        with _parameters(self.place.journal, self.parameters()), _swapped_on(self.place.journal, self.swap_area()):
            self.before()
            killed_before = cgroup.kill_count()
            try:
                phases, seconds = execute(cgroup.command(argv), on_phase, self.place.run_seconds_max)
            except ExecuteError as error:
                if cgroup.kill_count() > killed_before:
                    raise ExecuteError(f"the kernel found no memory in its cgroup and killed it; {error}") from None
                raise
            finally:
                cgroup.end()
                outcome = Outcome({}, limit_bytes, inside_bytes=cgroup.peak_bytes())
                self.after(outcome)
            outcome.phases, outcome.seconds = phases, seconds
        return outcome


class Zram(_KernelSystem):
    """A zram device with lz4."""

    name = "zram-lz4"
    is_ram = True
    page_cluster = 0  # what its users set: reading ahead saves no seeks in RAM

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._number: int | None = None

    @classmethod
    def missing(cls) -> str:
        """As the base class says."""
        if not os.path.exists("/sys/class/zram-control/hot_add"):
            subprocess.run(["modprobe", "zram", "num_devices=0"], check=False, capture_output=True)
        return "" if os.path.exists("/sys/class/zram-control/hot_add") else "the kernel has no zram"

    def describe(self) -> str:
        """As the base class says."""
        return "zram device, lz4, page-cluster 0; pool is mem_used_max of mm_stat"

    @property
    def _directory(self) -> str:
        return f"/sys/block/zram{self._number}"

    def swap_area(self) -> str:
        """As the base class says."""
        if self._number is None:
            change = self.place.journal.note("zram", number=None)
            self._number = int(_read("/sys/class/zram-control/hot_add"))
            self.place.journal.update(change, number=self._number)
            _write(f"{self._directory}/comp_algorithm", "lz4")
            _write(f"{self._directory}/disksize", str(self.place.swap_bytes))
            subprocess.run(["mkswap", f"/dev/zram{self._number}"], check=True, capture_output=True)
        return f"/dev/zram{self._number}"

    def before(self) -> None:
        """As the base class says."""
        _write(f"{self._directory}/mem_used_max", "0")

    def after(self, outcome: Outcome) -> None:
        """As the base class says."""
        words = _read(f"{self._directory}/mm_stat").split()
        outcome.pool_bytes = int(words[4])
        outcome.details["mm_stat"] = words


class _FileSystem(_KernelSystem):
    page_cluster = 3  # the kernel's default

    def swap_area(self) -> str:
        """As the base class says."""
        path = os.path.join(self.place.directory, "swap")
        if not os.path.exists(path):
            with open(path, "xb") as file:
                os.chmod(path, 0o600)
                os.posix_fallocate(file.fileno(), 0, self.place.swap_bytes)
            subprocess.run(["mkswap", path], check=True, capture_output=True)
        return path


class SwapFile(_FileSystem):
    """A swap file and nothing before it."""

    name = "swap-file"

    def describe(self) -> str:
        """As the base class says."""
        return "swap file in /var/tmp, page-cluster 3, caches dropped before each run"

    def before(self) -> None:
        """As the base class says."""
        os.sync()
        _write("/proc/sys/vm/drop_caches", "3")


class Zswap(_FileSystem):
    """The same file, with zswap in front of it."""

    name = "zswap"
    is_ram = True
    zswap_enabled = "Y"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._sampler: _Maximum | None = None
        self.compressor = ""

    @classmethod
    def missing(cls) -> str:
        """As the base class says."""
        return "" if os.path.exists(f"{_ZSWAP}/enabled") else "the kernel has no zswap"

    def describe(self) -> str:
        """As the base class says."""
        compressor = self.compressor or _read(f"{_ZSWAP}/compressor")
        return f"zswap with {compressor} before that file, page-cluster 3; pool is Zswap of /proc/meminfo, sampled"

    def parameters(self) -> dict[str, str]:
        """As the base class says."""
        if not self.compressor:
            self.compressor = self._best_compressor()
        return {
            **super().parameters(),
            f"{_ZSWAP}/compressor": self.compressor,
            f"{_ZSWAP}/max_pool_percent": "50",  # nothing is to reach the file
        }

    def _best_compressor(self) -> str:
        """lz4 where the kernel has it, else its own choice."""
        try:
            with _parameters(self.place.journal, {f"{_ZSWAP}/compressor": "lz4"}):
                return "lz4"
        except OSError:
            return _read(f"{_ZSWAP}/compressor")

    def before(self) -> None:
        """As the base class says."""
        self._sampler = _Maximum(_zswap_bytes)

    def after(self, outcome: Outcome) -> None:
        """As the base class says."""
        assert self._sampler is not None
        outcome.pool_bytes = self._sampler.stop()


def _zswap_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith("Zswap:")), 0)


class _Maximum:
    """The largest value of a function, sampled on a thread until stop()."""

    def __init__(self, function: Callable[[], int], seconds: float = 0.05) -> None:
        self._function = function
        self._seconds = seconds
        self._value = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(self._seconds):
            self._value = max(self._value, self._function())

    def stop(self) -> int:
        """The largest."""
        self._stop.set()
        self._thread.join()
        return self._value


# ---- vswapd ----


class _Footprint:
    """What vswapd's own processes in a cgroup take beside their clients, once they have given up what they started with."""

    def __init__(self, cgroup: Cgroup) -> None:
        self._cgroup = cgroup
        self._from = time.monotonic() + _SETTLED_SECONDS

    def _ours_and_others(self) -> tuple[list[int], list[int]]:
        members = self._cgroup.members()
        ours = [pid for pid in members if processes.comm(pid) in ("vswapctl", "vswapd")]
        return ours, [pid for pid in members if pid not in ours]

    def __call__(self) -> int:
        ours, others = self._ours_and_others()
        total = sum(processes.own_bytes(pid) for pid in ours)
        if time.monotonic() < self._from or not others or not self._ours_and_others()[1]:
            return 0  # what they do before the program and after it takes nothing from it
        return total


class Vswapd(System):
    """`vswapctl run --private`, from the environment that runs this."""

    name = "vswapd"

    def __init__(self, place: Place, vswapctl: str, options: list[str]) -> None:
        super().__init__(place)
        self._vswapctl = vswapctl
        self._options = options

    def describe(self) -> str:
        """As the base class says."""
        spill = "" if any("spill" in option for option in self._options) else ", its usual spill file in /var/tmp"
        counted = "; peak: of all but files, its daemon too, sampled"
        return " ".join(["vswapctl run --private", *self._options]) + spill + counted

    def run(
        self, argv: list[str], limit_bytes: int, on_phase: Callable[[str], None], options: Sequence[str] = ()
    ) -> Outcome:
        """As the base class says."""
        cgroup = self.place.cgroup
        cgroup.begin(None)
        stats = os.path.join(self.place.directory, "stats.json")
        prefix = [self._vswapctl, "run", "--private", "--limit", str(limit_bytes), "--stats", stats]
        command = cgroup.command([*prefix, *self._options, *options, "--", *argv])
        sampler = _Maximum(cgroup.anonymous_bytes)
        footprint = _Maximum(_Footprint(cgroup), 0.5)
        try:
            phases, seconds = execute(command, on_phase, self.place.run_seconds_max)
        finally:
            peak_bytes = sampler.stop()
            daemon_bytes = footprint.stop()
            cgroup.end()
        with open(stats) as file:
            status = json.load(file)
        os.unlink(stats)
        return Outcome(
            phases,
            limit_bytes,
            inside_bytes=peak_bytes,
            daemon_bytes=daemon_bytes or status["daemon_bytes"],  # it was over before it was looked at
            seconds=seconds,
            details={"counters": status["counters"], "latency_us": status["latency_us"], "run": status["run"]},
        )


KERNEL_SYSTEMS: tuple[type[System], ...] = (Zram, Zswap, SwapFile)
NAMES = (*(system.name for system in KERNEL_SYSTEMS), Vswapd.name, Native.name)
