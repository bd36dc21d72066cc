# SPDX-License-Identifier: MIT
"""The operation table: every memory operation of a program, right while its pages are out.

Operation x backing of the pages x what must hold. The rows are in tests/support/operations_*.c; here
each row of each run of that program is a test. One run for a mode and a backing, of those rows only that
were selected. Natively nothing is ever paged out, and the rows must be right too: they say what Linux does.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.limited import MIB, run_limited, run_native

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _pytest.mark import ParameterSet

_SUPPORT = Path(__file__).parent.parent / "support"
_LIMIT = 256 * MIB  # more than the rows need: what leaves, leaves because a row asks for it
_SECONDS_MAX = 300.0

# Backing → what `vswapctl run` needs so that pages get there. A pool this small is written out whole.
_BACKINGS: dict[str, list[str]] = {
    "zero": [],
    "same": [],
    "pool": [],
    "raw": [],
    "spill": ["--pool", "1M"],
    "kept": [],
    "resident": [],
}
_MODES: dict[str, list[str]] = {"native": [], "limit": [], "torture": ["--torture"]}
# Natively no page has a backing, only content.
_NOT_RUN = {("native", "spill"), ("native", "kept"), ("native", "resident")}
_FULL = {("torture", "zero"), ("torture", "same"), ("torture", "raw"), ("torture", "resident")}

# (row, mode) → why it cannot be right yet. Mode "*": managed, in any way.
_XFAIL: dict[tuple[str, str], str] = {
    ("thread_clear_tid_out", "*"): "the kernel answers no userfault of a thread that ends (README: limits)",
    ("thread_robust_mutex_out", "*"): "the kernel answers no userfault of a thread that ends (README: limits)",
}

_ROW = re.compile(r'^\t\{ "(\w+)", \w+, (\w+) \},$', re.MULTILINE)
_CALM = {"ROW_CALM", "ROW_BOTH"}  # operations.h: not under torture


def _rows() -> dict[str, str]:
    """Name → flags, out of the source: nothing is compiled to collect tests."""
    rows = [row for path in sorted(_SUPPORT.glob("operations_*.c")) for row in _ROW.findall(path.read_text())]
    assert len(rows) == len(dict(rows)), "rows have names of their own"
    return dict(rows)


def _parameters() -> Iterator[ParameterSet]:
    for mode in _MODES:
        for backing in _BACKINGS:
            if (mode, backing) in _NOT_RUN:
                continue
            for row, flags in _rows().items():
                if mode == "torture" and flags in _CALM:
                    continue
                marks = [pytest.mark.full] if (mode, backing) in _FULL else []
                reason = _XFAIL.get((row, mode)) or (_XFAIL.get((row, "*")) if mode != "native" else None)
                if reason:
                    marks.append(pytest.mark.xfail(strict=True, reason=reason))
                yield pytest.param(mode, backing, row, marks=marks, id=f"{mode}-{backing}-{row}")


class _Table:
    """Runs the program once for a mode and a backing, and keeps what it said."""

    def __init__(self, program: str, selected: dict[tuple[str, str], list[str]]) -> None:
        self.program = program
        self._selected = selected
        self._said: dict[tuple[str, str], dict[str, list[str]]] = {}

    def said(self, mode: str, backing: str) -> dict[str, list[str]]:
        """Row → what was written about it."""
        key = (mode, backing)
        if key not in self._said:
            self._said[key] = self._run(mode, backing)
        return self._said[key]

    def _run(self, mode: str, backing: str) -> dict[str, list[str]]:
        flags = ["--torture"] if mode == "torture" else []
        argv = [self.program, *flags, backing, *self._selected[mode, backing]]
        if mode == "native":
            environment = {name: value for name, value in os.environ.items() if not name.startswith("VSWAP")}
            native = run_native(argv, env=environment, timeout=_SECONDS_MAX)
            text = native.stdout + native.stderr
        else:
            options = ["--private", *_MODES[mode], *_BACKINGS[backing]]
            result = run_limited(_LIMIT, argv, options=options, seconds_max=_SECONDS_MAX)
            text = result.stdout + result.stderr
            assert result.faults > 0, result.describe()
        said: dict[str, list[str]] = {}
        for line in text.decode(errors="replace").splitlines():
            row, _, rest = line.partition(" ")
            said.setdefault(row, []).append(rest)
        return said


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Table:
    program = str(tmp_path_factory.mktemp("operations") / "operations")
    sources = [str(path) for path in sorted(_SUPPORT.glob("operations*.c"))]
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
    command = ["cc", "-std=gnu11", "-O2", "-g", *warnings, "-o", program, *sources, "-pthread"]
    subprocess.run(command, check=True)
    selected: dict[tuple[str, str], list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.originalname == "test_operation":
            mode, backing, row = (str(item.callspec.params[name]) for name in ("mode", "backing", "row"))
            selected.setdefault((mode, backing), []).append(row)
    return _Table(program, selected)


@pytest.mark.parametrize(("mode", "backing", "row"), list(_parameters()))
def test_operation(table: _Table, mode: str, backing: str, row: str) -> None:
    said = table.said(mode, backing)
    assert said.get(row) == [f"{backing} ok"], said


def test_table_is_complete(table: _Table) -> None:
    """What is parametrized here and what the program has are the same rows."""
    listed = subprocess.run([table.program, "--list"], check=True, capture_output=True, text=True)
    assert sorted(listed.stdout.split()) == sorted(_rows())
