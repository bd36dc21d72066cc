# SPDX-License-Identifier: MIT
"""Hostile bytes for everything that Python takes apart: HELLO, ARM, and control requests.

python -m fuzz.fuzz_messages [--runs N] [--seed S]     (in tests/; scripts/fuzz does that)

An unpack function either answers or raises WireError; what HELLO names is fit for a log line; a take_ function
answers inside its bounds or raises RequestError. Anything else is a finding.
"""

from __future__ import annotations

import argparse
import json
import random

from vswapd import wire
from vswapd.operations import RequestError, take_bool, take_int, take_text

_SEEDS = [
    wire.HELLO.pack(wire.MAGIC, wire.VERSION, wire.HELLO_NEW, 0, b"run-77"),
    wire.HELLO.pack(wire.MAGIC, wire.VERSION, wire.HELLO_FORKED, 1 << 63, b""),
    wire.ARM.pack(wire.MAGIC, wire.VERSION, 0, 1 << 40, 1 << 26, 1 << 40, 1, 2, 3, 4),
]
_REQUEST = b'{"op":"limit","pid":77,"limit_bytes":16777216,"torture":true,"name":"g"}'
_REQUEST_EVERY = 20  # JSON takes its time


def _mutate(data: bytearray, generator: random.Random) -> None:
    # One 64-bit number feeds a few mutations: the generator is what costs.
    bits = generator.getrandbits(64)
    for _ in range(1 + bits % 4):
        bits >>= 2
        data[bits % len(data)] ^= 1 << (bits >> 8 & 7)
        bits >>= 11
    if bits & 15 == 0:
        at = bits >> 4 & 31
        data[at : at + 8] = generator.randbytes(len(data[at : at + 8]))


def _unpack(data: bytes) -> None:
    try:
        if len(data) == wire.HELLO.size:
            hello = wire.unpack_hello(data)
            assert hello.kind in (wire.HELLO_NEW, wire.HELLO_FORKED)
            assert hello.group == "" or wire.is_group_name(hello.group)
            assert hello.group.isprintable()
        else:
            arena = wire.unpack_arm(data)
            assert len(arena.staging) == len(arena.trash) == wire.PROTECTIONS
    except wire.WireError as error:
        assert error.status in (wire.REFUSED_PEER, wire.REFUSED_VERSION)


def _request(data: bytes) -> None:
    try:
        request = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(request, dict):
        return
    try:
        assert 1 <= take_int(request, "pid", 1, 1 << 22) <= 1 << 22
        take_int(request, "limit_bytes", 0, 1 << 46, 0)
        assert take_bool(request, "torture") in (True, False)
        assert isinstance(take_text(request, "name"), str)
    except RequestError as error:
        json.dumps(error.reply())


def main() -> None:
    """As the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    for run in range(options.runs):
        is_request = run % _REQUEST_EVERY == 0
        data = bytearray(_REQUEST if is_request else _SEEDS[run % len(_SEEDS)])
        _mutate(data, generator)
        try:
            (_request if is_request else _unpack)(bytes(data))
        except BaseException:
            print(f"run {run}: {bytes(data)!r}")
            raise
    print(f"{options.runs} inputs, no finding")


if __name__ == "__main__":
    main()
