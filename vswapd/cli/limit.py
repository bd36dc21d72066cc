# SPDX-License-Identifier: MIT
"""limit — `vswapctl limit PID [SIZE]`: change what a process shares with its group: limits, and what its pages become."""

from __future__ import annotations

from vswapd import config, connection
from vswapd.failure import STATUS_USAGE, Failure
from vswapd.sizes import format_size, format_size_argument

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any


def _changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the request has to say. Failure."""
    sizes = {"limit_bytes": options.size, "pool_limit_bytes": options.pool, "spill_limit_bytes": options.spill}
    switches = {"writeback": options.writeback, "recompress": options.recompress}
    changes = {name: size for name, size in sizes.items() if size is not None}
    changes |= {name: word == "on" for name, word in switches.items() if word is not None}
    if not changes:
        raise Failure("nothing to change", "give a SIZE, or one of the options of vswapctl limit --help", STATUS_USAGE)
    return changes


def main(options: argparse.Namespace) -> int:
    """`vswapctl limit`."""
    if options.size is not None and not config.LIMIT_BYTES_MIN <= options.size <= config.LIMIT_BYTES_MAX:
        low, high = map(format_size_argument, (config.LIMIT_BYTES_MIN, config.LIMIT_BYTES_MAX))
        raise Failure(
            f"a limit of {format_size(options.size)} is out of range", f"give {low} to {high}", STATUS_USAGE
        )
    changes = _changes(options)
    with connection.connect_serving(options.pid, options.socket) as daemon:
        reply = daemon.request("limit", pid=options.pid, **changes)
    words = [f"limit {format_size(reply['limit_bytes'])}"]
    for name, key, without in (("pool", "pool_limit_bytes", "adapts"), ("spill", "spill_limit_bytes", "without limit")):
        if key in changes:
            words.append(f"{name} {format_size(reply[key]) if reply[key] else without}")
    words += [f"{name} {'on' if reply[name] else 'off'}" for name in ("writeback", "recompress") if name in changes]
    print(f"{options.pid}: group {reply['group']}, {', '.join(words)}")
    return 0
