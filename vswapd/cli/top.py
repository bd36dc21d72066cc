# SPDX-License-Identifier: MIT
"""top — `vswapctl top`: a screen that shows where the memory is, as it changes."""

from __future__ import annotations

import sys

from vswapd import connection
from vswapd.failure import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def main(options: argparse.Namespace) -> int:
    """`vswapctl top`."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Failure("top needs a terminal", "use vswapctl status, or status --json")
    with connection.connect_any(options.socket) as daemon:
        from vswapd.top import TopApp

        reason = TopApp(daemon, options.interval).run()
    if reason is not None:
        raise Failure(reason)
    return 0
