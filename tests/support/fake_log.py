# SPDX-License-Identifier: MIT
"""fake_log — a Log that remembers."""

from __future__ import annotations

from typing import Any


class FakeLog:
    """`lines`: (level, event, fields)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def debug(self, event: str, **fields: Any) -> None:
        self.lines.append(("debug", event, fields))

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(("info", event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(("warning", event, fields))

    def error(self, event: str, **fields: Any) -> None:
        self.lines.append(("error", event, fields))

    def worst(self) -> list[str]:
        """Warnings and errors."""
        return [event for level, event, _ in self.lines if level in ("warning", "error")]
