# SPDX-License-Identifier: MIT
"""What a program costs in disk and RAM under zram, zswap with a swap file, and vswapd: same work, same RAM for it.

Needs root. Three workloads: data that compresses 3 : 1, half of which stays in the pool; what never leaves the pool;
zeros. Puts everything back, also after Ctrl-C. Results: tables, and the same in build/bench/footprint.json.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks import footprint, stage
from benchmarks.footprint import Footprints, Workload
from vswapd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.footprint import Footprint

MIB = stage.MIB
_RATIO = 3
_RESIDENT_BYTES = 128 * MIB
_POOL_BYTES_MAX = 512 * MIB  # else the program would be larger than anybody has time for


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/showcase-disk", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", metavar="DIRECTORY", default="build/bench", help="default: %(default)s")
    parser.add_argument("--restore", action="store_true", help="put back what a killed run left, and end")
    return parser.parse_args(arguments)


def _workloads(pool_bytes: int) -> list[Workload]:
    """Twice as much as the pool holds; half of what it holds; zeros."""
    held = pool_bytes * _RATIO // MIB * MIB
    return [
        Workload("3 : 1, half of it in the pool", _RESIDENT_BYTES + 2 * held),
        Workload("3 : 1, never leaves RAM", _RESIDENT_BYTES + held // 2),
        Workload("all zero", _RESIDENT_BYTES + held // 2, is_zero=True),
    ]


def _table(title: str, footprints: Sequence[Footprint]) -> Table:
    columns = ("system", "swapped", "disk provisioned", "disk written", "disk in use", "RAM in use", "of it pool")
    table = Table(*columns, title=title, title_justify="left")
    for one in footprints:
        in_use = format_size(one.in_use)
        if one.slots != one.in_use:
            in_use += f" ({format_size(one.slots)} in slots)"
        figures = (one.swapped, one.provisioned, one.written)
        table.add_row(one.system, *map(format_size, figures), in_use, format_size(one.ram), format_size(one.pool))
    return table


def _verdicts(footprints: Sequence[Footprint]) -> list[str]:
    """The goals, one a line, for the workload that is written back."""
    by_name = {(one.workload, one.system): one for one in footprints}
    title = footprints[0].workload
    ours, peer = by_name[title, "vswapd"], by_name.get((title, "zswap"))
    lines = []
    if peer:
        lines += [
            f"{1 - ours.in_use / peer.slots:.0%} less disk in use than zswap has slots taken (goal: 60 %)",
            f"{1 - ours.written / peer.written:.0%} fewer bytes written (goal: 50 %)"
            if peer.written
            else "zswap wrote nothing",
        ]
    others = [one for one in footprints if one.system == "vswapd" and one is not ours]
    lines += [f"{one.workload}: {one.in_use} bytes of disk, {one.pool} bytes of pool" for one in others]
    return lines


def _measure(options: argparse.Namespace, console: Console) -> int:
    pool_bytes = footprint.one_percent_bytes()
    if pool_bytes > _POOL_BYTES_MAX:
        raise stage.StageError(
            f"zswap's pool is at least 1 % of the RAM, {format_size(pool_bytes)} here, which no small program fills; "
            "measure on a machine with less"
        )
    workloads = _workloads(pool_bytes)
    largest = workloads[0].pages_bytes
    stage.need(largest + 512 * MIB, 2 * largest)
    missing = footprint.missing_systems()
    for line in missing:
        console.print(f"showcase-disk: {line}")
    footprints: list[Footprint] = []
    with stage.stage((largest - _RESIDENT_BYTES) * 11 // 10 // MIB * MIB) as (place, program):
        sizes = {"limit_bytes": _RESIDENT_BYTES, "pool_bytes": pool_bytes}
        measure = Footprints(place, program, stage.vswapctl(), **sizes)
        named = {"zram-lz4": measure.zram, "zswap": measure.zswap, "vswapd": measure.vswapd}
        for workload in workloads:
            for name, run in named.items():
                if any(line.startswith(f"without {name}:") for line in missing):
                    continue
                console.print(f"showcase-disk: {workload.title}, {name}", style="dim")
                footprints.append(run(workload))
    for workload in workloads:
        console.print(_table(workload.title, [one for one in footprints if one.workload == workload.title]))
    for verdict in _verdicts(footprints):
        console.print(f"showcase-disk: {verdict}")
    path = f"{options.output}/footprint.json"
    footprint.write_json(path, footprints)
    console.print(f"showcase-disk: written: {path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _parse(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    return stage.run("showcase-disk", lambda: _measure(options, console), restores=options.restore)


if __name__ == "__main__":
    sys.exit(main())
