# SPDX-License-Identifier: MIT
"""fake_engine — vswapd.engine.Engine without a data plane.

Keeps the books an engine keeps (groups, clients, backends, events), answers with the same records and
errors, and owns descriptors by the same rules, so that the control plane can be tested without root,
userfaultfd and the extension. Methods may be called from any thread, as the real ones.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import select
import signal
import threading
from collections import deque
from typing import TYPE_CHECKING

from vswapd import records

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from vswapd.machine import Cgroup
    from vswapd.wire import Arena

LATENCY_BUCKETS = 64


def _error(number: int, what: str) -> OSError:
    return OSError(number, f"{what}: {os.strerror(number)}")


def make_memfds() -> tuple[int, int]:
    """As in engine.py."""
    return os.memfd_create("state"), os.memfd_create("pool")


def fork_sharing_descriptors() -> int:
    """Here parent and child have a descriptor table each, so a successor finds nothing."""
    return os.fork()


def shelve_memory(fd: int) -> int:
    """All memory stays where it is."""
    raise _error(errno.EMEDIUMTYPE, "idle memory")


def wait_shelved(descriptors: Sequence[int]) -> None:
    """Nothing is."""
    select.select(descriptors, [], [])


def wait_signal_shelved(signals: Collection[int]) -> int:
    """As wait_shelved()."""
    return int(signal.sigwait(signals))


class FakeEngine:
    """The Engine interface. `refuse` maps a method's name to the errno it fails with."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.userfaultfd_device = os.memfd_create("fake userfaultfd device", os.MFD_CLOEXEC)
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.refuse: dict[str, int] = {}
        self.calls: list[tuple[object, ...]] = []
        self._groups: dict[int, records.GroupStatistics] = {}
        self._clients: dict[int, records.ClientStatistics] = {}
        self._rings: dict[int, int] = {}
        self._backends: list[records.BackendStatistics] = []
        self._events: deque[records.Event] = deque()
        self._cancelled: set[int] = set()
        self.room_bytes = 1 << 40  # what a drain finds
        self.jobs_end = threading.Event()  # drains and compactions end at once while it is set
        self.jobs_end.set()
        self._regions: dict[int, records.Region] = {}
        self._region_bytes: dict[int, bytearray] = {}
        self._next_group = 0
        self._next_token = 1000
        self.forked_tokens: dict[int, int] = {}  # token -> group
        self.armed: dict[int, Arena] = {}
        self.is_destroyed = False

    @classmethod
    def create(cls, **_: object) -> FakeEngine:
        """As Engine.create; VSWAP_FAKE_REFUSE=1 in the environment: it fails."""
        if os.environ.get("VSWAP_FAKE_REFUSE"):
            raise OSError(errno.EPERM, "the fake engine was told to refuse; unset VSWAP_FAKE_REFUSE")
        return cls()

    def _call(self, name: str, *arguments: object) -> None:
        self.calls.append((name, *arguments))
        if name in self.refuse:
            raise _error(self.refuse[name], name)

    def destroy(self) -> None:
        with self._lock:
            self._call("destroy")
            if not self.is_destroyed:
                self.is_destroyed = True
                for descriptor in (self.userfaultfd_device, self.event_fd, *self._rings.values()):
                    os.close(descriptor)
                self._rings.clear()

    # ---- groups ----

    def group_create(self, name: str, limit_bytes: int, pool_limit_bytes: int = 0, flags: int = 0) -> int:
        with self._lock:
            self._call("group_create", name, limit_bytes, pool_limit_bytes, flags)
            number = self._next_group
            self._next_group += 1
            self._groups[number] = records.GroupStatistics(number, flags, name, limit_bytes, pool_limit_bytes)
            return number

    def set_group(self, group: int, **changes: object) -> None:
        """For tests: change what is reported of a group."""
        with self._lock:
            self._groups[group] = dataclasses.replace(self._groups[group], **changes)  # type: ignore[arg-type]

    def group_set_limit(self, group: int, limit_bytes: int, pool_limit_bytes: int = 0) -> None:
        self._call("group_set_limit", group, limit_bytes, pool_limit_bytes)
        self.set_group(group, limit_bytes=limit_bytes, pool_limit_bytes=pool_limit_bytes)

    def group_set_spill_limit(self, group: int, spill_limit_bytes: int) -> None:
        self._call("group_set_spill_limit", group, spill_limit_bytes)
        self.set_group(group, spill_limit_bytes=spill_limit_bytes)

    def group_set_flags(self, group: int, on: int, off: int) -> None:
        self._call("group_set_flags", group, on, off)
        self.set_group(group, flags=self._groups[group].flags & ~off | on)

    def group_destroy(self, group: int) -> None:
        with self._lock:
            self._call("group_destroy", group)
            if any(client.group == group for client in self._clients.values()):
                raise _error(errno.EBUSY, "group")
            del self._groups[group]

    is_successor = False

    def descriptors(self) -> list[records.Descriptor]:
        """As Engine has it: none, as nothing outlives it."""
        return []

    def group_label(self, group: int, label: str, session_fd: int) -> None:
        """As Engine has it."""

    def client_label(self, token: int, socket_fd: int, uid: int) -> None:
        """As Engine has it."""

    def group_set_members(self, group: int, root_pid: int, excluded: Iterable[int]) -> None:
        self._call("group_set_members", group, root_pid, set(excluded))

    def note_client(self, pid: int) -> None:
        self._call("note_client", pid)

    # ---- backends ----

    def backend_add(
        self, fd: int, path: str, size_bytes: int, priority: int, flags: int = 0, rate_bytes: int = 0
    ) -> int:
        self._call("backend_add", fd, path, size_bytes, priority, flags)
        number = next(n for n in range(16) if all(backend.backend != n for backend in self._backends))
        self._backends.append(
            records.BackendStatistics(
                number,
                priority,
                0,
                0,
                path,
                flags & records.BACKEND_ENCRYPT,
                size_bytes,
                room_bytes=size_bytes,
                rate_bytes=rate_bytes,
            )
        )
        return number

    def set_backend(self, number: int, **changes: object) -> None:
        """For tests: change what is reported of a backend."""
        with self._lock:
            self._backends = [
                dataclasses.replace(backend, **changes) if backend.backend == number else backend  # type: ignore[arg-type]
                for backend in self._backends
            ]

    def backend_set_rate(self, number: int, rate_bytes: int) -> None:
        self._call("backend_set_rate", number, rate_bytes)
        self.set_backend(number, rate_bytes=rate_bytes)

    def set_tiering(self, on: bool) -> None:
        self._call("set_tiering", on)

    def set_host_reserve(self, reserve_bytes: int, cgroups: Sequence[Cgroup]) -> None:
        self._call("set_host_reserve", reserve_bytes, len(cgroups))

    def backend_drain_begin(self, numbers: Iterable[int], force: bool) -> tuple[bool, records.Room]:
        numbers = list(numbers)
        self._call("backend_drain_begin", numbers, force)
        need = sum(backend.live_bytes for backend in self._backends if backend.backend in numbers)
        room = records.Room(need, self.room_bytes, 0)
        if not force and need > self.room_bytes:
            return False, room
        for number in numbers:
            self.set_backend(number, state=1, job=1, job_ms=1000, job_total_bytes=need, job_left_bytes=need // 2)
        return True, room

    def _run_job(self, number: int) -> None:
        """Until the test lets it end, or it is cancelled."""
        while not self.jobs_end.wait(0.001):
            if number in self._cancelled:
                self._cancelled.discard(number)
                self.set_backend(number, state=0, job=0)
                raise _error(errno.ECANCELED, "job")

    def backend_drain(self, number: int, force: bool) -> None:
        self._call("backend_drain", number, force)
        self._run_job(number)
        with self._lock:
            self._backends = [backend for backend in self._backends if backend.backend != number]

    def backend_compact(self, number: int) -> None:
        self._call("backend_compact", number)
        self.set_backend(number, job=2)
        self._run_job(number)
        self.set_backend(number, job=0)

    def backend_set_priority(self, number: int, priority: int) -> None:
        self._call("backend_set_priority", number, priority)
        if not any(backend.backend == number for backend in self._backends):
            raise _error(errno.ENOENT, "priority")
        self.set_backend(number, priority=priority)

    def backend_cancel(self, number: int) -> None:
        self._call("backend_cancel", number)
        if not any(backend.backend == number and backend.job for backend in self._backends):
            raise _error(errno.ENOENT, "job")
        self._cancelled.add(number)

    # ---- clients ----

    def _begin(self, pid: int, group: int, token: int) -> int:
        self._clients[token] = records.ClientStatistics(token, pid, group)
        self._rings[token] = os.memfd_create("fake ring", os.MFD_CLOEXEC)
        return self._rings[token]

    def client_begin(self, pid: int, group: int) -> tuple[int, int]:
        with self._lock:
            self._call("client_begin", pid, group)
            token = self._next_token
            self._next_token += 1
            return token, self._begin(pid, group, token)

    def client_begin_forked(self, pid: int, token: int) -> tuple[int, int]:
        with self._lock:
            self._call("client_begin_forked", pid, token)
            if token not in self.forked_tokens:
                raise _error(errno.EPERM, "forked process")
            ring = self._begin(pid, self.forked_tokens.pop(token), token)
            return ring, self.userfaultfd_device

    def client_arm(self, token: int, arena: Arena, events_fd: int, trash_fd: int) -> None:
        for descriptor in (events_fd, trash_fd):
            if descriptor >= 0:
                os.close(descriptor)  # taken over in every case
        with self._lock:
            self._call("client_arm", token, arena, events_fd, trash_fd)
            self.armed[token] = arena

    def set_client(self, token: int, **changes: object) -> None:
        """For tests: change what is reported of a client."""
        with self._lock:
            self._clients[token] = dataclasses.replace(self._clients[token], **changes)  # type: ignore[arg-type]

    def add_client(self, pid: int, group: int) -> int:
        """For tests: a client that came in some other way."""
        with self._lock:
            token, _ = self.client_begin(pid, group)
            return token

    def client_lost(self, token: int) -> None:
        with self._lock:
            self._call("client_lost", token)
            if self._clients.pop(token, None) is not None:
                os.close(self._rings.pop(token))

    def pageout(self, pid: int, timeout_ms: int) -> None:
        self._call("pageout", pid, timeout_ms)

    def cool(self, pid: int, start: int, nbytes: int) -> None:
        self._call("cool", pid, start, nbytes)

    def pagein(self, pid: int, timeout_ms: int) -> None:
        self._call("pagein", pid, timeout_ms)

    def detach(self, pid: int, timeout_ms: int) -> None:
        self._call("detach", pid, timeout_ms)

    # ---- statistics ----

    def statistics(self) -> records.Statistics:
        latency = [[0] * LATENCY_BUCKETS for _ in records.BACKINGS]
        latency[2][3], latency[2][40] = 99, 1
        return records.Statistics(
            group_count=len(self._groups),
            client_count=len(self._clients),
            counters={"faults": 100},
            latency=tuple(map(tuple, latency)),
            latency_ns_sum=(0, 0, 500_000, 0, 0),
        )

    def groups(self) -> list[records.GroupStatistics]:
        with self._lock:
            counts = [client.group for client in self._clients.values()]
            return [
                dataclasses.replace(group, client_count=counts.count(group.group))
                for group in self._groups.values()
            ]

    def clients(self) -> list[records.ClientStatistics]:
        with self._lock:
            return list(self._clients.values())

    def client_tiers(self, token: int) -> records.ClientTiers:
        with self._lock:
            client = self._clients[token]
        pages = (client.spill_pages, *(0,) * 14)
        return records.ClientTiers(client.zero_pages, client.same_pages, client.pool_pages, 0, pages, (7, *(0,) * 14))

    # ---- regions ----

    def region_create(self, region: records.Region) -> int:
        self._call("region_create", region.name)
        number = self._next_token
        self._next_token += 1
        self._regions[number] = dataclasses.replace(region, number=number)
        self._region_bytes[number] = bytearray()
        return number

    def region_read(self, number: int, offset: int, size: int) -> memoryview:
        self._call("region_read", number)
        return memoryview(bytes(self._region_bytes[number][offset : offset + size]))

    def region_write(self, number: int, offset: int, data: bytes) -> None:
        self._call("region_write", number)
        content = self._region_bytes[number]
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data

    def region_lose(self, number: int, offset: int, size: int) -> None:
        self._call("region_lose", number, offset, size)

    def region_truncate(self, number: int, size_bytes: int) -> None:
        self._call("region_truncate", number, size_bytes)
        content = self._region_bytes[number]
        del content[size_bytes:]
        content.extend(bytes(size_bytes - len(content)))

    def region_change(self, number: int, mode: int, gid: int, modified_ns: int) -> None:
        self._call("region_change", number)
        changed = dataclasses.replace(self.region(number), mode=mode, gid=gid, modified_ns=modified_ns)
        self._regions[number] = changed

    def region_unlink(self, number: int) -> None:
        self._call("region_unlink", number)
        self._regions[number] = dataclasses.replace(self.region(number), is_unlinked=1)

    def region_destroy(self, number: int) -> None:
        self._call("region_destroy", number)
        del self._regions[number], self._region_bytes[number]

    def region(self, number: int) -> records.Region:
        if number not in self._regions:
            raise _error(errno.ENOENT, "region")
        size = len(self._region_bytes[number])
        return dataclasses.replace(self._regions[number], size_bytes=size)

    def regions(self) -> list[records.Region]:
        return [self.region(number) for number in self._regions]

    def backends(self) -> list[records.BackendStatistics]:
        return list(self._backends)

    def latency_bounds_us(self) -> tuple[float, ...]:
        return tuple(float(bucket + 1) for bucket in range(LATENCY_BUCKETS))

    # ---- events ----

    def add_event(self, event: records.Event) -> None:
        """For tests: something happened."""
        self._events.append(event)
        os.eventfd_write(self.event_fd, 1)

    def event_next(self) -> records.Event | None:
        return self._events.popleft() if self._events else None

    # ---- test support ----

    def is_valid(self) -> bool:
        self._call("is_valid")
        return True

    def hold_gil(self, milliseconds: int) -> None:
        self._call("hold_gil", milliseconds)
