# SPDX-License-Identifier: MIT
"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswapd.sizes import format_size, format_size_argument, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("256M", 256 << 20),
        ("256m", 256 << 20),
        ("1.5GiB", 3 << 29),
        (" 2 GB ", 2_000_000_000),
        ("1kB", 1000),
        ("1KiB", 1024),
        (".5K", 512),
        ("12B", 12),
        ("3T", 3 << 40),
        ("1P", 1 << 50),
        ("9007199254740993", 9007199254740993),  # a float would round it
    ],
)
def test_size_is_understood(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "12X",
        "-1",
        "1e3",
        "1_0",
        "0x10",
        "1.",
        "1.2.3",
        "1 2",
        "nan",
        "inf",
        "٣",
        "1,5G",
        "9" * 40,
        "1Gi B",
    ],
)
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@given(st.integers(0, 1 << 60))
def test_argument_form_is_read_back(count: int) -> None:
    assert parse_size(format_size_argument(count)) == count


@given(st.text(max_size=12))
def test_no_text_does_anything_but_parse_or_refuse(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1 << 30, "1 GiB"),
        (5 << 42, "20 TiB"),
    ],
)
def test_size_is_written_short(count: int, text: str) -> None:
    assert format_size(count) == text
