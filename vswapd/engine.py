# SPDX-License-Identifier: MIT
"""engine — the data plane for Python: the only module that imports the extension.

Calls go straight to csrc/engine.h, which says what each does. Here -errno becomes OSError whose text
says what was asked, C structs become the frozen objects of records.py, and descriptors stay whose
they are in the header. Every method but hold_gil may be called from any thread and releases the GIL
while it is in C; those marked *slow* may take milliseconds or longer and belong in a worker thread.
"""

from __future__ import annotations

import errno
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from vswapd import config, records
from vswapd._engine import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from vswapd.machine import Cgroup
    from vswapd.wire import Arena

_MESSAGE_BYTES = 256
_LIST_SLACK = 16  # records that may have come between asking how many and reading them

_Record = TypeVar("_Record")


def _python_value(value: Any) -> Any:
    """A field of a C struct: numbers as they are, char arrays as str, other arrays as tuples."""
    if not isinstance(value, ffi.CData):
        return value
    kind = ffi.typeof(value)
    if kind.kind == "array":
        if kind.item.cname == "char":
            return ffi.string(value).decode("utf-8", "surrogateescape")
        return tuple(_python_value(item) for item in value)
    return {name: int(getattr(value, name)) for name, _ in kind.fields}


def _record(cls: type[_Record], struct: Any) -> _Record:
    names = (item.name for item in fields(cls))  # type: ignore[arg-type]
    return cls(**{name: _python_value(getattr(struct, name)) for name in names})


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def make_memfds() -> tuple[int, int]:
    """(state, pool): empty memfds for engines that succeed each other. OSError."""
    ret_state, ret_pool = ffi.new("int *"), ffi.new("int *")
    _check(lib.engine_make_memfds(ret_state, ret_pool), "memory for the state")
    return ret_state[0], ret_pool[0]


def fork_sharing_descriptors() -> int:
    """os.fork(), but both have one descriptor table. OSError; ENOSYS: not with this kernel."""
    return _check(lib.fork_sharing_descriptors(), "fork of the daemon")


def check_state(pid: int, state_fd: int) -> None:
    """Whether this version can go on with the state of another supervisor. OSError."""
    _check(lib.engine_check_state(pid, state_fd), "state")


def take_descriptors(pid: int, below: int) -> None:
    """Have all that another process has open below that number, under the same numbers. OSError."""
    _check(lib.supervise_take_descriptors(pid, below), "descriptors")


def shelve_memory(fd: int) -> int:
    """Keep the idle memory of this process, which has one thread, in an empty file: MiB of it. OSError."""
    return _check(lib.shelve_memory(fd), "idle memory")


def wait_shelved(descriptors: Sequence[int]) -> None:
    """Until one is readable, or a signal was handled. This process has one thread: what it shelved and has not written to
    since, and its code, need not be mapped meanwhile.
    """
    lib.shelve_wait(descriptors, len(descriptors))


def wait_signal_shelved(signals: Collection[int]) -> int:
    """signal.sigwait, as wait_shelved."""
    return _check(lib.shelve_wait_signal(list(signals), len(signals)), "signals")


def shelve_again(fd: int) -> int:
    """What was written to since, in a file of its own. MiB. OSError: other threads are at work, say."""
    import ctypes  # trio has it

    # Of cffi's functions none holds the GIL, and while this one runs nobody else may write to what is Python's.
    address = int(ffi.cast("uintptr_t", ffi.addressof(lib, "shelve_again")))
    return _check(ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int)(address)(fd), "idle memory")


def page_out_shelved(fd: int) -> None:
    """Begin to write what was shelved to its file, and drop from RAM what has been written. Blocks with the device."""
    lib.shelve_page_out(fd)


def attach_hold(pid: int) -> None:
    """Have a child stop when it executes a program: attach_inject follows, from the same thread. OSError."""
    _check(lib.attach_hold(pid), f"process {pid}")


