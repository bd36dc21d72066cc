# SPDX-License-Identifier: MIT
"""operations — what control requests do: one op_… method each, named as the request's "op".

A request is a dict somebody sent: every value is checked by a take_… function. Root and the daemon's own
user may do everything; others see and change what is their own. Sizes are in bytes.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import trio

from vswapd import __version__, config, machine, processes
from vswapd.backend_jobs import BackendJobs
from vswapd.document import build_status
from vswapd.failure import Failure
from vswapd.records import GROUP_NO_RECOMPRESS, GROUP_NO_SPILL
from vswapd.request import Reply, Request, RequestError, take_bool, take_int, take_text
from vswapd.sizes import format_size
from vswapd.supervisor import UPGRADE_SIGNAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from vswapd.accept import Peer
    from vswapd.clients import ClientServer
    from vswapd.engine import Engine
    from vswapd.groups import Group, GroupRegistry
    from vswapd.log import Log
    from vswapd.records import ClientStatistics

_WORKERS_MAX = 8
_PID_MAX = 1 << 22  # of any Linux
_ADDRESS_MAX = 1 << 56


def _take_policy(request: Request) -> dict[str, Any]:
    """What a request wants of a group: those of limit_bytes, pool_limit_bytes, spill_limit_bytes that it names, and
    flags: those to set and those to clear. RequestError."""
    policy: dict[str, Any] = {}
    bounds = {
        "limit_bytes": (config.LIMIT_BYTES_MIN, config.LIMIT_BYTES_MAX),
        "pool_limit_bytes": (0, config.LIMIT_BYTES_MAX),
        "spill_limit_bytes": (0, 1 << 62),
    }
    for name, (low, high) in bounds.items():
        if name in request:
            policy[name] = take_int(request, name, low, high)
    if 0 < policy.get("spill_limit_bytes", 0) < config.SPILL_BYTES_MIN:
        text = f"{format_size(policy['spill_limit_bytes'])} on backends is too little"
        raise RequestError("bad-request", text, "give at least 1M, or 0 for no limit")
    on = off = 0
    for name, flag in (("writeback", GROUP_NO_SPILL), ("recompress", GROUP_NO_RECOMPRESS)):
        if name in request and take_bool(request, name):
            off |= flag
        elif name in request:
            on |= flag
    if not policy and not on | off:
        raise RequestError("bad-request", "'limit_bytes' is missing, and there is nothing else to change", "name it")
    return policy | {"flags": (on, off)}


class Caller:
    """Who asks, and what that has to do with groups."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.groups: list[Group] = []  # that it made
        self.joined: set[str] = set()  # names of others that it wants to hear of

    @property
    def descriptor(self) -> int:
        """Of the connection that what it makes ends with; -1: of none."""
        return -1

    async def tell(self, line: dict[str, Any]) -> None:
        """How far a long request is. OSError, TooSlowError when it does not listen any more."""


