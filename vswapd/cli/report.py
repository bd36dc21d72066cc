# SPDX-License-Identifier: MIT
"""report — `vswapctl report PID`: how much of its memory a process uses, and what a limit would cost it.

For any process, managed or not, without a daemon. Nothing is evicted.
"""

from __future__ import annotations

import dataclasses
import json
import time

from vswapd import processes, working_set
from vswapd.failure import STATUS_USAGE, Failure
from vswapd.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_SHARES = (0.75, 0.5, 0.25)  # of what is resident, where no limit is named
_HUGE_SHARE = 0.1  # from here on it is said


def _watch(pid: int, seconds: float) -> list[working_set.Look]:
    """Looks after 1, 2, 4, … seconds, and at the end. Failure."""
    try:
        working_set.clear(pid)
        started = time.monotonic()
        looks, after = [], min(1.0, seconds)
        while True:
            time.sleep(max(0.0, started + after - time.monotonic()))
            looks.append(working_set.look(pid, time.monotonic() - started))
            if after >= seconds:
                return looks
            after = min(after * 2, seconds)
    except (FileNotFoundError, ProcessLookupError):
        raise Failure(f"no process {pid}, or it has ended", "give the PID of a running process") from None
    except PermissionError:
        raise Failure(f"process {pid} is not yours", "run vswapctl as root or as its owner") from None


def _print(pid: int, looks: list[working_set.Look], costs: list[working_set.Cost]) -> None:
    last = looks[-1]
    size = format_size(last.resident_bytes)
    print(f"process {pid} ({processes.comm(pid) or '?'}): {size} of anonymous memory in RAM")
    if last.huge_bytes > last.resident_bytes * _HUGE_SHARE:
        print(f"{format_size(last.huge_bytes)} of it are huge pages, which count as touched when a part of them is")
    print(f"\n{'touched within':>14}  {'memory':>10}  {'share':>5}")
    for item in looks:
        share = item.touched_bytes / item.resident_bytes if item.resident_bytes else 0.0
        print(f"{item.seconds:>12.0f} s  {format_size(item.touched_bytes):>10}  {share:>5.0%}")
    print(f"\n{'room for':>14}  {'out':>10}  {'back, pages/s':>13}")
    for entry in costs:
        rate = f"{'> ' if entry.is_bound else ''}{entry.pages_per_second:.0f}"
        print(f"{format_size(entry.room_bytes):>14}  {format_size(entry.out_bytes):>10}  {rate:>13}")


def main(options: argparse.Namespace) -> int:
    """`vswapctl report`."""
    if options.seconds < 1:
        raise Failure("a second is the least to see anything in", "give --seconds 1 or more", STATUS_USAGE)
    looks = _watch(options.pid, options.seconds)
    resident = looks[-1].resident_bytes
    costs = [working_set.cost(looks, room) for room in options.room or [int(resident * share) for share in _SHARES]]
    if options.json:
        document = {
            "pid": options.pid,
            "looks": [dataclasses.asdict(item) for item in looks],
            "costs": [dataclasses.asdict(entry) for entry in costs],
        }
        print(json.dumps(document))
    else:
        _print(options.pid, looks, costs)
    return 0
