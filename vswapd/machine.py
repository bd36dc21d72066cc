# SPDX-License-Identifier: MIT
"""machine — what this machine has and allows. Reads files; `root` stands for '/' in tests."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from vswapd import config
from vswapd.failure import Failure

USERFAULTFD = "/dev/userfaultfd"
_CAP_SYS_PTRACE = 19


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def memory(root: str = "/") -> dict[str, int]:
    """/proc/meminfo in bytes."""
    figures = {}
    for line in _read(os.path.join(root, "proc/meminfo")).splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            figures[name] = int(words[0]) * (config.KIB if words[-1] == "kB" else 1)
    return figures


@dataclass(frozen=True)
class Cgroup:
    """A memory cgroup: where its files are, and its name in /proc/PID/cgroup among those of its version."""

    directory: str
    path: str
    version: int

    @property
    def limit_file(self) -> str:
        """Where its limit stands."""
        return os.path.join(self.directory, "memory.max" if self.version == 2 else "memory.limit_in_bytes")


def _with_parents(base: str, path: str) -> list[tuple[str, str]]:
    """(directory, path) of a cgroup that is seen below `base`, and of those above it."""
    found = []
    while path.strip("/") and ".." not in path.split("/"):
        found.append((os.path.join(base, path.lstrip("/")), path))
        path = os.path.dirname(path)
    return found


def memory_cgroups(root: str = "/") -> list[Cgroup]:
    """The memory cgroups (v2 and v1) that this process is in, as far as they are visible and can have a limit."""
    found = []
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        version, bases = 2, ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        if "memory" in controllers.split(","):
            version, bases = 1, ["sys/fs/cgroup/memory"]
        elif controllers:
            continue
        for base in (os.path.join(root, name) for name in bases):
            places = _with_parents(base, path)
            # Inside a container the path may be the host's: its own cgroup is then mounted at the top.
            is_seen = any(os.path.isdir(directory) for directory, _ in places)
            candidates = [Cgroup(*place, version) for place in [*places, (base, "/" if is_seen else path)]]
            found += [cgroup for cgroup in candidates if os.path.exists(cgroup.limit_file)]
    return found


def _cgroup_limits(root: str) -> list[int]:
    """Limits of the cgroups this process is in, where they are set."""
    texts = (_read(cgroup.limit_file).strip() for cgroup in memory_cgroups(root))
    return [int(text) for text in texts if text.isdigit()]


def ram_bytes(root: str = "/") -> int:
    """RAM of the machine, or of the cgroup where that has less."""
    return min([memory(root).get("MemTotal", 0), *_cgroup_limits(root)])


def available_bytes(root: str = "/") -> int:
    """RAM that a new job can have without pushing others out."""
    figures = memory(root)
    return min([figures.get("MemAvailable", figures.get("MemFree", 0)), *_cgroup_limits(root)])


def kernel_version(release: str) -> tuple[int, int]:
    """(6, 12) of '6.12.3-amd64'."""
    numbers = []
    for part in release.split(".")[:2]:
        digits = ""
        for character in part:
            if not character.isdigit():
                break
            digits += character
        numbers.append(int(digits or "0"))
    major, minor = [*numbers, 0, 0][:2]
    return major, minor


def check_kernel(release: str) -> None:
    """Failure when the kernel is too old."""
    if kernel_version(release) < config.KERNEL_MIN:
        wanted = ".".join(map(str, config.KERNEL_MIN))
        raise Failure(
            f"Linux {release} is too old",
            f"vswapd needs {wanted} or later (before that UFFDIO_MOVE loses pages)",
        )


def capabilities(root: str = "/") -> int:
    """Effective capabilities of this process, as a bit mask."""
    for line in _read(os.path.join(root, "proc/self/status")).splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def check_privilege(mask: int) -> None:
    """Failure when a process with these capabilities cannot host a daemon."""
    if not mask >> _CAP_SYS_PTRACE & 1:
        raise Failure(
            "a private daemon needs root (CAP_SYS_PTRACE), and no system daemon answers",
            "use sudo, or ask the administrator to start vswapd",
        )


_OOM_SCORE = -900


def avoid_oom_kill(root: str = "/") -> None:
    """Be the last to go when the machine is out of memory, with all that is started from here: others' memory is in a
    daemon's hands. Where that is not allowed (CAP_SYS_RESOURCE), all stays as it is: one that is killed is succeeded.
    """
    path = os.path.join(root, "proc/self/oom_score_adj")
    text = _read(path).strip()
    if text and int(text) <= _OOM_SCORE:
        return
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(_OOM_SCORE))
    except OSError:
        pass  # nice to have


def open_errno(path: str) -> int:
    """Why `path` cannot be opened for reading and writing; 0: it can."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def check_userfaultfd(number: int) -> None:
    """Failure when the kernel or the container does not give us userfaultfd. `number`: its open_errno."""
    if number == errno.ENOENT:
        raise Failure(
            f"no {USERFAULTFD}",
            "use a kernel with CONFIG_USERFAULTFD; in a container pass it in (--device=/dev/userfaultfd)",
        )
    if number:
        raise Failure(
            f"cannot open {USERFAULTFD}: {os.strerror(number)}",
            "run as root, or ask for access to the device",
        )


def check_all() -> None:
    """Everything a private daemon needs, in the order in which a user can do something about it."""
    check_kernel(os.uname().release)
    check_privilege(capabilities())
    check_userfaultfd(open_errno(USERFAULTFD))
