# SPDX-License-Identifier: MIT
"""region_files — regions as files that can be mapped: what fs.py does for regions/NAME.

The kernel's page cache holds what of a region is resident, and is written back to us when it likes, or when asked
(msync, fsync): that is why the mount has the writeback cache, without which there is no writing to a shared mapping. We
alone change a region, so the kernel may keep what it has read for as long as it wants.

A region that was unlinked is freed when the kernel forgets its inode: nobody has it open or mapped then.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from typing import TYPE_CHECKING, Any

import pyfuse3

from vswapd import config

if TYPE_CHECKING:
    from vswapd.regions import Regions

_FIRST_INODE = 1 << 32  # above those of the rest of the tree
_ATTRIBUTES_SECONDS = 1.0
_BLOCK_BYTES = 512


def _error(error: OSError) -> pyfuse3.FUSEError:
    return pyfuse3.FUSEError(error.errno or errno.EIO)


class RegionFiles:
    """Inodes and open files of regions."""

    def __init__(self, regions: Regions) -> None:
        self._regions = regions
        self._numbers: dict[int, int] = {}  # inode -> region
        self._inodes: dict[int, int] = {}
        self._lookups: dict[int, int] = {}
        self._open: dict[int, int] = {}  # file handle -> region
        self._next_inode = itertools.count(_FIRST_INODE)

    def has_inode(self, inode: int) -> bool:
        """Whether it is a region's."""
        return inode >= _FIRST_INODE

    def has_handle(self, handle: int) -> bool:
        """Whether it is that of an open region."""
        return handle in self._open

    def _number(self, inode: int) -> int:
        number = self._numbers.get(inode)
        if number is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return number

    # ---- names ----

    def lookup(self, name: str) -> pyfuse3.EntryAttributes:
        """And count it: the kernel will forget it."""
        number = self._regions.find(name)
        if number is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.count_lookup(self.attributes_of(number))

    def count_lookup(self, entry: pyfuse3.EntryAttributes) -> pyfuse3.EntryAttributes:
        """The kernel was told of it."""
        self._lookups[entry.st_ino] = self._lookups.get(entry.st_ino, 0) + 1
        return entry

    def attributes_of(self, number: int) -> pyfuse3.EntryAttributes:
        """Of a region, which gets an inode if it has none."""
        try:
            region = self._regions.get(number)
        except OSError as error:
            raise _error(error) from None
        inode = self._inodes.get(number)
        if inode is None:
            inode = self._inodes[number] = next(self._next_inode)
            self._numbers[inode] = number
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | region.mode)
        entry.st_nlink = 0 if region.is_unlinked else 1
        entry.st_uid, entry.st_gid = region.uid, region.gid
        entry.st_size = region.size_bytes
        entry.st_blksize = config.PAGE_BYTES
        stored = region.same_pages + region.pool_pages + region.spill_pages
        entry.st_blocks = stored * config.PAGE_BYTES // _BLOCK_BYTES
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = region.modified_ns
        entry.entry_timeout = 0
        entry.attr_timeout = _ATTRIBUTES_SECONDS
        return entry

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """Of an inode."""
        return self.attributes_of(self._number(inode))

    async def forget(self, inode: int, count: int) -> None:
        """The kernel does not know it any more."""
        left = self._lookups.get(inode, 0) - count
        if left > 0:
            self._lookups[inode] = left
            return
        self._lookups.pop(inode, None)
        number = self._numbers.pop(inode, None)
        if number is None:
            return
        del self._inodes[number]
        if self._regions.is_unlinked(number):
            await self._regions.destroy(number)

    async def unlink(self, name: str) -> None:
        """Free it now if the kernel does not know it, else when it forgets it."""
        try:
            number = self._regions.unlink(name)
        except OSError as error:
            raise _error(error) from None
        if number not in self._inodes:
            await self._regions.destroy(number)

    # ---- files ----

    def create(self, name: str, mode: int, ctx: Any, handle: int) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """A new region, open."""
        try:
            number = self._regions.create(name, ctx.uid, ctx.gid, mode & ~ctx.umask)
        except OSError as error:
            raise _error(error) from None
        entry = self.count_lookup(self.attributes_of(number))
        return self.open(entry.st_ino, handle), entry

    def open(self, inode: int, handle: int) -> pyfuse3.FileInfo:
        """Who may is decided before, from the mode."""
        self._open[handle] = self._number(inode)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=True)

    def release(self, handle: int) -> None:
        """It is closed, and unmapped."""
        del self._open[handle]

    async def read(self, handle: int, offset: int, size: int) -> memoryview:
        """At most so many bytes."""
        try:
            return await self._regions.read(self._open[handle], offset, size)
        except OSError as error:
            raise _error(error) from None

    async def write(self, handle: int, offset: int, data: bytes) -> int:
        """All of it."""
        try:
            await self._regions.write(self._open[handle], offset, data)
        except OSError as error:
            raise _error(error) from None
        return len(data)

    async def change(self, inode: int, attr: Any, fields: Any) -> pyfuse3.EntryAttributes:
        """chmod, chgrp, truncate, utimes; not chown, for its memory is its maker's."""
        number = self._number(inode)
        try:
            if fields.update_uid and attr.st_uid != self._regions.get(number).uid:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            if fields.update_size:
                await self._regions.truncate(number, attr.st_size)
            self._regions.change(
                number,
                mode=attr.st_mode if fields.update_mode else None,
                gid=attr.st_gid if fields.update_gid else None,
                modified_ns=attr.st_mtime_ns if fields.update_mtime else None,
            )
        except OSError as error:
            raise _error(error) from None
        return self.attributes(inode)
