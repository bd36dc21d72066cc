# SPDX-License-Identifier: MIT
"""serve — the process that a RemotePart talks to: python -m support.parts.serve LIBRARY DECLARATIONS FD"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cffi import FFI

from support.parts.pool import Pool
from support.parts.slot_table import SlotTable
from support.parts.spill import Spill

_KINDS = {"slot_table": SlotTable, "pool": Pool, "spill": Spill}


def main(arguments: list[str]) -> int:
    """Entry point."""
    library, declarations, fd = arguments
    ffi = FFI()
    ffi.cdef(Path(declarations).read_text(encoding="utf-8"))
    functions = ffi.dlopen(library)
    connection: Connection[Any, Any] = Connection(int(fd))
    part: Any = None
    while True:
        try:
            name, values = connection.recv()
        except (EOFError, ConnectionError):
            return 0
        if name == "open":
            part = _KINDS[values[0]](ffi, functions, *values[1:])
            connection.send(None)
        else:
            connection.send(getattr(part, name)(*values))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
