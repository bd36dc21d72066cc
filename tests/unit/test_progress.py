# SPDX-License-Identifier: MIT
"""How far a swapoff is, in words."""

from __future__ import annotations

import pytest

from vswapd import records
from vswapd.cli import progress
from vswapd.document import backend_document

_MIB = 1 << 20


def _job(**changes: int) -> dict[str, object]:
    record = records.BackendStatistics(0, 0, 1, 0, "/a", job=1, **changes)
    return backend_document(record)


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (_job(job_ms=2000, job_total_bytes=640 * _MIB, job_left_bytes=160 * _MIB), "75 %, 160 MiB left, 240 MiB/s, 1 s left"),
        (_job(job_ms=100, job_total_bytes=_MIB, job_left_bytes=_MIB), "0 %, 1 MiB left"),
        (_job(job_ms=0, job_total_bytes=0, job_left_bytes=0), "0 %, 0 B left"),
        (
            _job(job_ms=1000, job_total_bytes=4 * _MIB, job_left_bytes=_MIB, job_waiting=1),
            "75 %, 1 MiB left, waiting for room",
        ),
    ],
)
def test_job_in_words(job: dict[str, object], text: str) -> None:
    assert progress.format_job(job) == text


def test_bar_of_several_is_their_sum() -> None:
    jobs = [
        _job(job_ms=1000, job_total_bytes=4 * _MIB, job_left_bytes=2 * _MIB),
        _job(job_ms=1000, job_total_bytes=4 * _MIB, job_left_bytes=0),
    ]
    assert progress.format_bar(jobs) == "2 backends [##################......] 75 %, 2 MiB left, 6 MiB/s, 0 s left"
    assert progress.format_bar(jobs[:1]).startswith("/a [############............] 50 %")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_seconds(seconds: float, text: str) -> None:
    assert progress.format_seconds(seconds) == text
