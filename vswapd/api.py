# SPDX-License-Identifier: MIT
"""api — what `import vswapd` offers to a program. Sizes are bytes, or text such as "1.5G".

Whatever goes wrong is a vswapd.Failure: one line that says what, and what to do. NumPy is needed by empty()
alone. Nothing here moves a page: programs under `vswapctl run` have their memory managed without asking.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vswapd import connection
from vswapd.failure import Failure
from vswapd.sizes import format_size_argument, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    import numpy.typing as npt

__all__ = ["Failure", "alloc", "cold", "empty", "limit", "status", "willneed"]

_MADV_POPULATE_READ = 22


def _size(size: int | str) -> int:
    if isinstance(size, str):
        try:
            return parse_size(size)
        except ValueError as error:
            raise Failure(str(error)) from None
    return size


# ---- limit ----


def _check_start_again() -> None:
    """Failure when starting this program again would lose something."""
    remedy = "start the program with vswapctl run, where limit() changes its limit"
    if sys.argv[:1] in ([], [""], ["-"]) or sys.flags.interactive or hasattr(sys, "ps1"):
        raise Failure("limit() cannot start an interactive session again", remedy)
    if threading.active_count() > 1:
        raise Failure("limit() cannot start the program again: it has threads", f"call it earlier, or {remedy}")


def _start_again(size: int) -> NoReturn:
    _check_start_again()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    # -P: not the vswapd of whatever directory this is.
    run = [sys.executable, "-P", "-m", "vswapd", "run", "--limit", format_size_argument(size), "--"]
    try:
        os.execv(sys.executable, [*run, sys.executable, *sys.orig_argv[1:]])
    except OSError as error:
        raise Failure(f"cannot start the program again: {error.strerror}") from None


def _set_limit(group: str, size: int) -> int:
    """The limit there was."""
    with connection.connect_any(None) as daemon:
        groups = daemon.request("status")["status"]["groups"]
        before = next((int(entry["limit_bytes"]) for entry in groups if entry["name"] == group), None)
        if before is None:
            raise Failure(f"no group '{group}' any more", "start the program with vswapctl run")
        daemon.request("limit", group=group, limit_bytes=size)
    return before


@contextmanager
def limit(size: int | str) -> Iterator[None]:
    """Run a block within a limit of `size` bytes of RAM.

    Under `vswapctl run`: sets the limit of the group, which this process shares with all that the run
    started, and sets the former one again at the end of the block. What is more than the limit is swapped
    out; nothing is waited for.

    Otherwise: starts the program again, from its beginning and with the same arguments, under
    ``vswapctl run --limit SIZE``; the second time it comes here it is under it. So it belongs at the start, before
    anything that should happen once, and before threads. An interactive session is refused.

    >>> with vswapd.limit("64M"):
    ...     memory = vswapd.alloc("128M")
    ...     memory[::4096] = b"x" * (128 * 256)

    Raises Failure: not a size; out of range; no daemon can be had; cannot start again.
    """
    count = _size(size)
    group = os.environ.get("VSWAP_GROUP")
    if not group:
        _start_again(count)
    before = _set_limit(group, count)
    try:
        yield
    finally:
        _set_limit(group, before)


def status() -> dict[str, Any]:
    """Where the memory is: the document of ``vswapctl status --json``, sizes in bytes.

    Asks the daemon this program runs under, else the system's, else the only private one of this user.

    >>> own = next(group for group in vswapd.status()["groups"] if group["name"] == os.environ["VSWAP_GROUP"])
    >>> own["usage_bytes"] > 0
    True

    Raises Failure: no daemon answers.
    """
    with connection.connect_any(None) as daemon:
        document: dict[str, Any] = daemon.request("status")["status"]
    return document


# ---- memory ----


def alloc(nbytes: int | str) -> mmap.mmap:
    r"""`nbytes` bytes of zeroed memory in a mapping of its own; a writable buffer.

    Any memory of a program under `vswapctl run` is managed; a mapping of its own begins at a page, is not
    shared with other objects, and goes back at once when the last use of it ends.

    >>> memory = vswapd.alloc("8M")
    >>> len(memory), memory[:3]
    (8388608, b'\x00\x00\x00')

    Raises Failure: not a size; no room in the address space.
    """
    count = _size(nbytes)
    if count <= 0:
        raise Failure(f"cannot allocate {count} bytes", "give at least 1")
    try:
        return mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise Failure(f"cannot allocate {count} bytes: {error}", "give less") from None


def empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike = float) -> npt.NDArray[Any]:
    """A NumPy array of `shape` (elements) in memory from alloc(), so zeroed; in C order.

    >>> vswapd.empty((2, 3), "u1").tolist()
    [[0, 0, 0], [0, 0, 0]]

    Raises Failure as alloc(); ImportError without NumPy.
    """
    try:
        import numpy as np
    except ImportError:
        raise ImportError("vswapd.empty() needs NumPy; pip install numpy, or take vswapd.alloc()") from None

    kind = np.dtype(dtype)
    if kind.hasobject:
        raise Failure(f"an array of {kind} holds references, not data", "give a dtype of numbers")
    dimensions = (shape,) if isinstance(shape, int) else tuple(shape)
    count = kind.itemsize
    for dimension in dimensions:
        count *= dimension
    if count == 0:
        return np.empty(dimensions, kind)
    return np.frombuffer(alloc(count), kind).reshape(dimensions)


def _range(buffer: Any, name: str) -> tuple[int, int]:
    """Address and length of a buffer, from the begin of its first page. Failure."""
    try:
        view = memoryview(buffer).cast("B")
        address = ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0
    except TypeError as error:
        raise Failure(f"{name}() needs one writable buffer: {error}", "give an array or a bytearray") from None
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    return start, address + len(view) - start


def cold(buffer: Any) -> None:
    """Swap out the pages of a buffer (an array, a bytearray, what alloc() gave), as it is not needed for a while.

    A hint: outside of `vswapctl run`, and in a process too small to be managed, nothing happens; pages that cannot be
    swapped out stay, and a few behind the buffer may go with it. Waited for.

    >>> array = vswapd.empty(1 << 20, "u1")
    >>> vswapd.cold(array)
    >>> int(array.sum())
    0

    Raises Failure: not one contiguous writable buffer; the daemon does not answer.
    """
    start, length = _range(buffer, "cold")
    if length == 0 or not os.environ.get("VSWAP_GROUP"):
        return
    with connection.connect_any(None) as daemon:
        daemon.request("cool", pid=os.getpid(), start=start, bytes=length)


def willneed(buffer: Any) -> None:
    """Bring all pages of a buffer (an array, a bytearray, what alloc() gave) back into RAM, and wait for it.

    Faster than touching one after the other when what follows is in no order. What is more than the limit
    pushes other pages out, in the end its own first ones.

    >>> vswapd.willneed(vswapd.empty(1 << 20, "u1"))

    Raises Failure: not one contiguous writable buffer; the pages cannot be had.
    """
    start, length = _range(buffer, "willneed")
    if length == 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_READ) != 0:
        raise Failure(f"willneed(): {os.strerror(ctypes.get_errno())}", "see the daemon's log")
