# SPDX-License-Identifier: MIT
"""policy — figures the control plane chooses. Pure: no I/O, no clock, no state of its own.

Everything in bytes, seconds or microseconds as the names say; the constants are in config.py.
"""

from __future__ import annotations

from vswapd import config


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


# ---- run ----


def default_limit_bytes(available_bytes: int) -> int:
    """Limit of a run that names none: most of the RAM that is free for the taking, in whole MiB."""
    share = int(available_bytes * config.LIMIT_AVAILABLE_SHARE)
    return max(config.LIMIT_BYTES_MIN, share // config.MIB * config.MIB)


def agent_min_bytes(limit_bytes: int, torture: bool) -> int:
    """Resident size from which an agent asks to be managed.

    Smaller under a small limit: eight processes just below it may use the whole limit up.
    """
    if torture:
        return config.MIN_BYTES_TORTURE
    return int(min(config.MIN_BYTES, limit_bytes * config.MIN_LIMIT_SHARE))


def agent_look_us(limit_bytes: int) -> int:
    """Longest time between two looks of an agent at its own size: what it can touch meanwhile at
    full speed must stay a share of the limit."""
    seconds = limit_bytes * config.LOOK_LIMIT_SHARE / config.FILL_BYTES_PER_SECOND
    return int(_clamp(seconds * 1e6, config.LOOK_US_MIN, config.LOOK_US_MAX))


def spill_size_bytes(free_bytes: int, limit_bytes: int, ram_bytes: int) -> int:
    """Size of a spill file nobody gave a size, in whole MiB: it is sparse, so generous, but it
    never takes the last room of a file system. 0: too little room for one."""
    size = min(
        int(free_bytes * config.SPILL_FREE_SHARE),
        config.SPILL_LIMIT_FACTOR * max(limit_bytes, ram_bytes),
    )
    size = size // config.MIB * config.MIB
    return size if size >= config.SPILL_BYTES_MIN else 0


# ---- latencies ----


def percentile(counts: tuple[int, ...], bounds: tuple[float, ...], share: float) -> float:
    """Upper bound of the histogram bucket in which `share` of all is reached; 0 for an empty one."""
    total = sum(counts)
    if total == 0:
        return 0.0
    seen = 0
    for count, bound in zip(counts, bounds, strict=True):
        seen += count
        if count and seen >= share * total:
            return bound
    return bounds[-1]
