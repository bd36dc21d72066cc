# SPDX-License-Identifier: MIT
"""Who gets how much memory in scripts/bench."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from benchmarks.scenarios import Scenario
from benchmarks.session import ScenarioResult, Session
from benchmarks.systems import Outcome, Place, System, Vswapd

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.cgroup import Cgroup
    from benchmarks.journal import Journal

MIB = 1 << 20
_PLACE = Place(cast("Journal", None), cast("Cgroup", None), "/nowhere", 0)
_PHASES: dict[str, dict[str, Any]] = {"phase": {"ns": 1.0}}


class _Peer(System):
    name = "peer"
    is_ram = True

    def run(self, argv: list[str], limit_bytes: int, on_phase: Callable[[str], None], options: object = ()) -> Outcome:
        assert limit_bytes == 256 * MIB
        return Outcome(_PHASES, limit_bytes, pool_bytes=100 * MIB)


class _Ours(Vswapd):
    """Whose daemon costs something else in each run."""

    def __init__(self, *daemon_mib: int) -> None:
        self._costs = list(daemon_mib)
        self.limits_mib: list[int] = []

    def run(self, argv: list[str], limit_bytes: int, on_phase: Callable[[str], None], options: object = ()) -> Outcome:
        self.limits_mib.append(limit_bytes // MIB)
        return Outcome(_PHASES, limit_bytes, daemon_bytes=self._costs.pop(0) * MIB)


def test_daemon_is_charged_what_it_costs_in_that_scenario() -> None:
    """Learnt in a run that does not count; no more than T in any round, and nothing of another scenario."""
    ours = _Ours(30, 20, 22, 21, 12, 12)
    session = Session(
        [_Peer(_PLACE), ours], _PLACE, "", 256 * MIB,
        charges_zswap=False, on_run=lambda *_: None, on_phase=lambda _: None,
    )  # fmt: skip
    session.probe_daemon()
    results = [ScenarioResult(Scenario(name, name, ("access",)), 256 * MIB) for name in ("first", "second")]
    for result, rounds in zip(results, (2, 1), strict=True):
        for number in range(rounds):
            session.run_round(result, number)
        assert not result.failures
        assert result.total_bytes == 356 * MIB
    assert ours.limits_mib == [96, 326, 336, 334, 326, 344]
    assert [sorted(result.outcomes["vswapd"]) for result in results] == [[0, 1], [0]]
