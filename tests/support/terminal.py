# SPDX-License-Identifier: MIT
"""terminal — a program on a real terminal: tmux is the terminal, and we look at its screen."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from typing import TYPE_CHECKING, Self

from support.limited import need_program

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

_SECONDS_MAX = 20.0


class Terminal:
    """with Terminal(directory, ["program"]) as terminal: … — a tmux server of its own, ended at the end."""

    def __init__(
        self, directory: Path, argv: Sequence[str], environment: Mapping[str, str], size: tuple[int, int] = (100, 40)
    ) -> None:
        self._socket = str(directory / "tmux.sock")
        self._status = directory / "exit-status"
        self._program = need_program("tmux")
        columns, rows = size
        # The shell stays, also after Ctrl-C, so that what the program leaves on the screen can be seen.
        script = f"trap : INT; {shlex.join(argv)}; echo $? > {shlex.quote(str(self._status))}; printf 'ended\\n'; cat"
        kept = {name: value for name, value in os.environ.items() if name not in ("TMUX", "NO_COLOR")}
        options = ["-d", "-x", str(columns), "-y", str(rows)]
        subprocess.run(
            [self._program, "-S", self._socket, "-f", "/dev/null", "new-session", *options, "sh", "-c", script],
            check=True,
            env={**kept, **environment, "TERM": "xterm-256color"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server")

    def _tmux(self, *arguments: str) -> str:
        command = [self._program, "-S", self._socket, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def keys(self, *names: str) -> None:
        """Press keys, named as tmux does."""
        self._tmux("send-keys", *names)

    def resize(self, columns: int, rows: int) -> None:
        """As if the window were dragged."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def screen(self, *, with_colours: bool = False) -> str:
        """What is seen now."""
        return self._tmux("capture-pane", "-p", *(["-e"] if with_colours else []))

    def is_as_before(self) -> bool:
        """Whether the program has given the terminal back: its main screen, a cursor, no mouse reports."""
        modes = "#{alternate_on} #{cursor_flag} #{mouse_any_flag}"
        return self._tmux("display-message", "-p", modes).split() == ["0", "1", "0"]

    def wait(self, is_so: Callable[[str], object], what: str) -> str:
        """Until the screen is so."""
        deadline = time.monotonic() + _SECONDS_MAX
        while not is_so(screen := self.screen()):
            assert time.monotonic() < deadline, f"never: {what}\n{screen}"
            time.sleep(0.02)  # polling another process's screen
        return screen

    def exit_status(self) -> int:
        """Of the program, once it has ended."""
        self.wait(lambda screen: "ended" in screen, "the program ends")
        return int(self._status.read_text())
