# SPDX-License-Identifier: MIT
"""sdist and wheel: built in isolation, installed where nothing else is, and they work without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_SECONDS_MAX = 900


def _run(*argv: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        [str(word) for word in argv],
        check=False,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_SECONDS_MAX,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_installation_has_its_man_pages_and_files() -> None:
    share = Path(sysconfig.get_path("data")) / "share"
    for name in ("man/man1/vswapctl.1", "man/man3/libvswap.3", "man/man5/vswapd.conf.5", "man/man8/vswapd.8"):
        assert (share / name).read_text(encoding="utf-8") == (_ROOT / "man" / Path(name).name).read_text(
            encoding="utf-8"
        )
    assert (share / "vswapd/prometheus/alerts.yml").exists()


@pytest.mark.full
def test_sdist_and_wheel_work_in_a_clean_environment(tmp_path: Path) -> None:
    _run(sys.executable, "-m", "build", "--outdir", tmp_path, _ROOT, cwd=tmp_path)
    [sdist], [wheel] = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"meson.build", "csrc/engine.h", "man/vswapctl.1", "vswapd/py.typed"} <= names
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"vswapd/libvswap.so", "vswapd/py.typed", "vswapd/cli/run.py", "vswapd/systemd/vswapd.service"} <= names
    assert not [name for name in names if name.endswith((".c", ".h", ".pyc"))]

    clean = tmp_path / "clean"
    _run(sys.executable, "-m", "venv", clean, cwd=tmp_path)
    _run(clean / "bin/pip", "install", "--no-input", wheel, cwd=tmp_path)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    program = "memory = bytearray(96 << 20); memory[::4096] = b'x' * (96 << 8); print(memory.count(b'x'))"
    run = ["run", "--private", "--limit", "64M", "--", sys.executable, "-Ic", program]
    assert _run(clean / "bin/vswapctl", *run, cwd=tmp_path, environment=environment) == f"{96 << 8}\n"
    assert "no problem" in _run(clean / "bin/vswapctl", "doctor", cwd=tmp_path, environment=environment)
    assert _run(clean / "bin/vswapd", "--version", cwd=tmp_path, environment=environment).startswith("vswapd ")
    assert (clean / "share/man/man1/vswapctl.1").exists()
