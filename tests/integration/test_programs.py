# SPDX-License-Identifier: MIT
"""Real, unmodified programs: NumPy, sort, stress-ng (redis: test_redis.py)."""

from __future__ import annotations

import hashlib
import random
import re
from typing import TYPE_CHECKING

import pytest

from support.limited import MIB, LimitedResult, assert_honest, need_program, python_argv, run_limited, run_native

if TYPE_CHECKING:
    from pathlib import Path

# ---- NumPy ----

_NUMPY = """
import numpy
values = numpy.random.default_rng(7).random({count})
values.sort()
print(repr(float(values.sum())), repr(float(values[{count} // 3])), bool((numpy.diff(values) >= 0).all()))
"""


@pytest.mark.parametrize(
    ("mib", "limit_mib"),
    [(192, 64), pytest.param(1024, 256, marks=pytest.mark.full)],
)
def test_numpy_fills_sorts_and_sums(mib: int, limit_mib: int) -> None:
    argv = python_argv(_NUMPY.format(count=mib * MIB // 8))
    native = run_native(argv)
    assert native.returncode == 0, native.stderr
    result = run_limited(limit_mib * MIB, argv, seconds_max=1200)
    assert result.status == 0, result.describe()
    assert result.stdout == native.stdout
    assert_honest(result, limit_mib * MIB, demand_bytes=mib * MIB)
    status = result.samples.status_at_most_swapped
    rest = sum(status[f"{tier}_pages"] for tier in ("zero", "same", "pool", "spill", "staged")) * 4096
    assert rest >= (mib - limit_mib) * MIB / 2, f"status does not show where the rest is: {status}"


# ---- sort ----


def _write_lines(path: Path, size_bytes: int) -> None:
    """Seeded lines of words and numbers, as a log has them."""
    generator = random.Random(11)
    words = [f"{generator.getrandbits(40):x}" for _ in range(4096)]
    lines = [
        f"{generator.getrandbits(60):018d} {generator.choice(words)} {generator.choice(words)} request served\n"
        for _ in range(20000)
    ]
    with path.open("w", encoding="ascii") as file:
        number = 0
        while file.tell() < size_bytes:
            # The same lines again, turned round by a number of their own: all different.
            generator.shuffle(lines)
            file.writelines(f"{(number * 7919 + index) % 99991:05d}{line}" for index, line in enumerate(lines))
            number += 1


@pytest.mark.parametrize(
    ("size_mb", "buffer", "limit_mib"),
    [(100, "200M", 40), pytest.param(500, "600M", 150, marks=pytest.mark.full)],
)
def test_sort(tmp_path: Path, size_mb: int, buffer: str, limit_mib: int) -> None:
    source = tmp_path / "lines"
    _write_lines(source, size_mb * 1000_000)
    argv = ["sort", "-S", buffer, str(source)]
    environment = {"LC_ALL": "C"}
    native = run_native(argv, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"})
    assert native.returncode == 0, native.stderr
    wanted = hashlib.sha256(native.stdout).hexdigest()
    del native
    result = run_limited(limit_mib * MIB, argv, environment=environment, seconds_max=1200)
    assert result.status == 0, result.describe()
    assert hashlib.sha256(result.stdout).hexdigest() == wanted
    # sort holds the whole file at least; the honest demand is what was seen.
    assert_honest(result, limit_mib * MIB, demand_bytes=size_mb * 1000_000)


# ---- stress-ng ----

# What `stress-ng -v` says when a worker saw a wrong byte, died, or was started again.
_BAD_LINE = re.compile(
    r"stress-ng: (fail|error):|\bverif\w* (fail|error)|\bdied\b|restart|\bkilled\b|\bOOM\b|out of memory|"
    r"unsuccessful|terminated on signal|aborted|bit errors|mismatch",
    re.IGNORECASE,
)


def _assert_no_bad_lines(result: LimitedResult) -> None:
    text = (result.stdout + result.stderr).decode(errors="replace")
    bad = [line for line in text.splitlines() if _BAD_LINE.search(line)]
    assert not bad, "\n".join(bad[:20])
    assert re.search(r"stress-ng: info:.*(successful run|passed: 2)", text), text[-2000:]


@pytest.mark.parametrize("torture", [False, True], ids=["limit", "torture"])
@pytest.mark.parametrize(
    ("total_mib", "limit_mib", "seconds"),
    [(192, 96, 10), pytest.param(512, 256, 60, marks=pytest.mark.full)],
)
def test_stress_ng_vm(torture: bool, total_mib: int, limit_mib: int, seconds: int, tmp_path: Path) -> None:
    program = need_program("stress-ng")
    argv = [program, "--vm", "2", "--vm-bytes", f"{total_mib}M", "--vm-method", "all", "--verify"]
    argv += ["-t", f"{seconds}s", "-v", "--temp-path", str(tmp_path)]
    options = ["--private", *(["--torture"] if torture else [])]
    result = run_limited(limit_mib * MIB, argv, options=options, seconds_max=seconds * 6 + 120)
    assert result.status == 0, result.describe()
    _assert_no_bad_lines(result)
    # A worker that unmaps its memory maps it anew at once, and may fill that while the copies of the old are being freed.
    assert_honest(result, limit_mib * MIB, moment_bytes=total_mib // 2 * MIB)
