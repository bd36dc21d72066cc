# SPDX-License-Identifier: MIT
"""`vswapctl install-service`, below a directory of the test's own."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from vswapd import cli, settings
from vswapd.cli import install_service

if TYPE_CHECKING:
    from pathlib import Path

_SERVICE = "usr/local/lib/systemd/system/vswapd.service"


def _run(root: Path, *options: str) -> int:
    return cli.main(["install-service", "--root", str(root), *options])


def _files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_installs_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    files = _files(tmp_path)
    assert sorted(line for line in said if line.startswith("wrote ")) == sorted(
        f"wrote {tmp_path}/{name}" for name in files
    )
    assert {os.stat(tmp_path / name).st_mode & 0o7777 for name in files} == {0o644}
    [start] = [line for line in files[_SERVICE].splitlines() if line.startswith("ExecStart=")]
    assert subprocess.run([start.removeprefix("ExecStart="), "--version"], check=True, capture_output=True).stdout
    assert settings.load(str(tmp_path / "etc/vswapd/vswapd.conf")) == settings.load(None)
    assert _run(tmp_path) == 0
    assert "wrote" not in capsys.readouterr().out
    assert _files(tmp_path) == files


def test_dry_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "--dry-run") == 0
    assert f"would write {tmp_path}/{_SERVICE}\n" in capsys.readouterr().out
    assert not _files(tmp_path)
    _run(tmp_path)
    files = _files(tmp_path)
    assert _run(tmp_path, "--dry-run", "--uninstall") == 0
    assert f"would remove {tmp_path}/{_SERVICE}\n" in capsys.readouterr().out
    assert _files(tmp_path) == files


def test_older_version_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(settings, "format_example", lambda: "# of another version\n")
        _run(tmp_path)
    assert _run(tmp_path) == 0
    assert "of another version" not in (tmp_path / "etc/vswapd/vswapd.conf").read_text()


@pytest.mark.parametrize("text", ["", "[Service]\n", None], ids=["emptied", "replaced", "edited"])
def test_changed_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    """And then nothing else is installed either: half a version is none."""
    _run(tmp_path)
    unit, slice_unit = tmp_path / _SERVICE, tmp_path / "usr/local/lib/systemd/system/vswapd.slice"
    unit.write_text(unit.read_text().replace("WatchdogSec=30s", "WatchdogSec=60s") if text is None else text)
    slice_unit.unlink()
    before = _files(tmp_path)
    capsys.readouterr()
    assert _run(tmp_path) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"vswapctl: changed since they were installed: {unit}; nothing is installed; ")
    assert captured.err.count("\n") == 1
    assert _files(tmp_path) == before


def test_configuration_belongs_to_the_administrator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path)
    conf = tmp_path / "etc/vswapd/vswapd.conf"
    conf.write_text('[[group]]\nname = "batch"\nlimit = "1G"\n')
    assert _run(tmp_path) == 0
    assert f"kept {conf}: it is yours\n" in capsys.readouterr().out
    assert _run(tmp_path, "--uninstall") == 0
    assert list(_files(tmp_path)) == ["etc/vswapd/vswapd.conf"]
    assert "batch" in conf.read_text()


def test_says_how_to_start_what_it_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below another root, where systemd does not run, or where nobody wants it."""
    _run(tmp_path)
    said = capsys.readouterr().out
    assert "Nothing is started. To start it, and after each update:\n" in said
    assert "\n  systemctl enable --now vswapd.socket vswapd.service\n" in said


def test_start_that_fails_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what udev does not take, as in a container, is no failure."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("systemctl", "exit 0"), ("udevadm", "echo nobody listens >&2; exit 1")):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
    (commands / "systemd-sysusers").write_text("#!/bin/sh\n")
    (commands / "systemd-tmpfiles").write_text("#!/bin/sh\nprintf 'no\\nroom\\n' >&2; exit 1\n")
    for path in commands.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/bin:/usr/bin")
    monkeypatch.setattr(install_service, "_runs_systemd", lambda _: True)
    assert _run(tmp_path) == 1
    captured = capsys.readouterr()
    assert "ran systemd-sysusers vswapd.conf\n" in captured.out
    assert captured.err == (
        "vswapctl: systemd-tmpfiles --create vswapd.conf: no room; all files are in place; mend that "
        "(journalctl -u vswapd), then repeat\n"
    )
    (commands / "systemd-tmpfiles").write_text("#!/bin/sh\n")
    assert _run(tmp_path) == 0
    said = capsys.readouterr().out
    assert "no effect: udevadm control --reload: nobody listens\n" in said
    assert "ran systemctl enable --now vswapd.socket vswapd.service\nvswapd runs: " in said
    assert _run(tmp_path, "--no-start") == 0
    assert "Nothing is started." in capsys.readouterr().out


def test_uninstall_leaves_what_was_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path)
    (tmp_path / _SERVICE).write_text("[Service]\n")
    assert _run(tmp_path, "--uninstall") == 0
    assert f"kept {tmp_path}/{_SERVICE}: it is yours\n" in capsys.readouterr().out
    assert list(_files(tmp_path)) == [_SERVICE]


def test_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "usr").write_text("")
    assert _run(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"vswapctl: {tmp_path}/usr")
