# SPDX-License-Identifier: MIT
"""What test_systemd.py runs inside the sandbox: the service as installed, from socket activation to its stop.

    service_life.py STATE VSWAPCTL

A client holds twice its limit, half of it on disk, through all of it, and verifies it again and again. One line for
each thing that was seen to be so. Exit status 0 when all was.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.sampler import ControlClient, answering_pid

if TYPE_CHECKING:
    from collections.abc import Callable

_SECONDS_MAX = 60.0
_SOCKET = "/run/vswapd/vswapd.sock"
_PTRACE_SEIZE, _PTRACE_INTERRUPT = 0x4206, 0x4207
_WALL = 0x40000000
_CAPABILITIES = sum(1 << number for number in (1, 5, 19, 21, 23))  # DAC_OVERRIDE, KILL, SYS_PTRACE, _ADMIN, _NICE

_CLIENT = """
import hashlib, os, select
memory = bytearray(os.urandom(48 << 20))
digest = hashlib.sha256(memory).digest()
while not select.select([0], [], [], 0.05)[0]:
    if hashlib.sha256(memory).digest() != digest:
        raise SystemExit("wrong bytes")
raise SystemExit(hashlib.sha256(memory).digest() != digest)
"""

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _systemctl(*arguments: str, may_fail: bool = False) -> str:
    command = [*os.environ["SYSTEMCTL"].split(), *arguments]
    result = subprocess.run(command, check=not may_fail, stdout=subprocess.PIPE, text=True)
    return result.stdout.strip() if not may_fail else str(result.returncode)


def _shown(what: str) -> str:
    return _systemctl("show", "-P", what, "vswapd")


def _wait_until(what: str, is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + _SECONDS_MAX
    while not is_so():
        if time.monotonic() > deadline:
            sys.exit(f"never: {what}")
        time.sleep(0.05)  # polling another process's state


def _groups() -> set[str]:
    with ControlClient(_SOCKET, _SECONDS_MAX) as control:
        return {str(group["name"]) for group in control.status()["groups"]}


def _spilled() -> bool:
    with ControlClient(_SOCKET, _SECONDS_MAX) as control:
        return any(int(client["spill_pages"]) > 0 for client in control.status()["clients"])


def _say(text: str) -> None:
    print(text, flush=True)


def _check_sandboxed() -> None:
    """What confines the service is in force here, too, and not ignored by a user's manager."""
    pid = answering_pid(_SOCKET, _SECONDS_MAX)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines())
    if (status["Seccomp"], status["NoNewPrivs"], int(status["CapBnd"], 16)) != ("2", "1", _CAPABILITIES):
        sys.exit(f"not confined: {status}")
    stats = [path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    if not {"-20", "-10"} <= {text.rpartition(")")[2].split()[16] for text in stats}:
        sys.exit("its threads do not go first")
    networks = [Path(f"/proc/{who}/ns/net").readlink() for who in (pid, "self")]
    if networks[0] == networks[1]:
        sys.exit("it has the network")
    if not Path("/run/vswapd/fs/swaps").read_text(encoding="utf-8").startswith("Filename"):
        sys.exit("no file tree")
    _say("sandbox")


def _check_reload(conf: Path) -> None:
    conf.write_text('[[group]]\nname = "batch"\nlimit = "64M"\n', encoding="utf-8")
    _systemctl("reload", "vswapd")
    _wait_until("the group of the new configuration", lambda: "batch" in _groups())
    conf.write_text('nonsense = "x"\n', encoding="utf-8")
    if _systemctl("reload", "vswapd", may_fail=True) == "0":
        sys.exit("a reload with a mistake was no failure")
    conf.write_text('[[group]]\nname = "batch"\nlimit = "64M"\n', encoding="utf-8")
    _say("reload")


def _check_supervisor_killed() -> None:
    pid = answering_pid(_SOCKET, _SECONDS_MAX)
    os.kill(int(_shown("MainPID")), signal.SIGKILL)
    answering_pid(_SOCKET, _SECONDS_MAX, dead=pid)
    _say("SIGKILL")


def _check_upgrade(vswapctl: str) -> None:
    before = _shown("MainPID")
    subprocess.run([vswapctl, "upgrade"], check=True, stdout=subprocess.DEVNULL)
    _wait_until("the manager has another main process", lambda: _shown("MainPID") not in (before, "0"))
    answering_pid(_SOCKET, _SECONDS_MAX)
    _say("upgrade")


_dead: set[int] = set()


def _is_dead(thread: int) -> bool:
    """Of a thread that we trace: its process is gone when we have seen that of all."""
    if thread not in _dead:
        found, status = os.waitpid(thread, _WALL | os.WNOHANG)
        if found and os.WIFSIGNALED(status):
            _dead.add(thread)
    return thread in _dead


def _check_watchdog() -> None:
    """All threads but the one that runs the control plane are stopped: it answers, and nothing else does."""
    pid, restarts = answering_pid(_SOCKET, _SECONDS_MAX), int(_shown("NRestarts"))
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid]
    for thread in threads:
        for request in (_PTRACE_SEIZE, _PTRACE_INTERRUPT):
            if _ptrace(request, thread, None, None) != 0:
                sys.exit(f"ptrace of {thread}: {os.strerror(ctypes.get_errno())}")
    with ControlClient(_SOCKET, _SECONDS_MAX) as control:
        control.request("ping")
    _wait_until("the watchdog's kill", lambda: sum(map(_is_dead, threads)) == len(threads))
    _wait_until("the manager started it anew", lambda: int(_shown("NRestarts")) > restarts)
    answering_pid(_SOCKET, _SECONDS_MAX, dead=pid)
    _say("watchdog")


