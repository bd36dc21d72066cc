# SPDX-License-Identifier: MIT
"""install-service — `vswapctl install-service`: what systemd needs, put where systemd looks for it.

Under /usr/local, so that /etc stays the administrator's: `systemctl edit vswapd` makes drop-ins there. The last line of
each file has a checksum of what is above it. So a file that still is as it was installed, by whatever version, is
replaced, and one that somebody changed is not. Everything is looked at before anything is written.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import sysconfig
from dataclasses import dataclass

from vswapd import settings, whole_file
from vswapd.failure import Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

_UNITS = "usr/local/lib/systemd/system"
_PLACES = {
    "vswapd.service": f"{_UNITS}/vswapd.service",
    "vswapd.socket": f"{_UNITS}/vswapd.socket",
    "vswapd-metrics.socket": f"{_UNITS}/vswapd-metrics.socket",
    "vswapd.slice": f"{_UNITS}/vswapd.slice",
    "vswapd.sysusers": "usr/local/lib/sysusers.d/vswapd.conf",
    "vswapd.tmpfiles": "usr/local/lib/tmpfiles.d/vswapd.conf",
    "vswapd.rules": "etc/udev/rules.d/70-vswapd.rules",
}
_SEAL = "# As installed by vswapctl install-service: "
_INSTALLED = """\
Now, and after each update:
  systemd-sysusers && systemd-tmpfiles --create vswapd.conf && udevadm control --reload
  systemctl daemon-reload && systemctl enable --now vswapd.socket vswapd.service
A service that runs goes on with the old version until: vswapctl upgrade"""
_UNINSTALLED = "Now: systemctl disable --now vswapd.socket vswapd.service; systemctl daemon-reload"


@dataclass(frozen=True)
class _File:
    path: str
    text: str  # as it is to be
    found: str | None
    is_ours: bool  # to be replaced or removed: nobody has changed it


def _seal(text: str) -> str:
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()[:16]}\n"


def _is_sealed(text: str) -> bool:
    above, mark, _ = text.rpartition(_SEAL)
    return bool(mark) and text == _seal(above)


def _commands() -> str:
    """Where vswapd and vswapctl are, as a unit says it. Failure."""
    candidates = [os.path.dirname(os.path.abspath(sys.argv[0])), sysconfig.get_path("scripts")]
    for directory in candidates:
        if os.access(f"{directory}/vswapd", os.X_OK):
            if not re.fullmatch(r"[\w./+@:,=-]+", directory):
                raise Failure(f"{directory} cannot stand in a unit", "install vswapd where no name needs quotes")
            return directory
    raise Failure(f"no vswapd in {' or '.join(candidates)}", "install vswapd again")


def _texts() -> Iterator[tuple[str, str]]:
    """(path below the root, text) of every file."""
    from importlib import resources

    directory = _commands()
    for name, place in _PLACES.items():
        text = resources.files("vswapd").joinpath("systemd", name).read_text(encoding="utf-8")
        yield place, text.replace("/usr/bin/vswap", f"{directory}/vswap")
    yield settings.DEFAULT_PATH.lstrip("/"), settings.format_example()


def _look(root: str) -> list[_File]:
    files = []
    for place, text in _texts():
        path = os.path.join(root, place)
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                found: str | None = file.read()
        except FileNotFoundError:
            found = None
        files.append(_File(path, _seal(text), found, found is not None and _is_sealed(found)))
    return files


def _is_configuration(file: _File) -> bool:
    return file.path.endswith(settings.DEFAULT_PATH)


def _write(file: _File) -> None:
    os.makedirs(os.path.dirname(file.path), 0o755, exist_ok=True)
    whole_file.write(file.path, file.text, 0o644)


def _install(files: list[_File], dry_run: bool) -> None:
    changed = [file for file in files if file.found is not None and not file.is_ours]
    refused = [file.path for file in changed if not _is_configuration(file)]
    if refused:
        raise Failure(
            f"changed since they were installed: {', '.join(refused)}; nothing is installed",
            "move the changes to a drop-in (systemctl edit vswapd) or a file of your own in /etc, remove these, repeat",
        )
    for file in files:
        if file in changed:
            print(f"kept {file.path}: it is yours")
        elif file.found == file.text:
            print(f"unchanged {file.path}")
        else:
            if not dry_run:
                _write(file)
            print(f"{'would write' if dry_run else 'wrote'} {file.path}")


def _uninstall(files: list[_File], dry_run: bool) -> None:
    for file in files:
        if file.is_ours:
            if not dry_run:
                os.unlink(file.path)
            print(f"{'would remove' if dry_run else 'removed'} {file.path}")
        elif file.found is not None:
            print(f"kept {file.path}: it is yours")


def main(options: argparse.Namespace) -> int:
    """`vswapctl install-service`."""
    try:
        files = _look(options.root)
        (_uninstall if options.uninstall else _install)(files, options.dry_run)
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}", "run vswapctl as root, or name another --root") from None
    if not options.dry_run:
        print(_UNINSTALLED if options.uninstall else _INSTALLED)
    return 0
