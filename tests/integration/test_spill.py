# SPDX-License-Identifier: MIT
"""Spill: packed, sparse, private, and only used when it must be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from support.limited import MIB, LimitedProgram, assert_honest, command_path, python_argv, run_limited
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


# Lone faults: a page at random, or all eight of a cluster, in any order.
_FAULTS_AT_RANDOM = """
import mmap, os, random, sys
pages, together = 24576, int(sys.argv[1])
memory = mmap.mmap(-1, pages << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(pages):
    memory[page << 12 : (page << 12) + 4096] = page.to_bytes(8) + os.urandom(4088)
at_random = random.Random(1)
for _ in range(12000 // together):
    first = at_random.randrange(pages // together) * together
    for page in at_random.sample(range(first, first + together), together):
        assert memory[page << 12 : (page << 12) + 8] == page.to_bytes(8), page
"""


@pytest.mark.parametrize(("together", "least", "most"), [(1, 1.0, 1.3), (8, 2.5, 8.0)])
def test_neighbours_are_read_where_they_are_wanted(together: int, least: float, most: float) -> None:
    """Whose accesses are scattered waits for one page at a time, and loses none to those that nobody wants."""
    argv = [*python_argv(_FAULTS_AT_RANDOM), str(together)]
    result = run_limited(24 * MIB, argv, options=["--private", "--pool", "2M"])
    assert result.status == 0, result.describe()
    counters = result.stats["counters"]
    assert counters["faults_spill"] > 1000, counters
    assert least <= counters["spill_read_pages"] / counters["faults_spill"] <= most, counters


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


def test_check_reads_a_file_in_use(verify_memory: str, tmp_path: Path) -> None:
    """While it is written to: no damage, the daemon's live figures; then a flipped bit, and its exit status says so."""
    spill = tmp_path / "spill"
    argv = [verify_memory, "--mib", "64", "--kind", "random", "--seconds", "60"]
    options = ["--private", "--pool", "2M", "--spill", f"{spill}:256M"]
    with LimitedProgram(16 * MIB, argv, options=options) as program:
        command = [command_path("vswapctl"), "check", "--json", "--socket", program.socket_path, str(spill)]
        with ControlClient(program.socket_path, 30.0) as control:
            _wait_written(control, 32 * MIB)
        for _ in range(3):
            checked = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
            document = json.loads(checked.stdout)
            assert (checked.returncode, document["findings"]) == (0, []), checked
            assert document["is_in_use"] is True
            assert document["live_bytes"] > 0
            assert document["objects"] > 0
        os.kill(program.process.pid, signal.SIGTERM)  # so that nothing is written over what is flipped
        program.wait()
    with spill.open("r+b") as file:
        first = next(number for number in range(256) if os.pread(file.fileno(), 8, number * MIB) == b"VSWPSEG2")
        file.seek(first * MIB + 1000)
        byte = file.read(1)[0]
        file.seek(first * MIB + 1000)
        file.write(bytes([byte ^ 4]))
    checked = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    document = json.loads(checked.stdout)
    assert checked.returncode == 1
    assert document["is_in_use"] is False
    assert [finding["segment"] for finding in document["findings"]] == [first]
    assert "checksum mismatch" in document["findings"][0]["cause"]


def _wait_written(control: ControlClient, count_bytes: int, seconds_max: float = 60.0) -> None:
    import time

    deadline = time.monotonic() + seconds_max
    while sum(backend["written_bytes"] for backend in control.status(30.0)["backends"]) < count_bytes:
        assert time.monotonic() < deadline, "not so much was written"
        time.sleep(0.05)  # polling another process's state
