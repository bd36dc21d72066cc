# SPDX-License-Identifier: MIT
"""The watchdog's round trip, with ourselves as the manager."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from support.limited import command_path
from support.sampler import ControlClient
from support.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SECONDS_MAX = 30.0
_FEEDINGS_MISSED = 5


class _Watched:
    """A daemon that is to tell us every quarter of a second."""

    interval_seconds = 0.25

    def __init__(self, directory: Path) -> None:
        self.log = directory / "vswapd.log"
        self._socket_path = str(directory / "vswapd.sock")
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(directory / "notify"))
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(directory / "notify"),
            "WATCHDOG_USEC": str(int(self.interval_seconds * 2e6)),
        }
        (directory / "vswapd.conf").touch()
        command = [command_path("vswapd"), "--socket", self._socket_path, "--config", str(directory / "vswapd.conf")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def wait_fed(self, seconds_max: float = _SECONDS_MAX) -> None:
        """TimeoutError when it is not. What came before now does not count."""
        self._manager.setblocking(False)
        try:
            while True:
                self._manager.recv(100)
        except BlockingIOError:
            pass
        self._manager.settimeout(seconds_max)
        while self._manager.recv(100) != b"WATCHDOG=1":
            pass

    def is_fed_within(self, seconds: float) -> bool:
        """From now on."""
        try:
            self.wait_fed(seconds)
        except TimeoutError:
            return False
        return True

    def client(self) -> dict[str, Any]:
        """The self-test's; {} when it is not there."""
        with ControlClient(self._socket_path) as control:
            clients: list[dict[str, Any]] = control.status()["clients"]
        return clients[0] if clients else {}

    def close(self) -> int:
        """Its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(_SECONDS_MAX)
        finally:
            self.process.kill()
            self._manager.close()


@contextmanager
def _watched(directory: Path) -> Iterator[_Watched]:
    watched = _Watched(directory)
    try:
        yield watched
    finally:
        status = watched.close()
    assert status == 0, watched.log.read_text()


def test_fed_after_pages_went_out_and_came_back(tmp_path: Path) -> None:
    """Each round anew; and the program is not in the way of the daemon's stop."""
    with _watched(tmp_path) as watched:
        watched.wait_fed()
        first = watched.client()
        watched.wait_fed()
        watched.wait_fed()
        later = watched.client()
        assert first["pid"] == later["pid"]
        assert later["evicted_pages"] > first["evicted_pages"] > 0
        assert later["faults"] > first["faults"] > 0


def test_not_fed_while_a_page_does_not_come_back(tmp_path: Path) -> None:
    with _watched(tmp_path) as watched:
        watched.wait_fed()
        pid = int(watched.client()["pid"])
        os.kill(pid, signal.SIGSTOP)
        count = 0
        while watched.is_fed_within(watched.interval_seconds * _FEEDINGS_MISSED):
            count += 1
            assert count < 2, "the first may have been of a round that was at its end"
        os.kill(pid, signal.SIGCONT)
        watched.wait_fed()


def test_program_that_was_killed_is_no_verdict(tmp_path: Path) -> None:
    with _watched(tmp_path) as watched:
        watched.wait_fed()
        pid = int(watched.client()["pid"])
        os.kill(pid, signal.SIGKILL)
        wait_until("it has another", lambda: watched.client().get("pid", pid) != pid)
        watched.wait_fed()
        assert "its program has ended" in watched.log.read_text()
