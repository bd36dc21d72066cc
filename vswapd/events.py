# SPDX-License-Identifier: MIT
"""events — what the engine reports, put into words. Pure."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vswapd import records
from vswapd.sizes import format_size

if TYPE_CHECKING:
    from vswapd.records import Event, GroupStatistics


@dataclass(frozen=True)
class Notice:
    """One line for log and users. `level` is one of log.LEVELS; `group` '' when it concerns none."""

    level: str
    kind: str
    text: str
    group: str = ""
    pid: int = 0
    fields: dict[str, Any] = field(default_factory=dict)


def _cause(negative_errno: int) -> str:
    """Text of a -errno that was stored in an unsigned 64-bit field."""
    number = -(negative_errno - (1 << 64)) if negative_errno >= 1 << 63 else negative_errno
    return os.strerror(number) if 0 < number < 4096 else f"error {number}"


def _out_of_memory(event: Event, group: GroupStatistics | None, name: str, process: str) -> Notice:
    parts = f"usage {format_size(event.a)}"
    if group is not None:
        parts += (
            f" (now resident {format_size(group.resident_bytes)},"
            f" unmanaged {format_size(group.unmanaged_bytes)},"
            f" pool {format_size(group.pool_bytes)}, metadata {format_size(group.metadata_bytes)})"
        )
    text = (
        f"out of memory: group {name}, limit {format_size(event.b)}, {parts}; "
        f"killed process {process}, resident {format_size(event.c)}; raise the limit or add spill space"
    )
    fields = {"limit_bytes": event.b, "usage_bytes": event.a, "killed_resident_bytes": event.c}
    return Notice("error", "out-of-memory", text, name, event.pid, fields)


def _host(event: Event) -> Notice:
    place = "the daemon's memory cgroup" if event.place else "the machine"
    if event.kind == records.EVENT_HOST_OVER:
        text = (
            f"{place} has memory again: {format_size(event.a)} are available; that took {event.b / 1000:.1f} s,"
            f" {format_size(event.c)} were swapped out for it"
        )
        return Notice("info", "host-over", text)
    givable = f"up to {format_size(event.c)} can be swapped out" if event.c else "nothing more can be swapped out"
    text = (
        f"{place} is short of memory: {format_size(event.a)} are available,"
        f" {format_size(event.b)} are to be (host_reserve); {givable} below the groups' limits;"
        f" end something, lower limits, or add spill space"
    )
    return Notice("warning", "host-short", text)


def describe(  # noqa: C901, PLR0911 -- one for each kind
    event: Event, group: GroupStatistics | None, comm: str
) -> Notice:
    """The notice for an event of `group` (None: unknown) about the process `comm`."""
    name = group.name if group else ""
    process = f"{event.pid} ({comm or '?'})"
    if event.kind == records.EVENT_OUT_OF_MEMORY:
        return _out_of_memory(event, group, name or "?", process)
    if event.kind == records.EVENT_POISONED:
        text = (
            f"page {event.a:#x} of process {process} cannot be given back: {_cause(event.b)}; "
            f"reading it is a SIGBUS"
        )
        return Notice("error", "poisoned", text, name, event.pid, {"address": event.a})
    if event.kind == records.EVENT_CLIENT_ERROR:
        text = f"nothing more is swapped out of process {process}: {_cause(event.a)}"
        return Notice("warning", "client-error", text, name, event.pid)
    if event.kind in (records.EVENT_HOST_SHORT, records.EVENT_HOST_OVER):
        return _host(event)
    if event.kind == records.EVENT_BACKEND_ERROR:
        return Notice("error", "backend-error", f"spill backend {event.a} failed: {_cause(event.b)}")
    if event.kind == records.EVENT_FORK_WAITS:
        text = f"a fork of process {process} waits until its child can be taken over: {_cause(event.a)}"
        return Notice("error", "fork-waits", text, name, event.pid)
    if event.kind == records.EVENT_CHILD_REFUSED:
        fate = f"{event.b} killed" if event.b else "it waits where it touches a page that is out"
        text = f"a forked child of process {process} cannot be served: {_cause(event.a)}; {fate}"
        return Notice("error", "child-refused", text, name, event.pid)
    if event.kind == records.EVENT_YIELD_REFUSED:
        text = (
            f"process {process} registers {format_size(event.a)} with a userfaultfd of its own, which must stay in memory "
            f"and do not fit: it gets ENOMEM; raise the limit"
        )
        return Notice("warning", "userfaultfd-refused", text, name, event.pid)
    if event.kind == records.EVENT_SHARED:
        text = (
            f"process {process} has {format_size(event.a)} of shared memory, which is neither swapped nor counted in its "
            f"limit; give it less in its own settings (a JVM: not ZGC; PostgreSQL: shared_buffers)"
        )
        return Notice("warning", "shared-memory", text, name, event.pid)
    if event.kind == records.EVENT_CLIENT_GONE:
        return Notice("info", "client-gone", f"process {process} ended", name, event.pid)
    if event.kind == records.EVENT_REGISTERED:
        text = f"process {process} is near its limit: {event.a} regions, {format_size(event.b)}, registered"
        return Notice("info", "registered", text, name, event.pid)
    return Notice("debug", "unknown", f"event {event.kind} of process {event.pid}", name, event.pid)
