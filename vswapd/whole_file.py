# SPDX-License-Identifier: MIT
"""whole_file — a file with new content, whole or not at all."""

from __future__ import annotations

import contextlib
import os


def write(path: str, text: str, mode: int | None = None) -> None:
    """Replace or make it. `mode`: its permissions, or as the umask has it. OSError: what was there still is."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
