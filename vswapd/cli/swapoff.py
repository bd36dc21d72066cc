# SPDX-License-Identifier: MIT
"""swapoff — `vswapctl swapoff PATH…`: move everything off backends, then remove them.

Ctrl-C, or any other end of this process, cancels: the daemon uses the backend as before.
"""

from __future__ import annotations

import os
import sys

from vswapd import connection
from vswapd.cli import progress
from vswapd.failure import STATUS_USAGE, Failure
from vswapd.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def main(options: argparse.Namespace) -> int:
    """`vswapctl swapoff`."""
    if options.all == bool(options.path):
        raise Failure("give a PATH, or --all", "see vswapctl swapoff --help", STATUS_USAGE)
    which = {"all": True} if options.all else {"path": os.path.abspath(options.path)}
    with connection.connect_any(options.socket) as daemon:
        try:
            reply = progress.request(daemon, "swapoff", options.json, force=options.force, **which)
        except KeyboardInterrupt:
            print("vswapctl: cancelled; what was moved stays moved, the rest is in use as before", file=sys.stderr)
            return 130
    if not options.json:
        for path in reply["paths"]:
            print(f"{path}: removed")
        print(f"moved {format_size(reply['moved_bytes'])}")
    return 0
