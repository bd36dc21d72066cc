# SPDX-License-Identifier: MIT
"""backend_jobs — backends that come and go while programs run: swapon, swapoff, compact.

A job belongs to the request that asked for it: it tells that connection how far it is, and when the
connection ends the job is cancelled. What it has moved by then stays moved, and the backend is in use
as before, as with swapoff(8); asked again it goes on from there.

All methods run in trio's thread; the work is done in threads of the engine's callers.
"""

from __future__ import annotations

import errno
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from vswapd import backends, config
from vswapd.document import backend_document
from vswapd.records import BACKEND_KEEP_BLOCKS, BACKEND_STATES
from vswapd.request import Reply, RequestError
from vswapd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from vswapd.engine import Engine
    from vswapd.log import Log
    from vswapd.records import BackendStatistics, Room

    Tell = Callable[[dict[str, Any]], Awaitable[None]]

_SEE_SWAPS = "see vswapctl swaps"


def _is_same_file(left: str, right: str) -> bool:
    try:
        return left == right or os.path.samefile(left, right)
    except OSError:
        return False


def _no_room(names: str, room: Room) -> RequestError:
    text = (
        f"{names}: {format_size(room.live_bytes)} would have to move, and there is room for"
        f" {format_size(room.pool_bytes)} in the pools and {format_size(room.backend_bytes)} on other backends"
    )
    remedy = "raise a limit (vswapctl limit), add a backend (vswapctl swapon), or wait for room with --force"
    return RequestError("no-room", text, remedy)


