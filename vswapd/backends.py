# SPDX-License-Identifier: MIT
"""backends — open spill files and block devices.

What is opened will be overwritten, so a file that is not empty must be a spill file (or zeros), and a
device must carry nothing known; both are locked, so that two daemons never write to one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from vswapd import config, machine, policy
from vswapd.failure import STATUS_USAGE, Failure
from vswapd.records import BACKEND_ENCRYPT
from vswapd.sizes import format_size, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vswapd.engine import Engine

_MAGIC = (b"VSWPSEG", b"VSWPSEAL")  # of a segment, of whatever version
_HEAD_BYTES = 128 * config.KIB  # partition tables and the superblocks of all common file systems lie within


class Spill:
    """An open spill file or device; `close` or `undo` unless the engine took it over."""

    def __init__(
        self,
        fd: int,
        path: str,
        size_bytes: int,
        priority: int,
        *,
        encrypt: bool = False,
        rate_bytes: int = 0,
        was_created: bool = False,
    ) -> None:
        self.fd = fd
        self.path = path
        self.size_bytes = size_bytes
        self.priority = priority
        self.flags = BACKEND_ENCRYPT if encrypt else 0
        self.was_created = was_created
        self.rate_bytes = rate_bytes

    def add_to(self, engine: Engine, flags: int = 0) -> None:
        """The engine takes it over. OSError: it has not."""
        engine.backend_add(
            self.fd, self.path, self.size_bytes, self.priority, self.flags | flags, self.rate_bytes
        )

    def close(self) -> None:
        """Give it up."""
        os.close(self.fd)

    def undo(self) -> None:
        """Give it up and leave nothing that was not there before."""
        os.close(self.fd)
        if self.was_created:
            os.unlink(self.path)


def split_argument(text: str) -> tuple[str, int]:
    """'PATH[:SIZE]' -> (path, size or 0). A path that has such an ending itself and exists is a path."""
    path, colon, size_text = text.rpartition(":")
    if colon and path and not os.path.exists(text):
        try:
            size = parse_size(size_text)
        except ValueError:
            if "/" not in size_text:
                raise
        else:
            if size < config.SPILL_BYTES_MIN:
                raise ValueError(f"{format_size(size)} of spill space is too little; give at least 1 MiB")
            return path, size
    if not text:
        raise ValueError("an empty spill path; give PATH or PATH:SIZE")
    return text, 0


def _open_direct(path: str, flags: int) -> int:
    flags |= os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: the file system takes no O_DIRECT
            raise
    return os.open(path, flags, 0o600)


def _check_content(fd: int, path: str, what: str) -> None:
    # Through a second description: O_DIRECT wants aligned buffers.
    plain = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(plain, _HEAD_BYTES, 0)
    finally:
        os.close(plain)
    if head.strip(b"\0") and not head.startswith(_MAGIC):
        remedy = (
            "wipe it first (wipefs -a), or name another" if what == "device" else "name another or a new one"
        )
        raise Failure(f"spill {what} {path} holds something else, which would be lost", remedy)


def _size_of_file(fd: int, path: str, size_bytes: int, limit_bytes: int) -> int:
    figures = os.fstatvfs(fd)
    free_bytes = figures.f_bavail * figures.f_frsize + os.fstat(fd).st_blocks * 512
    size = size_bytes or policy.spill_size_bytes(free_bytes, limit_bytes, machine.ram_bytes())
    if size == 0 or free_bytes < config.SPILL_BYTES_MIN:
        raise Failure(
            f"no room for a spill file on the file system of {path}",
            "name another with --spill, set VSWAPD_SPILL_DIR, or use --no-spill",
        )
    return size


def _cause(error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "it is mounted, or something else uses it"
    return str(error.strerror)


def _size_of_device(fd: int, path: str, size_bytes: int) -> int:
    device_bytes = os.lseek(fd, 0, os.SEEK_END)
    if device_bytes < config.SPILL_BYTES_MIN:
        raise Failure(
            f"spill device {path} of {format_size(device_bytes)} is too small", "name one of at least 1 MiB"
        )
    return min(size_bytes or device_bytes, device_bytes)


def open_spill(
    path: str, size_bytes: int, limit_bytes: int, priority: int, *, encrypt: bool = False, rate_bytes: int = 0
) -> Spill:
    """The file (made if absent, 0600) or block device at `path`; size 0: as fits. Failure."""
    created = False
    try:
        try:
            mode = os.stat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise Failure(
                    f"spill {path} is neither a file nor a block device", "name another", STATUS_USAGE
                )
            # O_EXCL on a device: not while it is mounted or swapped on.
            fd = _open_direct(path, os.O_EXCL if stat.S_ISBLK(mode) else 0)
        except FileNotFoundError:
            fd = _open_direct(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
            created = True
    except OSError as error:
        raise Failure(f"cannot use spill {path}: {_cause(error)}", "name a path you can write") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failure(f"spill {path} is in use: by another daemon, or named twice", "name another") from None
        is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        if is_device:
            size = _size_of_device(fd, path, size_bytes)
        else:
            size = _size_of_file(fd, path, size_bytes, limit_bytes)
        _check_content(fd, path, "device" if is_device else "file")
        if encrypt and not is_device:
            os.ftruncate(fd, 0)  # a daemon that did not encrypt may have left pages in it
        return Spill(
            fd,
            os.path.abspath(path),
            size,
            priority,
            encrypt=encrypt,
            rate_bytes=rate_bytes,
            was_created=created,
        )
    except BaseException:
        os.close(fd)
        if created:
            os.unlink(path)
        raise


def open_spills(wanted: Iterable[tuple[str, int, int, bool, int]], limit_bytes: int) -> list[Spill]:
    """Each (path, size, priority, encrypt, rate) as open_spill has it, or none of them. Failure."""
    spills: list[Spill] = []
    try:
        for path, size, priority, encrypt, rate_bytes in wanted:
            spills.append(open_spill(path, size, limit_bytes, priority, encrypt=encrypt, rate_bytes=rate_bytes))
    except BaseException:
        for spill in spills:
            spill.undo()
        raise
    return spills


def open_private_spill(limit_bytes: int, *, encrypt: bool = False) -> Spill:
    """An unlinked sparse file in $VSWAPD_SPILL_DIR or /var/tmp. Failure."""
    directory = os.environ.get("VSWAPD_SPILL_DIR") or config.SPILL_DIRECTORY
    remedy = "set VSWAPD_SPILL_DIR to a directory you can write, or use --no-spill"
    try:
        fd = _open_unlinked(directory)
    except OSError as error:
        raise Failure(f"cannot make a spill file in {directory}: {error.strerror}", remedy) from None
    try:
        size = _size_of_file(fd, directory, 0, limit_bytes)
    except BaseException:
        os.close(fd)
        raise
    path = os.path.join(directory, f"vswap-{os.getpid()}.unlinked")
    return Spill(fd, path, size, 0, encrypt=encrypt)


def _open_unlinked(directory: str) -> int:
    try:
        return _open_direct(directory, os.O_TMPFILE)
    except OSError as error:
        # A file system without O_TMPFILE; kernels answer in either way.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    path = os.path.join(directory, f".vswap-{os.getpid()}-{os.urandom(8).hex()}")
    fd = _open_direct(path, os.O_CREAT | os.O_EXCL)
    os.unlink(path)
    return fd
