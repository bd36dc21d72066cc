# SPDX-License-Identifier: MIT
"""Pool, fast file and a slow device with tiers, beside pool and a fast file of the capacity of both, in turns.

One program on either: a hot set larger than RAM and pool, then another one. Measured when nothing changes any more
after that. The slow device is a loop device that the block controller of a cgroup limits. Needs root. Puts everything
back, also after Ctrl-C. Results: a table, and everything measured in build/bench/tiers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks import stage
from benchmarks.tiers import Measure, Sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.tiers import Run

MIB = stage.MIB
_NAMES = ("tiers", "fast only")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench-tiers", description=(__doc__ or "").splitlines()[0])

    def add(name: str, default: int, text: str) -> None:
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default %(default)s)")

    add("--mib", 768, "of the program")
    add("--limit-mib", 160, "of RAM and pool")
    add("--hot-mib", 320, "of a hot set")
    add("--hot-permille", 990, "of the accesses go there")
    add("--fast-mib", 320, "of the fast file")
    add("--slow-mib", 512, "of the slow device")
    add("--slow-rate-mib", 64, "that it reads, and writes, a second")
    add("--seconds", 10, "that are measured")
    add("--rounds", 3, "of each")
    parser.add_argument("--output", metavar="DIRECTORY", default="build/bench", help="default: %(default)s")
    parser.add_argument("--restore", action="store_true", help="put back what a killed run left, and end")
    options = parser.parse_args(arguments)
    if options.limit_mib < 64 or options.rounds < 1 or not options.limit_mib < options.hot_mib <= options.mib // 2:
        parser.error("give at least 64 --limit-mib, more --hot-mib, twice as many --mib, and 1 --rounds")
    return options


def _measure(options: argparse.Namespace, sizes: Sizes, console: Console) -> list[Run]:
    runs: list[Run] = []
    with stage.stage(0) as (place, program):
        measure = Measure(place, program, stage.vswapctl(), sizes)
        for name in _NAMES:
            console.print(f"bench-tiers: {name}: {measure.systems[name].describe()}", style="dim")
        for number in range(options.rounds):
            for name in _NAMES if number % 2 == 0 else _NAMES[::-1]:
                runs.append(run := measure.run(name))
                console.print(
                    f"bench-tiers: {name}: {run.accesses_per_second:.0f} accesses/s; {run.settle_seconds:.0f} s until "
                    f"{'nothing changed' if run.is_settled else 'it was given up waiting'}",
                    style="dim",
                )
    return runs


def _median(runs: Sequence[Run], figure: Callable[[Run], float]) -> float:
    return statistics.median(figure(run) for run in runs)


def _both(runs: Sequence[Run], figure: Callable[[Run, str], float]) -> str:
    def one(tier: str) -> str:
        return f"{_median(runs, lambda run: figure(run, tier)):.0f}"

    return ", ".join(map(one, ("fast", "slow")))


def _row(name: str, runs: Sequence[Run]) -> list[str]:
    rates = [run.accesses_per_second for run in runs]
    p50_us, p99_us = (_median(runs, figure) for figure in (lambda run: run.fault_p50_us, lambda run: run.fault_p99_us))
    up, down = (
        _median(runs, figure)
        for figure in (lambda run: run.moved["promoted_pages"], lambda run: run.moved["demoted_pages"])
    )
    return [
        name,
        f"{statistics.median(rates):.0f}",
        f"{min(rates):.0f}, {max(rates):.0f}",
        f"{p50_us:.0f}, {p99_us:.0f}",
        f"{up:.0f}, {down:.0f}",
        _both(runs, lambda run, tier: run.live_mib.get(tier, 0)),
        _both(runs, lambda run, tier: run.read_mib.get(tier, 0)),
        f"{_median(runs, lambda run: run.settle_seconds):.0f}",
    ]


def _report(runs: Sequence[Run], console: Console) -> None:
    columns = ("", "accesses/s", "least, most", "fault p50, p99 µs", "up, down until then")
    table = Table(*columns, "MiB on fast, slow", "MiB read there", "s to settle")
    by_name = {name: [run for run in runs if run.system == name] for name in _NAMES}
    for name, some in by_name.items():
        table.add_row(*_row(name, some))
    console.print(table)
    tiers, fast = (_median(some, lambda run: run.accesses_per_second) for some in by_name.values())
    console.print(
        f"bench-tiers: medians; {tiers / fast:.0%} of the accesses a second that there are with all of it fast "
        "(goal: 85 %)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    options = _parse(arguments)
    sizes = Sizes(
        options.mib,
        options.limit_mib,
        options.hot_mib,
        options.hot_permille,
        options.fast_mib,
        options.slow_mib,
        options.slow_rate_mib,
        options.seconds,
    )

    def measure() -> int:
        stage.need((2 * options.limit_mib + 512) * MIB, 2 * (options.fast_mib + options.slow_mib) * MIB)
        runs = _measure(options, sizes, console)
        _report(runs, console)
        os.makedirs(options.output, exist_ok=True)
        path = os.path.join(options.output, "tiers.json")
        with open(path, "w") as file:
            json.dump({"sizes": asdict(sizes), "runs": [run.as_json() for run in runs]}, file)
        console.print(f"bench-tiers: written: {path}")
        return 0

    return stage.run("bench-tiers", measure, restores=options.restore)


if __name__ == "__main__":
    sys.exit(main())
