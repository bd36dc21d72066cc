# SPDX-License-Identifier: MIT
"""systemd's protocols, with ourselves as the manager."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vswapd.notify import DescriptorStore, notify

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket that NOTIFY_SOCKET names."""
    path = str(tmp_path / "notify") if request.param == "path" else f"@vswapd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path.replace("@", "\0"))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield sock


def test_state_is_told(manager: socket.socket) -> None:
    assert notify("READY=1")
    assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("path", ["", "relative", "/nonexistent/notify"])
def test_no_manager_is_no_error(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    assert not notify("READY=1")


_TAKE = """
import os, sys
sys.path.insert(0, {root!r})
os.environ["LISTEN_PID"] = str(os.getpid() + {other})
os.environ["LISTEN_FDS"] = "2"
os.environ["LISTEN_FDNAMES"] = "metrics:{name}"
os.dup2({null}, 3) ; os.dup2({listener}, 4)
from vswapd.notify import take_inherited
listeners, stored = take_inherited()
for name, sock in listeners.items():
    print(name, sock.getsockname(), os.environ.get("LISTEN_FDS"), sock.get_inheritable())
"""


@pytest.mark.parametrize(
    ("other", "name", "taken"),
    [(0, "vswapd.socket", True), (0, "metrics", True), (0, "another.socket", False), (1, "vswapd.socket", False)],
)
def test_passed_listener_is_taken(tmp_path: Path, other: int, name: str, taken: bool) -> None:
    """By its name, and only when it was passed to us; what is no socket is not taken for one."""
    path = str(tmp_path / "listener")
    root = str(Path(__file__).resolve().parents[2])
    with socket.socket(socket.AF_UNIX) as listener, open("/dev/null", "rb") as null:
        listener.bind(path)
        listener.listen()
        code = _TAKE.format(root=root, other=other, name=name, null=null.fileno(), listener=listener.fileno())
        result = subprocess.run(
            [sys.executable, "-c", code],
            pass_fds=(listener.fileno(), null.fileno()),
            capture_output=True,
            text=True,
            check=True,
        )
    assert result.stdout == (f"{name} {path} None False\n" if taken else "")


_STORED = """
import os, sys
sys.path.insert(0, {root!r})
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = "3"
os.environ["LISTEN_FDNAMES"] = "vswap-4-17:other:vswap-3-0"
for number, name in enumerate(("four", "other", "three")):
    os.dup2(os.memfd_create(name), number + 3)
from vswapd.notify import take_inherited
listeners, stored = take_inherited()
print(listeners, stored, [os.readlink(f"/proc/self/fd/{{number}}") for number in stored])
"""


def test_stored_descriptors_get_their_numbers_back() -> None:
    """Whatever the order they come in: 4 was passed as 3, and 3 as 5."""
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run(
        [sys.executable, "-c", _STORED.format(root=root)], capture_output=True, text=True, check=True
    )
    assert result.stdout == "{} [3, 4] ['/memfd:three (deleted)', '/memfd:four (deleted)']\n"


def test_store_holds_what_is_wanted(manager: socket.socket) -> None:
    store = DescriptorStore()
    with Path("/dev/null").open("rb") as null:
        fd = null.fileno()
        store.update({(fd, 1)})
        data, rights, _, _ = manager.recvmsg(200, 64)
        assert data == f"FDSTORE=1\nFDPOLL=0\nFDNAME=vswap-{fd}-1".encode()
        assert len(rights) == 1
        os.close(int.from_bytes(rights[0][2], sys.byteorder))
        store.update({(fd, 2)})  # the number is another's now
        assert manager.recv(200) == f"FDSTOREREMOVE=1\nFDNAME=vswap-{fd}-1".encode()
        assert manager.recv(200).endswith(f"FDNAME=vswap-{fd}-2".encode())
