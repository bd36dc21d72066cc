# SPDX-License-Identifier: MIT
"""vswapd's swapoff of a spill file beside the kernel's of a swap file: same pages, same disk, same run, in turns.

Needs root. Puts everything back, also after Ctrl-C. Results: a table, and everything measured in
build/bench/swapoff.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks import stage
from benchmarks.swapoff import Measure
from vswapd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.swapoff import Drain

MIB = stage.MIB
_MAPPED_TIMES = 8


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench-swapoff", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1408, metavar="N", help="of the program (default %(default)s)")
    parser.add_argument("--limit-mib", type=int, default=256, metavar="N", help="at first (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default %(default)s")
    parser.add_argument("--shapes", action="store_true", help="also: 8 times as much mapped; faults during the drain")
    parser.add_argument("--output", metavar="DIRECTORY", default="build/bench", help="default: %(default)s")
    parser.add_argument("--restore", action="store_true", help="put back what a killed run left, and end")
    options = parser.parse_args(arguments)
    if options.limit_mib < 64 or options.mib < 2 * options.limit_mib or options.rounds < 1:
        parser.error("give at least 64 --limit-mib, twice as many --mib, and 1 --rounds")
    return options


def _measure(options: argparse.Namespace, console: Console) -> list[Drain]:
    drains: list[Drain] = []

    def take(drain: Drain) -> None:
        drains.append(drain)
        console.print(
            f"bench-swapoff: {drain.system}, {drain.shape}: {drain.seconds:.2f} s for {format_size(drain.page_bytes)}",
            style="dim",
        )

    with stage.stage((options.mib + 64) * MIB) as (place, program):
        measure = Measure(place, program, stage.vswapctl(), mib=options.mib, limit_mib=options.limit_mib)
        runs: list[Callable[[], Drain]] = [lambda: measure.kernel("plain"), lambda: measure.vswapd("plain")]
        for number in range(options.rounds):
            for run in runs if number % 2 == 0 else runs[::-1]:
                take(run())
            if options.shapes:
                take(measure.vswapd("8 times as much mapped", _MAPPED_TIMES))
                take(measure.vswapd_probed("faults throughout"))
    return drains


def _median(drains: Sequence[Drain], figure: Callable[[Drain], float]) -> float:
    return statistics.median(figure(drain) for drain in drains)


def _report(drains: Sequence[Drain], console: Console) -> None:
    table = Table("system", "shape", "pages", "on disk", "s", "s a GiB", "of the read rate", "p99 before, during")
    groups: dict[tuple[str, str], list[Drain]] = {}
    for drain in drains:
        groups.setdefault((drain.system, drain.shape), []).append(drain)
    for (system, shape), some in groups.items():
        p99_us = [_median(some, lambda drain: drain.p99_us_before), _median(some, lambda drain: drain.p99_us_during)]
        table.add_row(
            system,
            shape,
            format_size(int(_median(some, lambda drain: drain.page_bytes))),
            format_size(int(_median(some, lambda drain: drain.disk_bytes))),
            f"{_median(some, lambda drain: drain.seconds):.2f}",
            f"{_median(some, lambda drain: drain.seconds_per_gib):.2f}",
            f"{part:.0%}" if (part := _median(some, lambda drain: drain.part_of_read_rate)) else "",
            f"{p99_us[0]:.0f} µs, {p99_us[1]:.0f} µs" if p99_us[1] else "",
        )
    console.print(table)
    plain = {name: groups[name, "plain"] for name in ("vswapd", "kernel")}
    ours, kernel = (_median(some, lambda drain: drain.seconds_per_gib) for some in plain.values())
    rate = _median(plain["vswapd"], lambda drain: drain.read_bytes_per_second)
    console.print(
        f"bench-swapoff: medians; {kernel / ours:.1f} times as fast as the kernel (goal: 5, or 80 % of the read rate); "
        f"the disk reads {format_size(int(rate))}/s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    options = _parse(arguments)

    def measure() -> int:
        stage.need((2 * options.mib + 512) * MIB, 4 * options.mib * MIB)
        drains = _measure(options, console)
        _report(drains, console)
        os.makedirs(options.output, exist_ok=True)
        path = os.path.join(options.output, "swapoff.json")
        with open(path, "w") as file:
            json.dump([drain.as_json() for drain in drains], file)
        console.print(f"bench-swapoff: written: {path}")
        return 0

    return stage.run("bench-swapoff", measure, restores=options.restore)


if __name__ == "__main__":
    sys.exit(main())
