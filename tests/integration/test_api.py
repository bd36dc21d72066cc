# SPDX-License-Identifier: MIT
"""`import vswapd` in real programs: started again under a limit, within a limit, and its doctests."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from support.limited import MIB, python_argv, run_limited

if TYPE_CHECKING:
    from pathlib import Path

_STARTED_AGAIN = """
import os, sys, vswapd
print("begin", sys.argv[1:], flush=True)
with vswapd.limit("64M"):
    array = vswapd.empty((12 << 20,), "f8")
    array[:] = 7
    group = next(group for group in vswapd.status()["groups"] if group["name"] == os.environ["VSWAP_GROUP"])
    print(group["limit_bytes"] >> 20, group["swapped_bytes"] > 16 << 20, array.sum() == 7 * (12 << 20))
sys.exit(3)
"""

_WITHIN = """
import os, vswapd
def figures():
    return next(group for group in vswapd.status()["groups"] if group["name"] == os.environ["VSWAP_GROUP"])
memory = vswapd.alloc("96M")
memory[::4096] = b"x" * (96 << 8)
with vswapd.limit("64M"):
    print(figures()["limit_bytes"] >> 20)
    while figures()["swapped_bytes"] < 16 << 20:
        pass
print(figures()["limit_bytes"] >> 20)
vswapd.willneed(memory)
vswapd.cold(memory)
print(figures()["swapped_bytes"] > 88 << 20)  # pages just touched may stay
vswapd.willneed(memory)
print(figures()["swapped_bytes"] < 8 << 20)  # what is left is not the array's
print(memory[::4096].count(b"x") == 96 << 8)
"""

_DOCTESTS = """
import doctest, os, sys, vswapd
from vswapd import api
result = doctest.testmod(api, extraglobs={"vswapd": vswapd, "os": os})
print(result.failed, result.attempted)
"""


def test_program_is_started_again_under_the_limit(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(_STARTED_AGAIN, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(job), "an argument"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 3, result.stderr
    assert result.stdout.splitlines() == ["begin ['an argument']"] * 2 + ["64 True True"]
    assert result.stderr == ""


def test_limit_of_the_block_and_willneed() -> None:
    result = run_limited(512 * MIB, python_argv(_WITHIN))
    assert result.status == 0, result.describe()
    assert result.stdout.decode().split() == ["64", "512", "True", "True", "True"]


def test_doctests() -> None:
    result = run_limited(512 * MIB, python_argv(_DOCTESTS))
    assert result.status == 0, result.describe()
    failed, attempted = map(int, result.stdout.decode().splitlines()[-1].split())
    assert (failed, attempted >= 6) == (0, True), result.stdout.decode()
