# SPDX-License-Identifier: MIT
"""Second-chance compression: pages that were out for a while take less of the pool, and come back right."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

from support.aged import aged_text
from support.limited import MIB, command_path
from support.service import serving, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from support.service import Service

_MIB = 72
_GROUPS = '[[group]]\nname = "aging"\nlimit = "64M"\n'


def _counters(service: Service) -> dict[str, Any]:
    counters: dict[str, Any] = service.status()["counters"]
    return counters


def test_old_text_takes_less_of_the_pool(tmp_path: Path) -> None:
    """By 15 % at least, with the CPU time of it shown; all of it is right afterwards."""
    with serving(tmp_path, _GROUPS, more="recompress_age = 1\n") as service, aged_text(service, "aging", _MIB) as text:
        before = service.group("aging")["pool_bytes"]
        assert before > 16 * MIB
        wait_until("the pool is smaller", lambda: service.group("aging")["pool_bytes"] < 0.85 * before)
        counters = _counters(service)
        assert counters["recompressed_pages"] > 0
        assert counters["recompress_examined"] >= counters["recompressed_pages"]
        assert counters["recompress_saved_bytes"] >= 0.15 * before
        assert counters["recompress_cpu_us"] > 0
        shown = subprocess.run(
            [command_path("vswapctl"), "status", "--socket", service.socket_path],
            capture_output=True,
            check=True,
            text=True,
        )
        assert "Compressed again: " in shown.stdout
        assert text.read_all() == "right"
        assert _counters(service)["check_failures"] == 0


def test_what_was_compressed_again_is_written_as_it_is(tmp_path: Path) -> None:
    """Age, recompress, write back: each is counted."""
    with serving(tmp_path, _GROUPS, more="recompress_age = 1\n") as service, aged_text(service, "aging", _MIB) as text:
        wait_until("old pages are recompressed", lambda: _counters(service)["recompressed_pages"] > 4096)
        service.conf.write_text(service.conf.read_text().replace('limit = "64M"', 'limit = "64M"\npool = "4M"'))
        service.reload()
        # Nothing is evicted, so the writer has nobody who waits for it; it keeps the pool below its cap all the same.
        wait_until("some of them are written", lambda: _counters(service)["spill_written_recompressed"] > 0)
        assert text.read_all() == "right"


def test_a_group_can_do_without(tmp_path: Path) -> None:
    """While it says so; the reload of its configuration changes that."""
    without = _GROUPS + "recompress = false\n"
    with serving(tmp_path, without, more="recompress_age = 1\n") as service, aged_text(service, "aging", _MIB) as text:
        other = '[[group]]\nname = "aging"\nlimit = "64M"\n'
        assert service.group("aging")["no_recompress"]
        service.write(other, more="recompress_age = 1\n")
        assert _counters(service)["recompress_examined"] == 0
        service.reload()
        wait_until("old pages are examined", lambda: _counters(service)["recompress_examined"] > 0)
        assert not service.group("aging")["no_recompress"]
        assert text.read_all() == "right"
