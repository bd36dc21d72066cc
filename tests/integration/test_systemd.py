# SPDX-License-Identifier: MIT
"""The service under a real systemd: the daemon dies, the supervisor dies, and its clients go on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.limited import command_path

_SUPPORT = Path(__file__).parent.parent / "support"
_UNIT = Path(__file__).parent.parent.parent / "systemd" / "vswapd.service"


def _unit(directory: Path, state: Path) -> None:
    text = _UNIT.read_text(encoding="utf-8")
    command = f"{command_path('vswapd')} --socket {state}/vswapd.sock --spill {state}/spill:1G"
    assert "ExecStart=/usr/bin/vswapd\n" in text
    (directory / "vswapd.service").write_text(
        text.replace("ExecStart=/usr/bin/vswapd\n", f"ExecStart={command}\n"), encoding="utf-8"
    )


def _in_sandbox(
    units: Path, state: Path, seconds_max: int, script: str, *arguments: str, vswapctl: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a script of support/ beside a manager; `state` and vswapctl are its first arguments."""
    command = [str(_SUPPORT / "systemd-sandbox"), "--units", str(units), "--state", str(state)]
    command += ["--timeout", str(seconds_max), "--", sys.executable, str(_SUPPORT / script), str(state)]
    return subprocess.run(
        [*command, vswapctl or command_path("vswapctl"), *arguments], capture_output=True, check=False, text=True
    )


@pytest.mark.parametrize(
    ("daemons", "supervisors", "upgrades"), [(6, 2, 2), pytest.param(50, 10, 10, marks=pytest.mark.full)]
)
def test_daemon_and_supervisor_die(
    verify_memory: str, tmp_path: Path, daemons: int, supervisors: int, upgrades: int
) -> None:
    """Four clients verify what they have, through all of it. After an upgrade the manager has a new main process."""
    units, state = tmp_path / "units", tmp_path / "state"
    units.mkdir()
    state.mkdir()
    _unit(units, state)
    program = str(shutil.copy(verify_memory, state))  # the sandbox has a /tmp of its own
    seconds = 8 + (daemons + supervisors + upgrades) * 3 // 2
    arguments = (program, str(daemons), str(supervisors), str(upgrades), str(seconds))
    result = _in_sandbox(units, state, seconds * 4 + 60, "service_deaths.py", *arguments)
    told = "".join(path.read_text(errors="replace") for path in sorted(state.glob("err.*")))
    log = (state / "systemd.log").read_text(errors="replace")[-4000:]
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{told}\n{log}"
    pauses = {kind: _pauses(result.stdout, kind) for kind in ("daemon", "supervisor", "upgrade")}
    assert tuple(map(len, pauses.values())) == (daemons, supervisors, upgrades)
    for kind, ms in pauses.items():
        print(f"{kind}: {len(ms)}, p50 {ms[len(ms) // 2]} ms, longest {ms[-1]} ms")


def _pauses(output: str, kind: str) -> list[int]:
    return sorted(int(line.split()[1]) for line in output.splitlines() if line.startswith(f"{kind} "))


_AS_TESTED = """\
[Service]
ExecStart=
ExecStart={vswapd} --config {state}/vswapd.conf --spill {state}/spill:1G --fs /run/vswapd/fs
ExecReload=
ExecReload={vswapctl} config check {state}/vswapd.conf
ExecReload=/bin/kill -HUP $MAINPID
WatchdogSec=6s
"""


def _install(tmp_path: Path, state: Path) -> Path:
    """The units, as install-service installs them, with a drop-in."""
    subprocess.run([command_path("vswapctl"), "install-service", "--root", str(tmp_path)], check=True)
    units = tmp_path / "usr/local/lib/systemd/system"
    (units / "vswapd.service.d").mkdir()
    text = _AS_TESTED.format(vswapd=command_path("vswapd"), vswapctl=command_path("vswapctl"), state=state)
    (units / "vswapd.service.d/test.conf").write_text(text, encoding="utf-8")
    (state / "vswapd.conf").touch()
    return units


def test_life_of_the_installed_service(tmp_path: Path) -> None:
    """A client has its memory through socket activation, reload, upgrade, SIGKILL, a hanging data plane, and stop."""
    state = tmp_path / "state"
    state.mkdir()
    units = _install(tmp_path, state)
    result = _in_sandbox(units, state, 200, "service_life.py")
    told = "".join(path.read_text(errors="replace") for path in sorted(state.glob("err.*")))
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{told}"
    assert result.stdout.split() == [
        *("activation", "reload", "upgrade", "SIGKILL", "watchdog", "sandbox", "stop", "detach")
    ]


@pytest.mark.parametrize("how", ["installed", pytest.param("pip install .", marks=pytest.mark.full)])
def test_two_commands_to_a_running_service(tmp_path: Path, how: str) -> None:
    """`pip install .`, in an environment of its own, and `vswapctl install-service`, which writes where it wants."""
    units, state = tmp_path / "units", tmp_path / "state"
    units.mkdir()
    state.mkdir()
    vswapctl = command_path("vswapctl")
    if how == "pip install .":
        subprocess.run([sys.executable, "-m", "venv", str(state / "clean")], check=True)
        command = [str(state / "clean/bin/pip"), "install", "--quiet", "--no-input", "."]
        subprocess.run(command, cwd=_UNIT.parent.parent, check=True, stdout=subprocess.DEVNULL)
        vswapctl = str(state / "clean/bin/vswapctl")
    result = _in_sandbox(units, state, 120, "service_install.py", str(units), vswapctl=vswapctl)
    log = (state / "systemd.log").read_text(errors="replace")[-4000:]
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{log}"
    assert result.stdout.split() == ["running", "entries", "use", "rule", "uninstalled"]


def test_units_are_sound(tmp_path: Path) -> None:
    """As the manager reads them; and little is open to whoever breaks into the daemon."""
    subprocess.run([command_path("vswapctl"), "install-service", "--root", str(tmp_path)], check=True)
    units = sorted((tmp_path / "usr/local/lib/systemd/system").iterdir())
    service = next(unit for unit in units if unit.name == "vswapd.service")
    # Before systemd 254 the descriptor store is preserved over restarts anyway.
    text = service.read_text(encoding="utf-8").replace("FileDescriptorStorePreserve=yes\n", "")
    service.write_text(text, encoding="utf-8")
    for command in (
        ["verify", "--man=no", *map(str, units)],
        ["security", "--offline=yes", "--threshold=40", str(service)],
    ):
        result = subprocess.run(["systemd-analyze", *command], capture_output=True, check=False, text=True)
        assert (result.returncode, result.stderr) == (0, ""), result.stdout
