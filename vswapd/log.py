# SPDX-License-Identifier: MIT
"""log — where the daemon's log lines go.

The system daemon logs with structlog on stderr. An embedded one writes plain lines, warnings and
worse only, as stderr is the command's own; it does not import structlog, which would cost 100 ms and
several MiB in every run.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

LEVELS = ("debug", "info", "warning", "error")


class Log(Protocol):
    """What modules of the daemon log to: an event in plain words and its fields."""

    def debug(self, event: str, **fields: Any) -> Any: ...
    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...


class PlainLog:
    """`vswapctl: event (key value, key value)`, from `level` on."""

    def __init__(self, level: str = "warning", prefix: str = "vswapctl: ") -> None:
        self._rank = LEVELS.index(level)
        self._prefix = prefix

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if LEVELS.index(level) < self._rank:
            return
        text = ", ".join(f"{key} {value}" for key, value in fields.items())
        line = f"{self._prefix}{event}{f' ({text})' if text else ''}\n"
        try:
            sys.stderr.write(line)
            sys.stderr.flush()
        except OSError:
            pass  # nobody reads: that must not end the daemon

    def debug(self, event: str, **fields: Any) -> None:
        self._write("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write("error", event, fields)


def make_daemon_log(level: str) -> Log:
    """The log of the system daemon: on a terminal for people, else key=value (journald adds the time)."""
    import logging

    import structlog

    terminal = sys.stderr.isatty()
    renderer: Any = (
        structlog.dev.ConsoleRenderer()
        if terminal
        else structlog.processors.LogfmtRenderer(key_order=["level", "event"])
    )
    processors: list[Any] = [structlog.processors.add_log_level]
    if terminal:
        processors.append(structlog.processors.TimeStamper(fmt="%H:%M:%S"))
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    log: Log = structlog.get_logger()
    return log
