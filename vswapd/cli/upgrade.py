# SPDX-License-Identifier: MIT
"""upgrade — `vswapctl upgrade`: have the installed version take over from the running daemon."""

from __future__ import annotations

import time

from vswapd import connection
from vswapd.failure import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

_SECONDS_MAX = 90.0


def _answering(path: str | None) -> dict[str, Any] | None:
    """What the daemon says of itself; None while there is none."""
    try:
        with connection.connect_any(path) as daemon:
            return daemon.request("ping")
    except Failure:
        return None


def main(options: argparse.Namespace) -> int:
    """`vswapctl upgrade`."""
    with connection.connect_any(options.socket) as daemon:
        before = daemon.request("ping")
        daemon.request("upgrade")
    deadline = time.monotonic() + _SECONDS_MAX
    while time.monotonic() < deadline:
        now = _answering(options.socket)
        if now is not None and now["supervisor"] != before["supervisor"]:
            print(f"vswapd {now['version']} has taken over from {before['version']}")
            return 0
        time.sleep(0.02)  # polling another process's state
    raise Failure("the daemon was not replaced; it goes on", "see its log (journalctl -u vswapd)")
