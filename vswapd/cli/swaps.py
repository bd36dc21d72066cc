# SPDX-License-Identifier: MIT
"""swaps — `vswapctl swaps`: the columns and the spacing of /proc/swaps (mm/swapfile.c, swap_show), KiB.

An encrypted one is of type file,encrypted or partition,encrypted.
"""

from __future__ import annotations

import sys

from vswapd import connection

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

_HEADER = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
_PATH_WIDTH = 40
_WIDE = 10_000_000  # from here on a number fills its column


def _escape(path: str) -> str:
    """As seq_file_path: parsers split at white space."""
    return "".join(f"\\{ord(character):03o}" if character in " \t\n\\" else character for character in path)


def format_swaps(backends: list[dict[str, Any]]) -> str:
    """The whole text."""
    lines = [_HEADER]
    for backend in backends:
        path = _escape(backend["path"])
        used = backend["used_bytes"] // 1024
        size = used + backend["room_bytes"] // 1024  # what its file system cannot hold is no capacity
        padding = " " * max(1, _PATH_WIDTH - len(path.encode("utf-8", "surrogateescape")))
        kind = "partition" if backend["type"] == "partition" else "file"
        kind += ",encrypted" if backend["encrypted"] else "\t" * (kind == "file")
        columns = (f"{count}\t{'' if count >= _WIDE else chr(9)}" for count in (size, used))
        lines.append(f"{path}{padding}{kind}\t{''.join(columns)}{backend['priority']}\n")
    return "".join(lines)


def main(options: argparse.Namespace) -> int:
    """`vswapctl swaps`."""
    with connection.connect_any(options.socket) as daemon:
        status = daemon.request("status")["status"]
    sys.stdout.write(format_swaps(status["backends"]))
    sys.stdout.flush()
    return 0
