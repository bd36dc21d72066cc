# SPDX-License-Identifier: MIT
"""injection — the agent for a command that cannot be preloaded: put into it before its first instruction.

Statically linked programs and those of musl load no libvswap.so. What they fork is served, and what they
execute that is like them runs unmanaged: no library of ours is there to see it.
"""

from __future__ import annotations

import os
import sys

from vswapd import attachable, paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from vswapd.facts import Program


def is_needed(program: Program) -> bool:
    """Whether preloading does nothing for it, and this may help. Not for those with rights of their own: the
    kernel takes these from a program that is traced."""
    can = program.is_elf and program.is_native and not program.is_privileged
    return can and not program.is_preloadable and os.uname().machine == attachable.MACHINE


class Injection:
    """For one command; `environment` is the one that a preloaded agent would read (wire.h)."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._image = paths.agent_image()
        self._is_held = False

    def hold(self, pid: int) -> None:
        """Before it executes its program."""
        from vswapd import engine

        try:
            engine.attach_hold(pid)
        except OSError as error:
            self._say(error)
        else:
            self._is_held = True

    def finish(self, pid: int) -> None:
        """It executes it now."""
        from vswapd import engine

        if not self._is_held:
            return
        environment = self._environment
        try:
            engine.attach_inject(
                pid,
                self._image,
                environment["VSWAPD_SOCKET"],
                environment["VSWAP_GROUP"],
                minimum_bytes=int(environment["VSWAP_MIN_BYTES"]),
                look_us=int(environment["VSWAP_LOOK_US"]),
                held=True,
            )
        except OSError as error:
            self._say(error)

    @staticmethod
    def _say(error: OSError) -> None:
        text = error.strerror or os.strerror(error.errno or 0)
        print(f"vswapctl: the command runs unmanaged: {text}", file=sys.stderr, flush=True)
