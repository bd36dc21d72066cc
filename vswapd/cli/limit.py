# SPDX-License-Identifier: MIT
"""limit — `vswapctl limit PID SIZE`: change the limit that a process shares with its group."""

from __future__ import annotations

from vswapd import config, connection
from vswapd.failure import STATUS_USAGE, Failure
from vswapd.sizes import format_size, format_size_argument

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def main(options: argparse.Namespace) -> int:
    """`vswapctl limit`."""
    if not config.LIMIT_BYTES_MIN <= options.size <= config.LIMIT_BYTES_MAX:
        low, high = map(format_size_argument, (config.LIMIT_BYTES_MIN, config.LIMIT_BYTES_MAX))
        raise Failure(
            f"a limit of {format_size(options.size)} is out of range", f"give {low} to {high}", STATUS_USAGE
        )
    with connection.connect_serving(options.pid, options.socket) as daemon:
        reply = daemon.request("limit", pid=options.pid, limit_bytes=options.size)
    print(f"{options.pid}: group {reply['group']}, limit {format_size(reply['limit_bytes'])}")
    return 0
