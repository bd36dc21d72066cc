# SPDX-License-Identifier: MIT
"""doctor — judges what facts.py has gathered. Pure: one check_… function for each thing.

A *problem* keeps `vswapctl run` from working, or from keeping its promise; a *note* says what works
differently here. Both have a remedy.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from vswapd import __version__, attachable, config, machine, policy
from vswapd.failure import Failure
from vswapd.sizes import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vswapd.facts import Facts

OK, NOTE, PROBLEM = "ok", "note", "problem"

# What the data plane asks of userfaultfd: bits of <linux/userfaultfd.h>.
_FEATURES = {
    "EVENT_FORK": 1 << 1,
    "EVENT_REMAP": 1 << 2,
    "EVENT_REMOVE": 1 << 3,
    "EVENT_UNMAP": 1 << 6,
    "THREAD_ID": 1 << 8,
    "POISON": 1 << 14,
    "MOVE": 1 << 16,
}
_MEMLOCK_BYTES_MIN = 1 << 20  # csrc/agent_join.c, STACK_LOCK_LIMIT_MIN
_CONTAINER_NEEDS = "--device=/dev/userfaultfd --cap-add=SYS_PTRACE"


@dataclass(frozen=True)
class Finding:
    """One line of the answer, and what to do about it ('' when all is well)."""

    level: str
    name: str
    text: str
    remedy: str = ""


def _of_failure(name: str, error: Failure) -> Finding:
    return Finding(PROBLEM, name, error.text, error.remedy)


def check_kernel(facts: Facts) -> Finding:
    """UFFDIO_MOVE that loses nothing."""
    try:
        machine.check_kernel(facts.release)
    except Failure as error:
        return _of_failure("kernel", error)
    return Finding(OK, "kernel", f"Linux {facts.release}")


def check_daemon(facts: Facts) -> Finding:
    """A system daemon spares everybody else the privileges."""
    if facts.daemon_version == __version__:
        return Finding(OK, "daemon", f"version {__version__} answers on {facts.socket_path}")
    if facts.daemon_version:
        return Finding(
            NOTE,
            "daemon",
            f"version {facts.daemon_version} answers on {facts.socket_path}, but this is {__version__}",
            "restart the daemon once its clients have ended",
        )
    if facts.socket_errno == errno.ENOENT:
        return Finding(OK, "daemon", f"none on {facts.socket_path}; vswapctl run starts a private one")
    return Finding(
        NOTE,
        "daemon",
        f"none answers on {facts.socket_path}: {os.strerror(facts.socket_errno)}",
        "start vswapd; its log says why it ended (journalctl -u vswapd)",
    )


def check_privilege(facts: Facts) -> Finding:
    """EVENT_FORK takes CAP_SYS_PTRACE of whoever hosts the daemon."""
    try:
        machine.check_privilege(facts.capabilities)
    except Failure as error:
        if facts.daemon_version:
            return Finding(OK, "privilege", "none, and none is needed: the system daemon serves you")
        return _of_failure("privilege", error)
    return Finding(OK, "privilege", "CAP_SYS_PTRACE")


def check_userfaultfd(facts: Facts) -> Finding:
    """The device; a client of the system daemon gets it from there."""
    try:
        machine.check_userfaultfd(facts.userfaultfd_errno)
    except Failure as error:
        if facts.daemon_version:
            return Finding(OK, "userfaultfd", "not open to you, and need not be: the system daemon has it")
        return _of_failure("userfaultfd", error)
    return Finding(OK, "userfaultfd", f"{machine.USERFAULTFD} can be opened")


def check_features(facts: Facts) -> Finding:
    """What the kernel's userfaultfd can do."""
    features = facts.userfaultfd_features
    if features is None:
        if facts.userfaultfd_errno:
            level = OK if facts.daemon_version else NOTE
            remedy = "" if facts.daemon_version else f"make {machine.USERFAULTFD} accessible first"
            return Finding(level, "features", f"not asked, without {machine.USERFAULTFD}", remedy)
        return Finding(
            PROBLEM,
            "features",
            f"{machine.USERFAULTFD} opens, but gives no userfaultfd",
            "allow its ioctl in the container's security profile",
        )
    missing = [name for name, bit in _FEATURES.items() if not features & bit]
    if missing:
        wanted = ".".join(map(str, config.KERNEL_MIN))
        return Finding(
            PROBLEM,
            "features",
            f"userfaultfd lacks {', '.join(missing)}",
            f"use a kernel of {wanted} or later with CONFIG_USERFAULTFD, on a 64-bit architecture",
        )
    return Finding(OK, "features", "userfaultfd has " + ", ".join(_FEATURES))


def check_io_uring(facts: Facts) -> Finding:
    """Faster reads from disk; there is a second way."""
    if facts.io_uring_errno:
        return Finding(
            NOTE,
            "io_uring",
            f"not available ({os.strerror(facts.io_uring_errno)}): threads read spill files instead, somewhat slower",
            "sysctl kernel.io_uring_disabled=0, or allow it in the container's seccomp profile",
        )
    return Finding(OK, "io_uring", "available")


def check_library(facts: Facts) -> Finding:
    """What is preloaded into programs."""
    if facts.library_error:
        text, _, remedy = facts.library_error.partition("; ")
        return Finding(PROBLEM, "library", text, remedy)
    return Finding(OK, "library", "libvswap.so is installed")


