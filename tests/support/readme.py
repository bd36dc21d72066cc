# SPDX-License-Identifier: MIT
"""readme — the commands that a Markdown file shows, and the output it shows for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = re.compile(r"^```(console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_QUANTITY = re.compile(r"\d+(?:[.,]\d+)*(?:\s?(?:[KMGT]i?B?|B|bytes|ns|us|µs|ms|s|%))?\b%?")


@dataclass(frozen=True)
class Example:
    """A command, and the lines below it."""

    command: str
    output: tuple[str, ...] = ()


def _of_block(language: str, text: str) -> Iterator[Example]:
    if language == "sh":  # commands only
        yield from (Example(line) for line in text.splitlines() if line and not line.startswith("#"))
        return
    before, *examples = re.split(r"^\$ ", text, flags=re.MULTILINE)
    if before:
        raise ValueError(f"a console block begins with output: {before!r}")
    for example in examples:
        command, *output = example.splitlines()
        yield Example(command, tuple(line for line in output if line))


def examples_of(text: str) -> list[Example]:
    """All of a file's, in order."""
    return [example for match in _BLOCK.finditer(text) for example in _of_block(match[1], match[2])]


def shape_of(text: str) -> str:
    """An output without what differs from run to run: numbers with their units, and the room they take."""
    return re.sub(r"\s+", " ", _QUANTITY.sub("0", text)).strip()
