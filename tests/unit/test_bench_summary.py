# SPDX-License-Identifier: MIT
from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gil import GilResult
from benchmarks.session import order_of
from benchmarks.summary import Row, best, goal_of, interval, ratios, spread
from benchmarks.systems import KERNEL_SYSTEMS, Place, System, Vswapd


@pytest.mark.parametrize(
    ("count", "dropped"),
    # Order statistics of a binomial with 1/2, as in any table: 95 % needs 6 values, and 9 to leave one out each side.
    [(1, 0), (2, 0), (5, 0), (6, 0), (7, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3)],
)
def test_interval_of_the_median(count: int, dropped: int) -> None:
    values = [float(value) for value in range(count)]
    assert interval(values[::-1]) == (dropped, count - 1 - dropped)


@given(st.lists(st.floats(0.1, 1e9), min_size=1, max_size=40))
def test_the_interval_holds_the_median(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert found.count == len(values)


def test_spread_of_nothing() -> None:
    assert spread([]) is None


def test_ratios_are_paired_by_round() -> None:
    # The machine was ten times slower in round 1: pairing sees through that, medians would not.
    peer = {0: 20.0, 1: 200.0, 2: 22.0}
    ours = {0: 10.0, 1: 100.0, 2: 11.0, 3: 5.0}
    assert ratios(peer, ours) == {0: 2.0, 1: 2.0, 2: 2.0}
    assert ratios(peer, {}) == {}
    assert ratios(peer, {0: 0.0}) == {}  # a phase that took no time has no ratio


def test_the_better_peer_is_chosen_in_each_round() -> None:
    assert best([{0: 3.0, 1: 5.0}, {0: 4.0, 1: 2.0, 2: 1.0}]) == {0: 3.0, 1: 2.0}
    assert best([]) == {}


def test_a_row_without_a_peer_has_no_ratio() -> None:
    row = Row("access", "fill", "ns", {"vswapd": {0: 1.0}, "zram-lz4": {0: 3.0}})
    assert row.ratio_to("zswap", "vswapd") is None
    to_zram = row.ratio_to("zram-lz4", "vswapd")
    to_best = row.ratio_to_best(["zram-lz4", "zswap"], "vswapd")
    assert to_zram is not None
    assert to_best is not None
    assert math.isclose(to_zram.median, 3.0)
    assert to_best == to_zram


def test_goals() -> None:
    assert goal_of("access", "seq_read", "ns").ram == 5.0
    assert goal_of("usemem-16", "usemem", "ns").swap_file == 1.3
    assert goal_of("data-3", "seq_read", "ns").ram == 1.0  # any row: not slower


def test_order_alternates(place: Place) -> None:
    systems: list[System] = [kind(place) for kind in KERNEL_SYSTEMS] + [Vswapd(place, "vswapctl", [])]
    orders = [[system.name for system in order_of(systems[::-1], number)] for number in range(8)]
    # The first limits depend on the pools of these.
    assert set(orders[0][:2]) == {"zram-lz4", "zswap"}
    assert orders[1] == orders[0][::-1]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({order[0] for order in orders}) == 4  # everybody was first


@pytest.fixture
def place() -> Place:
    return Place(None, None, "", 0)  # type: ignore[arg-type] # nothing is run


def test_each_hold_of_the_gil_is_compared_with_the_times_around_it() -> None:
    result = GilResult(held=(90.0, 40.0), free=(120.0, 80.0, 80.0))
    assert result.ratios() == [0.9, 0.5]
    assert "70% of the normal rate (50% to 90%, 2 times" in result.describe()
