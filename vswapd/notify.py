# SPDX-License-Identifier: MIT
"""notify — systemd's two small protocols: readiness notification and socket activation."""

from __future__ import annotations

import os
import socket

_FIRST_DESCRIPTOR = 3


def notify(state: str) -> bool:
    """Tell the manager, e.g. 'READY=1'. False when there is none (or it does not listen)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            sock.sendall(state.encode())
        except OSError:
            return False
    return True


def take_listener() -> socket.socket | None:
    """The listening Unix stream socket the manager passed, or None. The variables are consumed."""
    count = os.environ.pop("LISTEN_FDS", "")
    pid = os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return None
    for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count)):
        os.set_inheritable(descriptor, False)
        try:
            sock = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue
        if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM:
            os.close(descriptor)
            return sock
        sock.close()
    return None