def check_spill(facts: Facts) -> Finding:
    """Where the private spill file of a `run` is made."""
    place = facts.spill_directory
    level = NOTE if facts.daemon_version else PROBLEM  # a running daemon has its own
    elsewhere = "set VSWAPD_SPILL_DIR to a directory on a disk, or use --spill or --no-spill"
    if facts.spill_errno:
        return Finding(level, "spill", f"no file can be made in {place}: {os.strerror(facts.spill_errno)}", elsewhere)
    if facts.spill_type in config.RAM_FILE_SYSTEMS:
        return Finding(
            level, "spill", f"{place} is a {facts.spill_type}: what is swapped there stays in RAM", elsewhere
        )
    if policy.spill_size_bytes(facts.spill_free_bytes, 0, facts.ram_bytes) == 0:
        return Finding(level, "spill", f"{format_size(facts.spill_free_bytes)} free in {place}: no room", elsewhere)
    if facts.spill_free_bytes < facts.ram_bytes:
        return Finding(
            NOTE,
            "spill",
            f"{format_size(facts.spill_free_bytes)} free in {place}, less than the RAM "
            f"({format_size(facts.ram_bytes)})",
            f"free some, or {elsewhere}",
        )
    kind = f" ({facts.spill_type})" if facts.spill_type else ""
    return Finding(OK, "spill", f"{format_size(facts.spill_free_bytes)} free in {place}{kind}")


def check_memory(facts: Facts) -> Finding:
    """What a limit is taken from."""
    text = f"{format_size(facts.available_bytes)} of {format_size(facts.ram_bytes)} available"
    if facts.available_bytes * config.LIMIT_AVAILABLE_SHARE < config.LIMIT_BYTES_MIN:
        return Finding(NOTE, "memory", text, "end something, or give the container more memory")
    return Finding(OK, "memory", text)


def check_memlock(facts: Facts) -> Finding:
    """The agent locks its stack where it may."""
    count = facts.memlock_bytes
    if count is not None and count < _MEMLOCK_BYTES_MIN:
        return Finding(
            NOTE,
            "memlock",
            f"a limit of {format_size(count)}: the agent's stack is not locked in memory, and may be "
            "swapped out by the kernel",
            "ulimit -l 1024, or LimitMEMLOCK=1M in the unit",
        )
    return Finding(OK, "memlock", "no limit" if count is None else f"limit {format_size(count)}")


def check_fuse(facts: Facts) -> Finding:
    """Only for vswapd --fs."""
    if facts.fuse_errno:
        return Finding(
            NOTE,
            "fuse",
            f"/dev/fuse: {os.strerror(facts.fuse_errno)}: vswapd --fs cannot work; all else does",
            "modprobe fuse; in a container --device=/dev/fuse --cap-add=SYS_ADMIN",
        )
    return Finding(OK, "fuse", "/dev/fuse can be opened")


def check_systemd(facts: Facts) -> Finding:
    """Only for running vswapd as a service."""
    if not facts.has_systemd:
        return Finding(
            NOTE, "systemd", "does not run here: nobody starts a system daemon", "start vswapd by other means"
        )
    return Finding(OK, "systemd", "runs")


def check_container(facts: Facts) -> Finding:
    """What a container withholds is named where it is missed; here, how it is asked for."""
    if not facts.container:
        return Finding(OK, "container", "none")
    blocked = check_privilege(facts).level == PROBLEM or check_userfaultfd(facts).level == PROBLEM
    if blocked:
        return Finding(
            NOTE,
            "container",
            f"{facts.container}, which withholds what a private daemon needs",
            f"start it with {_CONTAINER_NEEDS}, or pass the socket of the host's daemon in",
        )
    return Finding(OK, "container", facts.container)


def check_program(facts: Facts) -> Finding | None:  # noqa: PLR0911 -- one for each kind
    """Whether the program named on the command line can be managed."""
    program = facts.program
    if program is None:
        return None
    what = program.path + (f", which runs {program.script}," if program.script else "")
    if program.error:
        return Finding(PROBLEM, "program", program.error, "give the program as you would to vswapctl run")
    if not program.is_elf:
        return Finding(NOTE, "program", f"{what} is no ELF file: what it starts decides", "give the program it starts")
    if not program.is_native:
        return Finding(
            PROBLEM,
            "program",
            f"{what} is of another architecture: it cannot be managed",
            f"use one for 64-bit {os.uname().machine}",
        )
    if not program.is_preloadable and not program.is_privileged:
        kind = "uses musl" if program.uses_musl else "is statically linked"
        if os.uname().machine != attachable.MACHINE:
            return Finding(
                PROBLEM,
                "program",
                f"{what} {kind}: it is not managed on {os.uname().machine}",
                "link it dynamically, with glibc",
            )
        return Finding(
            NOTE,
            "program",
            f"{what} {kind}: it is managed itself, but not what it starts of the same kind",
            "link it dynamically, with glibc, if it starts others that are large",
        )
    if program.is_privileged:
        return Finding(
            PROBLEM,
            "program",
            f"{what} is setuid, setgid or has capabilities: it runs, but is not managed",
            "run it as the user it changes to",
        )
    return Finding(OK, "program", f"{what} can be managed")


CHECKS: tuple[Callable[[Facts], Finding | None], ...] = (
    check_kernel,
    check_daemon,
    check_privilege,
    check_userfaultfd,
    check_features,
    check_library,
    check_memory,
    check_spill,
    check_io_uring,
    check_memlock,
    check_fuse,
    check_systemd,
    check_container,
    check_program,
)


def examine(facts: Facts) -> list[Finding]:
    """All findings, the most basic first."""
    return [finding for check in CHECKS if (finding := check(facts)) is not None]
