# SPDX-License-Identifier: MIT
"""status — `vswapctl status`: where the memory is, for people or as JSON."""

from __future__ import annotations

import json
import sys
from functools import partial

from vswapd import config, connection
from vswapd.cli import progress
from vswapd.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection
    from typing import Any

    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    from vswapd.connection import Connection


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _memory_table(status: dict[str, Any]) -> Table:
    table = _table("Memory", ("where",), ("pages", "bytes"))
    rows = (
        ("resident", None, status["resident_bytes"]),
        ("compressed pool (RAM)", status["pool_pages"], status["pool_bytes"]),
        ("spill (disk)", status["spill_pages"], status["spill_bytes"]),
        ("all zero", status["zero_pages"], 0),
        ("same-filled", status["same_pages"], 0),
        ("on the way out", status["staged_pages"], status["staged_pages"] * config.PAGE_BYTES),
        ("metadata", None, status["metadata_bytes"]),
        ("daemon itself", None, status["daemon_bytes"]),
    )
    for name, pages, count in rows:
        table.add_row(name, "" if pages is None else str(pages), format_size(count))
    return table


# Left out from the first on where a terminal is too narrow for all.
_GROUP_OPTIONAL = ("unmanaged", "spill", "pool", "faults", "peak")


def _group_table(status: dict[str, Any], without: Collection[str] = ()) -> Table:
    columns = {
        "limit": "limit_bytes",
        "usage": "usage_bytes",
        "peak": "usage_bytes_max",
        "resident": "resident_bytes",
        "unmanaged": "unmanaged_bytes",
        "pool": "pool_bytes",
        "spill": "spill_bytes",
        "swapped": "swapped_bytes",
        "faults": "faults",
        "clients": "client_count",
    }
    shown = [title for title in columns if title not in without]
    table = _table("Groups", ("name",), tuple(shown))
    for group in status["groups"]:
        values = ((columns[title], group[columns[title]]) for title in shown)
        table.add_row(group["name"], *(format_size(value) if "_bytes" in key else str(value) for key, value in values))
    return table


def _fitting_group_table(status: dict[str, Any], console: Console) -> Table:
    any_width = console.options.update(max_width=1000)
    for count in range(len(_GROUP_OPTIONAL) + 1):
        table = _group_table(status, _GROUP_OPTIONAL[:count])
        if console.measure(table, options=any_width).maximum <= console.width:
            break
    return table


def _recompressed(status: dict[str, Any]) -> Text:
    from rich.text import Text

    counters = status["counters"]
    return Text(
        f"Compressed again: {counters['recompressed_pages']} of {counters['recompress_examined']} old pages,"
        f" {format_size(counters['recompress_saved_bytes'])} saved for"
        f" {counters['recompress_cpu_us'] / 1e6:.1f} s of CPU;"
        f" {counters['spill_written_recompressed']} of them written back"
    )


def _moved(status: dict[str, Any]) -> Text:
    from rich.text import Text

    counters = status["counters"]
    return Text(
        f"Tiers: {counters['demoted_pages']} pages moved to a lower priority,"
        f" {counters['promoted_pages']} left for a higher one"
    )


def _host(status: dict[str, Any]) -> Text:
    from rich.text import Text

    host = status["host"]
    now = (
        f"{format_size(host['available_bytes'])} available, {format_size(host['reserve_bytes'])} are to be"
        if host["is_short"]
        else "not now"
    )
    return Text(
        f"Host short of memory: {now}; {host['shortages']} times,"
        f" {format_size(host['reclaimed_pages'] * config.PAGE_BYTES)} swapped out"
        f" and {format_size(host['written_pages'] * config.PAGE_BYTES)} written back for that"
    )


def _region_table(status: dict[str, Any]) -> Table:
    table = _table("Regions", ("name", "user"), ("size", "same-filled", "pool", "spill", "lost"))
    for region in sorted(status["regions"], key=lambda region: str(region["name"])):
        pages = (region[f"{where}_pages"] for where in ("same", "pool", "spill", "poisoned"))
        sizes = (region["size_bytes"], *(count * config.PAGE_BYTES for count in pages))
        table.add_row(region["name"], str(region["uid"]), *map(format_size, sizes))
    return table


