# SPDX-License-Identifier: MIT
"""`vswapctl top` and `status --watch` on a real terminal, over a real daemon."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from support.limited import MIB, command_path
from support.service import program, serving
from support.terminal import Terminal

if TYPE_CHECKING:
    from pathlib import Path

_GROUPS = '[[group]]\nname = "{0}"\nlimit = "{1}"\n'


def _in_order(screen: str, *names: str) -> bool:
    """Whether there are lines that begin with these names, in this order; not so while a frame is half drawn."""
    lines = [match[1] for match in re.finditer(rf"^\W*?({'|'.join(names)})\b", screen, re.MULTILINE)]
    return lines == list(names)


def test_top_resize_sort_limit_quit(tmp_path: Path) -> None:
    groups = _GROUPS.format("busy", "48M") + _GROUPS.format("idle", "64M")
    with serving(tmp_path, groups) as service, program(service, "busy") as pid:
        argv = [command_path("vswapctl"), "top", "--socket", service.socket_path, "--interval", "0.2"]
        with Terminal(tmp_path, argv, {}) as terminal:
            screen = terminal.wait(lambda screen: "python3" in screen and "█" in screen, "the process is shown")
            assert str(pid) in screen
            assert re.search(r"pool +█+░* +\S+ \S+ in ", screen), "a bar of the pool"
            assert _in_order(screen, "busy", "idle"), "sorted by usage"
            terminal.keys("r")
            terminal.wait(lambda screen: _in_order(screen, "idle", "busy"), "sorted the other way")

            terminal.resize(60, 30)
            terminal.wait(lambda screen: "idle" in screen and len(screen.splitlines()) <= 30, "drawn anew")
            terminal.resize(120, 45)
            terminal.wait(lambda screen: "faults/s" in screen and "python3" in screen, "drawn anew")

            terminal.keys("r")
            terminal.wait(lambda screen: _in_order(screen, "busy", "idle"), "sorted by usage")
            terminal.keys("Home", "l")
            terminal.wait(lambda screen: "New limit of" in screen, "it asks")
            terminal.keys("-l", "96M")
            terminal.keys("Enter")
            terminal.wait(lambda screen: "limit of busy is 96 MiB now" in screen, "the limit is changed")
            assert service.group("busy")["limit_bytes"] == 96 * MIB

            terminal.keys("q")
            assert terminal.exit_status() == 0
            assert terminal.is_as_before()


def test_watch_on_a_terminal_is_in_place_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    with serving(tmp_path, _GROUPS.format("idle", "64M")) as service:
        argv = [command_path("vswapctl"), "status", "--watch", "0.1", "--socket", service.socket_path]
        with Terminal(tmp_path, argv, {}) as terminal:
            terminal.wait(lambda screen: screen.count("idle") == 1, "it is shown")
            service.write(_GROUPS.format("other", "64M"))
            service.reload()
            terminal.wait(lambda screen: "other" in screen and "idle" not in screen, "it is shown in place")
            terminal.keys("C-c")
            assert terminal.exit_status() == 0


def test_colours_are_for_terminals_and_can_be_refused(tmp_path: Path) -> None:
    argv = [command_path("vswapctl"), "doctor", "--socket", str(tmp_path / "none")]
    for variables, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        directory = tmp_path / str(coloured)
        directory.mkdir()
        with Terminal(directory, argv, variables, (200, 60)) as terminal:
            terminal.exit_status()
            assert ("\033[32m" in terminal.screen(with_colours=True)) == coloured


def test_end_of_the_daemon_is_said(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        argv = [command_path("vswapctl"), "top", "--socket", service.socket_path, "--interval", "0.1"]
        with Terminal(tmp_path, argv, {}) as terminal:
            terminal.wait(lambda screen: "0 processes" in screen, "it is shown")
            service.stop()
            assert terminal.exit_status() == 1
            assert "vswapctl: the daemon does not answer" in terminal.screen()
