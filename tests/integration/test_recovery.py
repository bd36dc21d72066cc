# SPDX-License-Identifier: MIT
"""The daemon dies, at any moment, and nobody notices but by a pause.

In the middle of everything: pages on their way out and back, forks, remaps, segments being written,
handshakes. Its successor finds both memfds and all descriptors, and goes on (csrc/recover.c). At random
moments here, through Python; at every named one in `drive` (csrc/crash_point.h).
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from support.limited import MIB, GoingOn, LimitedProgram, command_path, run_limited
from support.sampler import ControlClient, answering_pid

if TYPE_CHECKING:
    from integration.conftest import DaemonProcess

_SECONDS_MAX = 20.0
_PAUSE_SECONDS_MAX = 10.0  # of a machine that does other things besides: what counts is that it ends


class Killer:
    """Kills the daemon again and again. `pauses`: how long each time nobody answered, s."""

    def __init__(self, socket_path: str, mean_seconds: float, seed: int) -> None:
        self._socket_path = socket_path
        self._mean_seconds = mean_seconds
        self._random = random.Random(seed)
        self.pauses: list[float] = []

    def answering(self) -> int:
        """PID of the daemon that answers now."""
        return answering_pid(self._socket_path, _PAUSE_SECONDS_MAX)

    def kill(self, times: int) -> None:
        """Kill it `times` times, at random moments."""
        for _ in range(times):
            pid = self.answering()
            if self._mean_seconds:
                time.sleep(self._random.expovariate(1 / self._mean_seconds))  # a random moment is what is tested
            started = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            assert self.answering() != pid
            self.pauses.append(time.monotonic() - started)

    def describe(self) -> str:
        """The figures that are asked for."""
        return _describe("deaths", self.pauses)


def _describe(what: str, pauses: list[float]) -> str:
    ordered = sorted(pauses)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    middle = ordered[len(ordered) // 2]
    return f"{len(ordered)} {what}, pause p50 {middle * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms"


class UpgradeWatch:
    """Asks all the time which daemon answers. `pauses`: from the last answer of one to the first of the next, s."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.pauses: list[float] = []

    def _watch(self) -> None:
        pid, answered = answering_pid(self._socket_path, _PAUSE_SECONDS_MAX), time.monotonic()
        while not self._ends.wait(0.002):
            before, since = pid, answered
            pid, answered = answering_pid(self._socket_path, _PAUSE_SECONDS_MAX), time.monotonic()
            if pid != before:
                self.pauses.append(answered - since)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()


def _assert_nothing_held(status: dict[str, int]) -> None:
    names = ("virtual_pages", "zero_pages", "same_pages", "pool_pages", "spill_pages", "staged_pages")
    held = {name: status[name] for name in (*names, "pool_object_bytes", "spill_bytes") if status[name]}
    assert not held, f"still held: {held}"


_FOUR = """
import subprocess, sys
kinds = ("text", "floats", "third", "mixed")
argv = [*sys.argv[1:], "--mib", "40", "--order", "random", "--fork", "--kind"]
children = [subprocess.Popen([*argv, kind, "--seed", str(seed)]) for seed, kind in enumerate(kinds)]
sys.exit(max(child.wait() for child in children))
"""


@pytest.mark.parametrize("deaths", [12, pytest.param(200, marks=pytest.mark.full)])
def test_embedded_daemon_dies(verify_memory: str, deaths: int, tmp_path: Path) -> None:
    """Four clients that verify what they have, forks of theirs too, all in one limited command."""
    seconds_max = 120 + deaths * 10
    going_on = GoingOn(tmp_path, seconds_max)
    argv = ["/usr/bin/env", "python3", "-c", _FOUR, verify_memory, *going_on.options]
    with LimitedProgram("64M", argv, seconds_max=seconds_max + 120.0) as program:
        killer = Killer(program.socket_path, 0.25, seed=deaths)
        killer.kill(deaths)
        going_on.end()
        with ControlClient(program.socket_path, _SECONDS_MAX) as control:
            assert control.status()["counters"]["evicted_pages"] > 0
        result = program.wait()
    print(killer.describe())
    assert result.status == 0, result.describe()
    told = result.stderr.decode().splitlines()
    assert told.count("vswapctl: the daemon died and another took over; nothing is lost") == deaths, told
    assert result.swapped_bytes_max > 32 * MIB, result.describe()
    assert result.faults > 0


