# SPDX-License-Identifier: MIT
"""What takes the place of vswapd.engine in fake_vswapctl.py: the fake engine, and agents without userfaultfd.

VSWAP_FAKE_REFUSE=1     it cannot be created
VSWAP_FAKE_KILL=1       a client is out of memory as soon as it is armed
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from support.fake_engine import (
    FakeEngine,
    fork_sharing_descriptors,
    make_memfds,
    shelve_memory,
    wait_shelved,
    wait_signal_shelved,
)
from vswapd import clients, records

if TYPE_CHECKING:
    from vswapd.wire import Arena

clients.is_userfaultfd = lambda descriptor: descriptor >= 0

__all__ = ["Engine", "fork_sharing_descriptors", "make_memfds", "shelve_memory", "wait_shelved", "wait_signal_shelved"]

_MIB = 1 << 20


class Engine(FakeEngine):
    """A FakeEngine that does what the environment says."""

    def client_arm(self, token: int, arena: Arena, events_fd: int, trash_fd: int) -> None:
        super().client_arm(token, arena, events_fd, trash_fd)
        if os.environ.get("VSWAP_FAKE_KILL"):
            client = next(client for client in self.clients() if client.token == token)
            group = next(group for group in self.groups() if group.group == client.group)
            figures = (group.limit_bytes + _MIB, group.limit_bytes, 7 * _MIB)
            self.add_event(records.Event(records.EVENT_OUT_OF_MEMORY, client.pid, group.group, *figures))
            os.kill(client.pid, signal.SIGKILL)
