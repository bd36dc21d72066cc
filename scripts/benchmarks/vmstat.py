# SPDX-License-Identifier: MIT
"""vmstat — what the kernel counts."""

from __future__ import annotations


def count(name: str) -> int:
    """One line of /proc/vmstat: since the machine started, most of them."""
    with open("/proc/vmstat") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name} "))
