# SPDX-License-Identifier: MIT
"""The slot table beside its model: every slot, every count, and every copy freed once and in time."""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.parts.slot_table_model import (
    SPARE_BYTES,
    Dropped,
    ModelNoMemoryError,
    ModelUnsureError,
    Shared,
    SlotTableModel,
)
from support.parts.slots import (
    BACKENDS,
    CHECK_BITS,
    CLUSTER_PAGES,
    LOCATION_BITS,
    NO_SLOT,
    PAGES_MAX,
    STORED,
    Slot,
    Tag,
)

if TYPE_CHECKING:
    from support.parts.check import ModelCheck
    from support.parts.remote import RemotePart
    from support.parts.slot_table import Events

_MAPS_MAX = 5
# The smallest space runs out of memory for clusters, which have 8 chunks, and indexes; the other does not.
_SPACE_BYTES = (512 << 10, 32 << 20)
_TAGS = [tag for tag in Tag if tag != Tag.INDIRECT]

_MAP = st.integers(0, _MAPS_MAX - 1)
# Few clusters, so that operations meet; at the ends of what a page number can be.
_NEAR = st.integers(0, 6 * CLUSTER_PAGES - 1)
_PAGE = _NEAR | _NEAR.map(lambda page: PAGES_MAX - 1 - page) | st.integers(0, PAGES_MAX - 1)
_COUNT = st.integers(1, 200) | st.sampled_from([CLUSTER_PAGES, 4 * CLUSTER_PAGES])


@dataclass(frozen=True)
class Run:
    """Pages at equal distances."""

    page: int
    count: int
    stride: int = 1

    def pages(self) -> list[int]:
        return [(self.page + i * self.stride) % PAGES_MAX for i in range(self.count)]


_RUN = (
    st.builds(Run, _PAGE, _COUNT, st.sampled_from([1, 1, 3]))
    | st.builds(Run, _NEAR, _COUNT, st.just(1))
    | st.builds(Run, _PAGE, st.integers(1, 100), st.sampled_from([CLUSTER_PAGES, CLUSTER_PAGES + 1, 1 << 20]))
    | st.builds(Run, _NEAR, st.integers(1, 300), st.sampled_from([2, 4, 10]))
    | st.sampled_from([Run(0, 4096), Run(0, 1000, CLUSTER_PAGES)])
)
_SOME_TAGS = st.lists(st.sampled_from(_TAGS), min_size=1, max_size=3) | st.sampled_from([[Tag.POOL], [Tag.SPILL]])


