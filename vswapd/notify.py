# SPDX-License-Identifier: MIT
"""notify — systemd's small protocols: readiness, watchdog, socket activation, descriptor store.

The store is the second line of defence. Descriptors that outlive a daemon are its supervisor's business;
when that one dies too, all the manager kept for them comes back to the next, under the numbers they had:
the name of each says its number, and state.h names things by number.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket

_FIRST_DESCRIPTOR = 3
_STORED_PREFIX = "vswap"
CLIENTS = "vswapd.socket"  # FileDescriptorName of the socket for clients: that of a unit that gives none
METRICS = "metrics"  # ... of the one that Prometheus asks, which a service without a network cannot open


def _connect() -> socket.socket | None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
    except OSError:
        sock.close()
        return None
    return sock


def notify(state: str, descriptor: int = -1) -> bool:
    """Tell the manager, e.g. 'READY=1'. False when there is none (or it does not listen)."""
    sock = _connect()
    if sock is None:
        return False
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    with sock:
        try:
            sock.sendmsg([state.encode()], rights if descriptor >= 0 else [])
        except OSError:
            return False
    return True


def watchdog_seconds() -> float:
    """How often the manager wants to hear WATCHDOG=1, twice over; 0: it does not."""
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 2e6 if text.isdigit() else 0.0


class DescriptorStore:
    """What the manager keeps for a successor of the supervisor."""

    def __init__(self) -> None:
        self._stored: set[tuple[int, int]] = set()

    @property
    def is_offered(self) -> bool:
        """Whether the manager has one for us."""
        return os.environ.get("FDSTORE", "0") != "0"

    def update(self, wanted: set[tuple[int, int]]) -> None:
        """Make it hold these: (descriptor, owner)."""
        for fd, owner in self._stored - wanted:
            notify(f"FDSTOREREMOVE=1\nFDNAME={_STORED_PREFIX}-{fd}-{owner}")
        for fd, owner in wanted - self._stored:
            notify(f"FDSTORE=1\nFDPOLL=0\nFDNAME={_STORED_PREFIX}-{fd}-{owner}", fd)
        self._stored = wanted


def take_inherited() -> tuple[dict[str, socket.socket], list[int]]:
    """The listening sockets the manager passed, by name (CLIENTS, METRICS); and descriptors that were stored,
    at the numbers they had. To be called before anything is opened. The variables are consumed."""
    count = os.environ.pop("LISTEN_FDS", "")
    pid = os.environ.pop("LISTEN_PID", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}, []
    passed = range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count))
    stored: dict[int, int] = {}  # the number it had -> a duplicate above all of them
    listeners: dict[str, socket.socket] = {}
    above = max([passed.stop, *(_stored_number(name) + 1 for name in names)])
    for descriptor, name in zip(passed, [*names, *[""] * int(count)], strict=False):
        duplicate = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above)
        os.close(descriptor)
        if (number := _stored_number(name)) >= 0:
            stored[number] = duplicate
        elif listener := _as_listener(duplicate, name):
            listeners[name] = listener
    for number, duplicate in stored.items():
        os.dup2(duplicate, number, inheritable=False)
        os.close(duplicate)
    return listeners, sorted(stored)


def _stored_number(name: str) -> int:
    """The number a stored descriptor had; -1: it is something else."""
    prefix, _, rest = name.partition("-")
    number = rest.partition("-")[0]
    return int(number) if prefix == _STORED_PREFIX and number.isdigit() else -1


def _as_listener(descriptor: int, name: str) -> socket.socket | None:
    """The stream socket of that name; what is none, or has another name, is closed."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        return None
    is_known = name == METRICS or (name == CLIENTS and sock.family == socket.AF_UNIX)
    if is_known and sock.type == socket.SOCK_STREAM:
        return sock
    sock.close()
    return None
