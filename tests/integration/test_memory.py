# SPDX-License-Identifier: MIT
"""Content, byte for byte: kinds of data, orders, allocators, threads, fork, eviction all the time."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from benchmarks import vmstat
from support import header
from support.limited import (
    MIB,
    LimitedProgram,
    LimitedResult,
    assert_honest,
    command_path,
    python_argv,
    run_limited,
    run_native,
)
from support.sampler import ControlClient
from vswapd import config, paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from integration.conftest import DaemonProcess

_INTERLEAVE = Path(__file__).parent.parent / "support" / "interleave.py"

_MIB = 96
_LIMIT = 24 * MIB


def _assert_right(result: LimitedResult) -> None:
    assert result.status == 0, result.describe()
    told = json.loads(result.stdout)
    assert told["wrong_pages"] == 0
    assert told["verified_pages"] >= told["pages"]


@pytest.mark.parametrize("kind", ["zeros", "same", "text", "floats", "third", "random", "mixed"])
def test_every_kind_of_data(verify_memory: str, kind: str) -> None:
    result = run_limited(_LIMIT, [verify_memory, "--mib", str(_MIB), "--kind", kind, "--passes", "2"])
    _assert_right(result)
    assert_honest(result, _LIMIT, demand_bytes=_MIB * MIB)


@pytest.mark.parametrize("allocate", ["mmap", "malloc"])
@pytest.mark.parametrize("order", ["sequential", "random"])
def test_orders_and_allocators(verify_memory: str, order: str, allocate: str) -> None:
    argv = [verify_memory, "--mib", str(_MIB), "--order", order, "--allocate", allocate, "--threads", "2"]
    result = run_limited(_LIMIT, argv)
    _assert_right(result)
    assert_honest(result, _LIMIT, demand_bytes=_MIB * MIB)


def test_fork(verify_memory: str) -> None:
    """Parent and child change what they share, each its half."""
    result = run_limited(_LIMIT, [verify_memory, "--mib", "64", "--kind", "text", "--fork"])
    _assert_right(result)
    assert_honest(result, _LIMIT, demand_bytes=64 * MIB)


def test_zeros_cost_nothing(verify_memory: str) -> None:
    result = run_limited(_LIMIT, [verify_memory, "--mib", str(_MIB), "--kind", "zeros"])
    _assert_right(result)
    assert_honest(result, _LIMIT, demand_bytes=_MIB * MIB)
    status = result.samples.status_at_most_swapped
    assert status["spill_bytes"] == 0
    # The program has a little of its own beside the zeros; that may be in the pool.
    assert result.samples.pool_bytes_max < 4 * MIB, result.describe()
    assert status["zero_pages"] * 4096 > 0.9 * (_MIB * MIB - _LIMIT), status


def test_metadata_at_most_16_bytes_a_page(verify_memory: str) -> None:
    """In bulk; small runs are dominated by whole tables."""
    result = run_limited(48 * MIB, [verify_memory, "--mib", "384", "--kind", "same", "--passes", "1"])
    _assert_right(result)
    status = result.samples.status_at_most_swapped
    group = status["groups"][0]
    swapped = group["swapped_pages"]
    assert group["metadata_bytes"] <= 16 * swapped + MIB, f"{group['metadata_bytes'] / swapped:.1f} bytes a page"


def test_metadata_at_most_16_bytes_a_page_when_half_is_out(tmp_path: Path) -> None:
    """And which half is random: most clusters of the slot table have pages of both kinds."""
    pages, report = 384 * MIB // 4096, tmp_path / "report"
    argv = [sys.executable, str(_INTERLEAVE), str(pages), str(report)]
    with LimitedProgram(pages * 4096 // 2, argv) as program:
        deadline = time.monotonic() + 100
        while not report.exists() and program.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        with ControlClient(program.socket_path) as control:
            status = control.status(30.0)
        shares = json.loads(report.read_text())["shares"]
        report.unlink()
        result = program.wait()
    assert result.status == 0, result.describe()
    # Where the evictor has just been fewer are in memory.
    assert sum(0.2 < share < 0.8 for share in shares) > len(shares) * 2 / 3, sorted(shares)
    group = status["groups"][0]
    slots = group["swapped_pages"]
    assert 0.3 * pages < slots < 0.7 * pages, group
    print(f"{group['metadata_bytes'] / slots:.2f} and {status['metadata_bytes'] / slots:.2f} bytes a page")
    assert group["metadata_bytes"] <= 16 * slots, f"{group['metadata_bytes'] / slots:.2f} bytes a page"
    # With memory that is free for clusters: chunks that are being filled.
    slack = 8 * header.defines("slot_heap.h")["SLOT_CHUNK_BYTES"]
    assert status["metadata_bytes"] <= 16 * slots + slack, f"{status['metadata_bytes'] / slots:.2f} bytes a page"


def test_sums_agree_with_parts(verify_memory: str) -> None:
    result = run_limited(_LIMIT, [verify_memory, "--mib", str(_MIB), "--kind", "mixed"])
    _assert_right(result)
    status = result.samples.status_at_most_swapped
    group = status["groups"][0]
    parts = sum(status[f"{name}_pages"] for name in ("zero", "same", "pool", "spill", "staged", "poisoned"))
    # Parts and sum are of one program that goes on while they are read.
    assert parts == pytest.approx(group["swapped_pages"], rel=0.05, abs=256)
    usage = sum(group[f"{name}_bytes"] for name in ("resident", "unmanaged", "pool", "metadata"))
    assert usage == pytest.approx(group["usage_bytes"], rel=0.1, abs=2 * MIB)
    latencies = result.stats["latency_us"]
    assert sum(latency["count"] for latency in latencies.values()) > 0
    for latency in latencies.values():
        assert 0 <= latency["p50"] <= latency["p99"] <= latency["p999"] < 60e6


def test_daemon_stays_small(verify_memory: str) -> None:
    result = run_limited(_LIMIT, [verify_memory, "--mib", str(_MIB)])
    assert 0 < result.samples.daemon_bytes_max <= 48 * MIB, result.describe()


def _locked_of(pid: int, is_chosen: Callable[[list[str]], bool]) -> list[bool]:
    """Of each mapping that is chosen by its line of smaps: is it locked ("lo" among its flags)?"""
    locked: list[bool] = []
    chosen = False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if "-" in words[0]:
            chosen = is_chosen(words)
        elif words[0] == "VmFlags:" and chosen:
            locked.append("lo" in words)
    return locked


def _daemon_pid(control: ControlClient) -> int:
    return int(control.request("ping")["pid"])


def test_daemon_is_locked(daemon: DaemonProcess) -> None:
    """A kernel that swaps would have programs wait for it, too."""
    with daemon.control() as control:
        pid = _daemon_pid(control)
    for memfd in ("/memfd:vswap-state", "/memfd:vswap-pool"):
        assert _locked_of(pid, lambda words, memfd=memfd: words[5:6] == [memfd]) == [True]
    own = _locked_of(pid, lambda words: words[1] == "rw-p")
    assert len(own) > 10
    assert all(own), f"{own.count(False)} of {len(own)} writable mappings are not locked"


def test_successor_is_locked(daemon: DaemonProcess) -> None:
    """Locks are not inherited by a fork, and each daemon is one of the supervisor's."""
    with daemon.control() as control:
        pid = _daemon_pid(control)
    os.kill(pid, signal.SIGKILL)
    with daemon.control() as control:
        successor = _daemon_pid(control)
    assert successor != pid
    assert _locked_of(successor, lambda words: words[5:6] == ["/memfd:vswap-state"]) == [True]


