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

from benchmarks import applications, floor, gil, plots, scaling, scenarios, systems, table
from benchmarks.build import build
from benchmarks.cgroup import Cgroup, CgroupError, find_hierarchy
from benchmarks.execute import ExecuteError
from benchmarks.journal import DEFAULT_PATH, STOP_SIGNALS, Journal, JournalError, restore
from benchmarks.session import ScenarioResult, Session, as_json, from_json
from vswapd.config import SPILL_DIRECTORY
from vswapd.failure import Failure
from vswapd.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.scenarios import Scenario

_MIB = 1 << 20
_QUICK_SECONDS_MAX = 170.0  # building and reporting make it three minutes

_NO_PLOTS = "bench: no plots, for matplotlib is not installed: .venv/bin/pip install matplotlib"


class BenchError(Exception):
    """One line; nothing was measured."""


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


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


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
    parser.add_argument("--minutes", type=_minutes, metavar="N", help="begin no round that would not be over by then")
    parser.add_argument(
        "--run-seconds",
        type=_count,
        default=300,
        metavar="N",
        help="end a run that takes longer (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the rounds that bench.json in --output lacks")
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
    parser.add_argument(
        "--scaling",
        nargs="?",
        const=",".join(axis.name for axis in scaling.AXES),
        metavar="AXIS,…",
        help="instead: the cost of a fault against the number of some of %(const)s (default: all)",
    )
    parser.add_argument(
        "--floor", action="store_true", help="instead: the steps that swap in user space cannot leave out, and their sums"
    )
    parser.add_argument("--list", action="store_true", help="name the scenarios and end")
    parser.add_argument("--restore", action="store_true", help="put back what a killed run left, and end")
    options = parser.parse_args(arguments)
    options.systems = options.systems.split(",")
    if unknown := set(options.systems) - set(systems.NAMES):
        parser.error(f"no system {', '.join(sorted(unknown))}; there are {', '.join(systems.NAMES)}")
    if options.scaling is not None:
        options.scaling = options.scaling.split(",")
        if unknown := set(options.scaling) - {axis.name for axis in scaling.AXES}:
            parser.error(f"no axis {', '.join(sorted(unknown))}; there are {', '.join(a.name for a in scaling.AXES)}")
    options.scenarios = _chosen(scenarios.FULL if options.full else scenarios.QUICK, options.only)
    if not options.scenarios:
        parser.error(f"--only {' '.join(options.only)} matches nothing; see --list")
    is_timed = not options.full and options.rounds is None
    options.seconds_max = _QUICK_SECONDS_MAX if is_timed else math.inf
    options.is_each_once = options.minutes is None
    if options.minutes is not None:
        options.seconds_max = options.minutes * 60
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
    if systems.Native.name in options.systems:
        made.append(systems.Native(place))
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


