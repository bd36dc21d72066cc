# SPDX-License-Identifier: MIT
"""What integration tests need of the machine, the programs they compile, and the daemons they start.

A machine that cannot run them skips them with the reason. One that can must not skip any: with CI=true
a skip there is turned into a failure.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.driving import build_drive
from support.limited import GoingOn, command_path
from support.sampler import ControlClient
from vswapd import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

_SUPPORT = Path(__file__).parent.parent / "support"
_KERNEL_MIN = (6, 12)


def _missing() -> str:
    """Why this machine cannot run the integration tests; '' when it can."""
    release = os.uname().release
    if tuple(int(part) for part in release.split("-")[0].split(".")[:2]) < _KERNEL_MIN:
        return f"Linux {release} is older than 6.12"
    if os.geteuid() != 0:
        return "not root: a private daemon needs CAP_SYS_PTRACE"
    try:
        os.close(os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/userfaultfd: {error.strerror}"
    return ""


_MISSING = _missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)
            if _MISSING:
                item.add_marker(pytest.mark.skip(reason=_MISSING))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not _MISSING and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped on a machine that can run it, which CI does not allow: {report.longrepr}"
    return report


# ---- programs ----


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the C programs of tests/support that are clients."""
    directory = tmp_path_factory.mktemp("programs")
    for name in ("verify_memory", "churn", "fork_early", "races", "puppet", "siblings"):
        command = [
            "cc",
            "-std=gnu11",
            "-O2",
            "-g",
            "-o",
            str(directory / name),
            str(_SUPPORT / f"{name}.c"),
            "-pthread",
        ]
        subprocess.run(command, check=True)
    return directory


@pytest.fixture(scope="session")
def verify_memory(compiled: Path) -> str:
    """tests/support/verify_memory.c, built."""
    return str(compiled / "verify_memory")


@pytest.fixture(scope="session")
def churn(compiled: Path) -> str:
    """tests/support/churn.c, built."""
    return str(compiled / "churn")


@pytest.fixture(scope="session")
def fork_early(compiled: Path) -> str:
    """tests/support/fork_early.c, built."""
    return str(compiled / "fork_early")


@pytest.fixture(scope="session")
def siblings(compiled: Path) -> str:
    """tests/support/siblings.c, built."""
    return str(compiled / "siblings")


@pytest.fixture(scope="session")
def races(compiled: Path) -> str:
    """tests/support/races.c, built."""
    return str(compiled / "races")


@pytest.fixture(scope="session")
def empty_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A client library that does nothing."""
    directory = tmp_path_factory.mktemp("empty")
    source = directory / "empty.c"
    source.write_text("typedef int empty_translation_unit;\n")
    library = directory / "libvswap.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """tests/support/drive.c with fault and crash points: the data plane without Python."""
    return build_drive(tmp_path_factory.mktemp("drive") / "drive")


@pytest.fixture(scope="session")
def stage_programs(drive: str, compiled: Path) -> dict[str, str]:
    """What support/puppets.py runs."""
    return {"drive": drive, "puppet": str(compiled / "puppet")}


@pytest.fixture(scope="session")
def client_library() -> str:
    """The client library that is installed."""
    return paths.library()


@pytest.fixture
def going_on(tmp_path: Path) -> GoingOn:
    """For one program or more; two minutes at most."""
    return GoingOn(tmp_path, 120.0)


# ---- daemons ----


class DaemonProcess:
    """A running `vswapd`."""

    def __init__(self, process: subprocess.Popen[bytes], socket_path: str, log: Path) -> None:
        self.process = process
        self.socket_path = socket_path
        self.log = log

    def control(self) -> ControlClient:
        """A new control connection."""
        return ControlClient(self.socket_path, 30.0)

    def descriptor_count(self) -> int:
        """Open descriptors of the daemon."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wait_client(self, figure: str, least: int = 1, pid: int = 0, seconds_max: float = 20.0) -> int:
        """PID of a client, `pid` if that is given, of which `figure` is at least so much: waited for. AssertionError."""
        deadline = time.monotonic() + seconds_max
        with self.control() as control:
            while True:
                for client in control.status()["clients"]:
                    if client[figure] >= least and pid in (0, client["pid"]):
                        return int(client["pid"])
                assert time.monotonic() < deadline, f"{figure} of {pid or 'a client'} is never {least}"
                time.sleep(0.02)  # polling another process's state

    def wait_no_clients(self, seconds_max: float = 20.0) -> dict[str, object]:
        """Until no client and no group is left; returns the status then. AssertionError."""
        deadline = time.monotonic() + seconds_max
        with self.control() as control:
            while True:
                status = control.status()
                if not status["clients"] and not status["groups"]:
                    return status
                assert time.monotonic() < deadline, f"clients are left: {status['clients']} {status['groups']}"
                time.sleep(0.02)  # polling another process's state


@contextlib.contextmanager
def _daemon(
    directory: Path, options: list[str], descriptors: int = 0, prefix: Sequence[str] = ()
) -> Iterator[DaemonProcess]:
    """A system daemon; stopped in order at the end. `descriptors`: how many it may have open; `prefix`: before it."""
    socket_path = str(directory / "vswapd.sock")
    log = directory / "vswapd.log"
    command = [*prefix, command_path("vswapd"), "--socket", socket_path, *options]
    environment = {**os.environ, "VSWAPD_TEST_OPERATIONS": "1"}
    limits = (descriptors, descriptors) if descriptors else resource.getrlimit(resource.RLIMIT_NOFILE)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
        )
    running = DaemonProcess(process, socket_path, log)
    try:
        _wait_answering(running)
        yield running
    finally:
        process.terminate()
        try:
            status = process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = -1
        sys.stderr.write(log.read_text(errors="replace"))
    assert status == 0, f"vswapd ended with {status}"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A system daemon of the test's own, with a spill file."""
    with _daemon(tmp_path, ["--spill", f"{tmp_path / 'spill'}:1G"]) as running:
        yield running


@pytest.fixture
def daemon_with(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """The same with other options, in which {directory} is one of the test's own: a function that starts it."""
    with contextlib.ExitStack() as stack:

        def start(*options: str, descriptors: int = 0, prefix: Sequence[str] = ()) -> DaemonProcess:
            texts = [option.format(directory=tmp_path) for option in options]
            return stack.enter_context(_daemon(tmp_path, texts, descriptors, prefix))

        yield start


def _wait_answering(running: DaemonProcess, seconds_max: float = 20.0) -> None:
    deadline = time.monotonic() + seconds_max
    while True:
        try:
            with running.control() as control:
                control.request("ping")
            return
        except OSError:
            text = running.log.read_text(errors="replace")
            assert running.process.poll() is None, f"vswapd did not start: {text}"
            assert time.monotonic() < deadline, f"vswapd does not answer: {text}"
            time.sleep(0.02)  # polling another process's state
