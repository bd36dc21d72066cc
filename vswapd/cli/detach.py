# SPDX-License-Identifier: MIT
"""detach — `vswapctl detach PID`: bring all of a process back, and let it go."""

from __future__ import annotations

import time

from vswapd import attachable, connection
from vswapd.cli.pageout import ANSWER_SECONDS
from vswapd.failure import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_GONE_SECONDS_MAX = 10.0
_LOOK_SECONDS = 0.01


def main(options: argparse.Namespace) -> int:
    """`vswapctl detach`."""
    with connection.connect_serving(options.pid, options.socket) as daemon:
        daemon.request(
            "detach",
            seconds_max=options.timeout + ANSWER_SECONDS,
            pid=options.pid,
            timeout_ms=int(options.timeout * 1000),
        )
    # The daemon is done with it; its agent ends a moment later.
    deadline = time.monotonic() + _GONE_SECONDS_MAX
    while attachable.has_agent(options.pid):
        if time.monotonic() > deadline:
            raise Failure(
                f"process {options.pid} is detached, but its agent has not ended",
                f"is it stopped? kill -CONT {options.pid}",
            )
        time.sleep(_LOOK_SECONDS)
    print(f"{options.pid}: detached")
    return 0
