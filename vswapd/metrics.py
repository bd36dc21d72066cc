# SPDX-License-Identifier: MIT
"""metrics — what Prometheus scrapes, and the HTTP server that it scrapes it from.

GET /metrics on a Unix socket (mode 0660) or a port of the loopback interface, which every user of the
machine can read: there are names of groups and paths of backends in it, nothing about single processes. One
request a connection; a peer that is slow, or one of too many, is cut off.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import h11
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    StateSetMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from vswapd import __version__, config, processes
from vswapd.failure import Failure
from vswapd.records import BACKEND_STATES, BACKINGS, GROUP_BACKINGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from prometheus_client.metrics_core import Metric

    from vswapd.engine import Engine
    from vswapd.log import Log
    from vswapd.records import Statistics

_CONNECTIONS_MAX = 16
_REQUEST_SECONDS_MAX = 10.0
_REQUEST_BYTES_MAX = 16 * config.KIB
_BUCKET_STEP = 4  # of the engine's buckets, which are 64 a histogram, every fourth

# (field of the record, meaning), by type
_TOTALS = (
    ("kept_pages", "Resident pages whose stored copy is kept"),
    ("poisoned_pages", "Pages that could not be given back"),
    ("pool_bytes", "RAM of the compressed pools"),
    ("pool_object_bytes", "Bytes of compressed pages in the pools"),
    ("spill_bytes", "Bytes of compressed pages on backends"),
    ("resident_bytes", "Anonymous memory of managed processes"),
    ("metadata_bytes", "RAM of slot tables and indexes"),
    ("client_count", "Managed processes"),
    ("region_count", "Files in regions/"),
    ("events_dropped", "Events that the daemon was too slow to take"),
)
_HOST_GAUGES = (
    ("host_is_short", "1 while the machine or the daemon's memory cgroup has less available than it is to"),
    ("host_available_bytes", "Memory that is available there"),
    ("host_reserve_bytes", "Memory that is to be available there, 0: whatever is"),
)
_HOST_COUNTERS = (
    ("host_shortages", "Times that it was short"),
    ("host_reclaimed_pages", "Pages moved out of programs for that"),
    ("host_written_pages", "Pages written back for that"),
)
_GROUP_GAUGES = (
    ("limit_bytes", "Limit of the group"),
    ("usage_bytes", "What the limit bounds"),
    ("usage_bytes_max", "Highest usage seen"),
    ("resident_bytes", "Resident memory of managed processes"),
    ("unmanaged_bytes", "Memory of processes that are not managed"),
    ("pool_bytes", "RAM of the group's compressed pool"),
    ("metadata_bytes", "RAM of the group's slot tables and indexes"),
    ("swapped_pages", "Pages that are swapped out"),
    ("spill_bytes", "Bytes of the group's compressed pages on backends"),
    ("spill_limit_bytes", "Most that they may be, 0: no limit"),
    ("virtual_pages", "Pages that have a slot: swapped, or resident with a kept copy"),
    ("client_count", "Managed processes of the group"),
)
_BACKEND_GAUGES = (
    ("size_bytes", "Size of the backend"),
    ("used_bytes", "Bytes in segments that are in use"),
    ("live_bytes", "Bytes of compressed pages on it"),
    ("priority", "Higher ones are filled first"),
)
_BACKEND_COUNTERS = (
    ("written_bytes", "Bytes written to it"),
    ("read_bytes", "Bytes read from it"),
    ("errors", "Failed reads and writes"),
)


class EngineCollector(Collector):
    """The engine's statistics as metrics, taken anew for each scrape. Slow enough for a worker thread."""

    def __init__(self, engine: Engine, pids: Sequence[int]) -> None:
        self._engine = engine
        self._pids = pids

    def collect(self) -> Iterable[Metric]:
        """All metrics."""
        statistics = self._engine.statistics()
        yield InfoMetricFamily("vswapd_build", "Version of the daemon", value={"version": __version__})
        daemon = sum(processes.own_bytes(pid) for pid in self._pids)
        yield GaugeMetricFamily("vswapd_daemon_bytes", "RAM of the daemon beside pools and metadata", value=daemon)
        for name, meaning in (*_TOTALS, *_HOST_GAUGES):
            yield GaugeMetricFamily(_metric(name), meaning, value=getattr(statistics, name))
        pages = GaugeMetricFamily("vswapd_swapped_pages", "Swapped pages by where they are", labels=["backing"])
        for backing in BACKINGS:
            pages.add_metric([backing], getattr(statistics, f"{backing}_pages"))
        yield pages
        for name, count in statistics.counters.items():
            if name == "poisoned_pages":
                continue  # the gauge above counts the same pages
            yield CounterMetricFamily(f"vswapd_{name}", f"Counter {name} of vswapd(8)", value=count)
        for name, meaning in _HOST_COUNTERS:
            yield CounterMetricFamily(f"vswapd_{name}", meaning, value=getattr(statistics, name))
        yield _latencies(statistics, self._engine.latency_bounds_us())
        yield from self._groups()
        yield from self._backends()

    def _groups(self) -> Iterator[Metric]:
        groups = self._engine.groups()
        for name, meaning in _GROUP_GAUGES:
            family = GaugeMetricFamily(_metric(f"group_{name}"), meaning, labels=["group"])
            for group in groups:
                family.add_metric([group.name], getattr(group, name))
            yield family
        pages = GaugeMetricFamily(
            "vswapd_group_pages", "The group's virtual pages by where they are", labels=["group", "backing"]
        )
        for group in groups:
            for backing in GROUP_BACKINGS:
                pages.add_metric([group.name, backing], getattr(group, f"{backing}_pages"))
        yield pages
        faults = CounterMetricFamily("vswapd_group_faults", "Page faults answered", labels=["group"])
        for group in groups:
            faults.add_metric([group.name], group.faults)
        yield faults

    def _backends(self) -> Iterator[Metric]:
        backends = [(_printable(backend.path), backend) for backend in self._engine.backends()]
        for name, meaning in _BACKEND_GAUGES:
            gauge = GaugeMetricFamily(f"vswapd_backend_{name}", meaning, labels=["path"])
            for path, backend in backends:
                gauge.add_metric([path], getattr(backend, name))
            yield gauge
        for name, meaning in _BACKEND_COUNTERS:
            counter = CounterMetricFamily(f"vswapd_backend_{name}", meaning, labels=["path"])
            for path, backend in backends:
                counter.add_metric([path], getattr(backend, name))
            yield counter
        states = StateSetMetricFamily("vswapd_backend_state", "State of the backend", labels=["path"])
        for path, backend in backends:
            states.add_metric([path], {name: index == backend.state for index, name in enumerate(BACKEND_STATES)})
        yield states


