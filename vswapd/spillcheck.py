# SPDX-License-Identifier: MIT
"""spillcheck — what can be said of a spill file or device without the slots that name its objects, and without the key.

Segments, tables and objects are compared with their checksums. Which objects are live only the daemon's slot table
knows. What is known here is that an object is dead when its page was written once more later by the same backend,
unless a forked process still has the old one.

A daemon that uses the file goes on writing to it meanwhile. So what looks damaged is read again until it is sound, or
the same twice; and a write that a death cut off, which no slot names, is damage to whoever reads only the disk.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vswapd import spillfile
from vswapd.failure import Failure
from vswapd.spillfile import UNIT_BYTES, SpillFileError

if TYPE_CHECKING:
    from vswapd.spillfile import Segment

_TRIES_MAX = 20
_TRY_AGAIN_SECONDS = 0.1
_PAGES_KNOWN_MAX = 1 << 22  # some 600 MiB of this process
_STRANGE = "holds something that is no segment"
_OWNER_PAGE_BITS = 40  # an owner is a client's index and a page of it (csrc/writeback.c)


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was written."""

    segment: int
    cause: str

    def __str__(self) -> str:
        return f"segment {self.segment}: {self.cause}"


@dataclass
class Report:
    """All of a file or device."""

    path: str
    is_device: bool
    is_in_use: bool
    size_bytes: int
    segments: int = 0
    encrypted_segments: int = 0
    objects: int = 0
    object_bytes: int = 0  # of those that are not encrypted
    superseded_objects: int | None = 0  # of those that are not encrypted; None: too many to tell
    changing_segments: int = 0
    findings: list[Finding] = field(default_factory=list)


class _Reader:
    """One pass over an open file."""

    def __init__(self, descriptor: int, report: Report) -> None:
        self._descriptor = descriptor
        self._report = report
        self._pages: set[tuple[int, int]] = set()

    def _look(self, number: int) -> tuple[Segment | None, list[Finding], bytes]:
        data = spillfile.read_place(self._descriptor, number)
        try:
            segment = spillfile.parse_segment(number, data)
        except SpillFileError as error:
            return None, [Finding(number, error.cause)], data
        if segment is None:
            # A device may have held anything; a file has holes where no segment is.
            strange = not self._report.is_device and any(data)
            return None, [Finding(number, _STRANGE)] * strange, data
        findings = [
            Finding(
                number,
                f"object at byte {extent.extent * UNIT_BYTES}: checksum mismatch"
                f" (page {(extent.owner & (1 << _OWNER_PAGE_BITS) - 1) << 12:#x} of client {extent.owner >> _OWNER_PAGE_BITS})",
            )
            for extent in segment.damaged()
        ]
        return segment, findings, data

    def _look_until_settled(self, number: int) -> tuple[Segment | None, list[Finding]]:
        before: bytes | None = None
        for _ in range(_TRIES_MAX):
            segment, findings, data = self._look(number)
            if not findings or not self._report.is_in_use or data == before:
                return segment, findings
            before = data
            time.sleep(_TRY_AGAIN_SECONDS)  # a write of one segment takes a few milliseconds
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._report.changing_segments += 1
        return None, []

    def _count(self, segment: Segment) -> None:
        report = self._report
        report.segments += 1
        report.encrypted_segments += segment.is_sealed
        report.objects += segment.extent_count
        report.object_bytes += sum(extent.units for extent in segment.extents) * UNIT_BYTES
        if report.superseded_objects is None:
            return
        for extent in segment.extents:
            page = (segment.identity, extent.owner)
            report.superseded_objects += page in self._pages
            self._pages.add(page)
        if len(self._pages) > _PAGES_KNOWN_MAX:
            report.superseded_objects = None
            self._pages.clear()

    def read_all(self) -> None:
        for number in spillfile.numbers(self._descriptor):
            segment, findings = self._look_until_settled(number)
            if segment is not None:
                self._count(segment)
            self._report.findings += findings


def _is_locked(descriptor: int) -> bool:
    """By a daemon, which has each of its backends locked. The lock is ours for an instant only."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def check(path: str) -> Report:
    """Read all of it. Failure: it is nothing to be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}", "name a spill file or device") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise Failure(f"{path} is neither a file nor a block device", "name a spill file or device")
        size = os.lseek(descriptor, 0, os.SEEK_END)
        report = Report(path, stat.S_ISBLK(mode), _is_locked(descriptor), size)
        _Reader(descriptor, report).read_all()
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}", "see what the kernel says of the disk") from None
    finally:
        os.close(descriptor)
    if report.findings and report.segments == 0 and all(found.cause == _STRANGE for found in report.findings):
        raise Failure(f"{path} is no spill file: it holds something else", "name a spill file or device")
    return report
