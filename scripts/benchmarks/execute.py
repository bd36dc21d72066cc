# SPDX-License-Identifier: MIT
"""execute — run a measured command, take the JSON line it prints for each phase, and let nothing of it live on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SECONDS_TO_END = 15.0


class ExecuteError(Exception):
    """The command failed, or found a wrong page: one line."""


def _end(process: subprocess.Popen[str]) -> None:
    """SIGTERM, in order that vswapctl takes its daemon along, then SIGKILL; to the command's own session only."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
            return


@contextlib.contextmanager
def _ended_after(process: subprocess.Popen[str], seconds: float) -> Iterator[threading.Event]:
    """The event says that it was."""
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        _end(process)

    if seconds == math.inf:
        yield is_late
        return
    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield is_late
    finally:
        timer.cancel()
        timer.join()


def execute(
    argv: list[str], on_phase: Callable[[str], None], seconds_max: float = math.inf
) -> tuple[dict[str, dict[str, Any]], float]:
    """Results by phase, and the seconds of it all. ExecuteError, also when it takes longer than `seconds_max`."""
    phases: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        try:
            assert process.stdout is not None
            with process.stdout, _ended_after(process, seconds_max) as is_late:
                for line in process.stdout:
                    if line.startswith("{"):
                        result = json.loads(line)
                        phases[result.pop("phase")] = result
                        on_phase(next(reversed(phases)))
            status = process.wait()
        except BaseException:
            _end(process)
            raise
        if is_late.is_set():
            raise ExecuteError(f"not over after {seconds_max:.0f} s: ended")
        if status != 0:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-3:]
            raise ExecuteError(f"ended with {status}: {' | '.join(last) or 'no message'}")
    return phases, time.monotonic() - started
