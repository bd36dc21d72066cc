# SPDX-License-Identifier: MIT
"""slow — a block device that really is slow, to read and to write: a file behind a loop device, whose rate the block
controller of a cgroup limits for whoever is in that.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

from benchmarks.cgroup import CgroupError, first_version_mount
from benchmarks.journal import retry_busy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.cgroup import Cgroup
    from benchmarks.journal import Journal


def _device_number(path: str) -> str:
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


@contextlib.contextmanager
def loop_device(journal: Journal, path: str, size_bytes: int) -> Iterator[str]:
    """A device of a new file, whose pages the kernel does not cache, inside the block."""
    with open(path, "xb") as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
    change = journal.note("loop", path=path)
    try:
        command = ["losetup", "--find", "--show", "--direct-io=on", path]
        yield subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    finally:
        journal.undo(change)
        os.unlink(path)


class Throttle:
    """Limits devices for what is started by command(), and for nobody else."""

    def __init__(self, journal: Journal, cgroup: Cgroup) -> None:
        self._path = cgroup.path  # version 2: the same group
        self._is_first = (mount := first_version_mount("blkio")) is not None
        if mount is None:
            if not os.path.exists(f"{cgroup.path}/io.max"):
                raise CgroupError("no cgroup block controller is to be had here, so no device can be made slow")
            return
        self._path = f"{mount}/{os.path.basename(cgroup.path)}"
        journal.note("cgroup", path=self._path)
        os.mkdir(self._path)

    def _write(self, name: str, text: str) -> None:
        with open(f"{self._path}/{name}", "w") as file:
            file.write(text)

    @contextlib.contextmanager
    def limited(self, device: str, bytes_per_second: int) -> Iterator[None]:
        """At most so many are read, and as many written, inside the block."""
        number = _device_number(device)
        self._set(number, bytes_per_second)
        try:
            yield
        finally:
            retry_busy(lambda: self._set(number, 0))

    def _set(self, number: str, rate: int) -> None:
        if self._is_first:
            for what in ("read", "write"):
                self._write(f"blkio.throttle.{what}_bps_device", f"{number} {rate}")
        else:
            self._write("io.max", f"{number} rbps={rate or 'max'} wbps={rate or 'max'}")

    def command(self, argv: list[str]) -> list[str]:
        """`argv`, run inside."""
        return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', self._path, *argv]
