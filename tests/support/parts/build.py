# SPDX-License-Identifier: MIT
"""build — the parts of the data plane that work alone, as a shared library that cffi can load.

Slot table, pool and spill need no client and no userfaultfd. They are compiled with their own checks
(VSWAP_DEBUG), fault points and UBSan, which needs nothing of the process that loads them. What they
declare is read from their headers, so nothing is declared twice.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support.header import CSRC

if TYPE_CHECKING:
    from pathlib import Path

_SOURCES = ("base", "crash_point", "fault_point", "sys", "slot_heap", "slot_table", "codec", "pool", "io", "io_threads", "seal", "spill")
_HEADERS = ("limits", "fault_point", "slot_table", "codec", "pool", "io", "spill")
_SYSTEM_HEADERS = ("assert", "pthread", "stdbool", "stddef", "stdint")
_LIBRARIES = ("-llz4", "-lzstd", "-luring", "-lxxhash", "-lcrypto", "-pthread")
_OPTIONS = ("-std=gnu11", "-O1", "-g", "-Wall", "-Werror", "-fPIC", "-shared", "-DVSWAP_DEBUG", "-DVSWAP_FAULT_POINTS")
_SANITIZER = ("-fsanitize=undefined", "-fno-sanitize-recover=all")

_INLINE_FUNCTION = re.compile(r"^static inline .*?^\}$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class PartsLibrary:
    """Paths of the library, and of its declarations as cffi reads them."""

    library: str
    declarations: str


def _declarations(directory: Path) -> str:
    """The headers as the preprocessor leaves them, without the system's and without function bodies."""
    empty = directory / "system"
    empty.mkdir()
    for name in _SYSTEM_HEADERS:
        (empty / f"{name}.h").touch()
    # cffi knows the standard types; what asserts is for the compiler.
    command = ["cc", "-E", "-P", "-nostdinc", "-I", str(empty), "-iquote", str(CSRC)]
    command += ["-DVSWAP_FAULT_POINTS", "-Dstatic_assert(...)=", "-x", "c", "-"]
    includes = "".join(f'#include "{name}.h"\n' for name in _HEADERS)
    text = subprocess.run(command, input=includes, check=True, stdout=subprocess.PIPE, text=True).stdout
    return _INLINE_FUNCTION.sub("", text)


def build(directory: Path) -> PartsLibrary:
    """Compile into `directory`."""
    library, declarations = directory / "parts.so", directory / "parts.h"
    sources = [str(CSRC / f"{name}.c") for name in _SOURCES]
    command = ["cc", *_OPTIONS, *_SANITIZER, "-o", str(library), *sources, *_LIBRARIES]
    subprocess.run(command, check=True)
    declarations.write_text(_declarations(directory), encoding="utf-8")
    return PartsLibrary(str(library), str(declarations))
