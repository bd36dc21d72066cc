# SPDX-License-Identifier: MIT
"""working_set — what a process touches of its anonymous memory, by the kernel's referenced bits.

The bits are cleared once, and read after 1, 2, 4, … seconds: pages touched within t seconds are the working set W(t).
A limit that leaves room for L bytes evicts what has not been touched for the time t at which W(t) = L, and what
comes back is what W grows by at that point, dW/dt. (P. J. Denning, The Working Set Model for Program
Behavior, 1968.) Clearing costs the process a walk of its page tables, and the kernel what it knew of their age.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from vswapd.config import PAGE_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ...(?P<kind>.) \S+ \S+ (?P<inode>\d+)")
_CLEAR_ANONYMOUS = "2"  # proc_pid_clear_refs(5)


@dataclass(frozen=True)
class Look:
    """Private anonymous mappings of a process at one time, `seconds` after the clearing."""

    seconds: float
    resident_bytes: int
    touched_bytes: int
    huge_bytes: int  # of the resident ones; a huge page is touched as a whole


@dataclass(frozen=True)
class Cost:
    """What it would mean to leave room for so much. `is_bound`: at least so many pages a second."""

    room_bytes: int
    out_bytes: int
    pages_per_second: float
    is_bound: bool


def clear(pid: int) -> None:
    """Begin. OSError."""
    with open(f"/proc/{pid}/clear_refs", "w", encoding="ascii") as file:
        file.write(_CLEAR_ANONYMOUS)


def parse_smaps(lines: Iterable[str], seconds: float) -> Look:
    """Of /proc/PID/smaps."""
    sums = {"Rss": 0, "Referenced": 0, "AnonHugePages": 0}
    counts = False
    for line in lines:
        if mapping := _MAPPING.match(line):
            counts = mapping["kind"] == "p" and mapping["inode"] == "0"
            continue
        name, _, value = line.partition(":")
        if counts and name in sums:
            sums[name] += int(value.split()[0]) << 10
    return Look(seconds, sums["Rss"], sums["Referenced"], sums["AnonHugePages"])


def look(pid: int, seconds: float) -> Look:
    """How it is now. OSError."""
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        return parse_smaps(file, seconds)


def cost(looks: Sequence[Look], room_bytes: int) -> Cost:
    """Of leaving room for so much, as far as `looks`, in their order, tell."""
    resident = looks[-1].resident_bytes
    out_bytes = max(0, resident - room_bytes)
    # What was touched stays touched, though the kernel's own aging may have taken a bit meanwhile.
    touched = itertools.accumulate((item.touched_bytes for item in looks), max)
    points = [(0.0, 0), *zip((item.seconds for item in looks), touched, strict=True)]
    for (before, low), (after, high) in itertools.pairwise(points):
        if low <= room_bytes < high and out_bytes:
            rate = (high - low) / (after - before) / PAGE_BYTES
            # Less than what was touched before the first look: how fast it comes back is not to be seen.
            return Cost(room_bytes, out_bytes, rate, is_bound=low == 0)
    return Cost(room_bytes, out_bytes, 0.0, is_bound=False)
