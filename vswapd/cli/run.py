# SPDX-License-Identifier: MIT
"""run — `vswapctl run`: check everything, find or start a daemon, run the command in a group of its own.

Order: whatever can be wrong is found before anything is started; then the daemon, the group, the
command. At the end the command's members are served until they have ended (embedded daemon), statistics
are written, and the exit is the command's own.
"""

from __future__ import annotations

import os
import time

from vswapd import backends, command, config, connection, embedded, machine, paths, policy
from vswapd.failure import STATUS_USAGE, Failure
from vswapd.front import Front, say
from vswapd.sizes import format_size, format_size_argument

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from vswapd.connection import Connection
    from vswapd.injection import Injection


# ---- checks ----


def _check_options(options: argparse.Namespace) -> None:
    """Whatever needs no daemon; fills in the limit. Failure."""
    if not options.command:
        raise Failure("no command", "write vswapctl run [OPTIONS] -- COMMAND", STATUS_USAGE)
    if options.group is not None:
        _check_group_options(options)
        return
    if options.limit is None:
        options.limit = policy.default_limit_bytes(machine.available_bytes())
    least = format_size_argument(config.LIMIT_BYTES_MIN)
    if options.limit < config.LIMIT_BYTES_MIN:
        raise Failure(
            f"a limit of {format_size(options.limit)} is too small", f"give at least {least}", STATUS_USAGE
        )
    if options.limit > config.LIMIT_BYTES_MAX:
        raise Failure(
            f"a limit of {format_size(options.limit)} is too large", "leave --limit out", STATUS_USAGE
        )
    if options.pool is not None and not 0 < options.pool < options.limit:
        raise Failure(
            "--pool must be less than --limit, and not 0", "the pool is a part of the limit", STATUS_USAGE
        )
    for name in ("spill", "encrypt"):
        if options.no_spill and getattr(options, name):
            raise Failure(f"--{name} and --no-spill contradict each other", "give one of them", STATUS_USAGE)
    _check_places(options)


def _check_group_options(options: argparse.Namespace) -> None:
    """A group of the configuration has its own of what these say."""
    given = ("limit", "pool", "spill", "no_spill", "encrypt", "no_recompress", "private", "torture")
    extra = next((name for name in given if getattr(options, name)), None)
    if extra is not None:
        raise Failure(
            f"--group and --{extra.replace('_', '-')} contradict each other",
            "leave one of them out",
            STATUS_USAGE,
        )
    _check_places(options)


def _check_places(options: argparse.Namespace) -> None:
    """Files it is going to use. Failure."""
    try:
        options.spill = [backends.split_argument(text) for text in options.spill]
    except ValueError as error:
        raise Failure(str(error), status=STATUS_USAGE) from None
    if options.stats is not None:
        directory = os.path.dirname(os.path.abspath(options.stats))
        if os.path.isdir(options.stats) or not os.access(directory, os.W_OK | os.X_OK):
            raise Failure(f"cannot write {options.stats}", "name a file in a directory you can write")


def _find_daemon(options: argparse.Namespace) -> Connection | None:
    """A connection to a running daemon, or None: an embedded one is wanted. Failure."""
    if options.private:
        return None
    found = (
        connection.connect_named(options.socket)
        if options.socket is not None
        else connection.connect_default()
    )
    for name in ("spill", "encrypt"):
        if found is not None and getattr(options, name):
            found.close()
            raise Failure(
                f"--{name} needs a private daemon, but a daemon answers", f"add --private, or leave --{name} out"
            )
    return found


def _open_spills(options: argparse.Namespace) -> list[backends.Spill]:
    if options.no_spill:
        return []
    if not options.spill:
        opened = _open_private_spill(options.limit, options.encrypt)
        options.no_spill = not opened
        return opened
    wanted = [(path, size, -index, options.encrypt, 0) for index, (path, size) in enumerate(options.spill)]
    return backends.open_spills(wanted, options.limit)


