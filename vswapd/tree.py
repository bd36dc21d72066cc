# SPDX-License-Identifier: MIT
"""tree — the system as files: what is where, who may read and write it, what it says and does.

    swaps  stat  pressure
    groups/NAME/{status,limit}
    clients/PID/{status,limit,tiers,pageout,pagein}
    backends/NUMBER/{status,priority,drain}
    regions/NAME

Formats: swaps as /proc/swaps, stat as /proc/vmstat, pressure as /proc/pressure/memory, status as
/proc/PID/status with sizes in kB; tiers is a table of kB, a line for each; limit is a number of bytes, and takes whatever --limit takes. What is
written is carried out as the writer's own request (operations.py decides), at once, one value a write.
fs.py puts it into a file system; this file knows nothing of FUSE. What is in regions/ is no text, and region_files.py's.
"""

from __future__ import annotations

import errno
import math
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vswapd import processes
from vswapd.accept import Peer
from vswapd.cli.swaps import format_swaps
from vswapd.groups import GroupError
from vswapd.operations import Caller
from vswapd.request import RequestError
from vswapd.records import BACKEND_STATES
from vswapd.sizes import parse_size
from vswapd.document import HOST, TOTALS, backend_document

if TYPE_CHECKING:
    from collections.abc import Callable

    from vswapd.engine import Engine
    from vswapd.groups import GroupRegistry
    from vswapd.operations import Operations
    from vswapd.records import BackendStatistics, ClientStatistics
    from vswapd.regions import Regions

Path = tuple[str, ...]

REGIONS: Path = ("regions",)

_ERRNO_OF_CODE = {
    "bad-request": errno.EINVAL,
    "denied": errno.EACCES,
    "no-process": errno.ESRCH,
    "not-managed": errno.ESRCH,
    "no-group": errno.ENOENT,
    "no-backend": errno.ENOENT,
    "busy": errno.EBUSY,
    "timeout": errno.ETIMEDOUT,
    "no-room": errno.ENOMEM,
    "stopping": errno.ESHUTDOWN,
}
_PRESSURE_WINDOWS_SECONDS = (10.0, 60.0, 300.0)


@dataclass(frozen=True)
class Node:
    """A directory (`names`) or a file; `mode` with its type. A file without `read` can only be written."""

    mode: int
    uid: int = 0
    names: Callable[[], list[str]] | None = None
    read: Callable[[], str] | None = None
    request: Callable[[str], dict[str, Any]] | None = None  # what a write of this text asks for


class Pressure:
    """How long threads waited for faults, averaged as the kernel averages PSI.

    The share of time that all threads together waited: with several at once it is more than the kernel's
    "some" would be, and is cut at 100.
    """

    def __init__(self) -> None:
        self._averages = [0.0] * len(_PRESSURE_WINDOWS_SECONDS)
        self._total_us = 0
        self._seconds: float | None = None

    def update(self, total_us: int, seconds: float) -> None:
        """`total_us`: waited since the daemon started; `seconds`: the time now."""
        if self._seconds is not None and seconds > self._seconds:
            passed = seconds - self._seconds
            share = min(100.0, (total_us - self._total_us) / passed / 1e4)
            for index, window in enumerate(_PRESSURE_WINDOWS_SECONDS):
                weight = math.exp(-passed / window)
                self._averages[index] = self._averages[index] * weight + share * (1 - weight)
        self._total_us, self._seconds = total_us, seconds

    def text(self) -> str:
        """One line of /proc/pressure/memory."""
        averages = zip(_PRESSURE_WINDOWS_SECONDS, self._averages, strict=True)
        shares = " ".join(f"avg{window:.0f}={share:.2f}" for window, share in averages)
        return f"some {shares} total={self._total_us}\n"


def _directory(names: Callable[[], list[str]], uid: int = 0, mode: int = 0o555) -> Node:
    return Node(stat.S_IFDIR | mode, uid, names=names)


def _file(read: Callable[[], str], uid: int = 0, mode: int = 0o444) -> Node:
    return Node(stat.S_IFREG | mode, uid, read=read)


def _lines(fields: dict[str, object]) -> str:
    return "".join(f"{name}:\t{value}\n" for name, value in fields.items())


def _kilobytes(count: int) -> str:
    return f"{count >> 10} kB"


def _size_request(op: str, key: str, **fields: Any) -> Callable[[str], dict[str, Any]]:
    def request(text: str) -> dict[str, Any]:
        return {"op": op, key: parse_size(text), **fields}

    return request


def _integer_request(key: str, **fields: Any) -> Callable[[str], dict[str, Any]]:
    def request(text: str) -> dict[str, Any]:
        return {"op": "backend", key: int(text), **fields}

    return request