def _metric(name: str) -> str:
    """client_count -> vswapd_clients: '_count' is Prometheus' own."""
    return f"vswapd_{name.replace('client_count', 'clients').replace('region_count', 'regions')}"


def _printable(path: str) -> str:
    """A path whose bytes are not UTF-8 must not spoil all the rest."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _latencies(statistics: Statistics, bounds_us: tuple[float, ...]) -> Metric:
    family = HistogramMetricFamily("vswapd_fault_seconds", "Time to answer a fault", labels=["backing"])
    for index, backing in enumerate(BACKINGS):
        counts = statistics.latency[index]
        # The last bucket of the engine has all that took longer.
        ends = range(_BUCKET_STEP, len(counts), _BUCKET_STEP)
        buckets = [(f"{bounds_us[end - 1] / 1e6:.3g}", sum(counts[:end])) for end in ends]
        seconds = statistics.latency_ns_sum[index] / 1e9
        family.add_metric([backing], [*buckets, ("+Inf", sum(counts))], sum_value=seconds)
    return family


def open_listener(address: str) -> socket.socket:
    """A listening socket at an address that settings.py has checked. Failure."""
    if address.startswith("/"):
        from vswapd.daemon import listen

        return listen(address, 0o660)
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host.strip("[]"), int(port)))
        sock.listen(_CONNECTIONS_MAX)
    except OSError as error:
        sock.close()
        raise Failure(f"cannot serve metrics on {address}: {error.strerror}", "name another with --metrics") from None
    return sock


# ---- server ----


class MetricsServer:
    """Answers GET /metrics."""

    def __init__(self, listener: socket.socket, engine: Engine, pids: Sequence[int], log: Log) -> None:
        self._listener = listener
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(EngineCollector(engine, pids))
        self._log = log
        self._connections = trio.CapacityLimiter(_CONNECTIONS_MAX)
        self._workers = trio.CapacityLimiter(1)

    async def run(self) -> None:
        """Serve for ever."""
        sock = trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(self._listener.fileno())))
        with sock:
            async with trio.open_nursery() as nursery:
                while True:
                    connection, _ = await sock.accept()
                    try:
                        self._connections.acquire_on_behalf_of_nowait(connection)
                    except trio.WouldBlock:
                        connection.close()
                    else:
                        nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        stream = trio.SocketStream(connection)
        async with stream:
            try:
                with trio.fail_after(_REQUEST_SECONDS_MAX):
                    await self._answer(stream)
            except (trio.BrokenResourceError, trio.TooSlowError) as error:
                self._log.debug("scrape given up", reason=repr(error))
            finally:
                self._connections.release_on_behalf_of(connection)

    async def _answer(self, stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=_REQUEST_BYTES_MAX)
        try:
            while (event := http.next_event()) is h11.NEED_DATA:
                http.receive_data(await stream.receive_some(_REQUEST_BYTES_MAX))
            if not isinstance(event, h11.Request):
                return  # it closed without asking
            status, kind, body = await self._response(event)
        except h11.RemoteProtocolError as error:
            status, kind, body = error.error_status_hint, "text/plain", b""
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close")]
        for part in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            await stream.send_all(http.send(part) or b"")

    async def _response(self, request: h11.Request) -> tuple[int, str, bytes]:
        """(status, content type, body)."""
        if request.method != b"GET":
            return 405, "text/plain", b""
        if request.target.split(b"?")[0] != b"/metrics":
            return 404, "text/plain", b"metrics are at /metrics\n"
        accept = next((value for name, value in request.headers if name == b"accept"), b"")
        encode, kind = choose_encoder(accept.decode("latin-1"))
        body: bytes = await trio.to_thread.run_sync(encode, self._registry, limiter=self._workers)
        return 200, kind, body
