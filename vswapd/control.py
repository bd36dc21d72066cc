# SPDX-License-Identifier: MIT
"""control — admin requests: one JSON object per line, one JSON line in answer to each.

    {"op": "status", "id": 7}                {"ok": true, "id": 7, "status": {…}}
    {"op": "limit", "pid": 1, …}             {"ok": false, "code": "not-managed", "error": "…", "remedy": "…"}
                                             {"notice": "out-of-memory", "level": "error", "text": "…", …}

Requests of a connection are answered in order, with the "id" that they came with. A connection that made
a group is its *session*: it is told of what happens to the group by notices, lines with a "notice" that may
come before any answer, and the group is doomed when the session ends. A session outlives the daemon: its
successor begins with an empty line, as the one before may have died within one, and the notice
"daemon-restarted", upon which what was not answered is to be asked again. What can be asked, and by whom, is
in operations.py.
"""

from __future__ import annotations

import json
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from vswapd import config
from vswapd.events import Notice
from vswapd.groups import GroupError
from vswapd.operations import Caller, Operations
from vswapd.request import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vswapd.accept import Peer
    from vswapd.clients import ClientServer
    from vswapd.engine import Engine
    from vswapd.groups import Group, GroupRegistry
    from vswapd.log import Log

_LEVELS_SENT = ("warning", "error")
_GOODBYE_SECONDS_MAX = 1.0


class Session(Caller):
    """One control connection."""

    def __init__(self, sock: trio.socket.SocketType, peer: Peer) -> None:
        super().__init__(peer)
        self._sock = sock
        self._notices: deque[dict[str, Any]] = deque(maxlen=config.NOTICES_QUEUED_MAX)
        self._has_notices = trio.Event()
        self._sending = trio.Lock()

    @property
    def descriptor(self) -> int:
        """Of the connection."""
        return self._sock.fileno()

    def notify(self, notice: Notice) -> None:
        """Queue a notice; when the peer does not read them the oldest are dropped."""
        line = {"notice": notice.kind, "level": notice.level, "text": notice.text}
        self._notices.append(line | {"group": notice.group, "pid": notice.pid, **notice.fields})
        self._has_notices.set()

    async def send(self, *lines: dict[str, Any]) -> None:
        """Write queued notices, then `lines`. OSError, TooSlowError."""
        async with self._sending:
            queued = [*self._notices, *lines]
            self._notices.clear()
            if self._has_notices.is_set():  # else somebody may be waiting on this very object
                self._has_notices = trio.Event()
            data = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in queued).encode()
            with trio.fail_after(config.SEND_SECONDS_MAX):
                while data:
                    data = data[await self._sock.send(data) :]

    async def tell(self, line: dict[str, Any]) -> None:
        """Send it now: whoever is gone is noticed by that."""
        await self.send(line)

    async def resume(self, deaths: int) -> None:
        """The first words of a successor. OSError, TooSlowError."""
        text = "the daemon died and another took over; nothing is lost"
        line = {"notice": "daemon-restarted", "level": "warning", "text": text, "deaths": deaths}
        with trio.fail_after(config.SEND_SECONDS_MAX):
            await self._sock.send(b"\n")
        await self.send(line)

    async def push_notices(self) -> None:
        """Write notices as they come, for ever."""
        while True:
            await self._has_notices.wait()
            await self.send()


class ControlServer:
    """Serves control connections."""

    def __init__(
        self,
        engine: Engine,
        groups: GroupRegistry,
        clients: ClientServer,
        log: Log,
        supervisor_pid: int = 0,
    ) -> None:
        self.operations = Operations(engine, groups, clients, log, supervisor_pid)
        self._groups = groups
        self._log = log
        self._sessions: set[Session] = set()
        self._answering = 0  # requests

    def notify(self, notice: Notice) -> bool:
        """Tell the sessions of the notice's group. False: there is none."""
        if notice.level not in _LEVELS_SENT:
            return False
        told = False
        for session in self._sessions:
            names = session.joined.union(group.name for group in session.groups)
            if names and (not notice.group or notice.group in names):
                session.notify(notice)
                told = True
        return told

    async def say_goodbye(self) -> None:
        """Nobody is served any more: finish what is being answered (the last detach is), and tell those who wait.

        Who has a group would take the end of the connection for a mishap.
        """
        with trio.move_on_after(_GOODBYE_SECONDS_MAX):
            while self._answering:  # noqa: ASYNC110 -- a moment, once
                await trio.sleep(0.01)
        text = "the daemon was stopped; whatever is left of the command has no limit any more"
        for session in tuple(self._sessions):
            if session.groups or session.joined:
                session.notify(Notice("warning", "daemon-stopped", text))
                with suppress(OSError, trio.TooSlowError), trio.move_on_after(_GOODBYE_SECONDS_MAX):
                    await session.send()

    # ---- connections ----

    async def serve(
        self, sock: trio.socket.SocketType, peer: Peer, groups: Sequence[Group] = (), deaths: int = 0
    ) -> None:
        """One connection, until the peer closes it or breaks the rules. `deaths` of daemons that served it
        before: then it has these groups."""
        session = Session(sock, peer)
        session.groups.extend(groups)
        self._sessions.add(session)
        try:
            async with trio.open_nursery() as nursery:
                if deaths:
                    await session.resume(deaths)
                nursery.start_soon(session.push_notices)
                await self._serve_lines(sock, session)
                nursery.cancel_scope.cancel()
        except* (OSError, trio.TooSlowError) as group:
            self._log.debug("control connection ended", pid=peer.pid, error=repr(group.exceptions[0]))
        finally:
            self._sessions.discard(session)
            for owned in session.groups:
                self._groups.doom(owned)

    async def _serve_lines(self, sock: trio.socket.SocketType, session: Session) -> None:
        buffer = bytearray()
        while True:
            line, newline, rest = buffer.partition(b"\n")
            if newline:
                buffer = rest
                if not line.strip():
                    continue
                self._answering += 1
                try:
                    await session.send(await self._answer(bytes(line), session))
                finally:
                    self._answering -= 1
                continue
            if len(buffer) > config.REQUEST_BYTES_MAX:
                error = RequestError(
                    "too-long", "request too long", f"send less than {config.REQUEST_BYTES_MAX} bytes"
                )
                await session.send(error.reply())
                return
            chunk = await sock.recv(65536)
            if not chunk:
                return
            buffer += chunk

    async def _answer(self, line: bytes, session: Session) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            return RequestError("bad-request", "not a JSON object", "send one JSON object per line").reply()
        named = {"id": request["id"]} if isinstance(request.get("id"), int) else {}
        return await self._carry_out(request, session) | named

    async def _carry_out(self, request: dict[str, Any], session: Session) -> dict[str, Any]:
        try:
            return {"ok": True, **await self.operations.answer(request, session)}
        except RequestError as error:
            return error.reply()
        except GroupError as error:
            return RequestError("refused", str(error), "see vswapctl status").reply()
        except OSError as error:
            return RequestError("failed", str(error.strerror or error), "see the daemon's log").reply()
