# SPDX-License-Identifier: MIT
"""records — what the engine reports, as frozen objects.

Field by field the structs of csrc/engine.h (meaning and units there; test_engine.py compares the
names), apart from the extension so that pure code and tests need not load it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BACKINGS = ("zero", "same", "pool", "spill", "staged")  # order of enum engine_backing
# What the virtual pages of a group are: the sum of these.
GROUP_BACKINGS = ("zero", "same", "pool", "spill", "shared", "staged", "poisoned", "kept")
BACKEND_STATES = ("active", "draining", "failed")
JOBS = ("", "swapoff", "compact")  # order of enum engine_backend_job

GROUP_LABEL_BYTES = 256  # of csrc/engine.h, with the 0 at its end
GROUP_TORTURE = 1
GROUP_NO_SPILL = 2
GROUP_REGIONS = 4
GROUP_NO_RECOMPRESS = 8

BACKEND_KEEP_BLOCKS = 1
BACKEND_ENCRYPT = 2

# order of enum engine_event_kind
EVENT_NONE = 0
EVENT_OUT_OF_MEMORY = 1
EVENT_POISONED = 2
EVENT_CLIENT_GONE = 3
EVENT_CLIENT_ERROR = 4
EVENT_BACKEND_ERROR = 5
EVENT_REGISTERED = 6
EVENT_FORK_WAITS = 7
EVENT_CHILD_REFUSED = 8
EVENT_YIELD_REFUSED = 9
EVENT_HOST_SHORT = 10
EVENT_HOST_OVER = 11
EVENT_SHARED = 12


@dataclass(frozen=True)
class Statistics:
    """struct engine_statistics. `latency` holds one histogram per backing, in order of BACKINGS."""

    virtual_pages: int = 0
    zero_pages: int = 0
    same_pages: int = 0
    pool_pages: int = 0
    spill_pages: int = 0
    staged_pages: int = 0
    poisoned_pages: int = 0
    kept_pages: int = 0
    pool_bytes: int = 0
    pool_object_bytes: int = 0
    spill_bytes: int = 0
    resident_bytes: int = 0
    metadata_bytes: int = 0
    group_count: int = 0
    client_count: int = 0
    backend_count: int = 0
    region_count: int = 0
    events_dropped: int = 0
    host_is_short: int = 0
    host_available_bytes: int = 0
    host_reserve_bytes: int = 0
    host_shortages: int = 0
    host_reclaimed_pages: int = 0
    host_written_pages: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    latency_ns_sum: tuple[int, ...] = (0,) * len(BACKINGS)
    latency: tuple[tuple[int, ...], ...] = ((),) * len(BACKINGS)


@dataclass(frozen=True)
class GroupStatistics:
    """struct engine_group_statistics."""

    group: int
    flags: int
    name: str
    limit_bytes: int
    pool_limit_bytes: int
    spill_limit_bytes: int = 0
    usage_bytes: int = 0
    usage_bytes_max: int = 0
    resident_bytes: int = 0
    unmanaged_bytes: int = 0
    pool_bytes: int = 0
    metadata_bytes: int = 0
    swapped_pages: int = 0
    swapped_pages_max: int = 0
    spill_bytes: int = 0
    virtual_pages: int = 0
    zero_pages: int = 0
    same_pages: int = 0
    pool_pages: int = 0
    spill_pages: int = 0
    shared_pages: int = 0
    staged_pages: int = 0
    poisoned_pages: int = 0
    kept_pages: int = 0
    client_count: int = 0
    managed_count: int = 0
    faults: int = 0
    session_fd: int = -1
    label: str = ""


@dataclass(frozen=True)
class ClientStatistics:
    """struct engine_client_statistics. pid 0: a forked child that has not said hello yet."""

    token: int
    pid: int
    group: int
    resident_bytes: int = 0
    swapped_pages: int = 0
    zero_pages: int = 0
    same_pages: int = 0
    pool_pages: int = 0
    spill_pages: int = 0
    kept_pages: int = 0
    metadata_bytes: int = 0
    faults: int = 0
    evicted_pages: int = 0
    region_count: int = 0
    registered: int = 0
    uid: int = 0
    socket_fd: int = -1


@dataclass(frozen=True)
class ClientTiers:
    """struct engine_client_tiers. The last two by number of the backend."""

    zero_pages: int = 0
    same_pages: int = 0
    pool_pages: int = 0
    pool_kept_pages: int = 0
    backend_pages: tuple[int, ...] = ()
    backend_kept_pages: tuple[int, ...] = ()


@dataclass(frozen=True)
class BackendStatistics:
    """struct engine_backend_statistics. `state` indexes BACKEND_STATES, `job` JOBS."""

    backend: int
    priority: int
    state: int
    is_device: int
    path: str
    is_encrypted: int = 0
    size_bytes: int = 0
    used_bytes: int = 0
    room_bytes: int = 0
    live_bytes: int = 0
    sparse_bytes: int = 0
    extent_count: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    trimmed_bytes: int = 0
    errors: int = 0
    rate_bytes: int = 0
    lacks_room: int = 0
    writing_ms: int = 0
    job: int = 0
    job_waiting: int = 0
    job_ms: int = 0
    job_total_bytes: int = 0
    job_left_bytes: int = 0


@dataclass(frozen=True)
class Region:
    """struct engine_region: a file of memory."""

    number: int = 0
    group: int = -1
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    is_unlinked: int = 0
    is_damaged: int = 0
    size_bytes: int = 0
    modified_ns: int = 0
    same_pages: int = 0
    pool_pages: int = 0
    spill_pages: int = 0
    poisoned_pages: int = 0
    metadata_bytes: int = 0
    name: str = ""


@dataclass(frozen=True)
class Room:
    """struct engine_room: what a drain has to move, and where it could go."""

    live_bytes: int = 0
    backend_bytes: int = 0
    pool_bytes: int = 0


@dataclass(frozen=True)
class Descriptor:
    """struct engine_descriptor."""

    fd: int
    owner: int


@dataclass(frozen=True)
class Event:
    """struct engine_event; a, b, c depend on the kind."""

    kind: int
    pid: int
    group: int
    a: int = 0
    b: int = 0
    c: int = 0
    place: int = 0
