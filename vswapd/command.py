# SPDX-License-Identifier: MIT
"""command — run a program as if vswapctl were not there.

It stays in vswapctl's process group and has its stdin, stdout and terminal: Ctrl-C and Ctrl-Z reach it
from the terminal. vswapctl ignores SIGINT and SIGQUIT meanwhile, stops and goes on with it, and forwards
signals that are sent to vswapctl alone. vswapctl is a subreaper: orphans of the command's tree come to
it, so that they stay in the tree, and are reaped.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket

from vswapd.failure import STATUS_NOT_EXECUTABLE, STATUS_NOT_FOUND, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_PR_SET_CHILD_SUBREAPER = 36
_IGNORED = (signal.SIGINT, signal.SIGQUIT)
_FORWARDED = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGCONT,
    signal.SIGWINCH,
)
_PYTHON_IGNORES = (signal.SIGPIPE, signal.SIGXFSZ)  # not inherited from whoever started vswapctl


def find_program(name: str, search_path: str | None = None) -> str:
    """The file a shell would run for `name`. Failure with 127 or 126."""
    if "/" in name:
        candidates = [name]
    else:
        path = os.environ.get("PATH", os.defpath) if search_path is None else search_path
        candidates = [os.path.join(directory or ".", name) for directory in path.split(":")]
    found = ""
    for candidate in candidates:
        if os.path.isfile(candidate):
            found = candidate
            if os.access(candidate, os.X_OK):
                return candidate
    if found:
        raise Failure(f"{found} is not executable", f"chmod +x {found}", STATUS_NOT_EXECUTABLE)
    if os.path.isdir(name) and "/" in name:
        raise Failure(f"{name} is a directory", "name a program", STATUS_NOT_EXECUTABLE)
    raise Failure(f"command not found: {name}", "check its spelling and $PATH", STATUS_NOT_FOUND)


def become_subreaper() -> None:
    """Orphans of the tree become children of this process."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise Failure(f"cannot become a subreaper: {os.strerror(ctypes.get_errno())}", "allow prctl(2)")


class Signals:
    """Signals of this process as a readable descriptor; restores nothing: the process ends after it."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.defaulted: list[int] = list(_PYTHON_IGNORES)  # for the command
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def fileno(self) -> int:
        """For poll."""
        return self._reader.fileno()

    def install(self) -> None:
        """Just before the command starts: ignore the terminal's signals, catch the ones to forward.
        What was ignored when vswapctl started stays ignored, for the command too (nohup)."""
        for number in _IGNORED:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.defaulted.append(number)
            signal.signal(number, signal.SIG_IGN)
        for number in _FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

    def read(self) -> list[int]:
        """Signals that came since, SIGCHLD among them."""
        try:
            return list(self._reader.recv(4096))
        except BlockingIOError:
            return []


def spawn(
    program: str,
    arguments: list[str],
    environment: Mapping[str, str],
    defaulted: Sequence[int],
    hold: Callable[[int], None] = lambda _: None,
) -> int:
    """Start `program`; its PID. Failure with 127 or 126. `hold` is called before it executes anything.

    fork and exec: glibc's posix_spawn leaves two of its internal signals ignored in the program.
    """
    reader, writer = os.pipe()  # both closed by exec: the end of file says that it succeeded
    gate_reader, gate_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(gate_writer)
            os.read(gate_reader, 1)
            signal.set_wakeup_fd(-1)
            for number in defaulted:
                signal.signal(number, signal.SIG_DFL)
            _execute(program, arguments, environment)
        except OSError as error:
            os.write(writer, str(error.errno).encode())
        finally:
            os._exit(STATUS_NOT_FOUND)
    os.close(writer)
    os.close(gate_reader)
    try:
        hold(pid)
    finally:
        os.close(gate_writer)
    with open(reader, "rb") as file:
        number = int(file.read() or b"0")
    if number:
        missing = number in (errno.ENOENT, errno.ENOTDIR)
        status = STATUS_NOT_FOUND if missing else STATUS_NOT_EXECUTABLE
        raise Failure(
            f"cannot run {program}: {os.strerror(number)}", "check the file and its interpreter", status
        )
    return pid


def _execute(program: str, arguments: list[str], environment: Mapping[str, str]) -> None:
    try:
        os.execve(program, arguments, environment)  # noqa: S606 -- no shell is the point
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
    # A script without #!: shells run it, and so does execvp.
    os.execve("/bin/sh", ["/bin/sh", program, *arguments[1:]], environment)  # noqa: S606 -- as above


def reserve_streams() -> None:
    """Open stdin, stdout and stderr where they are closed: a socket of ours must not take their place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open("/dev/null", os.O_RDWR)


def release_streams() -> None:
    """Let go of stdin and stdout: they are the command's, and whoever reads or writes the other end
    of a pipe must see when the command closes it."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def reap() -> list[tuple[int, int]]:
    """(pid, wait status) of every child that has ended."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def end_like(status: int) -> int:
    """Exit status for a wait status; does not return for a signal that this process can die of itself.

    Not SIGKILL: as an exit status (137) it reads the same in a shell, and a caller that sees us killed
    would conclude that we were.
    """
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    if number != signal.SIGKILL:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        try:
            signal.signal(number, signal.SIG_DFL)
        except OSError:
            return 128 + number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    return 128 + number
