# SPDX-License-Identifier: MIT
"""journal — what was changed on the machine, written down before it is changed, and how each goes back.

A change is a line of JSON in a file: kind and arguments. Undoing runs the lines backwards, after an
ordinary end, an exception or a signal; after kill -9 the file is still there, the next start finds it, and
`scripts/bench --restore` undoes the same lines. So every undo may find nothing to do, and says so by success.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

Change = dict[str, Any]

DEFAULT_PATH = "/run/vswap-bench.journal"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS_MAX = 10.0


class JournalError(Exception):
    """The journal of another run is there: one line, with the remedy."""


# ---- how each kind goes back ----


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def retry_busy(action: Callable[[], object]) -> None:
    """The kernel says EBUSY for a moment after the last user of a thing has gone."""
    deadline = time.monotonic() + _SECONDS_MAX
    while True:
        try:
            action()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)  # nothing tells when
        else:
            return


def is_swapped_on(path: str) -> bool:
    """Whether the kernel swaps there."""
    with open("/proc/swaps") as file:
        return any(line.split()[0] == os.path.realpath(path) for line in file.readlines()[1:])


def _undo_parameter(change: Change) -> None:
    """A file in /proc/sys or /sys gets back what it had; not when somebody else has changed it since."""
    with contextlib.suppress(FileNotFoundError):
        with open(change["path"]) as file:
            now = file.read().strip()
        if now == change["set"] and now != change["was"]:
            _write(change["path"], change["was"])


def _undo_swap(change: Change) -> None:
    if is_swapped_on(change["path"]):
        subprocess.run(["swapoff", change["path"]], check=True)


def _undo_zram(change: Change) -> None:
    number = change["number"]
    if number is None or not os.path.exists(f"/sys/block/zram{number}"):
        return
    retry_busy(lambda: _write(f"/sys/block/zram{number}/reset", "1"))
    retry_busy(lambda: _write("/sys/class/zram-control/hot_remove", str(number)))


def _members(path: str) -> list[int]:
    try:
        with open(f"{path}/cgroup.procs") as file:
            return [int(line) for line in file]
    except FileNotFoundError:
        return []


def kill_members(path: str) -> None:
    """Whatever is in a cgroup of ours was started by us. Until it is empty."""
    deadline = time.monotonic() + _SECONDS_MAX
    while members := _members(path):
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, f"{path}: processes {members} do not end")
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)  # nothing tells when


def _undo_cgroup(change: Change) -> None:
    kill_members(change["path"])
    retry_busy(lambda: os.rmdir(change["path"]))


def _undo_subtree_control(change: Change) -> None:
    with contextlib.suppress(FileNotFoundError):
        retry_busy(lambda: _write(change["path"], "-memory"))


def _undo_directory(change: Change) -> None:
    if os.path.isdir(change["path"]):
        shutil.rmtree(change["path"])


def _undo_loop(change: Change) -> None:
    command = ["losetup", "--noheadings", "--output", "NAME", "--associated", change["path"]]
    for device in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split():
        subprocess.run(["losetup", "--detach", device], check=True)


_UNDO: dict[str, Callable[[Change], None]] = {
    "parameter": _undo_parameter,
    "swap": _undo_swap,
    "zram": _undo_zram,
    "loop": _undo_loop,
    "cgroup": _undo_cgroup,
    "subtree_control": _undo_subtree_control,
    "directory": _undo_directory,
}


def describe(change: Change) -> str:
    """'swap /dev/zram1'"""
    name = f"zram{change['number']}" if change["kind"] == "zram" else change["path"]
    return f"{change['kind']} {name}"


# ---- journal ----


def _start_time(pid: int) -> str:
    """What tells a process from another that got its number later; '' when there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _is_alive(owner: Change) -> bool:
    return bool(_start_time(owner["pid"]) == owner["start_time"])


class Journal:
    """with Journal() as journal: … — on leaving the block everything noted is undone, last first."""

    def __init__(self, path: str = DEFAULT_PATH) -> None:
        self.path = path
        self.changes: list[Change] = []
        self.problems: list[str] = []

    def __enter__(self) -> Self:
        """JournalError when another run's is there."""
        owner = {"kind": "owner", "pid": os.getpid(), "start_time": _start_time(os.getpid())}
        other, changes = read(self.path)
        if other and not changes and not _is_alive(other):
            os.unlink(self.path)  # killed before it did anything
        try:
            with open(self.path, "x") as file:
                file.write(json.dumps(owner) + "\n")
        except FileExistsError:
            raise JournalError(self._describe_other()) from None
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave half of it.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        try:
            self.undo_all()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _describe_other(self) -> str:
        owner, changes = read(self.path)
        if owner and _is_alive(owner):
            return f"another scripts/bench runs (PID {owner['pid']}); wait for it"
        left = ", ".join(describe(change) for change in changes)
        return f"an earlier run was killed and left behind: {left}; put it back with scripts/bench --restore"

    def note(self, kind: str, **arguments: Any) -> Change:
        """A change that is about to be made. Returns it, for undo()."""
        change: Change = {"kind": kind, **arguments}
        self.changes.append(change)
        self._write_all()
        return change

    def update(self, change: Change, **arguments: Any) -> None:
        """What only became known by making the change."""
        change.update(arguments)
        self._write_all()

    def undo(self, change: Change) -> None:
        """One change, before the end."""
        _UNDO[change["kind"]](change)
        self.changes = [other for other in self.changes if other is not change]
        self._write_all()

    def undo_all(self) -> None:
        """Every change, last first; what cannot be undone stays in the journal and is listed in `problems`."""
        for change in self.changes:
            # First of all: swapoff has to bring back what a living process has swapped, and its limit may not allow it.
            if change["kind"] == "cgroup":
                with contextlib.suppress(OSError):  # undo() will tell
                    kill_members(change["path"])
        for change in reversed(list(self.changes)):
            try:
                self.undo(change)
            except (OSError, subprocess.CalledProcessError) as error:
                self.problems.append(f"could not undo {describe(change)}: {error}")
        if not self.changes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def _write_all(self) -> None:
        with open(self.path) as file:
            owner = file.readline()
        temporary = f"{self.path}.new"
        with open(temporary, "w") as file:
            file.write(owner + "".join(json.dumps(change) + "\n" for change in self.changes))
        os.replace(temporary, self.path)


def read(path: str) -> tuple[Change | None, list[Change]]:
    """The owner and the changes in a journal; (None, []) when there is none."""
    try:
        with open(path) as file:
            lines = [json.loads(line) for line in file if line.strip()]
    except FileNotFoundError:
        return None, []
    return lines[0] if lines else None, lines[1:]


def restore(path: str = DEFAULT_PATH) -> list[str]:
    """Undo what a killed run left. Returns what could not be undone. JournalError while its owner lives."""
    owner, changes = read(path)
    if owner and _is_alive(owner):
        raise JournalError(f"scripts/bench still runs (PID {owner['pid']}); end it first")
    journal = Journal(path)
    journal.changes = changes
    if owner:
        journal.undo_all()
    return journal.problems
