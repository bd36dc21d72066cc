# SPDX-License-Identifier: MIT
"""`vswapctl run` over the fake engine: the command must not notice, and nothing may be left behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SUPPORT = Path(__file__).resolve().parents[1] / "support"
CTL = [sys.executable, str(_SUPPORT / "fake_vswapctl.py"), "ctl"]
_DAEMON = [sys.executable, str(_SUPPORT / "fake_vswapctl.py"), "daemon"]
_CLIENT = [sys.executable, str(_SUPPORT / "fake_client.py")]
_SECONDS_MAX = 30


@pytest.fixture(scope="session")
def empty_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A client library that does nothing."""
    path = tmp_path_factory.mktemp("library") / "libvswap.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", str(path)], check=True)
    return str(path)


@pytest.fixture
def environment(tmp_path: Path, empty_library: str) -> Iterator[dict[str, str]]:
    """An environment in which sockets and spill files go to a directory that has to be empty at the end."""
    # Short: the paths of sockets have 107 bytes.
    places = {name: Path(tempfile.mkdtemp(prefix=f"vswapd-test-{name}-")) for name in ("tmp", "spill")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VSWAP", "LD_PRELOAD"))}
    yield {
        **kept,
        "TMPDIR": str(places["tmp"]),
        "VSWAPD_SPILL_DIR": str(places["spill"]),
        "VSWAPD_SOCKET": str(tmp_path / "nosuch.sock"),
        "VSWAP_LIBRARY": empty_library,
    }
    for place in places.values():
        wait_until(lambda place=place: not list(place.iterdir()), f"{place} is empty")  # type: ignore[misc]
        place.rmdir()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll another process's state; AssertionError when it does not come about."""
    deadline = time.monotonic() + _SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def run(
    environment: dict[str, str], *arguments: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """vswapctl to its end."""
    return subprocess.run(
        [*CTL, *arguments],
        env=environment,
        input=stdin,
        capture_output=True,
        timeout=_SECONDS_MAX,
        check=False,
    )


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    """vswapctl, going on; its command has to print something first."""
    process = subprocess.Popen(
        [*CTL, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.first_line = process.stdout.readline()  # type: ignore[attr-defined]
    return process


def daemon_of(front_pid: int) -> int:
    """The embedded daemon's PID."""
    for pid in Path(f"/proc/{front_pid}/task/{front_pid}/children").read_text(encoding="ascii").split():
        if Path(f"/proc/{pid}/comm").read_text(encoding="ascii") == "vswapd\n":
            return int(pid)
    raise AssertionError("no daemon")


# ---- the command's own ----


@pytest.mark.parametrize("status", [0, 3, 255])
def test_exit_status_is_the_commands(environment: dict[str, str], status: int) -> None:
    result = run(environment, "run", "--", "sh", "-c", f"exit {status}")
    assert (result.returncode, result.stdout, result.stderr) == (status, b"", b"")


def test_death_by_signal_is_the_commands(environment: dict[str, str]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGSEGV):
        assert run(environment, "run", "--", "sh", "-c", f"kill -{int(number)} $$").returncode == -number
    assert run(environment, "run", "--", "sh", "-c", "kill -9 $$").returncode == 137


def test_streams_are_the_commands(environment: dict[str, str]) -> None:
    data = os.urandom(1 << 20)
    result = run(environment, "run", "--", "sh", "-c", "cat; echo note >&2", stdin=data)
    assert result.stdout == data
    assert result.stderr == b"note\n"


def test_pipe_ends_when_the_command_closes_it(environment: dict[str, str]) -> None:
    process = start(environment, "run", "--", "sh", "-c", "echo on; exec >&-; read line; exit 5")
    assert process.stdout is not None
    assert process.stdout.read() == b""  # while the command still runs: neither front nor daemon holds it
    assert process.poll() is None
    process.communicate(b"go\n")
    assert process.returncode == 5


def test_no_other_descriptors_and_no_changed_signals(environment: dict[str, str]) -> None:
    code = (
        "import os, signal\n"
        "print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1])\n"
        "print([line for line in open('/proc/self/status') if line.startswith(('SigBlk', 'SigIgn'))])\n"
    )
    arguments = [sys.executable, "-c", code]
    native = subprocess.run(
        arguments, env=environment, capture_output=True, stdin=subprocess.DEVNULL, check=True
    )
    assert run(environment, "run", "--", *arguments).stdout == native.stdout


def test_ignored_hangup_stays_ignored(environment: dict[str, str]) -> None:
    script = f"trap '' HUP; exec {' '.join(CTL)} run -- sh -c 'kill -HUP $$; echo survived'"
    result = subprocess.run(
        ["sh", "-c", script], env=environment, capture_output=True, timeout=30, check=False
    )
    assert result.stdout == b"survived\n"


def test_closed_streams_are_survived(environment: dict[str, str]) -> None:
    script = f"exec {' '.join(CTL)} run -- sh -c 'exit 4' <&- >&-"
    result = subprocess.run(
        ["sh", "-c", script], env=environment, capture_output=True, timeout=30, check=False
    )
    assert (result.returncode, result.stderr) == (4, b"")


def test_arguments_are_the_commands(environment: dict[str, str]) -> None:
    arguments = ["--limit", "1G", "--", "-x", "", "a b"]
    result = run(environment, "run", "--limit", "64M", "--", "printf", "<%s>", *arguments)
    assert result.stdout == b"<--limit><1G><--><-x><><a b>"
    assert run(environment, "run", "printf", "<%s>", "a", "--", "b").stdout == b"<a><--><b>"


def test_script_without_interpreter_runs(environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "ran $1"\n', encoding="ascii")
    script.chmod(0o755)
    assert run(environment, "run", "--", str(script), "x").stdout == b"ran x\n"


def test_environment_of_the_command(environment: dict[str, str]) -> None:
    environment["LD_PRELOAD"] = "other.so"
    result = run(environment, "run", "--limit", "64M", "--torture", "--", "/usr/bin/env")
    found = dict(line.split("=", 1) for line in result.stdout.decode().splitlines() if "=" in line)
    assert found["LD_PRELOAD"] == f"{environment['VSWAP_LIBRARY']}:other.so"
    assert found["VSWAPD_SOCKET"].startswith(environment["TMPDIR"])
    assert found["VSWAP_GROUP"].startswith("run-")
    assert found["VSWAP_MIN_BYTES"] == str(1 << 20)
    assert found["VSWAP_LOOK_US"] == "4194"


# ---- signals ----


def test_signals_are_forwarded(environment: dict[str, str]) -> None:
    code = "trap 'echo usr1; exit 9' USR1; echo ready; while :; do read line || :; done"
    process = start(environment, "run", "--", "bash", "-c", code)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=_SECONDS_MAX)
    assert (process.returncode, output) == (9, b"usr1\n")


def test_termination_ends_the_command(environment: dict[str, str]) -> None:
    process = start(environment, "run", "--", "sh", "-c", "echo ready; exec sleep 100")
    process.terminate()
    process.communicate(timeout=_SECONDS_MAX)
    assert process.returncode == -signal.SIGTERM


def test_interrupt_from_the_terminal_is_the_commands(environment: dict[str, str]) -> None:
    """Ctrl-C on a real terminal: the command handles it, vswapctl waits for what it does."""
    code = "trap 'echo interrupted; exit 7' INT; test -t 0 && echo ready; while :; do sleep 0.01; done"
    pid, terminal = pty.fork()
    if pid == 0:
        arguments = [*CTL, "run", "--", "bash", "-c", code]
        os.execve(CTL[0], arguments, environment)  # noqa: S606 -- no shell
    with open(terminal, "r+b", buffering=0) as stream:
        output = b""
        while b"ready" not in output:
            output += stream.read(1)
        stream.write(b"\x03")
        while b"interrupted" not in output:
            output += stream.read(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


# ---- the daemon's life ----


def test_processes_that_outlive_the_command_are_served(environment: dict[str, str], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = start(environment, "run", "--", *_CLIENT, "orphan", str(fifo))
    assert process.first_line == b"managed\n"  # type: ignore[attr-defined]
    assert process.stderr is not None
    line = process.stderr.readline().decode()
    assert "the command has ended; still serving 1 of its processes" in line
    with fifo.open("wb"):
        pass
    output, errors = process.communicate(timeout=_SECONDS_MAX)
    assert (process.returncode, output, errors) == (0, b"", b"")


def test_unmanaged_processes_are_not_waited_for(environment: dict[str, str]) -> None:
    process = start(environment, "run", "--", "sh", "-c", "sleep 100 >&- 2>&- <&- & echo $!")
    process.communicate(timeout=_SECONDS_MAX)
    assert process.returncode == 0
    os.kill(int(process.first_line), signal.SIGKILL)  # type: ignore[attr-defined]


def test_killed_front_leaves_a_daemon_that_serves_and_then_ends(environment: dict[str, str]) -> None:
    process = start(environment, "run", "--", *_CLIENT, "stay")
    daemon = daemon_of(process.pid)
    process.kill()
    process.wait()
    # The command reads our pipe and stays; so does the daemon, which waits for its client.
    os.kill(daemon, 0)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.close()
    assert process.stdout.read() == b""  # the command has ended
    wait_until(lambda: not Path(f"/proc/{daemon}/exe").exists(), "the daemon ends")
    process.stdout.close()
    process.stderr.close()


def test_killed_daemon_ends_the_command_clearly(environment: dict[str, str]) -> None:
    """With its supervisor: nobody is left to start another."""
    process = start(environment, "run", "--", *_CLIENT, "stay")
    supervisor = daemon_of(process.pid)
    daemon = int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])
    for pid in (supervisor, daemon):
        os.kill(pid, signal.SIGKILL)
    # Its stdin stays open meanwhile: it does not end by itself.
    assert process.wait(_SECONDS_MAX) == 137
    _, errors = process.communicate()
    assert errors.decode().count("\n") == 1
    assert "the private daemon died" in errors.decode()


def test_out_of_memory_is_one_line_and_137(environment: dict[str, str]) -> None:
    environment["VSWAP_FAKE_KILL"] = "1"
    _check_out_of_memory(run(environment, "run", "--limit", "64M", "--", *_CLIENT, "stay"))


def test_engine_that_cannot_start_leaves_the_command_unstarted(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment["VSWAP_FAKE_REFUSE"] = "1"
    result = run(environment, "run", "--", "touch", str(tmp_path / "ran"))
    assert result.returncode == 1
    assert result.stderr == b"vswapctl: the fake engine was told to refuse; unset VSWAP_FAKE_REFUSE\n"
    assert not (tmp_path / "ran").exists()


def test_daemon_keeps_nothing_of_its_starter(environment: dict[str, str]) -> None:
    process = start(environment, "run", "--", "sh", "-c", "echo ready; read line")
    daemon = daemon_of(process.pid)
    assert os.getpgid(daemon) == daemon  # no session: the scheduler would weigh it against the command
    assert Path(f"/proc/{daemon}/cwd").readlink() == Path("/")
    targets = [str(path.readlink()) for path in Path(f"/proc/{daemon}/fd").iterdir() if int(path.name) < 2]
    assert targets == ["/dev/null"] * 2
    spill = [str(path.readlink()) for path in Path(f"/proc/{daemon}/fd").iterdir() if path.is_symlink()]
    assert any("spill" in name and "(deleted)" in name for name in spill)
    process.communicate(b"\n", timeout=_SECONDS_MAX)


# ---- spill ----


def test_named_spill_files_are_made_and_stay(environment: dict[str, str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["run", "--spill", f"{first}:64M", "--spill", f"{second}:1GiB", "--", *CTL, "swaps"]
    result = run(environment, *arguments)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.decode().splitlines()[1:]]
    assert rows == [[str(first), "file", "65536", "0", "0"], [str(second), "file", "1048576", "0", "-1"]]
    assert first.stat().st_mode & 0o777 == 0o600
    assert run(environment, *arguments).returncode == 0  # again, with the files there


def test_run_without_spill_has_no_backend(environment: dict[str, str]) -> None:
    result = run(environment, "run", "--no-spill", "--", *CTL, "status", "--json")
    status = json.loads(result.stdout)
    assert status["backends"] == []
    assert [group["no_spill"] for group in status["groups"]] == [True]


# ---- statistics ----


def test_statistics_are_written(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    result = run(environment, "run", "--limit", "64M", "--stats", str(path), "--", "sh", "-c", "exit 3")
    assert result.returncode == 3
    document = json.loads(path.read_text())
    assert document["run"]["exit_status"] == 3
    assert document["run"]["limit_bytes"] == 64 << 20
    assert document["run"]["seconds"] > 0
    assert document["groups"][0]["name"] == document["run"]["group"]
    assert document["daemon_bytes"] > 1 << 20
    assert [entry.name for entry in tmp_path.iterdir() if "stats" in entry.name] == ["stats.json"]


# ---- a system daemon ----


def _check_out_of_memory(result: subprocess.CompletedProcess[bytes]) -> None:
    assert result.returncode == 137
    lines = result.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    for part in ("out of memory: group run-", "limit 64 MiB", "usage 65 MiB", "resident 7 MiB", "python"):
        assert part in lines[0], lines[0]


def test_out_of_memory_under_a_system_daemon_is_told_too(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "vswapd.sock"
    killing = environment | {"VSWAP_FAKE_KILL": "1"}
    daemon = subprocess.Popen([*_DAEMON, "--socket", str(path)], env=killing, stderr=subprocess.PIPE)
    assert daemon.stderr is not None
    assert b"event=ready" in daemon.stderr.readline()
    _check_out_of_memory(
        run(environment, "run", "--socket", str(path), "--limit", "64M", "--", *_CLIENT, "stay")
    )
    daemon.terminate()
    log = daemon.communicate(timeout=_SECONDS_MAX)[1].decode()
    assert "level=error" in log
    assert "limit_bytes=67108864" in log


@pytest.fixture
def system_daemon(environment: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """vswapd over the fake engine, at $VSWAPD_SOCKET."""
    path = tmp_path / "vswapd.sock"
    environment["VSWAPD_SOCKET"] = str(path)
    spill = f"{tmp_path / 'system-spill'}:64M"
    process = subprocess.Popen(
        [*_DAEMON, "--socket", str(path), "--spill", spill], env=environment, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    assert b"event=ready" in process.stderr.readline()
    yield process
    process.terminate()
    process.communicate(timeout=_SECONDS_MAX)
    assert process.returncode == 0
    assert not path.exists()


def test_system_daemon_is_used_when_it_answers(
    environment: dict[str, str], system_daemon: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    assert system_daemon.poll() is None
    result = run(environment, "run", "--limit", "64M", "--", *CTL, "status", "--json")
    status = json.loads(result.stdout)
    assert [backend["path"] for backend in status["backends"]] == [str(tmp_path / "system-spill")]
    assert [group["limit_bytes"] for group in status["groups"]] == [64 << 20]
    # ... and its group is gone with it.
    status = json.loads(run(environment, "status", "--json").stdout)
    assert status["groups"] == []
    assert b"system-spill" in run(environment, "status").stdout
    # A private one on demand.
    result = run(environment, "run", "--private", "--", *CTL, "swaps")
    assert b".unlinked" in result.stdout
    result = run(environment, "run", "--spill", str(tmp_path / "x"), "--", "true")
    assert result.returncode == 1
    assert b"add --private" in result.stderr


def test_limit_and_page_operations_reach_the_daemon_of_a_process(
    environment: dict[str, str], system_daemon: subprocess.Popen[bytes]
) -> None:
    assert system_daemon.poll() is None
    process = start(environment, "run", "--private", "--limit", "64M", "--", *_CLIENT, "stay")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    pid = next(child for child in children if int(child) != daemon_of(process.pid))
    # Not the system daemon's: found by the process's own environment.
    assert run(environment, "pageout", pid).returncode == 0
    assert (
        run(environment, "pagein", "--timeout", "1", pid).stdout
        == f"{pid}: resident 0 B, swapped 0 B\n".encode()
    )
    result = run(environment, "limit", pid, "128M")
    assert result.stdout.endswith(b"limit 128 MiB\n")
    process.communicate(b"", timeout=_SECONDS_MAX)


def test_run_returns_at_once_from_a_system_daemon(
    environment: dict[str, str], system_daemon: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    assert system_daemon.poll() is None
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = start(environment, "run", "--", *_CLIENT, "orphan", str(fifo))
    _, errors = process.communicate(timeout=_SECONDS_MAX)
    assert (process.returncode, errors) == (0, b"")
    status = json.loads(run(environment, "status", "--json").stdout)
    assert len(status["clients"]) == 1
    with fifo.open("wb"):
        pass
    wait_until(
        lambda: not json.loads(run(environment, "status", "--json").stdout)["groups"], "the group is gone"
    )


def test_stopping_daemon_waits_for_its_clients(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "vswapd.sock"
    daemon = subprocess.Popen([*_DAEMON, "--socket", str(path)], env=environment, stderr=subprocess.PIPE)
    assert daemon.stderr is not None
    assert b"event=ready" in daemon.stderr.readline()
    process = start(environment, "run", "--socket", str(path), "--", *_CLIENT, "stay")
    daemon.terminate()
    line = b""
    while b"waiting for clients" not in line:
        line = daemon.stderr.readline()
        assert line
    result = run(environment, "run", "--socket", str(path), "--", "true")
    assert (result.returncode, result.stderr) == (
        1,
        b"vswapctl: the daemon is stopping; try again when it runs\n",
    )
    process.communicate(b"", timeout=_SECONDS_MAX)
    daemon.communicate(timeout=_SECONDS_MAX)
    assert daemon.returncode == 0


def test_second_daemon_on_a_socket_is_refused(
    environment: dict[str, str], system_daemon: subprocess.Popen[bytes]
) -> None:
    assert system_daemon.poll() is None
    path = environment["VSWAPD_SOCKET"]
    result = subprocess.run(
        [*_DAEMON, "--socket", path], env=environment, capture_output=True, timeout=30, check=False
    )
    assert result.returncode == 1
    assert (
        result.stderr.decode()
        == f"vswapd: a daemon answers on {path} already; stop it, or name another with --socket\n"
    )
