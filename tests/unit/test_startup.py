# SPDX-License-Identifier: MIT
"""vswapctl starts fast: what each verb imports, and what it must not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_HEAVY = (
    "trio",
    "pyfuse3",
    "rich",
    "shtab",
    "structlog",
    "textual",
    "tomllib",
    "psutil",
    "cffi",
    "_cffi_backend",
    "numpy",
    "asyncio",
    "logging",
)
_CODE = """
import sys
from vswapd import cli
for name in {modules!r}:
    __import__(name)
try:
    cli.main({arguments!r})
except SystemExit:
    pass
print(*sorted({heavy!r} & set(sys.modules)), file=sys.stderr)
"""


def _imported(arguments: list[str], modules: list[str]) -> str:
    code = _CODE.format(arguments=arguments, modules=modules, heavy=set(_HEAVY))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(_ROOT), "VSWAPD_SOCKET": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stderr.splitlines()[-1]


_VERBS = ["run", "status", "swaps", "pageout", "pagein", "swapon", "swapoff", "compact", "check", "limit", "upgrade"]
_VERBS += ["doctor", "top", "completion"]


@pytest.mark.parametrize("verb", _VERBS)
def test_verbs_import_nothing_heavy(verb: str) -> None:
    assert _imported([verb, "--help"], [f"vswapd.cli.{verb}"]) == ""


def test_front_of_a_run_imports_nothing_heavy() -> None:
    """Everything that `run` uses in vswapctl's own process; the fork that becomes the daemon does more."""
    modules = ["vswapd.embedded", "vswapd.front", "vswapd.backends", "vswapd.machine", "ctypes"]
    assert _imported(["run", "--private"], modules) == ""


def test_package_imports_nothing() -> None:
    code = "import sys; before = set(sys.modules); import vswapd; print(*(set(sys.modules) - before))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(result.stdout.split()) <= {"vswapd", "__future__"}
