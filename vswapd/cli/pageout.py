# SPDX-License-Identifier: MIT
"""pageout — `vswapctl pageout PID`: swap out all of a process that can be."""

from __future__ import annotations

from vswapd import connection
from vswapd.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

ANSWER_SECONDS = 10.0  # more than the daemon's own time limit


def page(op: str, options: argparse.Namespace) -> int:
    """Ask for `op` ('pageout' or 'pagein') of a process, say what became of it."""
    with connection.connect_serving(options.pid, options.socket) as daemon:
        reply = daemon.request(
            op,
            seconds_max=options.timeout + ANSWER_SECONDS,
            pid=options.pid,
            timeout_ms=int(options.timeout * 1000),
        )
    resident, swapped = (format_size(reply[key]) for key in ("resident_bytes", "swapped_bytes"))
    print(f"{options.pid}: resident {resident}, swapped {swapped}")
    return 0


def main(options: argparse.Namespace) -> int:
    """`vswapctl pageout`."""
    return page("pageout", options)
