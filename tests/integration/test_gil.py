# SPDX-License-Identifier: MIT
"""No Python on the hot path: with the daemon's GIL held asleep, clients go on (scripts/bench --gil: how fast)."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from support.limited import MIB, LimitedProgram, assert_honest
from support.sampler import ControlClient

if TYPE_CHECKING:
    from pathlib import Path

_MIB = 96
_LIMIT = 24 * MIB
_HELD_SECONDS = 5


def _pages_verified(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(os.pread(file.fileno(), 8, 0), "little")


def test_faults_and_evictions_go_on_while_the_gil_is_held(verify_memory: str, tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    argv = [verify_memory, "--mib", str(_MIB), "--kind", "text", "--passes", "1", "--seconds", "26"]
    argv += ["--progress", str(progress)]
    with LimitedProgram(_LIMIT, argv, environment={"VSWAPD_TEST_OPERATIONS": "1"}) as program:
        with ControlClient(program.socket_path, 60.0) as control:
            before = _wait_swapping(control)
            answers: list[dict[str, object]] = []
            holder = threading.Thread(
                target=lambda: answers.append(control.request("test-hold-gil", 60.0, ms=_HELD_SECONDS * 1000))
            )
            holder.start()
            held_pages, held_seconds = _progress_during(progress, _HELD_SECONDS - 1.0)
            assert holder.is_alive(), f"the GIL was not held for so long: {answers}"
            assert program.process.poll() is None, "the program ended too early to judge"
            holder.join()
            assert answers[0].get("ok"), answers
            after = control.status(30.0)
        result = program.wait()
    assert result.status == 0, result.describe()
    assert_honest(result, _LIMIT, demand_bytes=_MIB * MIB)
    # More than once over everything it has cannot be without both faults and evictions.
    assert held_pages > _MIB * MIB // 4096, f"only {held_pages} pages in {held_seconds:.1f} s"
    for name in ("faults", "evicted_pages"):
        assert after["counters"][name] > before["counters"][name]


def _wait_swapping(control: ControlClient, seconds_max: float = 30.0) -> dict[str, dict[str, int]]:
    deadline = time.monotonic() + seconds_max
    while True:
        status = control.status(30.0)
        # Several times over all there is: by then it goes round and round.
        if status["counters"]["evicted_pages"] > 3 * _MIB * MIB // 4096:
            return status
        assert time.monotonic() < deadline, f"no swapping: {status}"
        time.sleep(0.05)  # polling another process's state


def _progress_during(path: Path, seconds: float) -> tuple[int, float]:
    """Pages verified in about `seconds` of real time, which is what is measured here."""
    started, first = time.monotonic(), _pages_verified(path)
    time.sleep(seconds)
    return _pages_verified(path) - first, time.monotonic() - started