def _drain_request(number: int) -> Callable[[str], dict[str, Any]]:
    def request(text: str) -> dict[str, Any]:
        if text.strip() not in ("0", "1"):
            raise ValueError("write 1, or 0 to stop")
        return {"op": "backend", "backend": number, "drain": text.strip() == "1"}

    return request


def _page_request(op: str, pid: int) -> Callable[[str], dict[str, Any]]:
    def request(text: str) -> dict[str, Any]:
        if text.strip() != "1":
            raise ValueError("write 1")
        return {"op": op, "pid": pid}

    return request


class Tree:
    """All nodes, over one engine."""

    def __init__(
        self, engine: Engine, groups: GroupRegistry, operations: Operations, regions: Regions | None = None
    ) -> None:
        self._engine = engine
        self.regions = regions
        self._groups = groups
        self._operations = operations
        self.pressure = Pressure()

    def node(self, path: Path) -> Node | None:
        """What is at `path` now."""
        if not path:
            names = ["swaps", "stat", "pressure", "groups", "clients", "backends"]
            return _directory(lambda: names + [*REGIONS] * (self.regions is not None))
        if path == REGIONS and self.regions is not None:
            return _directory(self.regions.names, mode=0o1777)
        first, *rest = path
        if first in ("swaps", "stat", "pressure") and not rest:
            return _file({"swaps": self._swaps, "stat": self._stat, "pressure": self.pressure.text}[first])
        below = {"groups": self._group, "clients": self._client, "backends": self._backend}.get(first)
        if below is None or len(rest) > 2:
            return None
        if not rest:
            return _directory({"groups": self._group_names, "clients": self._pids, "backends": self._numbers}[first])
        return below(rest[0], rest[1] if len(rest) == 2 else "")

    def region(self, path: Path) -> int | None:
        """The number of the region at `path`."""
        return self.regions.find(path[1]) if self.regions and path[:1] == REGIONS and len(path) == 2 else None

    async def write(self, node: Node, text: str, uid: int, pid: int) -> None:
        """Carry out a write by a process. OSError."""
        if node.request is None:
            raise OSError(errno.EACCES, "not writable")
        try:
            request = node.request(text)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from None
        try:
            await self._operations.answer(request, Caller(Peer(pid, uid, uid)))
        except RequestError as error:
            raise OSError(_ERRNO_OF_CODE.get(error.code, errno.EIO), str(error)) from None
        except GroupError as error:
            raise OSError(errno.EBUSY, str(error)) from None

    # ---- files of the root ----

    def _swaps(self) -> str:
        return format_swaps([backend_document(record) for record in self._engine.backends()])

    def _stat(self) -> str:
        statistics = self._engine.statistics()
        names = (*TOTALS, *(f"host_{name}" for name in HOST))
        figures = {name: getattr(statistics, name) for name in names}
        # poisoned_pages is both; as a total it is the same number.
        return "".join(f"{name} {count}\n" for name, count in {**statistics.counters, **figures}.items())

    # ---- groups ----

    def _group_names(self) -> list[str]:
        return sorted(group.name for group in self._groups)

    def _group(self, name: str, file: str) -> Node | None:
        group = self._groups.find(name)
        if group is None:
            return None
        uid = group.owner_uid

        def status() -> str:
            record = self._groups.statistics(group)
            if record is None:
                raise OSError(errno.ENOENT, "the group is gone")
            return _lines(
                {
                    "Name": record.name,
                    "Uid": uid,
                    "Limit": _kilobytes(record.limit_bytes),
                    "Usage": _kilobytes(record.usage_bytes),
                    "UsagePeak": _kilobytes(record.usage_bytes_max),
                    "Resident": _kilobytes(record.resident_bytes),
                    "Unmanaged": _kilobytes(record.unmanaged_bytes),
                    "Pool": _kilobytes(record.pool_bytes),
                    "Metadata": _kilobytes(record.metadata_bytes),
                    "Swapped": _kilobytes(record.swapped_pages << 12),
                    "Spill": _kilobytes(record.spill_bytes),
                    "SpillLimit": _kilobytes(record.spill_limit_bytes),
                    "Virtual": _kilobytes(record.virtual_pages << 12),
                    "Faults": record.faults,
                    "Clients": record.client_count,
                }
            )

        def limit() -> str:
            record = self._groups.statistics(group)
            return f"{record.limit_bytes if record else 0}\n"

        if not file:
            return _directory(lambda: ["status", "limit"], uid, 0o500)
        if file == "status":
            return _file(status, uid, 0o400)
        if file == "limit":
            request = _size_request("limit", "limit_bytes", group=name)
            return Node(stat.S_IFREG | 0o600, uid, read=limit, request=request)
        return None

    # ---- clients ----

    def _pids(self) -> list[str]:
        return sorted((str(record.pid) for record in self._engine.clients() if record.pid), key=int)

    def _client(self, name: str, file: str) -> Node | None:
        record = next((record for record in self._engine.clients() if record.pid and str(record.pid) == name), None)
        if record is None:
            return None
        pid = record.pid
        # As operations.py: who connected, not who it has become.
        owner = self._operations.client_uid(record)
        uid = 0 if owner is None else owner
        if not file:
            return _directory(lambda: ["status", "limit", "tiers", "pageout", "pagein"], uid, 0o500)
        if file == "status":
            return _file(lambda: self._client_status(record), uid, 0o400)
        if file == "limit":
            request = _size_request("limit", "limit_bytes", pid=pid)
            return Node(stat.S_IFREG | 0o600, uid, read=lambda: self._client_limit(record), request=request)
        if file == "tiers":
            return _file(lambda: self._client_tiers(record), uid, 0o400)
        if file in ("pageout", "pagein"):
            return Node(stat.S_IFREG | 0o200, uid, request=_page_request(file, pid))
        return None

    def _client_limit(self, record: ClientStatistics) -> str:
        group = self._groups.by_number(record.group)
        figures = self._groups.statistics(group) if group else None
        return f"{figures.limit_bytes if figures else 0}\n"

    def _client_tiers(self, record: ClientStatistics) -> str:
        tiers = self._engine.client_tiers(record.token)
        rows = [("zero", tiers.zero_pages, 0), ("same", tiers.same_pages, 0)]
        rows.append(("pool", tiers.pool_pages, tiers.pool_kept_pages))
        for backend in self._engine.backends():
            number = backend.backend
            rows.append((f"backends/{number}", tiers.backend_pages[number], tiers.backend_kept_pages[number]))
        lines = [f"{name}\t{swapped << 2}\t{kept << 2}\n" for name, swapped, kept in rows]
        return "Tier\tSwapped_kB\tKept_kB\n" + "".join(lines)

    def _client_status(self, record: ClientStatistics) -> str:
        group = self._groups.by_number(record.group)
        return _lines(
            {
                "Name": processes.comm(record.pid),
                "Pid": record.pid,
                "Group": group.name if group else "",
                "Resident": _kilobytes(record.resident_bytes),
                "Swapped": _kilobytes(record.swapped_pages << 12),
                "Zero": _kilobytes(record.zero_pages << 12),
                "SameFilled": _kilobytes(record.same_pages << 12),
                "Pool": _kilobytes(record.pool_pages << 12),
                "Spill": _kilobytes(record.spill_pages << 12),
                "Kept": _kilobytes(record.kept_pages << 12),
                "Metadata": _kilobytes(record.metadata_bytes),
                "Faults": record.faults,
                "Evicted": record.evicted_pages,
                "Regions": record.region_count,
                "Registered": record.registered,
            }
        )

    # ---- backends ----

    def _numbers(self) -> list[str]:
        return [str(record.backend) for record in self._engine.backends()]

    def _backend(self, name: str, file: str) -> Node | None:
        record = next((record for record in self._engine.backends() if str(record.backend) == name), None)
        if record is None:
            return None
        number = record.backend
        if not file:
            return _directory(lambda: ["status", "priority", "drain"])
        if file == "priority":
            request = _integer_request("priority", backend=number)
            return Node(stat.S_IFREG | 0o644, read=lambda: f"{record.priority}\n", request=request)
        if file == "drain":
            is_draining = BACKEND_STATES[record.state] == "draining"
            return Node(stat.S_IFREG | 0o644, read=lambda: f"{is_draining:d}\n", request=_drain_request(number))
        return _file(lambda: _backend_status(record)) if file == "status" else None


def _backend_status(record: BackendStatistics) -> str:
    return _lines(
        {
            "Path": record.path.encode("unicode_escape").decode(),
            "State": BACKEND_STATES[record.state],
            "Encrypted": "yes" if record.is_encrypted else "no",
            "Priority": record.priority,
            "Size": _kilobytes(record.size_bytes),
            "Used": _kilobytes(record.used_bytes),
            "Live": _kilobytes(record.live_bytes),
            "Written": _kilobytes(record.written_bytes),
            "Read": _kilobytes(record.read_bytes),
            "Errors": record.errors,
            "JobTotal": _kilobytes(record.job_total_bytes),
            "JobLeft": _kilobytes(record.job_left_bytes),
        }
    )
