# SPDX-License-Identifier: MIT
"""Every call to the kernel fails once: at the first call, the second, the third, … until an operation gets through.

`drive` with fault points runs `boundary`, which attaches, fills, is paged out, faults from every backing, forks,
moves its memory and is paged in, and checks every byte after each step. Whatever fails, it ends with right bytes
only, or in the way that the table says; `drive` checks all invariants while it runs and at the end.
"""

from __future__ import annotations

import errno
import re
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_RIGHT, _LOST_PAGES, _CHILD_KILLED = 0, 4, 5  # exit status of boundary
_FIRST_CALLS = (1, 2, 3, 4, 5, 8, 13, 40, 150)
_REST_MS = 150  # the writer looks at pools this often
_SECONDS_MAX = 60.0


@dataclass(frozen=True)
class Point:
    """A fault point, what fails there, and what may come of it beside right bytes."""

    name: str
    error: int
    ends: tuple[int, ...] = ()
    spill: bool = False
    encrypt: bool = False
    first: int = 1  # calls before it are the daemon's own start, which fails with a message
    persistent: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{errno.errorcode[self.error]}{'-all' if self.persistent else ''}"


_POINTS = [
    Point("sys/api", errno.EPERM, (_CHILD_KILLED,), first=2),
    Point("sys/register", errno.ENOMEM, (_CHILD_KILLED,)),  # a child that cannot be armed ends itself
    Point("sys/register", errno.EINVAL, (_CHILD_KILLED,), persistent=True),
    Point("sys/copy", errno.ENOMEM),
    Point("sys/copy", errno.EFAULT),
    Point("sys/copy", errno.EAGAIN),
    Point("sys/zero", errno.ENOMEM),
    Point("sys/zero", errno.EAGAIN),
    Point("sys/open", errno.EMFILE, (_CHILD_KILLED,)),
    Point("sys/open", errno.EMFILE, (_CHILD_KILLED,), persistent=True),
    Point("sys/scan", errno.ENOMEM),
    Point("sys/scan", errno.EFAULT, (_LOST_PAGES,)),
    Point("sys/mem", errno.ENOMEM),
    Point("sys/mem", errno.EIO, (_LOST_PAGES,)),
    Point("sys/mem", errno.EIO, (_LOST_PAGES,), persistent=True),
    Point("sys/pidfd", errno.EMFILE, (_CHILD_KILLED,)),
    Point("sys/memfd", errno.EMFILE, (_CHILD_KILLED,), first=3),
    Point("sys/mapping", errno.ENOMEM),
    Point("sys/discard", errno.EPERM, persistent=True),
    Point("sys/lock", errno.EPERM),
    Point("pool/grow", errno.ENOMEM),
    Point("client/create", errno.ENOMEM, (_CHILD_KILLED,)),
    Point("fault/read", errno.EMFILE),
    Point("block/map", errno.ENOMEM, spill=True),
    Point("io/submit", errno.EAGAIN, spill=True),
    Point("io/submit", errno.ENOMEM, spill=True),
    Point("io/read", errno.EIO, spill=True),  # of several pages: tried for each alone
    Point("io/read", errno.EIO, (_LOST_PAGES,), spill=True, persistent=True),
    Point("io/write", errno.EIO, spill=True),
    Point("io/write", errno.EIO, spill=True, persistent=True),
    Point("io/write", errno.ENOSPC, spill=True, persistent=True),
    Point("spill/allocate", errno.ENOSPC, spill=True),
    Point("spill/allocate", errno.ENOSPC, spill=True, persistent=True),
    Point("spill/punch", errno.EIO, spill=True, persistent=True),
    Point("seal/encrypt", errno.ENOMEM, spill=True, encrypt=True),
    Point("seal/encrypt", errno.ENOMEM, spill=True, encrypt=True, persistent=True),
    Point("seal/decrypt", errno.ENOMEM, spill=True, encrypt=True),
    Point("seal/decrypt", errno.EBADMSG, (_LOST_PAGES,), spill=True, encrypt=True, persistent=True),
]


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`drive` with fault points and debug checks, and `boundary` beside it."""
    directory = tmp_path_factory.mktemp("boundary")
    agent = ("agent", "preload")  # the client library's files
    sources = [str(path) for path in sorted((_ROOT.parent / "csrc").glob("*.c")) if not path.name.startswith(agent)]
    flags = ["-std=gnu11", "-O1", "-g", "-iquote", str(_ROOT.parent / "csrc")]
    defines = ["-DVSWAP_DEBUG", "-DVSWAP_FAULT_POINTS"]
    libraries = ["-llz4", "-lzstd", "-luring", "-lcrypto", "-lpthread", "-lm"]
    drive_source, boundary_source = str(_ROOT / "support/drive.c"), str(_ROOT / "support/boundary.c")
    command = ["cc", *flags, *defines, "-o", str(directory / "drive"), drive_source, *sources, *libraries]
    subprocess.run(command, check=True)
    subprocess.run(["cc", *flags, "-O2", "-o", str(directory / "boundary"), boundary_source], check=True)
    return directory


def _run(drive: Path, tmp_path: Path, point: Point, call: int) -> tuple[int, int, str]:
    """(exit status, how often the point has failed, what drive said)."""
    library = Path(sysconfig.get_path("platlib")) / "vswapd" / "libvswap.so"
    command = [str(drive / "drive"), "--lib", str(library), "--limit", str(4 << 20), "--check-every", "50"]
    if point.spill:
        command += ["--pool", str(1 << 20), "--spill", f"{tmp_path / 'spill'}:{64 << 20}"]
    command += ["--encrypt"] if point.encrypt else []
    how = ":all" if point.persistent else ""
    command += ["--fail", f"{point.name}:{call}:{point.error}{how}", "--", str(drive / "boundary")]
    command += [str(_REST_MS)] if point.spill else []
    result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_MAX, check=False)
    hits = re.search(rf"{point.name} calls \d+ hits (\d+)", result.stderr)
    assert hits, f"{' '.join(command)}: status {result.returncode}: {result.stderr[-2000:]}"
    return result.returncode, int(hits[1]), result.stderr[-2000:]


@pytest.mark.parametrize("point", _POINTS, ids=str)
def test_fails_at_call_n(drive: Path, tmp_path: Path, point: Point) -> None:
    failed = 0
    for call in (call for call in _FIRST_CALLS if call >= point.first):
        status, hits, said = _run(drive, tmp_path, point, call)
        assert status in (_RIGHT, *point.ends), f"call {call}: status {status}: {said}"
        failed += hits > 0
        if hits == 0:
            assert status == _RIGHT, f"nothing failed, yet: status {status}: {said}"
            break
    assert failed > 0, "the point was never reached"
