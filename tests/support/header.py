# SPDX-License-Identifier: MIT
"""header — what csrc/*.h say, read as text: Python's copies of their numbers are compared with it."""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


def text(name: str) -> str:
    """A header without its comments."""
    return _COMMENT.sub(" ", (CSRC / name).read_text(encoding="utf-8"))


def defines(name: str) -> dict[str, int]:
    """Its integer macros."""
    found = re.findall(r"^#define (\w+) (0x[0-9a-fA-F]+|[0-9]+)[uUlL]*\s*$", text(name), re.MULTILINE)
    return {macro: int(value, 0) for macro, value in found}


def enumerators(name: str, enum: str) -> dict[str, int]:
    """An enum's members with their values."""
    match = re.search(rf"enum {enum} \{{(.*?)\}}", text(name), re.DOTALL)
    assert match, f"no enum {enum} in {name}"
    members: dict[str, int] = {}
    value = 0
    for part in match[1].split(","):
        member, _, number = part.strip().partition("=")
        if member:
            value = int(number, 0) if number.strip() else value
            members[member.strip()] = value
            value += 1
    return members


def field_names(name: str, struct: str) -> list[str]:
    """The fields of a struct in order (structs without macros inside)."""
    match = re.search(rf"struct {struct} \{{(.*?)\n\}};", text(name), re.DOTALL)
    assert match, f"no struct {struct} in {name}"
    names = []
    for declaration in match[1].split(";"):
        words = declaration.split(None, 2 if declaration.strip().startswith("struct") else 1)
        if words:
            names += [re.sub(r"\[.*", "", part).strip() for part in words[-1].split(",")]
    return names


def asserted_sizes(name: str) -> dict[str, int]:
    """struct -> size, out of its _Static_assert(sizeof(struct …) == …)."""
    found = re.findall(r"_Static_assert\(sizeof\(struct (\w+)\) == (\d+)", text(name))
    return {struct: int(size) for struct, size in found}