def _leave_out_applications(options: argparse.Namespace, console: Console) -> None:
    """Those that the machine lacks a program for."""
    for scenario in list(options.scenarios):
        if scenario.is_application and (lacking := applications.missing(scenario.mode[0])):
            console.print(f"bench: without {scenario.name}: no {lacking} here")
            options.scenarios.remove(scenario)


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Progress]:
    """A bar on a terminal; else nothing (lines are printed instead)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        progress.add_task("bench", total=total)
        yield progress


def _measure(
    options: argparse.Namespace,
    results: list[ScenarioResult],
    chosen: list[systems.System],
    place: systems.Place,
    program: str,
    console: Console,
) -> bool:
    """Fill in results; whether it went to the end. An interrupted run reports what it has."""
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

        charges_zswap = place.cgroup.hierarchy.charges_zswap
        session = Session(
            chosen, place, program, options.size, charges_zswap=charges_zswap, on_run=on_run, on_phase=on_phase
        )
        try:
            session.probe_daemon()
            _run_rounds(options, session, results)
            progress.update(task, completed=runs, total=runs)
        except KeyboardInterrupt as interrupt:
            console.print(f"bench: interrupted ({interrupt or 'SIGINT'}); putting everything back")
            return False
    return True


def _run_rounds(options: argparse.Namespace, session: Session, results: list[ScenarioResult]) -> None:
    """As many as wanted; where time is short, of each scenario as many as fit."""
    started = time.monotonic()
    seconds_of = {index: sum(result.round_seconds(0)) for index, result in enumerate(results)}
    prepared: set[int] = set()
    for number in range(options.rounds):
        for index, result in enumerate(results):
            systems_of = session.systems_of(result.scenario)
            if result.is_kept or all(result.has_round(system.name, number) for system in systems_of):
                continue
            before = time.monotonic()
            may_be_late = number == 0 and options.is_each_once
            if not may_be_late and before - started + seconds_of[index] > options.seconds_max:
                continue
            if index not in prepared:
                prepared.add(index)
                if not session.prepare(result):
                    continue
                before = time.monotonic()
            session.run_round(result, number)
            seconds_of[index] = time.monotonic() - before


def _earlier_results(options: argparse.Namespace) -> list[ScenarioResult]:
    """One for each scenario, with what an earlier run measured when it is resumed. BenchError."""
    results = [ScenarioResult(scenario, options.size) for scenario in options.scenarios]
    path = os.path.join(options.output, "bench.json")
    if not options.resume or not os.path.exists(path):
        return results
    with open(path) as file:
        document = json.load(file)
    if document["memory_bytes"] != options.size:
        raise BenchError(f"{path} is of --size {format_size(document['memory_bytes'])}; give that, or another --output")
    by_name = {entry["scenario"]: entry for entry in document["results"]}
    known = {scenario.name: scenario for scenario in scenarios.FULL}
    others = (by_name.keys() & known.keys()) - {scenario.name for scenario in options.scenarios}
    results += [ScenarioResult(known[name], options.size, is_kept=True) for name in others]
    for result in results:
        if result.scenario.name in by_name:
            from_json(result, by_name[result.scenario.name])
    order = [scenario.name for scenario in scenarios.FULL]
    return sorted(results, key=lambda result: order.index(result.scenario.name))


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
            "T = M + the smaller measured pool; swap-file: limit T; vswapd: --limit T - daemon_bytes, the most that its "
            "own processes took in that scenario"
        ),
        "±, and the interval behind a ratio: 95 % confidence of the median from 6 rounds on, else least to most",
        "p50, p99, p999: of single accesses of 2 µs and more, measured in the program; of redis: of requests",
        "✗: the goal is missed; ✗✗: slower than the peer, whole interval. user, system time: of the whole machine",
        *[f"{system.name}: {system.describe()}" for system in chosen],
    ]


def _write_results(
    options: argparse.Namespace, results: list[ScenarioResult], notes: list[str], console: Console
) -> None:
    os.makedirs(options.output, exist_ok=True)
    report = table.report(results, notes)
    console.print(report)
    text = os.path.join(options.output, "bench.txt")
    with open(text, "w") as file:
        Console(file=file, width=80).print(report)
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
        console.print(_NO_PLOTS)
    console.print(f"bench: written: {' '.join(written)}")


def _run(options: argparse.Namespace, console: Console) -> int:
    _check_machine(options, console)
    _leave_out_applications(options, console)
    started = time.monotonic()
    hierarchy = find_hierarchy()
    with Journal() as journal:
        directory = tempfile.mkdtemp(prefix="vswap-bench-", dir="/var/tmp")
        journal.note("directory", path=directory)
        program = build(directory, "workloads")
        cgroup = Cgroup(hierarchy, journal, f"vswap-bench-{os.getpid()}")
        place = systems.Place(journal, cgroup, directory, _swap_bytes(options), options.run_seconds)
        chosen = _make_systems(options, place, console)
        if not chosen:
            raise BenchError("nothing to measure")
        results = _earlier_results(options)
        is_complete = _measure(options, results, chosen, place, program, console)
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


def _run_floor(console: Console) -> int:
    if os.geteuid() != 0:
        raise BenchError("needs root, for userfaultfd")
    console.print("\n".join(floor.table_of(floor.measure(os.environ.get("VSWAPD_SPILL_DIR") or SPILL_DIRECTORY))))
    return 0


def _run_scaling(options: argparse.Namespace, console: Console) -> int:
    if os.geteuid() != 0:
        raise BenchError("needs root, for userfaultfd")
    on_point = lambda axis, point: console.print(f"bench: {axis.title}: {point}", style="dim")  # noqa: E731
    measured = scaling.measure(options.scaling, on_point)
    for series in measured:
        console.print("\n" + "\n".join(scaling.table_of(series)))
    console.print("\nslope: of the logarithms; 0 is flat, 1 is linear in the number")
    written, has_plot = scaling.write(measured, options.output)
    if not has_plot:
        console.print(_NO_PLOTS)
    console.print(f"bench: written: {' '.join(written)}")
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
        if options.floor:
            return _run_floor(console)
        if options.scaling is not None:
            return _run_scaling(options, console)
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
