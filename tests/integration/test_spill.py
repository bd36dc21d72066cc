# SPDX-License-Identifier: MIT
"""Spill: packed, sparse, private, and only used when it must be."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from support.limited import MIB, LimitedProgram, assert_honest, run_limited
from support.sampler import ControlClient

if TYPE_CHECKING:
    from pathlib import Path

_SIZES = [(224, 48, 12), pytest.param(1024, 200, 64, marks=pytest.mark.full)]


@pytest.mark.parametrize(("mib", "limit_mib", "pool_mib"), _SIZES)
def test_spill_file_is_packed(verify_memory: str, tmp_path: Path, mib: int, limit_mib: int, pool_mib: int) -> None:
    spill = tmp_path / "spill"
    options = ["--private", "--pool", f"{pool_mib}M", "--spill", f"{spill}:2G"]
    argv = [verify_memory, "--mib", str(mib), "--kind", "third", "--passes", "2"]
    result = run_limited(limit_mib * MIB, argv, options=options, seconds_max=900)
    assert result.status == 0, result.describe()
    assert json.loads(result.stdout)["wrong_pages"] == 0
    assert_honest(result, limit_mib * MIB, demand_bytes=mib * MIB)
    status = result.samples.status_at_most_swapped
    assert status["spill_pages"] > 0, f"nothing was spilled: {status}"
    raw = status["spill_pages"] * 4096
    # Kept copies have bytes on the backend too, and are in no swapped page.
    kept = status["kept_pages"] * 4096
    assert status["spill_bytes"] < 0.6 * (raw + kept), f"{status['spill_bytes']} for {raw} + {kept} bytes"
    assert result.samples.pool_bytes_max <= pool_mib * MIB * 1.10, result.describe()


def test_no_disk_for_zeros(verify_memory: str, tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    options = ["--private", "--pool", "8M", "--spill", f"{spill}:1G"]
    argv = [verify_memory, "--mib", "96", "--kind", "zeros", "--seconds", "2"]
    with LimitedProgram(24 * MIB, argv, options=options) as program:
        result = program.wait()
        blocks = os.stat(spill).st_blocks if spill.exists() else 0
    assert result.status == 0, result.describe()
    assert_honest(result, 24 * MIB, demand_bytes=96 * MIB)
    assert result.samples.spill_bytes_max == 0, result.describe()
    assert blocks == 0, f"{blocks * 512} bytes of {spill} are in use"


def test_default_spill_is_private_and_sparse(verify_memory: str, tmp_path: Path) -> None:
    """Without --spill: unlinked, so nothing is left whatever happens; used all the same."""
    argv = [verify_memory, "--mib", "128", "--kind", "random", "--passes", "2"]
    result = run_limited(24 * MIB, argv, environment={"VSWAPD_SPILL_DIR": str(tmp_path)})
    assert result.status == 0, result.describe()
    assert_honest(result, 24 * MIB, demand_bytes=128 * MIB)
    assert result.samples.spill_bytes_max > 0, result.describe()
    assert list(tmp_path.iterdir()) == []


def test_spill_space_is_given_back(verify_memory: str, tmp_path: Path) -> None:
    """What a program has freed takes no disk, while others go on."""
    spill = tmp_path / "spill"
    script = f"""
        {verify_memory} --mib 96 --kind random --passes 1 >&2 || exit 9
        echo first; read answer
    """
    options = ["--private", "--pool", "8M", "--spill", f"{spill}:1G"]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    argv = ["sh", "-c", f"exec 3<>{fifo}; {script.replace('read answer', 'read answer <&3')}"]
    with LimitedProgram(24 * MIB, argv, options=options) as program:
        with ControlClient(program.socket_path, 30.0) as control:
            _wait_until_spilled_then_empty(control)
        fifo.write_text("go on\n")
        result = program.wait()
    assert result.status == 0, result.describe()
    assert result.samples.spill_bytes_max > 0, result.describe()


def _wait_until_spilled_then_empty(control: ControlClient, seconds_max: float = 120.0) -> None:
    import time

    deadline = time.monotonic() + seconds_max
    spilled = False
    while True:
        status = control.status(30.0)
        spilled = spilled or status["spill_bytes"] > 0
        if spilled and status["spill_bytes"] == 0 and not status["clients"]:
            return
        assert time.monotonic() < deadline, f"spilled {spilled}, left {status['spill_bytes']} bytes"
        time.sleep(0.05)  # polling another process's state
