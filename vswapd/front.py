# SPDX-License-Identifier: MIT
"""front — vswapctl while its command runs: one loop over signals and the session with the daemon."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time

from vswapd import command, config, processes, shelf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vswapd.connection import Connection
    from vswapd.injection import Injection


def say(text: str) -> None:
    """One line to the user; stderr is shared with the command."""
    print(f"vswapctl: {text}", file=sys.stderr, flush=True)


class Front:
    """One command in its group, from its start to the end of the last process served."""

    def __init__(self, session: Connection, daemon_pid: int) -> None:
        self._session: Connection | None = session
        self._daemon_pid = daemon_pid  # 0: a system daemon
        self._daemon_status: int | None = None
        self._command_pid = 0
        self._members: list[int] = []  # to forward signals to once the command has ended
        self._reply: dict[str, Any] | None = None
        self._status: int | None = None
        self.signals = command.Signals()
        self._goodbye = ""  # of a daemon that stopped in order, with nobody of ours left in its hands
        session.on_notice = self._on_notice

    def start(
        self,
        program: str,
        arguments: Sequence[str],
        environment: dict[str, str],
        injection: Injection | None = None,
    ) -> None:
        """Start the command. Failure."""
        self.signals.install()
        rest = [] if injection is None else [injection.hold]
        self._command_pid = command.spawn(program, list(arguments), environment, self.signals.defaulted, *rest)
        if injection is not None:
            injection.finish(self._command_pid)
        command.release_streams()

    def _step(self, seconds_max: float | None) -> None:
        """Wait for something to happen, and deal with it."""
        poll = select.poll()
        poll.register(self.signals, select.POLLIN)
        if self._session is not None:
            poll.register(self._session, select.POLLIN)
        ready = poll.poll(None if seconds_max is None else max(0, seconds_max * 1000))
        for number in self.signals.read():
            if number != signal.SIGCHLD:
                self._forward(number)
        # Not only on SIGCHLD: signals that come while one is pending are merged.
        for pid, status in command.reap():
            if pid == self._command_pid:
                self._status = status
            elif pid == self._daemon_pid:
                self._daemon_status = status
        if self._session is not None and any(fd == self._session.fileno() for fd, _ in ready):
            self._read_session(self._session)

    def _read_session(self, session: Connection) -> None:
        try:
            self._reply = session.receive(0) or self._reply
        except EOFError:
            session.close()
            self._session = None
            self._daemon_lost()

    def _on_notice(self, notice: dict[str, Any]) -> None:
        if notice["notice"] == "daemon-stopped":
            self._goodbye = str(notice["text"])  # of interest only where the command goes on
        else:
            say(str(notice["text"]))

    def _forward(self, number: int) -> None:
        for pid in [self._command_pid] if self._status is None else self._members:
            try:
                if pid > 0:
                    os.kill(pid, number)
            except (ProcessLookupError, PermissionError):
                pass

    def _daemon_lost(self) -> None:
        if self._goodbye:
            if self._status is None:
                say(self._goodbye)
            return
        if not self._daemon_pid:
            say("the daemon is gone; its clients wait until it is back")
            return
        # Their swapped memory died with the daemon: they would wait for it for ever.
        members = processes.tree(os.getpid(), {self._daemon_pid})
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        lost = "were killed, as their swapped memory is lost with it"
        say(f"the private daemon died; {len(members)} processes {lost}")

    def wait_command(self, *, shelve: bool = False) -> int:
        """Until the command has ended; its wait status. `shelve`: leave it the memory that waiting does not need."""
        if shelve:
            self._step_until_idle()
        while self._status is None:
            if shelve:
                shelf.wait([self.signals.fileno(), *([] if self._session is None else [self._session.fileno()])])
            self._step(0 if shelve else None)
        return self._status

    def _step_until_idle(self) -> None:
        """A command that has ended soon is not worth it."""
        end = time.monotonic() + config.SHELVE_AFTER_SECONDS
        while self._status is None and (left := end - time.monotonic()) > 0:
            self._step(left)
        if self._status is None:
            shelf.shelve_idle_memory()

    def wait_members(self, group: str, *, for_ever: bool) -> None:
        """Until nobody of the group is left who has memory in the daemon, or just look."""
        said = False
        timeout_ms = int(config.LINGER_SECONDS * 1000) if for_ever else 0
        while self._session is not None:
            reply = self._ask("group-wait", group=group, timeout_ms=timeout_ms)
            if reply is None or not reply.get("ok") or reply["clients"] == 0 or not for_ever:
                return
            self._members = reply["pids"]
            if not said:
                names = ", ".join(f"{pid} ({processes.comm(pid) or '?'})" for pid in self._members[:5])
                serving = f"still serving {reply['clients']} of its processes until they end: {names}"
                say(f"the command has ended; {serving}")
                said = True

    def _ask(self, op: str, **fields: Any) -> dict[str, Any] | None:
        """The answer to a request; None when the daemon is gone. Signals are dealt with meanwhile."""
        self._reply = None
        try:
            if self._session is not None:
                self._session.send(op, **fields)
        except OSError:
            self._session = None
        while self._session is not None and self._reply is None:
            self._step(None)
        return self._reply

    def write_statistics(self, path: str, group: str, status: int, seconds: float) -> bool:
        """Status of the daemon and what is known of the command, to a file. False: not written."""
        reply = self._ask("status")
        if reply is None or not reply.get("ok"):
            say(f"the daemon gave no statistics; {path} is not written")
            return False
        return _write_document(path, _run_document(group, reply["status"], status, seconds))

    def finish(self) -> None:
        """End the session and, when it is ours, the daemon."""
        if self._session is not None:
            self._session.close()
            self._session = None
        deadline = time.monotonic() + config.DAEMON_STOP_SECONDS_MAX
        while self._daemon_pid and self._daemon_status is None:
            if time.monotonic() > deadline:
                say("the private daemon does not stop; left alone")
                return
            self._step(deadline - time.monotonic())


def _run_document(group: str, status: dict[str, Any], wait_status: int, seconds: float) -> dict[str, Any]:
    """document.py's document with what `run` knows about the command."""
    record: dict[str, Any] = next((entry for entry in status["groups"] if entry["name"] == group), {})
    killed = os.WIFSIGNALED(wait_status)
    return {
        **status,
        "run": {
            "group": group,
            "exit_status": 128 + os.WTERMSIG(wait_status) if killed else os.WEXITSTATUS(wait_status),
            "signal": os.WTERMSIG(wait_status) if killed else 0,
            "seconds": round(seconds, 3),
            "limit_bytes": record.get("limit_bytes", 0),
            "usage_bytes_max": record.get("usage_bytes_max", 0),
            "swapped_pages_max": record.get("swapped_pages_max", 0),
            "faults": record.get("faults", 0),
        },
    }


def _write_document(path: str, document: dict[str, Any]) -> bool:
    from vswapd import whole_file

    try:
        whole_file.write(path, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        say(f"cannot write {path}: {error.strerror}; the statistics are lost")
        return False
    return True
