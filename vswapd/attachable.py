# SPDX-License-Identifier: MIT
"""attachable — whether an agent can be put into a running process (csrc/attach.c), and if not, why.

Looked at before anything is done. What changes between the look and the deed the kernel refuses, or the agent
finds out and ends (agent_look_around).
"""

from __future__ import annotations

import errno
import os

from vswapd import processes
from vswapd.failure import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

MACHINE = "x86_64"  # what csrc/attach.c is written for
_AGENT = "vswap-agent"
_LIBRARY = b"libvswap.so"
_ELF_64 = b"\x7fELF\x02"
_WATCHED = (b" um ", b" uw ")  # VmFlags of memory that some userfaultfd watches


def has_agent(pid: int) -> bool:
    """Whether one of its threads is an agent."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return any(processes.thread_name(pid, int(thread)) == _AGENT for thread in threads)


def failure(pid: int, error: OSError) -> Failure:
    """What to tell the user of an injection that failed."""
    remedy = {
        errno.EPERM: "run vswapctl as root; nobody else may trace it (kernel.yama.ptrace_scope)",
        errno.ESRCH: "it has ended",
        errno.EBUSY: "let it go on first: kill -CONT",
        errno.ETIMEDOUT: "it waits in the kernel for something; try again later",
    }.get(error.errno or 0, "start it with vswapctl run")
    return Failure(f"process {pid}: {error.strerror}", remedy)


def _check_program(pid: int, status: dict[str, str]) -> None:
    """The process itself. Failure."""
    if "VmSize" not in status:
        kind = "has ended" if status["State"][:1] in "ZX" else "is a thread of the kernel"
        raise Failure(f"process {pid} {kind}", "give the PID of a running program")
    if status["State"][:1] == "T":
        raise Failure(f"process {pid} is stopped", f"let it go on first: kill -CONT {pid}")
    if status.get("TracerPid", "0") != "0":
        raise Failure(f"process {status['TracerPid']} traces process {pid}", "end the debugger first")
    if status.get("Seccomp", "0") != "0":
        raise Failure(
            f"process {pid} has a seccomp filter, which its agent could not live with",
            "start it with vswapctl run",
        )
    try:
        with open(f"/proc/{pid}/exe", "rb") as program:
            is_64_bit = program.read(len(_ELF_64)) == _ELF_64
    except OSError as error:
        raise Failure(
            f"process {pid} cannot be looked at ({error.strerror})", "run vswapctl as root or as its owner"
        ) from None
    if not is_64_bit:
        raise Failure(f"process {pid} is a 32-bit program", "only 64-bit programs can be managed")


def _check_memory(pid: int) -> None:
    """Whether somebody cares for its memory already. Failure."""
    if has_agent(pid):
        raise Failure(f"process {pid} has an agent already", "see vswapctl status, or change its limit")
    maps = processes.read(f"/proc/{pid}/smaps")
    if _LIBRARY in maps:
        raise Failure(
            f"process {pid} has libvswap.so, but its agent has ended", "start it anew with vswapctl run"
        )
    flags = (line + b" " for line in maps.splitlines() if line.startswith(b"VmFlags:"))
    if any(watched in line for line in flags for watched in _WATCHED):
        raise Failure(
            f"process {pid} has memory that another userfaultfd watches",
            "a process forked by a managed one is served with that; one that uses userfaultfd cannot be managed",
        )


def _check_socket(pid: int, path: str) -> None:
    """Its agent must reach the same socket under the same name. Failure."""
    try:
        ours, theirs = os.stat(path), os.stat(f"/proc/{pid}/root{path}")
    except OSError:
        theirs = None
    if theirs is None or (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
        raise Failure(
            f"process {pid} does not see {path}: it has another root or mount namespace",
            "bind the daemon's directory into its container",
        )


def check(pid: int, socket_path: str, daemon_pids: AbstractSet[int]) -> None:
    """Failure when an agent cannot be put into it."""
    if os.uname().machine != MACHINE:
        raise Failure(f"attach knows no {os.uname().machine}", "start the program with vswapctl run")
    if not processes.exists(pid):
        raise Failure(f"no process {pid}", "give the PID of a running process")
    if pid == 1:
        raise Failure("process 1 is not to be managed", "attach what it has started")
    if pid in daemon_pids or pid == os.getpid():
        raise Failure(f"process {pid} is the daemon or vswapctl itself", "attach another")
    uid = processes.uid(pid)
    if uid is not None and os.geteuid() not in (0, uid):
        raise Failure(f"process {pid} is not yours", "run vswapctl as root or as its owner")
    _check_program(pid, processes.status(pid))
    _check_memory(pid)
    _check_socket(pid, socket_path)
