# SPDX-License-Identifier: MIT
"""Backends that come and go under programs that verify every byte; whoever dies in the middle."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from support.limited import MIB, command_path, python_argv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from integration.conftest import DaemonProcess

_PAGE_BYTES = 4096


def _ctl(daemon: DaemonProcess, *arguments: str, seconds_max: float = 120.0) -> subprocess.CompletedProcess[str]:
    command = [command_path("vswapctl"), arguments[0], "--socket", daemon.socket_path, *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds_max, check=False)


def _done(daemon: DaemonProcess, *arguments: str) -> str:
    ended = _ctl(daemon, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def _refused(daemon: DaemonProcess, *arguments: str) -> str:
    """The one line."""
    ended = _ctl(daemon, *arguments)
    assert ended.returncode == 1, ended
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


@contextlib.contextmanager
def _running(
    daemon: DaemonProcess, limit_mib: int, argv: list[str], *options: str
) -> Iterator[subprocess.Popen[bytes]]:
    command = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", f"{limit_mib}M"]
    with subprocess.Popen(
        [*command, *options, "--", *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def _status(daemon: DaemonProcess) -> dict[str, Any]:
    with daemon.control() as control:
        return control.status(30.0)


def _backend(daemon: DaemonProcess, path: Path) -> dict[str, Any]:
    return next(entry for entry in _status(daemon)["backends"] if entry["path"] == str(path))


def _wait(condition: Callable[[], bool], what: str, seconds_max: float = 60.0) -> None:
    deadline = time.monotonic() + seconds_max
    while not condition():
        assert time.monotonic() < deadline, f"never {what}"
        time.sleep(0.02)  # polling another process's state


def _wait_spilled(daemon: DaemonProcess, path: Path, least_mib: int) -> None:
    _wait(lambda: _backend(daemon, path)["live_bytes"] >= least_mib * MIB, f"{least_mib} MiB on {path}")


def _assert_right(process: subprocess.Popen[bytes], seconds_max: float = 120.0) -> None:
    output, _ = process.communicate(timeout=seconds_max)
    assert process.returncode == 0
    assert json.loads(output)["wrong_pages"] == 0


def _assert_valid(daemon: DaemonProcess) -> None:
    with daemon.control() as control:
        assert control.request("test-check", 60.0).get("valid") is True


# ---- under load ----


@pytest.mark.parametrize(("mib", "seconds"), [(128, 12), pytest.param(1024, 90, marks=pytest.mark.full)])
def test_backends_come_and_go_under_load(
    daemon: DaemonProcess, verify_memory: str, tmp_path: Path, mib: int, seconds: int
) -> None:
    """Two of equal priority at a time; the older one is compacted, drained and replaced, over and over."""
    argv = [verify_memory, "--mib", str(mib), "--kind", "mixed", "--seconds", str(seconds), "--fork", "--threads", "2"]
    paths = [tmp_path / "spill"]
    drained = 0
    with _running(daemon, mib // 4, argv, "--pool", f"{mib // 32}M") as process:
        _wait_spilled(daemon, paths[0], mib // 16)
        while process.poll() is None:
            paths.append(tmp_path / f"spill-{drained}")
            _done(daemon, "swapon", str(paths[-1]), "--size", "4G", "--priority", "0")
            older = paths.pop(0)
            _done(daemon, "compact", str(older))
            _done(daemon, "swapoff", str(older))
            assert older.stat().st_size == 0
            drained += 1
        _assert_right(process)
    assert drained >= 3, "too few to have met anything"
    _assert_valid(daemon)
    counters = _status(daemon)["counters"]
    assert counters["drained_pages"] > mib // 16 * MIB // _PAGE_BYTES
    assert counters["poisoned_pages"] == 0
    assert counters["check_failures"] == 0


def test_equal_priorities_share(daemon: DaemonProcess, verify_memory: str, tmp_path: Path) -> None:
    """Both are written to, each by a writer of its own; and a higher one is filled first."""
    for name, priority in (("a", "7"), ("b", "7"), ("c", "6")):
        _done(daemon, "swapon", str(tmp_path / name), "--size", "64M", "--priority", priority)
    argv = [verify_memory, "--mib", "96", "--kind", "random", "--seconds", "20"]
    with _running(daemon, 24, argv, "--pool", "4M"):
        _wait_spilled(daemon, tmp_path / "b", 16)
        assert _backend(daemon, tmp_path / "a")["used_bytes"] >= 4 * MIB
        assert _backend(daemon, tmp_path / "c")["used_bytes"] == 0


def test_swapoff_into_the_pool(daemon: DaemonProcess, verify_memory: str, tmp_path: Path) -> None:
    argv = [verify_memory, "--mib", "160", "--kind", "third", "--seconds", "8", "--order", "random"]
    with _running(daemon, 40, argv, "--pool", "4M") as process:
        _wait_spilled(daemon, tmp_path / "spill", 16)
        line = _refused(daemon, "swapoff", str(tmp_path / "spill"))
        assert "would have to move" in line
        assert _backend(daemon, tmp_path / "spill")["state"] == "active"
        group = _status(daemon)["groups"][0]
        assert group["spill_bytes"] == _backend(daemon, tmp_path / "spill")["live_bytes"] or process.poll() is None
    _wait(lambda: not _status(daemon)["clients"], "rid of the first one")
    argv = [verify_memory, "--mib", "160", "--kind", "third", "--seconds", "8", "--order", "random"]
    with _running(daemon, 48, argv) as process:
        _wait_spilled(daemon, tmp_path / "spill", 4)
        with daemon.control() as control:
            pid = control.status(30.0)["clients"][0]["pid"]
        _done(daemon, "limit", str(pid), "256M")
        lines = [json.loads(line) for line in _done(daemon, "swapoff", "--json", "-a").splitlines()]
        assert lines[-1]["event"] == "end"
        assert all(line["event"] == "progress" for line in lines[:-1])
        status = _status(daemon)
        assert (status["backends"], status["spill_pages"], status["spill_bytes"]) == ([], 0, 0)
        assert status["groups"][0]["spill_bytes"] == 0
        _assert_right(process)
    _assert_valid(daemon)


# ---- who dies in the middle ----


def _start_waiting_swapoff(daemon: DaemonProcess, path: Path) -> subprocess.Popen[bytes]:
    """A swapoff that has no room, and waits for it."""
    command = [command_path("vswapctl"), "swapoff", "--socket", daemon.socket_path, "--force", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _wait(lambda: _backend(daemon, path)["job_waiting"], "waiting for room")
    assert _backend(daemon, path)["state"] == "draining"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_swapoff_ends_with_its_command(
    daemon: DaemonProcess, verify_memory: str, tmp_path: Path, number: signal.Signals
) -> None:
    argv = [verify_memory, "--mib", "96", "--kind", "random", "--seconds", "8"]
    path = tmp_path / "spill"
    with _running(daemon, 24, argv, "--pool", "4M") as process:
        _wait_spilled(daemon, path, 32)
        swapoff = _start_waiting_swapoff(daemon, path)
        swapoff.send_signal(number)
        assert swapoff.wait(20) == (130 if number == signal.SIGINT else -signal.SIGKILL)
        _wait(lambda: _backend(daemon, path)["state"] == "active", "active again")
        assert _backend(daemon, path)["job"] == ""
        _assert_right(process)
    _assert_valid(daemon)


def test_swapoff_of_a_program_that_is_killed(daemon: DaemonProcess, verify_memory: str, tmp_path: Path) -> None:
    """What it held is gone with it, so there is nothing left to wait for."""
    argv = [verify_memory, "--mib", "96", "--kind", "random", "--seconds", "60", "--fork"]
    path = tmp_path / "spill"
    with _running(daemon, 24, argv, "--pool", "4M"):
        _wait_spilled(daemon, path, 32)
        swapoff = _start_waiting_swapoff(daemon, path)
        os.kill(_status(daemon)["clients"][0]["pid"], signal.SIGKILL)
        assert swapoff.wait(20) == 0
    assert _status(daemon)["backends"] == []
    assert path.stat().st_size == 0
    _assert_valid(daemon)


def test_swapoff_waits_for_room(daemon: DaemonProcess, verify_memory: str, tmp_path: Path) -> None:
    argv = [verify_memory, "--mib", "96", "--kind", "random", "--seconds", "8"]
    path = tmp_path / "spill"
    with _running(daemon, 24, argv, "--pool", "4M") as process:
        _wait_spilled(daemon, path, 32)
        swapoff = _start_waiting_swapoff(daemon, path)
        assert "not now" in _refused(daemon, "swapoff", str(path))
        assert "not now" in _refused(daemon, "compact", str(path))
        _done(daemon, "swapon", str(tmp_path / "other"), "--size", "256M")
        assert swapoff.wait(60) == 0
        _assert_right(process)
    _assert_valid(daemon)


def test_damaged_object_stays_where_it_is(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Bytes that changed on the disk are never moved on; all others are."""
    program = """
import mmap, os, sys
memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(memory), 4096):
    memory[at : at + 4096] = os.urandom(4096)
print("filled", flush=True)
sys.stdin.read()
"""
    path = tmp_path / "spill"
    with _running(daemon, 24, python_argv(program), "--pool", "4M") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"filled\n"
        _wait_spilled(daemon, path, 24)
        with path.open("r+b") as file:
            file.seek(MIB + MIB // 2)  # an object in the middle of a segment
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            os.fsync(file.fileno())
        _done(daemon, "swapon", str(tmp_path / "other"), "--size", "256M")

        def is_alone() -> bool:
            """The damaged one. In use again, the backend may have been written to since it was refused."""
            assert "cannot be read back" in _refused(daemon, "swapoff", str(path))
            backend = _backend(daemon, path)
            assert backend["state"] == "active"
            assert backend["extent_count"] >= 1
            return bool(backend["extent_count"] == 1)

        _wait(is_alone, "rid of all but the damaged one")
        process.communicate(b"")
    daemon.wait_no_clients()
    _done(daemon, "swapoff", str(path))


# ---- compaction ----

_SCATTERED = """
import mmap, random, sys, threading
PAGE, COUNT = 4096, int(sys.argv[1]) * 256
generator = random.Random(1)
memory = mmap.mmap(-1, COUNT * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def content(page):
    return random.Random(page).randbytes(PAGE)
for page in range(COUNT):
    memory[page * PAGE : (page + 1) * PAGE] = content(page)
pages = list(range(COUNT))
generator.shuffle(pages)
kept = pages[: COUNT * 3 // 10]
for page in pages[len(kept) :]:
    memory.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
print("scattered", flush=True)
stopping = False
def check(seed):
    order = kept[:]
    random.Random(seed).shuffle(order)
    for page in order:
        if memory[page * PAGE : (page + 1) * PAGE] != content(page):
            print("wrong page", page, flush=True)
            sys.exit(1)
        if stopping and seed:
            return
thread = threading.Thread(target=lambda: [check(seed) for seed in range(1, 1000) if not stopping])
thread.start()
sys.stdin.read()
stopping = True
thread.join()
check(0)
print("right", flush=True)
"""


@pytest.mark.parametrize("mib", [72, pytest.param(512, marks=pytest.mark.full)])
def test_compaction_returns_the_disk(daemon: DaemonProcess, tmp_path: Path, mib: int) -> None:
    """From 30 % live bytes to 95 %, while the program goes on faulting."""
    path = tmp_path / "spill"
    argv = [*python_argv(_SCATTERED), str(mib)]
    with _running(daemon, 20, argv, "--pool", "2M") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"scattered\n"
        before = _backend(daemon, path)
        disk_before = path.stat().st_blocks * 512
        # A large one is compacted by itself from here on, until half of it is live.
        assert before["live_bytes"] < (0.35 if mib < 100 else 0.5) * before["used_bytes"], before
        faults_before = _status(daemon)["counters"]["faults"]
        _done(daemon, "compact", str(path))
        after = _backend(daemon, path)
        assert _status(daemon)["counters"]["faults"] > faults_before, "nobody faulted meanwhile"
        print(f"live of used: {before['live_bytes'] / before['used_bytes']:.0%} before, ", end="")
        print(f"{after['live_bytes'] / after['used_bytes']:.1%} after", end="")
        disk = path.stat().st_blocks * 512
        print(f"; disk {disk_before // MIB} MiB before, {disk // MIB} after, {after['live_bytes'] // MIB} live")
        assert process.poll() is None
        slack_bytes = 2 * MIB if mib < 100 else 0  # a small one ends in a segment that is not full
        assert after["live_bytes"] >= 0.95 * (after["used_bytes"] - slack_bytes), after
        assert after["live_bytes"] >= 0.95 * (disk - slack_bytes), (disk, after)
        assert disk < 0.7 * disk_before
        output, _ = process.communicate(b"", timeout=60)
        assert output == b"right\n"
        assert process.returncode == 0
    _assert_valid(daemon)
    assert _status(daemon)["counters"]["compacted_pages"] > 0


def test_full_backend_is_compacted(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Writing stops while compaction still has a segment to begin with: a backend full of dead space is not stuck."""
    path = tmp_path / "full"
    _done(daemon, "swapon", str(path), "--size", "48M", "--priority", "5")
    with _running(daemon, 20, [*python_argv(_SCATTERED), "96"], "--pool", "2M") as process:
        _wait_spilled(daemon, tmp_path / "spill", 4)  # the next best: the other takes no more
        assert _backend(daemon, path)["used_bytes"] == 46 * MIB
        assert _backend(daemon, path)["room_bytes"] == 0
        assert process.stdout is not None
        assert process.stdout.readline() == b"scattered\n"
        _done(daemon, "compact", str(path))
        output, _ = process.communicate(b"", timeout=60)
        assert output == b"right\n"
        assert process.returncode == 0
    _assert_valid(daemon)
    assert _status(daemon)["counters"]["compacted_pages"] > 0


def test_dead_space_is_compacted_by_itself(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = tmp_path / "spill"
    with _running(daemon, 24, [*python_argv(_SCATTERED), "200"], "--pool", "2M") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"scattered\n"
        _wait(
            lambda: _backend(daemon, path)["live_bytes"] >= 0.49 * _backend(daemon, path)["used_bytes"]
            or _backend(daemon, path)["used_bytes"] < 64 * MIB,
            "less than half dead",
            240.0,  # in the writer's idle moments, of which a busy machine has few
        )
        output, _ = process.communicate(b"", timeout=60)
        assert output == b"right\n"
    assert _status(daemon)["counters"]["compacted_pages"] > 0


# ---- devices, and bad input ----


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A block device of 96 MiB, and the file behind it."""
    backing = tmp_path / "loop"
    with backing.open("wb") as file:
        file.truncate(96 * MIB)
    ended = subprocess.run(["losetup", "-f", "--show", str(backing)], capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"no loop device here: {ended.stderr.strip()}")
    yield ended.stdout.strip(), backing
    subprocess.run(["losetup", "-d", ended.stdout.strip()], check=True)


def test_device_in_use_and_out(
    daemon: DaemonProcess, verify_memory: str, tmp_path: Path, loop_device: tuple[str, Path]
) -> None:
    device, backing = loop_device
    _done(daemon, "swapon", device, "--priority", "9", "--discard")
    assert "partition" in _done(daemon, "swaps")
    assert "in use as a backend already" in _refused(daemon, "swapon", device)
    argv = [verify_memory, "--mib", "64", "--kind", "random", "--seconds", "6"]
    with _running(daemon, 20, argv, "--pool", "2M") as process:
        _wait(lambda: bool(_status(daemon)["backends"][1]["live_bytes"] > 16 * MIB), "on the device")
        assert backing.stat().st_blocks * 512 > 16 * MIB
        _done(daemon, "swapoff", device)
        assert backing.stat().st_blocks * 512 < MIB, "not discarded"
        _assert_right(process)
    assert [entry["path"] for entry in _status(daemon)["backends"]] == [str(tmp_path / "spill")]


def test_mounted_device_is_refused(daemon: DaemonProcess, tmp_path: Path, loop_device: tuple[str, Path]) -> None:
    device, _ = loop_device
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    assert "something else, which would be lost" in _refused(daemon, "swapon", device)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", device, str(mounted)], check=True)
    try:
        assert "mounted" in _refused(daemon, "swapon", device)
        with contextlib.suppress(OSError), (mounted / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(MIB)):
                pass
        assert "no room" in _refused(daemon, "swapon", str(mounted / "spill"))
        assert "no room" in _refused(daemon, "swapon", str(mounted / "spill"), "--size", "8M")
        assert not (mounted / "spill").exists()
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    assert len(_status(daemon)["backends"]) == 1


@contextlib.contextmanager
def _mounted(kind: str, tmp_path: Path) -> Iterator[Path]:
    """A file system of that kind, in a file where it needs a disk; gone at the end whatever happens."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    source, options = "tmpfs", "size=128m"
    if kind != "tmpfs":
        if shutil.which(f"mkfs.{kind}") is None:
            pytest.skip(f"no mkfs.{kind} here")
        source, options = str(tmp_path / "disk"), "loop"
        with open(source, "wb") as file:
            file.truncate(640 * MIB)  # xfs makes none below 300 MiB
        subprocess.run([f"mkfs.{kind}", "-q", source], check=True)
    subprocess.run(["mount", "-t", kind, "-o", options, source, str(mounted)], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", str(mounted)], check=True)


@pytest.mark.parametrize(
    "kind", ["tmpfs", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("ext4", "xfs", "btrfs"))]
)
@pytest.mark.parametrize("options", [(), ("--encrypt",)], ids=["plain", "encrypted"])
def test_file_system_holds_pages(
    daemon: DaemonProcess, verify_memory: str, tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    """O_DIRECT, holes and room are each file system's own: written, faulted, compacted, checked, drained."""
    with _mounted(kind, tmp_path) as mounted:
        spill = mounted / "spill"
        _done(daemon, "swapon", str(spill), "--priority", "5", *options)
        argv = [verify_memory, "--mib", "64", "--kind", "random", "--seconds", "4"]
        with _running(daemon, 20, argv, "--pool", "2M") as process:
            _wait_spilled(daemon, spill, 8)
            _done(daemon, "compact", str(spill))
            assert "no damage found" in _done(daemon, "check", str(spill))
            _wait_spilled(daemon, spill, 8)
            _done(daemon, "swapoff", str(spill))
            _assert_right(process)
        assert spill.stat().st_blocks == 0


def test_bad_input_changes_nothing(daemon: DaemonProcess, tmp_path: Path) -> None:
    small = tmp_path / "small"
    with small.open("wb") as file:
        file.truncate(512 << 10)
    ended = subprocess.run(["losetup", "-f", "--show", str(small)], capture_output=True, text=True, check=False)
    if ended.returncode == 0:
        assert "too small" in _refused(daemon, "swapon", ended.stdout.strip())
        subprocess.run(["losetup", "-d", ended.stdout.strip()], check=True)
    assert "already" in _refused(daemon, "swapon", str(tmp_path / "spill"))
    command = [command_path("vswapctl"), "run", "--private", "--spill", f"{tmp_path / 'spill'}:64M", "--", "true"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended
    assert "in use" in ended.stderr
    twice = [command_path("vswapctl"), "run", "--private", *["--spill", f"{tmp_path / 'twice'}:64M"] * 2, "--", "true"]
    ended = subprocess.run(twice, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended
    assert "named twice" in ended.stderr
    assert not (tmp_path / "twice").exists()
    assert "neither a file nor a block device" in _refused(daemon, "swapon", str(tmp_path))
    assert "cannot use" in _refused(daemon, "swapon", "/proc/nosuch/file")
    assert os.strerror(errno.ENOENT) in _refused(daemon, "swapon", str(tmp_path / "no" / "spill"))
    assert "too little" in _refused(daemon, "swapon", str(tmp_path / "new"), "--size", "4K")
    assert "not a backend" in _refused(daemon, "swapoff", str(tmp_path / "new"))
    assert "not a backend" in _refused(daemon, "compact", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    assert [entry["state"] for entry in _status(daemon)["backends"]] == ["active"]
