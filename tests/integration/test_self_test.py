# SPDX-License-Identifier: MIT
"""The watchdog's round trip, with ourselves as the manager."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.limited import command_path
from support.sampler import ControlClient
from support.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECONDS_MAX = 30.0
_FEEDINGS_MISSED = 5
_SYS_PIDFD_GETFD = 438
_QUIET_SECONDS = 4.0


class _Watched:
    """A daemon that is to tell us every quarter of a second, or as often as is said."""

    def __init__(self, directory: Path, interval_seconds: float) -> None:
        self.interval_seconds = interval_seconds
        self.log = directory / "vswapd.log"
        self.socket_path = str(directory / "vswapd.sock")
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(directory / "notify"))
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(directory / "notify"),
            "WATCHDOG_USEC": str(int(self.interval_seconds * 2e6)),
        }
        (directory / "vswapd.conf").touch()
        command = [command_path("vswapd"), "--socket", self.socket_path, "--config", str(directory / "vswapd.conf")]
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
        with ControlClient(self.socket_path) as control:
            clients: list[dict[str, Any]] = control.status()["clients"]
        return clients[0] if clients else {}

    def daemon_pid(self) -> int:
        """The daemon's, not its supervisor's."""
        with ControlClient(self.socket_path) as control:
            return int(control.request("ping")["pid"])

    def close(self) -> int:
        """Its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(_SECONDS_MAX)
        finally:
            self.process.kill()
            self._manager.close()


@contextmanager
def _watched(directory: Path, interval_seconds: float = 0.25) -> Iterator[_Watched]:
    watched = _Watched(directory, interval_seconds)
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


def _ends_to(daemon: int, program: int) -> Iterator[int]:
    """Copies of what the daemon may have made to write to the program: ends of its pipes, pairs of sockets."""
    pipes = {os.readlink(f"/proc/{program}/fd/0")}
    process = os.pidfd_open(daemon)
    for name in os.listdir(f"/proc/{daemon}/fd"):
        link = os.readlink(f"/proc/{daemon}/fd/{name}")
        if link not in pipes and not link.startswith("socket:"):
            continue
        end = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, process, int(name), 0)
        assert end >= 0, os.strerror(ctypes.get_errno())
        if link in pipes:
            yield end
        else:
            with socket.socket(fileno=os.dup(end)) as peer:
                maker = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                is_listening = peer.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if maker == daemon and not is_listening:
                yield end
        os.close(end)
    os.close(process)


def _is_stopped(pid: int) -> bool:
    """Each of its threads: a signal stops them one by one."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it was at its end
            if (task / "stat").read_text().rpartition(") ")[2][0] != "T":
                return False
    return True


def _waits_for_a_page(pid: int) -> bool:
    return "handle_userfault" in Path(f"/proc/{pid}/stack").read_text(encoding="ascii")


def test_daemon_dies_while_the_program_reads_into_a_page_that_is_out(tmp_path: Path) -> None:
    """The successor closes the other end, and must not have to wait for the reader, whose page waits for it."""
    with _watched(tmp_path, _QUIET_SECONDS) as watched:
        watched.wait_fed()  # and no round comes in between what follows
        pid, daemon = int(watched.client()["pid"]), watched.daemon_pid()
        with ControlClient(watched.socket_path) as control:
            control.request("pageout", pid=pid)
        os.kill(daemon, signal.SIGSTOP)
        try:
            wait_until("no thread of it serves a fault any more", lambda: _is_stopped(daemon))
            for end in _ends_to(daemon, pid):
                with contextlib.suppress(OSError):  # one to read from
                    os.write(end, b"?\n")
            wait_until("it waits for a page", lambda: _waits_for_a_page(pid))
        finally:
            os.kill(daemon, signal.SIGKILL)
        try:
            watched.wait_fed()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it would hold everybody up for ever


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
