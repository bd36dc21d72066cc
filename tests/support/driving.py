# SPDX-License-Identifier: MIT
"""driving — build `drive` (drive.c): the data plane without Python, with fault and crash points."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent.parent.parent / "csrc"
_CLIENT_LIBRARY = ("agent", "preload")  # what its files begin with
_FLAGS = ["-std=gnu11", "-O2", "-g", "-DVSWAP_DEBUG", "-DVSWAP_FAULT_POINTS"]
_LIBRARIES = ["-llz4", "-lzstd", "-luring", "-lm", "-pthread"]


def build_drive(program: Path, sources: Path = SOURCES) -> str:
    """Path of a `drive` made of the data plane in `sources`."""
    files = [str(path) for path in sorted(sources.glob("*.c")) if not path.name.startswith(_CLIENT_LIBRARY)]
    drive = str(Path(__file__).parent / "drive.c")
    subprocess.run(["cc", *_FLAGS, f"-I{sources}", "-o", str(program), drive, *files, *_LIBRARIES], check=True)
    return str(program)
