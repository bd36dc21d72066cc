# SPDX-License-Identifier: MIT
"""Metrics: the library's own parsers read them, their values are the engine's, and nobody can block the server."""

from __future__ import annotations

import json
import os
import re
import socket
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from support.fake_engine import FakeEngine
from support.fake_log import FakeLog
from vswapd import metrics
from vswapd.failure import Failure
from vswapd.metrics import MetricsServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_CONTRIB = Path(__file__).parents[2] / "contrib/prometheus"
_COUNTERS = Path(__file__).parents[2] / "csrc/counters.h"
_SECONDS_MAX = 5.0
_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
_OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@asynccontextmanager
async def _server(tmp_path: Path) -> AsyncIterator[tuple[FakeEngine, str]]:
    """(engine, path of the socket)."""
    engine = FakeEngine()
    engine.group_create("run-1", 64 << 20)
    engine.set_group(0, usage_bytes=123, faults=7, swapped_pages=5)
    engine.add_client(os.getpid(), 0)
    engine.backend_add(-1, '/a "b"\\\n\udcff', 1 << 30, -1)
    path = str(tmp_path / "metrics.sock")
    with metrics.open_listener(path) as listener:
        server = MetricsServer(listener, engine, [os.getpid()], FakeLog())  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            yield engine, path
            nursery.cancel_scope.cancel()
    engine.destroy()


async def _ask(path: str, request: bytes = _REQUEST) -> tuple[int, str, str]:
    """(status, head, body)."""
    stream = await trio.open_unix_socket(path)
    async with stream:
        await stream.send_all(request)
        answer = b""
        with trio.fail_after(_SECONDS_MAX):
            async for chunk in stream:
                answer += chunk
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), head, body


def _samples(families: Any) -> dict[tuple[str, ...], float]:
    """{(name, label value, …): value}."""
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


@pytest.mark.parametrize(("accept", "parse"), [("", parse_text), (_OPENMETRICS, parse_openmetrics)])
async def test_parsers_read_it(tmp_path: Path, accept: str, parse: Any) -> None:
    async with _server(tmp_path) as (_, path):
        status, head, body = await _ask(path, _REQUEST.replace(b"\r\n\r\n", f"\r\nAccept: {accept}\r\n\r\n".encode()))
    assert status == 200
    assert ("openmetrics" in head) == bool(accept)
    found = _samples(parse(body))
    assert found["vswapd_group_limit_bytes", "run-1"] == 64 << 20
    assert found["vswapd_group_usage_bytes", "run-1"] == 123
    assert found["vswapd_group_faults_total", "run-1"] == 7
    assert found["vswapd_group_clients", "run-1"] == 1
    assert found["vswapd_clients",] == 1
    assert found["vswapd_faults_total",] == 100
    backend = '/a "b"\\\n\\xff'
    assert found["vswapd_backend_size_bytes", backend] == 1 << 30
    states = {key[2]: value for key, value in found.items() if key[0] == "vswapd_backend_state"}
    assert states == {"active": 1, "draining": 0, "failed": 0}
    # fake_engine: 99 faults from the pool in the bucket that ends at 4 µs, one in that of 41 µs.
    assert found["vswapd_fault_seconds_count", "pool"] == 100
    assert found["vswapd_fault_seconds_sum", "pool"] == pytest.approx(500e-6)
    assert found["vswapd_fault_seconds_bucket", "pool", "4e-06"] == 99
    assert found["vswapd_fault_seconds_bucket", "pool", "4e-05"] == 99
    assert found["vswapd_fault_seconds_bucket", "pool", "4.4e-05"] == 100
    assert found["vswapd_fault_seconds_bucket", "pool", "+Inf"] == 100
    assert found["vswapd_fault_seconds_bucket", "spill", "+Inf"] == 0


async def test_each_scrape_is_new(tmp_path: Path) -> None:
    async with _server(tmp_path) as (engine, path):
        for limit in (64, 128):
            engine.group_set_limit(0, limit << 20)
            found = _samples(parse_text((await _ask(path))[2]))
            assert found["vswapd_group_limit_bytes", "run-1"] == limit << 20


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n", 405),
        (b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 20000, 431),
    ],
)
async def test_other_requests(tmp_path: Path, request_bytes: bytes, status: int) -> None:
    async with _server(tmp_path) as (_, path):
        assert (await _ask(path, request_bytes))[0] == status
        assert (await _ask(path))[0] == 200


async def test_silent_peers_are_bounded_and_cut_off(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with _server(tmp_path) as (_, path):
        silent = [await trio.open_unix_socket(path) for _ in range(metrics._CONNECTIONS_MAX)]
        await trio.testing.wait_all_tasks_blocked()
        surplus = await trio.open_unix_socket(path)
        assert await surplus.receive_some(1) == b"", "one too many is turned away at once"
        started = trio.current_time()
        for stream in silent:
            assert await stream.receive_some(1) == b""
        assert trio.current_time() - started == pytest.approx(metrics._REQUEST_SECONDS_MAX)
        for stream in (*silent, surplus):
            await stream.aclose()


async def test_peer_that_closes_early_is_survived(tmp_path: Path) -> None:
    async with _server(tmp_path) as (_, path):
        for part in (b"", b"GET", _REQUEST):
            stream = await trio.open_unix_socket(path)
            await stream.send_all(part)
            await stream.aclose()
        assert (await _ask(path))[0] == 200


def test_listeners(tmp_path: Path) -> None:
    with metrics.open_listener(str(tmp_path / "s")) as listener:
        assert os.stat(tmp_path / "s").st_mode & 0o777 == 0o660
        assert listener.family == socket.AF_UNIX
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            Failure, match=rf"cannot serve metrics on 127\.0\.0\.1:{port}: Address already in use; name"
        ):
            metrics.open_listener(f"127.0.0.1:{port}")
    with metrics.open_listener(f"127.0.0.1:{port}") as listener:
        assert listener.getsockname() == ("127.0.0.1", port)


# ---- what is built on them ----


async def _names(tmp_path: Path) -> set[str]:
    """Of all samples; the counters as the real engine has them."""
    async with _server(tmp_path) as (_, path):
        families = list(parse_text((await _ask(path))[2]))
    counters = re.findall(r"COUNTER\((\w+), \"", _COUNTERS.read_text(encoding="utf-8"))
    assert len(counters) > 20
    return {sample.name for family in families for sample in family.samples} | {
        f"vswapd_{name}_total" for name in counters if name != "poisoned_pages"
    }


def _expressions(value: object) -> list[str]:
    """Every "expr" in a document."""
    if isinstance(value, dict):
        own = [str(value["expr"])] if "expr" in value else []
        return own + [found for part in value.values() for found in _expressions(part)]
    return [found for part in value for found in _expressions(part)] if isinstance(value, list) else []


@pytest.mark.parametrize(("file", "load"), [("dashboard.json", json.loads), ("alerts.yml", yaml.safe_load)])
async def test_dashboard_and_alerts_name_metrics_that_exist(tmp_path: Path, file: str, load: Any) -> None:
    expressions = _expressions(load((_CONTRIB / file).read_text(encoding="utf-8")))
    assert len(expressions) > 5
    # As a label the name of a state set is in quotes behind a '='.
    used = {name for text in expressions for name in re.findall(r"\bvswapd_\w+(?!\w*=)", text)}
    assert used <= await _names(tmp_path), used


def test_alerts_say_what_is_wrong() -> None:
    rules = yaml.safe_load((_CONTRIB / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert all(rule["labels"]["severity"] in ("warning", "critical") for rule in rules)
    assert all(rule["annotations"]["summary"] for rule in rules)
