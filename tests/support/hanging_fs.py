# SPDX-License-Identifier: MIT
"""hanging_fs MOUNTPOINT CONTROL — a file system with one file, `spill`, that can be made to hang.

While CONTROL says "hang" no read and no write of the file is answered; CONTROL.waiting says how many wait. When this
process is killed the file is gone for all that have it open, as a device that is pulled out.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import tempfile
from pathlib import Path

import pyfuse3
import trio

_FILE = pyfuse3.ROOT_INODE + 1
_NAME = b"spill"


class OneFile(pyfuse3.Operations):  # type: ignore[misc,unused-ignore]
    """The file's bytes are in an unlinked one."""

    enable_writeback_cache = False

    def __init__(self, control: Path) -> None:
        super().__init__()
        self._control = control
        self._waiting = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as the process

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.st_mode = stat.S_IFDIR | 0o700 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o600
        if inode == _FILE:
            file = os.fstat(self._file.fileno())
            attributes.st_size, attributes.st_blocks = file.st_size, file.st_blocks
        return attributes

    async def _answered(self) -> None:
        if self._control.read_text() != "hang":
            return
        self._waiting += 1
        self._tell()
        while self._control.read_text() == "hang":  # noqa: ASYNC110 -- another process writes it
            await trio.sleep(0.01)
        self._waiting -= 1
        self._tell()

    def _tell(self) -> None:
        self._control.with_suffix(".waiting").write_text(str(self._waiting))

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def setattr(self, inode: int, attr: object, fields: object, fh: object, ctx: object) -> object:
        if fields.update_size:  # type: ignore[attr-defined]
            self._file.truncate(attr.st_size)  # type: ignore[attr-defined]
        return self._attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        if name != _NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(_FILE)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._answered()
        return os.pread(self._file.fileno(), size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        await self._answered()
        return os.pwrite(self._file.fileno(), buf, off)

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        disk = os.fstatvfs(self._file.fileno())
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(disk, name))
        return data


def main(mountpoint: str, control: Path) -> None:
    """Entry point."""
    pyfuse3.init(OneFile(control), mountpoint, {*pyfuse3.default_options, "fsname=hanging_fs"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


main(sys.argv[1], Path(sys.argv[2]))
