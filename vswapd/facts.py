# SPDX-License-Identifier: MIT
"""facts — what `vswapctl doctor` has to know of this machine, gathered in one place.

Judged in doctor.py, which asks the machine nothing. `root` stands for '/' in tests. A thing that cannot
be looked at is a fact too: nothing here raises.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import stat
import struct
from dataclasses import dataclass

from vswapd import command, config, connection, machine, paths
from vswapd.failure import Failure

_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_USERFAULTFD_IOC_NEW = 0xAA00
_NR_IO_URING_SETUP = 425  # of every architecture
_IO_URING_PARAMS_BYTES = 120

_ELF_HEAD = struct.Struct("<4s5B7x2HI3QI6H")  # elf(5), Elf64_Ehdr
_ELF_SEGMENT = struct.Struct("<2I6Q")  # Elf64_Phdr
_PT_INTERP = 3
_INTERPRETER_BYTES_MAX = 4096
_MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}


@dataclass(frozen=True)
class Program:
    """A program that somebody wants to run under a limit."""

    path: str
    error: str = ""  # why it cannot be read
    is_elf: bool = False
    is_native: bool = True  # 64 bits, of this machine's architecture
    loader: str = ""  # '' in an ELF file: statically linked
    script: str = ""  # the script it interprets; '' when it is a program itself
    is_privileged: bool = False  # setuid, setgid or with file capabilities

    @property
    def uses_musl(self) -> bool:
        """Its loader gives up where a library cannot be loaded, as ours, made for glibc."""
        return "ld-musl" in self.loader

    @property
    def is_preloadable(self) -> bool:
        """Of an ELF file: whether LD_PRELOAD brings our library into it."""
        return bool(self.loader) and not self.uses_musl


@dataclass(frozen=True)
class Facts:
    """Sizes in bytes; an errno of 0: it works."""

    release: str
    capabilities: int
    userfaultfd_errno: int
    userfaultfd_features: int | None  # None: cannot be asked
    io_uring_errno: int
    library_error: str
    spill_directory: str
    spill_errno: int
    spill_type: str  # file system
    spill_free_bytes: int
    ram_bytes: int
    available_bytes: int
    memlock_bytes: int | None  # None: unlimited
    fuse_errno: int
    has_systemd: bool
    container: str  # '': none
    socket_path: str
    socket_errno: int
    daemon_version: str  # '': none answers
    program: Program | None = None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


# ---- kernel ----


def _userfaultfd_features(path: str) -> int | None:
    request = bytearray(struct.pack("QQQ", _UFFD_API, 0, 0))
    try:
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        descriptor = fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(descriptor, _UFFDIO_API, request)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    finally:
        os.close(device)
    return int(struct.unpack("QQQ", request)[1])


def _io_uring_errno() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    descriptor = libc.syscall(_NR_IO_URING_SETUP, 1, params)
    if descriptor < 0:
        return ctypes.get_errno()
    os.close(descriptor)
    return 0


# ---- places ----


def file_system_type(path: str, root: str = "/") -> str:
    """'ext4' of the mount that `path` is on; '' when it cannot be told."""
    wanted = os.path.realpath(path)
    best, found = -1, ""
    for line in _read(os.path.join(root, "proc/self/mountinfo")).splitlines():
        before, separator, after = line.partition(" - ")
        words = before.split()
        if not separator or len(words) < 5 or not after:
            continue
        mount = words[4].encode("latin-1", "surrogateescape").decode("unicode_escape", "replace")
        is_above = wanted == mount or wanted.startswith(mount.rstrip("/") + "/")
        if is_above and len(mount) >= best:  # the later of two on one place lies on top
            best, found = len(mount), after.split()[0]
    return found


def _spill(directory: str) -> tuple[int, int]:
    """(errno of making a file, free bytes)."""
    try:
        figures = os.statvfs(directory)
    except OSError as error:
        return error.errno or errno.EIO, 0
    usable = os.access(directory, os.W_OK | os.X_OK, effective_ids=True)
    return 0 if usable else errno.EACCES, figures.f_bavail * figures.f_frsize


def container(root: str = "/") -> str:
    """What this process is contained in; '' when nothing tells."""
    named = _read(os.path.join(root, "run/systemd/container")).strip()
    if named:
        return named
    for entry in _read(os.path.join(root, "proc/1/environ")).split("\0"):
        if entry.startswith("container="):
            return entry.removeprefix("container=")
    for name, file in (("docker", ".dockerenv"), ("podman", "run/.containerenv")):
        if os.path.exists(os.path.join(root, file)):
            return name
    if os.path.isdir(os.path.join(root, "var/run/secrets/kubernetes.io")):
        return "kubernetes"
    return ""


def _daemon(path: str) -> tuple[int, str]:
    """(errno of connecting, version of the daemon)."""
    try:
        with connection.open_connection(path) as daemon:
            return 0, str(daemon.request("ping", seconds_max=5.0)["version"])
    except OSError as error:
        return error.errno or errno.EIO, ""
    except Failure:
        return errno.ETIMEDOUT, ""


def _library_error() -> str:
    try:
        paths.library()
    except Failure as error:
        return str(error)
    return ""


# ---- program ----


def _loader(file: int, table: int, segment_size: int, count: int) -> str:
    """PT_INTERP; '' in a statically linked program."""
    for index in range(count):
        segment = os.pread(file, _ELF_SEGMENT.size, table + index * segment_size)
        if len(segment) < _ELF_SEGMENT.size:
            break
        kind, _, offset, _, _, size, _, _ = _ELF_SEGMENT.unpack(segment)
        if kind == _PT_INTERP:
            return os.fsdecode(os.pread(file, min(size, _INTERPRETER_BYTES_MAX), offset).rstrip(b"\0"))
    return ""


def _is_privileged(path: str) -> bool:
    if os.stat(path).st_mode & (stat.S_ISUID | stat.S_ISGID):
        return True
    try:
        return bool(os.getxattr(path, "security.capability"))
    except OSError:
        return False


def _interpreter(head: bytes) -> str:
    """The program behind a '#!' line."""
    words = os.fsdecode(head[2:].split(b"\n")[0]).split()
    if words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    return words[0] if words else ""


def _read_program(path: str, script: str) -> Program:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(file, 4096, 0)
        if head.startswith(b"#!") and not script:
            return look_at_program(_interpreter(head), path)
        if not head.startswith(b"\177ELF") or len(head) < _ELF_HEAD.size:
            return Program(path, script=script)
        fields = _ELF_HEAD.unpack(head[: _ELF_HEAD.size])
        is_native = fields[1:3] == (2, 1) and fields[7] == _MACHINES.get(os.uname().machine)
        loader = _loader(file, fields[10], fields[14], fields[15]) if is_native else ""
        return Program(
            path,
            is_elf=True,
            is_native=is_native,
            loader=loader,
            script=script,
            is_privileged=_is_privileged(path),
        )
    finally:
        os.close(file)


def look_at_program(name: str, script: str = "") -> Program:
    """What would run for the command `name` (for a script: its interpreter)."""
    try:
        path = os.path.realpath(command.find_program(name))
        return _read_program(path, script)
    except Failure as error:
        return Program(name, error=error.text, script=script)
    except OSError as error:
        return Program(name, error=f"cannot read {name}: {error.strerror}", script=script)


# ---- all of it ----


def gather(program: str | None = None, socket_path: str | None = None, root: str = "/") -> Facts:
    """Look at everything once."""
    userfaultfd = os.path.join(root, machine.USERFAULTFD.lstrip("/"))
    directory = os.environ.get("VSWAPD_SPILL_DIR") or config.SPILL_DIRECTORY
    spill_errno, spill_free_bytes = _spill(directory)
    path = socket_path or paths.default_socket()
    socket_errno, daemon_version = _daemon(path)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Facts(
        release=os.uname().release,
        capabilities=machine.capabilities(root),
        userfaultfd_errno=machine.open_errno(userfaultfd),
        userfaultfd_features=_userfaultfd_features(userfaultfd),
        io_uring_errno=_io_uring_errno(),
        library_error=_library_error(),
        spill_directory=directory,
        spill_errno=spill_errno,
        spill_type=file_system_type(directory, root),
        spill_free_bytes=spill_free_bytes,
        ram_bytes=machine.ram_bytes(root),
        available_bytes=machine.available_bytes(root),
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        fuse_errno=machine.open_errno(os.path.join(root, "dev/fuse")),
        has_systemd=os.path.isdir(os.path.join(root, "run/systemd/system")),
        container=container(root),
        socket_path=path,
        socket_errno=socket_errno,
        daemon_version=daemon_version,
        program=look_at_program(program) if program is not None else None,
    )
