# SPDX-License-Identifier: MIT
"""detach — `vswapctl detach PID` or `--all`: bring all of a process back, and let it go."""

from __future__ import annotations

import sys
import time

from vswapd import attachable, config, connection
from vswapd.cli.pageout import ANSWER_SECONDS
from vswapd.failure import STATUS_USAGE, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from vswapd.connection import Connection

_GONE_SECONDS_MAX = 10.0
_LOOK_SECONDS = 0.01


def _detach(daemon: Connection, pid: int, seconds: float) -> None:
    """Failure."""
    daemon.request("detach", seconds_max=seconds + ANSWER_SECONDS, pid=pid, timeout_ms=int(seconds * 1000))
    # The daemon is done with it; its agent ends a moment later.
    deadline = time.monotonic() + _GONE_SECONDS_MAX
    while attachable.has_agent(pid):
        if time.monotonic() > deadline:
            raise Failure(
                f"process {pid} is detached, but its agent has not ended", f"is it stopped? kill -CONT {pid}"
            )
        time.sleep(_LOOK_SECONDS)
    print(f"{pid}: detached", flush=True)


def _detach_all(daemon: Connection, seconds: float) -> int:
    """Those with the least swapped first: what they free is room for the others. Exit status."""
    clients = daemon.request("status")["status"]["clients"]
    wanted = [client for client in clients if client["pid"] and client["group"] != config.SELF_TEST_GROUP]
    status = 0
    for client in sorted(wanted, key=lambda client: int(client["swapped_bytes"])):
        try:
            _detach(daemon, client["pid"], seconds)
        except Failure as error:
            print(f"vswapctl: {error}", file=sys.stderr, flush=True)
            status = error.status
    return status


def main(options: argparse.Namespace) -> int:
    """`vswapctl detach`."""
    if options.all == (options.pid is not None):
        raise Failure("give a PID, or --all", "see vswapctl detach --help", STATUS_USAGE)
    if options.all:
        with connection.connect_any(options.socket) as daemon:
            return _detach_all(daemon, options.timeout)
    with connection.connect_serving(options.pid, options.socket) as daemon:
        _detach(daemon, options.pid, options.timeout)
    return 0
