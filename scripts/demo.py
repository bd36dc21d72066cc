# SPDX-License-Identifier: MIT
"""Sort and aggregate a data set with a quarter of the memory that takes, and show what happened.

Generates the sales logs of many tills as text, then runs two unmodified programs over them, first
without a limit and then under `vswapctl run --limit`: GNU sort, which puts them into one order of time,
and NumPy, which totals them by shop. Both have to give the same answer. What they cost is measured from
outside (smaps_rollup), not asked of vswapd.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.limited import MIB, LimitedProgram, LimitedResult

# One sale as a log has it. {…} are filled in; all records are of one length, so NumPy needs no parser.
_TEMPLATE = (
    '{"time":"TIME__________","shop":"SHOP","city":"CITY________________","product":"PRODUCT_______________________",'
    '"cents":CENTS_____,"currency":"EUR","payment":"card","status":"shipped","warehouse":"central","priority":"normal",'
    '"channel":"web","agent":"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Safari/537.36"}\n'
)
_RECORD_BYTES = len(_TEMPLATE)
_SHOPS = 5000
_SOURCES = 64  # the log is of so many tills, each in order, one behind the other
_NEED_FACTOR = 4  # working set against limit: what the demo is to show
_SLACK = 1.10

_AGGREGATE = f"""
import hashlib, sys
import numpy as np

records = np.fromfile(sys.argv[1], dtype=np.uint8).reshape(-1, {_RECORD_BYTES})
def number(first, width):
    value = np.zeros(len(records), dtype=np.int64)
    for column in range(first, first + width):
        value = value * 10 + (records[:, column] - ord("0"))
    return value
