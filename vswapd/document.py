# SPDX-License-Identifier: MIT
"""document — what `vswapctl status --json` prints and `run --stats` writes.

Sums agree with their parts: every total is the engine's, taken in one call. RAM is counted once:
resident_bytes (clients' own memory), pool_bytes, metadata_bytes, and daemon_bytes for everything
else — the private and file-backed memory of the daemon's process(es), without its memfds, which are
the pool and the metadata.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vswapd import __version__, config, policy, processes
from vswapd.records import BACKEND_STATES, BACKINGS, GROUP_NO_RECOMPRESS, GROUP_NO_SPILL, GROUP_TORTURE, JOBS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vswapd.engine import Engine
    from vswapd.records import BackendStatistics, ClientStatistics, GroupStatistics, Region, Statistics

TOTALS = (
    "virtual_pages",
    "zero_pages",
    "same_pages",
    "pool_pages",
    "spill_pages",
    "staged_pages",
    "poisoned_pages",
    "kept_pages",
    "pool_bytes",
    "pool_object_bytes",
    "spill_bytes",
    "resident_bytes",
    "metadata_bytes",
    "events_dropped",
)

# Of the host, as host_… of records.Statistics.
HOST = ("is_short", "available_bytes", "reserve_bytes", "shortages", "reclaimed_pages", "written_pages")


def _latencies(statistics: Statistics, bounds_us: tuple[float, ...]) -> dict[str, dict[str, float]]:
    latencies = {}
    for index, backing in enumerate(BACKINGS):
        counts = statistics.latency[index]
        count = sum(counts)
        mean = statistics.latency_ns_sum[index] / 1000 / count if count else 0.0
        latencies[backing] = {
            "p50": round(policy.percentile(counts, bounds_us, 0.5), 3),
            "p99": round(policy.percentile(counts, bounds_us, 0.99), 3),
            "p999": round(policy.percentile(counts, bounds_us, 0.999), 3),
            "mean": round(mean, 3),
            "count": count,
        }
    return latencies


def backend_document(record: BackendStatistics) -> dict[str, Any]:
    """One backend of the document, and of the progress of a swapoff."""
    state = BACKEND_STATES[record.state] if record.state < len(BACKEND_STATES) else str(record.state)
    done_bytes = record.job_total_bytes - record.job_left_bytes
    rate = done_bytes * 1000 // record.job_ms if record.job_ms else 0
    document = asdict(record)
    del document["is_encrypted"]
    return document | {
        "state": state,
        "encrypted": bool(record.is_encrypted),
        "type": "partition" if record.is_device else "file",
        "job": JOBS[record.job] if record.job < len(JOBS) else str(record.job),
        "job_waiting": bool(record.job_waiting),
        "job_bytes_per_second": rate,
        "job_seconds_left": round(record.job_left_bytes / rate, 1) if rate else None,
    }


def _group(record: GroupStatistics) -> dict[str, Any]:
    document = asdict(record) | {
        "torture": bool(record.flags & GROUP_TORTURE),
        "no_spill": bool(record.flags & GROUP_NO_SPILL),
        "no_recompress": bool(record.flags & GROUP_NO_RECOMPRESS),
        "swapped_bytes": record.swapped_pages * config.PAGE_BYTES,
    }
    for name in ("label", "session_fd"):  # for a successor of this daemon only
        del document[name]
    return document


def _client(record: ClientStatistics, groups: dict[int, GroupStatistics], uid: int | None) -> dict[str, Any]:
    group = groups.get(record.group)
    document = asdict(record) | {
        "comm": processes.comm(record.pid) if record.pid else "",
        "uid": uid,
        "group": group.name if group else "",
        "limit_bytes": group.limit_bytes if group else 0,
        "swapped_bytes": record.swapped_pages * config.PAGE_BYTES,
        "registered": bool(record.registered),
    }
    del document["token"]  # it lets a child of the client come in: nobody else's business
    del document["socket_fd"]
    return document


def _region(record: Region) -> dict[str, Any]:
    document = asdict(record)
    for name in ("number", "group"):  # the daemon's own names for it
        del document[name]
    return document


def build_status(
    engine: Engine,
    *,
    pids: Iterable[int],
    uid_of: Callable[[ClientStatistics], int | None] = lambda _: None,
    may_see_client: Callable[[int | None], bool] = lambda _: True,
    may_see_group: Callable[[str], bool] = lambda _: True,
) -> dict[str, Any]:
    """The document. `pids`: processes whose own memory is daemon_bytes; the callables restrict what
    an unprivileged user sees of others. Slow enough (some ms) for a worker thread."""
    groups = {record.group: record for record in engine.groups()}
    clients = engine.clients()
    statistics = engine.statistics()
    totals = {name: getattr(statistics, name) for name in TOTALS}
    owners = [(record, uid_of(record)) for record in clients]
    return {
        "version": __version__,
        "daemon_bytes": sum(processes.own_bytes(pid) for pid in pids),
        **totals,
        "faults": statistics.counters.get("faults", 0),
        "host": {name: getattr(statistics, f"host_{name}") for name in HOST},
        "backends": [backend_document(record) for record in engine.backends()],
        "groups": [_group(record) for record in groups.values() if may_see_group(record.name)],
        "clients": [_client(record, groups, uid) for record, uid in owners if may_see_client(uid)],
        "regions": [_region(record) for record in engine.regions() if may_see_client(record.uid)],
        "latency_us": _latencies(statistics, engine.latency_bounds_us()),
        "counters": dict(statistics.counters),
    }
