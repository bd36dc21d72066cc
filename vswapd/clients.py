# SPDX-License-Identifier: MIT
"""clients — the handshake of an agent (csrc/wire.h) and the life of its connection.

    HELLO -> engine begins a client -> WELCOME + descriptors -> ARM + descriptors -> engine arms it
    -> READY -> nothing more until end of file: the agent is gone -> engine told

A peer is hostile until checked: messages are read to their exact size under a time limit, every
descriptor that arrives is closed unless the engine took it over, and a client that was begun is
always ended. Descriptors of the engine are only lent to sendmsg.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from vswapd import config, processes, wire
from vswapd.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from vswapd.accept import Peer
    from vswapd.engine import Engine
    from vswapd.groups import Group, GroupRegistry
    from vswapd.log import Log
    from vswapd.records import ClientStatistics

_DESCRIPTORS_MAX = 4  # received with one message; more than any message has, so that excess is seen
_WORKERS_MAX = 16
_ENDED_MAX = 64  # ended clients whose names are remembered, for events that come late

_STATUS_OF_ERRNO = {
    errno.EPERM: wire.REFUSED_PEER,
    errno.ESRCH: wire.REFUSED_PEER,
    errno.ENOENT: wire.REFUSED_PEER,
    errno.EEXIST: wire.REFUSED_PEER,
    errno.ENOSPC: wire.REFUSED_LIMIT,
    errno.EMFILE: wire.REFUSED_LIMIT,
    errno.ENFILE: wire.REFUSED_LIMIT,
    errno.ENOMEM: wire.REFUSED_LIMIT,
    errno.EUSERS: wire.REFUSED_LIMIT,
}


@dataclass(frozen=True)
class Client:
    """A connected agent's process, as far as Python knows it."""

    token: int
    pid: int
    uid: int
    comm: str


class Descriptors:
    """Received descriptors: closed at the end, except those that were taken."""

    def __init__(self) -> None:
        self._held: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.take_all():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def add(self, ancillary: Sequence[tuple[int, int, bytes]]) -> None:
        """Own what recvmsg delivered."""
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                self._held.extend(numbers)

    def take_all(self) -> list[int]:
        """The caller owns them now."""
        taken, self._held = self._held, []
        return taken


async def receive_message(
    sock: trio.socket.SocketType, size: int, descriptors: Descriptors, descriptor_count: int
) -> bytes:
    """Exactly `size` bytes, which came with exactly `descriptor_count` descriptors. WireError."""
    data = b""
    with trio.move_on_after(config.HANDSHAKE_SECONDS_MAX):
        while len(data) < size:
            chunk, ancillary, flags, _ = await sock.recvmsg(
                size - len(data),
                socket.CMSG_SPACE(_DESCRIPTORS_MAX * array.array("i").itemsize),
                socket.MSG_CMSG_CLOEXEC,
            )
            descriptors.add(ancillary)
            if flags & socket.MSG_CTRUNC:
                raise WireError("more descriptors than any message has")
            if not chunk:
                raise WireError(f"closed after {len(data)} of {size} bytes")
            data += chunk
    if len(data) < size:
        raise WireError(f"{len(data)} of {size} bytes in {config.HANDSHAKE_SECONDS_MAX:g} s")
    if len(descriptors) != descriptor_count:
        raise WireError(f"{len(descriptors)} descriptors instead of {descriptor_count}")
    return data


async def send_message(sock: trio.socket.SocketType, data: bytes, descriptors: Sequence[int] = ()) -> None:
    """A short message; the socket's buffer always has room for it in a regular handshake."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    with trio.fail_after(config.HANDSHAKE_SECONDS_MAX):
        sent = await sock.sendmsg([data], rights if descriptors else [])
    if sent != len(data):
        raise WireError("the peer does not read")


def _is_of_ended(error: BaseException) -> bool:
    """Whether the engine said that the process has ended."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ESRCH


