# SPDX-License-Identifier: MIT
"""interleave PAGES REPORT — touch same-filled pages at random until those in memory and those that are out mix.

Writes {"shares": [of 128 pages in a row, those in memory, …]} to REPORT, and ends when REPORT is gone.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import random
import sys
import time
from pathlib import Path

_PAGE = 4096
_CLUSTER_PAGES = 128  # csrc/limits.h


def _resident(address: int, pages: int) -> list[bool]:
    """Bit 63 of each page's word in /proc/self/pagemap."""
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(address // _PAGE * 8)
        return [word >> 63 == 1 for word in memoryview(file.read(pages * 8)).cast("Q")]


def main(pages: int, report: Path) -> None:
    """Entry point."""
    memory = mmap.mmap(-1, pages * _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(pages):
        memory[page * _PAGE : (page + 1) * _PAGE] = bytes([page % 255 + 1]) * _PAGE
    choose = random.Random(1)
    for _ in range(2 * pages):
        page = choose.randrange(pages)
        assert memory[page * _PAGE] == page % 255 + 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    skip = -(address // _PAGE) % _CLUSTER_PAGES
    resident = _resident(address, pages)[skip:]
    shares = [
        sum(resident[at : at + _CLUSTER_PAGES]) / _CLUSTER_PAGES
        for at in range(0, len(resident) - _CLUSTER_PAGES + 1, _CLUSTER_PAGES)
    ]
    unfinished = report.with_suffix(".new")
    unfinished.write_text(json.dumps({"shares": shares}))
    unfinished.rename(report)
    while report.exists():
        time.sleep(0.02)


main(int(sys.argv[1]), Path(sys.argv[2]))
