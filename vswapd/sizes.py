# SPDX-License-Identifier: MIT
"""sizes — bytes as people write and read them.

K, M, G, T and KiB … TiB are powers of 1024 (what swap tools mean by them), KB … TB powers of 1000.
"""

from __future__ import annotations

_UNITS: dict[str, int] = {
    "": 1,
    "B": 1,
    **{
        prefix + suffix: base**power
        for power, prefix in enumerate("KMGTP", start=1)
        for suffix, base in (("", 1024), ("IB", 1024), ("B", 1000))
    },
}


def parse_size(text: str) -> int:
    """Bytes named by '4096', '256M', '1.5GiB', '2 GB'. ValueError with one line and its remedy."""
    stripped = text.strip()
    digits = stripped.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ \t")
    unit = _UNITS.get(stripped[len(digits) :].strip().upper())
    whole, dot, fraction = digits.partition(".")
    # Only plain decimal digits: int() and float() would take '1_0', '٣' and '1e3' too.
    number_ok = (whole + fraction).isascii() and (whole + fraction).isdigit()
    if unit is None or not number_ok or (dot and not fraction) or len(digits) > 30:
        raise ValueError(
            f"'{text}' is not a size; write bytes or a number with a unit, such as 256M or 1.5GiB"
        )
    # Whole numbers throughout: a float would round 9007199254740993.
    return int(whole + fraction) * unit // int("1" + "0" * len(fraction))


def format_size(count: float) -> str:
    """'1.5 GiB': at most one decimal, the largest unit that leaves at least 1."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    if unit == "B" or value == int(value):
        return f"{int(value)} {unit}"
    return f"{value:.1f} {unit}"


def format_size_argument(count: int) -> str:
    """A form that parse_size reads back: '16M', '4097'."""
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
