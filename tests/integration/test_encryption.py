# SPDX-License-Identifier: MIT
"""Encrypted backends: pages come back, over the daemon's death too; on the disk there is nothing that anybody can read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from support.limited import MIB, LimitedProgram, command_path, python_argv, run_limited
from support.sampler import ControlClient, answering_pid
from vswapd import spillfile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from integration.conftest import DaemonProcess

_MARK = b"fourteen plain characters of mine"
_SECONDS_MAX = 60.0

# Pages of noise, stored as they are, each with the mark in its middle. Goes over them at random, rewriting some, until
# it is told to end; then all must be right.
_PROGRAM = f"""
import json, random, select, sys
pages, page = {{mib}} * 256, 4096
memory, versions, chance = bytearray(pages * page), [0] * pages, random.Random(1)

def content(number):
    noise = random.Random(number * 1_000_003 + versions[number])
    return noise.randbytes(2000) + {_MARK!r} + noise.randbytes(page - 2000 - {len(_MARK)})

for number in range(pages):
    memory[number * page : (number + 1) * page] = content(number)
wrong, looks = 0, 0
while not select.select([sys.stdin], [], [], 0)[0]:
    for number in chance.choices(range(pages), k=256):
        wrong += memory[number * page : (number + 1) * page] != content(number)
        looks += 1
        if chance.random() < 0.3:
            versions[number] += 1
            memory[number * page : (number + 1) * page] = content(number)
for number in range(pages):
    wrong += memory[number * page : (number + 1) * page] != content(number)
print(json.dumps({{"wrong": wrong, "looks": looks}}))
"""


def _marked(mib: int) -> list[str]:
    return python_argv(_PROGRAM.replace("{mib}", str(mib)))


def _has_mark(path: Path) -> bool:
    """Reads around the page cache's back: the daemon writes O_DIRECT, which drops what is cached."""
    with path.open("rb") as file:
        data = file.read()
    return _MARK[:12] in data


def _wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, f"never {what}"
        time.sleep(0.02)  # polling another process's state


def _sealed_generations(path: Path, seen: dict[int, bytes]) -> None:
    """Look at all segments: a generation that was seen before has the same bytes it had, or the nonces are used twice."""
    damaged: list[object] = []
    for segment in spillfile.read_segments(path, damaged.append):  # one may be half written right now
        assert segment.is_sealed
        assert seen.setdefault(segment.generation, segment.used[:4096]) == segment.used[:4096]


@pytest.mark.parametrize("encrypt", [True, False])
def test_pages_on_disk(tmp_path: Path, encrypt: bool) -> None:
    """Over four deaths of the daemon; and the search finds them when they are not encrypted."""
    spill = tmp_path / "spill"
    options = ["--private", "--pool", "2M", "--spill", f"{spill}:512M", *["--encrypt"] * encrypt]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    argv = ["sh", "-c", 'exec "$@" <"$0"', str(fifo), *_marked(64)]
    seen: dict[int, bytes] = {}
    with LimitedProgram(24 * MIB, argv, options=options) as program, fifo.open("w") as stdin:
        path = program.socket_path
        for _ in range(4 if encrypt else 0):
            pid = answering_pid(path, _SECONDS_MAX)
            with ControlClient(path, 30.0) as control:
                (backend,) = control.status(30.0)["backends"]
                assert backend["encrypted"] is True
                _wait(lambda: control.status(30.0)["backends"][0]["written_bytes"] > 8 * MIB, "8 MiB written")
            _sealed_generations(spill, seen)
            os.kill(pid, signal.SIGKILL)
            assert answering_pid(path, _SECONDS_MAX) != pid
            assert not _has_mark(spill)
            _sealed_generations(spill, seen)
        with ControlClient(path, 30.0) as control:
            _wait(lambda: control.status(30.0)["backends"][0]["live_bytes"] > 8 * MIB, "8 MiB on disk")
        assert _has_mark(spill) is not encrypt
        stdin.write("end\n")
        stdin.flush()
        result = program.wait()
    assert result.status == 0, result.describe()
    answer = json.loads(result.stdout)
    assert answer["wrong"] == 0
    assert answer["looks"] > 0
    assert not encrypt or len(seen) > 20


