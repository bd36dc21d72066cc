# SPDX-License-Identifier: MIT
"""aged — aged_text.py in a group of a service: memory that is filled, left alone, and read again when told to."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.limited import command_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.service import Service

_PROGRAM = Path(__file__).parent / "aged_text.py"


class AgedText:
    """The program, at its input."""

    def __init__(self, service: Service, group: str, run: subprocess.Popen[str]) -> None:
        self.service = service
        self._group = group
        self._run = run

    def read_all(self) -> str:
        """What it says of what it read."""
        assert self._run.stdin
        assert self._run.stdout
        self._run.stdin.write("\n")
        self._run.stdin.flush()
        return self._run.stdout.readline().strip()

    @property
    def pid(self) -> int:
        """Of the managed process."""
        return next(int(client["pid"]) for client in self.service.status()["clients"])

    def group(self) -> dict[str, Any]:
        """What is said of its group."""
        return self.service.group(self._group)

    def call(self, verb: str, *arguments: str) -> str:
        """What `vswapctl` prints."""
        argv = [command_path("vswapctl"), verb, "--socket", self.service.socket_path, str(self.pid), *arguments]
        return subprocess.run(argv, capture_output=True, check=True, text=True).stdout


@contextmanager
def aged_text(service: Service, group: str, text_mib: int, noise_mib: int = 0) -> Iterator[AgedText]:
    """With so much text and noise in its memory."""
    argv = [command_path("vswapctl"), "run", "--socket", service.socket_path, "--group", group, "--"]
    argv += [sys.executable, str(_PROGRAM), str(text_mib), str(noise_mib)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout
            assert run.stdout.readline() == "ready\n"
            yield AgedText(service, group, run)
        finally:
            run.terminate()