class BackendJobs:
    """swapon, swapoff and compact over one engine."""

    def __init__(self, engine: Engine, log: Log) -> None:
        self._engine = engine
        self._log = log
        # One thread for each backend: several may be drained at once, and wait for room for hours.
        self._workers = trio.CapacityLimiter(64)
        self._adding = trio.Lock()
        self._nursery: trio.Nursery | None = None  # of jobs that nobody waits for

    async def run(self) -> None:
        """Jobs that were started, for ever. They end with the daemon, and its successor has the backend in use."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    # ---- swapon ----

    async def add(
        self,
        path: str,
        size_bytes: int,
        priority: int | None,
        *,
        rate_bytes: int = 0,
        discard: bool,
        encrypt: bool,
    ) -> Reply:
        """Use the file or device at `path`. Failure, RequestError."""
        if not os.path.isabs(path):
            raise RequestError("bad-request", "'path' is not an absolute path", "correct the request")
        if size_bytes and size_bytes < config.SPILL_BYTES_MIN:
            raise RequestError("bad-request", f"{format_size(size_bytes)} is too little", "give at least 1M")
        if rate_bytes and rate_bytes < config.RATE_BYTES_MIN:
            text = f"a rate of {format_size(rate_bytes)} a second is too little"
            raise RequestError("bad-request", text, "give at least 1M, or none for no limit")
        async with self._adding:
            records = self._engine.backends()
            if any(_is_same_file(path, record.path) for record in records):
                raise RequestError("in-use", f"{path} is in use as a backend already", _SEE_SWAPS)
            if priority is None:  # below all others, as swapon(8) has it
                priority = min([record.priority for record in records], default=0) - 1
            call = self._open_and_add
            with trio.CancelScope(shield=True):
                spill = await trio.to_thread.run_sync(
                    call, path, size_bytes, priority, rate_bytes, discard, encrypt, limiter=self._workers
                )
        size = format_size(spill.size_bytes)
        self._log.info("swapon", path=spill.path, size=size, priority=priority, encrypted=encrypt)
        return {"path": spill.path, "size_bytes": spill.size_bytes, "priority": priority, "encrypted": encrypt}

    def _open_and_add(
        self, path: str, size_bytes: int, priority: int, rate_bytes: int, discard: bool, encrypt: bool
    ) -> backends.Spill:
        spill = backends.open_spill(path, size_bytes, 0, priority, encrypt=encrypt, rate_bytes=rate_bytes)
        try:
            _check_room(spill)
            spill.add_to(self._engine, 0 if discard else BACKEND_KEEP_BLOCKS)
        except OSError as error:
            spill.undo()
            if error.errno == errno.EMFILE:
                raise RequestError("refused", "there are as many backends as there can be", _SEE_SWAPS) from None
            if error.errno == errno.ENOTSUP and encrypt:
                text = f"{path}: libcrypto has no AES-256-GCM here"
                raise RequestError("refused", text, "allow it in openssl.cnf, or leave --encrypt out") from None
            raise
        except BaseException:
            spill.undo()
            raise
        return spill

    # ---- swapoff ----

    def _find(self, path: str) -> BackendStatistics:
        for record in self._engine.backends():
            if _is_same_file(path, record.path):
                return record
        raise RequestError("no-backend", f"{path} is not a backend", _SEE_SWAPS)

    async def drain(self, paths: Sequence[str], force: bool, tell: Tell) -> Reply:
        """Move everything off the backends at `paths` (none: off all) and remove them. RequestError."""
        records = [self._find(path) for path in paths] if paths else self._engine.backends()
        if not records:
            raise RequestError("no-backend", "there are no backends", _SEE_SWAPS)
        room = await self._begin(records, force)
        await self._run_all(records, tell, self._engine.backend_drain, force)
        names = ", ".join(record.path for record in records)
        self._log.info("swapoff done", paths=names)
        return {"paths": [record.path for record in records], "moved_bytes": room.live_bytes}

    async def _begin(self, records: Sequence[BackendStatistics], force: bool) -> Room:
        """From here on a drain of each has to follow. RequestError."""
        numbers = [record.backend for record in records]
        names = ", ".join(record.path for record in records)
        with trio.CancelScope(shield=True):
            begun, room = await self._call(names, self._engine.backend_drain_begin, numbers, force)
        if not begun:
            raise _no_room(names, room)
        self._log.info("swapoff begun", paths=names, bytes=room.live_bytes)
        return room  # type: ignore[no-any-return]

    # ---- by number, for the file tree ----

    def _numbered(self, number: int) -> BackendStatistics:
        for record in self._engine.backends():
            if record.backend == number:
                return record
        raise RequestError("no-backend", f"there is no backend {number}", _SEE_SWAPS)

    async def start_drain(self, number: int) -> Reply:
        """As drain(), but nobody waits for it: the log says how it ended. RequestError."""
        record = self._numbered(number)
        if self._nursery is None:
            raise RequestError("stopping", "the daemon is stopping", "try again when it runs")
        await self._begin([record], force=False)
        self._nursery.start_soon(self._finish_drain, record)
        return {}

    async def _finish_drain(self, record: BackendStatistics) -> None:
        try:
            await self._run_all([record], _tell_nobody, self._engine.backend_drain, False)
        except RequestError as error:
            self._log.warning("swapoff not finished", path=record.path, reason=str(error))
        else:
            self._log.info("swapoff done", paths=record.path)

    def cancel_drain(self, number: int) -> Reply:
        """Whoever began it: the backend is in use as before. Without one, nothing. RequestError."""
        if BACKEND_STATES[self._numbered(number).state] == "draining":
            self._cancel([number])
        return {}

    def set_priority(self, number: int, priority: int) -> Reply:
        """Of what is written from now on. RequestError."""
        record = self._numbered(number)
        self._engine.backend_set_priority(number, priority)
        self._log.info("priority changed", path=record.path, priority=priority)
        return {}

    # ---- compact ----

    async def compact(self, path: str, tell: Tell) -> Reply:
        """Rewrite the sparse segments of a backend. RequestError."""
        before = self._find(path)
        await self._run_all([before], tell, self._engine.backend_compact)
        after = self._find(path)
        self._log.info("compacted", path=path, used_before=before.used_bytes, used=after.used_bytes)
        return {
            "path": after.path,
            "used_before_bytes": before.used_bytes,
            "used_bytes": after.used_bytes,
            "live_bytes": after.live_bytes,
        }

    # ---- jobs ----

    async def _call(self, name: str, call: Callable[..., Any], *arguments: object) -> Any:
        try:
            return await trio.to_thread.run_sync(call, *arguments, limiter=self._workers)
        except OSError as error:
            raise self._error(name, error) from error

    def _error(self, name: str, error: OSError) -> RequestError:
        if error.errno == errno.ECANCELED:
            return RequestError("cancelled", f"{name}: cancelled", "what was moved stays moved; ask again")
        if error.errno == errno.EBUSY:
            return RequestError("busy", f"{name}: not now, it is being drained or compacted, or failed", _SEE_SWAPS)
        if error.errno == errno.ENOENT:
            return RequestError("no-backend", f"{name} is not a backend any more", _SEE_SWAPS)
        if error.errno == errno.ENOSPC:
            return RequestError(
                "no-room", f"{name}: no room left for the rest", "make room and ask again, or use --force"
            )
        if error.errno == errno.EBADMSG:
            text = f"{name}: some pages on it cannot be read back; they stay where they are"
            return RequestError("damaged", text, "end the programs they belong to, then ask again")
        return RequestError("failed", f"{name}: {os.strerror(error.errno or 0)}", "see the daemon's log")

    async def _run_all(
        self, records: Sequence[BackendStatistics], tell: Tell, call: Callable[..., None], *arguments: object
    ) -> None:
        """`call(number, *arguments)` for each at once. The first RequestError, when all have ended."""
        errors: list[RequestError] = []

        async def run(record: BackendStatistics) -> None:
            with trio.CancelScope(shield=True):  # the job must run: it ends what was begun
                try:
                    await self._call(record.path, call, record.backend, *arguments)
                except RequestError as error:
                    errors.append(error)

        async with self._telling({record.backend for record in records}, tell), trio.open_nursery() as nursery:
            for record in records:
                nursery.start_soon(run, record)
        if errors:
            raise errors[0]

    @asynccontextmanager
    async def _telling(self, numbers: set[int], tell: Tell) -> AsyncIterator[None]:
        """Tell how far the jobs are, until the block ends; cancel them when nobody listens any more."""

        async def report() -> None:
            try:
                while True:
                    await trio.sleep(config.PROGRESS_SECONDS)
                    await tell(_progress(self._engine.backends(), numbers))
            finally:
                if not is_done:
                    self._cancel(numbers)

        is_done = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(report)
                yield
                is_done = True
                nursery.cancel_scope.cancel()
        except* (OSError, trio.TooSlowError) as group:
            raise OSError(errno.EPIPE, "whoever asked is gone") from group

    def _cancel(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            try:
                self._engine.backend_cancel(number)
            except OSError as error:
                if error.errno != errno.ENOENT:  # it has ended meanwhile
                    self._log.error("job not cancelled", backend=number, error=str(error))


async def _tell_nobody(_: dict[str, Any]) -> None:
    """How far a job is that nobody waits for stands in status."""


def _check_room(spill: backends.Spill) -> None:
    """A file may be sparse, but it must not promise what its file system has not."""
    status = os.fstat(spill.fd)
    if not status.st_rdev:
        figures = os.fstatvfs(spill.fd)
        free_bytes = figures.f_bavail * figures.f_frsize + status.st_blocks * 512
        if spill.size_bytes > free_bytes:
            raise RequestError(
                "no-room",
                f"{spill.path}: no room for {format_size(spill.size_bytes)}, its file system has"
                f" {format_size(free_bytes)} left",
                "give a smaller --size",
            )


def _progress(records: Iterable[BackendStatistics], numbers: set[int]) -> dict[str, Any]:
    jobs = [backend_document(record) for record in records if record.backend in numbers and record.job]
    keys = ("path", "state", "job", "job_waiting", "job_ms", "job_total_bytes", "job_left_bytes")
    keys += ("job_bytes_per_second", "job_seconds_left")
    return {"notice": "progress", "level": "info", "backends": [{key: job[key] for key in keys} for job in jobs]}