@pytest.mark.parametrize("deaths", [8, pytest.param(100, marks=pytest.mark.full)])
def test_system_daemon_dies(daemon: DaemonProcess, churn: str, deaths: int) -> None:
    """Started by hand; two commands with threads, forks and remaps, and a client that comes later."""
    seconds = 6 + deaths * 3 // 2
    argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "48M", "--"]
    commands = [
        subprocess.Popen([*argv, churn, "96", str(seconds), str(seed), "2", "1"], stderr=subprocess.PIPE)
        for seed in (1, 2)
    ]
    with daemon.control() as control:  # a command that is just asking for its group ends with the daemon
        deadline = time.monotonic() + _SECONDS_MAX
        while len(control.status()["groups"]) < len(commands):
            assert time.monotonic() < deadline, "the commands did not begin"
            time.sleep(0.02)  # polling another process's state
    killer = Killer(daemon.socket_path, 0.25, seed=deaths)
    killer.kill(deaths)
    for command in commands:
        _, errors = command.communicate(timeout=seconds * 4 + 120)
        assert command.returncode == 0, errors.decode()
    print(killer.describe())
    _assert_nothing_held(daemon.wait_no_clients())  # type: ignore[arg-type]
    with daemon.control() as control:
        assert control.request("test-check", 60.0)["valid"] is True
        assert control.request("ping")["supervisor"] == daemon.process.pid


def test_groups_sessions_and_limits_outlive_the_daemon(
    daemon: DaemonProcess, verify_memory: str, going_on: GoingOn
) -> None:
    """The session of a `run` ends its group, also under a daemon that did not make it."""
    argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "40M", "--"]
    argv += [verify_memory, "--mib", "80", *going_on.options]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as command:
        pid = daemon.wait_client("swapped_pages")
        with daemon.control() as control:
            before = control.status()
            assert control.request("limit", pid=pid, limit_bytes=50 * MIB)["ok"]
        Killer(daemon.socket_path, 0.01, seed=1).kill(2)
        with daemon.control() as control:
            after = control.status()
        [group] = after["groups"]
        assert (group["name"], group["limit_bytes"]) == (before["groups"][0]["name"], 50 * MIB)
        assert after["counters"]["faults"] >= before["counters"]["faults"]
        going_on.end()
        _, errors = command.communicate(timeout=_SECONDS_MAX * 4)
        assert command.returncode == 0, errors.decode()
    _assert_nothing_held(daemon.wait_no_clients())  # type: ignore[arg-type]


def test_stopped_client_keeps_only_itself_waiting(daemon: DaemonProcess, verify_memory: str) -> None:
    """A successor waits for the agents' answers, each client by itself."""
    argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "32M", "--torture", "--"]
    argv += [verify_memory, "--mib", "64", "--seconds", "5"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as stopped:
        pid = daemon.wait_client("swapped_pages")
        os.kill(pid, signal.SIGSTOP)
        try:
            Killer(daemon.socket_path, 0.01, seed=2).kill(1)
            other = subprocess.run(
                [*argv[:-1], "2"], stdout=subprocess.DEVNULL, check=False, timeout=_SECONDS_MAX * 3
            )
            assert other.returncode == 0
        finally:
            os.kill(pid, signal.SIGCONT)
        assert stopped.wait(_SECONDS_MAX * 3) == 0


def test_death_while_moves_are_parked(daemon: DaemonProcess, verify_memory: str, going_on: GoingOn) -> None:
    """An agent that is stopped has a MOVE before it, and RELEASEs of other windows behind that."""
    argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "32M", "--torture", "--"]
    argv += [verify_memory, "--mib", "64", "--threads", "2", *going_on.options]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as command:
        pid = daemon.wait_client("swapped_pages")
        killer = Killer(daemon.socket_path, 0.0, seed=3)
        for _ in range(10):
            time.sleep(0.3)  # it swaps
            os.kill(pid, signal.SIGSTOP)
            try:
                time.sleep(0.25)  # longer than a batch is waited for
                killer.kill(1)
            finally:
                os.kill(pid, signal.SIGCONT)
        going_on.end()
        assert command.wait(_SECONDS_MAX * 3) == 0


