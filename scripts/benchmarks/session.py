# SPDX-License-Identifier: MIT
"""session — rounds of every scenario on every system, in alternating order, with equal total memory.

T = M + the pool of the peers that keep what they swap in RAM; the swap file gets T, vswapd T less what its daemon
costs. The pool is the smaller one where there are two: vswapd gets no byte that a peer did without.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.execute import ExecuteError
from benchmarks.summary import Row
from benchmarks.systems import Outcome, System, Vswapd

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.scenarios import Scenario

_LATENCY_FIGURES = ("p50_ns", "p99_ns", "p999_ns")


@dataclass
class ScenarioResult:
    """`outcomes[system][round]`; `total_bytes` is T, of which `pool_bytes` were measured (or estimated)."""

    scenario: Scenario
    outcomes: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    total_bytes: int = 0
    is_estimated: bool = False

    def rows(self) -> list[Row]:
        """One for each phase, and for one random fault."""
        names = {phase: None for runs in self.outcomes.values() for run in runs.values() for phase in run.phases}
        rows = [self._row(phase, "ns") for phase in names]
        if self.scenario.has_latencies and "rand_read" in names:
            rows += [self._row("rand_read", figure) for figure in _LATENCY_FIGURES]
        return rows

    def _row(self, phase: str, figure: str) -> Row:
        values = {
            system: {number: run.phases[phase][figure] for number, run in runs.items() if phase in run.phases}
            for system, runs in self.outcomes.items()
        }
        return Row(self.scenario.name, phase, figure, values)

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len({number for runs in self.outcomes.values() for number in runs})

    def daemon_bytes(self) -> int:
        """The most that vswapd's daemon cost."""
        return max((run.daemon_bytes for runs in self.outcomes.values() for run in runs.values()), default=0)

    def pool_bytes(self, system: str) -> int:
        """The most that was measured."""
        return max((run.pool_bytes for run in self.outcomes.get(system, {}).values()), default=0)


def order_of(systems: list[System], round_number: int) -> list[System]:
    """The first round starts with the peers whose pools are to be measured; then whoever was first is last, and
    every other round goes backwards, so that no system always runs after the same one.
    """
    first = sorted(systems, key=lambda system: not system.is_ram)
    turn = round_number // 2 % len(first)
    rotated = first[turn:] + first[:turn]
    return rotated[::-1] if round_number % 2 else rotated


class Session:
    """All of it. `on_run(scenario, round, system)` and `on_phase(phase)` show progress."""

    def __init__(
        self,
        systems: list[System],
        program: str,
        memory_bytes: int,
        *,
        charges_zswap: bool,
        on_run: Callable[[Scenario, int, System], None],
        on_phase: Callable[[str], None],
    ) -> None:
        self.systems = systems
        self.memory_bytes = memory_bytes
        self.daemon_bytes = 0
        self._program = program
        self._charges_zswap = charges_zswap
        self._on_run = on_run
        self._on_phase = on_phase

    def probe_daemon(self, scenario: Scenario) -> None:
        """Learn daemon_bytes before the first limit depends on it: a small run under pressure."""
        for system in self.systems:
            if isinstance(system, Vswapd):
                small = max(32 << 20, self.memory_bytes // 4)
                outcome = system.run(scenario.argv(self._program, small), small * 3 // 2, lambda _: None)
                self.daemon_bytes = outcome.daemon_bytes

    def run_round(self, result: ScenarioResult, number: int) -> None:
        """One scenario on every system."""
        for system in order_of(self.systems, number):
            self._on_run(result.scenario, number, system)
            argv = result.scenario.argv(self._program, self.memory_bytes)
            try:
                outcome = system.run(argv, self._limit_bytes(system, result), self._on_phase)
            except ExecuteError as error:
                result.failures.append(f"{result.scenario.name}, round {number + 1}, {system.name}: {error}")
                continue
            self.daemon_bytes = max(self.daemon_bytes, outcome.daemon_bytes)
            result.outcomes.setdefault(system.name, {})[number] = outcome

    def _limit_bytes(self, system: System, result: ScenarioResult) -> int:
        if system.is_ram and not (system.name == "zswap" and self._charges_zswap):
            return self.memory_bytes
        self._set_total(result)
        if isinstance(system, Vswapd):
            return result.total_bytes - self.daemon_bytes
        return result.total_bytes

    def _set_total(self, result: ScenarioResult) -> None:
        """Once for all rounds: pairs have to be of the same memory."""
        if result.total_bytes:
            return
        pools = [result.pool_bytes(system.name) for system in self.systems if system.is_ram]
        measured = [pool for pool in pools if pool > 0]
        result.is_estimated = not measured
        pool = min(measured) if measured else result.scenario.estimated_pool_bytes(self.memory_bytes)
        result.total_bytes = self.memory_bytes + pool


def as_json(results: list[ScenarioResult]) -> list[dict[str, Any]]:
    """Everything measured."""
    return [
        {
            "scenario": result.scenario.name,
            "title": result.scenario.title,
            "total_bytes": result.total_bytes,
            "is_total_estimated": result.is_estimated,
            "failures": result.failures,
            "runs": [
                {"system": system, "round": number, **vars(outcome)}
                for system, runs in result.outcomes.items()
                for number, outcome in runs.items()
            ],
        }
        for result in results
    ]
