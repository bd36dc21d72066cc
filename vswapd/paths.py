# SPDX-License-Identifier: MIT
"""paths — where the client library and the sockets are."""

from __future__ import annotations

import os

from vswapd.failure import Failure

SYSTEM_SOCKET = "/run/vswapd/vswapd.sock"
_LIBRARY = "libvswap.so"
_IMAGE = "vswap-agent.bin"
_PRIVATE_PREFIX = "vswap-"
_SOCKET_NAME = "vswapd.sock"
_SOCKET_PATH_BYTES_MAX = 107  # sun_path with its NUL


def library() -> str:
    """Absolute path of libvswap.so. $VSWAP_LIBRARY, when set, is taken as it is. Failure."""
    chosen = os.environ.get("VSWAP_LIBRARY")
    package = os.path.dirname(os.path.abspath(__file__))
    candidates = [chosen] if chosen else [os.path.join(package, _LIBRARY)]
    if not chosen and not os.path.exists(candidates[0]):
        # An editable install keeps the library in its build directory, known to its import hook.
        from importlib import resources

        candidates.append(str(resources.files("vswapd") / _LIBRARY))
    for candidate in candidates:
        if os.path.isfile(candidate):
            path = os.path.abspath(candidate)
            if " " in path or ":" in path:
                raise Failure(
                    f"{path} cannot be preloaded: ' ' and ':' separate libraries", "install vswapd elsewhere"
                )
            return path
    raise Failure(f"no {candidates[0]}", "install vswapd again, or set VSWAP_LIBRARY to its libvswap.so")


def agent_image() -> str:
    """Absolute path of the agent's image (csrc/agent_image.c), beside libvswap.so. Failure."""
    path = os.path.join(os.path.dirname(library()), _IMAGE)
    if not os.path.isfile(path):
        raise Failure(f"no {path}", "install vswapd again")
    return path


def default_socket() -> str:
    """Where the system daemon listens, or the daemon this process runs under."""
    return os.environ.get("VSWAPD_SOCKET") or SYSTEM_SOCKET


def check_socket_path(path: str) -> None:
    """Failure when it does not fit an address."""
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX or not path:
        raise Failure(
            f"socket path of {len(path)} characters", f"use one of 1 to {_SOCKET_PATH_BYTES_MAX}", status=2
        )


def make_public_directory(path: str) -> None:
    """With all above it that is missing, and open to everybody whatever the umask. OSError."""
    if not path or os.path.isdir(path):
        return
    make_public_directory(os.path.dirname(path))
    os.mkdir(path, 0o755)
    os.chmod(path, 0o755)  # noqa: S103 -- what is in it is for everybody


def _private_base() -> str:
    directory = os.path.abspath(os.environ.get("TMPDIR") or "/tmp")
    return directory if len(directory) < 60 else "/tmp"


def make_private_directory() -> str:
    """A new directory for the socket of an embedded daemon.

    Mode 0711: a member of the tree that gave up root must still reach the socket, whose name nobody
    else can guess; who may do what is decided by credentials anyway.
    """
    for _ in range(16):
        path = os.path.join(_private_base(), f"{_PRIVATE_PREFIX}{os.getpid()}-{os.urandom(8).hex()}")
        try:
            os.mkdir(path, 0o711)
        except FileExistsError:
            continue
        except OSError as error:
            raise Failure(
                f"cannot make {path}: {error.strerror}", "set TMPDIR to a directory you can write"
            ) from None
        os.chmod(path, 0o711)  # whatever the umask
        return path
    raise Failure(f"cannot make a directory in {_private_base()}", "set TMPDIR to another one")


def private_socket(directory: str) -> str:
    """The socket in a private directory."""
    return os.path.join(directory, _SOCKET_NAME)


def remove_private_directory(directory: str) -> None:
    """Directory and socket; again: no effect."""
    for call, path in ((os.unlink, private_socket(directory)), (os.rmdir, directory)):
        try:
            call(path)
        except OSError:
            pass


def private_sockets() -> list[str]:
    """Sockets of embedded daemons of this user (root: of all), whether they answer or not."""
    found = []
    uid = os.geteuid()
    try:
        entries = list(os.scandir(_private_base()))
    except OSError:
        return []
    for entry in entries:
        if entry.name.startswith(_PRIVATE_PREFIX) and entry.is_dir(follow_symlinks=False):
            path = private_socket(entry.path)
            if uid in (0, entry.stat(follow_symlinks=False).st_uid) and os.path.exists(path):
                found.append(path)
    return found
