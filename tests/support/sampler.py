# SPDX-License-Identifier: MIT
"""sampler — what a command under `vswapctl run` really costs, measured from outside.

A thread looks every ~10 ms at the process tree below a PID: Pss_Anon of each process out of
smaps_rollup, and pool_bytes + metadata_bytes out of the daemon's status. Their sum is what a limit
bounds. Nothing here trusts the daemon about the processes' own memory.

The daemon and vswapctl themselves are left out: their footprint is reported apart (daemon_bytes).

Two readings are never of one instant: a page that is evicted between them would be counted twice. The
daemon is asked before and after each walk over the tree, and the smaller answer counts. What forked relatives
share is counted twice by a walk in which one of them ends (half with it, then whole with the other) or begins:
such a walk is done again. What one process gives up while another takes as much would be counted twice as well: of two
walks the smaller reading of each counts.

This module needs neither vswapd nor pytest: scripts/demo uses it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_BYTES = 4096
_INTERVAL_SECONDS = 0.01
_MANAGED_GRACE_SECONDS = 0.5  # a member above the minimum for so long must be a client
_MIN_BYTES_DEFAULT = 16 << 20
_STATUS_SECONDS_MAX = 0.25  # a daemon that does not answer (its GIL is held) must not stop the sampling
_WALKS_MAX = 3  # of a tree that changes each time
_SYS_KCMP = 312  # x86-64
_KCMP_VM = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def parents() -> dict[int, int]:
    """Parent of every process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _read(f"/proc/{name}/stat").rpartition(b")")[2].split()
            if len(fields) > 1:
                found[int(name)] = int(fields[1])
    return found


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            yield from map(int, _read(f"/proc/{pid}/task/{thread}/children").split())


def tree(root: int, without: frozenset[int] = frozenset()) -> dict[int, int]:
    """{pid: parent} of all below `root`, nothing at or below a PID of `without`."""
    lists = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
    below: dict[int, list[int]] = {}
    if not lists:
        for child, parent in parents().items():
            below.setdefault(parent, []).append(child)
    found: dict[int, int] = {}
    stack = [root]
    while stack:
        pid = stack.pop()
        for child in list(_children(pid)) if lists else below.get(pid, []):
            if child not in found and child not in without:
                found[child] = pid
                stack.append(child)
    return found


def pss_anon_bytes(pid: int) -> int:
    """Anonymous memory of a process, its share of what it shares with forked relatives."""
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss_Anon:"):
            return int(line.split()[1]) << 10
    return 0


def same_address_space(first: int, second: int) -> bool:
    """True between vfork and exec: both show the same memory, and it must be counted once."""
    return bool(_libc.syscall(_SYS_KCMP, first, second, _KCMP_VM, 0, 0) == 0)


def environment_value(pid: int, name: str) -> str | None:
    """A variable of a process's environment as it was at its exec."""
    prefix = name.encode() + b"="
    for entry in _read(f"/proc/{pid}/environ").split(b"\0"):
        if entry.startswith(prefix):
            return os.fsdecode(entry[len(prefix) :])
    return None


