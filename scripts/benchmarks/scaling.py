# SPDX-License-Identifier: MIT
"""scaling — what a fault costs against the number of clients, of threads, of mappings, and of slots.

Clients, threads and mappings: a daemon of its own, and the program of scaling.c under it, over the same amount of
memory at each point. Slots: the table alone (slots.c), and faults of a program beside a region whose slots are
synthetic (the data plane without Python, tests/support/drive.c).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

_ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(_ROOT / "tests"))

from benchmarks.build import build
from benchmarks.execute import ExecuteError, execute
from support.sampler import ControlClient, answering_pid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SCHED_IDLE = "5"
_START_SECONDS_MAX = 20.0
_TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")
_ACCESSES = 40_000


@dataclass(frozen=True)
class Axis:
    """One number that grows while everything else stays. `options`: of scaling.c."""

    name: str
    title: str
    points: tuple[int, ...]
    limit_mib: int
    options: tuple[str, ...] = ()


AXES = (
    Axis("clients", "clients", (1, 2, 4, 8, 16, 32, 64), 1000, ("--mib", "1536")),
    Axis("threads", "threads of a client", (1, 2, 4, 8, 16), 160, ("--mib", "256")),
    Axis(
        "regions", "mappings of a client", (1, 10, 100, 1000, 10_000, 30_000), 160, ("--mib", "236", "--stride", "32")
    ),
    Axis("slots", "slots of all", (10**4, 10**5, 10**6, 10**7, 10**8), 160, ("--mib", "256")),
)
# A figure of a point, and what it is.
FIGURES = {
    "one_p50_us": "one fault, p50",
    "one_p99_us": "one fault, p99",
    "all_us": "all at once: time a fault",
    "daemon_us": "all at once: daemon's CPU a fault",
    "rest_ms": "at rest: daemon's CPU a second",
    "append_ns": "table: append",
    "look_up_ns": "table: look-up",
    "replace_ns": "table: replace",
    "drop_and_set_ns": "table: drop, set again",
    "takeover_ns": "table: taken over, a slot",
    "bytes": "table: bytes a slot",
}
_MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3}


@dataclass
class Series:
    """What was measured along an axis: figures by point."""

    axis: Axis
    figures: dict[int, dict[str, float]] = field(default_factory=dict)

    def slope(self, figure: str) -> float | None:
        """Least squares of log(figure) over log(number): 0 is flat, 1 is linear. None with fewer than two points."""
        points = [(math.log(x), math.log(row[figure])) for x, row in self.figures.items() if row.get(figure, 0) > 0]
        if len(points) < 2:
            return None
        mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        return float(sum((x - mean_x) * (y - mean_y) for x, y in points) / spread)


# ---- programs ----


def _build_drive(directory: str) -> str:
    meson = str(Path(sys.executable).with_name("meson"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    build = os.path.join(directory, "drive")
    for command in (
        [meson, "setup", build, str(_ROOT), "-Dvswap_python=false"],
        [meson, "compile", "-C", build, "drive"],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise ExecuteError(f"cannot build drive: {done.stdout.strip()[-500:]}")
    return os.path.join(build, "drive")


# ---- clients, threads, mappings ----


def _daemon_us(pid: int) -> float:
    """CPU time of its threads, without those that only keep a CPU from sleeping (csrc/awake.h)."""
    ticks = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
            if fields[38] != _SCHED_IDLE:
                ticks += int(fields[11]) + int(fields[12])
    return ticks * _TICK_US


@contextlib.contextmanager
def _daemon(directory: str) -> Iterator[str]:
    """A daemon's socket."""
    path = os.path.join(directory, "vswapd.sock")
    vswapd = str(Path(sys.executable).with_name("vswapd"))
    process = subprocess.Popen([vswapd, "--socket", path, "--log-level", "error"])
    try:
        yield path
    finally:
        process.terminate()
        process.wait()


class _Watcher:
    """Looks at the daemon where a phase begins and ends."""

    def __init__(self, socket: str) -> None:
        self._pid = answering_pid(socket, _START_SECONDS_MAX)
        self._control = ControlClient(socket, 60.0)
        self._before = (0.0, 0)
        self.daemon_us: dict[str, float] = {}
        self.faults: dict[str, int] = {}

    def look(self, phase: str) -> None:
        """At the end of a line."""
        faults = int(self._control.status(60.0)["counters"]["faults"])
        used_us = _daemon_us(self._pid)
        if not phase.endswith("_begins"):
            self.daemon_us[phase] = used_us - self._before[0]
            self.faults[phase] = faults - self._before[1]
        self._before = used_us, faults


def _figures(phases: dict[str, dict[str, Any]]) -> dict[str, float]:
    one, everybody = phases["one"], phases["all"]
    if one["faults"] < 100 or everybody["faults"] < 100:
        raise ExecuteError("hardly a page was swapped: nothing to judge by")
    return {
        "one_p50_us": one["p50_ns"] / 1000,
        "one_p99_us": one["p99_ns"] / 1000,
        "all_us": everybody["seconds"] * 1e6 / everybody["faults"],
    }


