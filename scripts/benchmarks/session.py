# SPDX-License-Identifier: MIT
"""session — rounds of every scenario on every system, in alternating order, with equal total memory.

T = M + the pool of the peers that keep what they swap in RAM; the swap file gets T, vswapd T less what its daemon
costs in that scenario, as one more run shows before the first round. The pool is the smaller one where there are two:
vswapd gets no byte that a peer did without.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.execute import ExecuteError, execute
from benchmarks.summary import Row
from benchmarks.systems import Outcome, Place, System, Vswapd

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.scenarios import Scenario

_PROBE_PERCENT = 1000  # of the accesses that there are pages: some seconds


@dataclass
class ScenarioResult:
    """`outcomes[system][round]`; `total_bytes` is T, of which `pool_bytes` were measured (or estimated)."""

    scenario: Scenario
    memory_bytes: int
    outcomes: dict[str, dict[int, Outcome]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    total_bytes: int = 0
    is_estimated: bool = False
    learned_daemon_bytes: int = 0  # of a run that does not count
    is_kept: bool = False  # reported, not gone on with

    @property
    def working_set_bytes(self) -> int:
        """Of the run's M."""
        return self.scenario.working_set_bytes(self.memory_bytes)

    def rows(self) -> list[Row]:
        """Those of each phase."""
        names = {phase: None for runs in self.outcomes.values() for run in runs.values() for phase in run.phases}
        shown = [phase for phase in names if phase not in self.scenario.silent]
        return [self._row(phase, figure) for phase in shown for figure in self.scenario.figures.get(phase, ("ns",))]

    def round_seconds(self, number: int) -> list[float]:
        """How long its runs took."""
        return [runs[number].seconds for runs in self.outcomes.values() if number in runs]

    def has_round(self, system: str, number: int) -> bool:
        """Whether it was measured."""
        return number in self.outcomes.get(system, {})

    def add(self, system: str, number: int, outcome: Outcome) -> None:
        """Keep it; or note that it came to another result than those before."""
        for phase, fields in outcome.phases.items():
            for other in (run for runs in self.outcomes.values() for run in runs.values()):
                expected = other.phases.get(phase, {}).get("digest")
                if expected is not None and fields.get("digest") != expected:
                    self.failures.append(f"{self.scenario.name}, round {number + 1}, {system}: wrong result of {phase}")
                    return
            if fields.get("wrong"):
                self.failures.append(f"{self.scenario.name}, round {number + 1}, {system}: wrong data in {phase}")
                return
        self.outcomes.setdefault(system, {})[number] = outcome

    def _row(self, phase: str, figure: str) -> Row:
        values = {
            system: {
                number: run.phases[phase][figure] for number, run in runs.items() if figure in run.phases.get(phase, {})
            }
            for system, runs in self.outcomes.items()
        }
        return Row(self.scenario.name, phase, figure, values)

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len({number for runs in self.outcomes.values() for number in runs})

    def daemon_bytes(self) -> int:
        """The most that vswapd's daemon cost."""
        costs = (run.daemon_bytes for runs in self.outcomes.values() for run in runs.values())
        return max(self.learned_daemon_bytes, *costs, 0)

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
        place: Place,
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
        self._place = place
        self._program = program
        self._charges_zswap = charges_zswap
        self._on_run = on_run
        self._on_phase = on_phase

    def probe_daemon(self) -> None:
        """Learn daemon_bytes before any limit depends on it: a small run under pressure, of some seconds."""
        for system in self.systems:
            if isinstance(system, Vswapd):
                small = max(32 << 20, self.memory_bytes // 4)
                phases = f"fill,seq_read,rand_read:{_PROBE_PERCENT}"
                argv = [self._program, "--mib", str(2 * small >> 20), "access", phases]
                self.daemon_bytes = system.run(argv, small * 3 // 2, lambda _: None).daemon_bytes

    def prepare(self, result: ScenarioResult) -> bool:
        """What all runs of an application share; False when it cannot be had, which is a failure of the scenario."""
        if not result.scenario.is_application:
            return True
        self._on_phase("preparing")
        try:
            execute([*self._argv(result.scenario), "--prepare"], lambda _: None)
        except ExecuteError as error:
            result.failures.append(f"{result.scenario.name} cannot be prepared: {error}")
            result.is_kept = True
            return False
        return True

    def _argv(self, scenario: Scenario) -> list[str]:
        return scenario.argv(self._program, self.memory_bytes, self._place.directory)

    def systems_of(self, scenario: Scenario) -> list[System]:
        """Those that it runs on."""
        return [
            system
            for system in self.systems
            if (system.name in scenario.systems if scenario.systems else not system.is_unlimited)
        ]

    def run_round(self, result: ScenarioResult, number: int) -> None:
        """One scenario on every system that has not run it in this round."""
        for system in order_of(self.systems_of(result.scenario), number):
            if result.has_round(system.name, number):
                continue
            self._on_run(result.scenario, number, system)
            try:
                outcome = self._run(system, result, self._limit_bytes(system, result))
            except ExecuteError as error:
                result.failures.append(f"{result.scenario.name}, round {number + 1}, {system.name}: {error}")
                continue
            result.add(system.name, number, outcome)

    def _run(self, system: System, result: ScenarioResult, limit_bytes: int) -> Outcome:
        options = result.scenario.vswapd_options
        return system.run(self._argv(result.scenario), limit_bytes, self._on_phase, options)

    def _daemon_bytes(self, system: System, result: ScenarioResult) -> int:
        """The most it has cost in this scenario; before its first round, in a run that does not count. ExecuteError."""
        if not result.daemon_bytes():
            result.learned_daemon_bytes = self._run(system, result, result.total_bytes - self.daemon_bytes).daemon_bytes
        return result.daemon_bytes()

    def _limit_bytes(self, system: System, result: ScenarioResult) -> int:
        """ExecuteError."""
        if system.is_unlimited:
            return 0
        if system.is_ram and not (system.name == "zswap" and self._charges_zswap):
            return result.scenario.limit_bytes(self.memory_bytes)
        self._set_total(result)
        if isinstance(system, Vswapd):
            return result.total_bytes - self._daemon_bytes(system, result)
        return result.total_bytes

    def _set_total(self, result: ScenarioResult) -> None:
        """Once for all rounds: pairs have to be of the same memory."""
        if result.total_bytes:
            return
        pools = [result.pool_bytes(system.name) for system in self.systems if system.is_ram]
        measured = [pool for pool in pools if pool > 0]
        result.is_estimated = not measured
        pool = min(measured) if measured else result.scenario.estimated_pool_bytes(self.memory_bytes)
        result.total_bytes = result.scenario.limit_bytes(self.memory_bytes) + pool


def from_json(result: ScenarioResult, document: dict[str, Any]) -> None:
    """Put back what as_json() wrote; failures are tried again."""
    result.total_bytes = document["total_bytes"]
    result.is_estimated = document["is_total_estimated"]
    for run in document["runs"]:
        fields = {name: value for name, value in run.items() if name not in ("system", "round")}
        result.outcomes.setdefault(run["system"], {})[run["round"]] = Outcome(**fields)


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
