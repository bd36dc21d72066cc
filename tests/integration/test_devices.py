# SPDX-License-Identifier: MIT
"""A spill device that hangs: a file system of the test's own (support/hanging_fs.py)."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.limited import command_path
from support.service import Service, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

_SUPPORT = Path(__file__).parent.parent / "support"
_SECONDS_MAX = 60.0


class Device:
    """A spill file that can be made to hang."""

    def __init__(self, directory: Path) -> None:
        self.mountpoint = directory / "device"
        self.mountpoint.mkdir()
        self.path = self.mountpoint / "spill"
        self._control = directory / "control"
        self.answer()
        command = [sys.executable, str(_SUPPORT / "hanging_fs.py"), str(self.mountpoint), str(self._control)]
        self._server = subprocess.Popen(command)
        wait_until("the device is there", self.path.exists)

    def hang(self) -> None:
        """From now on it answers nothing."""
        self._control.write_text("hang")

    def answer(self) -> None:
        """What waits, too."""
        self._control.write_text("")

    def waiting(self) -> int:
        """Requests that it does not answer."""
        told = self._control.with_suffix(".waiting")
        return int(told.read_text() or 0) if told.exists() else 0

    def close(self) -> None:
        """Leave nothing behind."""
        self.answer()
        self._server.kill()
        self._server.wait()
        subprocess.run(["umount", "--lazy", str(self.mountpoint)], check=True)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """One that works."""
    made = Device(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def near_and_far(tmp_path_factory: pytest.TempPathFactory) -> str:
    """tests/support/near_and_far.c, built."""
    program = tmp_path_factory.mktemp("near_and_far") / "near_and_far"
    source = str(_SUPPORT / "near_and_far.c")
    subprocess.run(["cc", "-std=gnu11", "-O2", "-o", str(program), source, "-pthread"], check=True)
    return str(program)


class Client:
    """near_and_far, at its input."""

    def __init__(self, run: subprocess.Popen[str]) -> None:
        self._run = run

    def ask(self, word: str) -> None:
        """Have it do that."""
        assert self._run.stdin
        self._run.stdin.write(f"{word}\n")
        self._run.stdin.flush()

    def answer(self) -> str:
        """What it says next."""
        assert self._run.stdout
        return self._run.stdout.readline().strip()


@contextmanager
def _serving(directory: Path, device: Device, more: str = "") -> Iterator[Service]:
    service = Service(directory)
    service.conf.write_text(
        f'[daemon]\nsocket = "{service.socket_path}"\n'
        f'[[backend]]\npath = "{device.path}"\nsize = "512M"\n{more}',
        encoding="utf-8",
    )
    service.start()
    try:
        yield service
    finally:
        device.answer()
        status = service.stop()
    assert status == 0, service.log.read_text()


@contextmanager
def _client(service: Service, program: str) -> Iterator[Client]:
    """With 16 MiB of near pages and 64 MiB of far ones, of which most are on the device."""
    argv = [command_path("vswapctl"), "run", "--socket", service.socket_path, "--limit", "32M", "--pool", "8M"]
    with subprocess.Popen(
        [*argv, "--", program, "16", "64"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        try:
            client = Client(run)
            assert client.answer() == "ready"
            yield client
        finally:
            run.terminate()


def _run_beside(service: Service, verify_memory: str) -> int:
    """Exit status of a command in a group of its own, that fits RAM when compressed."""
    argv = [command_path("vswapctl"), "run", "--socket", service.socket_path, "--limit", "32M", "--", verify_memory]
    argv += ["--mib", "40", "--kind", "third", "--passes", "2"]
    return subprocess.run(argv, check=False, stdout=subprocess.DEVNULL, timeout=_SECONDS_MAX).returncode


def test_hanging_reads_keep_only_their_own_waiting(
    device: Device, near_and_far: str, verify_memory: str, tmp_path: Path
) -> None:
    """Pages that need no device are given back meanwhile; those that do are right once it answers again."""
    with _serving(tmp_path, device) as service, _client(service, near_and_far) as client:
        device.hang()
        client.ask("far")
        wait_until("a read hangs", device.waiting)
        client.ask("near")
        assert client.answer() == "near 0 0"
        assert _run_beside(service, verify_memory) == 0
        assert service.answers()
        assert device.waiting()
        device.answer()
        assert client.answer() == "far 0 0"


def test_hanging_write_stalls_no_command(device: Device, near_and_far: str, verify_memory: str, tmp_path: Path) -> None:
    """The group whose objects are being written has ended, and cannot be taken apart: nobody waits for that."""
    with _serving(tmp_path, device) as service:
        with _client(service, near_and_far) as client:
            device.hang()
            client.ask("fresh")
            wait_until("a write hangs", device.waiting)
        wait_until("its client is gone", lambda: not service.status()["clients"])
        assert device.waiting()
        assert _run_beside(service, verify_memory) == 0
        assert device.waiting()
        device.answer()
        wait_until("the groups are gone", lambda: not service.status()["groups"])


def _backend(service: Service, path: Path) -> dict[str, Any]:
    return next(backend for backend in service.status()["backends"] if backend["path"] == str(path))


@pytest.mark.parametrize("priority", [0, -5])
def test_hanging_write_keeps_no_other_backend_waiting(
    device: Device, near_and_far: str, tmp_path: Path, priority: int
) -> None:
    """What leaves the pool goes to the others meanwhile, of a lower priority too; nothing is lost."""
    other = tmp_path / "other"
    more = f'[[backend]]\npath = "{other}"\nsize = "512M"\npriority = {priority}\n'
    with _serving(tmp_path, device, more) as service, _client(service, near_and_far) as client:
        device.hang()
        before = _backend(service, other)["written_bytes"]
        client.ask("fresh")
        assert client.answer() == "fresh 0 0"
        assert device.waiting()
        assert _backend(service, other)["written_bytes"] > before + (32 << 20)
        wait_until("it is known to hang", lambda: _backend(service, device.path)["writing_ms"] > 1000)
        shown = [command_path("vswapctl"), "status", "--socket", service.socket_path]
        assert "does not answer" in subprocess.run(shown, capture_output=True, check=True, text=True).stdout
        client.ask("near")
        assert client.answer() == "near 0 0"
        device.answer()
        client.ask("far")
        assert client.answer() == "far 0 0"
        wait_until("the write has ended", lambda: not _backend(service, device.path)["writing_ms"])
