# SPDX-License-Identifier: MIT
"""What ends when there is no more of it: the group that wanted it, with a clear line, and nobody else."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from support.limited import MIB, command_path, python_argv, run_limited

if TYPE_CHECKING:
    from integration.conftest import DaemonProcess

_SECONDS_MAX = 120.0


# ---- memory that a program keeps to itself ----

_OWN_USERFAULTFD = """
import ctypes, errno, fcntl, mmap, os, struct
area = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, len(area), 4096):
    area[page : page + 4096] = page.to_bytes(8, "little") * 512
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
userfaultfd = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC)
api = bytearray(struct.pack("QQQ", 0xAA, 0, 0))
fcntl.ioctl(userfaultfd, 0xC018AA3F, api)
def register(bytes):
    try:
        return fcntl.ioctl(userfaultfd, 0xC020AA00, bytearray(struct.pack("QQQQ", address, bytes, 2, 0)))
    except OSError as error:
        return errno.errorcode[error.errno]
print(register(len(area)))
for page in range(0, len(area), 4096):
    assert area[page : page + 4096] == page.to_bytes(8, "little") * 512, page
print(register(4 << 20))
for page in range(0, len(area), 4096):
    assert area[page : page + 4096] == page.to_bytes(8, "little") * 512, page
print("right")
"""


def test_own_userfaultfd_over_more_than_the_limit() -> None:
    """It is refused, everything is as before, and less of it is given."""
    result = run_limited("32M", python_argv(_OWN_USERFAULTFD), seconds_max=_SECONDS_MAX)
    assert result.status == 0, result.describe()
    assert result.stdout.decode().split() == ["ENOMEM", "0", "right"], result.describe()
    assert result.stats["counters"]["out_of_memory_kills"] == 0
