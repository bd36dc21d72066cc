# SPDX-License-Identifier: MIT
"""pagein — `vswapctl pagein PID`: bring all of a process back, e.g. before attaching a debugger."""

from __future__ import annotations

from vswapd.cli.pageout import page

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def main(options: argparse.Namespace) -> int:
    """`vswapctl pagein`."""
    return page("pagein", options)
