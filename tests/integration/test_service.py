# SPDX-License-Identifier: MIT
"""The system daemon and its configuration: a real vswapd, real clients, SIGHUP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from support.limited import MIB, command_path
from support.service import Service, program, serving, wait_until

if TYPE_CHECKING:
    from pathlib import Path

_BATCH = '[[group]]\nname = "batch"\nlimit = "{0}"\n'


def test_configured_group_bounds_its_programs_and_follows_a_reload(tmp_path: Path) -> None:
    with serving(tmp_path, _BATCH.format("48M")) as service:
        with program(service, "batch"):
            assert service.group("batch")["swapped_bytes"] > 32 * MIB
            assert service.group("batch")["usage_bytes"] <= 64 * MIB
            service.write(_BATCH.format("96M"))
            service.reload()
            wait_until("the limit is the new one", lambda: service.group("batch")["limit_bytes"] == 96 * MIB)
        wait_until("the client has ended", lambda: not service.status()["clients"])
        assert service.group("batch"), "it stands, with nobody in it"


def test_reload_with_a_mistake_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, _BATCH.format("48M")) as service:
        service.write(_BATCH.format("64M"), more="x = 1\n")
        service.reload()
        wait_until("the log names it", lambda: "vswapd.conf:3: unknown key 'x'" in service.log.read_text())
        assert service.group("batch")["limit_bytes"] == 48 * MIB


def test_start_with_a_mistake_is_refused(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.write(_BATCH.format("1"), more="x = 1\n")
    result = subprocess.run(
        [command_path("vswapd"), "--config", str(service.conf)], check=False, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [f"{service.conf}:{n}" for n in (3, 9)]
    assert not service.answers()


@pytest.mark.parametrize(("name", "text"), [("nosuch", "no group 'nosuch' of yours"), ("", "no group ''")])
def test_run_in_a_group_that_is_not_there(tmp_path: Path, name: str, text: str) -> None:
    with serving(tmp_path) as service:
        command = [command_path("vswapctl"), "run", "--socket", service.socket_path, "--group", name, "true"]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (1, "")
        assert text in result.stderr


def test_statistics_of_a_run_in_a_group(tmp_path: Path) -> None:
    with serving(tmp_path, _BATCH.format("48M")) as service:
        options = ["--socket", service.socket_path, "--group", "batch", "--stats", str(tmp_path / "stats")]
        subprocess.run([command_path("vswapctl"), "run", *options, "true"], check=True)
        document = json.loads((tmp_path / "stats").read_text())
        assert (document["run"]["group"], document["run"]["limit_bytes"]) == ("batch", 48 * MIB)


def test_metrics_of_the_real_engine(tmp_path: Path) -> None:
    address = str(tmp_path / "metrics.sock")
    with serving(tmp_path, _BATCH.format("48M"), more=f'metrics = "{address}"\n') as service, program(service, "batch"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text\r\n\r\n")
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        parse: Any = parse_openmetrics  # untyped
        families = list(parse(answer.decode().partition("\r\n\r\n")[2]))
        values = {sample.name: sample.value for family in families for sample in family.samples}
        assert values["vswapd_group_swapped_pages"] * 4096 > 32 * MIB
        assert values["vswapd_faults_total"] > 0
        assert values["vswapd_group_faults_total"] > 0
        assert values["vswapd_evicted_pages_total"] > 0
    assert not os.path.exists(address)
