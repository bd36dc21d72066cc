# SPDX-License-Identifier: MIT
"""table — the report for a terminal or a text file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.scenarios import row_title
from benchmarks.summary import goal_of, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.session import ScenarioResult
    from benchmarks.summary import Row, Spread

OURS = "vswapd"
RAM_PEERS = ["zram-lz4", "zswap"]
SWAP_FILE = "swap-file"
_MIB = 1 << 20
_UNITS = {"usemem": "a page", "fork": "a child", "munmap": "a page", "exit": "a page"}
_FIGURES = {"p50_ns": "one random fault, p50", "p99_ns": "one random fault, p99", "p999_ns": "one random fault, p999"}


def title_of(row: Row) -> str:
    """'random read', 'one random fault, p50'"""
    return _FIGURES.get(row.figure, row_title(row.phase))


def _time(value: Spread | None) -> str:
    """'7.2 (6.9–8.0)', in microseconds."""
    if value is None:
        return "–"
    median, low, high = value.median / 1000, value.low / 1000, value.high / 1000
    digits = 3 if median < 0.1 else 2 if median < 10 else 1 if median < 100 else 0
    beside = f" ({low:,.{digits}f}–{high:,.{digits}f})" if value.count > 1 else ""
    return f"{median:,.{digits}f}{beside}"


def _ratio(value: Spread | None) -> str:
    if value is None:
        return "–"
    beside = f" ({value.low:.2f}–{value.high:.2f})" if value.count > 1 else ""
    return f"{value.median:.2f}{beside}"


def _verdict(value: Spread | None, goal: float | None) -> Text:
    if value is None or goal is None:
        return Text("")
    if value.median >= goal:
        return Text(f"{goal:g} ✓", style="green")
    # Worse than the peer only when the whole interval says so.
    return Text(f"{goal:g} ✗", style="bold red" if value.high < 1 else "yellow")


def _systems(results: Sequence[ScenarioResult]) -> list[str]:
    present = {system for result in results for system in result.outcomes}
    return [name for name in (OURS, *RAM_PEERS, SWAP_FILE) if name in present]


def memory_table(results: Sequence[ScenarioResult], memory_bytes: int) -> Table:
    """Who had how much memory."""
    table = Table(title="memory in MiB: limit + pool beside it (most that was charged to the limit)")
    table.add_column("scenario", no_wrap=True)
    for name in ("rounds", "working set", "T"):
        table.add_column(name, justify="right")
    systems = _systems(results)
    for system in systems:
        table.add_column(system, justify="right")
    for result in results:
        cells = []
        for system in systems:
            runs = list(result.outcomes.get(system, {}).values())
            if not runs:
                cells.append("–")
                continue
            inside = max(run.inside_bytes for run in runs)
            beside = result.daemon_bytes() if system == OURS else result.pool_bytes(system)
            plus = f" + {beside / _MIB:.0f}" if beside else ""
            cells.append(f"{runs[0].limit_bytes / _MIB:.0f}{plus} ({inside / _MIB:.0f})")
        total = f"{result.total_bytes / _MIB:.0f}{'*' if result.is_estimated else ''}"
        working_set = result.scenario.working_set_bytes(memory_bytes) / _MIB
        table.add_row(result.scenario.title, str(result.rounds), f"{working_set:.0f}", total, *cells)
    if any(result.is_estimated for result in results):
        table.caption = "* estimated: no peer ran whose pool could be measured"
    return table


def time_table(results: Sequence[ScenarioResult]) -> Table:
    """Medians and intervals."""
    table = Table(title="µs per page access, child or page freed: median (interval)")
    table.add_column("phase", no_wrap=True)
    systems = _systems(results)
    for system in systems:
        table.add_column(system, justify="right", no_wrap=True)
    for result in results:
        table.add_section()
        table.add_row(Text(result.scenario.title, style="bold"))
        for row in result.rows():
            unit = f", {_UNITS[row.phase]}" if row.phase in _UNITS else ""
            values = [_time(spread(list(row.values.get(system, {}).values()))) for system in systems]
            table.add_row(f"  {title_of(row)}{unit}", *values)
    return table


def ratio_table(results: Sequence[ScenarioResult]) -> Table:
    """How many times faster than each peer, and the goals."""
    table = Table(title="times faster than …: median of paired rounds (interval); 1 is equal, less is slower")
    table.add_column("phase", no_wrap=True)
    peers = [name for name in _systems(results) if name != OURS]
    ram_peers = [name for name in peers if name in RAM_PEERS]
    for peer in peers:
        table.add_column(peer, justify="right", no_wrap=True)
    table.add_column("better of RAM", justify="right", no_wrap=True)
    table.add_column("goal", no_wrap=True)
    table.add_column("goal, file", no_wrap=True)
    for result in results:
        table.add_section()
        table.add_row(Text(result.scenario.title, style="bold"))
        for row in result.rows():
            better = row.ratio_to_best(ram_peers, OURS)
            goal = goal_of(row.scenario, row.phase, row.figure)
            table.add_row(
                f"  {title_of(row)}",
                *[_ratio(row.ratio_to(peer, OURS)) for peer in peers],
                _ratio(better),
                _verdict(better, goal.ram),
                _verdict(row.ratio_to(SWAP_FILE, OURS), goal.swap_file),
            )
    return table


def report(results: Sequence[ScenarioResult], memory_bytes: int, notes: Sequence[str]) -> Group:
    """All tables, what failed, and what was set."""
    done = [result for result in results if result.outcomes]
    parts: list[object] = [memory_table(done, memory_bytes), time_table(done)]
    if any(OURS in result.outcomes for result in done):
        parts.append(ratio_table(done))
    parts += [Text(f"FAILED {failure}", style="bold red") for result in results for failure in result.failures]
    parts += [Text(f"· {note}") for note in notes]
    return Group(*parts)  # type: ignore[arg-type]
