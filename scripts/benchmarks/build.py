# SPDX-License-Identifier: MIT
"""build — the programs that are measured: what each is made of, and their compilation."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from benchmarks.execute import ExecuteError

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent
_CSRC = _ROOT / "csrc"
_FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-iquote", str(_CSRC)]
_LIBRARIES = ["-llz4", "-lzstd", "-lm", "-lpthread"]

# name: files of this directory; files of the data plane
_OWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "workloads": (("workloads", "access", "pageout", "content", "latency", "pattern"), ()),
    "held": (("held", "content", "latency", "pattern"), ()),
    "scaling": (("scaling", "access", "content", "latency", "pattern"), ()),
    "slots": (("slots",), ("slot_table", "slot_heap", "base", "crash_point", "fault_point", "sys")),
    "floor": (("floor", "content", "latency"), ("codec", "base", "fault_point")),
}
SOURCES = {
    name: [*(_HERE / f"{file}.c" for file in own), *(_CSRC / f"{file}.c" for file in data_plane)]
    for name, (own, data_plane) in _OWN.items()
} | {"verify_memory": [_ROOT / "tests" / "support" / "verify_memory.c"]}


def build(directory: str, name: str) -> str:
    """Path of one of SOURCES, compiled into `directory`. ExecuteError."""
    program = os.path.join(directory, name)
    command = ["cc", *_FLAGS, "-o", program, *map(str, SOURCES[name]), *_LIBRARIES]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise ExecuteError(f"cannot compile {name}: {done.stderr.strip()[-500:]}")
    return program
