# SPDX-License-Identifier: MIT
"""The command line: every wrong use is one line with a remedy and its exit status."""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING

import pytest

from vswapd import cli, command, machine, paths
from vswapd.failure import Failure

if TYPE_CHECKING:
    from pathlib import Path

VERBS = ["run", "status", "swaps", "pageout", "pagein", "swapon", "swapoff", "compact", "limit", "upgrade"]
VERBS += ["doctor", "config", "top", "completion", "install-service", "report"]
VERBS += ["attach", "detach"]


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No daemon answers, and an embedded one cannot be started by mistake."""
    monkeypatch.setenv("VSWAPD_SOCKET", str(tmp_path / "nosuch.sock"))
    monkeypatch.setattr(paths, "private_sockets", list)
    library = tmp_path / "libvswap.so"
    library.touch()
    monkeypatch.setenv("VSWAP_LIBRARY", str(library))

    def refuse() -> None:
        raise Failure("an embedded daemon would be started", "never in this file")

    monkeypatch.setattr(machine, "check_all", refuse)


def _line(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """(exit status, the one line on stderr)."""
    status = cli.main(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("vswapctl: ")
    return status, captured.err.rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: VERB; see vswapctl --help"),
        (["nosuch"], "invalid choice"),
        (["statsu"], "invalid choice: 'statsu', did you mean 'status'?; see vswapctl --help"),
        (["config", "chek"], "invalid choice: 'chek', did you mean 'check'?; see vswapctl config --help"),
        (["detach"], "give a PID, or --all"),
        (["detach", "--all", "1"], "give a PID, or --all"),
        (["run"], "no command; write vswapctl run [OPTIONS] -- COMMAND"),
        (["run", "--"], "no command"),
        (["run", "--limit", "12X", "--", "true"], "'12X' is not a size; write bytes"),
        (["run", "--limit", "-1", "--", "true"], "see vswapctl run --help"),
        (["run", "--limit", "1M", "--", "true"], "a limit of 1 MiB is too small; give at least 16M"),
        (["run", "--limit", "1000000T", "--", "true"], "too large"),
        (["run", "--limit", "64M", "--pool", "64M", "--", "true"], "--pool must be less than --limit"),
        (["run", "--pool", "0", "--", "true"], "--pool must be less"),
        (["run", "--spill", "x", "--no-spill", "--", "true"], "contradict"),
        (["run", "--encrypt", "--no-spill", "--", "true"], "--encrypt and --no-spill contradict"),
        (["run", "--spill", "x:12X", "--", "true"], "'12X' is not a size"),
        (["run", "--spill", "x:1K", "--", "true"], "too little"),
        (["run", "--spill", "", "--", "true"], "empty spill path"),
        (["run", "--socket", "x", "--private", "--", "true"], "not allowed with"),
        (["run", "--lim", "64M", "--", "true"], "see vswapctl"),
        (["run", "--group", "g", "--limit", "64M", "--", "true"], "--group and --limit contradict each other"),
        (["run", "--group", "g", "--no-spill", "--", "true"], "--group and --no-spill contradict each other"),
        (["run", "--group", "g", "--encrypt", "--", "true"], "--group and --encrypt contradict each other"),
        (["config"], "ACTION"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["config", "nosuch"], "invalid choice"),
        (["status", "--json", "--watch"], "not allowed with"),
        (["status", "--watch", "0"], "'0' is too often; give at least 0.1"),
        (["top", "--interval", "x"], "is not a number of seconds"),
        (["status", "--", "x"], "'--' means nothing to status"),
        (["status", "x"], "unrecognized arguments: x"),
        (["pageout"], "PID"),
        (["pageout", "x"], "'x' is not a PID"),
        (["pageout", "0"], "is not a PID"),
        (["pageout", "--timeout", "x", "1"], "is not a number of seconds"),
        (["report"], "PID"),
        (["report", "--seconds", "0.5", "1"], "give --seconds 1 or more"),
        (["swapon"], "PATH"),
        (["swapon", "x", "--priority", "40000"], "is not a number from -32768 to 32767"),
        (["swapon", "x", "--size", "x"], "'x' is not a size"),
        (["swapoff"], "give a PATH, or --all"),
        (["swapoff", "-a", "x"], "give a PATH, or --all"),
        (["compact"], "PATH"),
        (["limit", "1"], "nothing to change; give a SIZE"),
        (["limit", "1", "--writeback", "maybe"], "invalid choice"),
        (["limit", "1", "x"], "'x' is not a size"),
        (["limit", "1", "1M"], "out of range; give 16M to"),
    ],
)
def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    status, line = _line(capsys, *arguments)
    assert status == 2
    assert text in line
    assert "; " in line, "no remedy"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["status"], "no daemon answers on"),
        (["detach", "--all"], "no daemon answers on"),
        (["attach", "1"], "and attach needs one that stays; start vswapd (systemctl start vswapd)"),
        (["top"], "top needs a terminal; use vswapctl status"),
        (["swaps"], "start vswapd, or a command with vswapctl run"),
        (["status", "--socket", "/nonexistent/s"], "no daemon answers on /nonexistent/s"),
        (["run", "--socket", "/nonexistent/s", "--", "true"], "start vswapd, or leave --socket out"),
        (["pageout", "4194304"], "no process 4194304; give the PID of a running process"),
        (["pagein", str(os.getpid())], "is not managed; start it with vswapctl run"),
        (["limit", str(os.getpid()), "64M"], "is not managed; start it with vswapctl run"),
        (["run", "--stats", "/nonexistent/s", "--", "true"], "cannot write /nonexistent/s"),
        (["run", "--group", "g", "--", "true"], "so there is no group g; start vswapd, or give --limit"),
        (["run", "--", "true"], "an embedded daemon would be started"),
    ],
)
def test_failures_are_status_1(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    status, line = _line(capsys, *arguments)
    assert status == 1
    assert text in line
    assert "; " in line, "no remedy"


def test_command_not_found_is_127(capsys: pytest.CaptureFixture[str]) -> None:
    status, line = _line(capsys, "run", "--", "no\nsuch")
    assert (status, line) == (127, "vswapctl: command not found: no such; check its spelling and $PATH")


def test_command_not_executable_is_126(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.touch()
    assert _line(capsys, "run", "--", str(path))[0] == 126
    assert _line(capsys, "run", "--", str(tmp_path))[0] == 126


def test_path_is_searched_like_a_shell_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mode in (("a", 0o644), ("b", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tool").touch(mode)
    monkeypatch.setenv("PATH", f"{tmp_path}/none:{tmp_path}/a:{tmp_path}/b")
    assert command.find_program("tool") == f"{tmp_path}/b/tool"
    monkeypatch.setenv("PATH", f"{tmp_path}/a")
    with pytest.raises(Failure, match="not executable"):
        command.find_program("tool")
    monkeypatch.chdir(tmp_path / "b")
    monkeypatch.setenv("PATH", "")
    assert command.find_program("tool") == "./tool"


def test_missing_library_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VSWAP_LIBRARY", str(tmp_path / "nosuch.so"))
    assert "nosuch.so; install vswapd again" in _line(capsys, "run", "--", "true")[1]
    spaced = tmp_path / "a b.so"
    spaced.touch()
    monkeypatch.setenv("VSWAP_LIBRARY", str(spaced))
    assert "cannot be preloaded" in _line(capsys, "run", "--", "true")[1]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf"^example: vswapctl {verb}\b", text, re.MULTILINE)
    assert "80%" in text or verb != "run"
    [example] = re.findall(r"^example: vswapctl (.*)$", text, re.MULTILINE)
    assert cli.parse(shlex.split(example)).verb == verb


def test_several_private_daemons_need_a_choice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        directories = [paths.make_private_directory() for _ in range(2)]
        sockets = [paths.private_socket(directory) for directory in directories]
        for listener, path in zip((first, second), sockets, strict=True):
            listener.bind(path)
            listener.listen()
        monkeypatch.setattr(paths, "private_sockets", lambda: sockets)
        _, line = _line(capsys, "status")
        assert line.startswith("vswapctl: 2 private daemons run; name one: --socket ")
        assert all(path in line for path in sockets)
    for directory in directories:
        paths.remove_private_directory(directory)
        assert not os.path.exists(directory)
