# SPDX-License-Identifier: MIT
"""The status document, and what is printed of it."""

from __future__ import annotations

import argparse
import math
import os
from typing import TYPE_CHECKING, Any, Self

import pytest
from rich.console import Console

from support.fake_engine import FakeEngine
from vswapd import connection
from vswapd.cli import status as status_command
from vswapd.cli import swaps
from vswapd.document import build_status

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROMISED = (
    "daemon_bytes virtual_pages zero_pages same_pages pool_pages pool_bytes spill_pages spill_bytes "
    "resident_bytes metadata_bytes faults backends clients latency_us groups counters version host"
)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """A group with a client, and a backend."""
    fake = FakeEngine()
    fake.group_create("run-1", 64 << 20)
    fake.set_client(fake.add_client(os.getpid(), 0), swapped_pages=10, resident_bytes=5 << 20, faults=3)
    fake.add_client(0, 0)
    fake.backend_add(-1, "/var/tmp/a b", 1 << 30, -1)
    yield fake
    fake.destroy()


@pytest.fixture
def document(engine: FakeEngine) -> dict[str, Any]:
    """Its status."""
    return build_status(engine, pids=[os.getpid()])  # type: ignore[arg-type]


def test_promised_fields_are_there(document: dict[str, Any]) -> None:
    assert set(_PROMISED.split()) <= set(document)
    assert {"path", "size_bytes", "used_bytes", "priority", "state"} <= set(document["backends"][0])
    promised = {"pid", "comm", "limit_bytes", "resident_bytes", "swapped_bytes", "faults"}
    assert promised <= set(document["clients"][0])
    assert set(document["latency_us"]) == {"zero", "same", "pool", "spill", "staged"}
    assert {"p50", "p99", "p999", "count"} <= set(document["latency_us"]["pool"])


def test_values(document: dict[str, Any]) -> None:
    client, forking = document["clients"]
    assert client["comm"]
    assert (client["limit_bytes"], client["swapped_bytes"], client["group"]) == (64 << 20, 40960, "run-1")
    assert (forking["pid"], forking["comm"]) == (0, "")
    assert document["backends"][0]["state"] == "active"
    assert document["latency_us"]["pool"] == {"p50": 4.0, "p99": 4.0, "p999": 41.0, "mean": 5.0, "count": 100}
    assert document["latency_us"]["spill"] == {"p50": 0.0, "p99": 0.0, "p999": 0.0, "mean": 0.0, "count": 0}
    assert document["faults"] == 100
    assert document["daemon_bytes"] > 1 << 20


def test_tokens_stay_secret(document: dict[str, Any]) -> None:
    assert "token" not in str(document)


def test_every_number_is_finite(document: dict[str, Any]) -> None:
    def walk(value: object) -> None:
        if isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif isinstance(value, list):
            for part in value:
                walk(part)
        elif isinstance(value, float):
            assert math.isfinite(value)

    walk(document)


class _Daemon:
    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def request(self, op: str) -> dict[str, Any]:
        assert op == "status"
        return {"ok": True, "status": self._document}


def test_tables_show_it(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection, "connect_any", lambda _: _Daemon(document))
    status_command.main(argparse.Namespace(json=False, watch=None, socket=None))
    text = capsys.readouterr().out
    for part in (
        "run-1",
        "64 MiB",
        "/var/tmp/a b",
        "active",
        str(os.getpid()),
        "(forking)",
        "40 KiB",
        "pool",
    ):
        assert part in text, part


@pytest.mark.parametrize(("width", "left_out"), [(130, set()), (80, {"unmanaged"}), (60, {"pool", "faults"})])
def test_narrow_terminals_get_fewer_columns(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    width: int, left_out: set[str],
) -> None:  # fmt: skip
    """And never a name or a figure that is cut."""
    console = Console(width=width, highlight=False)
    monkeypatch.setattr(status_command, "_console", lambda: console)
    monkeypatch.setattr(connection, "connect_any", lambda _: _Daemon(document))
    status_command.main(argparse.Namespace(json=False, watch=None, socket=None))
    text = capsys.readouterr().out
    assert "…" not in text
    [header] = [line for line in text.splitlines() if line.startswith("name ")][:1]
    assert {"limit", "usage", "resident", "swapped", "clients"} <= set(header.split())
    assert not left_out & set(header.split())


def test_swaps_are_spaced_like_the_kernels() -> None:
    """The first is a line of a real /proc/swaps (Linux 6.18), the others follow its source."""
    entries = [
        {
            "path": "/tmp/pyw/sw file",
            "type": "file",
            "encrypted": False,
            "size_bytes": 4092 << 10,
            "used_bytes": 0,
            "room_bytes": 4092 << 10,
            "priority": -2,
        },
        {
            "path": "/dev/vdb",
            "type": "partition",
            "encrypted": False,
            "size_bytes": 2097148 << 10,
            "used_bytes": 0,
            "room_bytes": 2097148 << 10,
            "priority": -2,
        },
        {
            "path": "/swap file",
            "type": "file",
            "encrypted": False,
            "size_bytes": 20000000 << 10,
            "used_bytes": 512 << 10,
            "room_bytes": 19999488 << 10,
            "priority": 5,
        },
        {
            "path": "/encrypted",
            "type": "partition",
            "encrypted": True,
            "size_bytes": 1 << 20,
            "used_bytes": 0,
            "room_bytes": 1 << 20,
            "priority": 7,
        },
        {
            "path": "/" + "x" * 50,
            "type": "file",
            "encrypted": False,
            "size_bytes": 90000000 << 10,
            "used_bytes": 10000000 << 10,
            "room_bytes": 1024,  # its disk is full
            "priority": 0,
        },
    ]
    assert swaps.format_swaps(entries).splitlines() == [
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority",
        "/tmp/pyw/sw\\040file                     file\t\t4092\t\t0\t\t-2",
        "/dev/vdb                                partition\t2097148\t\t0\t\t-2",
        "/swap\\040file                           file\t\t20000000\t512\t\t5",
        "/encrypted                              partition,encrypted\t1024\t\t0\t\t7",
        "/" + "x" * 50 + " file\t\t10000001\t10000000\t0",
    ]