shop, cents = number({_TEMPLATE.index("SHOP")}, 4), number({_TEMPLATE.index("CENTS_")}, 10)
total = np.bincount(shop, weights=cents, minlength={_SHOPS}).astype(np.int64)
order = np.lexsort((cents, shop))
first = np.searchsorted(shop[order], np.arange({_SHOPS}))
median = cents[order][np.minimum((first + np.append(first[1:], len(order))) // 2, len(order) - 1)]
print(len(records), int(total.sum()), int(median.sum()), hashlib.sha256(total.tobytes() + median.tobytes()).hexdigest())
"""


@dataclass
class Step:
    """One program, with and without a limit."""

    name: str
    working_set_bytes: int
    native_seconds: float
    result: LimitedResult
    same_answer: bool

    def problems(self, limit_bytes: int) -> list[str]:
        """What did not come out as promised."""
        found = []
        if self.result.status != 0:
            found.append(f"{self.name}: {self.result.describe()}")
        elif not self.same_answer:
            found.append(f"{self.name}: another answer than without a limit")
        if self.result.samples.peak_bytes > limit_bytes * _SLACK:
            found.append(f"{self.name}: peak {_mib(self.result.samples.peak_bytes)} is over the limit")
        if self.result.faults == 0 or self.result.swapped_bytes_max == 0:
            found.append(f"{self.name}: nothing was swapped")
        if self.working_set_bytes < limit_bytes * _NEED_FACTOR:
            found.append(f"{self.name}: only {self.working_set_bytes / limit_bytes:.1f} times its limit")
        return found


def _mib(count: float) -> str:
    return f"{count / MIB:,.0f} MiB"


def _digits(values: np.ndarray, columns: int) -> np.ndarray:
    powers = 10 ** np.arange(columns - 1, -1, -1, dtype=np.int64)
    return (values[:, None] // powers % 10 + ord("0")).astype(np.uint8)


def _names(generator: np.random.Generator, count: int, first: list[str], last: list[str], width: int) -> np.ndarray:
    """`count` made-up names, padded to `width`, as rows of bytes."""
    names = [
        f"{first[generator.integers(len(first))]} {last[generator.integers(len(last))]} {number}"
        for number in range(count)
    ]
    return np.frombuffer("".join(name.ljust(width)[:width] for name in names).encode(), dtype=np.uint8).reshape(
        count, width
    )


def write_records(path: Path, size_bytes: int, seed: int) -> int:
    """Sales as JSON, one a line: the logs of _SOURCES tills, each in order of time. Returns how many."""
    generator = np.random.default_rng(seed)
    cities = _names(
        generator, _SHOPS, ["North", "South", "Old", "New", "Upper"], ["ville", "field", "haven", "ton"], 20
    )
    products = _names(generator, 997, ["garden", "kitchen", "travel", "office"], ["table", "lamp", "chair", "box"], 30)
    rows = max(1, size_bytes // _RECORD_BYTES // _SOURCES)
    with path.open("wb") as file:
        for _ in range(_SOURCES):
            lines = np.tile(np.frombuffer(_TEMPLATE.encode(), dtype=np.uint8), (rows, 1))
            shops = generator.integers(0, _SHOPS, rows)
            fields = {
                "TIME__________": _digits(np.sort(generator.integers(0, 10**14, rows)), 14),
                "SHOP": _digits(shops, 4),
                "CITY________________": cities[shops],
                "PRODUCT_______________________": products[generator.zipf(1.3, rows) % len(products)],
                "CENTS_____": _digits(generator.integers(100, 2_000_000, rows), 10),
            }
            for field, values in fields.items():
                first = _TEMPLATE.index(field)
                lines[:, first : first + len(field)] = values
            file.write(lines.tobytes())
    return rows * _SOURCES


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run_native(argv: list[str]) -> tuple[bytes, float, int]:
    """Output, seconds, peak resident bytes."""
    started = time.monotonic()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "LC_ALL": "C"})
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"demo: without a limit, {argv[0]} ended with {process.returncode}")
    return output, time.monotonic() - started, usage.ru_maxrss << 10


def _run_limited(argv: list[str], options: argparse.Namespace) -> LimitedResult:
    run_options = ["--private", *(["--pool", options.pool] if options.pool else [])]
    with LimitedProgram(
        options.limit_bytes, argv, options=run_options, environment={"LC_ALL": "C"}, seconds_max=3600
    ) as program:
        return program.wait()


def sort_step(data: Path, directory: Path, options: argparse.Namespace) -> Step:
    """GNU sort, told that it may use more than there is."""
    outputs = [directory / "sorted-native", directory / "sorted-limited"]
    commands = [["sort", "-S", "2G", "-T", str(directory), "-o", str(output), str(data)] for output in outputs]
    _, seconds, resident = _run_native(commands[0])
    result = _run_limited(commands[1], options)
    same = outputs[1].exists() and _sha256(outputs[0]) == _sha256(outputs[1])
    for output in outputs:
        output.unlink(missing_ok=True)
    return Step("sort", resident, seconds, result, same)


def aggregate_step(data: Path, options: argparse.Namespace) -> Step:
    """NumPy: everything in memory, as people write it."""
    command = [sys.executable, "-c", _AGGREGATE, str(data)]
    output, seconds, resident = _run_native(command)
    result = _run_limited(command, options)
    return Step("NumPy totals", resident, seconds, result, result.stdout == output)


def show(steps: list[Step], limit_bytes: int, console: Console) -> None:
    """The short table."""
    table = Table(title=f"vswapctl run --limit {limit_bytes // MIB}M")
    table.add_column("")
    for step in steps:
        table.add_column(step.name, justify="right")

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    row("working set without a limit", *[_mib(step.working_set_bytes) for step in steps])
    row("  times the limit", *[f"{step.working_set_bytes / limit_bytes:.1f}" for step in steps])
    row("limit", *[_mib(limit_bytes) for _ in steps])
    row("peak, all RAM it cost", *[_mib(step.result.samples.peak_bytes) for step in steps])
    row("  of which resident", *[_mib(step.result.samples.peak_resident_bytes) for step in steps])
    row("swapped, at most", *[_mib(step.result.swapped_bytes_max) for step in steps])
    for tier in ("zero", "same", "pool", "spill"):
        pages = [step.result.samples.status_at_most_swapped.get(f"{tier}_pages", 0) for step in steps]
        row(f"  {tier} pages then", *[f"{count:,}" for count in pages])
    row("  bytes in pool, at most", *[_mib(step.result.samples.pool_bytes_max) for step in steps])
    row("  bytes on disk, at most", *[_mib(step.result.samples.spill_bytes_max) for step in steps])
    row("page faults answered", *[f"{step.result.faults:,}" for step in steps])
    for backing in ("zero", "same", "pool", "spill"):
        latencies = [step.result.stats.get("latency_us", {}).get(backing, {}) for step in steps]
        cells = [f"{entry['p50']:,.0f} / {entry['p99']:,.0f} µs" if entry.get("count") else "–" for entry in latencies]
        row(f"  from {backing}, p50 / p99", *cells)
    row("seconds without a limit", *[f"{step.native_seconds:.1f}" for step in steps])
    row("seconds under the limit", *[f"{step.result.seconds:.1f}" for step in steps])
    row("slowdown", *[f"{step.result.seconds / step.native_seconds:.1f} ×" for step in steps])
    row("same answer", *["yes" if step.same_answer else "NO" for step in steps])
    console.print(table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--size", type=int, default=320, metavar="MB", help="size of the data set (default %(default)s)"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="MIB", help="limit (default: a quarter of the data)")
    parser.add_argument("--pool", default="", metavar="SIZE", help="cap the compressed pool (default: adapts)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.limit_bytes = (options.limit or max(16, options.size // 4)) * MIB
    return options


def main() -> int:
    """Entry point."""
    options = _parse()
    console = Console(highlight=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="vswap-demo-", dir=os.environ.get("VSWAPD_SPILL_DIR", "/var/tmp")) as name:
        directory = Path(name)
        data = directory / "sales"
        count = write_records(data, options.size * 1000_000, options.seed)
        console.print(
            f"demo: {count:,} records, {data.stat().st_size / 1e6:,.0f} MB of text; sorting, then totalling them"
        )
        steps = [sort_step(data, directory, options), aggregate_step(data, options)]
    show(steps, options.limit_bytes, console)
    problems = [problem for step in steps for problem in step.problems(options.limit_bytes)]
    for problem in problems:
        sys.stderr.write(f"demo: {problem}\n")
    if not problems:
        console.print(f"Both answers are right, with at most {_mib(options.limit_bytes)} of memory.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
