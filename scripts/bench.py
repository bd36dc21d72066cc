# SPDX-License-Identifier: MIT
"""vswapd beside the kernel's own swap, at equal total memory: same machine, same workloads, same run.

Needs root. Sets up a zram device, zswap and a swap file, whichever the kernel offers, one at a time, runs every
workload on each in alternating order, and puts everything back, also after Ctrl-C. Results: a table, and in
build/bench/ the same as text, everything measured as JSON, and plots (with matplotlib).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import fnmatch
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import gil, plots, scenarios, systems, table
from benchmarks.cgroup import Cgroup, CgroupError, find_hierarchy
from benchmarks.execute import ExecuteError
from benchmarks.journal import DEFAULT_PATH, STOP_SIGNALS, Journal, JournalError, restore
from benchmarks.session import ScenarioResult, Session, as_json
from vswapd.failure import Failure
from vswapd.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.scenarios import Scenario

_SOURCES = Path(__file__).resolve().parent / "benchmarks"
_WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
_MIB = 1 << 20
_QUICK_SECONDS_MAX = 170.0  # building and reporting make it three minutes


class BenchError(Exception):
    """One line; nothing was measured."""


def build_workloads(directory: str) -> str:
    """Path of the program, compiled into `directory`."""
    program = os.path.join(directory, "workloads")
    sources = [str(_SOURCES / f"{name}.c") for name in ("workloads", "content", "latency", "pattern")]
    command = ["cc", "-std=gnu11", "-O2", "-g", *_WARNINGS, "-o", program, *sources, "-llz4", "-lm"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(f"cannot compile the workloads: {done.stderr.strip()[-500:]}")
    return program


# ---- command line ----


def _size(text: str) -> int:
    try:
        value = parse_size(text)
    except (ValueError, Failure) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value < 32 * _MIB or value % _MIB:
        raise argparse.ArgumentTypeError("give at least 32M, in whole MiB")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return int(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=(__doc__ or "").splitlines()[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="the default: some workloads, at most 3 minutes")
    length.add_argument("--full", action="store_true", help="all workloads, 7 rounds: more than an hour")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="only this scenario (a pattern: 'usemem-*'); repeat"
    )
    parser.add_argument(
        "--systems", default=",".join(systems.NAMES), metavar="NAME,…", help="some of %(default)s (default: all)"
    )
    parser.add_argument(
        "--rounds", type=_count, metavar="N", help="default: 7 with --full, else as many as fit 3 minutes, at most 3"
    )
    parser.add_argument(
        "--size", type=_size, default=256 * _MIB, metavar="SIZE", help="M, the peers' limit (default 256M)"
    )
    parser.add_argument(
        "--vswapd-option", action="append", default=[], metavar="OPTION", help="for vswapctl run, as --no-spill; repeat"
    )
    parser.add_argument("--output", metavar="DIRECTORY", default="build/bench", help="default: %(default)s")
    parser.add_argument(
        "--gil", action="store_true", help="instead: the rate of a program that swaps while the daemon's GIL is held"
    )
    parser.add_argument("--list", action="store_true", help="name the scenarios and end")
    parser.add_argument("--restore", action="store_true", help="put back what a killed run left, and end")
    options = parser.parse_args(arguments)
    options.systems = options.systems.split(",")
    if unknown := set(options.systems) - set(systems.NAMES):
        parser.error(f"no system {', '.join(sorted(unknown))}; there are {', '.join(systems.NAMES)}")
    options.scenarios = _chosen(scenarios.FULL if options.full else scenarios.QUICK, options.only)
    if not options.scenarios:
        parser.error(f"--only {' '.join(options.only)} matches nothing; see --list")
    is_timed = not options.full and options.rounds is None
    options.seconds_max = _QUICK_SECONDS_MAX if is_timed else math.inf
    options.rounds = options.rounds or (7 if options.full else 3)
    return options


def _chosen(available: Sequence[Scenario], patterns: Sequence[str]) -> list[Scenario]:
    """By pattern; what is asked for by name need not be in the quick ones."""
    if not patterns:
        return list(available)
    known = {scenario.name: scenario for scenario in (*available, *scenarios.FULL)[::-1]}
    return [known[name] for name in reversed(known) if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


# ---- run ----


def _on_signal(number: int, _: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _make_systems(options: argparse.Namespace, place: systems.Place, console: Console) -> list[systems.System]:
    made: list[systems.System] = []
    for kind in systems.KERNEL_SYSTEMS:
        if kind.name in options.systems:
            if reason := kind.missing():
                console.print(f"bench: without {kind.name}: {reason}")
            else:
                made.append(kind(place))
    if systems.Vswapd.name in options.systems:
        vswapctl = Path(sys.executable).with_name("vswapctl")
        made.append(systems.Vswapd(place, str(vswapctl), options.vswapd_option))
    return made


def _swap_bytes(options: argparse.Namespace) -> int:
    largest: int = max(scenario.working_set_bytes(options.size) for scenario in options.scenarios)
    return largest * 3 // 2 + 256 * _MIB


def _check_machine(options: argparse.Namespace, console: Console) -> None:
    """BenchError, or a warning."""
    if os.geteuid() != 0:
        raise BenchError("needs root, for swap devices and cgroups")
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    largest = max(scenario.working_set_bytes(options.size) for scenario in options.scenarios)
    if available < 2 * largest:
        raise BenchError(
            f"{format_size(available)} of memory are available, {format_size(2 * largest)} are needed; try --size"
        )
    free = shutil.disk_usage("/var/tmp").free
    if free < 2 * _swap_bytes(options):
        raise BenchError(f"/var/tmp has {format_size(free)} left, {format_size(2 * _swap_bytes(options))} are needed")
    with open("/proc/swaps") as file:
        if len(file.readlines()) > 1:
            console.print("bench: this machine swaps already; the areas measured here get the highest priority")


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Progress]:
    """A bar on a terminal; else nothing (lines are printed instead)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        progress.add_task("bench", total=total)
        yield progress


