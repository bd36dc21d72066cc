# SPDX-License-Identifier: MIT
"""vswapd — a swap daemon in user space, and its Python interface.

    import vswapd

    with vswapd.limit("2G"):                       # run this program inside a memory limit
        table = vswapd.empty((1 << 20, 512), "f4") # may be larger than the limit
        ...
    vswapd.status()                                # where the memory is

The package itself is light: what these functions need is imported when they are first used (api.py).
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["Failure", "__version__", "alloc", "cold", "empty", "limit", "status", "willneed"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vswapd.api import Failure, alloc, cold, empty, limit, status, willneed


def __getattr__(name: str) -> object:
    if name in __all__:
        from vswapd import api

        # Before a module vswapd.NAME, which an import may have put here meanwhile.
        return getattr(api, name)
    raise AttributeError(f"module 'vswapd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
