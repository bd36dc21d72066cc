# SPDX-License-Identifier: MIT
"""wire.py against csrc/wire.h, and against hostile messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import header
from vswapd import wire
from vswapd.wire import WireError

_HEADER = "wire.h"


@pytest.mark.parametrize(
    ("struct", "packing"),
    [
        ("vswap_hello", wire.HELLO),
        ("vswap_welcome", wire.WELCOME),
        ("vswap_arm", wire.ARM),
        ("vswap_ready", wire.READY),
    ],
)
def test_sizes_are_the_headers(struct: str, packing: object) -> None:
    assert packing.size == header.asserted_sizes(_HEADER)[struct]  # type: ignore[attr-defined]


def test_numbers_are_the_headers() -> None:
    defines = header.defines(_HEADER)
    assert defines["VSWAP_WIRE_VERSION"] == wire.VERSION
    assert defines["VSWAP_GROUP_BYTES"] == wire.GROUP_BYTES
    assert defines["VSWAP_PROTECTIONS"] == wire.PROTECTIONS
    assert f"#define VSWAP_MAGIC {wire.MAGIC:#x}u" in header.text(_HEADER)
    assert wire.MAGIC.to_bytes(4, "little") == b"VSWP"


def test_enumerators_are_the_headers() -> None:
    kinds = header.enumerators(_HEADER, "vswap_hello_kind")
    assert kinds == {"VSWAP_HELLO_NEW": wire.HELLO_NEW, "VSWAP_HELLO_FORKED": wire.HELLO_FORKED}
    statuses = header.enumerators(_HEADER, "vswap_status")
    for name, value in statuses.items():
        assert getattr(wire, name.removeprefix("VSWAP_")) == value


def test_fields_are_in_the_headers_order() -> None:
    assert header.field_names(_HEADER, "vswap_hello") == ["magic", "version", "kind", "token", "group"]
    assert header.field_names(_HEADER, "vswap_welcome") == ["magic", "version", "status", "token"]
    assert header.field_names(_HEADER, "vswap_ready") == ["magic", "version", "status"]
    arena = ["arena", "arena_bytes", "beacon", "staging", "trash"]
    assert header.field_names(_HEADER, "vswap_arm") == ["magic", "version", "reserved", *arena]


def test_hello_is_read() -> None:
    data = wire.HELLO.pack(wire.MAGIC, wire.VERSION, wire.HELLO_FORKED, 77, b"run-1")
    assert wire.unpack_hello(data) == wire.Hello(wire.HELLO_FORKED, 77, "run-1")


def test_arm_is_read() -> None:
    data = wire.ARM.pack(wire.MAGIC, wire.VERSION, 0, 1, 2, 3, 4, 5, 6, 7)
    assert wire.unpack_arm(data) == wire.Arena(1, 2, 3, (4, 5), (6, 7))


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ((0, wire.VERSION, 1, 0, b""), wire.REFUSED_VERSION),
        ((wire.MAGIC, 99, 1, 0, b""), wire.REFUSED_VERSION),
        ((wire.MAGIC, wire.VERSION, 3, 0, b""), wire.REFUSED_PEER),
        ((wire.MAGIC, wire.VERSION, 1, 0, b"a/b"), wire.REFUSED_PEER),
        ((wire.MAGIC, wire.VERSION, 1, 0, b"x" * 32), wire.REFUSED_PEER),
        ((wire.MAGIC, wire.VERSION, 1, 0, b"\xff\xfe"), wire.REFUSED_PEER),
    ],
)
def test_wrong_hello_is_refused(fields: tuple[object, ...], status: int) -> None:
    with pytest.raises(WireError) as caught:
        wire.unpack_hello(wire.HELLO.pack(*fields))
    assert caught.value.status == status


@given(st.binary(min_size=wire.HELLO.size, max_size=wire.HELLO.size))
def test_any_hello_is_read_or_refused(data: bytes) -> None:
    try:
        wire.unpack_hello(data)
    except WireError:
        pass


@given(st.binary(min_size=wire.ARM.size, max_size=wire.ARM.size))
def test_any_arm_is_read_or_refused(data: bytes) -> None:
    try:
        wire.unpack_arm(data)
    except WireError:
        pass
