# SPDX-License-Identifier: MIT
"""reload — the configuration of a running daemon: groups of the file, and what SIGHUP changes.

Applied at once: limits and owners of groups, groups that came or went, the log level, tiers, the host's
reserve, backends that came. All else takes a restart, and a line of the log says so. Only what differs from the
file as it was read last is applied: a limit set by `vswapctl limit` meanwhile stays, unless the file's changed
too. A file with a mistake changes nothing.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from typing import TYPE_CHECKING

import trio

from vswapd import backends, machine, notify
from vswapd.failure import Failure
from vswapd.groups import GroupError
from vswapd.records import GROUP_NO_RECOMPRESS, GROUP_NO_SPILL
from vswapd.settings import SettingsError
from vswapd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from vswapd.engine import Engine
    from vswapd.groups import GroupRegistry
    from vswapd.log import Log
    from vswapd.settings import BackendSettings, GroupSettings, Settings

_SWITCHES = ("log_level", "tiers", "host_reserve")  # of [daemon], at once
_RESTART = "restart vswapd once its clients have ended"


class Reloader:
    """Applies settings to a running daemon."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings],
        engine: Engine,
        groups: GroupRegistry,
        log: Log,
        set_log_level: Callable[[str], object],
    ) -> None:
        """`load` reads the files again, with what the command line says on top."""
        self._settings = settings
        self._load = load
        self._engine = engine
        self._groups = groups
        self._log = log
        self._set_log_level = set_log_level
        self._made: set[str] = set()  # groups that are the file's
        self._set_switches()
        if engine.is_successor:
            self._adopt()
        else:
            for group in settings.groups:
                self._add_group(group)

    def _adopt(self) -> None:
        """After the death of a daemon: its groups are there, with the limits they had, and what it last read is
        what stands in the files now, unless that is a mistake."""
        try:
            self._settings = self._load()
        except SettingsError as error:
            self._log.error("configuration as at the start", mistakes=str(error))
        self._set_log_level(self._settings.daemon.log_level)
        self._set_switches()
        for wanted in self._settings.groups:
            found = self._groups.find(wanted.name)
            if found is None:
                self._add_group(wanted)
            elif not found.root_pid:
                self._made.add(wanted.name)

    def _set_switches(self) -> None:
        daemon = self._settings.daemon
        self._engine.set_host_reserve(daemon.host_reserve, machine.memory_cgroups())
        self._engine.set_tiering(daemon.tiers)

    async def run(self) -> None:
        """Reload on each SIGHUP, for ever."""
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            async for _ in signals:
                notify.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
                self.reload()
                notify.notify("READY=1")

    def reload(self) -> None:
        """Read the files and apply what differs. Raises nothing for what stands in them."""
        try:
            new = self._load()
        except SettingsError as error:
            for mistake in error.mistakes:
                self._log.error("configuration not reloaded", mistake=str(mistake))
            return
        old, self._settings = self._settings, new
        if new.daemon.log_level != old.daemon.log_level:
            self._set_log_level(new.daemon.log_level)
        self._set_switches()
        for item in dataclasses.fields(new.daemon):
            if item.name not in _SWITCHES and getattr(new.daemon, item.name) != getattr(old.daemon, item.name):
                self._needs_restart(item.name)
        self._reload_backends(old.backends, new.backends)
        self._reload_groups(old.groups, new.groups)
        self._log.info("configuration reloaded")

    def _needs_restart(self, what: str) -> None:
        self._log.warning("a change of the configuration waits", key=what, remedy=_RESTART)

    # ---- backends ----

    def _reload_backends(self, old: tuple[BackendSettings, ...], new: tuple[BackendSettings, ...]) -> None:
        before = {backend.path: backend for backend in old}
        for backend in new:
            known = before.pop(backend.path, None)
            if known is None:
                self._add_backend(backend)
            elif known == dataclasses.replace(backend, priority=known.priority, rate=known.rate):
                self._change_backend(backend, known)
            else:
                self._needs_restart(f"backend {backend.path}")
        for path in before:
            self._needs_restart(f"backend {path}")

    def _add_backend(self, backend: BackendSettings) -> None:
        try:
            spill = backends.open_spill(
                backend.path, backend.size, 0, backend.priority, encrypt=backend.encrypt, rate_bytes=backend.rate
            )
            try:
                spill.add_to(self._engine)
            except BaseException:
                spill.undo()
                raise
        except (Failure, OSError) as error:
            self._log.error("backend not added", path=backend.path, reason=str(error))
        else:
            self._log.info("backend added", path=backend.path, size=format_size(spill.size_bytes))

    def _change_backend(self, backend: BackendSettings, before: BackendSettings) -> None:
        if backend == before:
            return
        for record in self._engine.backends():
            if record.path != backend.path:
                continue
            if backend.priority != before.priority:
                self._engine.backend_set_priority(record.backend, backend.priority)
                self._log.info("priority changed", path=backend.path, priority=backend.priority)
            if backend.rate != before.rate:
                self._engine.backend_set_rate(record.backend, backend.rate)
                rate = f"{format_size(backend.rate)}/s" if backend.rate else "no limit"
                self._log.info("rate changed", path=backend.path, rate=rate)

    # ---- groups ----

    def _reload_groups(self, old: tuple[GroupSettings, ...], new: tuple[GroupSettings, ...]) -> None:
        before = {group.name: group for group in old}
        for group in new:
            known = before.pop(group.name, None)
            if known is None or group.name not in self._made:
                self._add_group(group)
            elif known != group:
                self._change_group(group)
        for name in before.keys() & self._made:
            self._made.discard(name)
            group_or_none = self._groups.find(name)
            if group_or_none is not None:
                self._groups.doom(group_or_none)
                self._log.info("group ends with its last process", group=name)

    def _add_group(self, wanted: GroupSettings) -> None:
        found = self._groups.find(wanted.name)
        if found is not None and found.root_pid:
            self._log.error(
                "group not made", group=wanted.name, reason="the name is taken by a running command"
            )
            return
        if found is not None:  # doomed by an earlier reload, but not empty yet
            self._made.add(wanted.name)
            self._change_group(wanted)
            return
        try:
            self._groups.create(
                wanted.name,
                wanted.owner,
                wanted.limit,
                pool_limit_bytes=wanted.pool,
                spill_limit_bytes=wanted.spill,
                no_spill=not wanted.writeback,
                no_recompress=not wanted.recompress,
            )
        except (GroupError, OSError) as error:
            self._log.error("group not made", group=wanted.name, reason=str(error))
            return
        self._made.add(wanted.name)

    def _change_group(self, wanted: GroupSettings) -> None:
        group = self._groups.find(wanted.name)
        if group is None:
            self._add_group(wanted)
            return
        self._groups.keep(group, wanted.owner)
        try:
            self._engine.group_set_limit(group.number, wanted.limit, wanted.pool)
            self._engine.group_set_spill_limit(group.number, wanted.spill)
            on = GROUP_NO_SPILL * (not wanted.writeback) | GROUP_NO_RECOMPRESS * (not wanted.recompress)
            self._engine.group_set_flags(group.number, on, (GROUP_NO_SPILL | GROUP_NO_RECOMPRESS) & ~on)
        except OSError as error:
            self._log.error("limit not changed", group=wanted.name, reason=str(error))
        else:
            self._log.info("group changed", group=wanted.name, limit=format_size(wanted.limit))