def test_shelved_memory_is_not_locked() -> None:
    """What a private daemon does not use has to leave RAM (docs/decisions/0016); the rest of it stays."""
    shelf = f"{os.environ.get('VSWAPD_SPILL_DIR') or config.SPILL_DIRECTORY}/"
    with LimitedProgram(64 * MIB, ["sleep", "60"]) as program:
        with ControlClient(program.socket_path) as control:
            pid = _daemon_pid(control)
        shelved = _locked_of(pid, lambda words: words[1] == "rw-p" and "".join(words[5:6]).startswith(shelf))
        state = _locked_of(pid, lambda words: words[5:6] == ["/memfd:vswap-state"])
        program.process.terminate()
    assert shelved, "nothing was shelved"
    assert not any(shelved)
    assert state == [True]


def _inodes_of_shelf(pid: int) -> set[str]:
    shelf = f"{os.environ.get('VSWAPD_SPILL_DIR') or config.SPILL_DIRECTORY}/"
    lines = (line.split() for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines())
    return {words[4] for words in lines if words[1] == "rw-p" and "".join(words[5:6]).startswith(shelf)}


def test_near_a_limit_a_daemon_shelves_what_its_start_has_written_to() -> None:
    """In a file of its own, for its supervisor's is the next daemon's, too; which does the same."""
    program_text = f"import os, time; memory = os.urandom({80 * MIB}); print(flush=True); time.sleep(60)"
    with LimitedProgram(64 * MIB, [sys.executable, "-c", program_text]) as program:
        pids: set[int] = set()
        for _ in range(2):
            with ControlClient(program.socket_path) as control:
                reply = control.request("ping")
            pid, supervisor = int(reply["pid"]), int(reply["supervisor"])
            deadline = time.monotonic() + 20
            while not _inodes_of_shelf(pid) - _inodes_of_shelf(supervisor):
                assert time.monotonic() < deadline, "there is no other file"
                time.sleep(0.1)
            pids.add(pid)
            os.kill(pid, signal.SIGKILL)
        with ControlClient(program.socket_path) as control:
            assert len(control.request("status")["status"]["clients"]) == 1
        program.process.terminate()
        assert program.process.wait(10) == -signal.SIGTERM
    assert len(pids) == 2