def test_private_spill_file(verify_memory: str) -> None:
    argv = [verify_memory, "--mib", "96", "--kind", "mixed", "--passes", "2", "--fork"]
    result = run_limited(24 * MIB, argv, options=["--private", "--encrypt", "--pool", "4M"])
    assert result.status == 0, result.describe()
    assert json.loads(result.stdout)["wrong_pages"] == 0
    (backend,) = result.stats["backends"]
    assert backend["encrypted"] is True
    assert backend["read_bytes"] > 0


def _ctl(daemon: DaemonProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [command_path("vswapctl"), arguments[0], "--socket", daemon.socket_path, *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def _backends(daemon: DaemonProcess) -> dict[str, Any]:
    with daemon.control() as control:
        return {backend["path"]: backend for backend in control.status(30.0)["backends"]}


def test_drains_between_plain_and_encrypted(daemon: DaemonProcess, verify_memory: str, tmp_path: Path) -> None:
    """Each way, and from key to key, under a program that verifies; compaction under one key, by an upgraded daemon."""
    argv = [verify_memory, "--mib", "96", "--kind", "mixed", "--seconds", "8"]
    command = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "24M", "--pool", "3M"]
    last = tmp_path / "spill"
    with subprocess.Popen([*command, "--", *argv], stdout=subprocess.PIPE) as process:
        for name, options in (("a", ["--encrypt"]), ("b", ["--encrypt"]), ("c", []), ("d", ["--encrypt"])):
            path = tmp_path / name
            _wait(lambda last=last: _backends(daemon)[str(last)]["live_bytes"] > 4 * MIB, f"4 MiB on {last}")
            added = _ctl(daemon, "swapon", str(path), "--size", "1G", "--priority", "0", *options)
            assert added.returncode == 0, added.stderr
            assert ("encrypted" in added.stdout) == bool(options)
            assert _backends(daemon)[str(path)]["encrypted"] == bool(options)
            drained = _ctl(daemon, "swapoff", str(last))
            assert drained.returncode == 0, drained.stderr
            assert last.stat().st_size == 0
            last = path
        swaps = _ctl(daemon, "swaps").stdout
        assert str(last) in swaps
        assert "file,encrypted" in swaps
        assert "encrypted" in _ctl(daemon, "status").stdout
        before = answering_pid(daemon.socket_path, _SECONDS_MAX)
        upgraded = _ctl(daemon, "upgrade")
        assert upgraded.returncode == 0, upgraded.stderr
        assert answering_pid(daemon.socket_path, _SECONDS_MAX) != before
        assert _backends(daemon)[str(last)]["encrypted"] is True
        compacted = _ctl(daemon, "compact", str(last))
        assert compacted.returncode == 0, compacted.stderr
        with daemon.control() as control:
            assert control.request("test-check", 60.0).get("valid") is True
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(output)["wrong_pages"] == 0


def test_no_core_dump_has_the_key(tmp_path: Path, daemon: DaemonProcess) -> None:
    """With an encrypted backend the kernel writes none of the daemon; the memory with the keys is in none anyway."""
    pid = answering_pid(daemon.socket_path, _SECONDS_MAX)
    text = (tmp_path.__class__("/proc") / str(pid) / "smaps").read_text()
    state = text[text.index("memfd:vswap-state") :]
    flags = next(line for line in state.splitlines() if line.startswith("VmFlags"))
    assert " dd" in flags, flags
    added = _ctl(daemon, "swapon", str(tmp_path / "a"), "--size", "16M", "--encrypt")
    assert added.returncode == 0, added.stderr
    os.kill(pid, signal.SIGABRT)  # its end by signal, with a core where one may be
    assert answering_pid(daemon.socket_path, _SECONDS_MAX) != pid
    assert _backends(daemon)[str(tmp_path / "a")]["encrypted"] is True
    assert list(tmp_path.glob("core*")) == []
