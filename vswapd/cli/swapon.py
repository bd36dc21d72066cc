# SPDX-License-Identifier: MIT
"""swapon — `vswapctl swapon PATH`: a spill file or device more, for a daemon that runs."""

from __future__ import annotations

import os
import sys

from vswapd import connection
from vswapd.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def main(options: argparse.Namespace) -> int:
    """`vswapctl swapon`."""
    path = os.path.abspath(options.path)
    with connection.connect_any(options.socket) as daemon:
        reply = daemon.request(
            "swapon",
            path=path,
            size_bytes=options.size,
            priority=options.priority,
            rate_bytes=options.rate,
            discard=options.discard,
            encrypt=options.encrypt,
        )
    if os.path.exists(path) and os.path.isfile(path) and os.stat(path).st_mode & 0o077:
        print(f"vswapctl: {path}: others may read it; chmod 0600 {path}", file=sys.stderr)
    encrypted = ", encrypted" if reply.get("encrypted") else ""
    print(f"{reply['path']}: {format_size(reply['size_bytes'])}, priority {reply['priority']}{encrypted}")
    return 0
