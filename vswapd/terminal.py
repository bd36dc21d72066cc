# SPDX-License-Identifier: MIT
"""terminal — colours, for people only: on a terminal, unless NO_COLOR (https://no-color.org) or TERM=dumb."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

GREEN, YELLOW, RED = 32, 33, 31


def has_colours(stream: TextIO) -> bool:
    """Whether colours may be written to `stream`."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: int, stream: TextIO) -> str:
    """`text` in a colour, where `stream` shows one."""
    return f"\033[{colour}m{text}\033[0m" if has_colours(stream) else text
