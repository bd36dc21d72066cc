# SPDX-License-Identifier: MIT
"""Clients come, die at any moment, and leave nothing behind."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from support.limited import MIB, command_path, run_limited
from support.sampler import pss_anon_bytes, tree

if TYPE_CHECKING:
    from integration.conftest import DaemonProcess

_HELD = ("virtual_pages", "zero_pages", "same_pages", "pool_pages", "spill_pages", "staged_pages", "kept_pages")
_LEFT_BYTES_MAX = 2 * MIB  # a reserve of slabs and tables, ready for the next client


def _assert_nothing_held(status: dict[str, object]) -> None:
    held = {name: status[name] for name in _HELD if status[name]}
    assert not held, f"still held: {held}"
    assert status["pool_object_bytes"] == 0
    assert status["spill_bytes"] == 0
    assert status["pool_bytes"] <= _LEFT_BYTES_MAX  # type: ignore[operator]


@pytest.mark.parametrize("rounds", [8, pytest.param(60, marks=pytest.mark.full)])
def test_kill_9_frees_everything(daemon: DaemonProcess, verify_memory: str, rounds: int) -> None:
    """At any moment: before it is managed, filling, swapping, forking, ending."""
    generator = random.Random(5)
    for number in range(rounds):
        argv = [command_path("vswapctl"), "run", "--socket", daemon.socket_path, "--limit", "24M", "--"]
        kind = generator.choice(["text", "random", "mixed"])
        argv += [verify_memory, "--mib", "96", "--kind", kind, "--seconds", "60", "--fork", "--seed", str(number)]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        moment = generator.uniform(0.1, 2.5)
        time.sleep(moment)  # a random moment is what is tested
        child = _child_of(process.pid)
        if child:
            signal_number = signal.SIGKILL
            subprocess.run(["kill", f"-{signal_number}", str(child)], check=False)
        status = process.wait(60)
        assert status in (137, -9), f"round {number}, killed after {moment:.3f} s: vswapctl ended with {status}"
        _assert_nothing_held(daemon.wait_no_clients())
        with daemon.control() as control:
            answer = control.request("test-check", 60.0)
        assert answer.get("valid") is True, answer


def _child_of(pid: int, seconds_max: float = 10.0) -> int:
    """The command that vswapctl has started."""
    deadline = time.monotonic() + seconds_max
    while time.monotonic() < deadline:
        ended = subprocess.run(["pgrep", "-P", str(pid), "-x", "verify_memory"], capture_output=True, check=False)
        if ended.stdout.split():
            return int(ended.stdout.split()[0])
        time.sleep(0.01)  # polling another process's state
    raise AssertionError("the command did not start")


def _settled_descriptors(daemon: DaemonProcess, seconds_max: float = 5.0) -> int:
    """The fewest seen until they have not changed for half a second: a connection may just be closing."""
    fewest, since, deadline = daemon.descriptor_count(), time.monotonic(), time.monotonic() + seconds_max
    while time.monotonic() < min(deadline, since + 0.5):
        time.sleep(0.05)  # polling another process's state
        count = daemon.descriptor_count()
        if count < fewest:
            fewest, since = count, time.monotonic()
    return fewest


@pytest.mark.parametrize("clients", [100, pytest.param(1000, marks=pytest.mark.full)])
def test_many_clients_leave_no_growth(daemon: DaemonProcess, verify_memory: str, clients: int) -> None:
    """Managed ones, four at a time: --torture manages from 1 MiB on."""
    source = f"seq %d | xargs -P 4 -I N {verify_memory} --mib 4 --kind text --passes 1 --seed N >/dev/null"

    def anonymous_bytes() -> int:
        """Of the supervisor and the daemon. What they map of files counts less the more others run Python."""
        pids = [daemon.process.pid, *tree(daemon.process.pid)]
        return sum(map(pss_anon_bytes, pids))

    def come_and_go(count: int) -> tuple[int, int, int]:
        result = run_limited(
            "128M", ["sh", "-c", source % count], options=["--socket", daemon.socket_path, "--torture"], seconds_max=900
        )
        assert result.status == 0, result.describe()
        status = daemon.wait_no_clients()
        _assert_nothing_held(status)
        counters: dict[str, int] = status["counters"]  # type: ignore[assignment]
        return counters["clients_added"], anonymous_bytes(), _settled_descriptors(daemon)

    # What is allocated once is allocated now, and queues of things long past are as long as they get.
    added_before, bytes_before, descriptors_before = come_and_go(clients)
    added, count_bytes, descriptors = come_and_go(clients)
    assert added - added_before >= clients * 0.9, f"only {added - added_before} of {clients} were managed"
    assert descriptors <= descriptors_before, f"{descriptors_before} -> {descriptors} descriptors"
    assert count_bytes <= bytes_before + MIB, f"{bytes_before} -> {count_bytes} bytes"
