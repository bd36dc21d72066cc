# SPDX-License-Identifier: MIT
"""regions — files of memory: their names, whose they are, and what each user may have.

The engine keeps the bytes and all of a record (csrc/region.h), over a daemon's death too. Each user's regions are
in a group of their own, whose limit bounds the RAM they cost; root alone may change it, as any group's. The sum of
their sizes has a bound of its own, so that nobody fills all backends.

Calls that move bytes run in worker threads: they may wait for room. All else runs in trio's thread.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from typing import TYPE_CHECKING, TypeVar

import trio

from vswapd import config
from vswapd.records import GROUP_REGIONS, Region

if TYPE_CHECKING:
    from collections.abc import Callable

    from vswapd.engine import Engine
    from vswapd.groups import Group, GroupRegistry

_Result = TypeVar("_Result")


class Regions:
    """All regions of the daemon, by name."""

    def __init__(self, engine: Engine, groups: GroupRegistry, limit_bytes: int, size_bytes_max: int) -> None:
        """For each user: RAM, and the sum of sizes."""
        self._engine = engine
        self._groups = groups
        self._limit_bytes = limit_bytes
        self._size_bytes_max = size_bytes_max
        self._workers = trio.CapacityLimiter(config.REGION_WORKERS)
        self._known: dict[int, Region] = {region.number: region for region in engine.regions()}
        self._numbers = {region.name: region.number for region in self._known.values() if not region.is_unlinked}

    def names(self) -> list[str]:
        """Those that can be opened."""
        return sorted(self._numbers)

    def find(self, name: str) -> int | None:
        """The number of a region."""
        return self._numbers.get(name)

    def get(self, number: int) -> Region:
        """As it is now. OSError (ENOENT)."""
        return self._engine.region(number)

    def create(self, name: str, uid: int, gid: int, mode: int) -> int:
        """An empty one. OSError: EEXIST, EDQUOT, ENAMETOOLONG, ENFILE."""
        if name in self._numbers:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        if sum(region.uid == uid for region in self._known.values()) >= config.REGIONS_PER_UID_MAX:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        group = self._group_of(uid)
        region = Region(0, group.number, mode & 0o777, uid, gid, modified_ns=time.time_ns(), name=name)
        number = self._engine.region_create(region)
        self._known[number] = dataclasses.replace(region, number=number)
        self._numbers[name] = number
        return number

    def _group_of(self, uid: int) -> Group:
        base = f"regions-{uid}"
        for group in self._region_groups():
            if not group.doomed and group.name.split(".")[0] == base:  # it is NAME.2 where somebody has NAME
                return group
        return self._groups.create(base, 0, self._limit_bytes, regions=True)

    def _region_groups(self) -> list[Group]:
        numbers = {record.group for record in self._engine.groups() if record.flags & GROUP_REGIONS}
        return [group for group in self._groups if group.number in numbers]

    def change(self, number: int, *, mode: int | None = None, gid: int | None = None, modified_ns: int | None = None) -> None:
        """What is given. OSError."""
        now = self._engine.region(number)
        self._engine.region_change(
            number,
            now.mode if mode is None else mode & 0o777,
            now.gid if gid is None else gid,
            now.modified_ns if modified_ns is None else modified_ns,
        )

    # ---- bytes ----

    async def read(self, number: int, offset: int, size: int) -> memoryview:
        """Fewer at the end. OSError (EIO): some of them are lost."""
        return await self._in_worker(self._engine.region_read, number, offset, size)

    async def write(self, number: int, offset: int, data: bytes) -> None:
        """OSError: EDQUOT, ENOSPC; then what was not stored cannot be read any more."""
        try:
            self._resize(number, offset + len(data), may_shrink=False)
        except OSError:
            await self._in_worker(self._engine.region_lose, number, offset, len(data))
            raise
        await self._in_worker(self._engine.region_write, number, offset, data)

    async def truncate(self, number: int, size_bytes: int) -> None:
        """OSError: EDQUOT, EFBIG."""
        self._resize(number, size_bytes, may_shrink=True)
        await self._in_worker(self._engine.region_truncate, number, size_bytes)

    def _resize(self, number: int, size_bytes: int, *, may_shrink: bool) -> None:
        """Note how large it is about to be."""
        region = self._known[number]
        if size_bytes < region.size_bytes and not may_shrink:
            return
        if size_bytes > region.size_bytes:
            owned = sum(other.size_bytes for other in self._known.values() if other.uid == region.uid)
            if owned - region.size_bytes + size_bytes > self._size_bytes_max:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        if size_bytes != region.size_bytes:
            self._known[number] = dataclasses.replace(region, size_bytes=size_bytes)

    async def _in_worker(self, call: Callable[..., _Result], *arguments: object) -> _Result:
        return await trio.to_thread.run_sync(call, *arguments, limiter=self._workers)

    # ---- the end ----

    def unlink(self, name: str) -> int:
        """Its name is free; destroy() follows when nobody has it open. Its number. OSError (ENOENT)."""
        number = self._numbers.get(name)
        if number is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._engine.region_unlink(number)
        del self._numbers[name]
        self._known[number] = dataclasses.replace(self._known[number], is_unlinked=1)
        return number

    def is_unlinked(self, number: int) -> bool:
        """Whether it has no name any more."""
        region = self._known.get(number)
        return region is not None and bool(region.is_unlinked)

    async def destroy(self, number: int) -> None:
        """Free all of it, and its group when it was the last."""
        del self._known[number]
        await self._in_worker(self._engine.region_destroy, number)
        in_use = {region.group for region in self._known.values()}
        for group in self._region_groups():
            if group.number not in in_use:
                self._groups.doom(group)
