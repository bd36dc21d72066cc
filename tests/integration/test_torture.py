# SPDX-License-Identifier: MIT
"""Other people's tests, while random pages are evicted all the time: they must say what they say natively."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from support.limited import need_program, run_limited

if TYPE_CHECKING:
    from pathlib import Path

# The distribution's, whose tests are the package libpython3.N-testsuite, and any other there is.
_PYTHONS = ["/usr/bin/python3", *(f"{directory}/python3" for directory in os.environ["PATH"].split(os.pathsep))]
_OPTIONS = ["--private", "--torture"]

# ---- CPython's regression tests ----

_CPYTHON = [
    "test_mmap", "test_fork1", "test_subprocess", "test_threading", "test_multiprocessing_fork", "test_io",
    "test_array", "test_bytes", "test_gc", "test_dict", "test_sqlite3", "test_asyncio",
]  # fmt: skip


def _outcomes(path: Path) -> dict[str, str]:
    """{test: passed, skipped, failure or error} of a JUnit file."""
    outcomes = {}
    for case in ElementTree.parse(path).iter("testcase"):  # noqa: S314 -- what we have just had written
        name = f"{case.get('classname', '')}.{case.get('name')}"
        outcomes[name] = next((child.tag for child in case if child.tag != "system-out"), "passed")
    return outcomes


def _python_with(name: str) -> str:
    """One that has this test: Debian's package lacks test_sqlite3."""
    for python in _PYTHONS:
        if os.path.exists(python) and not subprocess.run([python, "-c", f"import test.{name}"], check=False, capture_output=True).returncode:
            return python
    pytest.skip(f"no Python here has test.{name}: install libpython3.N-testsuite, or a Python from its sources")


def _regrtest(python: str, name: str, report: Path) -> list[str]:
    return [python, "-m", "test", "-u", "none", "--timeout", "1500", "--junit-xml", str(report), name]


@pytest.mark.full
@pytest.mark.parametrize("name", _CPYTHON)
def test_cpython(name: str, tmp_path: Path) -> None:
    reports = {mode: tmp_path / f"{mode}.xml" for mode in ("native", "limited")}
    python = _python_with(name)
    native = subprocess.run(
        _regrtest(python, name, reports["native"]), cwd=tmp_path, capture_output=True, check=False, timeout=900
    )
    argv = _regrtest(python, name, reports["limited"])
    limited = run_limited("64M", argv, options=_OPTIONS, cwd=tmp_path, seconds_max=1800)
    wanted, found = (_outcomes(report) for report in reports.values())
    assert len(wanted) > 0, native.stderr
    differing = {
        test: (wanted.get(test), found.get(test))
        for test in {*wanted, *found}
        if wanted.get(test) != found.get(test)
    }
    assert not differing, f"{differing}\n{limited.describe()}"
    assert limited.status == native.returncode, limited.describe()
    evicted = int(limited.stats["counters"]["evicted_pages"])
    print(f"{name}: {len(found)} tests as natively, {limited.seconds:.0f} s, {evicted} pages evicted")


# ---- stress-ng ----

_BAD_LINE = re.compile(r"stress-ng: (fail|error):|unsuccessful|terminated on signal|aborted", re.IGNORECASE)
_CLASSES = ["vm", "mmap", "mremap", "fork", "madvise", "brk", "mprotect", "userfaultfd", "vforkmany"]
# What a program has registered with a userfaultfd of its own cannot be evicted: it has to fit. 256 MiB are its default.
_SIZES = {"userfaultfd": ["--userfaultfd-bytes", "48M"]}
# Its end is 7 if a count of operations was left half made. An mprotect worker kills children that share its count, and now and
# then hits one that counts: 2 of 13,040 workers that ran without us (`stress-ng --mprotect 16 --mprotect-ops 20000`).
_STATUSES = {"mprotect": (0, 7)}


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.full)])
@pytest.mark.parametrize("stressor", _CLASSES)
def test_stress_ng(stressor: str, seconds: int, tmp_path: Path) -> None:
    program = need_program("stress-ng")
    argv = [program, f"--{stressor}", "2", "--verify", "-t", f"{seconds}s", "-v", "--temp-path", str(tmp_path)]
    argv += _SIZES.get(stressor, [])
    result = run_limited("64M", argv, options=_OPTIONS, seconds_max=seconds * 6 + 120)
    text = (result.stdout + result.stderr).decode(errors="replace")
    bad = [line for line in text.splitlines() if _BAD_LINE.search(line)]
    assert result.status in _STATUSES.get(stressor, (0,)), result.describe()
    assert result.status == 0 or "bogo-ops counter in non-ready state" in text, text[-2000:]
    assert not bad, "\n".join(bad[:20])
    assert "successful run" in text or "passed: 2" in text, text[-2000:]
