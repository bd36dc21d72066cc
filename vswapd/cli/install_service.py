# SPDX-License-Identifier: MIT
"""install-service — `vswapctl install-service`: what systemd needs, put where systemd looks for it, and started.

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

from vswapd import paths, settings, whole_file
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
_START = (
    "systemd-sysusers vswapd.conf",
    "systemd-tmpfiles --create vswapd.conf",
    "udevadm control --reload",
    "udevadm trigger --action=change --name-match=userfaultfd",
    "systemctl daemon-reload",
    "systemctl enable --now vswapd.socket vswapd.service",
)
_DISABLE = "systemctl disable vswapd.socket vswapd-metrics.socket vswapd.service"
_STARTED = """\
vswapd runs: systemctl status vswapd, vswapctl status
One that ran before goes on with the old version until: vswapctl upgrade"""
_UNINSTALLED = "One that runs goes on until: systemctl stop vswapd.socket vswapd.service; then systemctl daemon-reload"


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
    paths.make_public_directory(os.path.dirname(file.path))
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


# ---- the manager ----


def _runs_systemd(root: str) -> bool:
    """Whether what is below `root` is what this machine's manager reads."""
    return os.path.realpath(root) == "/" and os.path.isdir("/run/systemd/system")


def _run(command: str) -> None:
    """Failure."""
    import subprocess

    try:
        result = subprocess.run(command.split(), check=False, capture_output=True, text=True)
    except OSError as error:
        said, failed = error.strerror or str(error), True
    else:
        said, failed = result.stderr.strip(), result.returncode != 0
    if not failed:
        print(f"ran {command}")
    elif command.startswith("udevadm "):  # in a container nobody listens; the service works all the same
        print(f"no effect: {command}: {said.splitlines()[-1] if said else 'it failed'}")
    else:
        text = f"{command}: {' '.join(said.split()) or 'it failed'}"
        raise Failure(text, "all files are in place; mend that (journalctl -u vswapd), then repeat")


def _start(options: argparse.Namespace) -> None:
    if options.no_start or not _runs_systemd(options.root):
        print("Nothing is started. To start it, and after each update:")
        print(*(f"  {command}" for command in _START), sep="\n")
        return
    for command in _START:
        _run(command)
    print(_STARTED)


def main(options: argparse.Namespace) -> int:
    """`vswapctl install-service`."""
    try:
        files = _look(options.root)
        if options.uninstall and not options.dry_run and _runs_systemd(options.root):
            _run(_DISABLE)  # it goes by what stands in the files
        (_uninstall if options.uninstall else _install)(files, options.dry_run)
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}", "run vswapctl as root, or name another --root") from None
    if options.uninstall and not options.dry_run:
        print(_UNINSTALLED)
    elif not options.dry_run:
        _start(options)
    return 0
