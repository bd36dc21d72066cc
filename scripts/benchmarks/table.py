# SPDX-License-Identifier: MIT
"""table — the report, for a terminal of 80 columns or a text file.

Each scenario has two tables of columns that never grow: times, then ratios with the goals. Who had how much memory
stands above them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.scenarios import row_title
from benchmarks.summary import Goal, goal_of, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.session import ScenarioResult
    from benchmarks.summary import Row, Spread

OURS = "vswapd"
RAM_PEERS = ["zram-lz4", "zswap"]
SWAP_FILE = "swap-file"
NATIVE = "native"
_MIB = 1 << 20
_TITLE_WIDTH = 22
_TIME_WIDTH = 13
_PEER_WIDTH = 5
_RATIO_WIDTH = 14
_GOAL_WIDTH = 7
_FIGURES = {
    "p50_ns": "p50",
    "p99_ns": "p99",
    "p999_ns": "p999",
    "request_p99_ns": "p99",
    "user_ns": "user time",
    "system_ns": "system time",
}


def title_of(row: Row) -> str:
    """'random read', 'random read, p50'"""
    title = row_title(row.phase)
    return f"{title}, {_FIGURES[row.figure]}" if row.figure in _FIGURES else title


# ---- cells ----


def format_time(nanoseconds: float) -> str:
    """'7.21 µs'"""
    value, unit = nanoseconds / 1000, "µs"
    for larger in ("ms", "s"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    digits = 3 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def _time(value: Spread | None) -> str:
    """'7.21 µs ±12%': the median, and how far the interval reaches at most."""
    if value is None:
        return "–"
    if value.count < 2 or value.median <= 0:
        return format_time(value.median)
    reach = max(value.high - value.median, value.median - value.low) / value.median
    beside = f"{reach:.0%}" if reach < 9.995 else f"{reach:.0f}×" if reach < 99 else ">99×"
    return f"{format_time(value.median)} ±{beside}"


def _number(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _ratio(value: Spread | None) -> str:
    """'3.50 3.25–3.60'"""
    if value is None:
        return "–"
    beside = f" {_number(value.low)}–{_number(value.high)}" if value.count > 1 else ""
    return f"{_number(value.median)}{beside}"


def verdict(value: Spread | None, goal: float | None) -> str:
    """'5 ✓', '5 ✗', or '5 ✗✗': slower than the peer, the whole interval says so."""
    if value is None or goal is None:
        return ""
    if value.median >= goal:
        return f"{goal:g} ✓"
    return f"{goal:g} ✗✗" if value.high < 1 else f"{goal:g} ✗"


def _styled(text: str) -> Text:
    style = "bold red" if text.endswith("✗✗") else "yellow" if text.endswith("✗") else "green"
    return Text(text, style=style)


# ---- tables of a scenario ----


def _systems(result: ScenarioResult) -> list[str]:
    return [name for name in (NATIVE, *RAM_PEERS, SWAP_FILE, OURS) if name in result.outcomes]


def _table(columns: Sequence[tuple[str, int]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, (title, width) in enumerate(columns):
        table.add_column(title, width=width, no_wrap=True, justify="left" if index == 0 else "right")
    return table


def _bytes_over(result: ScenarioResult) -> int:
    """What vswapd took beyond T, and more than a fiftieth of it, in its worst round."""
    runs = result.outcomes.get(OURS, {}).values()
    over = max((run.inside_bytes for run in runs), default=0) - result.total_bytes
    return over if over > result.total_bytes // 50 else 0


def memory_line(result: ScenarioResult) -> str:
    """Who had how much."""
    parts = []
    for system in _systems(result):
        runs = list(result.outcomes[system].values())
        if system == NATIVE:
            continue
        beside = result.daemon_bytes() if system == OURS else result.pool_bytes(system)
        plus = f" + {'daemon' if system == OURS else 'pool'} {beside / _MIB:.0f}" if beside else ""
        inside = max(run.inside_bytes for run in runs) / _MIB
        parts.append(f"{system} {runs[0].limit_bytes / _MIB:.0f}{plus} (peak {inside:.0f})")
    estimated = ", estimated: no peer ran whose pool could be measured" if result.is_estimated else ""
    total = f"T = {result.total_bytes / _MIB:.0f}{estimated}; " if result.total_bytes else ""
    if (over := _bytes_over(result)) > 0:
        parts.append(f"which is {over / _MIB:.0f} MORE than T")
    return f"MiB: working set {result.working_set_bytes / _MIB:.0f}; {total}limits: {', '.join(parts)}"


def time_table(result: ScenarioResult) -> Table:
    """Medians, and how far their intervals reach."""
    systems = _systems(result)
    table = _table([(result.scenario.unit, _TITLE_WIDTH), *((system, _TIME_WIDTH) for system in systems)])
    for row in result.rows():
        table.add_row(title_of(row), *(_time(spread(list(row.values.get(system, {}).values()))) for system in systems))
    return table


def ratio_table(result: ScenarioResult) -> Table:
    """How many times faster than each peer, and the goals."""
    ram_peers = [name for name in RAM_PEERS if name in result.outcomes]
    columns = [("times faster than", _TITLE_WIDTH)]
    columns += [(name.partition("-")[0], _PEER_WIDTH) for name in ram_peers]
    columns += [("better of them", _RATIO_WIDTH), ("goal", _GOAL_WIDTH)] if ram_peers else []
    others = [name for name in (SWAP_FILE, NATIVE) if name in result.outcomes]
    columns += [column for name in others for column in ((name, _RATIO_WIDTH), ("goal", _GOAL_WIDTH))]
    table = _table(columns)
    for row in result.rows():
        goal = goal_of(row.scenario, row.phase, row.figure)
        cells: list[str | Text] = [title_of(row)]
        for peer in ram_peers:
            ratio = row.ratio_to(peer, OURS)
            cells.append(_number(ratio.median) if ratio else "–")
        if ram_peers:
            better = row.ratio_to_best(ram_peers, OURS)
            cells += [_ratio(better), _styled(verdict(better, goal.ram))]
        for name in others:
            ratio = row.ratio_to(name, OURS)
            cells += [_ratio(ratio), _styled(verdict(ratio, goal.swap_file if name == SWAP_FILE else goal.native))]
        table.add_row(*cells)
    return table


def _absolute(result: ScenarioResult) -> list[Text]:
    """Goals that are times."""
    lines = []
    for row in result.rows():
        goal: Goal = goal_of(row.scenario, row.phase, row.figure)
        found = spread(list(row.values.get(OURS, {}).values()))
        if goal.most_ns is not None and found is not None:
            mark = "✓" if found.median <= goal.most_ns else "✗"
            lines.append(_styled(f"{title_of(row)}: {_time(found)}, at most {format_time(goal.most_ns)} {mark}"))
    return lines


def scenario_report(result: ScenarioResult) -> list[object]:
    """Heading, memory, both tables."""
    rounds = f"{result.rounds} round{'s' if result.rounds > 1 else ''}"
    parts: list[object] = [
        Text(f"\n{result.scenario.title} ({result.scenario.name}, {rounds})", style="bold"),
        Text(memory_line(result), style="dim"),
        time_table(result),
    ]
    if OURS in result.outcomes and len(result.outcomes) > 1:
        parts.append(ratio_table(result))
    return [*parts, *_absolute(result)]


def report(results: Sequence[ScenarioResult], notes: Sequence[str]) -> Group:
    """All tables, what failed, and what was set."""
    parts = [part for result in results if result.outcomes for part in scenario_report(result)]
    parts.append(Text(""))
    parts += [Text(f"FAILED {failure}", style="bold red") for result in results for failure in result.failures]
    parts += [Text(f"· {note}") for note in notes]
    return Group(*parts)  # type: ignore[arg-type]