def _open_private_spill(limit: int, encrypt: bool) -> list[backends.Spill]:
    """None where it would be RAM, of which nobody keeps count."""
    from vswapd import facts

    spill = backends.open_private_spill(limit, encrypt=encrypt)
    directory = os.path.dirname(spill.path)
    kind = facts.file_system_type(directory)
    if kind not in config.RAM_FILE_SYSTEMS:
        return [spill]
    spill.close()
    remedy = "set VSWAPD_SPILL_DIR to a directory on a disk, or give --no-spill to have it so"
    say(f"{directory} is a {kind}, and so RAM itself: nothing is spilled, only compressed; {remedy}")
    return []


def command_environment(
    options: argparse.Namespace, library: str, socket_path: str, group: str
) -> dict[str, str]:
    """What the command's agents need to know (wire.h)."""
    environment = dict(os.environ)
    preloaded = [
        name for name in environment.get("LD_PRELOAD", "").replace(":", " ").split() if name != library
    ]
    environment["LD_PRELOAD"] = ":".join([library, *preloaded])
    environment["VSWAPD_SOCKET"] = os.path.abspath(socket_path)
    environment["VSWAP_GROUP"] = group
    environment["VSWAP_MIN_BYTES"] = str(policy.agent_min_bytes(options.limit, options.torture))
    environment["VSWAP_LOOK_US"] = str(policy.agent_look_us(options.limit))
    return environment


def _injection(program: str, environment: dict[str, str], library: str) -> Injection | None:
    """How its agent comes into a program that cannot be preloaded; None: it can, or nothing helps."""
    from vswapd import facts, injection

    found = facts.look_at_program(program)
    if not injection.is_needed(found):
        return None
    if found.uses_musl:  # it would not even start
        rest = [name for name in environment["LD_PRELOAD"].split(":") if name != library]
        environment["LD_PRELOAD"] = ":".join(rest)
    return injection.Injection(environment)


def main(options: argparse.Namespace) -> int:
    """`vswapctl run`."""
    command.reserve_streams()
    _check_options(options)
    program = command.find_program(options.command[0])
    library = paths.library()
    session = _find_daemon(options)
    daemon: embedded.EmbeddedDaemon | None = None
    if session is None and options.group is not None:
        raise Failure(
            f"no daemon answers on {paths.default_socket()}, so there is no group {options.group}",
            "start vswapd, or give --limit instead of --group",
        )
    if session is None:
        machine.check_all()
        daemon = embedded.start(_open_spills(options))
        session = daemon.connection
        socket_path = daemon.socket_path
    else:
        socket_path = options.socket or paths.default_socket()
    try:
        return _run(
            options,
            session,
            program=program,
            library=library,
            socket_path=socket_path,
            daemon_pid=daemon.pid if daemon else 0,
        )
    finally:
        if daemon is not None:
            paths.remove_private_directory(daemon.directory)


def _enter_group(options: argparse.Namespace, session: Connection) -> dict[str, Any]:
    """The group that the command is to run in, of its own unless one is named. Failure."""
    if options.group is not None:
        reply = session.request("group-join", group=options.group)
        options.limit = int(reply["limit_bytes"])
        return reply
    return session.request(
        "group-create",
        seconds_max=config.DAEMON_START_SECONDS_MAX,
        name=f"run-{os.getpid()}",
        limit_bytes=options.limit,
        pool_limit_bytes=options.pool or 0,
        torture=options.torture,
        no_spill=options.no_spill,
        no_recompress=options.no_recompress,
    )


def _run(
    options: argparse.Namespace,
    session: Connection,
    *,
    program: str,
    library: str,
    socket_path: str,
    daemon_pid: int,
) -> int:
    command.become_subreaper()
    run = Front(session, daemon_pid)
    try:
        reply = _enter_group(options, session)
        group = str(reply["group"])
        started = time.monotonic()
        environment = command_environment(options, library, socket_path, group)
        run.start(program, options.command, environment, _injection(program, environment, library))
    except BaseException:
        run.finish()
        raise
    status = run.wait_command(shelve=bool(daemon_pid) and not options.no_spill)
    seconds = time.monotonic() - started
    # A system daemon serves them without us; asked once, so that notices on their way are not missed.
    run.wait_members(group, for_ever=bool(daemon_pid))
    failed = options.stats is not None and not run.write_statistics(options.stats, group, status, seconds)
    run.finish()
    if daemon_pid:  # here, as end_like may not return
        paths.remove_private_directory(os.path.dirname(socket_path))
    return command.end_like(status) or int(failed)
