# SPDX-License-Identifier: MIT
"""vswapd — a swap daemon in user space. The package itself is light: import what you need."""

from __future__ import annotations

__version__ = "0.1.0"
