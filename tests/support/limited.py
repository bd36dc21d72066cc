# SPDX-License-Identifier: MIT
"""limited — run a program under `vswapctl run`, watch it from outside, and say whether the limit was kept.

run_limited() for programs that end by themselves, LimitedProgram for servers and for tests that do
something to the program meanwhile. assert_honest() is what every run under a limit has to pass; a
client library that does nothing fails it (test_honesty.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from support.sampler import Sampler, Samples, tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIB = 1 << 20


def command_path(name: str) -> str:
    """`vswapctl` or `vswapd` of the environment that runs the tests."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: run scripts/setup first, and pytest from .venv")
    return str(path)


def need_program(name: str) -> str:
    """Path of a program that scripts/setup installs; skips the test without it."""
    path = shutil.which(name)
    if path is None:
        import pytest

        pytest.skip(f"{name} is not installed (scripts/setup as root installs it)")
    return path


def size_argument(count: int | str) -> str:
    """What --limit takes."""
    return count if isinstance(count, str) else str(count)


@dataclass
class LimitedResult:
    """All there is to know about one run."""

    argv: list[str]
    status: int  # of vswapctl, hence of the command; negative: signal, as subprocess has it
    stdout: bytes
    stderr: bytes
    seconds: float
    samples: Samples
    stats: dict[str, Any] = field(default_factory=dict)  # --stats; empty when none was written

    @property
    def run(self) -> dict[str, Any]:
        """What `run` itself reported: usage_bytes_max, swapped_pages_max, faults, …"""
        document: dict[str, Any] = self.stats.get("run", {})
        return document

    @property
    def swapped_bytes_max(self) -> int:
        """Most that was swapped at once."""
        return max(self.samples.swapped_bytes_max, int(self.run.get("swapped_pages_max", 0)) * 4096)

    @property
    def faults(self) -> int:
        """Page faults that the daemon answered for the group."""
        return max(self.samples.faults, int(self.run.get("faults", 0)))

    def describe(self) -> str:
        """For assertion messages."""
        samples = self.samples
        return (
            f"{' '.join(self.argv)[:200]}: status {self.status}, {self.seconds:.1f} s, "
            f"peak {samples.peak_bytes / MIB:.1f} MiB (resident {samples.peak_resident_bytes / MIB:.1f}), "
            f"swapped max {self.swapped_bytes_max / MIB:.1f}, demand {samples.demand_bytes_max / MIB:.1f}, "
            f"pool max {samples.pool_bytes_max / MIB:.1f}, metadata max {samples.metadata_bytes_max / MIB:.2f}, "
            f"spill max {samples.spill_bytes_max / MIB:.1f}, daemon {samples.daemon_bytes_max / MIB:.1f}, "
            f"faults {self.faults}, {samples.count} samples, usage max {self.run.get('usage_bytes_max', 0) / MIB:.1f}\n"
            f"stderr: {self.stderr[-2000:].decode(errors='replace')}"
        )


class LimitedProgram:
    """with LimitedProgram("64M", [...]) as program: … — then program.result.

    `options` go to `vswapctl run`; on leaving the block a program that still runs is ended (SIGTERM,
    then SIGKILL to vswapctl and its whole tree).
    """

    def __init__(
        self,
        limit: int | str,
        argv: Sequence[str],
        *,
        options: Sequence[str] = ("--private",),
        environment: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        cwd: str | Path | None = None,
        seconds_max: float = 120.0,
    ) -> None:
        self.argv = list(argv)
        self._limit = size_argument(limit)
        self._options = list(options)
        self._environment = {**os.environ, **(environment or {})}
        self._stdin = stdin
        self._cwd = cwd
        self._seconds_max = seconds_max
        self.result: LimitedResult | None = None

    def __enter__(self) -> Self:
        # Files, not pipes: a program that writes much must not wait for us.
        self._directory = tempfile.TemporaryDirectory(prefix="vswap-test-")
        directory = Path(self._directory.name)
        self._stats_path = directory / "stats.json"
        self._files = {name: (directory / name).open("w+b") for name in ("stdin", "stdout", "stderr")}
        if self._stdin is not None:
            self._files["stdin"].write(self._stdin)
            self._files["stdin"].seek(0)
        command = [command_path("vswapctl"), "run", *self._options, "--limit", self._limit]
        command += ["--stats", str(self._stats_path), "--", *self.argv]
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=self._cwd,
            env=self._environment,
            start_new_session=True,
            stdin=self._files["stdin"],
            stdout=self._files["stdout"],
            stderr=self._files["stderr"],
        )
        self.sampler = Sampler(self.process.pid).__enter__()
        return self

    @property
    def socket_path(self) -> str:
        """The daemon's socket, once the command runs."""
        return self.sampler.wait_connected()

    def wait_said(self, what: bytes, seconds_max: float = 60.0) -> None:
        """Until the program has written that to its standard error. AssertionError."""
        deadline = time.monotonic() + seconds_max
        while what not in (said := os.pread(self._files["stderr"].fileno(), 1 << 20, 0)):
            assert time.monotonic() < deadline and self.process.poll() is None, said
            time.sleep(0.02)  # polling another process's output

    def wait(self, seconds_max: float | None = None) -> LimitedResult:
        """Until it has ended. TimeoutError, after it was ended by force."""
        try:
            self.process.wait(seconds_max if seconds_max is not None else self._seconds_max)
        except subprocess.TimeoutExpired:
            self._kill()
            raise TimeoutError(f"not finished: {self._collect().describe()}") from None
        return self._collect()

    def _collect(self) -> LimitedResult:
        if self.result is None:
            seconds = time.monotonic() - self._started
            self.sampler.__exit__(None, None, None)
            texts = {}
            for name in ("stdout", "stderr"):
                self._files[name].seek(0)
                texts[name] = self._files[name].read()
            stats = json.loads(self._stats_path.read_text()) if self._stats_path.exists() else {}
            self.result = LimitedResult(
                self.argv, self.process.returncode, texts["stdout"], texts["stderr"], seconds,
                self.sampler.samples, stats,
            )  # fmt: skip
        return self.result

    def _kill(self) -> None:
        """Vswapctl and everything below it, the embedded daemon (a process group of its own) included."""
        victims = [self.process.pid, self.sampler.samples.daemon_pid, *tree(self.process.pid)]
        if self._is_daemon_foreign():
            victims.remove(self.sampler.samples.daemon_pid)
        for pid in victims:
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(30)

    def _is_daemon_foreign(self) -> bool:
        return "--private" not in self._options

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self._kill()
        self._collect()
        for file in self._files.values():
            file.close()
        self._directory.cleanup()