def _client_table(status: dict[str, Any]) -> Table:
    table = _table("Processes", ("pid", "command", "group"), ("resident", "swapped", "faults", "regions"))
    for client in sorted(status["clients"], key=lambda client: -client["resident_bytes"]):
        table.add_row(
            str(client["pid"] or "?"),
            client["comm"] or "(forking)",
            client["group"],
            format_size(client["resident_bytes"]),
            format_size(client["swapped_bytes"]),
            str(client["faults"]),
            str(client["region_count"]),
        )
    return table


_HANGS_MS = 1000  # as the engine has it: others are written to then


def _state(backend: dict[str, Any]) -> str:
    state = str(backend["state"]) + (", encrypted" if backend["encrypted"] else "")
    if backend["writing_ms"] > _HANGS_MS:
        state += f"; does not answer for {backend['writing_ms'] / 1000:.0f} s"
    if backend["lacks_room"]:
        state += "; its disk is full"
    if backend["job"]:
        state += f"; {backend['job']}: {progress.format_job(backend)}"
    return state


def _backend_table(status: dict[str, Any]) -> Table:
    table = _table("Spill", ("path", "state"), ("size", "used", "room", "live", "priority"))
    for backend in status["backends"]:
        used = backend["used_bytes"]
        table.add_row(
            backend["path"],
            _state(backend),
            format_size(backend["size_bytes"]),
            format_size(used),
            format_size(backend["room_bytes"]),
            f"{100 * backend['live_bytes'] // used} %" if used else "",
            str(backend["priority"]),
        )
    return table


def _latency_table(status: dict[str, Any]) -> Table:
    table = _table("Fault latency, µs", ("from",), ("count", "mean", "p50", "p99", "p99.9"))
    for backing, latency in status["latency_us"].items():
        if latency["count"]:
            figures = (f"{latency[key]:.1f}" for key in ("mean", "p50", "p99", "p999"))
            table.add_row(backing, str(latency["count"]), *figures)
    return table


def _view(status: dict[str, Any], console: Console) -> Group:
    from rich.console import Group
    from rich.text import Text

    from vswapd import view

    parts: list[Any] = [
        Text(f"vswapd {status['version']}: {view.summary(status)}"),
        "",
        _memory_table(status),
    ]
    for entries, make in (
        (status["groups"], partial(_fitting_group_table, console=console)),
        (status["clients"], _client_table),
        (status["regions"], _region_table),
        (status["backends"], _backend_table),
        (status["faults"], _latency_table),
        (status["counters"].get("recompress_examined"), _recompressed),
        (status["counters"].get("demoted_pages") or status["counters"].get("promoted_pages"), _moved),
        (status["host"]["shortages"], _host),
    ):
        if entries:
            parts += ["", make(status)]
    return Group(*parts)


def _console() -> Console:
    from rich.console import Console

    # Not a terminal: never cut a path or a number to fit 80 columns.
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _watch(daemon: Connection, seconds: float) -> None:
    """On a terminal in place, else one after the other; until it is interrupted."""
    import time

    from rich.live import Live

    console = _console()
    try:
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                status = daemon.request("status")["status"]
                if console.is_terminal:
                    live.update(_view(status, console), refresh=True)
                else:
                    console.print(_view(status, console), "")
                time.sleep(seconds)
    except KeyboardInterrupt:
        pass  # that is how a watch ends


def main(options: argparse.Namespace) -> int:
    """`vswapctl status`."""
    with connection.connect_any(options.socket) as daemon:
        if options.watch is not None:
            _watch(daemon, options.watch)
            return 0
        status = daemon.request("status")["status"]
    if options.json:
        json.dump(status, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        console = _console()
        console.print(_view(status, console))
    sys.stdout.flush()
    return 0
