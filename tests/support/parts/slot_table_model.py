# SPDX-License-Identifier: MIT
"""slot_table_model — what csrc/slot_table.h promises, in dicts.

Sharing is modelled too, cluster by cluster: which page is INDIRECT and which kept copy stays with whom
depends on it, and so do the counts and the moment at which a copy is freed. Where the table keeps its
clusters is its own affair: that an allocation failed is told to the model (`no_memory`), not predicted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support import header
from support.parts.slots import CLUSTER_PAGES, KEPT, STORED, Slot, Tag

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAP = header.defines("slot_heap.h")
_CHUNK_BYTES = _HEAP["SLOT_CHUNK_BYTES"]
_GRANULE_BYTES = _HEAP["SLOT_GRANULE_BYTES"]
_TABLE = header.defines("slot_table.c")
_SHARED_BYTES = 16
SPARE_BYTES = _HEAP["SLOT_SPARE_CHUNKS"] * _CHUNK_BYTES


def _cluster_bytes(slots: int) -> int:
    """Entries of 14 bytes by four; the first group holds two and the header."""
    return (slots + 2 + 3) // 4 * _GRANULE_BYTES


class ModelUnsureError(Exception):
    """Two things may have failed, and they leave different things behind."""


class ModelNoMemoryError(Exception):
    """What -ENOMEM is."""


@dataclass(eq=False)
class Shared:
    """A counted shared slot."""

    slot: Slot
    references: int
    index: int = 0  # the slot table's name of it, once seen


@dataclass(eq=False)
class Cluster:
    """64 pages of the maps that have it."""

    words: dict[int, Slot | Shared] = field(default_factory=dict)
    maps: int = 1
    was_shared: bool = False  # and no map looked into it since it was the only one


@dataclass
class Dropped:
    """What one operation let go of."""

    copies: list[Slot] = field(default_factory=list)
    staged: list[tuple[int, Slot]] = field(default_factory=list)


class SlotTableModel:
    """The maps of a space of `size_bytes`."""

    def __init__(self, size_bytes: int) -> None:
        # Half the space is for clusters, a quarter for shared slots, of which number 0 is none.
        quarter = size_bytes // 4 // (4 * _CHUNK_BYTES) * (4 * _CHUNK_BYTES)
        self.chunks = 2 * quarter // _CHUNK_BYTES
        self._shared_max = quarter // _SHARED_BYTES - 1
        self._shared = 0
        self.maps: dict[int, dict[int, Cluster]] = {}

    # ---- clusters ----

    def _copy(self, shared: Cluster, *, no_memory: bool) -> Cluster:
        copy = Cluster()
        stored = sum(isinstance(word, Slot) and word.tag in STORED for word in shared.words.values())
        if stored > self._shared_max - self._shared:
            if no_memory:
                raise ModelUnsureError
            raise AssertionError("there was no room for so many shared slots")
        if no_memory:
            raise ModelNoMemoryError
        for i in sorted(shared.words):
            word = shared.words[i]
            if isinstance(word, Slot) and word.tag in STORED:
                self._shared += 1
                word = shared.words[i] = Shared(word, shared.maps)
            if isinstance(word, Shared) or word.tag not in KEPT:
                copy.words[i] = word
        return copy

    def _own(self, number: int, cluster_number: int, *, no_memory: bool = False) -> Cluster | None:
        """The map's own cluster, as whoever wants to look into it needs it."""
        clusters = self.maps[number]
        cluster = clusters.get(cluster_number)
        if cluster is None:
            return None
        if cluster.maps == 1:
            cluster.was_shared = False
            return cluster
        clusters[cluster_number] = copy = self._copy(cluster, no_memory=no_memory)
        cluster.maps -= 1
        self._collect(number, cluster_number)
        return copy if copy.words else None

    def _collect(self, number: int, cluster_number: int) -> None:
        if not self.maps[number][cluster_number].words:
            del self.maps[number][cluster_number]

    def _drop(self, word: Slot | Shared, dropped: Dropped) -> None:
        if isinstance(word, Shared):
            word.references -= 1
            if word.references == 0:
                self._shared -= 1
                dropped.copies.append(word.slot)
        elif word.has_copy:
            dropped.copies.append(word)

    # ---- operations ----

    def get(self, number: int, page: int, *, no_memory: bool = False) -> Slot | Shared | None:
        """slot_get()."""
        cluster = self._own(number, page // CLUSTER_PAGES, no_memory=no_memory)
        return cluster.words.get(page % CLUSTER_PAGES) if cluster else None

    def set(self, number: int, page: int, word: Slot | Shared | None) -> None:
        """slot_set()."""
        cluster_number, i = divmod(page, CLUSTER_PAGES)
        cluster = self._own(number, cluster_number)
        if cluster is None:
            if word is None:
                return
            cluster = self.maps[number][cluster_number] = Cluster()
        cluster.words.pop(i, None)
        if word is not None:
            cluster.words[i] = word
        self._collect(number, cluster_number)

    def replace(self, number: int, page: int, slot: Slot, dropped: Dropped) -> None:
        """A new slot, and the old one let go."""
        old = self.get(number, page)
        self.set(number, page, None if slot.tag == Tag.NONE else slot)
        if old is not None:
            self._drop(old, dropped)

    def can_clear(self, number: int, start: int, end: int) -> bool:
        """False when shared slots may be short, which slot_map_clear() answers by ending the daemon."""
        cut = {page // CLUSTER_PAGES for page in (start, end) if page % CLUSTER_PAGES}
        copies = sum(1 for found in map(self.maps[number].get, cut) if found and found.maps > 1)
        return self._shared_max - self._shared >= copies * CLUSTER_PAGES

    def can_share_all(self, number: int) -> bool:
        """No get of any page of the map can run out of shared slots."""
        return self._shared_max - self._shared >= len(self.shared_pages(number))

    def clear(self, number: int, start: int, end: int, dropped: Dropped) -> None:
        """slot_map_clear()."""
        for cluster_number in sorted(self.maps[number]):
            first = max(start, cluster_number * CLUSTER_PAGES)
            last = min(end, (cluster_number + 1) * CLUSTER_PAGES)
            if first < last:
                self._clear_cluster(number, cluster_number, range(first, last), dropped)

    def _clear_cluster(self, number: int, cluster_number: int, pages: range, dropped: Dropped) -> None:
        cluster = self.maps[number][cluster_number]
        if len(pages) == CLUSTER_PAGES and cluster.maps > 1:
            for word in cluster.words.values():
                if isinstance(word, Shared):
                    self._drop(word, dropped)
            cluster.maps -= 1
            del self.maps[number][cluster_number]
            return
        own = self._own(number, cluster_number)
        if own is None:
            return
        for page in pages:
            old = own.words.pop(page % CLUSTER_PAGES, None)
            if isinstance(old, Slot) and old.tag == Tag.STAGED:
                dropped.staged.append((page, old))
            elif old is not None:
                self._drop(old, dropped)
        self._collect(number, cluster_number)

    def move(self, number: int, start: int, to: int, pages: int, dropped: Dropped) -> None:
        """slot_map_move()."""
        self.clear(number, to, to + pages, dropped)
        for i in range(pages):
            if (start + i) // CLUSTER_PAGES not in self.maps[number]:
                continue
            word = self.get(number, start + i)
            if word is None:
                continue
            self.set(number, to + i, word)
            self.set(number, start + i, None)
            if isinstance(word, Slot) and word.tag == Tag.STAGED:
                dropped.staged.append((to + i, word))

    def staged_pages(self, number: int) -> list[int]:
        """slot_map_share() asks for none."""
        return [page for page, word in self._words(number) if isinstance(word, Slot) and word.tag == Tag.STAGED]

    def share(self, parent: int, child: int) -> None:
        """slot_map_share()."""
        self.maps[child] = dict(self.maps[parent])
        for cluster in self.maps[parent].values():
            cluster.maps += 1
            cluster.was_shared = True
            for word in cluster.words.values():
                if isinstance(word, Shared):
                    word.references += 1

    # ---- what the slot table says of itself ----

    def pages(self, number: int) -> list[int]:
        """All that have a slot."""
        return sorted(page for page, _ in self._words(number))

    def shared_pages(self, number: int) -> list[int]:
        """Those that are counted as INDIRECT, whether they are already or become it when looked into."""
        return sorted(
            at * CLUSTER_PAGES + i
            for at, cluster in self.maps[number].items()
            for i, word in cluster.words.items()
            if self._counted_as(cluster, word) == Tag.INDIRECT
        )

    def _words(self, number: int) -> Iterator[tuple[int, Slot | Shared]]:
        for cluster_number, cluster in self.maps[number].items():
            for i, word in cluster.words.items():
                yield cluster_number * CLUSTER_PAGES + i, word

    @staticmethod
    def _counted_as(cluster: Cluster, word: Slot | Shared) -> Tag:
        if isinstance(word, Shared) or (cluster.was_shared and word.tag in STORED):
            return Tag.INDIRECT
        return word.tag

    def counts(self, number: int) -> Counter[Tag]:
        """Pages by tag."""
        clusters = self.maps[number].values()
        return Counter(self._counted_as(cluster, word) for cluster in clusters for word in cluster.words.values())

    def shared_spill_pages(self) -> int:
        """Pages that are counted as INDIRECT and are in a backend."""
        return sum(
            self._counted_as(cluster, word) == Tag.INDIRECT
            and (word.slot if isinstance(word, Shared) else word).tag == Tag.SPILL
            for clusters in self.maps.values()
            for cluster in clusters.values()
            for word in cluster.words.values()
        )

    def cluster_bytes(self, number: int) -> tuple[int, int]:
        """At least and at most, of the clusters of a map."""
        slots = [len(cluster.words) for cluster in self.maps[number].values()]
        slack = _TABLE["TRIM_SLACK"]
        return sum(map(_cluster_bytes, slots)), sum(_cluster_bytes(count + slack) for count in slots)

    def free_chunks(self, metadata_bytes: int) -> int:
        """At least so many, when the table says that it has so much memory."""
        return self.chunks - metadata_bytes // _CHUNK_BYTES
