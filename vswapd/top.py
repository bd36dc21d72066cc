# SPDX-License-Identifier: MIT
"""top — the screen of `vswapctl top`.

Two threads: textual's, and one that talks to the daemon, so that a slow daemon never stops the keys. What is
shown is view.py's; here is only how.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual.app import App
from textual.containers import Vertical
from textual.screen import ModalScreen, Screen
from textual.widgets import DataTable, Footer, Input, Label, Static
from textual.worker import get_current_worker

from vswapd import view
from vswapd.failure import Failure
from vswapd.sizes import format_size, parse_size

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

    from vswapd.connection import Connection
    from vswapd.view import Column, Document

_BAR_WIDTH = 30


class LimitScreen(ModalScreen[int | None]):
    """Asks for a new limit; None: the user thought better of it."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "Cancel")]
    CSS = """
    LimitScreen { align: center middle; }
    LimitScreen > Vertical { width: 60; height: auto; border: round $accent; padding: 0 1; }
    """

    def __init__(self, group: str, limit_bytes: int) -> None:
        super().__init__()
        self._group = group
        self._limit_bytes = limit_bytes

    def compose(self) -> ComposeResult:
        """Of textual."""
        with Vertical():
            yield Label(f"New limit of {self._group} (now {format_size(self._limit_bytes)}):", markup=False)
            yield Input(placeholder="for example 1.5G")
            yield Label("", id="mistake", markup=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter."""
        try:
            self.dismiss(parse_size(event.value))
        except ValueError as error:
            self.query_one("#mistake", Label).update(str(error))


class RecordTable(DataTable[str]):
    """Records in sortable rows; the cursor stays on its record."""

    def __init__(self, columns: tuple[Column, ...], name_key: str, sorted_by: str, **options: Any) -> None:
        super().__init__(cursor_type="row", **options)
        self._record_columns = columns
        self._name_key = name_key
        self._sorted_by = next(index for index, column in enumerate(columns) if column.key == sorted_by)
        self._is_reversed = False
        self._records: list[dict[str, Any]] = []

    def sort_by_next(self) -> None:
        """The next column."""
        self._sorted_by = (self._sorted_by + 1) % len(self._record_columns)
        self._is_reversed = False
        self.show(self._records)

    def reverse(self) -> None:
        """The other way round."""
        self._is_reversed = not self._is_reversed
        self.show(self._records)

    def selected(self) -> dict[str, Any] | None:
        """The record under the cursor."""
        return self._records[self.cursor_row] if 0 <= self.cursor_row < len(self._records) else None

    def show(self, records: list[dict[str, Any]]) -> None:
        """These instead of those before."""
        chosen = self.selected()
        column = self._record_columns[self._sorted_by]
        self._records = view.sort_entries(records, column, is_reversed=self._is_reversed)
        self.clear(columns=True)
        for index, item in enumerate(self._record_columns):
            mark = (" ▲" if column.is_number == self._is_reversed else " ▼") if index == self._sorted_by else ""
            self.add_column(Text(item.title + mark, justify="right" if item.is_number else "left"))
        for record in self._records:
            self.add_row(
                *(
                    Text(item.write(record[item.key]), justify="right" if item.is_number else "left")  # type: ignore[arg-type]
                    for item in self._record_columns
                )
            )
        names = [record[self._name_key] for record in self._records]
        if chosen is not None and chosen[self._name_key] in names:
            self.move_cursor(row=names.index(chosen[self._name_key]))


_PARTS = "#summary, #tiers, #latency, #groups, #clients, #backends, #message"  # of the main screen


class TopApp(App[str | None]):
    """The whole screen. Returns why it ended when that was not the user's wish."""

    ENABLE_COMMAND_PALETTE = False
    TITLE = "vswapctl top"
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "Quit"),
        ("s", "sort", "Sort by next column"),
        ("r", "reverse", "Reverse"),
        ("l", "limit", "Change limit"),
    ]
    CSS = """
    #summary, #tiers, #latency { height: auto; padding: 0 1; }
    #figures { height: auto; }
    RecordTable { height: auto; max-height: 12; margin: 1 0 0 0; }
    #message { height: 1; padding: 0 1; color: $warning; }
    """

    def __init__(self, daemon: Connection, interval_seconds: float) -> None:
        super().__init__()
        self._daemon = daemon
        self._talking = threading.Lock()  # one request at a time
        self._interval_seconds = interval_seconds
        self._before: Document | None = None
        self._before_at = 0.0
        self._limits: dict[str, int] = {}

    def compose(self) -> ComposeResult:
        """Of textual."""
        yield Static(id="summary", markup=False)
        yield Static(id="tiers", markup=False)
        yield Static(id="latency", markup=False)
        yield RecordTable(view.GROUP_COLUMNS, "name", "usage_bytes", id="groups")
        yield RecordTable(view.CLIENT_COLUMNS, "pid", "resident_bytes", id="clients")
        yield RecordTable(view.BACKEND_COLUMNS, "path", "priority", id="backends")
        yield Static(id="message", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Of textual."""
        self._main.query_one("#groups").focus()
        self.run_worker(self._watch, thread=True)

    @property
    def _main(self) -> Screen[Any]:
        """The screen below a question that is being asked: it goes on meanwhile."""
        return self.screen_stack[0]

    # ---- the daemon ----

    def _watch(self) -> None:
        """In a thread of its own: ask again and again until the screen is closed."""
        worker = get_current_worker()
        while not worker.is_cancelled:
            started = time.monotonic()
            try:
                document = self._request("status")["status"]
            except Failure as error:
                if not worker.is_cancelled:
                    self.call_from_thread(self.exit, str(error))
                return
            if worker.is_cancelled:
                return
            self.call_from_thread(self._show, document, time.monotonic())
            while time.monotonic() < started + self._interval_seconds and not worker.is_cancelled:
                time.sleep(min(0.05, self._interval_seconds))

    def _request(self, op: str, **fields: Any) -> dict[str, Any]:
        with self._talking:
            return self._daemon.request(op, **fields)

    def _set_limit(self, group: str, limit_bytes: int) -> None:
        """In a thread of its own."""
        try:
            self._request("limit", group=group, limit_bytes=limit_bytes)
            text = f"limit of {group} is {format_size(limit_bytes)} now"
        except Failure as error:
            text = str(error)
        self.call_from_thread(self._say, text)

    # ---- what is shown ----

    def _is_closing(self) -> bool:
        """A thread may have asked for something to be shown just before the end, when parts are missing already."""
        return len(self._main.query(_PARTS)) < _PARTS.count("#")

    def _say(self, text: str) -> None:
        if self._is_closing():
            return
        self._main.query_one("#message", Static).update(text)

    def _show(self, document: Document, now: float) -> None:
        if self._is_closing():
            return
        seconds = now - self._before_at if self._before else 0.0
        shown = view.with_rates(document, self._before, seconds)
        self._limits = {group["name"]: group["limit_bytes"] for group in shown["groups"]}
        self._main.query_one("#summary", Static).update(f"vswapd {shown['version']}: {view.summary(shown)}")
        self._main.query_one("#tiers", Static).update("\n".join(self._tier_lines(shown)))
        self._main.query_one("#latency", Static).update("\n".join(self._latency_lines(document, seconds)))
        for name in ("groups", "clients", "backends"):
            table = self._main.query_one(f"#{name}", RecordTable)
            table.show(shown[name])
            table.display = bool(shown[name]) or name != "backends"
        self._before, self._before_at = document, now

    @staticmethod
    def _tier_lines(document: Document) -> list[str]:
        rows = view.tiers(document)
        total = sum(count for _, count, _ in rows)
        return [
            f"{name:9} {view.bar(count, total, _BAR_WIDTH)} {format_size(count):>10}"
            + (f" in {format_size(cost)}" if name in ("pool", "spill") and count else "")
            for name, count, cost in rows
        ]

    def _latency_lines(self, document: Document, seconds: float) -> list[str]:
        lines = [f"{'faults':9} {'a second':>10} {'mean µs':>10} {'p99 µs, since start':>20}"]
        for backing, rate, mean, p99 in view.latencies(document, self._before, seconds):
            lines.append(f"{backing:9} {rate:10.0f} {mean:10.1f} {p99:20.1f}")
        return lines

    # ---- keys ----

    def _table(self) -> RecordTable:
        focused = self.focused
        return focused if isinstance(focused, RecordTable) else self._main.query_one("#groups", RecordTable)

    def action_sort(self) -> None:
        """Key s."""
        self._table().sort_by_next()

    def action_reverse(self) -> None:
        """Key r."""
        self._table().reverse()

    def action_limit(self) -> None:
        """Key l: of the chosen group, or of the group of the chosen process."""
        record = self._table().selected()
        group = (record or {}).get("group") if "pid" in (record or {}) else (record or {}).get("name")
        if group not in self._limits:
            self._say("choose a group or a process first: Tab and the arrow keys")
            return
        name = str(group)

        def finish(limit_bytes: int | None) -> None:
            if limit_bytes is not None:
                self.run_worker(lambda: self._set_limit(name, limit_bytes), thread=True)

        self.push_screen(LimitScreen(name, self._limits[name]), finish)
