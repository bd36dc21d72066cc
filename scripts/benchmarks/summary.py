# SPDX-License-Identifier: MIT
"""summary — arithmetic of the report: medians, spreads, ratios paired by round. No I/O.

A ratio is peer / vswapd of the same round, in time: above 1, vswapd is faster. Rounds in which one of the two is
missing count for nothing.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

Rounds = dict[int, float]  # round -> value

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A median, with the interval that is shown beside it."""

    median: float
    low: float
    high: float
    count: int


def interval(values: list[float]) -> tuple[float, float]:
    """Between two order statistics that hold the true median with 95 % confidence; with fewer than six values no two
    do, and it is the smallest and the largest.
    """
    ordered = sorted(values)
    count = len(ordered)
    drop = 0
    # Outside the k-th smallest to the k-th largest lies the median when fewer than k of the values fall on one side.
    while drop < (count - 1) // 2:
        outside = 2 * sum(math.comb(count, below) for below in range(drop + 2)) / 2**count
        if 1 - outside < _CONFIDENCE:
            break
        drop += 1
    return ordered[drop], ordered[count - 1 - drop]


def spread(values: list[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    low, high = interval(values)
    return Spread(statistics.median(values), low, high, len(values))


def ratios(peer: Rounds, ours: Rounds) -> Rounds:
    """Peer / ours by round."""
    return {number: peer[number] / ours[number] for number in sorted(peer.keys() & ours.keys()) if ours[number] > 0}


def best(peers: list[Rounds]) -> Rounds:
    """The fastest of several peers, round by round, of the rounds that all of them have."""
    if not peers:
        return {}
    common = set.intersection(*(set(peer) for peer in peers))
    return {number: min(peer[number] for peer in peers) for number in sorted(common)}


@dataclass(frozen=True)
class Goal:
    """Ratios to reach, or a time that is not to be passed; None where there is no goal."""

    ram: float | None = None  # against the better of the peers that keep what they swap in RAM
    swap_file: float | None = None
    native: float | None = None
    most_ns: float | None = None


NOT_SLOWER = Goal(1.0, None)

# (phase, figure) of the scenarios 'access' and 'teardown…', else (scenario, phase, figure).
GOALS: dict[tuple[str, ...], Goal] = {
    ("seq_read", "ns"): Goal(5.0, 2.5),
    ("seq_rewrite", "ns"): Goal(3.0, 1.7),
    ("rand_read", "ns"): Goal(2.0, 1.1),
    ("hot", "ns"): Goal(2.0, 1.1),
    ("zipf", "ns"): Goal(2.0, 1.0),
    ("fill", "ns"): Goal(1.8, 1.0),
    ("munmap", "ns"): Goal(1.0, 1.0),
    ("exit", "ns"): Goal(1.0, 1.0),
    ("usemem-16", "usemem", "ns"): Goal(1.8, 1.3),
    ("fault-pool", "fault", "p50_ns"): Goal(round(1 / 1.5, 2), None),
    ("fault-pool", "fault", "p99_ns"): Goal(1.0, None),
    ("fault-disk", "fault", "p50_ns"): Goal(None, round(1 / 1.1, 2)),
    ("fault-disk", "fault", "p99_ns"): Goal(None, None),
    ("fault-disk", "fault", "p999_ns"): Goal(None, None),
    ("pageout", "out_same", "ns"): Goal(1.0, None, None, 1500.0),
    ("redis", "redis_get", "ns"): Goal(1.5, 1.0),
    ("redis", "redis_get", "request_p99_ns"): Goal(1.0, None),
    ("compile", "compile", "ns"): Goal(1.0, 1.0),
    ("compile", "compile", "system_ns"): Goal(1.0, 1.0),
    ("fits", "seq_read", "ns"): Goal(native=0.99),
    ("fits", "rand_read", "ns"): Goal(native=0.99),
    ("fits", "rand_write", "ns"): Goal(native=0.99),
}


def goal_of(scenario: str, phase: str, figure: str) -> Goal:
    """Every other row: not slower than the better of the RAM peers."""
    if (scenario == "access" or scenario.startswith("teardown")) and (phase, figure) in GOALS:
        return GOALS[phase, figure]
    return GOALS.get((scenario, phase, figure), NOT_SLOWER)


@dataclass(frozen=True)
class Row:
    """One line of the table: nanoseconds of each system by round."""

    scenario: str
    phase: str
    figure: str  # ns: the mean of an access; or another field of the phase that ends in _ns
    values: dict[str, Rounds]

    def ratio_to(self, peer: str, ours: str) -> Spread | None:
        """Paired."""
        return spread(list(ratios(self.values.get(peer, {}), self.values.get(ours, {})).values()))

    def ratio_to_best(self, peers: list[str], ours: str) -> Spread | None:
        """Against the faster of several, round by round."""
        present = [self.values[peer] for peer in peers if peer in self.values]
        return spread(list(ratios(best(present), self.values.get(ours, {})).values()))
