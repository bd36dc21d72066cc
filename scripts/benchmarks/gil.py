# SPDX-License-Identifier: MIT
"""gil — is there any Python on the hot path? A program that swaps, with its daemon's GIL held and not, in turns.

The rate of such a program drifts, so each time the GIL is held for is compared with the free times just before and
just after it.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

_TESTS = Path(__file__).resolve().parent.parent.parent / "tests"
sys.path.insert(0, str(_TESTS))

from support.sampler import ControlClient, answering_pid

from benchmarks.build import build
from benchmarks.execute import ExecuteError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROGRAM_MIB = 96
_LIMIT_MIB = 48
_SETTLE_SECONDS = 10.0
_HELD_SECONDS = 5.0
_MARGIN_SECONDS = 0.25  # at both ends of a hold: the request is on its way
_FREE_SECONDS = _HELD_SECONDS - 2 * _MARGIN_SECONDS
_START_SECONDS_MAX = 20.0


@dataclass(frozen=True)
class GilResult:
    """Pages verified per second while the GIL was held, and in the free times around: one more of these."""

    held: tuple[float, ...]
    free: tuple[float, ...]

    def ratios(self) -> list[float]:
        """Of each hold, to the mean of what is before and after it."""
        return [rate * 2 / (self.free[i] + self.free[i + 1]) for i, rate in enumerate(self.held)]

    def describe(self) -> str:
        """One line."""
        ratios = self.ratios()
        return (
            f"daemon's GIL held for {_HELD_SECONDS:.0f} s: {statistics.median(ratios):.0%} of the normal rate "
            f"({min(ratios):.0%} to {max(ratios):.0%}, {len(ratios)} times; goal: at least 90 %), "
            f"{statistics.median(self.held):.0f} and {statistics.median(self.free):.0f} pages/s"
        )


def _rate_during(path: str, seconds: float) -> float:
    """Pages verified a second, for `seconds` of real time."""

    def verified() -> int:
        with open(path, "rb") as file:
            return int.from_bytes(file.read(8), "little")

    started, first = time.monotonic(), verified()
    time.sleep(seconds)
    return (verified() - first) / (time.monotonic() - started)


def _evicted_pages(control: ControlClient) -> int:
    return int(control.status(60.0)["counters"]["evicted_pages"])


def _rate_held(socket: str, path: str) -> float:
    """The same while the GIL is held. ExecuteError: it was not, for so long, or the program did not swap."""
    with ControlClient(socket, 60.0) as control, ThreadPoolExecutor(1) as pool:
        evicted_before = _evicted_pages(control)
        answer = pool.submit(control.request, "test-hold-gil", 60.0, ms=int(_HELD_SECONDS * 1000))
        time.sleep(_MARGIN_SECONDS)
        rate = _rate_during(path, _FREE_SECONDS)
        was_held = not answer.done()
        held = answer.result()
        evicted = _evicted_pages(control) - evicted_before
    if not was_held or not held.get("ok"):
        raise ExecuteError(f"the GIL was not held for {_HELD_SECONDS:.0f} s: {held}")
    if evicted < _PROGRAM_MIB << 8:
        raise ExecuteError(f"only {evicted} pages were evicted while the GIL was held: nothing to judge by")
    return rate


@contextlib.contextmanager
def _started(argv: list[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(argv, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def measure(rounds: int) -> GilResult:
    """About ten seconds for each round. ExecuteError, OSError."""
    seconds = round(_SETTLE_SECONDS + (rounds + 1) * 2 * _HELD_SECONDS)
    commands = Path(sys.executable).parent
    held, free = [], []
    with tempfile.TemporaryDirectory(prefix="vswap-bench-") as directory:
        socket, progress = os.path.join(directory, "vswapd.sock"), os.path.join(directory, "progress")
        daemon_argv = [str(commands / "vswapd"), "--socket", socket, "--log-level", "error"]
        argv = [str(commands / "vswapctl"), "run", "--socket", socket, "--limit", f"{_LIMIT_MIB}M", "--"]
        argv += [build(directory, "verify_memory"), "--mib", str(_PROGRAM_MIB), "--kind", "third", "--passes", "1"]
        argv += ["--seconds", str(seconds), "--progress", progress]
        with contextlib.ExitStack() as running:
            running.enter_context(_started(daemon_argv, VSWAPD_TEST_OPERATIONS="1"))
            answering_pid(socket, _START_SECONDS_MAX)
            program = running.enter_context(_started(argv))
            time.sleep(_SETTLE_SECONDS)
            free.append(_rate_during(progress, _FREE_SECONDS))
            for _ in range(rounds):
                held.append(_rate_held(socket, progress))
                free.append(_rate_during(progress, _FREE_SECONDS))
                if program.poll() is not None:
                    raise ExecuteError(f"the program ended too early to judge, with {program.returncode}")
            if program.wait() != 0:
                raise ExecuteError(f"the program ended with {program.returncode}")
    return GilResult(tuple(held), tuple(free))
