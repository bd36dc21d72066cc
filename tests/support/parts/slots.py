# SPDX-License-Identifier: MIT
"""slots — a slot (csrc/slot_table.h) in Python."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from support import header

PAGES_MAX = 1 << 36  # twice the address space: pages of waiting remaps lie behind it
CLUSTER_PAGES = header.defines("limits.h")["CLUSTER_PAGES"]
CHECK_BITS = 58
LOCATION_BITS = 38
BACKENDS = 15


class Tag(IntEnum):
    """enum slot_tag."""

    NONE = 0
    ZERO = 1
    SAME = 2
    POOL = 3
    SPILL = 4
    STAGED = 5
    KEPT_POOL = 6
    KEPT_SPILL = 7
    INDIRECT = 8
    POISONED = 9


_HEADERS_TAGS = header.enumerators("slot_table.h", "slot_tag")
assert {f"SLOT_{tag.name}": int(tag) for tag in Tag} == {
    name: value for name, value in _HEADERS_TAGS.items() if name != "SLOT_TAG_COUNT"
}

STORED = frozenset({Tag.POOL, Tag.SPILL})
KEPT = frozenset({Tag.KEPT_POOL, Tag.KEPT_SPILL})


class Slot(NamedTuple):
    """struct slot."""

    tag: Tag
    units: int = 0
    backend: int = 0
    location: int = 0
    check: int = 0

    @property
    def has_copy(self) -> bool:
        """It names an object of the pool or an extent."""
        return self.tag in STORED or self.tag in KEPT


NO_SLOT = Slot(Tag.NONE)
