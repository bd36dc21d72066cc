# SPDX-License-Identifier: MIT
"""scripts/bench runs and leaves nothing behind. What it measures is never asserted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks import build, floor
from benchmarks.journal import DEFAULT_PATH

_BENCH = Path(__file__).parents[2] / "scripts/bench"


def machine_state() -> dict[str, object]:
    """Everything that the bench changes."""
    parameters = ["/proc/sys/vm/page-cluster", *map(str, Path("/sys/module/zswap/parameters").glob("*"))]
    return {
        "swaps": Path("/proc/swaps").read_text(),
        "zram": sorted(name for name in os.listdir("/sys/block") if name.startswith("zram")),
        "files": sorted(map(str, Path("/var/tmp").glob("vswap-bench-*"))),
        "parameters": {path: Path(path).read_text() for path in parameters},
        "cgroups": sorted(
            directory for directory, _, _ in os.walk("/sys/fs/cgroup") if "vswap-bench-" in os.path.basename(directory)
        ),
        "loops": sorted(map(str, Path("/sys/block").glob("loop*/loop/backing_file"))),
        "journal": os.path.exists(DEFAULT_PATH),
    }


@pytest.mark.parametrize("name", build.SOURCES)
def test_measured_program_compiles(name: str, tmp_path: Path) -> None:
    program = build.build(str(tmp_path), name)
    assert os.access(program, os.X_OK)


def test_cost_of_slots_is_measured(tmp_path: Path) -> None:
    done = subprocess.run([build.build(str(tmp_path), "slots"), "20000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["slots"] == 20000


def test_floor_has_all_that_its_sums_need() -> None:
    before = machine_state()
    done = subprocess.run([str(_BENCH), "--floor"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine_state() == before
    steps, floors = done.stdout.split("\n\n")
    lines = steps[steps.index("step, ") :].splitlines()[1:]
    microseconds = {words[0]: float(words[-2]) for words in map(str.split, lines)}
    assert set(microseconds) >= {name for row in floor.SUMS for name in row.parts}
    assert all(value > 0 for value in microseconds.values()), microseconds
    assert all(row.title in floors for row in floor.SUMS)


@pytest.mark.full
def test_quick_and_small(tmp_path: Path) -> None:
    before = machine_state()
    command = [str(_BENCH), "--quick", "--size", "64M", "--rounds", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine_state() == before
    document = json.loads((tmp_path / "bench.json").read_text())
    systems = {run["system"] for result in document["results"] for run in result["runs"]}
    assert "vswapd" in systems
    assert all(
        phase["wrong"] == 0
        for result in document["results"]
        for run in result["runs"]
        for phase in run["phases"].values()
    )


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    before = machine_state()
    command = [
        str(_BENCH),
        "--size",
        "128M",
        "--only",
        "access",
        "--systems",
        "zswap,vswapd",
        "--output",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while len(Path("/proc/swaps").read_text().splitlines()) < len(str(before["swaps"]).splitlines()) + 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)  # polling another process's state
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert again.returncode == 1
        assert "--restore" in again.stderr
        assert len(again.stderr.strip().splitlines()) == 1
        subprocess.run([str(_BENCH), "--restore"], check=True, timeout=60)
    else:
        assert process.returncode == 130, output
    assert machine_state() == before


@pytest.mark.full
@pytest.mark.parametrize(
    "command",
    [
        ("bench-swapoff", "--mib", "256", "--limit-mib", "64", "--rounds", "1", "--shapes"),
        ("bench-tiers", "--rounds=1", "--seconds=1", "--mib=256", "--limit-mib=64", "--hot-mib=96", "--fast-mib=96"),
        ("showcase-disk",),
    ],
    ids=lambda command: command[0],
)
def test_others_leave_nothing_behind(tmp_path: Path, command: tuple[str, ...]) -> None:
    before = machine_state()
    argv = [str(_BENCH.with_name(command[0])), *command[1:], "--output", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine_state() == before
    assert any(tmp_path.iterdir())