class GoingOn:
    """A verify_memory that goes on for as long as the test does, however slow that is. `options`: for it."""

    def __init__(self, directory: Path, seconds_max: float) -> None:
        self._file = directory / "going-on"
        self._file.touch()
        self.options = ["--seconds", f"{seconds_max:.0f}", "--while", str(self._file)]

    def end(self) -> None:
        """It ends after the pass that it is at."""
        self._file.unlink()


def run_limited(limit: int | str, argv: Sequence[str], **options: Any) -> LimitedResult:
    """Run to the end; arguments as LimitedProgram."""
    with LimitedProgram(limit, argv, **options) as program:
        return program.wait()


def run_native(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The same program without a limit."""
    return subprocess.run(list(argv), capture_output=True, check=False, **options)


def assert_honest(
    result: LimitedResult, limit_bytes: int, *, demand_bytes: int | None = None, moment_bytes: int = 32 * MIB
) -> None:
    """The limit was kept, and by swapping.

    peak <= limit + 10 %, or + 16 MiB for the small limits of CI: what a process can touch in a few looks on
    a busy machine does not shrink with the limit (README, Guarantees and limits). There, one sample in twenty
    may be above by another `moment_bytes`: a look that is late by a scheduler's tick. At least half of the
    excess was swapped; faults were answered; every member of the tree above the minimum was managed.
    `demand_bytes`: what the program needs without a limit, when the test knows it; else the most that was
    seen resident and swapped together.
    """
    samples = result.samples
    told = result.describe()
    print(told)  # the figures, for whoever asks with -s
    assert samples.count >= 10, f"too few samples to judge: {told}"
    assert samples.status_count >= 1, f"the daemon never answered: {told}"
    bound = max(limit_bytes * 1.10, limit_bytes + 16 * MIB)
    over = ", ".join(
        f"{start:.2f}-{end:.2f} s {highest / MIB:.1f} MiB" for start, end, highest in samples.excursions(bound)[:20]
    )
    is_small = bound > limit_bytes * 1.10
    moments, moment_bytes = (samples.count // 20, moment_bytes) if is_small else (0, 0)
    exceeded = f"over {bound / MIB:.1f} MiB for a limit of {limit_bytes / MIB:.1f}: {over}; {told}"
    assert samples.peak_bytes <= bound + moment_bytes, exceeded
    assert samples.above(bound) <= moments, exceeded
    excess = (demand_bytes if demand_bytes is not None else samples.demand_bytes_max) - limit_bytes
    assert excess > 0, f"the program fits its limit, so the run shows nothing: {told}"
    assert result.swapped_bytes_max >= excess / 2, f"less than half of {excess / MIB:.1f} MiB swapped: {told}"
    assert result.faults > 0, f"no fault was answered: {told}"
    unmanaged = [f"{member.pid} {member.comm} {member.bytes_max / MIB:.1f} MiB" for member in samples.unmanaged]
    assert not unmanaged, f"not managed: {', '.join(unmanaged)}; {told}"


def python_argv(source: str) -> list[str]:
    """`python -c source` with the interpreter of the tests."""
    return [sys.executable, "-c", source]
