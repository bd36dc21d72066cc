# SPDX-License-Identifier: MIT
"""cgroup — a memory limit for the kernel's own systems, with control groups of version 1 or 2.

Made beside us or below us, wherever the memory controller is to be had, never above: a container's own limit
stays in force.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.journal import kill_members, retry_busy

if TYPE_CHECKING:
    from benchmarks.journal import Change, Journal


class CgroupError(Exception):
    """No memory controller: one line, with the remedy."""


@dataclass(frozen=True)
class Hierarchy:
    """Where the memory controller is: `version` 1 or 2, its mount point, and our own cgroup in it."""

    version: int
    mount: str
    own: str  # '/' or '/a/b'

    @property
    def charges_zswap(self) -> bool:
        """Version 2 counts a group's zswap pool towards its limit, version 1 does not."""
        return self.version == 2


def _mounts(root: str) -> list[list[str]]:
    """Mount point, kind and options of each."""
    with open(f"{root}/proc/self/mounts") as file:
        return [line.split()[1:4] for line in file]


def first_version_mount(controller: str, root: str = "") -> str | None:
    """Where version 1 has this controller, if it has it."""
    mounts = _mounts(root)
    return next((mount for mount, kind, names in mounts if kind == "cgroup" and controller in names.split(",")), None)


def find_hierarchy(root: str = "") -> Hierarchy:
    """CgroupError. `root`: for tests, in front of every path."""
    with open(f"{root}/proc/self/cgroup") as file:
        own = {controllers: path for _, controllers, path in (line.rstrip("\n").split(":", 2) for line in file)}
    if (first := first_version_mount("memory", root)) is not None:
        path = next((path for names, path in own.items() if "memory" in names.split(",")), "/")
        return Hierarchy(1, first, path)
    for mount, kind, _ in _mounts(root):
        if kind == "cgroup2" and "memory" in _words(f"{root}{mount}/cgroup.controllers"):
            return Hierarchy(2, mount, own.get("", "/"))
    raise CgroupError("no cgroup memory controller is mounted here; the kernel's systems need one for their limit")


def _words(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().split()
    except OSError:
        return []


def _parent(hierarchy: Hierarchy, journal: Journal) -> str:
    """The directory to make a group in."""
    own = hierarchy.mount + hierarchy.own.rstrip("/")
    if hierarchy.version == 1:
        return own if os.path.isdir(own) else hierarchy.mount  # a container sees its own path from outside
    # Version 2 wants processes in leaves only, so ours cannot have children: look upwards for a group that hands
    # the controller on.
    directory = own if os.path.isdir(own) else hierarchy.mount
    while True:
        control = f"{directory}/cgroup.subtree_control"
        if "memory" in _words(control):
            return directory
        if directory == hierarchy.mount:
            break
        directory = os.path.dirname(directory)
    journal.note("subtree_control", path=control)
    with open(control, "w") as file:
        file.write("+memory")
    return directory


class Cgroup:
    """A memory cgroup of ours. The journal removes it."""

    def __init__(self, hierarchy: Hierarchy, journal: Journal, name: str) -> None:
        self.hierarchy = hierarchy
        self.path = f"{_parent(hierarchy, journal)}/{name}"
        self._change: Change = journal.note("cgroup", path=self.path)
        os.mkdir(self.path)

    def begin(self, limit_bytes: int | None) -> None:
        """Forget what an earlier run left charged, and its peak. A limit of RAM, or None: only count; not of swap.

        Version 1 can be told to; in version 2 it takes another group of the same name.
        """
        if self.hierarchy.version == 1:
            self._write("memory.force_empty", "0")
            self.set_limit(limit_bytes)
            self._write("memory.max_usage_in_bytes", "0")
        else:
            retry_busy(lambda: os.rmdir(self.path))
            os.mkdir(self.path)
            self.set_limit(limit_bytes)

    def _write(self, name: str, text: str) -> None:
        with open(f"{self.path}/{name}", "w") as file:
            file.write(text)

    def set_limit(self, limit_bytes: int | None) -> None:
        """Of what is in it now."""
        is_first = self.hierarchy.version == 1
        unlimited = "-1" if is_first else "max"
        name = "memory.limit_in_bytes" if is_first else "memory.max"
        self._write(name, unlimited if limit_bytes is None else str(limit_bytes))

    def end(self) -> None:
        """Whatever a run left: nobody is to hold on to what is swapped, or swapoff would need room for it."""
        kill_members(self.path)

    def kill_count(self) -> int:
        """Processes of it that the kernel killed for want of memory, ever."""
        words = _words(f"{self.path}/{'memory.oom_control' if self.hierarchy.version == 1 else 'memory.events'}")
        return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0

    def anonymous_bytes(self) -> int:
        """What is charged now without files: the page cache is nobody's cost where no limit makes it go."""
        words = _words(f"{self.path}/memory.stat")
        names = ("total_rss", "total_shmem") if self.hierarchy.version == 1 else ("anon", "shmem")
        return sum(int(words[words.index(name) + 1]) for name in names if name in words)

    def members(self) -> list[int]:
        """Processes in it."""
        return [int(word) for word in _words(f"{self.path}/cgroup.procs")]

    def usage_bytes(self) -> int:
        """What is charged now."""
        name = "memory.usage_in_bytes" if self.hierarchy.version == 1 else "memory.current"
        return int(_words(f"{self.path}/{name}")[0])

    def peak_bytes(self) -> int:
        """Most that was charged since begin()."""
        name = "memory.max_usage_in_bytes" if self.hierarchy.version == 1 else "memory.peak"
        words = _words(f"{self.path}/{name}")
        return int(words[0]) if words else 0

    def command(self, argv: list[str]) -> list[str]:
        """`argv`, run inside."""
        return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', self.path, *argv]