def _mapped_file_bytes(pid: int) -> int:
    """Resident pages of files, others' too."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile:"))


def test_who_waits_maps_nothing() -> None:
    """vswapctl and the supervisor, and they still wake up for what they wait for."""
    with LimitedProgram(64 * MIB, ["sleep", "60"]) as program:
        with ControlClient(program.socket_path) as control:
            reply = control.request("ping")
        time.sleep(config.SHELVE_AFTER_SECONDS + 0.5)
        waiting = (program.process.pid, int(reply["supervisor"]))
        mapped = {pid: _mapped_file_bytes(pid) for pid in waiting}
        os.kill(int(reply["pid"]), signal.SIGKILL)
        with ControlClient(program.socket_path) as control:
            assert _daemon_pid(control) != reply["pid"]
        program.process.terminate()
        assert program.process.wait(10) == -signal.SIGTERM
    assert all(size < MIB for size in mapped.values()), f"{mapped} bytes of files are mapped"


def _interpreter_bytes(pid: int) -> int:
    """What a process has mapped of the interpreter's own code, and of what that refers to."""
    found, size = False, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            name = words[5].rpartition("/")[2] if len(words) > 5 else ""
            found = name.startswith(("python", "libpython")) and words[1] in ("r-xp", "r--p")
        elif found and words[0] in ("Rss:", "Anonymous:"):
            size += (1 if words[0] == "Rss:" else -1) * int(words[1]) << 10
    return size