@pytest.mark.parametrize("upgrades", [3, pytest.param(50, marks=pytest.mark.full)])
def test_upgrade_under_load(daemon: DaemonProcess, churn: str, upgrades: int) -> None:
    """A supervisor of the installed version takes over; clients wait as for a daemon that died."""
    argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "48M", "--"]
    command = subprocess.Popen(
        [*argv, churn, "96", str(6 + upgrades * 3), "5", "2", "1"], stderr=subprocess.PIPE
    )
    daemon.wait_client("swapped_pages")
    supervisors = {daemon.process.pid}
    with UpgradeWatch(daemon.socket_path) as watch:
        for _ in range(upgrades):
            subprocess.run(
                [command_path("vswapctl"), "upgrade", "--socket", daemon.socket_path], check=True, timeout=120
            )
            with daemon.control() as control:
                supervisors.add(int(control.request("ping")["supervisor"]))
    print(_describe("upgrades", watch.pauses))
    _, errors = command.communicate(timeout=300)
    assert command.returncode == 0, errors.decode()
    assert len(supervisors) == upgrades + 1
    assert len(watch.pauses) == upgrades
    assert daemon.process.poll() is None, "whoever started the daemon has nothing to wait for any more"
    _assert_nothing_held(daemon.wait_no_clients())  # type: ignore[arg-type]


def test_upgrade_that_fails_changes_nothing(tmp_path: Path, verify_memory: str) -> None:
    """A new version that does not like its configuration ends, and the old one serves on."""
    socket_path, configuration = str(tmp_path / "s"), tmp_path / "vswapd.conf"
    configuration.write_text("")
    log = tmp_path / "log"
    command = [command_path("vswapd"), "--config", str(configuration), "--socket", socket_path]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            killer = Killer(socket_path, 0.0, seed=1)
            pid = killer.answering()
            configuration.write_text("nonsense = 1\n")
            process.send_signal(signal.SIGUSR2)
            deadline = time.monotonic() + _SECONDS_MAX
            while "does not take over" not in log.read_text(errors="replace"):
                assert time.monotonic() < deadline, log.read_text(errors="replace")
                time.sleep(0.05)  # polling another process's state
            # Nor does one that finds no descriptor for the hand-over itself: the lowest free one is beyond the limit.
            configuration.write_text("")
            limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
            process.send_signal(signal.SIGUSR2)
            while "Too many open files" not in log.read_text(errors="replace"):
                assert time.monotonic() < deadline, log.read_text(errors="replace")
                time.sleep(0.05)  # polling another process's state
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
            assert killer.answering() == pid
            argv = [command_path("vswapctl"), "run", "--socket", socket_path, "--limit", "24M", "--"]
            argv += [verify_memory, "--mib", "32", "--kind", "third", "--passes", "1"]
            assert subprocess.run(argv, check=False, stdout=subprocess.DEVNULL, timeout=60).returncode == 0
        finally:
            process.terminate()
            process.wait(_SECONDS_MAX)


def test_failed_start_is_not_repeated(tmp_path: Path) -> None:
    """A daemon that ends by itself is not succeeded. What fails here is the daemon, not its supervisor: the state does
    not fit into its address space.
    """
    result = subprocess.run(
        [command_path("vswapd"), "--socket", str(tmp_path / "s")],
        capture_output=True,
        check=False,
        timeout=_SECONDS_MAX,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30)),
    )
    assert result.returncode == 1
    assert result.stderr == b"vswapd: cannot read the state: Cannot allocate memory\n"
    assert not (tmp_path / "s").exists()


# ---- every named moment ----


def _crash_points(drive: str) -> list[str]:
    listed = subprocess.run([drive, "--crash-points"], capture_output=True, check=True, text=True)
    return [line.partition("\t")[0] for line in listed.stdout.splitlines()]


