# SPDX-License-Identifier: MIT
"""A kernel that swaps, too, takes pages away while they are moved out, stored or brought back: none is lost by that."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from benchmarks import vmstat
from benchmarks.journal import Journal
from support.limited import MIB
from support.memory_cgroup import memory_cgroup

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SECONDS = 10


@pytest.fixture
def kernel_swap(tmp_path: Path) -> Iterator[None]:
    """A swap file for the machine."""
    path = tmp_path / "swap"
    subprocess.run(["fallocate", "--length", str(1 << 30), path], check=True)
    path.chmod(0o600)
    subprocess.run(["mkswap", path], check=True, capture_output=True)
    with Journal(str(tmp_path / "swap.journal")) as journal:
        journal.note("swap", path=str(path))
        subprocess.run(["swapon", path], check=True)
        yield


@pytest.mark.full  # the machine swaps meanwhile
@pytest.mark.usefixtures("kernel_swap")
def test_nothing_is_lost_between_two_that_swap(
    tmp_path: Path, drive: str, verify_memory: str, client_library: str
) -> None:
    """In a cgroup with less than the program has resident, while the data plane moves pages in and out at random."""
    options = ["--limit", str(512 * MIB), "--torture", "--spill", f"{tmp_path / 'spill'}:{1 << 30}"]
    options += ["--lib", client_library]
    program = [verify_memory, "--mib", "160", "--kind", "random", "--seconds", str(_SECONDS)]
    with memory_cgroup(tmp_path, f"vswap-test-swap-{os.getpid()}", 100 * MIB) as cgroup:
        command = cgroup.command([drive, *options, "--", *program])
        before = vmstat.count("pswpout")
        result = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:].decode()
    assert json.loads(result.stdout)["wrong_pages"] == 0
    assert vmstat.count("pswpout") - before > 1000, "the kernel did not swap"
