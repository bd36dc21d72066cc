# SPDX-License-Identifier: MIT
"""The tests of the tests: what every other test here relies on to notice a limit that is not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.limited import MIB, assert_honest, run_limited

if TYPE_CHECKING:
    from pathlib import Path

_MIB = 96
_LIMIT = 24 * MIB


def _argv(program: str) -> list[str]:
    return [program, "--mib", str(_MIB), "--kind", "text", "--passes", "3"]


def test_run_under_a_limit_is_honest(verify_memory: str) -> None:
    result = run_limited(_LIMIT, _argv(verify_memory))
    assert result.status == 0, result.describe()
    assert_honest(result, _LIMIT, demand_bytes=_MIB * MIB)


def test_client_library_that_does_nothing_is_noticed(verify_memory: str, empty_library: str) -> None:
    result = run_limited(_LIMIT, _argv(verify_memory), environment={"VSWAP_LIBRARY": empty_library})
    with pytest.raises(AssertionError):
        assert_honest(result, _LIMIT, demand_bytes=_MIB * MIB)
    # By each of its parts: one of them alone must not be what notices it.
    assert result.samples.peak_bytes > _LIMIT * 1.10, result.describe()
    assert result.faults == 0, result.describe()
    assert result.swapped_bytes_max == 0, result.describe()


def test_wrong_page_is_noticed(verify_memory: str, tmp_path: Path) -> None:
    """verify_memory sees one changed byte: gdb's way of writing, through /proc/PID/mem."""
    import subprocess

    progress = tmp_path / "progress"
    argv = [*_argv(verify_memory)[:-1], "1000000", "--rewrite", "0", "--progress", str(progress)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        # The first pass has begun, so everything is filled.
        while not progress.exists() or int.from_bytes(progress.read_bytes()[:8], "little") == 0:
            assert process.poll() is None
        largest = _largest_anonymous(process.pid)
        with open(f"/proc/{process.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(largest + 5 * MIB)
            byte = memory.read(1)
            memory.seek(largest + 5 * MIB)
            memory.write(bytes([byte[0] ^ 1]))
        line = process.stderr.readline() if process.stderr else b""
        assert b"page" in line, line
    finally:
        process.kill()
        process.communicate()


def _largest_anonymous(pid: int) -> int:
    largest = (0, 0)
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        for line in maps:
            fields = line.split()
            start, end = (int(part, 16) for part in fields[0].split("-"))
            if fields[1].startswith("rw-p") and len(fields) == 5:
                largest = max(largest, (end - start, start))
    return largest[1]
