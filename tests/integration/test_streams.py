# SPDX-License-Identifier: MIT
"""Streams, whose long runs are expanded with the gate open (csrc/fill_open.c). Races with what else happens to such a
run: test_races.py; a daemon that dies over one: test_recovery.py.
"""

from __future__ import annotations

import pytest

from support.limited import MIB, assert_honest, run_limited


@pytest.mark.parametrize(
    ("kind", "threads"),
    [("text", 1), ("mixed", 1), ("third", 4), ("mixed", 4)],  # mixed: objects of all sizes, raw ones, zeros between them
)
def test_long_runs_are_open(verify_memory: str, kind: str, threads: int) -> None:
    """Each thread has its own stream, and the pages of one are faults of others at the same time."""
    argv = [verify_memory, "--mib", "96", "--kind", kind, "--passes", "3", "--threads", str(threads)]
    result = run_limited(48 * MIB, argv)
    assert_honest(result, limit_bytes=48 * MIB)
    counters = result.stats["counters"]
    assert counters["fill_open_runs"] > 20, counters
    assert counters["check_failures"] == 0, counters
