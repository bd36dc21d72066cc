# SPDX-License-Identifier: MIT
"""wire — the socket messages of csrc/wire.h, packed and checked.

Native byte order: both sides are on one machine. tests/unit/test_wire.py holds the formats, sizes
and numbers below against the text of the header. What comes from a client is hostile until an
unpack function here has taken it: they raise WireError, never anything else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC = 0x50575356
VERSION = 1
GROUP_BYTES = 32
PROTECTIONS = 2

HELLO_NEW = 1
HELLO_FORKED = 2

OK = 0
REFUSED_VERSION = 1
REFUSED_PEER = 2
REFUSED_LIMIT = 3
REFUSED_KERNEL = 4

HELLO = struct.Struct(f"=IHHQ{GROUP_BYTES}s")
WELCOME = struct.Struct("=IHHQ")
ARM = struct.Struct(f"=IHHQQQ{PROTECTIONS}Q{PROTECTIONS}Q")
READY = struct.Struct("=IHH")

# Descriptors that come with ARM, by kind of HELLO.
ARM_DESCRIPTORS = {HELLO_NEW: 2, HELLO_FORKED: 1}

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


class WireError(Exception):
    """The peer does not speak the protocol. `status`: what a WELCOME that refuses it says."""

    def __init__(self, text: str, status: int = REFUSED_PEER) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Hello:
    """An agent asks to come under management. `group` is '' when it leaves the choice to the daemon."""

    kind: int
    token: int
    group: str


@dataclass(frozen=True)
class Arena:
    """Addresses of the agent's arena in its client; the meaning of each is in wire.h."""

    arena: int
    arena_bytes: int
    beacon: int
    staging: tuple[int, ...]
    trash: tuple[int, ...]


def is_group_name(name: str) -> bool:
    """Letters, digits, '.', '_' and '-' only: names are put into log lines and paths."""
    return 0 < len(name) < GROUP_BYTES and _NAME_CHARACTERS.issuperset(name)


def _check_head(magic: int, version: int) -> None:
    if magic != MAGIC:
        raise WireError(f"wrong magic {magic:#x}", REFUSED_VERSION)
    if version != VERSION:
        raise WireError(f"version {version}, this daemon speaks {VERSION}", REFUSED_VERSION)


def unpack_hello(data: bytes) -> Hello:
    """Read HELLO.size bytes."""
    magic, version, kind, token, name = HELLO.unpack(data)
    _check_head(magic, version)
    if kind not in ARM_DESCRIPTORS:
        raise WireError(f"unknown kind of HELLO {kind}")
    group = name.partition(b"\0")[0].decode("ascii", "replace")
    if group and not is_group_name(group):
        raise WireError("HELLO with an impossible group name")
    return Hello(kind, token, group)


def pack_welcome(status: int, token: int = 0) -> bytes:
    """WELCOME; `token` is the client's name from now on."""
    return WELCOME.pack(MAGIC, VERSION, status, token)


def unpack_arm(data: bytes) -> Arena:
    """Read ARM.size bytes. Checks form only; addresses are checked by the engine."""
    magic, version, _, arena, arena_bytes, beacon, *rest = ARM.unpack(data)
    _check_head(magic, version)
    return Arena(arena, arena_bytes, beacon, tuple(rest[:PROTECTIONS]), tuple(rest[PROTECTIONS:]))


def pack_ready(status: int) -> bytes:
    """READY."""
    return READY.pack(MAGIC, VERSION, status)
