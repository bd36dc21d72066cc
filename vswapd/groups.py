# SPDX-License-Identifier: MIT
"""groups — who shares which budget.

A group is made by a control request and belongs to the user who made it. Its *members* are the
processes below its root process, clients or not; `vswapctl run` is that root (a subreaper, so that
orphans stay below it) and excludes itself and an embedded daemon. A *doomed* group takes nobody
new and is destroyed as soon as its last client has ended.

All methods run in trio's thread.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from vswapd import config, processes, wire
from vswapd.records import GROUP_LABEL_BYTES, GROUP_NO_RECOMPRESS, GROUP_NO_SPILL, GROUP_REGIONS, GROUP_TORTURE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vswapd.accept import Peer
    from vswapd.engine import Engine
    from vswapd.log import Log
    from vswapd.records import GroupStatistics


class GroupError(Exception):
    """A group cannot be made or used as asked; the text is for the user."""


@dataclass
class Group:
    """One budget. `root_pid` 0: no process tree, members are its clients only."""

    name: str
    number: int
    owner_uid: int
    root_pid: int = 0
    excluded: frozenset[int] = frozenset()
    doomed: bool = False
    session_fd: int = -1  # the connection that it ends with

    def admits(self, peer: Peer) -> bool:
        """Whether `peer` may come into it: its owner, root, or a member that changed its user."""
        if self.doomed:
            return False
        return peer.uid in (0, self.owner_uid) or self.has_member(peer.pid)

    def label(self) -> str:
        """What a successor needs to know that the engine does not. Of the excluded, as many as there is room for."""
        known: dict[str, Any] = {
            "owner": self.owner_uid,
            "root": self.root_pid,
            "doomed": self.doomed,
            "excluded": sorted(self.excluded),
        }
        while len(label := json.dumps(known, separators=(",", ":"))) >= GROUP_LABEL_BYTES:
            known["excluded"] = known["excluded"][:-1]  # rather the root's own, which are older
        return label

    @classmethod
    def from_record(cls, record: GroupStatistics) -> Group:
        """A group of the daemon before. One that was not labelled yet is nobody's, and doomed."""
        known: dict[str, Any] = json.loads(record.label) if record.label else {}
        return cls(
            record.name,
            record.group,
            int(known.get("owner", 0)),
            int(known.get("root", 0)),
            frozenset(known.get("excluded", ())),
            doomed=bool(known.get("doomed", True)),
            session_fd=record.session_fd,
        )

    def has_member(self, pid: int) -> bool:
        """Whether `pid` is the root process or below it."""
        return self.root_pid != 0 and (pid == self.root_pid or processes.descends(pid, self.root_pid))


