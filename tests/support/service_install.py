# SPDX-License-Identifier: MIT
"""What test_systemd.py runs inside the sandbox: `vswapctl install-service`, as on a machine of one's own.

    service_install.py STATE VSWAPCTL UNITS

Here /etc, /usr/local and /var/lib can be written to, and what is written is gone with the sandbox. One line for each
thing that was seen to be so. Exit status 0 when all was.
"""

from __future__ import annotations

import grp
import os
import stat
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_UNITS = "/usr/local/lib/systemd/system"
_DEVICE = Path("/dev/userfaultfd")
_PROGRAM = "memory = bytearray(96 << 20); memory[::4096] = b'x' * (96 << 8); print(memory.count(b'x'))"


def _sh(text: str) -> str:
    result = subprocess.run(["sh", "-ec", text], check=False, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{text}: status {result.returncode}: {result.stdout}{result.stderr}")
    return result.stdout


def _say(text: str) -> None:
    print(text, flush=True)


def _prepare(units: str) -> None:
    """Directories of our own; the manager, which is a user's, reads the units there and is asked as the system's."""
    for place in ("/etc", "/usr/local", "/var/lib"):
        layers = f"/run/layers{place}"
        _sh(f"mkdir -p {layers}/upper {layers}/work")
        options = f"lowerdir={place},upperdir={layers}/upper,workdir={layers}/work"
        _sh(f"mount -t overlay -o {options} overlay {place}")
    _sh(f"mkdir -p {_UNITS} && mount --bind {_UNITS} {units}")
    _sh("mkdir /run/bin && printf '#!/bin/sh\\nexec /usr/bin/systemctl --user \"$@\"\\n' > /run/bin/systemctl")
    _sh("chmod 755 /run/bin/systemctl")
    os.environ["PATH"] = f"/run/bin:{os.environ['PATH']}"


def _check_installed(vswapctl: str) -> None:
    said = _sh(f"{vswapctl} install-service")
    for command in ("systemd-sysusers vswapd.conf", "systemd-tmpfiles --create vswapd.conf", "systemctl daemon-reload"):
        if f"ran {command}\n" not in said:
            sys.exit(f"it did not run {command}:\n{said}")
    state = _sh("systemctl is-active vswapd.service vswapd.socket")
    if state.split() != ["active", "active"]:
        sys.exit(f"not running: {state}")
    wanted = {path.name for path in Path.home().glob(".config/systemd/user/*.wants/*")}
    if wanted != {"vswapd.service", "vswapd.socket"}:
        sys.exit(f"not enabled: {wanted}")
    _say("running")


def _check_entries() -> None:
    """What sysusers.d and tmpfiles.d have made."""
    group = grp.getgrnam("vswap").gr_gid
    for path, mode, owner in (("/run/vswapd", 0o755, group), ("/var/lib/vswapd", 0o700, 0)):
        found = os.stat(path)
        if (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) != (mode, 0, owner):
            sys.exit(f"{path}: {found}")
    _say("entries")


def _check_rule() -> None:
    """What udev makes of the device, on a node that is the sandbox's own."""
    number = _DEVICE.stat().st_rdev
    _sh(f"umount -l {_DEVICE} && rm -f {_DEVICE}")
    os.mknod(_DEVICE, stat.S_IFCHR | 0o600, number)
    said = _sh("udevadm test /sys/class/misc/userfaultfd 2>&1")
    found = _DEVICE.stat()
    if (stat.S_IMODE(found.st_mode), found.st_gid) != (0o660, grp.getgrnam("vswap").gr_gid):
        sys.exit(f"{found}:\n{said}")
    _say("rule")


def _check_use(vswapctl: str) -> None:
    """A program under it, with no option but the limit."""
    answer = _sh(f'{vswapctl} run --limit 64M -- {sys.executable} -c "{_PROGRAM}"')
    if answer != f"{96 << 8}\n":
        sys.exit(f"it answered {answer}")
    if "answers on /run/vswapd/vswapd.sock" not in _sh(f"{vswapctl} doctor"):
        sys.exit("the doctor does not see it")
    _say("use")


def _check_again(vswapctl: str) -> None:
    """Nothing to do for the files; and all gone at the end."""
    if "wrote" in _sh(f"{vswapctl} install-service"):
        sys.exit("it wrote again")
    _sh(f"{vswapctl} install-service --uninstall")
    if [path for path in Path(_UNITS).glob("vswapd*") if path.is_file()]:
        sys.exit("units are left")
    _sh("systemctl stop vswapd.socket vswapd.service; systemctl daemon-reload")
    if subprocess.run(["systemctl", "cat", "vswapd"], check=False, capture_output=True).returncode == 0:
        sys.exit("the manager knows it still")
    _say("uninstalled")


def main() -> int:
    """Entry point."""
    _, vswapctl, units = sys.argv[1:4]
    _prepare(units)
    _check_installed(vswapctl)
    _check_entries()
    _check_use(vswapctl)
    _check_rule()
    _check_again(vswapctl)
    return 0


if __name__ == "__main__":
    sys.exit(main())