@pytest.mark.parametrize("calls", [(1,), pytest.param((2, 5, 30, 100), marks=pytest.mark.full)])
@pytest.mark.parametrize("encrypt", [False, True])
def test_every_crash_point(
    drive: str, churn: str, client_library: str, tmp_path: Path, calls: tuple[int, ...], encrypt: bool
) -> None:
    """Killed at each, at its first call or later ones; verified to the end."""
    points = [point for point in _crash_points(drive) if not point.startswith("REGION_")]  # test_regions.py
    if encrypt:  # the others have nothing to do with a disk
        points = [point for point in points if point.startswith(("WRITEBACK_", "SEGMENT_", "DRAIN_"))]
    assert len(points) > (7 if encrypt else 25)
    missed: list[str] = []
    lock = threading.Lock()

    def work(jobs: list[tuple[str, int]], number: int) -> None:
        while True:
            with lock:
                if not jobs:
                    return
                point, call = jobs.pop()
            deaths = _run_to_crash(
                [drive, "--lib", client_library, "--limit", str(24 * MIB)]
                + ["--pool", str((16 if point.startswith("EVACUATE") else 4) * MIB)]
                + ["--spill", f"{tmp_path}/spill{number}:{1 << 30}", "--crash", f"{point}:{call}"]
                + (["--drain-every", "50"] if point.startswith("DRAIN") else [])
                + (["--detach-every", "100"] if point.startswith("DETACH") else [])
                + (["--encrypt"] if encrypt else [])
                + (["--recompress", "20"] if point.startswith("RECOMPRESS") else [])
                + ["--", churn, "48", "6" if point.startswith("YIELD") else "2", str(call), "3", "1"],
            )
            if deaths == 0:
                missed.append(f"{point}:{call}")

    jobs = [(point, call) for point in points for call in calls]
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(jobs, number)
        except BaseException as error:  # noqa: BLE001 -- raised again below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    # Every point was died at: a first call that never comes is a test that tests nothing.
    never = [name for name in missed if name.endswith(":1")]
    assert not never, f"never came to {never}"


def test_death_within_handshakes(drive: str, churn: str, client_library: str, tmp_path: Path) -> None:
    """A forked child is served before it is armed; what is done with it until then must not need an agent."""
    for seed in range(4):
        argv = [drive, "--lib", client_library, "--limit", str(24 * MIB), "--pool", str(4 * MIB)]
        argv += ["--spill", f"{tmp_path}/spill:{1 << 30}", "--kill-every", "150", "--slow-arm", "40"]
        assert _run_to_crash([*argv, "--", churn, "48", "4", str(seed), "3", "1"]) > 0


def _run_to_crash(argv: list[str]) -> int:
    """Deaths of the daemon. AssertionError when the program did not come to its end unharmed."""
    result = subprocess.run(argv, capture_output=True, check=False, text=True, timeout=180)
    assert result.returncode == 0, f"{' '.join(argv)}: status {result.returncode}\n{result.stderr[-3000:]}"
    line = next(line for line in result.stderr.splitlines() if " deaths, longest pause " in line)
    return int(line.split()[1])


def test_figures_are_whole_after_deaths(verify_memory: str, going_on: GoingOn) -> None:
    """What --stats says at the end adds up over all daemons."""
    argv = [verify_memory, "--mib", "64", "--kind", "third", *going_on.options]
    with LimitedProgram("24M", argv) as program:
        Killer(program.socket_path, 0.2, seed=3).kill(4)
        going_on.end()
        result = program.wait()
    assert result.status == 0, result.describe()
    assert json.loads(result.stdout), result.describe()
    counters = result.stats["counters"]
    assert counters["clients_added"] == counters["clients_gone"] == 1
    assert counters["evicted_pages"] > 0
    assert result.stats["run"]["faults"] <= counters["faults"]


def test_absent_daemon_is_told_of(daemon: DaemonProcess, verify_memory: str, going_on: GoingOn) -> None:
    """A client that meets no daemon says so after a while, once, and waits; and says when there is one again."""
    argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "32M", "--"]
    argv += [verify_memory, "--mib", "64", *going_on.options]
    pid = Killer(daemon.socket_path, 0.0, seed=1).answering()
    with subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "VSWAP_ABSENT_S": "1"}
    ) as command:
        client = daemon.wait_client("swapped_pages")
        assert command.stderr is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            first = command.stderr.readline().decode()
        finally:
            os.kill(pid, signal.SIGCONT)
        second = command.stderr.readline().decode()
        going_on.end()
        _, rest = command.communicate(timeout=_SECONDS_MAX * 3)
        assert command.returncode == 0, rest.decode()
    assert first == f"vswap[{client}]: no daemon answers; what is swapped out waits for one\n"
    assert second + rest.decode() == f"vswap[{client}]: a daemon is there again\n"


def test_run_without_deaths_says_nothing(verify_memory: str) -> None:
    """The line of the tests above comes from deaths only."""
    result = run_limited("24M", [verify_memory, "--mib", "48", "--passes", "1"])
    assert result.status == 0
    assert b"took over" not in result.stderr
