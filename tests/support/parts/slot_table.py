# SPDX-License-Identifier: MIT
"""slot_table — csrc/slot_table.h, called as the rest of the data plane calls it."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from support.parts.slots import PAGES_MAX, Slot, Tag

if TYPE_CHECKING:
    from collections.abc import Sequence


class Events(NamedTuple):
    """What the callbacks of one call were told."""

    freed: list[Slot]  # copies that no slot names any more
    staged: list[tuple[int, Slot]]


class MapState(NamedTuple):
    """What a map says of itself."""

    is_valid: bool
    counts: list[int]
    cluster_count: int
    cluster_bytes: int
    first_pages: list[int]  # of its clusters


class SpaceState(NamedTuple):
    """What the space and all its maps say."""

    maps: dict[int, MapState]
    is_valid: bool
    metadata_bytes: int
    shared_spill_pages: int


class SlotTable:
    """A space with maps, which are numbered by the caller."""

    def __init__(self, ffi: Any, functions: Any, size_bytes: int) -> None:
        self._ffi, self._c = ffi, functions
        self._memfd = os.memfd_create("slots")
        os.ftruncate(self._memfd, size_bytes)
        self._memory = mmap.mmap(self._memfd, size_bytes)
        self._base = ffi.from_buffer(self._memory)
        self._space = self._make(functions.slot_space_create)
        self._maps: dict[int, Any] = {}
        self._events = Events([], [])
        self._free = ffi.callback("slot_free_fn", self._freed)
        self._visit = ffi.callback("slot_visit_fn", self._staged)

    def _make(self, how: Any) -> Any:
        space = self._ffi.new("struct slot_space **")
        result = how(self._memfd, 0, self._base, len(self._memory), space)
        assert result == 0, result
        return space[0]

    def reopen(self) -> None:
        """A successor has the memory and the maps, and believes no count."""
        self._c.slot_space_destroy(self._space)
        self._space = self._make(self._c.slot_space_open)
        for of in self._maps.values():
            of.cluster_count = of.cluster_bytes = of.index_used = 1 << 40
            of.counts = [1 << 40] * len(of.counts)
            result = self._c.slot_space_adopt(self._space, self._ffi.addressof(of[0]))
            assert result == 0, result
        result = self._c.slot_space_ready(self._space)
        assert result == 0, result

    def finish(self) -> None:
        """The end of the space."""
        self._c.slot_space_destroy(self._space)
        self._ffi.release(self._base)
        self._memory.close()
        os.close(self._memfd)

    # ---- slots in and out ----

    def _freed(self, _: Any, slot: Any) -> None:
        self._events.freed.append(self._decode(slot))

    def _staged(self, _: Any, page: int, slot: Any) -> None:
        self._events.staged.append((page, self._decode(slot)))

    def _take_events(self) -> Events:
        events, self._events = self._events, Events([], [])
        return events

    @staticmethod
    def _decode(slot: Any) -> Slot:
        return Slot(Tag(slot.tag), slot.units, slot.backend, slot.location, slot.check)

    def _encode(self, slot: Slot) -> Any:
        return self._ffi.new("struct slot *", tuple(slot))[0]

    # ---- maps ----

    def make(self, number: int) -> None:
        """A new empty map."""
        self._maps[number] = self._ffi.new("struct slot_map *")

    def share(self, parent: int, child: int) -> int:
        """slot_map_share() to a new map, which is there when it succeeds."""
        self.make(child)
        result = int(self._c.slot_map_share(self._space, self._maps[parent], self._maps[child]))
        if result != 0:
            del self._maps[child]
        return result

    def end(self, number: int) -> tuple[bool, Events]:
        """What the exit of a client does; True when nothing is left in the map."""
        cleared = self._maps.pop(number)
        self._c.slot_map_clear(self._space, cleared, 0, PAGES_MAX, self._visit, self._free, self._ffi.NULL)
        left = cleared.root or cleared.cluster_count or cleared.cluster_bytes or any(cleared.counts)
        return not left, self._take_events()

    # ---- pages ----

    def get(self, number: int, pages: Sequence[int]) -> list[tuple[Slot, Slot]]:
        """(slot, slot behind it when it is INDIRECT) of each page. Short when a get failed."""
        found = []
        slot = self._ffi.new("struct slot *")
        for page in pages:
            result = self._c.slot_get(self._space, self._maps[number], page, slot)
            if result != 0:
                assert result == -errno.ENOMEM, result
                break
            behind = slot[0]
            if slot.tag == Tag.INDIRECT:
                behind = self._c.slot_shared_get(self._space, slot.location)
            found.append((self._decode(slot), self._decode(behind)))
        return found

    def replace(self, number: int, pages: Sequence[int], slots: Sequence[Slot]) -> tuple[int, bool, Events]:
        """Give each page a new slot, and let go of what it had. How many; fewer when one failed: in the get?"""
        old = self._ffi.new("struct slot *")
        for done, (page, slot) in enumerate(zip(pages, slots, strict=True)):
            got = result = self._c.slot_get(self._space, self._maps[number], page, old)
            if result == 0:
                result = self._c.slot_set(self._space, self._maps[number], page, self._encode(slot))
            if result != 0:
                assert result == -errno.ENOMEM, result
                return done, got != 0, self._take_events()
            before = self._decode(old)
            if before.tag == Tag.INDIRECT:
                self._c.slot_shared_put(self._space, before.location, self._free, self._ffi.NULL)
            elif before.has_copy:
                self._events.freed.append(before)
        return len(pages), False, self._take_events()

    def clear(self, number: int, start: int, end: int) -> Events:
        """slot_map_detach(), slot_map_clear() and slot_clusters_free()."""
        of, clusters = self._maps[number], self._ffi.new("uint32_t *")
        self._c.slot_map_detach(self._space, of, start, end, clusters)
        self._c.slot_map_clear(self._space, of, start, end, self._visit, self._free, self._ffi.NULL)
        while clusters[0]:
            clusters[0] = self._c.slot_clusters_free(self._space, clusters[0], 1, self._free, self._ffi.NULL)
        return self._take_events()

    def move(self, number: int, start: int, to: int, pages: int) -> tuple[int, Events]:
        """slot_map_move(), to where nothing is left."""
        of = self._maps[number]
        self._c.slot_map_clear(self._space, of, to, to + pages, self._visit, self._free, self._ffi.NULL)
        result = self._c.slot_map_move(self._space, of, start, to, pages, self._visit, self._ffi.NULL)
        return int(result), self._take_events()

    def migrate(self, index: int, before: Slot, after: Slot) -> bool:
        """slot_shared_migrate()."""
        slots = self._encode(before), self._encode(after)
        return bool(self._c.slot_shared_migrate(self._space, index, *slots))

    # ---- state ----

    def _first_pages(self, of: Any) -> list[int]:
        found = []
        cursor, first_page = self._ffi.new("uint64_t *"), self._ffi.new("uint64_t *")
        while self._c.slot_map_next(self._space, of, cursor, first_page):
            found.append(int(first_page[0]))
        return found

    def _map_state(self, of: Any) -> MapState:
        is_valid = bool(self._c.slot_map_is_valid(self._space, of))
        return MapState(is_valid, list(of.counts), of.cluster_count, of.cluster_bytes, self._first_pages(of))

    def state(self) -> SpaceState:
        """Everything that can be seen without changing it."""
        return SpaceState(
            {number: self._map_state(of) for number, of in self._maps.items()},
            bool(self._c.slot_space_is_valid(self._space)),
            self._c.slot_space_metadata_bytes(self._space),
            self._c.slot_space_shared_spill_pages(self._space),
        )