def _measure(
    options: argparse.Namespace, chosen: list[systems.System], program: str, charges_zswap: bool, console: Console
) -> tuple[list[ScenarioResult], bool]:
    """Results, and whether it went to the end. An interrupted run reports what it has."""
    results = [ScenarioResult(scenario) for scenario in options.scenarios]
    runs = 0
    current = ""
    with _progress(console, options.rounds * len(results) * len(chosen)) as progress:
        task = progress.task_ids[0]

        def on_run(scenario: Scenario, number: int, system: systems.System) -> None:
            nonlocal current, runs
            current = f"round {number + 1} · {scenario.name} · {system.name}"
            progress.update(task, description=current, completed=runs)
            runs += 1
            if progress.disable:
                console.print(f"bench: {current}", style="dim")

        def on_phase(phase: str) -> None:
            progress.update(task, description=f"{current} · {scenarios.row_title(phase)} done")

        session = Session(chosen, program, options.size, charges_zswap=charges_zswap, on_run=on_run, on_phase=on_phase)
        try:
            session.probe_daemon(options.scenarios[0])
            _run_rounds(options, session, results)
            progress.update(task, completed=runs, total=runs)
        except KeyboardInterrupt as interrupt:
            console.print(f"bench: interrupted ({interrupt or 'SIGINT'}); putting everything back")
            return results, False
    return results, True


def _run_rounds(options: argparse.Namespace, session: Session, results: list[ScenarioResult]) -> None:
    """As many as wanted; where time is short, of each scenario as many as fit, at least one."""
    started = time.monotonic()
    seconds_of = dict.fromkeys(range(len(results)), 0.0)
    for number in range(options.rounds):
        for index, result in enumerate(results):
            before = time.monotonic()
            if number > 0 and before - started + seconds_of[index] > options.seconds_max:
                continue
            session.run_round(result, number)
            seconds_of[index] = time.monotonic() - before


