# SPDX-License-Identifier: MIT
"""What leaves a pool for a backend, when, how fast and how much of it: per group and per backend."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from support.aged import aged_text
from support.limited import MIB
from support.service import Service, serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BACKINGS = ("zero", "same", "pool", "spill", "shared", "staged", "poisoned", "kept")


def _group(limit: str, more: str = "") -> str:
    return f'[[group]]\nname = "policy"\nlimit = "{limit}"\n{more}'


def test_writeback_is_switched_while_a_program_runs(tmp_path: Path) -> None:
    with (
        serving(tmp_path, _group("96M", "writeback = false\n")) as service,
        aged_text(service, "policy", 48) as program,
    ):
        program.call("pageout")
        group = program.group()
        assert group["no_spill"]
        assert group["pool_bytes"] > 16 * MIB
        assert group["spill_bytes"] == 0
        assert program.call("limit", "--writeback", "on", "--pool", "16M").endswith("pool 16 MiB, writeback on\n")
        wait_until("the pool is within its cap", lambda: program.group()["pool_bytes"] <= 16 * MIB)
        assert program.group()["spill_bytes"] > 0
        assert program.read_all() == "right"


def test_incompressible_pages_go_first(tmp_path: Path) -> None:
    """Although the text was there before."""
    with (
        serving(tmp_path, _group("128M", "writeback = false\n")) as service,
        aged_text(service, "policy", 24, 24) as program,
    ):
        program.call("pageout")
        cap_mib = program.group()["pool_bytes"] // MIB - 4
        program.call("limit", "--writeback", "on", "--pool", f"{cap_mib}M")
        wait_until("some are written", lambda: program.group()["spill_pages"] > 256)
        wait_until("the pool is within its cap", lambda: program.group()["pool_bytes"] <= cap_mib * MIB)
        group = program.group()
        assert group["spill_bytes"] == group["spill_pages"] * 4096
        assert program.read_all() == "right"


def test_budget_of_disk_is_kept(tmp_path: Path) -> None:
    """By the last segment: what is beyond stays in RAM."""
    with serving(tmp_path, _group("64M")) as service, aged_text(service, "policy", 1, 32) as program:
        assert "spill 8 MiB" in program.call("limit", "40M", "--spill", "8M", "--pool", "8M")
        for _ in range(50):
            group = program.group()
            assert group["spill_bytes"] <= 8 * MIB
            assert group["virtual_pages"] == sum(group[f"{backing}_pages"] for backing in _BACKINGS)
            time.sleep(0.02)  # it is watched
        assert program.group()["spill_bytes"] > 0
        assert program.read_all() == "right"
        assert program.group()["spill_bytes"] <= 8 * MIB


def test_a_rate_is_not_exceeded(tmp_path: Path) -> None:
    rate = 4 * MIB
    service = Service(tmp_path)
    service.write(_group("96M", "writeback = false\n"))
    service.conf.write_text(service.conf.read_text().replace('size = "1G"\n', f'size = "1G"\nrate = {rate}\n'))
    service.start()
    try:
        with aged_text(service, "policy", 40) as program:
            program.call("pageout")
            begun = time.monotonic()
            program.call("limit", "--writeback", "on", "--pool", "12M")
            wait_until("it is written", lambda: program.group()["pool_bytes"] <= 12 * MIB)
            written = service.status()["backends"][0]["written_bytes"]
            assert written > 2 * MIB
            assert written <= rate * (time.monotonic() - begun) + 2 * MIB
            assert service.status()["backends"][0]["rate_bytes"] == rate
    finally:
        status = service.stop()
    assert status == 0, service.log.read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6M", "small", str(mountpoint)], check=True)
    yield mountpoint
    subprocess.run(["umount", str(mountpoint)], check=True)


def test_nothing_is_begun_on_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """It is left alone, and used again when there is room."""
    service = Service(tmp_path)
    service.write(_group("96M"))
    service.conf.write_text(service.conf.read_text().replace(f"{tmp_path}/spill", f"{small_disk}/spill"))
    service.start()
    try:
        with aged_text(service, "policy", 1, 32) as program:
            program.call("pageout")
            wait_until("it is known to be full", lambda: service.status()["backends"][0]["lacks_room"])
            errors = service.status()["backends"][0]["errors"]
            used = service.status()["backends"][0]["used_bytes"]
            assert used >= 4 * MIB
            subprocess.run(["mount", "-o", "remount,size=32M", str(small_disk)], check=True)
            wait_until("it is used again", lambda: service.status()["backends"][0]["used_bytes"] > used)
            assert service.status()["backends"][0]["errors"] <= errors + 1
            assert program.read_all() == "right"
    finally:
        status = service.stop()
    assert status == 0, service.log.read_text()
