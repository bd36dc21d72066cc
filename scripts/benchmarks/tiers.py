# SPDX-License-Identifier: MIT
"""tiers — what a program's accesses cost on pool, fast file and slow device, after its hot set has moved, and on pool
and fast file alone.

Each run fills memory, uses one hot set until nothing changes any more, then another one, until nothing changes any
more; only then accesses are counted. Where pages are meanwhile is asked of the daemon.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks import held
from benchmarks.execute import ExecuteError, execute
from benchmarks.slow import Throttle, loop_device
from benchmarks.systems import Outcome, Place, System
from vswapd import connection
from vswapd.failure import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MIB = 1 << 20
_GROUP = "tiers"
_WINDOW_SECONDS = 2.0
_WINDOWS_ALIKE = 3  # on either side
_ALIKE = 0.02
_FEW = 0.05  # pages that move up, of all that are waited for
_SETTLE_SECONDS_MAX = 240.0
_ANSWER_SECONDS_MAX = 30.0
_COUNTED = ("faults", "faults_spill", "promoted_pages", "demoted_pages", "spill_written_pages")


@dataclass(frozen=True)
class Sizes:
    """Of one comparison. `limit_mib` is of RAM and pool; fast and slow of what is stored there, compressed."""

    mib: int
    limit_mib: int
    hot_mib: int
    hot_permille: int
    fast_mib: int
    slow_mib: int
    slow_mib_per_second: int
    measured_seconds: float


@dataclass(frozen=True)
class Look:
    """What the daemon says at one time: counters, and of each backend bytes that live there and bytes read."""

    seconds: float
    counters: dict[str, int]
    live_bytes: dict[str, int]
    read_bytes: dict[str, int]


@dataclass(frozen=True)
class Run:
    """One run. By tier: `live_mib` at the end of the measured phase, `read_mib` during it. `moved`: pages from when the
    hot set moved until it was measured.
    """

    system: str
    accesses_per_second: float
    fault_p50_us: float
    fault_p99_us: float
    settle_seconds: float
    is_settled: bool
    moved: dict[str, int]
    measured: dict[str, int]
    live_mib: dict[str, float]
    read_mib: dict[str, float]
    share_of_slow: list[float] = field(default_factory=list)  # of what is read, a window each, after the move

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)


def _differences(before: Look, after: Look) -> dict[str, int]:
    return {name: after.counters[name] - before.counters[name] for name in _COUNTED}


class TieredVswapd(System):
    """A vswapd with a configuration: a fast file, and a slow device below it if `is_tiered`, else all of it fast."""

    name: ClassVar[str] = "vswapd"

    def __init__(self, place: Place, vswapctl: str, sizes: Sizes, throttle: Throttle, *, is_tiered: bool) -> None:
        super().__init__(place)
        self._vswapctl = vswapctl
        self._sizes = sizes
        self._throttle = throttle
        self._is_tiered = is_tiered
        self._socket = os.path.join(place.directory, "socket")
        self._fast = os.path.join(place.directory, "fast")
        self._device = ""

    def describe(self) -> str:
        """As the base class says."""
        sizes = self._sizes
        if not self._is_tiered:
            return f"pool, fast file of {sizes.fast_mib + sizes.slow_mib} MiB"
        return (
            f"pool, fast file of {sizes.fast_mib} MiB, device of {sizes.slow_mib} MiB that reads and writes "
            f"{sizes.slow_mib_per_second} MiB/s"
        )

    def look(self) -> Look:
        """What there is now. Failure."""
        with connection.open_connection(self._socket) as daemon:
            status = daemon.request("status")["status"]
        named = {"slow" if entry["path"] == self._device else "fast": entry for entry in status["backends"]}
        return Look(
            time.monotonic(),
            {name: status["counters"][name] for name in _COUNTED},
            {name: entry["live_bytes"] for name, entry in named.items()},
            {name: entry["read_bytes"] for name, entry in named.items()},
        )

    def _write_configuration(self) -> str:
        sizes = self._sizes
        fast_mib = sizes.fast_mib + (0 if self._is_tiered else sizes.slow_mib)
        text = (
            f'[daemon]\nsocket = "{self._socket}"\ntiers = {str(self._is_tiered).lower()}\n'
            f'[[backend]]\npath = "{self._fast}"\nsize = "{fast_mib}M"\npriority = 10\n'
        )
        if self._is_tiered:
            text += f'[[backend]]\npath = "{self._device}"\nsize = "{sizes.slow_mib}M"\npriority = 0\n'
        text += f'[[group]]\nname = "{_GROUP}"\nlimit = "{sizes.limit_mib}M"\n'
        path = os.path.join(self.place.directory, "vswapd.conf")
        with open(path, "w") as file:
            file.write(text)
        return path

    @contextlib.contextmanager
    def _slow_device(self) -> Iterator[None]:
        if not self._is_tiered:
            yield
            return
        path = os.path.join(self.place.directory, "slow")
        rate = self._sizes.slow_mib_per_second * MIB
        with loop_device(self.place.journal, path, self._sizes.slow_mib * MIB) as device:
            self._device = device
            with self._throttle.limited(device, rate):
                yield

    @contextlib.contextmanager
    def _daemon(self) -> Iterator[None]:
        """Serving, inside the block. ExecuteError."""
        log_path = os.path.join(self.place.directory, "log")
        program = str(Path(self._vswapctl).with_name("vswapd"))
        argv = self.place.cgroup.command(
            self._throttle.command([program, "--config", self._write_configuration()])
        )
        with open(log_path, "w+") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
            try:
                deadline = time.monotonic() + _ANSWER_SECONDS_MAX
                while not self._answers():
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise ExecuteError(f"vswapd does not serve: {log.read().strip()[-500:]}")
                    time.sleep(0.05)  # nothing tells when
                yield
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_ANSWER_SECONDS_MAX)
                self.place.cgroup.end()

    def _answers(self) -> bool:
        try:
            self.look()
        except (Failure, OSError):
            return False
        return True

    def run(
        self, argv: list[str], limit_bytes: int, on_phase: Callable[[str], None], options: Sequence[str] = ()
    ) -> Outcome:
        """As the base class says."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._fast)
        self.place.cgroup.begin(None)
        with self._slow_device(), self._daemon():
            command = [self._vswapctl, "run", "--socket", self._socket, "--group", _GROUP, *options, "--", *argv]
            phases, seconds = execute(command, on_phase, self.place.run_seconds_max)
        return Outcome(phases, limit_bytes, seconds=seconds)