def test_daemon_of_a_program_that_goes_on_maps_no_interpreter() -> None:
    """Its data plane is all that runs, while nobody asks (as what samples a LimitedProgram does)."""
    code = "data = bytearray(b'x') * (96 << 20)\nwhile True: sum(data[::4096])"
    command = [command_path("vswapctl"), "run", "--private", "--limit", "64M", "--", sys.executable, "-c", code]
    with subprocess.Popen(command) as run:
        try:
            deadline = time.monotonic() + 30
            while len(found := [p for p in psutil.Process(run.pid).children(recursive=True) if p.name() == "vswapd"]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            daemon = max(found, key=psutil.Process.create_time)  # the other one is its supervisor
            time.sleep(2)  # it has started by then
            while (mapped := _interpreter_bytes(daemon.pid)) > MIB // 4:
                assert time.monotonic() < deadline, f"{mapped} bytes"
                time.sleep(0.5)  # polling another process's state
        finally:
            run.terminate()
        assert run.wait(10) == -signal.SIGTERM


def test_without_the_right_to_lock(verify_memory: str) -> None:
    """As in a container: nothing is locked, and all the rest is as ever."""
    prefix = ["prlimit", "--memlock=1048576", "setpriv", "--bounding-set=-ipc_lock"]
    command = [command_path("vswapctl"), "run", "--private", "--limit", str(_LIMIT), "--"]
    program = [verify_memory, "--mib", str(_MIB)]
    result = subprocess.run([*prefix, *command, *program], capture_output=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["wrong_pages"] == 0


def test_many_processes_at_once(siblings: str) -> None:
    """None of them is a large part of the limit, nor does the daemon grow with their number."""
    limit = 192 * MIB
    result = run_limited(limit, [siblings, "16", "24"])
    assert result.status == 0, result.describe()
    assert_honest(result, limit, demand_bytes=16 * 25 * MIB)
    assert 0 < result.samples.daemon_bytes_max <= 48 * MIB, result.describe()


def test_a_long_registration_holds_up_nobody_else(
    drive: str, client_library: str, siblings: str, tmp_path: Path
) -> None:
    """It waits for the program's faults under way, of which one may have lost its CPU; others fill memory meanwhile."""
    options = ["--stats", "--limit", str(96 * MIB), "--spill", f"{tmp_path / 'spill'}:{1 << 30}"]
    command = [drive, "--lib", client_library, *options, "--delay", "look/register:1:1500", "--", siblings, "4", "64"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    swapped = re.search(r"swapped_max (\d+)", result.stderr)
    assert swapped, result.stderr
    assert int(swapped[1]) * 4096 >= (3 * 64 - 96) * MIB // 2, result.stderr


@pytest.mark.parametrize("seed", [1, 2])
def test_churn_under_torture(churn: str, seed: int) -> None:
    """Every memory operation there is, while random runs of pages are evicted all the time."""
    result = run_limited("256M", [churn, "32", "5", str(seed), "2", "1"], options=["--private", "--torture"])
    assert result.status == 0, result.describe()
    assert result.faults > 0, result.describe()


_COMPACT = Path("/proc/sys/vm/compact_memory")


@contextmanager
def _kernel_compacts() -> Iterator[None]:
    """The kernel moves pages about to make huge ones, all the time."""
    stop = threading.Event()

    def compact() -> None:
        while not stop.wait(0.005):
            _COMPACT.write_text("1")

    thread = threading.Thread(target=compact)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(not os.access(_COMPACT, os.W_OK), reason="compact_memory is root's, and of kernels that compact")
@pytest.mark.parametrize("seed", [1, 2])
def test_churn_while_pages_migrate(churn: str, seed: int) -> None:
    """A page that migrates is not present for a moment, and not gone either."""
    before = vmstat.count("pgmigrate_success")
    with _kernel_compacts():
        result = run_limited("256M", [churn, "32", "6", str(seed), "2", "1"], options=["--private", "--torture"])
    assert result.status == 0, result.describe()
    assert vmstat.count("pgmigrate_success") - before > 1000, "the kernel did not migrate"


def test_churn_under_a_limit(churn: str) -> None:
    result = run_limited("48M", [churn, "128", "5", "3", "2", "1"])
    assert result.status == 0, result.describe()
    assert_honest(result, 48 * MIB)


# What is locked cannot go, and leaves the pool less than its cap.
_LOCKED = """
import ctypes, mmap, random
def new(mib): return mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def content(page): return random.Random(page).randbytes(2500).ljust(4096, b"x")
def pages(area): return range(len(area) // 4096)
def fill(area):
    for page in pages(area): area[page * 4096 : (page + 1) * 4096] = content(page)
def check(area):
    for page in pages(area): assert area[page * 4096 : (page + 1) * 4096] == content(page), page
locked = new({locked})
fill(locked)
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(locked)))
assert ctypes.CDLL(None).mlock(address, ctypes.c_size_t(len(locked))) == 0
memory = new({mib})
fill(memory)
for _ in range(2): check(memory)
check(locked)
"""


def test_pool_leaves_what_cannot_be_evicted_its_room() -> None:
    """Below its cap, too: to a backend, which has room."""
    limit = 64 * MIB
    result = run_limited(limit, python_argv(_LOCKED.format(locked=40, mib=64)))
    assert result.status == 0, result.describe()
    assert_honest(result, limit, demand_bytes=104 * MIB)
    assert result.stats["counters"]["out_of_memory_kills"] == 0


# By NumPy, a word of each page at a time: as fast as memory can be had, or eviction would keep up.
_FIRST_TOUCH = """
import mmap, numpy
pages, how = {pages}, "{how}"
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (mmap.MAP_POPULATE if how == "flag" else 0)
memory = mmap.mmap(-1, pages * 4096, flags=flags)
if how in ("populate-read", "populate-write"):
    memory.madvise(22 if how == "populate-read" else 23)
words = numpy.frombuffer(memory, dtype=numpy.uint64)[::512]
seen = int(words.sum()) if how == "read" else 0
for turn in range(2):
    values = numpy.random.default_rng(turn).integers(0, 2**64, pages, dtype=numpy.uint64)
    words[:] = values
    assert (words == values).all()
print(seen, "right")
"""


@pytest.mark.parametrize("how", ["write", "read", "flag", "populate-read", "populate-write"])
def test_memory_that_comes_at_once(how: str) -> None:
    """Zero pages that are written to after their registration, and what one system call brings, are within the limit."""
    result = run_limited("32M", python_argv(_FIRST_TOUCH.format(pages=512 * MIB // 4096, how=how)))
    assert result.status == 0, result.describe()
    assert result.stdout == b"0 right\n", result.stdout
    assert_honest(result, 32 * MIB, demand_bytes=512 * MIB, moment_bytes=0)


# Huge pages, which one copy after the other fills: the fastest that one thread can take memory without a system call.
_HUGE_FILL = """
import mmap, random
block = random.Random(1).randbytes(2 << 20)
memory = mmap.mmap(-1, {mib} << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, len(memory), len(block)):
    memory[at : at + len(block)] = block
assert all(memory[at : at + len(block)] == block for at in range(0, len(memory), len(block)))
"""


def test_memory_that_is_filled_in_huge_pages() -> None:
    """12 MiB a millisecond, once memory has been in use: by another run of the same."""
    argv, limit = python_argv(_HUGE_FILL.format(mib=360)), 80 * MIB
    for _ in range(3):
        assert run_native(argv).returncode == 0
        result = run_limited(limit, argv)
        assert result.status == 0, result.describe()
        assert_honest(result, limit, demand_bytes=360 * MIB, moment_bytes=0)
        assert result.run["usage_bytes_max"] <= limit * 1.1, result.describe()


# A child that keeps everything as it was at the fork, and a parent that writes to all of it as fast as it can.
_WRITES_AFTER_FORK = """
import mmap, numpy, os
pages = {pages}
memory = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
words = numpy.frombuffer(memory, dtype=numpy.uint64).reshape(pages, 512)
values = numpy.random.default_rng(1).integers(0, 2**64, (pages, 200), dtype=numpy.uint64)
words[:, :200] = values
go, went = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    os.read(go[0], 1)
    os._exit(0 if all((words[i, :200] == values[i]).all() for i in range(0, pages, 16)) else 1)
for turn in range(4):
    words[:, 1] = turn
os.write(go[1], b"x")
assert os.waitpid(child, 0)[1] == 0
assert (words[:, 1] == 3).all() and (words[:, 2:200] == values[:, 2:]).all()
"""


def test_writes_to_what_a_fork_shares_wait_for_room() -> None:
    """Each copies a page, and nothing is missing then: without protection Pss shows it when it is too late."""
    limit, demand = 400 * MIB, 574 * MIB
    result = run_limited(limit, python_argv(_WRITES_AFTER_FORK.format(pages=240 * MIB // 4096)))
    assert result.status == 0, result.describe()
    # Half way at most: what is shared is not free before the last of them has let it go.
    assert result.samples.peak_bytes < (limit + demand) / 2, result.describe()
    # What the two have in common is out once.
    assert result.stats["counters"]["evicted_shared"] > 0, result.stats["counters"]


# What was written to since the last fork is shared anew by the next, while all of it is in memory; each waits until
# it is protected (bit 57 of pagemap). The last child looks at everything. Then it is alone, all of it still
# protected, and writes to all of it.
_FORKS_AGAIN = """
import ctypes, mmap, numpy, os, sys, time
pages, turns, fifo = 240 * 256, 4, sys.argv[1]
memory = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
words = numpy.frombuffer(memory, dtype=numpy.uint64).reshape(pages, 512)
values = numpy.random.default_rng(1).integers(0, 2**64, (pages, 100), dtype=numpy.uint64)
words[:, :100] = values
words[:, 1] = 0
first = ctypes.addressof(ctypes.c_char.from_buffer(memory)) // 4096
def wait_until_protected(seconds_max=20):
    deadline, pagemap = time.monotonic() + seconds_max, os.open("/proc/self/pagemap", os.O_RDONLY)
    while True:
        entries = numpy.frombuffer(os.pread(pagemap, pages * 8, first * 8), dtype=numpy.uint64)
        there = entries[entries >> numpy.uint64(63) != 0]
        if (there >> numpy.uint64(57) & numpy.uint64(1)).sum() > 0.9 * len(there): break
        assert time.monotonic() < deadline, "not protected"
        time.sleep(0.01)
    os.close(pagemap)
def is_as_it_was(turn): return (words[:, 1] == turn).all() and (words[:, 2:100] == values[:, 2:]).all()
for turn in range(turns):
    begin, go = os.pipe()
    words[:, 2].sum() # all of it is in memory, and no room for copies
    child = os.fork()
    if child == 0:
        os.read(begin, 1)
        wait_until_protected()
        os._exit(0 if turn < turns - 1 or is_as_it_was(turn) else 1)
    wait_until_protected()
    words[:, 1] = turn + 1
    os.write(go, b"x")
    os.close(begin), os.close(go)
    assert os.waitpid(child, 0)[1] == 0, turn
assert is_as_it_was(turns)
child = os.fork()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("alone", file=sys.stderr, flush=True)
open(fifo).read()
words[:, 1] += 1
print("written", file=sys.stderr, flush=True)
open(fifo).read()
"""


def test_forks_again_and_again_and_then_is_alone(tmp_path: Path) -> None:
    """Each time all is protected, in the child, too; and not for long once the last child has ended."""
    limit, demand, fifo = 400 * MIB, 574 * MIB, tmp_path / "fifo"
    os.mkfifo(fifo)
    with LimitedProgram(limit, [*python_argv(_FORKS_AGAIN), str(fifo)]) as program:
        program.wait_said(b"alone")
        time.sleep(1.5)  # longer than it stays protected
        with ControlClient(program.socket_path, 30.0) as control:
            before = control.status(30.0)["counters"]["faults"]
            fifo.write_text("go on\n")
            program.wait_said(b"written")
            status = control.status(30.0)
        [client] = status["clients"]
        [anonymous] = re.findall(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{client['pid']}/status").read_text())
        fifo.write_text("go on\n")
        result = program.wait()
    assert result.status == 0, result.describe()
    assert result.samples.peak_bytes < (limit + demand) / 2, result.describe()
    assert status["counters"]["faults"] - before < 100, "each write to what is protected is a fault"
    assert abs(client["resident_bytes"] - int(anonymous) * 1024) < 2 * MIB, "all of it is its own"


# What is large is not handed out before the process is managed: next to nothing is resident here.
_LARGE_MAPPING = """
import mmap
def managed(): return "vswap-ring" in open("/proc/self/maps").read()
before = managed()
small = mmap.mmap(-1, 15 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
between = managed()
large = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(before, between, managed())
"""


def test_large_mapping_waits_until_it_is_managed() -> None:
    result = run_limited("1G", python_argv(_LARGE_MAPPING))
    assert result.status == 0, result.describe()
    assert result.stdout == b"False False True\n", result.stdout


_SHARES = """
import mmap, os, sys, time
of_a_file = sys.argv[1] == "file"
private = bytearray(os.urandom(20 << 20))  # or it would be too small to be managed
memory = mmap.mmap(os.open(sys.argv[2], os.O_RDWR) if of_a_file else -1, 48 << 20, mmap.MAP_SHARED)
pages = len(memory) // mmap.PAGESIZE
assert sum(memory[page * mmap.PAGESIZE] for page in range(pages)) == 0
time.sleep(1)
"""


@pytest.mark.parametrize("of", ["memory", "file"])
def test_shared_memory_is_told_of_once(of: str, tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(48 * MIB))
    result = run_limited("64M", [*python_argv(_SHARES), of, str(tmp_path / "zeros")])
    assert result.status == 0, result.describe()
    told = [line for line in result.stderr.decode().splitlines() if "neither swapped nor counted" in line]
    assert len(told) == (1 if of == "memory" else 0), result.stderr
    if told:
        found = re.search(r"has ([0-9.]+) MiB of shared memory", told[0])
        assert found and 16 <= float(found[1]) < 50, told


def test_large_mapping_is_native_without_a_daemon(tmp_path: Path) -> None:
    environment = {**os.environ, "LD_PRELOAD": paths.library(), "VSWAPD_SOCKET": str(tmp_path / "nobody")}
    result = run_native(python_argv(_LARGE_MAPPING), env=environment, timeout=30)
    assert result.stdout == b"False False False\n", result


# Near its limit a program gets a large mapping once it is registered: "um" among the flags in smaps. What it filled
# before that would be beyond the limit. The same size again and again: only that it asks tells of it.
_NEW_NEAR_THE_LIMIT = """
import ctypes, mmap, time
def new(): return mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def address(area): return ctypes.addressof(ctypes.c_char.from_buffer(area))
def is_registered(start):
    found = False
    for line in open("/proc/self/smaps"):
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            low, high = (int(number, 16) for number in line.split()[0].split("-"))
            found = low <= start < high
        elif found and line.startswith("VmFlags:"):
            return "um" in line.split()
    raise AssertionError("not mapped")
first = new()
for page in range(0, len(first), 4096): first[page] = page >> 12 & 255
while not is_registered(address(first)): time.sleep(0.01)
count = 0
for _ in range(100):
    area = new()
    count += is_registered(address(area))
    del area # the next one is as large, in its place
print(count)
"""


def test_large_mapping_near_the_limit_waits_until_it_is_registered() -> None:
    result = run_limited("24M", python_argv(_NEW_NEAR_THE_LIMIT))
    assert result.status == 0, result.describe()
    assert result.stdout == b"100\n", result.stdout


@pytest.mark.parametrize("attempt", range(3))
def test_forks_while_memory_is_being_registered(fork_early: str, attempt: int) -> None:
    """What a parent registers between a fork and its event is not registered in the child: a matter of chance."""
    result = run_limited("32M", [fork_early, "64"])
    assert result.status == 0, result.describe()
    assert result.faults > 0, result.describe()


_FILLED = '''
import ctypes, mmap, sys, time
area = mmap.mmap(-1, 40 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, len(area), 4096):
    area[page : page + 4096] = page.to_bytes(8, "little") * 512
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
sys.stdin.read()
'''


def test_debugger_and_core_dump_see_all_after_pagein(daemon: DaemonProcess, tmp_path: Path) -> None:
    """What gdb reads, /proc/PID/mem, fails where pages are out, and a core dump lacks them: `pagein` first."""
    wanted = b"".join(page.to_bytes(8, "little") * 512 for page in range(0, 40 << 20, 4096))
    argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "80M", "--"]
    with subprocess.Popen(
        [*argv, *python_argv(_FILLED)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)),
    ) as command:
        assert command.stdout is not None
        address = int(command.stdout.readline())
        with daemon.control() as control:
            [client] = control.status()["clients"]
            pid = int(client["pid"])
            assert control.request("pageout", pid=pid)["ok"]
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(address)
                with pytest.raises(OSError, match="Input/output"):
                    memory.read(4096)
            assert control.request("pagein", pid=pid)["ok"]
            with Path(f"/proc/{pid}/mem").open("rb") as memory:
                memory.seek(address)
                assert memory.read(len(wanted)) == wanted
        os.kill(pid, signal.SIGABRT)
        command.communicate(timeout=60)
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern == "core":  # else somebody else of the machine takes it
        [core] = tmp_path.glob("core*")
        assert wanted in core.read_bytes()


def test_out_of_memory_is_a_clear_end(verify_memory: str) -> None:
    argv = [verify_memory, "--mib", "96", "--kind", "random"]
    result = run_limited("24M", argv, options=["--private", "--no-spill"])
    # vswapctl ends as the command did: killed.
    assert result.status in (137, -9), result.describe()
    lines = [line for line in result.stderr.decode().splitlines() if line.startswith("vswapctl:")]
    assert len(lines) == 1, result.describe()
    assert "memory" in lines[0]
    assert result.samples.peak_bytes <= 40 * MIB, result.describe()