class Operations:
    """All requests, over one engine."""

    def __init__(
        self,
        engine: Engine,
        groups: GroupRegistry,
        clients: ClientServer,
        log: Log,
        supervisor_pid: int = 0,
    ) -> None:
        """`supervisor_pid`: the process that starts another daemon when this one dies, 0: none."""
        self._engine = engine
        self._groups = groups
        self._clients = clients
        self._log = log
        # Apart: page operations may take minutes, and status must answer meanwhile.
        self._workers = trio.CapacityLimiter(_WORKERS_MAX)
        self._page_workers = trio.CapacityLimiter(_WORKERS_MAX)
        self._jobs = BackendJobs(engine, log)
        self._own_uid = os.geteuid()
        # GIL and validity tests only where whoever started the daemon asked for them.
        self._test_operations = os.environ.get("VSWAPD_TEST_OPERATIONS") == "1"
        self.supervisor_pid = supervisor_pid
        self.can_upgrade = False
        self.footprint_pids = [os.getpid(), *filter(None, [supervisor_pid])]  # their own memory: daemon_bytes
        # Never members of a group, nor what is below them.
        self.excluded_pids = frozenset({supervisor_pid or os.getpid()})
        self.drain_events: Callable[[], None] = lambda: None

    async def answer(self, request: Request, session: Caller) -> Reply:
        """Carry out a request. RequestError, GroupError, OSError."""
        name = str(request.get("op", ""))
        operation = getattr(self, f"op_{name.replace('-', '_')}", None) if "_" not in name else None
        if operation is None:
            raise RequestError("bad-request", f"unknown operation '{name[:40]}'", "update vswapctl or vswapd")
        result: Reply = await operation(request, session)
        return result

    # ---- what a peer may do ----

    def _is_admin(self, peer: Peer) -> bool:
        return peer.uid in (0, self._own_uid)

    def client_uid(self, record: ClientStatistics) -> int | None:
        """Who a client connected as; None: a forked child that has not yet."""
        client = self._clients.by_token(record.token)
        return client.uid if client else None

    def _client_for(self, pid: int, peer: Peer) -> ClientStatistics:
        """The client `pid` that `peer` may act on. RequestError."""
        record = next((record for record in self._engine.clients() if record.pid == pid), None)
        uid = processes.uid(pid)
        if uid is None:
            raise RequestError("no-process", f"no process {pid}", "give the PID of a running process")
        owner = uid if record is None else self.client_uid(record)
        if not self._is_admin(peer) and owner != peer.uid:
            raise RequestError(
                "denied", f"process {pid} is not yours", "run vswapctl as root or as its owner"
            )
        if record is None:
            raise RequestError(
                "not-managed",
                f"process {pid} is not managed",
                "start it with vswapctl run; small processes are not managed",
            )
        return record

    def _group_named(self, request: Request, session: Caller) -> Group:
        name = take_text(request, "group")
        group = self._groups.find(name)
        if group is None or not (self._is_admin(session.peer) or group.owner_uid == session.peer.uid):
            raise RequestError("no-group", f"no group '{name[:40]}' of yours", "see vswapctl status")
        return group

    # ---- operations ----

    async def op_upgrade(self, request: Request, session: Caller) -> Reply:
        """Have the version that is installed now take over (takeover.py)."""
        if not self._is_admin(session.peer):
            raise RequestError("denied", "only root may upgrade the daemon", "run vswapctl as root")
        if not self.can_upgrade:
            raise RequestError("refused", "a private daemon lives as long as its command", "end the command")
        os.kill(self.supervisor_pid, UPGRADE_SIGNAL)
        return {"supervisor": self.supervisor_pid}

    async def op_ping(self, request: Request, session: Caller) -> Reply:
        """Version and PID of the daemon."""
        return {"version": __version__, "pid": os.getpid(), "supervisor": self.supervisor_pid}

    async def op_status(self, request: Request, session: Caller) -> Reply:
        """document.py's document, without what other users own."""
        self.drain_events()
        admin, uid = self._is_admin(session.peer), session.peer.uid
        visible = {group.name for group in self._groups if admin or group.owner_uid == uid}
        # Looked up here: the tables belong to this thread.
        owners = {record.token: self.client_uid(record) for record in self._engine.clients()}
        document = await trio.to_thread.run_sync(
            lambda: build_status(
                self._engine,
                pids=self.footprint_pids,
                uid_of=lambda record: owners.get(record.token),
                may_see_client=lambda owner: admin or owner == uid,
                may_see_group=lambda name: admin or name in visible,
            ),
            limiter=self._workers,
        )
        return {"status": document}

    async def op_group_create(self, request: Request, session: Caller) -> Reply:
        """Takes name (default run-PID), limit_bytes, pool_limit_bytes, torture, no_spill, no_recompress.

        The peer is the root of the group's process tree, and this connection its session.
        """
        if self._clients.is_stopping:
            raise RequestError("stopping", "the daemon is stopping", "try again when it runs")
        limit = take_int(request, "limit_bytes", config.LIMIT_BYTES_MIN, config.LIMIT_BYTES_MAX)
        group = self._groups.create(
            take_text(request, "name") or f"run-{session.peer.pid}",
            session.peer.uid,
            limit,
            pool_limit_bytes=take_int(request, "pool_limit_bytes", 0, config.LIMIT_BYTES_MAX, 0),
            torture=take_bool(request, "torture"),
            no_spill=take_bool(request, "no_spill"),
            no_recompress=take_bool(request, "no_recompress"),
            root_pid=session.peer.pid,
            excluded=self.excluded_pids,
            session_fd=session.descriptor,
        )
        session.groups.append(group)
        self._log.info("group created", group=group.name, limit=format_size(limit), uid=session.peer.uid)
        return {"group": group.name}

    async def op_group_join(self, request: Request, session: Caller) -> Reply:
        """Takes group: be told what happens to it. Answers its limit."""
        group = self._group_named(request, session)
        record = self._groups.statistics(group)
        if group.doomed or record is None:
            raise RequestError("no-group", f"group '{group.name}' is ending", "see vswapctl status")
        session.joined.add(group.name)
        return {"group": group.name, "limit_bytes": record.limit_bytes}

    async def op_group_wait(self, request: Request, session: Caller) -> Reply:
        """Takes group, timeout_ms: wait until it has no clients. Answers how many it has, and who."""
        group = self._group_named(request, session)
        seconds = take_int(request, "timeout_ms", 0, config.PAGE_TIMEOUT_MS_MAX) / 1000
        count = await self._groups.wait_empty(group, seconds)
        self.drain_events()
        pids = [record.pid for record in self._engine.clients() if record.group == group.number]
        return {"clients": count, "pids": pids}

    async def op_limit(self, request: Request, session: Caller) -> Reply:
        """Takes group, or pid: of a process in it; limit_bytes, pool_limit_bytes, spill_limit_bytes (0: none),
        writeback, recompress: what of them is given is changed. Answers all of them."""
        group = self._group_named(request, session) if "group" in request else None
        policy = _take_policy(request)
        if group is None:
            group = self._group_of(take_int(request, "pid", 1, _PID_MAX), session.peer)
        record = self._groups.statistics(group)
        if record is None:
            raise RequestError("no-group", f"group '{group.name}' is ending", "see vswapctl status")
        limit = policy.get("limit_bytes", record.limit_bytes)
        pool_limit = policy.get("pool_limit_bytes", record.pool_limit_bytes)
        if policy.get("pool_limit_bytes", 0) >= limit:
            text = f"a pool of {format_size(pool_limit)} is not less than the limit of {format_size(limit)}"
            raise RequestError("bad-request", text, "make it a part of the limit, or 0 to adapt")
        self._engine.group_set_limit(group.number, limit, pool_limit)
        spill_limit = policy.get("spill_limit_bytes", record.spill_limit_bytes)
        self._engine.group_set_spill_limit(group.number, spill_limit)
        on, off = policy["flags"]
        self._engine.group_set_flags(group.number, on, off)
        return {
            "group": group.name,
            "limit_bytes": limit,
            "pool_limit_bytes": pool_limit,
            "spill_limit_bytes": spill_limit,
            "writeback": not (record.flags & ~off | on) & GROUP_NO_SPILL,
            "recompress": not (record.flags & ~off | on) & GROUP_NO_RECOMPRESS,
        }

    def _group_of(self, pid: int, peer: Peer) -> Group:
        """The group that `pid` is a client or an unmanaged member of."""
        for group in self._groups:
            may_change = self._is_admin(peer) or group.owner_uid == peer.uid
            if may_change and group.has_member(pid):
                return group
        record = self._client_for(pid, peer)
        group_or_none = self._groups.by_number(record.group)
        if group_or_none is None:
            raise RequestError("no-group", f"process {pid} has no group any more", "see vswapctl status")
        return group_or_none

    async def op_pageout(self, request: Request, session: Caller) -> Reply:
        """Takes pid, timeout_ms: evict all that can be evicted of a process."""
        return await self._page(request, session, self._engine.pageout)

    async def op_cool(self, request: Request, session: Caller) -> Reply:
        """Takes pid, start, bytes: evict what can be of a range of a process. A hint: of one not managed, nothing."""
        start = take_int(request, "start", 0, _ADDRESS_MAX)
        count = take_int(request, "bytes", 0, _ADDRESS_MAX)
        try:
            return await self._page(request, session, lambda pid, _: self._engine.cool(pid, start, count))
        except RequestError as error:
            if error.code != "not-managed":
                raise
            return {"resident_bytes": 0, "swapped_bytes": 0}

    async def op_pagein(self, request: Request, session: Caller) -> Reply:
        """Takes pid, timeout_ms: bring everything back."""
        return await self._page(request, session, self._engine.pagein)

    async def op_detach(self, request: Request, session: Caller) -> Reply:
        """Takes pid, timeout_ms: bring everything back, whatever the limit, and let the process go."""
        pid = take_int(request, "pid", 1, _PID_MAX)
        wanted = self._client_for(pid, session.peer).swapped_pages * config.PAGE_BYTES
        available = machine.available_bytes()
        if wanted > available:
            raise RequestError(
                "no-room",
                f"process {pid} has {format_size(wanted)} swapped, {format_size(available)} of RAM are available",
                "make room first: end something, or lower the limits of others",
            )
        reply = await self._page(request, session, self._engine.detach)
        self._groups.exclude(pid)
        self._log.info("detached", pid=pid)
        return reply

    async def _page(self, request: Request, session: Caller, call: Callable[[int, int], None]) -> Reply:
        pid = take_int(request, "pid", 1, _PID_MAX)
        longest_ms = config.PAGE_TIMEOUT_MS_MAX if self._is_admin(session.peer) else config.PAGE_TIMEOUT_MS
        timeout_ms = take_int(request, "timeout_ms", 0, longest_ms, config.PAGE_TIMEOUT_MS)
        self._client_for(pid, session.peer)
        try:
            await trio.to_thread.run_sync(call, pid, timeout_ms, limiter=self._page_workers)
        except OSError as error:
            raise self._page_error(pid, timeout_ms, error) from error
        record = next((record for record in self._engine.clients() if record.pid == pid), None)
        swapped = record.swapped_pages * config.PAGE_BYTES if record else 0
        return {"resident_bytes": record.resident_bytes if record else 0, "swapped_bytes": swapped}

    @staticmethod
    def _page_error(pid: int, timeout_ms: int, error: OSError) -> RequestError:
        if error.errno == errno.ESRCH:
            return RequestError("no-process", f"process {pid} ended meanwhile", "nothing is left to do")
        if error.errno == errno.ETIMEDOUT:
            text = f"process {pid}: not finished after {timeout_ms / 1000:g} s"
            return RequestError("timeout", text, "ask again: what was done stays done")
        if error.errno in (errno.EPIPE, errno.ENOSYS):
            text = f"process {pid} has no agent that could let it go"
            return RequestError("no-agent", text, "it is served until it ends")
        if error.errno == errno.ENOMEM:
            text = f"process {pid}: more than its limit has room for"
            return RequestError("no-room", text, "raise its limit first: vswapctl limit PID SIZE")
        return RequestError("failed", str(error.strerror or error), "see the daemon's log")

    # ---- backends ----

    def _require_admin(self, session: Caller) -> None:
        if not self._is_admin(session.peer):
            raise RequestError("denied", "only root may change backends", "run vswapctl as root")

    async def op_swapon(self, request: Request, session: Caller) -> Reply:
        """Takes path, size_bytes, priority, rate_bytes, discard, encrypt: a backend more. Answers size and priority."""
        self._require_admin(session)
        priority = request.get("priority")
        if priority is not None:
            priority = take_int(request, "priority", -config.PRIORITY_MAX - 1, config.PRIORITY_MAX)
        try:
            return await self._jobs.add(
                take_text(request, "path"),
                take_int(request, "size_bytes", 0, 1 << 62, 0),
                priority,
                rate_bytes=take_int(request, "rate_bytes", 0, 1 << 62, 0),
                discard=take_bool(request, "discard"),
                encrypt=take_bool(request, "encrypt"),
            )
        except Failure as error:
            raise RequestError("refused", error.text, error.remedy) from None

    async def op_swapoff(self, request: Request, session: Caller) -> Reply:
        """Takes path or all, force: move everything off, then remove. Tells of the progress by notices; the
        end of the connection cancels."""
        self._require_admin(session)
        paths = [] if take_bool(request, "all") else [take_text(request, "path")]
        return await self._jobs.drain(paths, take_bool(request, "force"), session.tell)

    async def op_compact(self, request: Request, session: Caller) -> Reply:
        """Takes path: rewrite sparse segments. Progress and cancelling as with swapoff."""
        self._require_admin(session)
        return await self._jobs.compact(take_text(request, "path"), session.tell)

    async def op_backend(self, request: Request, session: Caller) -> Reply:
        """Takes backend: its number; and priority, or drain: begin to empty and remove it, or stop that. At once."""
        self._require_admin(session)
        number = take_int(request, "backend", 0, config.BACKENDS_MAX - 1)
        if "priority" in request:
            priority = take_int(request, "priority", -config.PRIORITY_MAX - 1, config.PRIORITY_MAX)
            return self._jobs.set_priority(number, priority)
        return await self._jobs.start_drain(number) if take_bool(request, "drain") else self._jobs.cancel_drain(number)

    async def run_jobs(self) -> None:
        """What op_backend started, for ever."""
        await self._jobs.run()

    # ---- operations for tests ----

    def _require_test_operations(self, session: Caller) -> None:
        if not self._test_operations or not self._is_admin(session.peer):
            raise RequestError("denied", "not a test daemon", "start it with VSWAPD_TEST_OPERATIONS=1")

    async def op_test_hold_gil(self, request: Request, session: Caller) -> Reply:
        """Takes ms: no Python runs in the daemon for so long."""
        self._require_test_operations(session)
        self._engine.hold_gil(take_int(request, "ms", 0, 60_000))
        return {}

    async def op_test_check(self, request: Request, session: Caller) -> Reply:
        """Check the invariants of the whole data plane."""
        self._require_test_operations(session)
        valid = await trio.to_thread.run_sync(self._engine.is_valid, limiter=self._workers)
        return {"valid": valid}