class Measure:
    """Runs of one comparison."""

    def __init__(self, place: Place, program: str, vswapctl: str, sizes: Sizes) -> None:
        self._sizes = sizes
        self._program = program
        throttle = Throttle(place.journal, place.cgroup)
        self.systems = {
            name: TieredVswapd(place, vswapctl, sizes, throttle, is_tiered=name == "tiers")
            for name in ("tiers", "fast only")
        }

    def run(self, name: str) -> Run:
        """One. ExecuteError, also for a wrong page."""
        system, sizes = self.systems[name], self._sizes
        looks: list[Look] = []
        shares: list[float] = []
        settled: list[tuple[float, bool]] = []

        def settle(_: int) -> None:
            looks.append(system.look())
            shares.clear()
            settled.append(_settle(system, shares))

        def measure(_: int) -> None:
            looks.append(system.look())
            time.sleep(sizes.measured_seconds)
            looks.append(system.look())

        arguments = ["--mib", str(sizes.mib), "--ratio", "1.6", "--hot-mib", str(sizes.hot_mib)]
        arguments += ["--hot-permille", str(sizes.hot_permille)]
        steps = {"hot0": settle, "hot1_moves": settle, "hot1": measure}
        outcome = held.run(
            system, self._program, arguments, ("fill", *steps, "verify"), sizes.limit_mib * MIB, steps
        )
        moved, begin, end = looks[1:4]
        measured = outcome.phases["hot1"]
        return Run(
            name,
            measured["accesses"] / measured["seconds"],
            measured["p50_ns"] / 1000,
            measured["p99_ns"] / 1000,
            *settled[1],
            _differences(moved, begin),
            _differences(begin, end),
            {tier: live / MIB for tier, live in end.live_bytes.items()},
            {tier: (end.read_bytes[tier] - begin.read_bytes[tier]) / MIB for tier in end.read_bytes},
            list(shares),
        )


def _settle(system: TieredVswapd, shares: list[float]) -> tuple[float, bool]:
    """Wait until what the daemon says is the same in one half of some windows as in the other. How long that took, and
    whether it is.
    """
    started = time.monotonic()
    looks = [system.look()]
    while looks[-1].seconds < started + _SETTLE_SECONDS_MAX:
        time.sleep(_WINDOW_SECONDS)
        looks.append(system.look())
        shares.append(_share_of_slow(*looks[-2:]))
        if len(looks) > 2 * _WINDOWS_ALIKE and _are_alike(*looks[-2 * _WINDOWS_ALIKE - 1 :: _WINDOWS_ALIKE]):
            return time.monotonic() - started, True
    return time.monotonic() - started, False


def _share_of_slow(before: Look, after: Look) -> float:
    read = {tier: after.read_bytes[tier] - before.read_bytes[tier] for tier in after.read_bytes}
    return read.get("slow", 0) / max(1, sum(read.values()))


def _are_alike(begin: Look, middle: Look, end: Look) -> bool:
    """As many pages go up, and down, as did, of those that fault; as much is read from the slow one; not much moves."""
    halves = [(begin, middle), (middle, end)]
    of_faults = [
        {name: count / max(1, found["faults_spill"]) for name, count in found.items()}
        for found in (_differences(*half) for half in halves)
    ]
    return (
        all(abs(of_faults[1][name] - of_faults[0][name]) <= _ALIKE for name in ("promoted_pages", "demoted_pages"))
        and abs(_share_of_slow(*halves[1]) - _share_of_slow(*halves[0])) <= _ALIKE
        and of_faults[1]["promoted_pages"] <= _FEW
    )
