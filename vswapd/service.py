# SPDX-License-Identifier: MIT
"""service — what the system daemon has and an embedded one has not: configuration, reload, metrics, files.

Imported by `vswapd` alone, so that `vswapctl run` does not pay for it.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from vswapd import backends, config, notify, settings, view
from vswapd.daemon import make_engine
from vswapd.document import TOTALS
from vswapd.failure import STATUS_USAGE, Failure
from vswapd.log import make_daemon_log
from vswapd.reload import Reloader
from vswapd.self_test import SelfTest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from vswapd.daemon import Daemon
    from vswapd.engine import Engine
    from vswapd.fs import Mount
    from vswapd.log import Log
    from vswapd.supervisor import Inheritance

_STATUS_SECONDS = 5.0


class Service:
    """One system daemon's. Everything that can be refused is refused before it starts to serve."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read the configuration. Failure with a line for each mistake."""
        self._options = options
        try:
            self.settings = self._load()
        except settings.SettingsError as error:
            raise Failure(str(error)) from None
        self._metrics_listener: socket.socket | None = None
        self._spills: list[backends.Spill] = []
        self._mount: Mount | None = None

    def _load(self) -> settings.Settings:
        """The files, and on top what the command line says. SettingsError, Failure."""
        options = self._options
        loaded = settings.load(options.config)
        try:
            named = [backends.split_argument(text) for text in options.spill]
            metrics = settings.check_metrics(options.metrics or loaded.daemon.metrics)
        except ValueError as error:
            raise Failure(str(error), status=STATUS_USAGE) from None
        if options.encrypt and not named:
            raise Failure(
                "--encrypt is for the files of --spill, and there are none",
                "give --spill, or encrypt = true in the configuration",
                STATUS_USAGE,
            )
        spills = tuple(
            settings.BackendSettings(os.path.abspath(path), size, -index, options.encrypt)
            for index, (path, size) in enumerate(named)
        )
        daemon = dataclasses.replace(
            loaded.daemon,
            socket=options.socket or os.environ.get("VSWAPD_SOCKET") or loaded.daemon.socket,
            log_level=options.log_level or loaded.daemon.log_level,
            metrics=metrics,
            fs=os.path.abspath(options.fs) if options.fs else loaded.daemon.fs,
        )
        return dataclasses.replace(loaded, daemon=daemon, backends=spills or loaded.backends)

    # ---- in the supervisor, for all daemons ----

    @property
    def metrics_fd(self) -> int:
        """Where metrics are asked for; -1: nowhere."""
        return self._metrics_listener.fileno() if self._metrics_listener is not None else -1

    def open(self, *, is_successor: bool = False, metrics_listener: socket.socket | None = None) -> None:
        """Backends, and what is listened on beside the daemon's socket. Failure.

        `is_successor`: of another supervisor; its state names the backends in use, and they are open.
        `metrics_listener`: its own for metrics, or the manager's.
        """
        if not is_successor:
            wanted = [
                (backend.path, backend.size, backend.priority, backend.encrypt, backend.rate)
                for backend in self.settings.backends
            ]
            self._spills = backends.open_spills(wanted, 0)
        if metrics_listener is not None:
            self._metrics_listener = metrics_listener
        elif self.settings.daemon.metrics:
            from vswapd import metrics

            self._metrics_listener = metrics.open_listener(self.settings.daemon.metrics)

    def close(self) -> None:
        """Leave nothing behind. Again: no effect."""
        listener, self._metrics_listener = self._metrics_listener, None
        if listener is not None:
            is_ours = listener.getsockname() == self.settings.daemon.metrics  # a path, and not the manager's
            listener.close()
            if is_ours:
                os.unlink(self.settings.daemon.metrics)

    # ---- in each daemon ----

    def make_engine(self, inheritance: Inheritance, listener: socket.socket) -> Engine:
        """An engine with all configured backends, or that of the daemon before. Failure."""
        daemon = self.settings.daemon
        kept = [sock.fileno() for sock in (listener, self._metrics_listener) if sock is not None]
        try:
            return make_engine(
                self._spills,
                inheritance,
                kept,
                pool_capacity_bytes=daemon.pool_capacity,
                evictor_count=daemon.evictors,
                accept_percent=daemon.accept_threshold,
                recompress_age_ms=daemon.recompress_age * 1000,
                io_threads=daemon.io_threads,
            )
        except OSError as error:
            raise Failure(error.strerror or str(error)) from None

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """With the file tree, where one is wanted. Failure."""
        if not self.settings.daemon.fs:
            yield
            return
        from vswapd.fs import Mount

        self._mount = Mount(self.settings.daemon.fs)
        try:
            yield
        finally:
            self._mount.close()

    def start(self, nursery: trio.Nursery, daemon: Daemon, engine: Engine, socket_path: str, log: Log) -> None:
        """Make the configured groups and start the tasks."""
        reloader = Reloader(self.settings, self._load, engine, daemon.groups, log, make_daemon_log)
        nursery.start_soon(daemon.keep_running, reloader.run)
        nursery.start_soon(daemon.keep_running, _tell_status, engine, daemon.clients.stopping)
        self_test = SelfTest(engine, daemon.groups, daemon.clients, socket_path, log)
        nursery.start_soon(daemon.keep_running, self_test.run)
        if self._metrics_listener is not None:
            from vswapd.metrics import MetricsServer

            pids = daemon.control.operations.footprint_pids
            server = MetricsServer(self._metrics_listener, engine, pids, log)
            nursery.start_soon(daemon.keep_running, server.run)
        if self._mount is not None:
            from vswapd.regions import Regions
            from vswapd.tree import Tree

            limits = self.settings.daemon
            regions = Regions(engine, daemon.groups, limits.region_limit, limits.region_size)
            tree = Tree(engine, daemon.groups, daemon.control.operations, regions)
            nursery.start_soon(daemon.keep_running, self._mount.run, tree, engine, log)


def status_line(engine: Engine) -> str:
    """What there is beside our own test."""
    groups = [group for group in engine.groups() if group.name != config.SELF_TEST_GROUP]
    numbers = {group.group for group in groups}
    statistics = engine.statistics()
    figures = {name: getattr(statistics, name) for name in TOTALS}
    clients = [client for client in engine.clients() if client.group in numbers]
    return view.summary({"groups": groups, "clients": clients, **figures})


async def _tell_status(engine: Engine, stopping: trio.Event) -> None:
    """What `systemctl status` shows; from a stop on that is whom it waits for (daemon.py)."""
    told = ""
    while not stopping.is_set():
        text = status_line(engine)
        if text != told and notify.notify(f"STATUS={text}"):
            told = text
        with trio.move_on_after(_STATUS_SECONDS):
            await stopping.wait()
    await trio.sleep_forever()
