# SPDX-License-Identifier: MIT
"""The commands of README and man pages do what they say: run as they stand, in order."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.limited import MIB
from support.readme import Example, examples_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_README = Path(__file__).parents[2] / "README.md"
_MANUAL = sorted((_README.parent / "man").iterdir())
_EXAMPLES = examples_of(_README.read_text(encoding="utf-8"))
_EXAMPLES += [
    Example(line.removeprefix(".Dl ").replace("4711", "PID"))
    for page in _MANUAL
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.startswith(".Dl ")
]
_SECONDS_MAX = 120.0

# By the command's first word.
_NOT_RUN = {
    "scripts/demo": "it installs packages, and runs for minutes",
    "scripts/test": "it would run this test again",
    "pip": "test_systemd.py does, in an environment of its own",
}

# The programs that the README leaves to the reader. More than the smallest limit shown, so that it matters.
_PROGRAM = f"""#!/usr/bin/env python3
memory = bytearray({96 * MIB})
memory[::4096] = b"x" * {96 * MIB // 4096}
assert memory.count(b"x") == {96 * MIB // 4096}
print("done")
"""
_PROGRAMS = ("job.py", "program", "db", "test")
_SYSTEM_SOCKET = "/run/vswapd/vswapd.sock"
_DISK = "/dev/nvme1n1"
_DISK_BYTES = 64 * MIB
_MOUNTED = "/mnt/fast"  # a directory on a disk

# A process for `PID`: it has memory to move, until it is ended.
_RESIDENT = f"import signal; memory = b'x' * {48 * MIB}; signal.pause()"


def _first_word(example: Example) -> str:
    return example.command.split()[0]


_RUN = [example for example in _EXAMPLES if _first_word(example) not in _NOT_RUN]


@contextlib.contextmanager
def _disk(directory: Path) -> Iterator[str]:
    """A block device of our own; where there are none to have, a file, which is as good to --spill."""
    image = directory / "disk"
    with image.open("wb") as file:
        file.truncate(_DISK_BYTES)
    attach = ["losetup", "--find", "--show", str(image)]
    attached = subprocess.run(attach, check=False, capture_output=True, text=True)
    if attached.returncode != 0:
        yield f"{image}:{_DISK_BYTES}"
        return
    device = attached.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


class Reader:
    """Someone who types the commands in a shell, one after the other."""

    def __init__(self, directory: Path, disk: str) -> None:
        self._directory = directory
        self._disk = disk
        self._socket = str(directory / "vswapd.sock")
        self._servers: list[subprocess.Popen[bytes]] = []
        self._resident: subprocess.Popen[bytes] | None = None
        scripts = sysconfig.get_path("scripts")
        path = os.pathsep.join([scripts, str(directory), os.environ["PATH"]])
        self._environment = {**os.environ, "PATH": path, "VSWAPD_SOCKET": self._socket}

    def _wait(self, what: str, is_so: Callable[[], object], seconds_max: float = 30.0) -> None:
        deadline = time.monotonic() + seconds_max
        while not is_so():
            assert time.monotonic() < deadline, f"after {seconds_max} s still not: {what}"
            time.sleep(0.02)  # polling another process's state

    def _clients(self) -> list[dict[str, Any]]:
        result = self._shell("vswapctl status --json")
        clients: list[dict[str, Any]] = json.loads(result.stdout)["clients"]
        return clients

    def _managed_pid(self) -> int:
        """The process that stands for every `PID`."""
        if self._resident is None:
            command = ["vswapctl", "run", "--limit", "64M", "--", "python3", "-c", _RESIDENT]
            self._resident = subprocess.Popen(command, env=self._environment)
            self._wait("the process is managed", self._clients)
        return int(self._clients()[0]["pid"])

    def _as_here(self, command: str) -> str:
        """With what the reader has for what the README names."""
        command = command.replace(os.path.dirname(_SYSTEM_SOCKET), str(self._directory)).replace(_DISK, self._disk)
        command = command.replace(_MOUNTED, str(self._directory))
        command = command.replace("scripts/setup", str(_README.parent / "scripts/setup"))
        command = command.replace(".venv/bin/", f"{sysconfig.get_path('scripts')}/")
        command = command.replace("install-service", f"install-service --root {self._directory}/root")
        return re.sub(r"\bPID\b", lambda _: str(self._managed_pid()), command)

    def _shell(self, command: str) -> subprocess.CompletedProcess[str]:
        # -e: each of the commands of a line must succeed.
        return subprocess.run(
            ["bash", "-ec", command],
            check=False,
            cwd=self._directory,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS_MAX,
        )

    def start(self, command: str) -> None:
        """A server, until the end."""
        command = self._as_here(command)
        self._servers.append(
            subprocess.Popen(["bash", "-ec", f"exec {command}"], cwd=self._directory, env=self._environment)
        )
        socket_path = re.search(r"--socket (\S+)", command)
        assert socket_path, "a server whose socket the README does not name"
        self._wait(command, lambda: self._shell(f"vswapctl status --socket {socket_path[1]}").returncode == 0)

    def run(self, command: str) -> str:
        """What it says; AssertionError when it fails."""
        result = self._shell(self._as_here(command))
        assert result.returncode == 0, f"{command}: status {result.returncode}: {result.stdout}{result.stderr}"
        return result.stdout

    def close(self) -> None:
        """Everything ends, and in order."""
        for process in [*filter(None, [self._resident]), *self._servers]:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert [server.returncode for server in self._servers] == [0] * len(self._servers)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    directory = tmp_path_factory.mktemp("readme")
    for name in _PROGRAMS:
        (directory / name).write_text(_PROGRAM, encoding="utf-8")
        (directory / name).chmod(0o755)
    with _disk(directory) as disk:
        typing = Reader(directory, disk)
        yield typing
        typing.close()


@pytest.mark.parametrize("example", _RUN, ids=[example.command.split("  ")[0] for example in _RUN])
def test_command(reader: Reader, example: Example) -> None:
    command = re.sub(r"\s+#.*", "", example.command)
    if command.endswith("&"):
        reader.start(command.removesuffix("&"))
        return
    output = reader.run(command)
    if example.output:
        assert shape_of(output) == shape_of("\n".join(example.output))
    elif "vswapctl run" in command:
        assert output == "done\n"  # the command's own, and nothing else


def test_what_is_not_run_is_still_there() -> None:
    assert set(_NOT_RUN) <= set(map(_first_word, _EXAMPLES))
    assert _RUN
