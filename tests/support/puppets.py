# SPDX-License-Identifier: MIT
"""puppets — a data plane that is told what to do (`drive --commands`), and clients that are (`puppet`).

A test that knows what it wrote to which page, and what it did to the pages since, knows what the slot table must
say. `Stage` has both ends; every command is one line and one answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_SECONDS_MAX = 60.0
_MANAGED_SECONDS_MAX = 30.0


class DiedError(Exception):
    """The daemon died over this command; its successor takes the next one."""


class Puppet:
    """A client, or a forked child of one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("r", encoding="ascii")
        words = self._hear().split()
        assert words[0] == "puppet", words
        self.pid, self.address = int(words[1]), int(words[2])

    def _hear(self) -> str:
        line = self._file.readline()
        assert line, "the puppet has ended"
        return line.strip()

    def _tell(self, line: str) -> None:
        self._connection.sendall(f"{line}\n".encode())

    def obey(self, line: str) -> None:
        """AssertionError when it says anything but ok."""
        self._tell(line)
        answer = self._hear()
        assert answer == "ok", f"{line}: {answer}"

    def write(self, kind: str, seed: int, first: int, count: int = 1, every: int = 1) -> None:
        """Pages get new content."""
        self.obey(f"write {kind} {seed} {first} {count} {every}")

    def check(self, kind: str, seed: int, first: int, count: int = 1, every: int = 1) -> None:
        """Every byte of pages is what was written."""
        self.obey(f"check {kind} {seed} {first} {count} {every}")

    def kill(self) -> None:
        """SIGKILL, wherever it is; and wait until it has gone."""
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            while self._file.readline():
                pass
        self.close()

    def end(self) -> None:
        """And wait until it has closed its end."""
        self._tell("exit")
        assert self._file.readline() == ""
        self.close()

    def close(self) -> None:
        """Of one that may be gone already."""
        self._file.close()
        self._connection.close()


class Stage:
    """A data plane with one first puppet. `pages`: how many a puppet has."""

    def __init__(
        self, programs: Mapping[str, str], library: str, directory: Path, *, pages: int, limit_bytes: int
    ) -> None:
        self._directory = directory
        path = str(directory / "puppets.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._listener.settimeout(_SECONDS_MAX)
        spill = f"{directory}/spill:{1 << 28}"
        command = [programs["drive"], "--commands", "--limit", str(limit_bytes), "--spill", spill]
        self._errors = (directory / "drive.log").open("w+")
        self._drive = subprocess.Popen(
            [*command, "--lib", library, "--", programs["puppet"], path, str(pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
        )
        self._numbers = 0
        self.pages = pages
        self.puppets: list[Puppet] = []
        self._accept()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for puppet in self.puppets:
            puppet.close()
        self._listener.close()
        assert self._drive.stdin is not None
        assert self._drive.stdout is not None
        try:
            self._drive.wait(_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._drive.kill()
            self._drive.wait()
        with contextlib.suppress(BrokenPipeError):
            self._drive.stdin.close()
        self._drive.stdout.close()
        self._errors.seek(0)
        self.log = self._errors.read()
        self._errors.close()

    @property
    def status(self) -> int:
        """Of the data plane, once it has ended: 0 when every invariant held to the end."""
        return self._drive.returncode

    def _accept(self) -> Puppet:
        connection, _ = self._listener.accept()
        connection.settimeout(_SECONDS_MAX)
        self.puppets.append(Puppet(connection))
        return self.puppets[-1]

    def fork(self, puppet: Puppet) -> Puppet:
        """Its child."""
        puppet.obey("fork")
        return self._accept()

    def end(self, puppet: Puppet) -> None:
        """No more of it."""
        self.puppets.remove(puppet)
        puppet.end()

    def kill(self, puppet: Puppet) -> None:
        """No more of it, by force."""
        self.puppets.remove(puppet)
        puppet.kill()

    # ---- the data plane ----

    def order(self, line: str, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
        """What it answers behind "ok". OSError for an error; DiedError when a daemon died over it. `meanwhile`: what is
        done while it obeys.
        """
        number = self._send(line)
        meanwhile()
        answer: list[str] | None = None
        last = number
        while True:
            words = self._receive(line)
            if words == ["died"]:
                last = self._send("sync")  # its successor takes this one, and before it those that were not taken
            elif int(words[0]) == number:
                answer = words[1:]
            if words[0] == str(last):
                break
        if answer is None:
            raise DiedError(line)
        if answer[0] == "error":
            raise OSError(int(answer[1]), f"{line}: {os.strerror(int(answer[1]))}")
        return answer[1:]

    def _send(self, line: str) -> int:
        assert self._drive.stdin is not None
        self._numbers += 1
        self._drive.stdin.write(f"{self._numbers} {line}\n")
        return self._numbers

    def _receive(self, line: str) -> list[str]:
        assert self._drive.stdout is not None
        words = self._drive.stdout.readline().split()
        assert words, f"{line}: no answer, drive has ended with {self._drive.poll()}"
        return words

    def ask(self, line: str) -> dict[str, int]:
        """Figures by name."""
        return {name: int(value) for name, _, value in (word.partition("=") for word in self.order(line))}

    def settled(self) -> dict[str, int]:
        """Totals and counters once all that was begun is done, in a state that is valid."""
        self.order("valid")  # has every gate in turn: whoever woke a puppet has finished what it did
        return self.ask("statistics")

    def is_managed(self, puppet: Puppet) -> bool:
        """Has it come under management?"""
        try:
            self.ask(f"client {puppet.pid}")
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise
            return False
        return True

    def wait_managed(self, puppet: Puppet) -> None:
        """Until it has."""
        deadline = time.monotonic() + _MANAGED_SECONDS_MAX
        while not self.is_managed(puppet):
            assert time.monotonic() < deadline, "never managed"
            time.sleep(0.02)  # polling another process's state

    def page_out(self, puppet: Puppet) -> dict[str, int]:
        """All of its pages. Returns its figures."""
        self.order(f"pageout {puppet.pid}")
        return self.ask(f"client {puppet.pid}")
