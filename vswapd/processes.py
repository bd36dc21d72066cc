# SPDX-License-Identifier: MIT
"""processes — what /proc says about processes, read directly.

A process may end between any two reads: functions that read one answer None or an
empty value then, and raise nothing.
"""

from __future__ import annotations

import os

from vswapd import config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet


def read(path: str) -> bytes:
    """All of a file of /proc, b'' when it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        chunks = []
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
        return b"".join(chunks)
    except OSError:  # ESRCH: it ended between open and read
        return b""
    finally:
        os.close(descriptor)


def exists(pid: int) -> bool:
    """Whether there is such a process (zombies count)."""
    return pid > 0 and os.path.exists(f"/proc/{pid}/stat")


def comm(pid: int) -> str:
    """Name of the process, '' when it has ended. Printable: the process chooses it itself."""
    return thread_name(pid, pid)


def thread_name(pid: int, thread: int) -> str:
    """Name of one thread of a process, as comm()."""
    text = read(f"/proc/{pid}/task/{thread}/comm").rstrip(b"\n").decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status by name; 'State' is always in it."""
    lines = read(f"/proc/{pid}/status").decode("utf-8", "replace").splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {"State": "X", **{name: value.strip() for name, value in fields.items()}}


def uid(pid: int) -> int | None:
    """Effective user of the process (root for one that is not dumpable)."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def is_of(pid: int, user: int, group: int) -> bool:
    """Whether the process is this user's and group's and nobody else's: no right of another's is in it."""
    wanted = {b"Uid": user, b"Gid": group}
    for line in read(f"/proc/{pid}/status").splitlines():
        name, _, rest = line.partition(b":")
        if name in wanted and any(int(number) != wanted[name] for number in rest.split()):
            return False
        wanted.pop(name, None)
    return not wanted


def parent(pid: int) -> int:
    """Parent's PID, 0 when there is none."""
    text = read(f"/proc/{pid}/stat")
    after_name = text.rpartition(b")")[2].split()
    return int(after_name[1]) if len(after_name) > 1 else 0


def environment_value(pid: int, name: str) -> str | None:
    """A variable of the environment the process was started with; None also without permission."""
    prefix = name.encode() + b"="
    for entry in read(f"/proc/{pid}/environ").split(b"\0"):
        if entry.startswith(prefix):
            return os.fsdecode(entry[len(prefix) :])
    return None


def descends(pid: int, ancestor: int) -> bool:
    """Whether `ancestor` is above `pid` (a process does not descend from itself)."""
    for _ in range(config.MEMBERS_MAX):
        pid = parent(pid)
        if pid == ancestor:
            return True
        if pid <= 1:
            break
    return False


def _children(pid: int) -> Iterator[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        yield from map(int, read(f"/proc/{pid}/task/{thread}/children").split())


def tree(root: int, excluded: AbstractSet[int]) -> dict[int, int]:
    """{pid: parent} of all that descends from `root` (without it), nothing below an excluded one. Empty where the kernel
    lists no children (CONFIG_PROC_CHILDREN).
    """
    found: dict[int, int] = {}
    stack = [root]
    while stack and len(found) < config.MEMBERS_MAX:
        pid = stack.pop()
        for child in _children(pid):
            if child not in found and child not in excluded:
                found[child] = pid
                stack.append(child)
    return found


def _rollup(pid: int | str) -> dict[bytes, int]:
    """Bytes by name out of smaps_rollup; empty without permission."""
    figures = {}
    for line in read(f"/proc/{pid}/smaps_rollup").splitlines()[1:]:
        name, _, rest = line.partition(b":")
        number = rest.split()
        if number and number[0].isdigit():
            figures[name] = int(number[0]) * config.KIB
    return figures


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process, its share of what it shares with forked relatives."""
    figures = read(f"/proc/{pid}/statm").split()
    if len(figures) < 3:
        return 0
    resident = max(0, int(figures[1]) - int(figures[2])) * config.PAGE_BYTES
    if resident < config.PSS_FROM_BYTES:
        return resident
    return _rollup(pid).get(b"Pss_Anon", resident)


def own_bytes(pid: int | str = "self") -> int:
    """What a process costs beside shared memory: its share of anonymous and file pages.

    For the daemon this leaves out exactly its memfds — pool, slot table, rings —, which are counted
    as pool_bytes and metadata_bytes, so that nothing is counted twice.
    """
    figures = _rollup(pid)
    return figures.get(b"Pss_Anon", 0) + figures.get(b"Pss_File", 0)