class ControlClient:
    """Asks a daemon over its socket: one JSON line each way."""

    def __init__(self, path: str, seconds_max: float = 5.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(seconds_max)
        self._buffer = b""
        self._owed = 0  # answers to requests that we stopped waiting for
        try:
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _line(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                raise EOFError("the daemon closed the connection")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        document: dict[str, Any] = json.loads(line)
        return document

    def request(self, operation: str, seconds_max: float | None = None, **fields: Any) -> dict[str, Any]:
        """The answer. TimeoutError, OSError, EOFError. After a TimeoutError the next call waits for
        the late answer first.
        """
        if seconds_max is not None:
            self._socket.settimeout(seconds_max)
        while self._owed:
            if "notice" not in self._line():
                self._owed -= 1
        self._socket.sendall(json.dumps({"op": operation, **fields}).encode() + b"\n")
        self._owed += 1
        while True:
            answer = self._line()
            if "notice" not in answer:
                self._owed -= 1
                return answer

    def status(self, seconds_max: float | None = None) -> dict[str, Any]:
        """The status document."""
        answer = self.request("status", seconds_max)
        if not answer.get("ok"):
            raise RuntimeError(f"status refused: {answer}")
        document: dict[str, Any] = answer["status"]
        return document


def answering_pid(socket_path: str, seconds_max: float, dead: int = 0) -> int:
    """PID of the daemon that answers there, another than `dead`: waited for. TimeoutError."""
    deadline = time.monotonic() + seconds_max
    while True:
        with contextlib.suppress(OSError, EOFError), ControlClient(socket_path, seconds_max) as control:
            pid = int(control.request("ping", seconds_max)["pid"])
            if pid != dead:
                return pid
        if time.monotonic() > deadline:
            raise TimeoutError("no daemon answers")
        time.sleep(0.001)  # polling another process's state


@dataclass
class Member:
    """A process of the tree, as it was seen."""

    pid: int
    comm: str = ""
    min_bytes: int = _MIN_BYTES_DEFAULT
    bytes_max: int = 0
    above_since: float | None = None  # continuously above the minimum since
    above_seconds: float = 0.0  # longest time so
    managed: bool = False

    def note(self, count: int, now: float) -> None:
        """One reading."""
        self.bytes_max = max(self.bytes_max, count)
        if count < self.min_bytes:
            self.above_since = None
        elif self.above_since is None:
            self.above_since = now
        else:
            self.above_seconds = max(self.above_seconds, now - self.above_since)

    @property
    def is_unmanaged(self) -> bool:
        """It was large for long enough, and never a client."""
        return not self.managed and self.above_seconds > _MANAGED_GRACE_SECONDS


@dataclass
class Samples:
    """What a Sampler saw."""

    count: int = 0
    status_count: int = 0
    peak_bytes: int = 0  # Pss_Anon of the tree + pool + metadata
    peak_resident_bytes: int = 0  # Pss_Anon of the tree at that moment
    resident_bytes_max: int = 0
    swapped_bytes_max: int = 0
    demand_bytes_max: int = 0  # Pss_Anon of the tree + swapped: what the program has in all
    pool_bytes_max: int = 0
    metadata_bytes_max: int = 0
    spill_bytes_max: int = 0
    daemon_bytes_max: int = 0
    faults: int = 0
    members: dict[int, Member] = field(default_factory=dict)
    status_at_most_swapped: dict[str, Any] = field(default_factory=dict)
    status_last: dict[str, Any] = field(default_factory=dict)
    socket_path: str = ""
    daemon_pid: int = 0
    history: list[tuple[float, int, int]] = field(default_factory=list)  # (seconds, tree, pool + metadata)

    def above(self, limit_bytes: float) -> int:
        """How many samples had a cost above `limit_bytes`."""
        return sum(resident + cost > limit_bytes for _, resident, cost in self.history)

    def excursions(self, limit_bytes: float) -> list[tuple[float, float, int]]:
        """When the cost was above `limit_bytes`: (from, to, highest), seconds since the start."""
        found: list[tuple[float, float, int]] = []
        was_above = False
        for seconds, resident, cost in self.history:
            above = resident + cost > limit_bytes
            if above and was_above:
                start, _, highest = found[-1]
                found[-1] = (start, seconds, max(highest, resident + cost))
            elif above:
                found.append((seconds, seconds, resident + cost))
            was_above = above
        return found

    @property
    def unmanaged(self) -> list[Member]:
        """Members that should have been clients."""
        return [member for member in self.members.values() if member.is_unmanaged]


class Sampler:
    """with Sampler(popen.pid) as sampler: … — then sampler.samples. `root` is vswapctl's PID."""

    def __init__(self, root: int, socket_path: str | None = None, interval_seconds: float = _INTERVAL_SECONDS) -> None:
        self.samples = Samples()
        self._root = root
        self._socket_path = socket_path
        self._interval_seconds = interval_seconds
        self._group = ""
        self._client: ControlClient | None = None
        self._without: frozenset[int] = frozenset()
        self._stop = threading.Event()
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._status: dict[str, Any] = {}
        self._started = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._client is not None:
            self._client.close()

    def wait_connected(self, seconds_max: float = 20.0) -> str:
        """Until the daemon was found; returns its socket."""
        if not self._connected.wait(seconds_max):
            raise TimeoutError("no process of the tree names a daemon's socket that answers")
        return self.samples.socket_path

    # ---- the thread ----

    def _run(self) -> None:
        self._started = time.monotonic()
        before = self._cost_of_daemon()
        while not self._stop.is_set():
            started = time.monotonic()
            resident = self._resident(started)
            after = self._cost_of_daemon()
            self._note(resident, min(before, after))
            self.samples.history.append((started - self._started, resident, min(before, after)))
            before = after
            # At most half of one CPU, whatever a look costs.
            spent = time.monotonic() - started
            self._stop.wait(max(self._interval_seconds - spent, spent))

    def _addresses(self) -> Iterator[tuple[str, str]]:
        """(socket, group), as the command's environment has them or as `vswapctl run` names them.

        A program that writes its own title (redis) has overwritten its environment.
        """
        for pid in tree(self._root):
            path = environment_value(pid, "VSWAPD_SOCKET")
            group = environment_value(pid, "VSWAP_GROUP")
            if path and group:
                yield path, group
        for path in glob.glob(f"{tempfile.gettempdir()}/vswap-{self._root}-*/vswapd.sock"):
            yield path, f"run-{self._root}"

    def _connect(self) -> None:
        for path, group in self._addresses():
            with contextlib.suppress(OSError, EOFError):
                client = ControlClient(self._socket_path or path, _STATUS_SECONDS_MAX)
                try:
                    answer = client.request("ping", 2.0)
                    self.samples.daemon_pid = int(answer["supervisor"] or answer["pid"])
                except BaseException:
                    client.close()
                    raise
                self._client = client
                self._group = group
                self._without = frozenset({self.samples.daemon_pid})
                self.samples.socket_path = path
                self._connected.set()
                return

    def _cost_of_daemon(self) -> int:
        """Pool and metadata, as the daemon reports them now (0 before it is found)."""
        if self._client is None:
            self._connect()
        if self._client is None:
            return 0
        try:
            self._status = self._client.status(_STATUS_SECONDS_MAX)
            self.samples.status_count += 1
        except TimeoutError:
            pass  # what it said last counts on
        except (OSError, EOFError):
            self._status = {}
        return self._cost()

    def _own_group(self) -> dict[str, Any]:
        groups = self._status.get("groups", [])
        return next((group for group in groups if group["name"] == self._group), {})

    def _cost(self) -> int:
        group = self._own_group()
        return int(group.get("pool_bytes", 0)) + int(group.get("metadata_bytes", 0))

    def _resident(self, now: float) -> int:
        """Between two walks in which nobody ended or began, at the moment of which everybody had at least what both saw.

        One walk alone adds what one process had, and has given up, to what another has taken since.
        """
        alive, walk, totals = self._alive(), self._walk(now), []
        for _ in range(_WALKS_MAX):
            walk_before, walk = walk, self._walk(now)
            totals.append(sum(min(count, walk_before.get(pid, 0)) for pid, count in walk.items()))
            alive_before, alive = alive, self._alive()
            if alive == alive_before:
                return totals[-1]
        return min(totals)

    def _alive(self) -> set[int]:
        """Who has memory: at its end a process is without before what it had is its relatives' alone."""
        return {pid for pid in tree(self._root, self._without) if _read(f"/proc/{pid}/statm")[:2] not in (b"", b"0 ")}

    def _walk(self, now: float) -> dict[int, int]:
        """Anonymous bytes of the command and all below it, by PID; the daemon is no part of it."""
        found: dict[int, int] = {}
        outside = set(self._without)
        front = _read(f"/proc/{self._root}/cmdline")
        for pid, parent in tree(self._root, self._without).items():
            # The daemon before we know its PID, or the command before its exec: still vswapctl itself.
            is_front = parent == self._root and _read(f"/proc/{pid}/cmdline") == front
            if parent in outside or is_front:
                outside.add(pid)
                continue
            count = pss_anon_bytes(pid)
            if count and parent != self._root and same_address_space(pid, parent):
                continue
            found[pid] = count
            member = self.samples.members.get(pid)
            if member is None or member.bytes_max < member.min_bytes:
                member = self._member(pid)  # again: exec changes name and environment
            member.note(count, now)
        return found

    def _member(self, pid: int) -> Member:
        member = self.samples.members.setdefault(pid, Member(pid))
        member.comm = _read(f"/proc/{pid}/comm").decode(errors="replace").strip()
        minimum = environment_value(pid, "VSWAP_MIN_BYTES")
        if minimum and minimum.isdigit():
            member.min_bytes = int(minimum)
        return member

    def _note(self, resident: int, cost: int) -> None:
        samples, status, group = self.samples, self._status, self._own_group()
        samples.count += 1
        samples.resident_bytes_max = max(samples.resident_bytes_max, resident)
        if resident + cost > samples.peak_bytes:
            samples.peak_bytes = resident + cost
            samples.peak_resident_bytes = resident
        if not status:
            return
        swapped = int(group.get("swapped_pages", 0)) * PAGE_BYTES
        samples.demand_bytes_max = max(samples.demand_bytes_max, resident + swapped)
        if swapped >= samples.swapped_bytes_max and swapped:
            samples.status_at_most_swapped = status
        samples.swapped_bytes_max = max(
            samples.swapped_bytes_max, swapped, int(group.get("swapped_pages_max", 0)) * PAGE_BYTES
        )
        samples.pool_bytes_max = max(samples.pool_bytes_max, int(group.get("pool_bytes", 0)))
        samples.metadata_bytes_max = max(samples.metadata_bytes_max, int(group.get("metadata_bytes", 0)))
        samples.spill_bytes_max = max(samples.spill_bytes_max, int(status.get("spill_bytes", 0)))
        samples.daemon_bytes_max = max(samples.daemon_bytes_max, int(status.get("daemon_bytes", 0)))
        samples.faults = max(samples.faults, int(group.get("faults", 0)))
        samples.status_last = status
        for client in status.get("clients", []):
            member = samples.members.get(client["pid"])
            if member is not None:
                member.managed = True
