# SPDX-License-Identifier: MIT
"""service — what the system daemon has and an embedded one has not: a configuration that can be reloaded.

Imported by `vswapd` alone, so that `vswapctl run` does not pay for it.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from vswapd import backends, settings
from vswapd.daemon import make_engine
from vswapd.failure import STATUS_USAGE, Failure
from vswapd.log import make_daemon_log
from vswapd.reload import Reloader

if TYPE_CHECKING:
    import argparse

    import trio

    from vswapd.daemon import Daemon
    from vswapd.engine import Engine
    from vswapd.log import Log


def load(options: argparse.Namespace) -> settings.Settings:
    """The files, and on top what the command line says. Failure with a line for each mistake."""
    try:
        loaded = settings.load(options.config)
    except settings.SettingsError as error:
        raise Failure(str(error)) from None
    try:
        named = [backends.split_argument(text) for text in options.spill]
    except ValueError as error:
        raise Failure(str(error), status=STATUS_USAGE) from None
    spills = tuple(
        settings.BackendSettings(os.path.abspath(path), size, -index) for index, (path, size) in enumerate(named)
    )
    daemon = dataclasses.replace(
        loaded.daemon,
        socket=options.socket or os.environ.get("VSWAPD_SOCKET") or loaded.daemon.socket,
        log_level=options.log_level or loaded.daemon.log_level,
    )
    return dataclasses.replace(loaded, daemon=daemon, backends=spills or loaded.backends)


def open_engine(loaded: settings.Settings) -> Engine:
    """An engine with all configured backends. Failure."""
    try:
        spills = [backends.open_spill(backend.path, backend.size, 0, backend.priority) for backend in loaded.backends]
        return make_engine(
            spills,
            pool_capacity_bytes=loaded.daemon.pool_capacity,
            evictor_count=loaded.daemon.evictors,
            io_threads=loaded.daemon.io_threads,
        )
    except OSError as error:
        raise Failure(error.strerror or str(error)) from None


def start(
    nursery: trio.Nursery,
    daemon: Daemon,
    engine: Engine,
    log: Log,
    loaded: settings.Settings,
    options: argparse.Namespace,
) -> None:
    """Make the configured groups and start the tasks."""
    reloader = Reloader(loaded, lambda: load(options), engine, daemon.groups, log, make_daemon_log)
    nursery.start_soon(daemon.keep_running, reloader.run)
