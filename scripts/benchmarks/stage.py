# SPDX-License-Identifier: MIT
"""stage — what a script that measures on the kernel's swap needs around it: root, room, signals, and a journal that
puts everything back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.build import build
from benchmarks.cgroup import Cgroup, CgroupError, find_hierarchy
from benchmarks.execute import ExecuteError
from benchmarks.journal import DEFAULT_PATH, STOP_SIGNALS, Journal, JournalError, restore
from benchmarks.systems import Place
from vswapd.failure import Failure
from vswapd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20


class StageError(Exception):
    """One line; nothing was measured."""


def vswapctl() -> str:
    """Of the environment that runs this."""
    return str(Path(sys.executable).with_name("vswapctl"))


def need(ram_bytes: int, disk_bytes: int) -> None:
    """Root, and so much of both. StageError."""
    if os.geteuid() != 0:
        raise StageError("needs root, for swap devices and cgroups")
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    if available < ram_bytes:
        raise StageError(
            f"{format_size(available)} of memory are available, {format_size(ram_bytes)} are needed; try --size"
        )
    free = shutil.disk_usage("/var/tmp").free
    if free < disk_bytes:
        raise StageError(f"/var/tmp has {format_size(free)} left, {format_size(disk_bytes)} are needed; try --size")


@contextlib.contextmanager
def stage(swap_bytes: int) -> Iterator[tuple[Place, str]]:
    """A place to measure in, and the program `held`. What could not be put back is said on standard error."""
    with Journal() as journal:
        directory = tempfile.mkdtemp(prefix="vswap-bench-", dir="/var/tmp")
        journal.note("directory", path=directory)
        cgroup = Cgroup(find_hierarchy(), journal, f"vswap-bench-{os.getpid()}")
        yield Place(journal, cgroup, directory, swap_bytes), build(directory, "held")
    for problem in journal.problems:
        sys.stderr.write(f"{problem}\n")


def _on_signal(number: int, _: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def run(name: str, measure: Callable[[], int], *, restores: bool) -> int:
    """Exit status of a script whose work `measure` is; with `restores` put back what a killed one left instead."""
    try:
        if restores:
            problems = restore(DEFAULT_PATH)
            print("\n".join(f"{name}: {problem}" for problem in problems) or f"{name}: all is as it was")
            return 1 if problems else 0
        for number in STOP_SIGNALS:
            signal.signal(number, _on_signal)
        return measure()
    except (StageError, CgroupError, JournalError, ExecuteError, Failure, OSError) as error:
        sys.stderr.write(f"{name}: {error}\n")
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"{name}: {' '.join(error.cmd)} failed: {error.stderr or error.returncode}\n")
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"{name}: interrupted ({interrupt or 'SIGINT'}); everything is put back\n")
        return 130
    return 1
