# SPDX-License-Identifier: MIT
"""progress — wait for a long request and show how far it is: a bar on a terminal, JSON lines, or nothing."""

from __future__ import annotations

import json
import sys

from vswapd.connection import check_reply
from vswapd.failure import Failure
from vswapd.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vswapd.connection import Connection

_BAR_CELLS = 24
_SECONDS_SILENT_MAX = 60.0  # the daemon tells how far it is several times a second


def format_seconds(seconds: float) -> str:
    """'8 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_job(job: dict[str, Any]) -> str:
    """'50 %, 320 MiB left, 210 MiB/s, 2 s left' for one of the backends of status or of a notice."""
    total, left = job["job_total_bytes"], job["job_left_bytes"]
    percent = 100 * (total - left) // total if total else 0
    parts = [f"{percent} %", f"{format_size(left)} left"]
    if job["job_waiting"]:
        parts.append("waiting for room")
    elif job["job_seconds_left"] is not None:
        parts.append(f"{format_size(job['job_bytes_per_second'])}/s")
        parts.append(f"{format_seconds(job['job_seconds_left'])} left")
    return ", ".join(parts)


def format_bar(jobs: list[dict[str, Any]]) -> str:
    """One line for all that is going on."""
    total = sum(job["job_total_bytes"] for job in jobs)
    left = sum(job["job_left_bytes"] for job in jobs)
    rate = sum(job["job_bytes_per_second"] for job in jobs)
    filled = _BAR_CELLS * (total - left) // total if total else 0
    all_jobs = {
        "job_total_bytes": total,
        "job_left_bytes": left,
        "job_waiting": all(job["job_waiting"] for job in jobs),
        "job_bytes_per_second": rate,
        "job_seconds_left": left / rate if rate else None,
    }
    name = jobs[0]["path"] if len(jobs) == 1 else f"{len(jobs)} backends"
    return f"{name} [{'#' * filled}{'.' * (_BAR_CELLS - filled)}] {format_job(all_jobs)}"


def _show_json(notice: dict[str, Any]) -> None:
    print(json.dumps({"event": "progress", "backends": notice["backends"]}), flush=True)


def _show_bar(notice: dict[str, Any]) -> None:
    if notice["backends"]:
        sys.stderr.write(f"\r{format_bar(notice['backends'])}\x1b[K")
        sys.stderr.flush()


def request(daemon: Connection, op: str, as_json: bool, **fields: Any) -> dict[str, Any]:
    """Ask for `op` and wait for its end. Failure."""
    has_bar = not as_json and sys.stderr.isatty()
    show: Callable[[dict[str, Any]], None] = _show_json if as_json else _show_bar

    def on_notice(notice: dict[str, Any]) -> None:
        if notice["notice"] == "progress" and (as_json or has_bar):
            show(notice)

    daemon.on_notice = on_notice
    try:
        daemon.send(op, **fields)
        reply = daemon.receive(_SECONDS_SILENT_MAX)
    except (OSError, EOFError) as error:
        raise Failure(f"the daemon does not answer: {error}", "see its log (journalctl -u vswapd)") from None
    finally:
        if has_bar:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
    if reply is None:
        raise Failure(f"the daemon is silent for {_SECONDS_SILENT_MAX:g} s", "see its log")
    if as_json:
        print(json.dumps({"event": "end", **reply}), flush=True)
    return check_reply(reply)
