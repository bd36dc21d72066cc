# SPDX-License-Identifier: MIT
"""driving — build `drive` (drive.c) and its like: the data plane without Python, with fault and crash points."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent.parent.parent / "csrc"
_CLIENT_LIBRARY = ("agent", "preload")  # what its files begin with
_FLAGS = ["-std=gnu11", "-O2", "-g", "-DVSWAP_DEBUG", "-DVSWAP_FAULT_POINTS"]
LIBRARIES = ["-llz4", "-lzstd", "-luring", "-lcrypto", "-lm", "-pthread"]


def build_drive(program: Path, sources: Path = SOURCES, name: str = "drive") -> str:
    """Path of a `drive`, or another program of that kind, made of the data plane in `sources`."""
    files = [str(path) for path in sorted(sources.glob("*.c")) if not path.name.startswith(_CLIENT_LIBRARY)]
    main = str(Path(__file__).parent / f"{name}.c")
    subprocess.run(["cc", *_FLAGS, f"-I{sources}", "-o", str(program), main, *files, *LIBRARIES], check=True)
    return str(program)
