# SPDX-License-Identifier: MIT
"""The system daemon and its configuration: a real vswapd, real clients, SIGHUP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

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


def _wait(what: str, is_so: Callable[[], object]) -> None:
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

    def start(self) -> None:
        """Until it answers."""
        with self.log.open("wb") as log:
            command = [command_path("vswapd"), "--config", str(self.conf)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        _wait("the daemon answers", self.answers)

    def signal(self, number: int) -> None:
        """To the daemon."""
        assert self._process
        self._process.send_signal(number)

    def stop(self) -> int:
        """Its exit status."""
        assert self._process
        self._process.terminate()
        return self._process.wait(_SECONDS_MAX)

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


_BATCH = '[[group]]\nname = "batch"\nlimit = "{0}"\n'


def test_configured_group_bounds_its_programs_and_follows_a_reload(tmp_path: Path) -> None:
    with serving(tmp_path, _BATCH.format("48M")) as service:
        with program(service, "batch"):
            assert service.group("batch")["swapped_bytes"] > 32 * MIB
            assert service.group("batch")["usage_bytes"] <= 64 * MIB
            service.write(_BATCH.format("96M"))
            service.signal(signal.SIGHUP)
            _wait("the limit is the new one", lambda: service.group("batch")["limit_bytes"] == 96 * MIB)
        _wait("the client has ended", lambda: not service.status()["clients"])
        assert service.group("batch"), "it stands, with nobody in it"


def test_reload_with_a_mistake_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, _BATCH.format("48M")) as service:
        service.write(_BATCH.format("64M"), more="x = 1\n")
        service.signal(signal.SIGHUP)
        _wait("the log names it", lambda: "vswapd.conf:3: unknown key 'x'" in service.log.read_text())
        assert service.group("batch")["limit_bytes"] == 48 * MIB


def test_start_with_a_mistake_is_refused(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.write(_BATCH.format("1"), more="x = 1\n")
    result = subprocess.run(
        [command_path("vswapd"), "--config", str(service.conf)], check=False, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [f"{service.conf}:{n}" for n in (3, 9)]
    assert not service.answers()


@pytest.mark.parametrize(("name", "text"), [("nosuch", "no group 'nosuch' of yours"), ("", "no group ''")])
def test_run_in_a_group_that_is_not_there(tmp_path: Path, name: str, text: str) -> None:
    with serving(tmp_path) as service:
        command = [command_path("vswapctl"), "run", "--socket", service.socket_path, "--group", name, "true"]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (1, "")
        assert text in result.stderr


def test_statistics_of_a_run_in_a_group(tmp_path: Path) -> None:
    with serving(tmp_path, _BATCH.format("48M")) as service:
        options = ["--socket", service.socket_path, "--group", "batch", "--stats", str(tmp_path / "stats")]
        subprocess.run([command_path("vswapctl"), "run", *options, "true"], check=True)
        document = json.loads((tmp_path / "stats").read_text())
        assert (document["run"]["group"], document["run"]["limit_bytes"]) == ("batch", 48 * MIB)


def test_metrics_of_the_real_engine(tmp_path: Path) -> None:
    address = str(tmp_path / "metrics.sock")
    with serving(tmp_path, _BATCH.format("48M"), more=f'metrics = "{address}"\n') as service, program(service, "batch"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text\r\n\r\n")
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        families = list(parse_openmetrics(answer.decode().partition("\r\n\r\n")[2]))
        values = {sample.name: sample.value for family in families for sample in family.samples}
        assert values["vswapd_group_swapped_pages"] * 4096 > 32 * MIB
        assert values["vswapd_faults_total"] >= values["vswapd_group_faults_total"] > 0
        assert values["vswapd_evicted_pages_total"] > 0
    assert not os.path.exists(address)