class SlotTableMachine(RuleBasedStateMachine):
    """Up to _MAPS_MAX related or unrelated maps in one space."""

    def __init__(self, table: RemotePart) -> None:
        super().__init__()
        self._table = table
        self._copies = 0  # ever made; the location of the last one
        self._maps_made = 0

    @initialize(
        size_bytes=st.sampled_from(_SPACE_BYTES),
        fills=st.lists(st.tuples(_RUN, _SOME_TAGS), max_size=3),
        shares=st.integers(0, _MAPS_MAX - 1),
    )
    def open(self, size_bytes: int, fills: list[tuple[Run, list[Tag]]], shares: int) -> None:
        self._table.open("slot_table", size_bytes)
        self._is_small = size_bytes == _SPACE_BYTES[0]
        self._model = SlotTableModel(size_bytes)
        self.make()
        for run, tags in fills:
            self.replace_many(0, run, tags)
        for parent in range(shares):
            self.share(parent)

    def teardown(self) -> None:
        if sys.exception() is not None or not self._maps_made:
            self._table.stop()
            return
        for number in list(self._model.maps):
            self._end(number)
        self.state_agrees()
        assert self._table.state().metadata_bytes <= SPARE_BYTES
        self._table.finish()

    # ---- helpers ----

    def _map(self, draw: int) -> int:
        numbers = sorted(self._model.maps)
        return numbers[draw % len(numbers)]

    def _new_map(self) -> int:
        self._maps_made += 1
        self._model.maps[self._maps_made] = {}
        return self._maps_made

    def _new_slot(self, tag: Tag, number: int) -> Slot:
        """A slot with all bits that a slot of its kind can have, from a drawn number."""
        mixed = number * 0x9E3779B97F4A7C15
        match tag:
            case Tag.SAME:
                return Slot(tag, check=mixed % (1 << 64))
            case Tag.STAGED:
                return Slot(tag, location=mixed % (1 << LOCATION_BITS))
            case Tag.NONE | Tag.ZERO | Tag.POISONED:
                return Slot(tag)
        self._copies += 1  # from both ends of the range, and never the same twice
        location = self._copies if number % 2 else (1 << LOCATION_BITS) - self._copies
        backend = mixed % BACKENDS if tag in {Tag.SPILL, Tag.KEPT_SPILL} else 0
        return Slot(tag, mixed // 64 % 64 + 1, backend, location, mixed % (1 << CHECK_BITS))

    @staticmethod
    def _agree(events: Events, dropped: Dropped) -> None:
        assert sorted(events.freed) == sorted(dropped.copies)
        assert sorted(events.staged) == sorted(dropped.staged)

    def _end(self, number: int) -> None:
        dropped = Dropped()
        self._model.clear(number, 0, PAGES_MAX, dropped)
        del self._model.maps[number]
        is_empty, events = self._table.end(number)
        assert is_empty
        self._agree(events, dropped)

    # ---- rules ----

    # Most maps come from sharing, and live long enough to have something to share.

    @precondition(lambda self: len(self._model.maps) < 2)
    @rule()
    def make(self) -> None:
        self._table.make(self._new_map())

    @precondition(lambda self: len(self._model.maps) < _MAPS_MAX)
    @rule(draw=_MAP)
    def share(self, draw: int) -> None:
        parent = self._map(draw)
        # A fork waits for what is on its way out.
        staged = self._model.staged_pages(parent)
        self._replace(parent, staged, [self._new_slot(Tag.POOL, page) for page in staged])
        child = self._new_map()
        result = self._table.share(parent, child)
        if result == 0:
            self._model.share(parent, child)
        else:
            assert result == -errno.ENOMEM
            self._assert_short()
            del self._model.maps[child]

    @rule()
    def reopen(self) -> None:
        """The daemon dies and another one takes over."""
        self._table.reopen()

    @precondition(lambda self: len(self._model.maps) > 2)
    @rule(draw=_MAP)
    def end(self, draw: int) -> None:
        self._end(self._map(draw))

    @rule(draw=_MAP, page=_PAGE, tag=st.sampled_from(_TAGS), number=st.integers(0, 1 << 64))
    def replace(self, draw: int, page: int, tag: Tag, number: int) -> None:
        self._replace(self._map(draw), [page], [self._new_slot(tag, number)])

    @rule(draw=_MAP, run=_RUN, tags=_SOME_TAGS)
    def replace_many(self, draw: int, run: Run, tags: list[Tag]) -> None:
        slots = [self._new_slot(tags[i % len(tags)], i) for i in range(run.count)]
        self._replace(self._map(draw), run.pages(), slots)

    def _replace(self, number: int, pages: list[int], slots: list[Slot]) -> None:
        dropped = Dropped()
        done, failed_in_get, events = self._table.replace(number, pages, slots)
        for page, slot in zip(pages[:done], slots[:done], strict=True):
            self._model.replace(number, page, slot, dropped)
        if done < len(pages):
            self._assert_short()
            self._get_model(number, pages[done], no_memory=failed_in_get)
        self._agree(events, dropped)

    def _get_model(self, number: int, page: int, *, no_memory: bool) -> Slot | Shared | None:
        try:
            return self._model.get(number, page, no_memory=no_memory)
        except ModelNoMemoryError:
            assert no_memory
            return None
        except ModelUnsureError:
            self._table.stop()
            reject()

    def _assert_short(self) -> None:
        """Only a space that is in use has no memory."""
        assert self._is_small
        assert self._model.free_chunks(self._table.state().metadata_bytes) <= self._model.chunks // 2

    @rule(draw=_MAP, run=_RUN)
    def get(self, draw: int, run: Run) -> None:
        self._get(self._map(draw), run.pages())

    @rule(draw=_MAP)
    def get_all(self, draw: int) -> None:
        number = self._map(draw)
        self._get(number, self._model.pages(number))

    def _get(self, number: int, pages: list[int]) -> bool:
        found = self._table.get(number, pages)
        expected = [self._get_model(number, page, no_memory=False) for page in pages[: len(found)]]
        if len(found) < len(pages):
            self._assert_short()
            self._get_model(number, pages[len(found)], no_memory=True)
        for word, (slot, behind) in zip(expected, found, strict=True):
            if isinstance(word, Shared):
                assert slot.tag == Tag.INDIRECT
                assert slot.location == (word.index or slot.location)
                word.index = slot.location
                assert behind == word.slot
            else:
                assert slot == (word or NO_SLOT)
        return len(found) == len(pages)

    @rule(draw=_MAP, page=_PAGE, count=_COUNT | st.just(PAGES_MAX))
    def clear(self, draw: int, page: int, count: int) -> None:
        self._clear(self._map(draw), page, min(page + count, PAGES_MAX))

    def _clear(self, number: int, start: int, end: int) -> None:
        if not (self._model.can_clear(number, start, end) and self._has_room(2)):
            return
        dropped = Dropped()
        self._model.clear(number, start, end, dropped)
        self._agree(self._table.clear(number, start, end), dropped)

    @rule(draw=_MAP, start=_PAGE, to=_PAGE, count=_COUNT)
    def move(self, draw: int, start: int, to: int, count: int) -> None:
        count = min(count, PAGES_MAX - start, PAGES_MAX - to, abs(to - start))
        number = self._map(draw)
        # Each size of cluster may need a chunk of its own, and each cluster passes through all sizes.
        if count == 0 or not self._model.can_share_all(number) or not self._has_room(40 + count // 8):
            return
        dropped = Dropped()
        self._model.move(number, start, to, count, dropped)
        result, events = self._table.move(number, start, to, count)
        assert result == 0
        self._agree(events, dropped)

    def _has_room(self, chunks: int) -> bool:
        return self._model.free_chunks(self._table.state().metadata_bytes) >= chunks

    @rule(draw=_MAP, pick=st.integers(0, 4095), tag=st.sampled_from(sorted(STORED)), number=st.integers(0, 1 << 64))
    def migrate(self, draw: int, pick: int, tag: Tag, number: int) -> None:
        """The same content elsewhere, for all that share it; only from where it really is."""
        own = self._map(draw)
        pages = self._model.shared_pages(own)
        if not pages:
            return
        page = pages[pick % len(pages)]
        if not self._get(own, [page]):
            return
        word = self._model.get(own, page)
        if isinstance(word, Shared):
            before = word.slot
            after = self._new_slot(tag, number)._replace(units=before.units, check=before.check)
            assert not self._table.migrate(word.index, after, before)
            assert self._table.migrate(word.index, before, after)
            word.slot = after

    @invariant()
    def state_agrees(self) -> None:
        if not self._maps_made:
            return
        state = self._table.state()
        assert set(state.maps) == set(self._model.maps)
        for number, of in state.maps.items():
            clusters, counts = self._model.maps[number], self._model.counts(number)
            assert of.is_valid
            assert of.counts == [counts[tag] for tag in Tag]
            assert of.cluster_count == len(clusters)
            assert sorted(of.first_pages) == [cluster * CLUSTER_PAGES for cluster in sorted(clusters)]
            least, most = self._model.cluster_bytes(number)
            assert least <= of.cluster_bytes
            assert of.cluster_bytes <= most or self._is_small  # where there may be no memory to shrink
        assert state.is_valid
        assert state.shared_spill_pages == self._model.shared_spill_pages()


def test_slot_table_is_its_model(check_model: ModelCheck) -> None:
    check_model(SlotTableMachine)
