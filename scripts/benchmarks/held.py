# SPDX-License-Identifier: MIT
"""held — a program (held.c) that fills memory under a system and then waits, while what that costs is looked at."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.systems import Outcome, System


def _go_on(fifo: str) -> None:
    with open(fifo, "wb") as file:
        file.write(b"x")


def run(
    system: System,
    program: str,
    arguments: Sequence[str],
    steps: Sequence[str],
    limit_bytes: int,
    looks: Mapping[str, Callable[[int], None]],
) -> Outcome:
    """Run the steps. `looks`: what is called with the program's PID at the begin of a step that waits, after which it
    goes on. ExecuteError, also for a wrong page.
    """
    fifo = os.path.join(system.place.directory, "fifo")
    os.mkfifo(fifo, 0o600)

    def on_phase(phase: str) -> None:
        step, _, begins = phase.partition(":")
        if not begins:
            return
        with open(f"{fifo}.pid") as file:
            pid = int(file.read())
        looks[step](pid)
        _go_on(fifo)

    try:
        return system.run([program, *arguments, fifo, ",".join(steps)], limit_bytes, on_phase)
    finally:
        os.unlink(fifo)
