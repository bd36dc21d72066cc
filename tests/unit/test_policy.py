# SPDX-License-Identifier: MIT
"""The figures the control plane chooses."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswapd import config, policy

MIB = config.MIB


def test_default_limit_is_most_of_what_is_available() -> None:
    assert policy.default_limit_bytes(1000 * MIB) == 800 * MIB
    assert policy.default_limit_bytes(0) == config.LIMIT_BYTES_MIN


def test_agents_ask_early_under_a_small_limit() -> None:
    assert policy.agent_min_bytes(1 << 30, torture=False) == 16 * MIB
    assert policy.agent_min_bytes(64 * MIB, torture=False) == 8 * MIB
    assert policy.agent_min_bytes(1 << 30, torture=True) == MIB


def test_agents_look_more_often_under_a_small_limit() -> None:
    assert policy.agent_look_us(16 * MIB) == pytest.approx(1048, abs=1)
    assert policy.agent_look_us(128 * MIB) == pytest.approx(8388, abs=1)
    assert policy.agent_look_us(8 << 30) == config.LOOK_US_MAX


@given(st.integers(config.LIMIT_BYTES_MIN, config.LIMIT_BYTES_MAX))
def test_what_is_touched_between_two_looks_is_a_share_of_the_limit(limit: int) -> None:
    look_us = policy.agent_look_us(limit)
    assert config.LOOK_US_MIN <= look_us <= config.LOOK_US_MAX
    assert look_us * 1e-6 * config.FILL_BYTES_PER_SECOND <= limit * config.LOOK_LIMIT_SHARE


def test_spill_leaves_room_on_the_file_system() -> None:
    assert policy.spill_size_bytes(1000 * MIB, 1 << 40, 1 << 40) == 800 * MIB
    assert policy.spill_size_bytes(1 << 40, 100 * MIB, 50 * MIB) == 400 * MIB
    assert policy.spill_size_bytes(1 << 40, 100 * MIB, 500 * MIB) == 2000 * MIB
    assert policy.spill_size_bytes(MIB // 2, 100 * MIB, 500 * MIB) == 0


def test_percentiles() -> None:
    bounds = (1.0, 2.0, 4.0, 8.0)
    assert policy.percentile((0, 0, 0, 0), bounds, 0.5) == 0.0
    assert policy.percentile((0, 50, 49, 1), bounds, 0.5) == 2.0
    assert policy.percentile((0, 50, 49, 1), bounds, 0.99) == 4.0
    assert policy.percentile((0, 50, 49, 1), bounds, 0.999) == 8.0
    assert policy.percentile((1, 0, 0, 0), bounds, 0.999) == 1.0


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4), st.floats(0.001, 1))
def test_percentile_is_a_bound_with_enough_below(counts: list[int], share: float) -> None:
    bounds = (1.0, 2.0, 4.0, 8.0)
    bound = policy.percentile(tuple(counts), bounds, share)
    if sum(counts):
        below = sum(count for count, upper in zip(counts, bounds, strict=True) if upper <= bound)
        assert below >= share * sum(counts)


def test_policy_is_pure() -> None:
    tree = ast.parse(Path(policy.__file__).read_text(encoding="utf-8"))
    imported = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert imported <= {"annotations", "config", "Iterable", "Mapping", "Set"}