def _measure_faults(axis: Axis, point: int, program: str, socket: str) -> dict[str, float]:
    watcher = _Watcher(socket)
    vswapctl = str(Path(sys.executable).with_name("vswapctl"))
    argv = [vswapctl, "run", "--socket", socket, "--limit", f"{axis.limit_mib}M", "--", program]
    argv += [*axis.options, f"--{axis.name}", str(point), "--accesses", str(_ACCESSES)]
    phases, _ = execute(argv, watcher.look)
    figures = _figures(phases)
    if watcher.faults["all"] > 0:
        figures["daemon_us"] = watcher.daemon_us["all"] / watcher.faults["all"]
    figures["rest_ms"] = watcher.daemon_us["rest"] / phases["rest"]["seconds"] / 1000
    return figures


# ---- slots ----


def _measure_slots(axis: Axis, point: int, directory: str, program: str) -> dict[str, float]:
    from vswapd import paths

    table, _ = execute([os.path.join(directory, "slots"), str(point)], lambda _: None)
    figures = {name: float(value) for name, value in table["slots"].items() if name != "slots"}
    drive = os.path.join(directory, "drive", "drive")
    argv = [drive, "--limit", str(axis.limit_mib << 20), "--synthetic-slots", str(point), "--lib", paths.library()]
    phases, _ = execute([*argv, "--", program, *axis.options, "--accesses", str(_ACCESSES)], lambda _: None)
    return figures | _figures(phases)


def measure(names: Sequence[str], on_point: Callable[[Axis, int], None]) -> list[Series]:
    """All points of the axes of these names. ExecuteError, OSError."""
    measured = []
    with tempfile.TemporaryDirectory(prefix="vswap-bench-", dir="/var/tmp") as directory:
        program = build(directory, "scaling")
        if "slots" in names:
            build(directory, "slots")
            _build_drive(directory)
        for axis in AXES:
            if axis.name not in names:
                continue
            series = Series(axis)
            measured.append(series)
            with contextlib.ExitStack() as running:
                socket = running.enter_context(_daemon(directory)) if axis.name != "slots" else ""
                for point in axis.points:
                    on_point(axis, point)
                    if axis.name == "slots":
                        series.figures[point] = _measure_slots(axis, point, directory, program)
                    else:
                        series.figures[point] = _measure_faults(axis, point, program, socket)
    return measured


# ---- report ----


def table_of(series: Series) -> list[str]:
    """Lines of at most 80 columns."""
    figures = [name for name in FIGURES if any(name in row for row in series.figures.values())]
    lines = [f"{series.axis.title:22}" + "".join(f"{_short(point):>7}" for point in series.figures) + "  slope"]
    for name in figures:
        unit = name.rpartition("_")[2].replace("us", "µs")
        values = "".join(f"{_figure(row.get(name)):>7}" for row in series.figures.values())
        slope = series.slope(name)
        label = FIGURES[name].replace("all at once: ", "all: ").replace("daemon's CPU", "daemon")
        lines.append(f"{label[:18]:18} {unit if unit != 'bytes' else '':3}{values}  {slope or 0:+.2f}")
    return lines


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _short(point: int) -> str:
    return f"1e{round(math.log10(point))}" if point >= 100_000 else f"{point:,}".replace(",", " ")


def as_json(measured: Sequence[Series]) -> list[dict[str, Any]]:
    """Everything."""
    return [
        {
            "axis": series.axis.name,
            "limit_mib": series.axis.limit_mib,
            "options": series.axis.options,
            "points": series.figures,
            "slopes": {name: series.slope(name) for name in FIGURES if series.slope(name) is not None},
        }
        for series in measured
    ]


def plot(measured: Sequence[Series], path: str) -> None:
    """A PNG file: a picture for each axis. ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, len(measured), figsize=(5 * len(measured), 4), squeeze=False)
    for axes, series in zip(all_axes[0], measured, strict=True):
        for name, title in FIGURES.items():
            if name == "bytes":
                continue
            points = [
                (x, row[name] * _MICROSECONDS[name.rpartition("_")[2]])
                for x, row in series.figures.items()
                if name in row
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=title)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(series.axis.title)
        axes.set_ylabel("µs")
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def write(measured: Sequence[Series], directory: str) -> tuple[list[str], bool]:
    """Paths of JSON and PNG, and whether there is a plot. Axes that an earlier run left there stay."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "scaling.json")
    documents = as_json(measured)
    if os.path.exists(path):
        with open(path) as file:
            earlier = json.load(file)
        done = {document["axis"] for document in documents}
        documents = [document for document in earlier if document["axis"] not in done] + documents
    with open(path, "w") as file:
        json.dump(documents, file, indent=1)
    by_name = {axis.name: axis for axis in AXES}
    everything = [
        Series(by_name[document["axis"]], {int(x): row for x, row in document["points"].items()})
        for document in documents
    ]
    picture = os.path.join(directory, "scaling.png")
    try:
        plot(everything, picture)
    except ImportError:
        return [path], False
    return [path, picture], True
