# SPDX-License-Identifier: MIT
"""check — `vswapctl check PATH`: what is in a spill file or device, and what of it is damaged. Reads only."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from vswapd import connection, spillcheck
from vswapd.failure import Failure
from vswapd.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any


def _of_daemon(path: str, socket: str | None) -> dict[str, Any] | None:
    """The backend as the daemon that uses it has it; None when it cannot be asked."""
    try:
        with connection.connect_any(socket) as daemon:
            backends = daemon.request("status")["status"]["backends"]
        return next((backend for backend in backends if os.path.samefile(backend["path"], path)), None)
    except (Failure, OSError):
        return None


def _lines(report: spillcheck.Report, daemon: dict[str, Any] | None) -> list[str]:
    kind = "device" if report.is_device else "file"
    plain = report.segments - report.encrypted_segments
    lines = [f"{report.path}: {kind} of {format_size(report.size_bytes)}{', in use' * report.is_in_use}"]
    text = f"{report.segments} segments with {report.objects} objects"
    if report.encrypted_segments:
        text += f"; {report.encrypted_segments} segments are encrypted"
    lines.append(text)
    if plain:
        text = f"objects that are not encrypted: {format_size(report.object_bytes)}"
        if report.superseded_objects:
            text += f"; the pages of {report.superseded_objects} were written again later"
        lines.append(text)
    if report.encrypted_segments:
        lines.append("encrypted: without the key it is known only whether a segment is what was written, not what is in it")
    if daemon is not None:
        live = f"{daemon['extent_count']} objects, {format_size(daemon['live_bytes'])}"
        lines.append(f"live, as the daemon says: {live}")
    else:
        lines.append("which objects are live only the daemon that wrote them knows")
    if report.is_in_use:
        lines.append("in use: it was written to while it was read; what looked damaged was read again until it settled")
    if report.changing_segments:
        lines.append(f"{report.changing_segments} segments changed all the time and are not counted")
    lines += [str(finding) for finding in report.findings]
    lines.append(f"{len(report.findings)} findings" if report.findings else "no damage found")
    return lines


def main(options: argparse.Namespace) -> int:
    """`vswapctl check`."""
    report = spillcheck.check(options.path)
    daemon = _of_daemon(options.path, options.socket) if report.is_in_use else None
    if options.json:
        document = asdict(report) | {
            "live_objects": daemon["extent_count"] if daemon else None,
            "live_bytes": daemon["live_bytes"] if daemon else None,
        }
        json.dump(document, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        print(*_lines(report, daemon), sep="\n")
    sys.stdout.flush()
    return 1 if report.findings else 0