def _first_line(path: str) -> str:
    try:
        with open(path) as file:
            return file.readline().strip()
    except OSError:
        return "?"


def _notes(options: argparse.Namespace, chosen: list[systems.System], version: int) -> list[str]:
    with open("/proc/cpuinfo") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "?")
    return [
        (
            f"Linux {platform.release()}, {os.cpu_count()} CPUs ({cpu}), cgroup v{version}, "
            f"swappiness {_first_line('/proc/sys/vm/swappiness')}, "
            f"huge pages {_first_line('/sys/kernel/mm/transparent_hugepage/enabled')}"
        ),
        (
            f"M = {format_size(options.size)}; "
            "T = M + the smaller measured pool; swap-file: limit T; vswapd: --limit T - daemon_bytes"
        ),
        "interval: 95 % confidence of the median from 6 rounds on, else smallest to largest",
        "one random fault: accesses of 2 µs and more in random read, measured in the program",
        *[f"{system.name}: {system.describe()}" for system in chosen],
    ]


def _write_results(
    options: argparse.Namespace, results: list[ScenarioResult], notes: list[str], console: Console
) -> None:
    os.makedirs(options.output, exist_ok=True)
    report = table.report(results, options.size, notes)
    console.print(report)
    text = os.path.join(options.output, "bench.txt")
    with open(text, "w") as file:
        Console(file=file, width=200).print(report)
    document = {
        "when": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "notes": notes,
        "memory_bytes": options.size,
        "results": as_json(results),
    }
    data = os.path.join(options.output, "bench.json")
    with open(data, "w") as file:
        json.dump(document, file)
    written = [text, data]
    try:
        written += plots.write(results, options.output)
    except ImportError:
        console.print("bench: no plots, for matplotlib is not installed (.venv/bin/pip install matplotlib)")
    console.print(f"bench: written: {' '.join(written)}")


def _run(options: argparse.Namespace, console: Console) -> int:
    _check_machine(options, console)
    started = time.monotonic()
    hierarchy = find_hierarchy()
    with Journal() as journal:
        directory = tempfile.mkdtemp(prefix="vswap-bench-", dir="/var/tmp")
        journal.note("directory", path=directory)
        program = build_workloads(directory)
        cgroup = Cgroup(hierarchy, journal, f"vswap-bench-{os.getpid()}")
        place = systems.Place(journal, cgroup, directory, _swap_bytes(options))
        chosen = _make_systems(options, place, console)
        if not chosen:
            raise BenchError("nothing to measure")
        results, is_complete = _measure(options, chosen, program, hierarchy.charges_zswap, console)
        notes = _notes(options, chosen, hierarchy.version)
    for problem in journal.problems:
        console.print(f"bench: {problem}")
    if any(result.outcomes for result in results):
        _write_results(options, results, notes, console)
    console.print(f"bench: {time.monotonic() - started:.0f} s")
    is_good = is_complete and not journal.problems and not any(result.failures for result in results)
    return 0 if is_good else 130 if not is_complete else 1


def _run_gil(rounds: int, console: Console) -> int:
    console.print(f"bench: {gil.measure(rounds).describe()}")
    return 0


def _restore(console: Console) -> int:
    problems = restore(DEFAULT_PATH)
    console.print("\n".join(f"bench: {problem}" for problem in problems) or "bench: all is as it was")
    return 1 if problems else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    console = Console(highlight=False)
    options = _parse(arguments)
    if options.list:
        for scenario in options.scenarios:
            console.print(f"{scenario.name:12} {scenario.title}")
        return 0
    try:
        if options.restore:
            return _restore(console)
        for number in STOP_SIGNALS:
            signal.signal(number, _on_signal)
        return _run_gil(options.rounds, console) if options.gil else _run(options, console)
    except (BenchError, CgroupError, JournalError, ExecuteError, OSError) as error:
        sys.stderr.write(f"bench: {error}\n")
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"bench: {' '.join(error.cmd)} failed: {error.stderr or error.returncode}\n")
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
