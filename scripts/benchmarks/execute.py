# SPDX-License-Identifier: MIT
"""execute — run a measured command, take the JSON line it prints for each phase, and let nothing of it live on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

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


def execute(argv: list[str], on_phase: Callable[[str], None]) -> tuple[dict[str, dict[str, Any]], float]:
    """Results by phase, and the seconds of it all. ExecuteError."""
    phases: dict[str, dict[str, Any]] = {}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        try:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    if line.startswith("{"):
                        result = json.loads(line)
                        phases[result.pop("phase")] = result
                        on_phase(next(reversed(phases)))
            status = process.wait()
        except BaseException:
            _end(process)
            raise
        if status != 0:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-3:]
            raise ExecuteError(f"ended with {status}: {' | '.join(last) or 'no message'}")
    return phases, time.monotonic() - started
