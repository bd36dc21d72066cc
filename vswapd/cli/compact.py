# SPDX-License-Identifier: MIT
"""compact — `vswapctl compact PATH`: rewrite sparse segments and give the disk space back."""

from __future__ import annotations

import os
import sys

from vswapd import connection
from vswapd.cli import progress
from vswapd.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def main(options: argparse.Namespace) -> int:
    """`vswapctl compact`."""
    path = os.path.abspath(options.path)
    with connection.connect_any(options.socket) as daemon:
        try:
            reply = progress.request(daemon, "compact", options.json, path=path)
        except KeyboardInterrupt:
            print("vswapctl: cancelled; what was moved stays moved", file=sys.stderr)
            return 130
    if not options.json:
        before, used, live = (
            format_size(reply[key]) for key in ("used_before_bytes", "used_bytes", "live_bytes")
        )
        print(f"{reply['path']}: {before} in use before, {used} now, {live} of it live")
    return 0
