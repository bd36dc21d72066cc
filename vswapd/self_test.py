# SPDX-License-Identifier: MIT
"""self_test — the manager's watchdog is fed when a page has gone out and come back, and not otherwise.

A small program is a client of ours like any other, in a group of its own, for as long as the daemon lives. Each
round it writes memory that was never there before; its limit is lowered until the evictors have taken some of it,
all of it is paged out, and it reads it back. A round without an end, or a wrong byte, is a data plane that hangs
or worse: nothing is told to the manager, which kills and starts anew. What says nothing about the data plane does
not stop the feeding: that there is no room for the program or one more client, or that somebody killed it.

It is never in the way: a successor closes the socket it reads from, so that it ends; its group is doomed from the
beginning; and it is ended first when the daemon stops. Not a pipe: who reads from one while a page of its buffer is out
holds its lock, and to close the other end would be to wait for a client, whose page waits for us.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING

import trio

from vswapd import config, notify, paths
from vswapd.failure import Failure
from vswapd.groups import GroupError

if TYPE_CHECKING:
    from vswapd.clients import ClientServer
    from vswapd.engine import Engine
    from vswapd.groups import Group, GroupRegistry
    from vswapd.log import Log

_LOOK_SECONDS = 0.02
_JOIN_SECONDS_MAX = 10.0
_PAGES = 64
_ANSWER_BYTES = 64
_ENDED = "its program has ended"
_PROGRAM = f"""
import mmap, sys
memory = mmap.mmap(-1, {_PAGES * config.PAGE_BYTES}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def content(word):
    return b"".join(b"%016d%016d" % (word, page) * ({config.PAGE_BYTES} // 32) for page in range({_PAGES}))
for line in sys.stdin:
    if line == "?\\n":
        print("right" if memory[:] == content(word) else "wrong", flush=True)
    else:
        word = int(line)
        memory[:] = content(word)
        print("written", flush=True)
"""


class SelfTest:
    """Feeds the watchdog."""

    def __init__(
        self, engine: Engine, groups: GroupRegistry, clients: ClientServer, socket_path: str, log: Log
    ) -> None:
        self._engine = engine
        self._groups = groups
        self._clients = clients
        self._socket_path = socket_path
        self._log = log
        self._word = 0

    async def run(self) -> None:
        """For ever, where a manager wants to be told."""
        seconds = notify.watchdog_seconds()
        while seconds:
            try:
                if not self._clients.is_stopping:
                    await self._run_program(seconds)
            except (ConnectionError, trio.EndOfChannel):
                self._log.warning("no self-test", error=_ENDED)
            except (OSError, Failure, GroupError) as error:
                self._log.warning("no self-test", error=str(error))
            # Not tested, or stopping: that this loop turns and the engine answers has to do.
            self._engine.statistics()
            notify.notify("WATCHDOG=1")
            await trio.sleep(config.TASK_RESTART_SECONDS if self._clients.is_stopping else seconds)
        await trio.sleep_forever()

    async def _run_program(self, seconds: float) -> None:
        """Until it has ended, or the daemon is to stop."""
        group = self._groups.create(config.SELF_TEST_GROUP, os.geteuid(), config.LIMIT_BYTES_MIN, no_spill=True)
        try:
            ours, its = socket.socketpair()
            with ours, its:
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-I", "-S", "-c", _PROGRAM],
                    stdin=its,
                    stdout=its,
                    start_new_session=True,
                    env=self._environment(group.name),
                )
                its.close()
                try:
                    await self._run_rounds(process.pid, trio.socket.from_stdlib_socket(ours), group, seconds)
                finally:
                    process.kill()
                    with trio.CancelScope(shield=True):
                        await process.wait()
        finally:
            if not group.doomed:
                self._groups.doom(group)

    async def _run_rounds(
        self, pid: int, connection: trio.socket.SocketType, group: Group, seconds: float
    ) -> None:
        await self._wait_joined(pid)
        self._groups.doom(group)
        while not self._clients.is_stopping:
            await self._round(pid, connection, group.number)
            notify.notify("WATCHDOG=1")
            with trio.move_on_after(seconds):
                await self._clients.stopping.wait()

    def _environment(self, group: str) -> dict[str, str]:
        """Of its agent (wire.h)."""
        return {
            "LD_PRELOAD": paths.library(),
            "VSWAPD_SOCKET": self._socket_path,
            "VSWAP_GROUP": group,
            "VSWAP_MIN_BYTES": "0",
            "VSWAP_LOOK_US": str(config.LOOK_US_MAX),
        }

    async def _wait_joined(self, pid: int) -> None:
        """OSError when it does not become a client."""
        with trio.move_on_after(_JOIN_SECONDS_MAX):
            while not any(client.pid == pid for client in self._engine.clients()):  # noqa: ASYNC110 -- the engine tells nobody
                await trio.sleep(_LOOK_SECONDS)
            return
        raise OSError("its program was not taken as a client")

    async def _round(self, pid: int, connection: trio.socket.SocketType, group: int) -> None:
        """Memory out, by the evictors and all the rest by request, and back."""
        self._word += 1
        await self._ask(connection, str(self._word))
        evicted = self._evicted_pages(pid)
        self._engine.group_set_limit(group, config.MIB)
        while self._evicted_pages(pid) == evicted:  # noqa: ASYNC110 -- evictors tell nobody
            await trio.sleep(_LOOK_SECONDS)
        self._engine.group_set_limit(group, config.LIMIT_BYTES_MIN)
        await trio.to_thread.run_sync(self._engine.pageout, pid, config.PAGE_TIMEOUT_MS)
        if await self._ask(connection, "?") != "right":
            self._log.error("memory that came back from the self-test is not what went out")
            await trio.sleep_forever()

    def _evicted_pages(self, pid: int) -> int:
        """OSError when it has ended."""
        for client in self._engine.clients():
            if client.pid == pid:
                return client.evicted_pages
        raise OSError(_ENDED)

    @staticmethod
    async def _ask(connection: trio.socket.SocketType, line: str) -> str:
        await connection.send(f"{line}\n".encode())  # some bytes, one at a time: never in part
        answer = b""
        while not answer.endswith(b"\n"):
            received = await connection.recv(_ANSWER_BYTES)
            if not received:
                raise trio.EndOfChannel
            answer += received
        return answer.decode().strip()