def is_userfaultfd(descriptor: int) -> bool:
    """Whether a received descriptor is what it should be, before C code uses ioctls on it."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[userfaultfd]"
    except OSError:
        return False


class ClientServer:
    """Serves agents and knows the connected ones."""

    def __init__(self, engine: Engine, groups: GroupRegistry, log: Log, default_group: str = "") -> None:
        self._engine = engine
        self._groups = groups
        self._log = log
        self._default_group = default_group
        self._clients: dict[int, Client] = {}
        self._ended: deque[Client] = deque(maxlen=_ENDED_MAX)
        self._workers = trio.CapacityLimiter(_WORKERS_MAX)
        self.is_descriptor_valid = is_userfaultfd  # replaced by tests, which have no userfaultfd
        self.is_process_of = processes.is_of  # ... and one user
        self.stopping = trio.Event()

    @property
    def is_stopping(self) -> bool:
        """Nobody new is taken."""
        return self.stopping.is_set()

    def comm(self, pid: int) -> str:
        """Name of a client that is connected, or was just now; else ''."""
        known = (*self._clients.values(), *reversed(self._ended))
        return next((client.comm for client in known if client.pid == pid), "")

    def by_token(self, token: int) -> Client | None:
        """The connected client with that token."""
        return self._clients.get(token)

    async def serve(self, sock: trio.socket.SocketType, peer: Peer) -> None:
        """One agent, until its connection ends."""
        try:
            hello, token, lent = await self._hello(sock, peer)
        except WireError as error:
            # Those that keep a process of the group outside its budget are somebody's business.
            ours = error.status in (wire.REFUSED_LIMIT, wire.REFUSED_KERNEL) and not self.is_stopping
            report = self._log.warning if ours else self._log.info
            report("agent refused", pid=peer.pid, uid=peer.uid, reason=str(error))
            await self._refuse(sock, error.status)
            return
        try:
            with Descriptors() as descriptors:
                await send_message(sock, wire.pack_welcome(wire.OK, token), lent)
                count = wire.ARM_DESCRIPTORS[hello.kind]
                data = await receive_message(sock, wire.ARM.size, descriptors, count)
                arena = wire.unpack_arm(data)
                await self._arm(sock, peer, hello=hello, token=token, arena=arena, descriptors=descriptors)
            await self._hold(sock)
        except (WireError, trio.TooSlowError) as error:
            # Most often the process has just ended, though it may be there until somebody waits for it.
            has_ended = not processes.exists(peer.pid) or _is_of_ended(error)
            report = self._log.info if has_ended else self._log.warning
            report("handshake given up", pid=peer.pid, uid=peer.uid, reason=str(error))
        finally:
            await self._lost(token)

    async def _hello(
        self, sock: trio.socket.SocketType, peer: Peer
    ) -> tuple[wire.Hello, int, tuple[int, ...]]:
        """(HELLO, token, descriptors to lend) of a client that the engine has begun. WireError."""
        with Descriptors() as descriptors:
            hello = wire.unpack_hello(await receive_message(sock, wire.HELLO.size, descriptors, 0))
        if peer.pid <= 0:
            raise WireError("a process of a PID namespace that the daemon cannot see")
        try:
            device = self._engine.userfaultfd_device
            token = hello.token
            lent: tuple[int, ...] = (device,)
            group = None if hello.kind == wire.HELLO_FORKED else self._group_for(hello, peer)
            self._engine.note_client(peer.pid)  # the engine counts it from here on
            if group is None:
                lent += self._engine.client_begin_forked(peer.pid, token)
            else:
                token, ring = self._engine.client_begin(peer.pid, group.number)
                lent += (ring,)
        except OSError as error:
            status = _STATUS_OF_ERRNO.get(error.errno or 0, wire.REFUSED_KERNEL)
            raise WireError(str(error), status) from error
        # Who connected can have become another program since. What the engine has opened by now is what the
        # process has been up to this moment, so this look comes last.
        if peer.uid != 0 and not self.is_process_of(peer.pid, peer.uid, peer.gid):
            await self._lost(token)
            raise WireError("the process is not its peer's any more")
        return hello, token, lent

    def _group_for(self, hello: wire.Hello, peer: Peer) -> Group:
        if self.is_stopping:
            raise WireError("the daemon is stopping", wire.REFUSED_LIMIT)
        name = hello.group or self._default_group
        group = self._groups.find(name)
        if group is None:
            raise WireError(f"no group '{name}'")
        if not group.admits(peer):
            raise WireError(f"user {peer.uid} may not enter group '{name}'")
        return group

    async def _refuse(self, sock: trio.socket.SocketType, status: int) -> None:
        try:
            await send_message(sock, wire.pack_welcome(status))
        except (OSError, WireError, trio.TooSlowError):
            pass  # it is gone, or does not listen: refused all the same

    async def _arm(
        self,
        sock: trio.socket.SocketType,
        peer: Peer,
        *,
        hello: wire.Hello,
        token: int,
        arena: wire.Arena,
        descriptors: Descriptors,
    ) -> None:
        if not all(map(self.is_descriptor_valid, descriptors)):
            raise WireError("a descriptor of ARM is not a userfaultfd")
        taken = descriptors.take_all()
        events_fd = taken[0] if hello.kind == wire.HELLO_NEW else -1
        # Before it is served: it may end at once, and its name is asked for then.
        self._clients[token] = Client(token, peer.pid, peer.uid, processes.comm(peer.pid))
        try:
            await trio.to_thread.run_sync(
                self._engine.client_arm, token, arena, events_fd, taken[-1], limiter=self._workers
            )
        except OSError as error:
            await send_message(sock, wire.pack_ready(wire.REFUSED_KERNEL))
            raise WireError(f"the engine refused it: {error}") from error
        self._groups.note_change()
        self._engine.client_label(token, sock.fileno(), peer.uid)
        await send_message(sock, wire.pack_ready(wire.OK))

    async def resume(self, record: ClientStatistics) -> None:
        """Serve an agent that the daemon before had armed, until its connection ends."""
        self._clients[record.token] = Client(
            record.token, record.pid, record.uid, processes.comm(record.pid)
        )
        if record.socket_fd < 0:
            return  # its agent takes itself for armed; that its process has ended the engine finds out
        try:
            connection = socket.socket(fileno=record.socket_fd)
        except OSError:
            return  # nobody kept it
        with trio.socket.from_stdlib_socket(connection) as sock:
            try:
                await self._hold(sock)
            except (WireError, OSError) as error:
                self._log.warning("agent given up", pid=record.pid, reason=str(error))
            finally:
                await self._lost(record.token)

    async def _hold(self, sock: trio.socket.SocketType) -> None:
        """Until the agent has closed its end. WireError when it does anything else."""
        try:
            if await sock.recv(1):
                raise WireError("the agent spoke after READY")
        except ConnectionResetError:
            pass

    async def _lost(self, token: int) -> None:
        client = self._clients.pop(token, None)
        if client is not None:
            self._ended.append(client)
        # Shielded: when the daemon stops, too, the engine must hear of it.
        with trio.CancelScope(shield=True):
            try:
                # First: once it is closed the number may be another's, and a successor go by it.
                self._engine.client_label(token, -1, client.uid if client else 0)
                await trio.to_thread.run_sync(self._engine.client_lost, token, limiter=self._workers)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESRCH):
                    self._log.error("client not ended", token=token, error=str(error))
        self._groups.note_change()
