# SPDX-License-Identifier: MIT
"""fs — tree.py mounted with FUSE, in the daemon's own loop.

The kernel checks permissions against what getattr says (default_permissions); a write is checked a second
time, as the request of whoever opened the file. A file's text is made when it is opened, so that reading
it in pieces gives one state; nothing is cached. Not there: anything but reading, writing whole values,
and listing — no links, no locks, no extended attributes, no new files but regions (region_files.py). One tree a
process (pyfuse3).

fusermount3 unmounts when the daemon dies in whatever way (auto_unmount); a mount that a lost machine left
behind is taken away before ours.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from vswapd import paths
from vswapd.failure import Failure
from vswapd.region_files import RegionFiles
from vswapd.tree import REGIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vswapd.engine import Engine
    from vswapd.log import Log
    from vswapd.tree import Node, Path, Tree

_MNT_DETACH = 2
_WRITE_BYTES_MAX = 4096
_STALE_LOOK_SECONDS = 0.01
_STALE_LOOKS_MAX = 200
_PRESSURE_SECONDS = 2.0  # as the kernel
_REQUESTS_MAX = 16  # each has a buffer of 1 MiB

# Of the mount's page cache: read-ahead in large requests. Not how much of it may be dirty: the kernel's strict limit for FUSE
# keeps a daemon that is short of memory from searching it among dirty pages of its own mount.
_CACHE_SETTINGS = {"read_ahead_kb": "1024"}


class _Open:
    """An open file or directory, and who opened it."""

    def __init__(self, path: Path, text: bytes, uid: int, pid: int) -> None:
        self.path = path
        self.text = text
        self.uid = uid
        self.pid = pid


class TreeOperations(pyfuse3.Operations):  # type: ignore[misc,unused-ignore]
    """What the kernel asks for."""

    tree: Tree  # set before the first request is read
    regions: RegionFiles | None = None
    enable_writeback_cache = True  # without it nothing writes to a shared mapping of a region

    def __init__(self) -> None:
        super().__init__()
        self._path_of: dict[int, Path] = {pyfuse3.ROOT_INODE: ()}
        self._inode_of: dict[Path, int] = {(): pyfuse3.ROOT_INODE}
        self._lookups: dict[int, int] = {}
        self._next_inode = pyfuse3.ROOT_INODE + 1
        self._open: dict[int, _Open] = {}
        self._listed: dict[int, list[str]] = {}
        self._next_handle = 1
        self._started_ns = time.time_ns()

    # ---- names ----

    def _at(self, inode: int) -> tuple[Path, Node]:
        path = self._path_of.get(inode)
        node = self.tree.node(path) if path is not None else None
        if path is None or node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return path, node

    def _inode(self, path: Path) -> int:
        inode = self._inode_of.get(path)
        if inode is None:
            inode = self._next_inode
            self._next_inode += 1
            self._inode_of[path] = inode
            self._path_of[inode] = path
        return inode

    def _attributes(self, path: Path, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(self._inode(path))
        entry.st_mode = pyfuse3.ModeT(node.mode)
        entry.st_nlink = 1
        entry.st_uid = node.uid
        entry.st_gid = 0
        entry.st_size = 0
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._started_ns
        entry.entry_timeout = entry.attr_timeout = 0  # a PID may be another's the next moment
        return entry

    async def lookup(self, parent_inode: Any, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        """Of pyfuse3."""
        path, _ = self._at(parent_inode)
        if path == REGIONS and self.regions and name not in (b".", b".."):
            return self.regions.lookup(os.fsdecode(name))
        below = (*path, os.fsdecode(name))
        if name == b".":
            below = path
        elif name == b"..":
            below = path[:-1]
        node = self.tree.node(below)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry = self._attributes(below, node)
        self._lookups[entry.st_ino] = self._lookups.get(entry.st_ino, 0) + 1
        return entry

    async def forget(self, inode_list: Sequence[tuple[Any, int]]) -> None:
        """Of pyfuse3."""
        for inode, count in inode_list:
            if self.regions and self.regions.has_inode(inode):
                await self.regions.forget(inode, count)
                continue
            left = self._lookups.get(inode, 0) - count
            if left > 0 or inode == pyfuse3.ROOT_INODE:
                self._lookups[inode] = left
                continue
            self._lookups.pop(inode, None)
            path = self._path_of.pop(inode, None)
            if path is not None:
                del self._inode_of[path]

    async def getattr(self, inode: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        """Of pyfuse3."""
        if self.regions and self.regions.has_inode(inode):
            return self.regions.attributes(inode)
        return self._attributes(*self._at(inode))

    async def setattr(self, inode: Any, attr: Any, fields: Any, fh: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        """Truncating is what the shell's > does first, and means nothing here; the rest is not allowed. Of a region all
        that a file has can be changed."""
        if self.regions and self.regions.has_inode(inode):
            return await self.regions.change(inode, attr, fields)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        path, node = self._at(inode)
        if fields.update_size and node.request is None:
            raise pyfuse3.FUSEError(errno.EACCES)
        return self._attributes(path, node)

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        """Of pyfuse3."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = 255
        return data

    # ---- directories ----

    async def opendir(self, inode: Any, ctx: Any) -> Any:
        """Of pyfuse3."""
        path, node = self._at(inode)
        if node.names is None:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        handle = self._handle()
        self._listed[handle] = node.names()
        self._open[handle] = _Open(path, b"", ctx.uid, ctx.pid)
        return pyfuse3.FileHandleT(handle)

    async def readdir(self, fh: Any, start_id: int, token: Any) -> None:
        """Of pyfuse3."""
        path = self._open[fh].path
        for index, name in enumerate(self._listed[fh][start_id:], start=start_id + 1):
            below = (*path, name)
            number = self.tree.region(below)
            if number is not None and self.regions:
                entry = self.regions.attributes_of(number)
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, index):
                    return
                self.regions.count_lookup(entry)
                continue
            node = self.tree.node(below)
            if node is None:
                continue  # it ended meanwhile
            entry = self._attributes(below, node)
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, index):
                return
            self._lookups[entry.st_ino] = self._lookups.get(entry.st_ino, 0) + 1

    async def releasedir(self, fh: Any) -> None:
        """Of pyfuse3."""
        del self._listed[fh], self._open[fh]

    # ---- files ----

    def _handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    async def open(self, inode: Any, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        """Of pyfuse3. Who may is decided before, from the mode."""
        if self.regions and self.regions.has_inode(inode):
            return self.regions.open(inode, self._handle())
        path, node = self._at(inode)
        if stat.S_ISDIR(node.mode):
            raise pyfuse3.FUSEError(errno.EISDIR)
        text = b""
        if flags & os.O_ACCMODE != os.O_WRONLY:
            if node.read is None:
                raise pyfuse3.FUSEError(errno.EACCES)  # root, whom the mode does not stop
            text = self._call(node.read).encode("utf-8", "surrogateescape")
        if flags & os.O_ACCMODE != os.O_RDONLY and node.request is None:
            raise pyfuse3.FUSEError(errno.EACCES)
        handle = self._handle()
        self._open[handle] = _Open(path, text, ctx.uid, ctx.pid)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), direct_io=True)

    @staticmethod
    def _call(read: Callable[[], str]) -> str:
        try:
            return read()
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def read(self, fh: Any, off: int, size: int) -> bytes | memoryview:
        """Of pyfuse3."""
        if self.regions and self.regions.has_handle(fh):
            return await self.regions.read(fh, off, size)
        return self._open[fh].text[off : off + size]

    async def write(self, fh: Any, off: int, buf: bytes) -> int:
        """Of pyfuse3."""
        if self.regions and self.regions.has_handle(fh):
            return await self.regions.write(fh, off, buf)
        opened = self._open[fh]
        node = self.tree.node(opened.path)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if off != 0 or len(buf) > _WRITE_BYTES_MAX:
            raise pyfuse3.FUSEError(errno.EINVAL)
        try:
            await self.tree.write(node, buf.decode("ascii", "replace"), opened.uid, opened.pid)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        return len(buf)

    async def create(self, parent_inode: Any, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        """Of pyfuse3. Regions only."""
        return self._regions_at(parent_inode).create(os.fsdecode(name), mode, ctx, self._handle())

    async def unlink(self, parent_inode: Any, name: bytes, ctx: Any) -> None:
        """Of pyfuse3. Regions only."""
        await self._regions_at(parent_inode).unlink(os.fsdecode(name))

    async def _refuse(self, *_: object) -> Any:
        """What is not there: EPERM, as from other file systems that have no such thing, and not ENOSYS."""
        raise pyfuse3.FUSEError(errno.EPERM)

    mkdir = rmdir = mknod = symlink = link = rename = _refuse  # type: ignore[assignment,unused-ignore]

    def _regions_at(self, inode: Any) -> RegionFiles:
        if not self.regions or self._at(inode)[0] != REGIONS:
            raise pyfuse3.FUSEError(errno.EPERM)
        return self.regions

    async def fsync(self, fh: Any, datasync: bool) -> None:
        """Of pyfuse3. What was written is stored already."""

    async def release(self, fh: Any) -> None:
        """Of pyfuse3."""
        if self.regions and self.regions.has_handle(fh):
            self.regions.release(fh)
            return
        del self._open[fh]


def _is_stale(path: str) -> bool:
    """Whether it is the mount of a process that has died."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def _remove_stale_mount(path: str) -> None:
    """Wait for fusermount3 to take the mount of the daemon before away, or else do it."""
    for _ in range(_STALE_LOOKS_MAX):
        if not _is_stale(path):
            return
        time.sleep(_STALE_LOOK_SECONDS)
    ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(path), _MNT_DETACH)


class Mount:
    """A mounted tree: made before the daemon serves, closed on every way out."""

    def __init__(self, path: str) -> None:
        """Failure."""
        self.path = path
        remedy = "vswapctl doctor says whether /dev/fuse can be used; leave --fs out to do without"
        try:
            _remove_stale_mount(path)
            paths.make_public_directory(path)
            if os.listdir(path) or os.path.ismount(path):
                raise Failure(
                    f"cannot mount on {path}: it is not an empty directory", "name another with --fs"
                )
        except OSError as error:
            raise Failure(f"cannot mount on {path}: {error.strerror}", "name another with --fs") from None
        options = {*pyfuse3.default_options, "allow_other", "auto_unmount", "fsname=vswapd", "subtype=vswapd"}
        self._operations = TreeOperations()
        try:
            pyfuse3.init(self._operations, path, options)
        except (RuntimeError, OSError) as error:
            raise Failure(f"cannot mount on {path}: {error}", remedy) from None

    async def _set_cache(self) -> None:
        """Where it may not be set, regions are slower."""
        with suppress(OSError):  # once something is answered: the kernel has its own settings until then
            await trio.to_thread.run_sync(os.stat, self.path, abandon_on_cancel=True)
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            devices = [line.split()[2] for line in file if line.split()[4] == self.path]
        for name, value in _CACHE_SETTINGS.items() if devices else ():
            with suppress(OSError), open(f"/sys/class/bdi/{devices[-1]}/{name}", "w", encoding="ascii") as file:
                file.write(value)

    def close(self) -> None:
        """Unmount."""
        pyfuse3.close(unmount=True)

    async def run(self, tree: Tree, engine: Engine, log: Log) -> None:
        """Serve for ever."""
        self._operations.tree = tree
        if tree.regions is not None:
            self._operations.regions = RegionFiles(tree.regions)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_pressure, tree, engine)
            if tree.regions is not None:
                nursery.start_soon(self._set_cache)
            await pyfuse3.main(max_tasks=_REQUESTS_MAX)
            log.warning("the file tree was unmounted by somebody else", path=self.path)
            await trio.sleep_forever()


async def _watch_pressure(tree: Tree, engine: Engine) -> None:
    while True:
        tree.pressure.update(sum(engine.statistics().latency_ns_sum) // 1000, trio.current_time())
        await trio.sleep(_PRESSURE_SECONDS)