def attach_inject(
    pid: int,
    image: str,
    socket_path: str,
    group: str,
    *,
    minimum_bytes: int = 1,
    look_us: int = 10_000,
    held: bool = False,
) -> None:
    """Start the agent in a program (slow). OSError: it is as it was, and the text says why."""
    strings = [ffi.new("char[]", os.fsencode(text)) for text in (image, socket_path, group)]
    request = ffi.new("struct attach_request *", [pid, int(held), *strings, minimum_bytes, look_us])
    message = ffi.new("char[]", _MESSAGE_BYTES)
    result = lib.attach_inject(request, message)
    if result < 0:
        raise OSError(-result, ffi.string(message).decode("utf-8", "replace"))


class Engine:
    """One running data plane. Make it with Engine.create(), end it with destroy()."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._bounds_us: tuple[float, ...] | None = None

    @classmethod
    def create(
        cls,
        *,
        pool_capacity_bytes: int = 0,
        evictor_count: int = 0,
        accept_percent: int = config.ACCEPT_PERCENT,
        recompress_age_ms: int = config.RECOMPRESS_AGE_SECONDS * 1000,
        io_threads: bool = False,
        state_fd: int = 0,
        pool_fd: int = 0,
        keep_fds: Sequence[int] = (),
    ) -> Engine:
        """Make the state and start the threads (slow). OSError with the reason and what to do.

        With memfds that another engine has filled, this one goes on where that one stopped; it closes
        all descriptors above 2 that it cannot name, but for `keep_fds`.
        """
        keep = ffi.new("int32_t[]", list(keep_fds))
        settings = ffi.new(
            "struct engine_config *",
            {
                "pool_capacity_bytes": pool_capacity_bytes,
                "evictor_count": evictor_count,
                "accept_percent": accept_percent,
                "recompress_age_ms": recompress_age_ms,
                "io_threads": int(io_threads),
                "state_fd": state_fd,
                "pool_fd": pool_fd,
                "keep_fds": keep,
                "keep_count": len(keep_fds),
            },
        )
        ret_engine = ffi.new("struct engine **")
        message = ffi.new("char[]", _MESSAGE_BYTES)
        result = lib.engine_create(settings, ret_engine, message)
        if result < 0:
            text = ffi.string(message).decode("utf-8", "replace") or os.strerror(-result)
            raise OSError(-result, text)
        return cls(ret_engine[0])

    def destroy(self) -> None:
        """Stop and close everything (slow). Clients must have ended. Again: no effect."""
        handle, self._handle = self._handle, ffi.NULL
        if handle:
            lib.engine_destroy(handle)

    @property
    def is_successor(self) -> bool:
        """Whether it went on from what another engine had left."""
        return bool(lib.engine_is_successor(self._handle))

    @property
    def userfaultfd_device(self) -> int:
        """Descriptor of /dev/userfaultfd, owned by the engine."""
        return _check(lib.engine_userfaultfd_device(self._handle), "/dev/userfaultfd")

    # ---- groups ----

    def group_create(self, name: str, limit_bytes: int, pool_limit_bytes: int = 0, flags: int = 0) -> int:
        """Number of the new group. EEXIST: the name is taken; ENOSPC: too many groups."""
        result = lib.engine_group_create(self._handle, name.encode(), limit_bytes, pool_limit_bytes, flags)
        return _check(result, f"group {name}")

    def group_set_limit(self, group: int, limit_bytes: int, pool_limit_bytes: int = 0) -> None:
        """Takes effect at once for new pages; reclaim follows."""
        _check(
            lib.engine_group_set_limit(self._handle, group, limit_bytes, pool_limit_bytes),
            "limit of the group",
        )

    def group_set_spill_limit(self, group: int, spill_limit_bytes: int) -> None:
        """Most that its pages may take on backends; 0: no limit."""
        _check(lib.engine_group_set_spill_limit(self._handle, group, spill_limit_bytes), "spill limit of the group")

    def group_set_flags(self, group: int, on: int, off: int) -> None:
        """Change GROUP_NO_SPILL and GROUP_NO_RECOMPRESS of a group."""
        _check(lib.engine_group_set_flags(self._handle, group, on, off), "group")

    def group_destroy(self, group: int) -> None:
        """EBUSY while it has clients."""
        _check(lib.engine_group_destroy(self._handle, group), "group")

    def group_label(self, group: int, label: str, session_fd: int) -> None:
        """What a successor's control plane is to know of the group."""
        _check(lib.engine_group_label(self._handle, group, label.encode(), session_fd), "group")

    def group_set_members(self, group: int, root_pid: int, excluded: Iterable[int]) -> None:
        """From now on charge the anonymous memory of what descends from a process and is no client, without those
        that are excluded and what descends from them.
        """
        pids = sorted(excluded)
        _check(lib.engine_group_set_members(self._handle, group, root_pid, pids, len(pids)), "group")

    def note_client(self, pid: int) -> None:
        """A process is about to become a client: from then on it is not charged as one that is none."""
        lib.engine_note_client(self._handle, pid)

    # ---- backends ----

    def backend_add(
        self, fd: int, path: str, size_bytes: int, priority: int, flags: int = 0, rate_bytes: int = 0
    ) -> int:
        """Use `fd` for spilling; it belongs to the engine when this returns. EMFILE: too many. The rate is in bytes
        a second, 0: no limit."""
        result = lib.engine_backend_add(
            self._handle, fd, path.encode("utf-8", "surrogateescape"), size_bytes, priority, flags, rate_bytes
        )
        return _check(result, f"spill {path}")

    def set_tiering(self, on: bool) -> None:
        """Move pages between backends of different priority, or no more."""
        lib.engine_set_tiering(self._handle, int(on))

    def backend_drain_begin(self, numbers: Iterable[int], force: bool) -> tuple[bool, records.Room]:
        """Nothing more is written to these backends, and backend_drain must follow for each. False: what
        they hold does not fit elsewhere, and nothing is changed. ENOENT; EBUSY: one has a job."""
        room = ffi.new("struct engine_room *")
        backends = sum(1 << number for number in numbers)
        result = lib.engine_backend_drain_begin(self._handle, backends, int(force), room)
        if result == -errno.ENOSPC:
            return False, _record(records.Room, room)
        _check(result, "swapoff")
        return True, _record(records.Room, room)

    def backend_drain(self, number: int, force: bool) -> None:
        """Move everything off a backend and remove it (slow: until that is done). ECANCELED; ENOSPC;
        EBADMSG: the rest cannot be read back."""
        _check(lib.engine_backend_drain(self._handle, number, int(force)), "swapoff")

    def backend_compact(self, number: int) -> None:
        """Rewrite its sparse segments (slow: until that is done). ENOENT, EBUSY, ECANCELED, ENOSPC."""
        _check(lib.engine_backend_compact(self._handle, number), "compact")

    def backend_set_rate(self, number: int, rate_bytes: int) -> None:
        """Write back to it no more than so many bytes a second; 0: no limit."""
        _check(lib.engine_backend_set_rate(self._handle, number, rate_bytes), "rate of the backend")

    def backend_set_priority(self, number: int, priority: int) -> None:
        """Of what is written from now on. ENOENT."""
        _check(lib.engine_backend_set_priority(self._handle, number, priority), "priority")

    def backend_cancel(self, number: int) -> None:
        """End what drains or compacts a backend, soon. ENOENT: nothing does."""
        _check(lib.engine_backend_cancel(self._handle, number), "cancel")

    # ---- the host ----

    def set_host_reserve(self, reserve_bytes: int, cgroups: Sequence[Cgroup]) -> None:
        """What is to stay available, of the machine and of these cgroups; HOST_RESERVE_AUTO: a small part; 0: never."""
        texts = [
            (ffi.new("char[]", os.fsencode(cgroup.directory)), ffi.new("char[]", os.fsencode(cgroup.path)))
            for cgroup in cgroups
        ]
        array = ffi.new("struct engine_cgroup[]", len(cgroups))
        for index, (cgroup, (directory, path)) in enumerate(zip(cgroups, texts, strict=True)):
            array[index].directory, array[index].path, array[index].version = directory, path, cgroup.version
        _check(lib.engine_set_host_reserve(self._handle, reserve_bytes, array, len(cgroups)), "reserve of the host")

    # ---- clients ----

    def client_begin(self, pid: int, group: int) -> tuple[int, int]:
        """(token, ring descriptor owned by the engine) for a process that said HELLO NEW."""
        ret_token, ret_ring = ffi.new("uint64_t *"), ffi.new("int *")
        _check(lib.engine_client_begin(self._handle, pid, group, ret_token, ret_ring), f"process {pid}")
        return ret_token[0], ret_ring[0]

    def client_begin_forked(self, pid: int, token: int) -> tuple[int, int]:
        """(ring, userfaultfd), both owned by the engine, for a child that said HELLO FORKED."""
        ret_ring, ret_userfaultfd = ffi.new("int *"), ffi.new("int *")
        result = lib.engine_client_begin_forked(self._handle, pid, token, ret_ring, ret_userfaultfd)
        _check(result, f"forked process {pid}")
        return ret_ring[0], ret_userfaultfd[0]

    def client_arm(self, token: int, arena: Arena, events_fd: int, trash_fd: int) -> None:
        """Start serving (slow). Takes over both descriptors in every case; events_fd -1: FORKED."""
        struct = ffi.new(
            "struct engine_arena *",
            {item.name: getattr(arena, item.name) for item in fields(arena)},
        )
        _check(lib.engine_client_arm(self._handle, token, struct, events_fd, trash_fd), "client")

    def client_lost(self, token: int) -> None:
        """The agent's socket closed or its handshake failed (slow). Unknown tokens are ignored."""
        result = lib.engine_client_lost(self._handle, token)
        if result not in (-errno.ENOENT, -errno.ESRCH):
            _check(result, "client")

    def client_label(self, token: int, socket_fd: int, uid: int) -> None:
        """What a successor's control plane is to know of the client. ESRCH, ENOENT: it is gone."""
        _check(lib.engine_client_label(self._handle, token, socket_fd, uid), "client")

    def pageout(self, pid: int, timeout_ms: int) -> None:
        """Evict all that can be (slow). ESRCH: not managed; ETIMEDOUT."""
        _check(lib.engine_client_pageout(self._handle, pid, timeout_ms), f"pageout of {pid}")

    def cool(self, pid: int, start: int, nbytes: int) -> None:
        """Evict what can be of `nbytes` at address `start` (slow). ESRCH: not managed."""
        _check(lib.engine_client_cool(self._handle, pid, start, nbytes), f"pageout of {pid}")

    def pagein(self, pid: int, timeout_ms: int) -> None:
        """Bring everything back (slow). ESRCH; ETIMEDOUT; ENOMEM: more than the group's limit."""
        _check(lib.engine_client_pagein(self._handle, pid, timeout_ms), f"pagein of {pid}")

    # ---- regions ----

    def region_create(self, region: records.Region) -> int:
        """Number of a new one, empty, in `region.group`. EMFILE: too many."""
        names = ("group", "mode", "uid", "gid", "modified_ns")
        struct = ffi.new("struct engine_region *", {name: getattr(region, name) for name in names})
        name = region.name.encode("utf-8", "surrogateescape")
        if len(name) >= len(struct.name):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        struct.name = name
        ret_number = ffi.new("uint64_t *")
        _check(lib.engine_region_create(self._handle, struct, ret_number), f"region {region.name}")
        return int(ret_number[0])

    def region_read(self, number: int, offset: int, size: int) -> memoryview:
        """Bytes from there on, fewer at the end (slow). EIO: some of them are lost."""
        data = bytearray(size)
        result = lib.engine_region_read(self._handle, number, offset, ffi.from_buffer(data), size)
        return memoryview(data)[: _check(result, "read of a region")]

    def region_write(self, number: int, offset: int, data: bytes) -> None:
        """The region grows as needed (slow). ENOSPC: what found no room is lost."""
        result = lib.engine_region_write(self._handle, number, offset, ffi.from_buffer(data), len(data))
        _check(result, "write to a region")

    def region_lose(self, number: int, offset: int, size: int) -> None:
        """What is there cannot be read until it is written again."""
        lib.engine_region_write(self._handle, number, offset, ffi.NULL, size)

    def region_truncate(self, number: int, size_bytes: int) -> None:
        """Free what is beyond (slow). EFBIG, EIO, ENOSPC."""
        _check(lib.engine_region_truncate(self._handle, number, size_bytes), "size of a region")

    def region_change(self, number: int, mode: int, gid: int, modified_ns: int) -> None:
        """What a file has."""
        _check(lib.engine_region_change(self._handle, number, mode, gid, modified_ns), "region")

    def region_unlink(self, number: int) -> None:
        """It ends with this daemon, if not before."""
        _check(lib.engine_region_unlink(self._handle, number), "region")

    def region_destroy(self, number: int) -> None:
        """Free all of it (slow)."""
        _check(lib.engine_region_destroy(self._handle, number), "region")

    def region(self, number: int) -> records.Region:
        """OSError (ENOENT): there is none."""
        struct = ffi.new("struct engine_region *")
        _check(lib.engine_region_get(self._handle, number, struct), "region")
        return _record(records.Region, struct)

    def regions(self) -> list[records.Region]:
        """All of them, unlinked ones that are open included."""
        return self._list(lib.engine_region_list, "engine_region", records.Region)

    def detach(self, pid: int, timeout_ms: int) -> None:
        """Bring everything back and let it go (slow). ESRCH; ETIMEDOUT; EPIPE: it has no agent; ENOSYS."""
        _check(lib.engine_client_detach(self._handle, pid, timeout_ms), f"detach of {pid}")

    # ---- statistics ----

    def statistics(self) -> records.Statistics:
        """A snapshot of the whole data plane."""
        struct = ffi.new("struct engine_statistics *")
        _check(lib.engine_statistics(self._handle, struct), "statistics")
        return _record(records.Statistics, struct)

    def groups(self) -> list[records.GroupStatistics]:
        """All groups."""
        return self._list(lib.engine_group_list, "engine_group_statistics", records.GroupStatistics)

    def clients(self) -> list[records.ClientStatistics]:
        """All clients, forked children that have not said hello included."""
        return self._list(lib.engine_client_list, "engine_client_statistics", records.ClientStatistics)

    def client_tiers(self, token: int) -> records.ClientTiers:
        """Where its pages are (slow: counted now). OSError (ESRCH): it has ended."""
        struct = ffi.new("struct engine_client_tiers *")
        _check(lib.engine_client_tiers(self._handle, token, struct), "client")
        return _record(records.ClientTiers, struct)

    def backends(self) -> list[records.BackendStatistics]:
        """All spill backends."""
        return self._list(lib.engine_backend_list, "engine_backend_statistics", records.BackendStatistics)

    def descriptors(self) -> list[records.Descriptor]:
        """All that a successor needs to have."""
        return self._list(lib.engine_descriptor_list, "engine_descriptor", records.Descriptor)

    def _list(self, call: Callable[..., int], struct: str, cls: type[_Record]) -> list[_Record]:
        count = 0
        while True:
            room = count + _LIST_SLACK
            array = ffi.new(f"struct {struct}[]", room)
            count = _check(call(self._handle, array, room), struct)
            if count <= room:
                return [_record(cls, array[index]) for index in range(count)]

    def latency_bounds_us(self) -> tuple[float, ...]:
        """Upper bound of each latency bucket, µs."""
        if self._bounds_us is None:
            count = ffi.typeof("struct engine_statistics").fields
            buckets = dict(count)["latency"].type.item.length
            self._bounds_us = tuple(lib.engine_latency_bucket_us(bucket) for bucket in range(buckets))
        return self._bounds_us

    # ---- events ----

    @property
    def event_fd(self) -> int:
        """Readable while events may be queued; owned by the engine."""
        return _check(lib.engine_event_fd(self._handle), "event descriptor")

    def event_next(self) -> records.Event | None:
        """The oldest event, or None."""
        struct = ffi.new("struct engine_event *")
        if _check(lib.engine_event_next(self._handle, struct), "event") == 0:
            return None
        return _record(records.Event, struct)

    # ---- test support ----

    def is_valid(self) -> bool:
        """Check all invariants of the data plane; stops it meanwhile (slow)."""
        result = lib.engine_is_valid(self._handle)
        if result == -errno.EUCLEAN:
            return False
        _check(result, "validity check")
        return True

    def hold_gil(self, milliseconds: int) -> None:
        """Sleep in C with the GIL held: no Python runs in this process meanwhile (a test needs that)."""
        lib.hold_gil_ms(milliseconds)