class GroupRegistry:
    """All groups of the daemon, by name."""

    def __init__(self, engine: Engine, log: Log) -> None:
        self._engine = engine
        self._log = log
        self._groups: dict[str, Group] = {}
        self._changed = trio.lowlevel.ParkingLot()
        for record in engine.groups():  # of the daemon before
            group = Group.from_record(record)
            self._groups[group.name] = group
            self._set_members(group)

    def __iter__(self) -> Iterator[Group]:
        return iter(tuple(self._groups.values()))

    def find(self, name: str) -> Group | None:
        """The group of that name, doomed or not."""
        return self._groups.get(name)

    def by_number(self, number: int) -> Group | None:
        """The group with that number in the engine."""
        return next((group for group in self._groups.values() if group.number == number), None)

    def create(
        self,
        name: str,
        owner_uid: int,
        limit_bytes: int,
        *,
        pool_limit_bytes: int = 0,
        spill_limit_bytes: int = 0,
        torture: bool = False,
        no_spill: bool = False,
        no_recompress: bool = False,
        regions: bool = False,
        root_pid: int = 0,
        excluded: frozenset[int] = frozenset(),
        session_fd: int = -1,
    ) -> Group:
        """Make a group; `name` gets a number behind it when it is taken. GroupError; OSError."""
        owned = sum(group.owner_uid == owner_uid for group in self._groups.values())
        if owner_uid != 0 and owned >= config.GROUPS_PER_UID_MAX:
            raise GroupError(f"user {owner_uid} has {owned} groups already; end some of them first")
        flags = GROUP_TORTURE * torture | GROUP_NO_SPILL * no_spill | GROUP_REGIONS * regions
        flags |= GROUP_NO_RECOMPRESS * no_recompress
        for attempt in range(1, config.GROUPS_PER_UID_MAX):
            unique = name if attempt == 1 else f"{name}.{attempt}"
            if not wire.is_group_name(unique):
                raise GroupError(
                    f"{unique!r} cannot be the name of a group; use letters, digits, '.', '_', '-'"
                )
            if unique in self._groups:
                continue
            number = self._engine.group_create(unique, limit_bytes, pool_limit_bytes, flags)
            if spill_limit_bytes:
                self._engine.group_set_spill_limit(number, spill_limit_bytes)
            group = Group(unique, number, owner_uid, root_pid, excluded, session_fd=session_fd)
            self._engine.group_label(number, group.label(), session_fd)
            self._set_members(group)
            self._groups[unique] = group
            return group
        raise GroupError(f"the name {name} is taken; choose another")

    def exclude(self, pid: int) -> None:
        """A process was detached: it, and what is below it, no group is charged for."""
        for group in self:
            if not group.has_member(pid):
                continue
            # Without those that have ended: a number may be another's one day.
            excluded = frozenset(filter(processes.exists, group.excluded))
            if any(processes.descends(pid, other) for other in excluded):
                continue
            group.excluded = excluded | {pid}
            self._set_members(group)
            self._engine.group_label(group.number, group.label(), group.session_fd)

    def _set_members(self, group: Group) -> None:
        if group.root_pid:
            self._engine.group_set_members(group.number, group.root_pid, group.excluded)

    def statistics(self, group: Group) -> GroupStatistics | None:
        """What the engine says about the group now."""
        records = self._engine.groups()
        return next((record for record in records if record.group == group.number), None)

    def set_session(self, session_fd: int) -> None:
        """All groups belong to this connection."""
        for group in self:
            group.session_fd = session_fd
            self._engine.group_label(group.number, group.label(), session_fd)

    def keep(self, group: Group, owner_uid: int) -> None:
        """It stands, doomed or not so far, and is this user's."""
        group.doomed = False
        group.owner_uid = owner_uid
        self._engine.group_label(group.number, group.label(), group.session_fd)

    def doom(self, group: Group) -> None:
        """Destroy the group now, or when its last client has ended."""
        group.doomed = True
        group.session_fd = -1
        self._engine.group_label(group.number, group.label(), -1)
        self.note_change()

    def note_change(self) -> None:
        """A client came or went: wake the waiting, destroy doomed groups that are empty."""
        self._destroy_doomed()
        self._changed.unpark_all()

    def _destroy_doomed(self) -> None:
        for group in self:
            if group.doomed:
                self._destroy_if_empty(group)

    def _destroy_if_empty(self, group: Group) -> None:
        try:
            self._engine.group_destroy(group.number)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return
            self._log.error("group not destroyed", group=group.name, error=str(error))
        del self._groups[group.name]

    async def wait_change(self, seconds_max: float) -> None:
        """Until a client of any group came or went, at most `seconds_max`."""
        with trio.move_on_after(seconds_max):
            await self._changed.park()

    async def wait_empty(self, group: Group, seconds_max: float) -> int:
        """Until the group has no clients or the time is up; returns how many it has."""
        deadline = trio.current_time() + seconds_max
        while True:
            record = self.statistics(group)
            count = record.client_count if record else 0
            remaining = deadline - trio.current_time()
            if count == 0 or remaining <= 0:
                return count
            # Not every end of a client is announced at the very instant: look again now and then.
            await self.wait_change(min(remaining, 0.1))

    async def watch_doomed(self) -> None:
        """For ever: destroy those that nobody has any more, but something was still at work on."""
        while True:
            while not any(group.doomed for group in self):
                await self._changed.park()
            await trio.sleep(config.DOOMED_SECONDS)
            self._destroy_doomed()
