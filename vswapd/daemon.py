# SPDX-License-Identifier: MIT
"""daemon — the control plane's life: what starts in which order, and what has to end first.

Start   listen -> supervisor -> engine -> backends -> event, member and connection tasks -> READY
Stop    asked by SIGTERM or SIGINT (system daemon) or by the end of the session (embedded): nobody new
        comes in, forked children still do; once the last client has ended the engine stops. A
        client's memory is in our hands, so the daemon never leaves one behind, unless it is told a
        second time.

The same daemon runs in two ways. `vswapd` serves a machine. run_embedded() is what `vswapctl run`
forks where no vswapd answers: its socket is private, and its first control connection, the session, is
a socket pair instead of an accepted one. In both, what listens is a supervisor (supervisor.py), and the
daemon its child: one that dies is succeeded by another, which finds groups, clients and sessions in
the engine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import signal
import socket
import stat
import sys
from typing import TYPE_CHECKING, Any

import trio

from vswapd import __version__, backends, config, events, machine, notify, paths, processes, records, shelf, takeover
from vswapd.accept import Acceptor
from vswapd.clients import ClientServer
from vswapd.control import ControlServer
from vswapd.failure import Failure
from vswapd.groups import GroupRegistry
from vswapd.log import LEVELS, PlainLog, make_daemon_log
from vswapd.supervisor import let_signals_in, supervise

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from vswapd.accept import Peer
    from vswapd.engine import Engine
    from vswapd.log import Log
    from vswapd.records import ClientStatistics
    from vswapd.service import Service
    from vswapd.supervisor import Inheritance

_STOP_REMINDER_SECONDS = 30.0
_NAMED_MAX = 5
_LET_GO = "vswapctl detach --all brings their memory back and lets them go"


class Daemon:
    """The control plane over one engine. Make it inside trio.run."""

    def __init__(
        self, engine: Engine, log: Log, *, log_told: bool = True, inheritance: Inheritance | None = None
    ) -> None:
        """`log_told`: log also what a session was told (its front writes it to the user)."""
        self._engine = engine
        self._log = log
        self._log_told = log_told
        self._deaths = inheritance.deaths if inheritance else 0
        supervisor_pid = inheritance.supervisor_pid if inheritance else 0
        self.groups = GroupRegistry(engine, log)
        self.clients = ClientServer(engine, self.groups, log)
        self.control = ControlServer(engine, self.groups, self.clients, log, supervisor_pid)
        self.control.operations.drain_events = self.drain_events
        self.acceptor = Acceptor(self.clients.serve, self.control.serve, log)
        self.adopt_groups_at_session = False  # embedded: all groups are the session's
        self.was_near_limit = trio.Event()  # some process's regions were registered
        if engine.is_successor:
            self.was_near_limit.set()  # perhaps: those of its predecessor's clients are never reported again

    # ---- events ----

    def drain_events(self) -> None:
        """Log and pass on all that the engine has reported."""
        gone = False
        while event := self._engine.event_next():
            record = next((group for group in self._engine.groups() if group.group == event.group), None)
            comm = self.clients.comm(event.pid) or processes.comm(event.pid)
            notice = events.describe(event, record, comm)
            told = self.control.notify(notice)
            if self._log_told or not told:
                getattr(self._log, notice.level)(notice.text, **notice.fields)
            gone = gone or notice.kind == "client-gone"
            if event.kind == records.EVENT_REGISTERED:
                self.was_near_limit.set()
        if gone:
            self.groups.note_change()

    async def _watch_events(self) -> None:
        descriptor = self._engine.event_fd
        while True:
            await trio.lowlevel.wait_readable(descriptor)
            try:
                os.read(descriptor, 8)  # before the queue is drained: nothing that comes later is missed
            except BlockingIOError:
                pass
            self.drain_events()

    # ---- life ----

    async def _keep_stored(self) -> None:
        """Have the manager keep what a successor of the supervisor would need."""
        store = notify.DescriptorStore()
        while store.is_offered:
            store.update({(record.fd, record.owner) for record in self._engine.descriptors()})
            await trio.sleep(config.STORE_SECONDS)
        await trio.sleep_forever()

    def resume(self, nursery: trio.Nursery) -> None:
        """Go on with the connections of the daemon before."""
        for record in self._engine.clients():
            if record.pid:
                nursery.start_soon(self.clients.resume, record)
        if self.adopt_groups_at_session:
            return
        for descriptor in {group.session_fd for group in self.groups if group.session_fd >= 0}:
            try:
                sock = trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor))
            except OSError:  # the supervisor died, too, and nobody kept it: the session has ended
                for group in self.groups:
                    if group.session_fd == descriptor:
                        self.groups.doom(group)
                continue
            nursery.start_soon(self.acceptor.serve, sock, self.serve_session)

    async def serve_session(self, sock: trio.socket.SocketType, peer: Peer) -> None:
        """A control connection; after a death of the daemon, with the groups it had."""
        if self.adopt_groups_at_session:
            self.groups.set_session(sock.fileno())
        owned = [group for group in self.groups if group.session_fd == sock.fileno()]
        await self.control.serve(sock, peer, owned, self._deaths)

    async def run(
        self,
        listener: socket.socket,
        wait_stop: Callable[[Daemon, trio.Nursery], Awaitable[None]],
        *,
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        """Serve until `wait_stop` (async; gets the nursery for its own tasks) returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.keep_running, self._watch_events)
            nursery.start_soon(self.keep_running, self.groups.watch_doomed)
            nursery.start_soon(self.keep_running, self.acceptor.run, listener)
            nursery.start_soon(self.keep_running, self._keep_stored)
            nursery.start_soon(self.keep_running, self.control.operations.run_jobs)
            if self._engine.is_successor:
                self.resume(nursery)
            on_ready()
            await wait_stop(self, nursery)
            nursery.cancel_scope.cancel()

    async def keep_running(self, task: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run a task for ever. A mistake of ours in it must not end the daemon: clients' memory is in its
        hands."""
        while True:
            try:
                await task(*arguments)
            except Exception as error:  # noqa: BLE001 -- whatever it is
                self._log.error("task failed, starting it again", task=task.__qualname__, error=repr(error))
            await trio.sleep(config.TASK_RESTART_SECONDS)

    async def wait_no_clients(self, tell: Callable[[str], object] = lambda _: None) -> None:
        """Refuse new clients and wait until all have ended, or were let go. `tell`: hears for whom."""
        self.clients.stopping.set()
        told, reminder = "", trio.current_time()
        while clients := self._engine.clients():
            text = _waiting_for(clients, self.clients.comm)
            if text != told:
                tell(text)
                told = text
            if trio.current_time() >= reminder:
                self._log.info("waiting for clients to end", count=len(clients), remedy=_LET_GO)
                reminder = trio.current_time() + _STOP_REMINDER_SECONDS
            await self.groups.wait_change(0.1)


def _waiting_for(clients: Sequence[ClientStatistics], comm: Callable[[int], str]) -> str:
    """One line: who they are, and what can be done."""
    names = [f"{client.pid} ({comm(client.pid) or '?'})" for client in clients if client.pid]
    more = ", ..." if len(names) > _NAMED_MAX else ""
    who = f": {', '.join(names[:_NAMED_MAX])}{more}" if names else ""
    return f"Waiting for {len(clients)} process{'es' * (len(clients) > 1)} to end{who}; {_LET_GO}"


def _raise_descriptor_limit() -> None:
    """Every client takes about six descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_engine(
    spills: Sequence[backends.Spill], inheritance: Inheritance, keep_fds: Sequence[int], **options: Any
) -> Engine:
    """The engine; a successor has the backends of the one before. `options`: of Engine.create. OSError."""
    from vswapd.engine import Engine  # late: loads the extension; tests run this module without it

    engine = Engine.create(
        state_fd=inheritance.state_fd, pool_fd=inheritance.pool_fd, keep_fds=keep_fds, **options
    )
    if engine.is_successor:
        return engine
    try:
        for spill in spills:
            spill.add_to(engine)
    except BaseException:
        engine.destroy()
        raise
    return engine


# ---- embedded ----


def run_embedded(
    listener: socket.socket, session: socket.socket, spills: Sequence[backends.Spill], front_pid: int
) -> int:
    """Serve for the life of `session`, then until the last client has ended. Exit status; OSError."""
    _raise_descriptor_limit()
    gc.freeze()  # what the start made stays: later collections need not look at it
    shelf_fd = shelf.shelve_idle_memory() if spills else -1

    def serve(inheritance: Inheritance) -> int:
        keep_fds = [listener.fileno(), session.fileno(), *([shelf_fd] if shelf_fd >= 0 else [])]
        try:
            engine = make_engine(spills, inheritance, keep_fds)
        except OSError as error:
            report_start_failure(session, error)
            return 1
        gc.enable()
        trio.run(_serve_embedded, engine, inheritance, listener, session, front_pid, shelf_fd)
        # No engine.destroy(): joining its threads takes 0.1 s that the user would wait for, and the process
        # ends here, with no client left and nothing in memory or spill that anybody will read again.
        return 0

    return supervise(serve, PlainLog("error"))  # of a daemon that died the front tells


async def _serve_embedded(
    engine: Engine,
    inheritance: Inheritance,
    listener: socket.socket,
    session: socket.socket,
    front_pid: int,
    shelf_fd: int,
) -> None:
    async def page_out_shelf(daemon: Daemon) -> None:
        await daemon.was_near_limit.wait()  # before that nobody needs the room
        await shelf.page_out(shelf_fd)

    async def wait_stop(daemon: Daemon, nursery: trio.Nursery) -> None:
        if shelf_fd >= 0:
            nursery.start_soon(page_out_shelf, daemon)
        footprint = daemon.control.operations.footprint_pids
        footprint.append(front_pid)
        # A duplicate: the number stays the session's, for a successor, when this one has closed it.
        await daemon.acceptor.serve(trio.socket.from_stdlib_socket(session.dup()), daemon.serve_session)
        footprint.remove(front_pid)
        await daemon.wait_no_clients()

    daemon = Daemon(engine, PlainLog("warning"), log_told=False, inheritance=inheritance)
    daemon.adopt_groups_at_session = True
    engine.set_host_reserve(config.HOST_RESERVE_AUTO, machine.memory_cgroups())
    await daemon.run(listener, wait_stop)


def report_start_failure(session: socket.socket, error: BaseException) -> None:
    """Tell the front, in the place of an answer, why there is no daemon."""
    text = getattr(error, "strerror", None) or str(error) or repr(error)
    if not isinstance(error, OSError):
        text = f"the private daemon failed: {error!r}"
    line = {"ok": False, "code": "start", "error": text, "remedy": ""}
    try:
        session.sendall(json.dumps(line).encode() + b"\n")
    except OSError:
        print(f"vswapctl: {text}", file=sys.stderr)


# ---- system ----


def listen(path: str, mode: int) -> socket.socket:
    """A listening socket at `path`; a dead one is replaced. Failure when it is in use."""
    paths.check_socket_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        paths.make_public_directory(os.path.dirname(path))
        _remove_dead_socket(path)
        sock.bind(path)
        os.chmod(path, mode)
        sock.listen(config.LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        raise Failure(f"cannot listen on {path}: {error.strerror}", "name another with --socket") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_dead_socket(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise Failure(f"{path} is not a socket", "remove it, or name another with --socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        raise Failure(f"a daemon answers on {path} already", "stop it, or name another with --socket")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vswapd",
        description="Swap daemon in user space for programs that run inside a memory limit.",
        epilog="example: vswapd --spill /var/lib/vswapd/spill:64G",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="read this file and FILE.d/*.conf (default: /etc/vswapd/vswapd.conf, if it is there); "
        "options given here go before what stands there",
    )
    parser.add_argument(
        "--socket", metavar="PATH", help="listen here (default: $VSWAPD_SOCKET or /run/vswapd/vswapd.sock)"
    )
    parser.add_argument(
        "--spill",
        metavar="PATH[:SIZE]",
        action="append",
        default=[],
        help="swap to this file or block device; repeat for more, in order of preference (default: RAM only)",
    )
    parser.add_argument(
        "--encrypt", action="store_true", help="encrypt what is written to them, under a key that is only in memory"
    )
    parser.add_argument(
        "--metrics",
        metavar="ADDRESS",
        help="serve metrics for Prometheus there: the path of a Unix socket, or 127.0.0.1:PORT",
    )
    parser.add_argument(
        "--fs", metavar="DIR", help="show state as files in this directory, and take writes to them (FUSE)"
    )
    parser.add_argument("--log-level", choices=LEVELS, help="what to log (default: info)")
    parser.add_argument("--version", action="version", version=f"vswapd {__version__}")
    return parser


async def _serve_system(
    engine: Engine, inheritance: Inheritance, listener: socket.socket, log: Log, service: Service
) -> None:
    async def wait_stop(daemon: Daemon, nursery: trio.Nursery) -> None:
        daemon.control.operations.can_upgrade = True
        service.start(nursery, daemon, engine, listener.getsockname(), log)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            let_signals_in()
            await signals.__anext__()
            log.info("stopping")
            notify.notify("STOPPING=1")
            nursery.start_soon(_end_when_unused, daemon, nursery)
            await signals.__anext__()
            log.warning("stopped at once: clients that are left wait for ever", clients=len(engine.clients()))

    def on_ready() -> None:
        log.info("ready", version=__version__, socket=listener.getsockname())
        notify.notify("READY=1")

    daemon = Daemon(engine, log, inheritance=inheritance)
    await daemon.run(listener, wait_stop, on_ready=on_ready)


async def _end_when_unused(daemon: Daemon, nursery: trio.Nursery) -> None:
    await daemon.wait_no_clients(lambda text: notify.notify(f"STATUS={text}"))
    await daemon.control.say_goodbye()
    nursery.cancel_scope.cancel()


def main(arguments: Sequence[str] | None = None) -> int:
    """`vswapd`."""
    from vswapd.service import Service  # late: an embedded daemon does without

    options = _parser().parse_args(arguments)
    taken = takeover.asked()
    passed, stored = notify.take_inherited()
    activated = notify.CLIENTS in passed or (taken is not None and taken.activated == 1)
    memfds = _find_memfds(stored)
    try:
        service = Service(options)
        machine.check_all()
        machine.avoid_oom_kill()
        log = make_daemon_log(service.settings.daemon.log_level)
        _raise_descriptor_limit()
        if taken:
            taken.check()
            gc.freeze()
            taken.complete()
            memfds, passed = (taken.state, taken.pool), taken.listeners()
        listener = passed.get(notify.CLIENTS) or listen(service.settings.daemon.socket, 0o666)
        path = listener.getsockname()
        try:
            service.open(is_successor=memfds is not None, metrics_listener=passed.get(notify.METRICS))
            gc.freeze()
            return supervise(
                lambda inheritance: _run_system(inheritance, listener, log, service),
                log,
                memfds,
                {"listener": listener.fileno(), "metrics": service.metrics_fd, "activated": int(activated)},
            )
        except OSError as error:
            raise Failure(error.strerror or str(error)) from None
        finally:
            service.close()
            if not activated:
                os.unlink(path)
    except Failure as error:
        return _refuse(error)


def _find_memfds(stored: Sequence[int]) -> tuple[int, int] | None:
    """State and pool among descriptors that the manager kept, or None."""
    names = {os.readlink(f"/proc/self/fd/{descriptor}").split(" ")[0]: descriptor for descriptor in stored}
    found = names.get("/memfd:vswap-state"), names.get("/memfd:vswap-pool")
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _refuse(error: Failure) -> int:
    for line in str(error).split("\n"):
        print(f"vswapd: {line}", file=sys.stderr)
    return error.status


def _run_system(inheritance: Inheritance, listener: socket.socket, log: Log, service: Service) -> int:
    """One daemon. Exit status."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until a reload can be carried out
    try:
        engine = service.make_engine(inheritance, listener)
        with service.mounted():
            trio.run(_serve_system, engine, inheritance, listener, log, service)
    except Failure as error:
        return _refuse(error)
    if engine.clients():
        return 1  # told twice to stop: their memory is given up, but nothing of it is taken apart
    engine.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
