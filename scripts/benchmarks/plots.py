# SPDX-License-Identifier: MIT
"""plots — the report as PNG files, where matplotlib is installed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from benchmarks.scenarios import row_title
from benchmarks.summary import spread
from benchmarks.table import NATIVE, OURS, RAM_PEERS, SWAP_FILE, title_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.session import ScenarioResult

_SYSTEMS = (OURS, *RAM_PEERS, SWAP_FILE, NATIVE)
_COLOURS = dict(zip(_SYSTEMS, ("#0072b2", "#d55e00", "#e69f00", "#777777", "#009e73"), strict=True))
_SIZE_PHASES = ("seq_read", "seq_rewrite", "rand_read")


def _ratios(pyplot: Any, results: Sequence[ScenarioResult]) -> Any:
    """Bars: how many times faster, with intervals; 1 is a line."""
    labelled = [
        (f"{title_of(row)}\n{result.scenario.name}", row)
        for result in results
        for row in result.rows()
        if OURS in row.values
    ]
    peers = [peer for peer in _SYSTEMS[1:] if any(peer in row.values for _, row in labelled)]
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.45 * len(labelled)))
    height = 0.8 / max(1, len(peers))
    for index, peer in enumerate(peers):
        for place, (_, row) in enumerate(labelled):
            ratio = row.ratio_to(peer, OURS)
            if ratio is None:
                continue
            error = [[max(0.0, ratio.median - ratio.low)], [max(0.0, ratio.high - ratio.median)]]
            label = None if peer in axes.get_legend_handles_labels()[1] else peer
            axes.barh(
                place + (index - (len(peers) - 1) / 2) * height,
                ratio.median,
                height,
                xerr=error,
                color=_COLOURS[peer],
                label=label,
                error_kw={"elinewidth": 0.8},
            )
    axes.set_yticks(range(len(labelled)), [label for label, _ in labelled], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("times faster than the peer at equal total memory (paired rounds)")
    axes.legend(loc="upper right")
    return figure


def _latencies(pyplot: Any, shown: Sequence[tuple[ScenarioResult, str]]) -> Any:
    """Which part of the accesses of a phase took longer than x."""
    figure, all_axes = pyplot.subplots(1, len(shown), figsize=(6 * len(shown), 4.5), squeeze=False)
    for axes, (result, phase) in zip(all_axes[0], shown, strict=True):
        for system in _SYSTEMS:
            counts: dict[int, int] = {}
            for run in result.outcomes.get(system, {}).values():
                for bound_ns, count in run.phases.get(phase, {}).get("histogram", []):
                    counts[bound_ns] = counts.get(bound_ns, 0) + count
            total = left = sum(counts.values())
            points = []
            for bound_ns in sorted(counts):
                points.append((bound_ns / 1000, left / total))
                left -= counts[bound_ns]
            if points:
                axes.step(*zip(*points, strict=True), where="post", color=_COLOURS[system], label=system)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("µs")
        axes.set_ylabel("part of accesses that took at least as long")
        axes.set_title(f"{result.scenario.title}: {row_title(phase)}", fontsize=9)
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend()
    return figure


def _sizes(pyplot: Any, results: Sequence[ScenarioResult]) -> Any:
    """Accesses a second against the working set, for the scenarios that differ only in that."""
    scenarios = sorted(
        (result for result in results if result.scenario.name == "access" or result.scenario.name.startswith("size-")),
        key=lambda result: result.scenario.working_set,
    )
    figure, all_axes = pyplot.subplots(1, len(_SIZE_PHASES), figsize=(4.5 * len(_SIZE_PHASES), 4))
    for axes, phase in zip(all_axes, _SIZE_PHASES, strict=True):
        for system in _SYSTEMS:
            points = []
            for result in scenarios:
                runs = result.outcomes.get(system, {}).values()
                value = spread([1e9 / run.phases[phase]["ns"] for run in runs if phase in run.phases])
                if value:
                    points.append((result.scenario.working_set, value.median))
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=_COLOURS[system], label=system)
        axes.set_title(phase)
        axes.set_xlabel("working set / M")
        axes.set_ylabel("accesses a second")
        axes.set_yscale("log")
    all_axes[0].legend()
    return figure


def write(results: Sequence[ScenarioResult], directory: str) -> list[str]:
    """Paths of the PNG files. ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figures = {"ratios": _ratios(plt, results)}
    with_latencies = [
        (result, phase)
        for result in results
        for phase, wanted in result.scenario.figures.items()
        if "p999_ns" in wanted and result.outcomes
    ]
    if with_latencies:
        figures["latency"] = _latencies(plt, with_latencies)
    if any(result.scenario.name.startswith("size-") and result.outcomes for result in results):
        figures["sizes"] = _sizes(plt, results)
    paths = []
    for name, figure in figures.items():
        path = os.path.join(directory, f"{name}.png")
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths
