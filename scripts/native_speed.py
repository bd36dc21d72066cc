# SPDX-License-Identifier: MIT
"""What vswapd costs where there is no pressure: reported, not asserted, for a busy machine proves nothing.

1  a memory-bound program that fits its limit, against the same without vswapctl: median of paired runs,
   and how much of its memory is in huge pages
2  `vswapctl run -- true`: with a private daemon, and against a running one
3  one exec inside `vswapctl run`, against one natively

Last line: everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.limited import command_path
from support.sampler import ControlClient

_JOB = """
import time, numpy
values = numpy.random.default_rng(1).random({count})  # written here, so not part of what is measured
started = time.perf_counter()
for _ in range({rounds}):
    values *= 1.0000001
    values[::512] += 1
    total = float(values.sum())
seconds = time.perf_counter() - started
huge = sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
print(seconds, huge)
"""

_EXECS = """
import os, time
started = time.perf_counter()
for _ in range({count}):
    os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)[1])
print((time.perf_counter() - started) / {count})
"""


def _output(argv: list[str]) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def _seconds(argv: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, check=True)
    return time.perf_counter() - started


def _limited(argv: list[str], *options: str) -> list[str]:
    return [command_path("vswapctl"), "run", *options, "--", *argv]


def memory_bound(mib: int, rounds: int, pairs: int) -> dict[str, float]:
    """Slowdown of a program that fits, in percent."""
    argv = [sys.executable, "-c", _JOB.format(count=mib << 17, rounds=rounds)]
    ratios, huge = [], {"native": 0, "limited": 0}
    for pair in range(pairs):
        seconds = {}
        # Alternating, so that a machine that gets slower or faster favours neither.
        for name in ("native", "limited") if pair % 2 else ("limited", "native"):
            command = argv if name == "native" else _limited(argv, "--private", "--limit", f"{mib * 4}M")
            took, huge_kib = _output(command).split()
            seconds[name] = float(took)
            huge[name] = max(huge[name], int(huge_kib))
        ratios.append(seconds["limited"] / seconds["native"])
    return {
        "slower_percent_median": round((statistics.median(ratios) - 1) * 100, 2),
        "slower_percent_worst": round((max(ratios) - 1) * 100, 2),
        "huge_mib_native": huge["native"] >> 10,
        "huge_mib_limited": huge["limited"] >> 10,
    }


def start_up(runs: int) -> dict[str, float]:
    """Milliseconds of `vswapctl run -- true`, median."""

    def median_ms(argv: list[str]) -> float:
        return round(statistics.median(_seconds(argv) for _ in range(runs)) * 1000, 1)

    figures = {"private_ms": median_ms(_limited(["true"], "--private"))}
    with tempfile.TemporaryDirectory(prefix="vswap-speed-") as directory:
        path = os.path.join(directory, "vswapd.sock")
        daemon = subprocess.Popen(
            [command_path("vswapd"), "--socket", path, "--log-level", "error"], stderr=subprocess.DEVNULL
        )
        try:
            _wait_answering(path, daemon)
            figures["running_ms"] = median_ms(_limited(["true"], "--socket", path))
        finally:
            daemon.terminate()
            daemon.wait()
    return figures


def _wait_answering(path: str, daemon: subprocess.Popen[bytes], seconds_max: float = 20.0) -> None:
    deadline = time.monotonic() + seconds_max
    while True:
        try:
            with ControlClient(path) as control:
                control.request("ping")
            return
        except OSError:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("native-speed: vswapd did not start") from None
            time.sleep(0.02)


def exec_cost(count: int, pairs: int) -> dict[str, float]:
    """Milliseconds of starting /bin/true and waiting for it, and what is added inside."""
    argv = [sys.executable, "-c", _EXECS.format(count=count)]
    native = statistics.median(float(_output(argv)) for _ in range(pairs)) * 1000
    inside = statistics.median(float(_output(_limited(argv, "--private"))) for _ in range(pairs)) * 1000
    return {"native_ms": round(native, 3), "inside_ms": round(inside, 3), "added_ms": round(inside - native, 3)}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="scripts/native-speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="size of the memory-bound program (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=7, help="paired runs (default %(default)s)")
    options = parser.parse_args()
    figures = {
        "memory_bound": memory_bound(options.mib, 20, options.pairs),
        "start_up": start_up(max(3, options.pairs)),
        "exec": exec_cost(200, max(3, options.pairs // 2)),
    }
    memory, start, execs = figures["memory_bound"], figures["start_up"], figures["exec"]
    print(
        f"memory-bound job that fits: {memory['slower_percent_median']:+.1f} % (goal: at most +2 %), huge pages "
        f"{memory['huge_mib_limited']} MiB of {memory['huge_mib_native']} MiB natively"
    )
    print(
        f"vswapctl run -- true: {start['private_ms']} ms private (goal 400), "
        f"{start['running_ms']} ms running (goal 150)"
    )
    print(f"exec inside: {execs['added_ms']:+.3f} ms (goal: at most +1 ms)")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
