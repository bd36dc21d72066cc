# SPDX-License-Identifier: MIT
"""held — a program (held.c) that fills memory under a system and then waits, while what that costs is looked at."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.execute import ExecuteError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.systems import Outcome, System

_SOURCES = Path(__file__).resolve().parent
_WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]


def build(directory: str) -> str:
    """Path of the program, compiled into `directory`. ExecuteError."""
    program = os.path.join(directory, "held")
    sources = [str(_SOURCES / f"{name}.c") for name in ("held", "content", "latency")]
    command = ["cc", "-std=gnu11", "-O2", "-g", *_WARNINGS, "-o", program, *sources, "-llz4", "-lm"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise ExecuteError(f"cannot compile the program: {done.stderr.strip()[-500:]}")
    return program


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
