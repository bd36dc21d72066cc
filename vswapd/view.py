# SPDX-License-Identifier: MIT
"""view — figures of document.py's document as people look at them. Pure; `vswapctl top` shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vswapd import config
from vswapd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

Document = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table of records: how it is named, read and written."""

    title: str
    key: str
    write: Callable[[Any], str] = str
    is_number: bool = True


GROUP_COLUMNS = (
    Column("group", "name", is_number=False),
    Column("limit", "limit_bytes", format_size),
    Column("usage", "usage_bytes", format_size),
    Column("resident", "resident_bytes", format_size),
    Column("pool", "pool_bytes", format_size),
    Column("swapped", "swapped_bytes", format_size),
    Column("faults/s", "faults_rate", "{:.0f}".format),
    Column("procs", "client_count"),
)
CLIENT_COLUMNS = (
    Column("pid", "pid"),
    Column("command", "comm", is_number=False),
    Column("group", "group", is_number=False),
    Column("resident", "resident_bytes", format_size),
    Column("swapped", "swapped_bytes", format_size),
    Column("faults/s", "faults_rate", "{:.0f}".format),
)
BACKEND_COLUMNS = (
    Column("spill", "path", is_number=False),
    Column("state", "state", is_number=False),
    Column("size", "size_bytes", format_size),
    Column("used", "used_bytes", format_size),
    Column("prio", "priority"),
    Column("written/s", "written_bytes_rate", format_size),
    Column("read/s", "read_bytes_rate", format_size),
)


def _rate(now: dict[str, Any], before: dict[str, Any] | None, key: str, seconds: float) -> float:
    if before is None or seconds <= 0:
        return 0.0
    # A PID or a name may have been used again by somebody with smaller counters.
    return max(0.0, float(now[key] - before[key]) / seconds)


def with_rates(now: Document, before: Document | None, seconds: float) -> Document:
    """The document with a …_rate for what only counts up; `before` it was so `seconds` ago."""
    document = dict(now)
    for kind, name, keys in (
        ("groups", "name", ("faults",)),
        ("clients", "pid", ("faults",)),
        ("backends", "path", ("written_bytes", "read_bytes")),
    ):
        known = {entry[name]: entry for entry in before[kind]} if before else {}
        document[kind] = [
            entry | {f"{key}_rate": _rate(entry, known.get(entry[name]), key, seconds) for key in keys}
            for entry in now[kind]
        ]
    return document


def sort_entries(entries: list[dict[str, Any]], column: Column, *, is_reversed: bool) -> list[dict[str, Any]]:
    """Numbers from the largest, names from A, unless reversed."""
    return sorted(entries, key=lambda entry: entry[column.key], reverse=column.is_number != is_reversed)


def tiers(document: Document) -> list[tuple[str, int, int]]:
    """(where, pages' worth of program memory there in bytes, what it costs in bytes)."""
    page = config.PAGE_BYTES
    return [
        ("resident", document["resident_bytes"], document["resident_bytes"]),
        ("pool", document["pool_pages"] * page, document["pool_bytes"]),
        ("spill", document["spill_pages"] * page, document["spill_bytes"]),
        ("no bytes", (document["zero_pages"] + document["same_pages"]) * page, 0),
    ]


def bar(count: int, total: int, width: int) -> str:
    """`count` of `total` in at most `width` characters; what is there is seen."""
    filled = round(width * count / total) if total else 0
    if count:
        filled = max(1, filled)
    return "█" * filled + "░" * (width - filled)


def latencies(now: Document, before: Document | None, seconds: float) -> list[tuple[str, float, float, float]]:
    """(backing, faults a second, their mean in µs, 99th percentile since the daemon started in µs)."""
    rows = []
    for backing, latency in now["latency_us"].items():
        old = before["latency_us"][backing] if before else latency
        count = latency["count"] - old["count"]
        mean = (latency["mean"] * latency["count"] - old["mean"] * old["count"]) / count if count > 0 else 0.0
        rows.append((backing, max(0.0, count / seconds) if seconds > 0 else 0.0, max(0.0, mean), latency["p99"]))
    return rows


def _count(entries: list[Any], one: str, many: str) -> str:
    return f"{len(entries)} {one if len(entries) == 1 else many}"


def summary(document: Document) -> str:
    """How much is swapped, and what that costs."""
    page = config.PAGE_BYTES
    swapped = sum(document[f"{name}_pages"] for name in ("zero", "same", "pool", "spill", "staged")) * page
    stored = document["pool_bytes"] + document["spill_bytes"]
    groups = _count(document["groups"], "group", "groups")
    text = f"{_count(document['clients'], 'process', 'processes')} in {groups}, {format_size(swapped)} swapped"
    if swapped and stored:
        text += f" in {format_size(stored)} ({swapped / stored:.1f} : 1)"
    return text
