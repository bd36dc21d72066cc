# SPDX-License-Identifier: MIT
"""service — a real vswapd with a configuration file, and a program that is larger than its group."""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from support.limited import MIB, command_path
from support.sampler import ControlClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SECONDS_MAX = 30.0
_PROGRAM = f"""
import signal
memory = bytearray({96 * MIB})
memory[::4096] = b"x" * ({96 * MIB} // 4096)
print("ready", flush=True)
signal.pause()
"""


def wait_until(what: str, is_so: Callable[[], object]) -> None:
    """AssertionError when it does not come about."""
    deadline = time.monotonic() + _SECONDS_MAX
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)  # polling another process's state


class Service:
    """A vswapd with a configuration file of its own."""

    def __init__(self, directory: Path) -> None:
        self.conf = directory / "vswapd.conf"
        self.socket_path = str(directory / "vswapd.sock")
        self.log = directory / "vswapd.log"
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, groups: str, more: str = "") -> None:
        """The configuration, with `more` in [daemon]."""
        spill = f'[[backend]]\npath = "{self.conf.parent}/spill"\nsize = "1G"\n'
        daemon = f'[daemon]\nsocket = "{self.socket_path}"\n{more}'
        self.conf.write_text(daemon + spill + groups, encoding="utf-8")

    def answers(self) -> bool:
        """Whether it serves."""
        try:
            with ControlClient(self.socket_path) as control:
                return bool(control.request("ping"))
        except OSError:
            assert self._process is None or self._process.poll() is None, self.log.read_text()
            return False

    def daemon_pid(self) -> int:
        """The daemon's, not its supervisor's."""
        with ControlClient(self.socket_path) as control:
            return int(control.request("ping")["pid"])

    def start(self) -> None:
        """Until it answers."""
        with self.log.open("wb") as log:
            command = [command_path("vswapd"), "--config", str(self.conf)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until("the daemon answers", self.answers)

    def signal(self, number: int) -> None:
        """To the daemon."""
        assert self._process
        self._process.send_signal(number)

    def reload(self) -> None:
        """Have it read its configuration again."""
        self.signal(signal.SIGHUP)

    def wait(self) -> int:
        """Until it has ended; its exit status."""
        assert self._process
        return self._process.wait(_SECONDS_MAX)

    def stop(self) -> int:
        """Its exit status."""
        assert self._process
        if self._process.poll() is None:
            self._process.terminate()
        return self.wait()

    def status(self) -> dict[str, Any]:
        """As it answers."""
        with ControlClient(self.socket_path) as control:
            return control.status()

    def group(self, name: str) -> dict[str, Any]:
        """What it says of a group; {} when there is none."""
        return next((group for group in self.status()["groups"] if group["name"] == name), {})


@contextmanager
def serving(directory: Path, groups: str = "", more: str = "") -> Iterator[Service]:
    """A running one, stopped in order at the end."""
    service = Service(directory)
    service.write(groups, more)
    service.start()
    try:
        yield service
    finally:
        status = service.stop()
    assert status == 0, service.log.read_text()


@contextmanager
def program(service: Service, group: str) -> Iterator[int]:
    """PID of a managed process in the group that holds more than its limit."""
    command = [command_path("vswapctl"), "run", "--socket", service.socket_path, "--group", group]
    with subprocess.Popen([*command, "--", "python3", "-c", _PROGRAM], stdout=subprocess.PIPE) as run:
        try:
            assert run.stdout
            assert run.stdout.readline() == b"ready\n"
            yield next(int(client["pid"]) for client in service.status()["clients"])
        finally:
            run.terminate()
