# SPDX-License-Identifier: MIT
"""attach — `vswapctl attach PID`: bring a running process under management, in a group of its own."""

from __future__ import annotations

import os
import time

from vswapd import attachable, config, connection, engine, machine, paths, policy, processes
from vswapd.failure import STATUS_USAGE, Failure
from vswapd.sizes import format_size, format_size_argument

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from vswapd.connection import Connection

_MANAGED_SECONDS_MAX = 10.0
_STARTED_SECONDS_MAX = 2.0
_LOOK_SECONDS = 0.01


def _limit(options: argparse.Namespace) -> int:
    """In bytes. Failure."""
    if options.limit is None:
        own = processes.anonymous_bytes(options.pid)
        return policy.default_limit_bytes(machine.available_bytes() + own)
    limit = int(options.limit)
    if not config.LIMIT_BYTES_MIN <= limit <= config.LIMIT_BYTES_MAX:
        low, high = map(format_size_argument, (config.LIMIT_BYTES_MIN, config.LIMIT_BYTES_MAX))
        raise Failure(
            f"a limit of {format_size(limit)} is out of range", f"give {low} to {high}", STATUS_USAGE
        )
    return limit


def _is_managed(daemon: Connection, pid: int) -> bool:
    document = daemon.request("status")["status"]
    return any(client["pid"] == pid for client in document["clients"])


def wait_managed(daemon: Connection, pid: int) -> None:
    """Until the daemon has the process among its clients. Failure."""
    begun = time.monotonic()
    seen = False
    while not _is_managed(daemon, pid):
        seconds = time.monotonic() - begun
        if not processes.exists(pid):
            raise Failure(f"process {pid} ended meanwhile", "nothing is left to do")
        has_agent = attachable.has_agent(pid)
        # It is one from the moment on that it runs for the first time.
        if not has_agent and (seen or seconds > _STARTED_SECONDS_MAX):
            raise Failure(f"the daemon does not take process {pid}", "its log says why (journalctl -u vswapd)")
        if seconds > _MANAGED_SECONDS_MAX:
            raise Failure(
                f"process {pid} has its agent, but is not managed after {_MANAGED_SECONDS_MAX:g} s",
                "its agent goes on trying; see vswapctl status",
            )
        seen = has_agent
        time.sleep(_LOOK_SECONDS)


def _connect(path: str | None) -> Connection:
    """Failure."""
    if path is not None:
        return connection.connect_named(path)
    daemon = connection.connect_default()
    if daemon is None:
        raise Failure(
            f"no daemon answers on {paths.default_socket()}, and attach needs one that stays",
            "start vswapd (systemctl start vswapd), or name another with --socket",
        )
    return daemon


def main(options: argparse.Namespace) -> int:
    """`vswapctl attach`."""
    limit = _limit(options)
    socket_path = os.path.abspath(options.socket or paths.default_socket())
    with _connect(options.socket) as daemon:
        serving = daemon.request("ping")
        attachable.check(options.pid, socket_path, {int(serving["pid"]), int(serving["supervisor"])})
        # Ends with its last client: the process, once this connection has ended.
        group = str(daemon.request("group-create", name=f"attach-{options.pid}", limit_bytes=limit)["group"])
        try:
            engine.attach_inject(options.pid, paths.agent_image(), socket_path, group)
        except OSError as error:
            raise attachable.failure(options.pid, error) from None
        wait_managed(daemon, options.pid)
    print(f"{options.pid}: group {group}, limit {format_size(limit)}")
    return 0
