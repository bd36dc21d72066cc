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
    """Ratios to reach; None where there is no goal."""

    ram: float | None = None
    swap_file: float | None = None


# (phase, figure) of the scenario 'access', else (scenario, figure).
GOALS = {
    ("seq_read", "ns"): Goal(5.0, 2.5),
    ("seq_rewrite", "ns"): Goal(3.0, 1.7),
    ("rand_read", "ns"): Goal(2.0, 1.1),
    ("hot", "ns"): Goal(2.0, 1.1),
    ("zipf", "ns"): Goal(2.0, 1.0),
    ("fill", "ns"): Goal(1.8, 1.0),
    ("usemem-16", "ns"): Goal(1.8, 1.3),
    ("munmap", "ns"): Goal(1.0, 1.0),
    ("exit", "ns"): Goal(1.0, 1.0),
    ("rand_read", "p50_ns"): Goal(round(1 / 1.5, 2), None),
    ("rand_read", "p99_ns"): Goal(1.0, None),
}


def goal_of(scenario: str, phase: str, figure: str) -> Goal:
    """Every other row: not slower than the better of the RAM peers."""
    if scenario in ("access", "teardown") and (phase, figure) in GOALS:
        return GOALS[phase, figure]
    return GOALS.get((scenario, figure), Goal(1.0, None))


@dataclass(frozen=True)
class Row:
    """One line of the table: nanoseconds of each system by round."""

    scenario: str
    phase: str
    figure: str  # ns, p50_ns, p99_ns, p999_ns
    values: dict[str, Rounds]

    def ratio_to(self, peer: str, ours: str) -> Spread | None:
        """Paired."""
        return spread(list(ratios(self.values.get(peer, {}), self.values.get(ours, {})).values()))

    def ratio_to_best(self, peers: list[str], ours: str) -> Spread | None:
        """Against the faster of several, round by round."""
        present = [self.values[peer] for peer in peers if peer in self.values]
        return spread(list(ratios(best(present), self.values.get(ours, {})).values()))