def _check_stop(vswapctl: str, client: subprocess.Popen[bytes]) -> None:
    """With a client attached: nobody new comes in, and it ends when the client has."""
    _systemctl("stop", "--no-block", "vswapd")
    _wait_until("it is stopping", lambda: _shown("ActiveState") == "deactivating")
    command = [vswapctl, "run", "--socket", _SOCKET, "--limit", "16M", "true"]
    _wait_until(
        "it takes nobody new", lambda: subprocess.run(command, check=False, capture_output=True).returncode == 1
    )
    if client.poll() is not None:
        sys.exit("the client ended too early to see anything")
    assert client.stdin
    client.stdin.close()
    if client.wait(_SECONDS_MAX) != 0:
        sys.exit(f"the client ended with {client.returncode}")
    _wait_until("it has stopped", lambda: _shown("ActiveState") == "inactive")
    _say("stop")


def _check_letting_go(vswapctl: str, client: subprocess.Popen[bytes]) -> None:
    """A stop that says for whom it waits; with all detached it ends, and they have their memory."""
    with ControlClient(_SOCKET, _SECONDS_MAX) as control:
        [served] = [served for served in control.status()["clients"] if served["group"] != "self-test"]
    _systemctl("stop", "--no-block", "vswapd")
    wanted = f"Waiting for 1 process to end: {served['pid']} ({served['comm']}); vswapctl detach --all brings"
    _wait_until("the manager knows for whom", lambda: _shown("StatusText").startswith(wanted))
    subprocess.run([vswapctl, "detach", "--all"], check=True, stdout=subprocess.DEVNULL)
    _wait_until("it has stopped", lambda: _shown("ActiveState") == "inactive")
    if client.poll() is not None:
        sys.exit("the client ended too early to see anything")
    assert client.stdin
    client.stdin.close()
    if client.wait(_SECONDS_MAX) != 0:
        sys.exit(f"the client ended with {client.returncode}")
    _say("detach")


def _start_client(state: str, vswapctl: str) -> subprocess.Popen[bytes]:
    argv = [vswapctl, "run", "--socket", _SOCKET, "--limit", "24M", "--", sys.executable, "-c", _CLIENT]
    with Path(f"{state}/err.client").open("ab") as errors:
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=errors)


def main() -> int:
    """Entry point."""
    state, vswapctl = sys.argv[1:3]
    _systemctl("start", "vswapd.socket")
    if _shown("ActiveState") != "inactive":
        sys.exit("active before anybody came")
    client = _start_client(state, vswapctl)
    _wait_until("the socket started it", lambda: _shown("ActiveState") == "active")
    _say("activation")
    _wait_until("pages are on disk", _spilled)
    _check_reload(Path(f"{state}/vswapd.conf"))
    _check_upgrade(vswapctl)
    _check_supervisor_killed()
    _check_watchdog()
    _check_sandboxed()
    _check_stop(vswapctl, client)
    client = _start_client(state, vswapctl)
    _wait_until("pages are on disk", _spilled)
    said = r"1 process in 2 groups, \S+ MiB swapped in \S+ MiB "  # the reload has made one
    _wait_until("the manager shows what there is", lambda: re.match(said, _shown("StatusText")))
    _check_letting_go(vswapctl, client)
    return 0


if __name__ == "__main__":
    sys.exit(main())
