# SPDX-License-Identifier: MIT
"""remote — a part of the data plane in a process of its own.

A broken invariant ends the process it is in. In a child it is an exception here, so that hypothesis
can shrink what led to it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.parts.build import PartsLibrary

_TESTS = Path(__file__).resolve().parents[2]
_SECONDS_MAX = 60.0  # of one call: an endless loop is a failure, not a test that hangs


class PartEndedError(Exception):
    """The part ended its process, or did not answer."""


class RemotePart:
    """`part.method(…)` calls the method of the part opened last (slot_table.py, pool.py, spill.py)."""

    def __init__(self, parts: PartsLibrary) -> None:
        self._parts = parts
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this

    def open(self, kind: str, *arguments: object) -> None:
        """Make a new part. The one before must be closed, or given up with `stop`."""
        if self._process is None:
            self._start()
        self._call("open", kind, *arguments)

    def stop(self) -> None:
        """End the process, whatever state the part is in."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._connection = self._process = None

    def close(self) -> None:
        """End of use."""
        self.stop()
        self._errors.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._call(name, *arguments)

    def _start(self) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "support.parts.serve"]
        command += [self._parts.library, self._parts.declarations, str(theirs.fileno())]
        self._errors.seek(0)
        self._errors.truncate()
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(_TESTS)},
            pass_fds=[theirs.fileno()],
            stderr=self._errors,
        )
        theirs.close()
        self._connection = ours

    def _call(self, name: str, *arguments: object) -> Any:
        assert self._connection is not None, "not open"
        try:
            self._connection.send((name, arguments))
            if self._connection.poll(_SECONDS_MAX):
                return self._connection.recv()
        except (EOFError, ConnectionError):
            pass
        raise PartEndedError(self._obituary(name))

    def _obituary(self, name: str) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(1)
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
        except subprocess.TimeoutExpired:
            how = f"no answer within {_SECONDS_MAX:.0f} s"
        self.stop()
        self._errors.seek(0)
        return f"{name}: {how}: {self._errors.read()[-2000:].decode(errors='replace').strip()}"
