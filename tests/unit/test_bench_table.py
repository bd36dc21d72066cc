# SPDX-License-Identifier: MIT
"""The report of scripts/bench: readable on 80 columns; a run that is resumed goes on where it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from benchmarks import scaling, scenarios, table
from benchmarks.applications import missing
from benchmarks.scenarios import Scenario
from benchmarks.session import ScenarioResult, as_json, from_json
from benchmarks.summary import Spread
from benchmarks.systems import Outcome

M = 256 << 20


def phases_of(scenario: Scenario, factor: float) -> dict[str, dict[str, Any]]:
    """Every row that there can be."""
    names = {"redis_get": ["ns", "request_p99_ns"]}
    figures = dict.fromkeys(scenarios._TITLES, ("ns",)) | dict(scenario.figures) | names
    return {phase: dict.fromkeys(fields, 987654.0 * factor) for phase, fields in figures.items()}


def result_of(scenario: Scenario) -> ScenarioResult:
    result = ScenarioResult(scenario, M, total_bytes=M * 2)
    names = scenario.systems or ("zram-lz4", "zswap", "swap-file", "vswapd")
    for index, system in enumerate(names):
        for number in range(7):
            factor = (index + 1) * (1 + number / 5) * (1000 if number == 6 else 1)
            outcome = Outcome(phases_of(scenario, factor), M, M // 2, M, 30 << 20, 1.0)
            result.add(system, number, outcome)
    return result


def lines_of(results: list[ScenarioResult], width: int) -> list[str]:
    console = Console(width=width, record=True, file=None, highlight=False, quiet=False)
    with console.capture() as capture:
        console.print(table.report(results, ["a note"]))
    return capture.get().splitlines()


@pytest.mark.parametrize("scenario", scenarios.FULL, ids=lambda scenario: scenario.name)
def test_nothing_is_cut_on_80_columns(scenario: Scenario) -> None:
    lines = lines_of([result_of(scenario)], 80)
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]
    assert len([line for line in lines if "×" in line or "µs" in line or " ms" in line or " s " in line]) > 5


def test_every_scenario_has_a_title_for_its_rows() -> None:
    assert all(row_title != phase for phase, row_title in scenarios._TITLES.items())
    assert len({scenario.name for scenario in scenarios.FULL}) == len(scenarios.FULL)


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(38.0, "0.038 µs"), (7210.0, "7.21 µs"), (72100.0, "72.1 µs"), (1.5e6, "1.50 ms"), (12.34e9, "12.3 s")],
)
def test_times_have_their_unit(nanoseconds: float, text: str) -> None:
    assert table.format_time(nanoseconds) == text


def test_slower_is_said_only_when_the_whole_interval_says_so() -> None:
    assert table.verdict(Spread(2.0, 1.0, 3.0, 7), 1.8) == "1.8 ✓"
    assert table.verdict(Spread(0.9, 0.8, 1.1, 7), 1.0) == "1 ✗"
    assert table.verdict(Spread(0.9, 0.8, 0.95, 7), 1.0) == "1 ✗✗"
    assert table.verdict(None, 1.0) == ""


def test_a_result_that_differs_is_a_failure() -> None:
    scenario = Scenario("x", "x", ("x",))
    result = ScenarioResult(scenario, M)
    result.add("zswap", 0, Outcome({"sort": {"ns": 1.0, "digest": "a"}}, M))
    result.add("vswapd", 0, Outcome({"sort": {"ns": 1.0, "digest": "b"}}, M))
    result.add("vswapd", 1, Outcome({"sort": {"ns": 1.0, "digest": "a", "wrong": 3}}, M))
    assert [failure.partition(": ")[2] for failure in result.failures] == ["wrong result of sort", "wrong data in sort"]
    assert not result.has_round("vswapd", 0)


def test_what_was_measured_is_read_back() -> None:
    result = result_of(scenarios.FULL[0])
    document = json.loads(json.dumps(as_json([result])))[0]
    again = ScenarioResult(result.scenario, M)
    from_json(again, document)
    assert again.outcomes == result.outcomes
    assert again.total_bytes == result.total_bytes
    assert again.has_round("vswapd", 6)
    assert not again.has_round("vswapd", 7)


def test_a_program_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert missing("redis") == "redis-server"
    assert missing("numpy") == ""


def series_of(exponent: float) -> scaling.Series:
    axis = scaling.AXES[0]
    return scaling.Series(axis, {point: {"all_us": 3.0 * point**exponent} for point in axis.points})


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_slope(exponent: float) -> None:
    slope = series_of(exponent).slope("all_us")
    assert slope == pytest.approx(exponent)
    assert series_of(exponent).slope("daemon_us") is None


def test_scaling_fits_80_columns() -> None:
    for axis in scaling.AXES:
        rows = {point: dict.fromkeys(scaling.FIGURES, 1234.5) for point in axis.points}
        assert max(map(len, scaling.table_of(scaling.Series(axis, rows)))) <= 80
