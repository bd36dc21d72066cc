# SPDX-License-Identifier: MIT
"""What test_systemd.py runs inside the sandbox: clients of the service, and deaths of it.

    service_deaths.py STATE VSWAPCTL VERIFY_MEMORY DAEMONS SUPERVISORS UPGRADES SECONDS

One line for each death: who died, and how many milliseconds it took until a daemon answered again; of an upgrade,
how long all of it took. Exit status 0 when every client verified all it had to its end, and the service stopped in
order.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.sampler import ControlClient, answering_pid

_SECONDS_MAX = 20.0


def _systemctl(*arguments: str) -> str:
    command = [*os.environ["SYSTEMCTL"].split(), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _main_pid() -> int:
    return int(_systemctl("show", "-P", "MainPID", "vswapd"))


def _replace(kind: str, vswapctl: str, socket_path: str) -> None:
    """Have a daemon, its supervisor or both replaced; until the next answers."""
    pid = answering_pid(socket_path, _SECONDS_MAX)
    if kind == "upgrade":
        before = _main_pid()
        subprocess.run([vswapctl, "upgrade", "--socket", socket_path], check=True, stdout=subprocess.DEVNULL)
        with ControlClient(socket_path, _SECONDS_MAX) as control:
            supervisor = int(control.request("ping", _SECONDS_MAX)["supervisor"])
        if supervisor == before or supervisor != _main_pid():
            sys.exit(f"the manager's main process is {_main_pid()}, the supervisor {supervisor}, before {before}")
        return
    os.kill(pid if kind == "daemon" else _main_pid(), signal.SIGKILL)
    answering_pid(socket_path, _SECONDS_MAX, dead=pid)


def main() -> int:
    """Entry point."""
    state, vswapctl, verify_memory = sys.argv[1:4]
    daemons, supervisors, upgrades, seconds = map(int, sys.argv[4:8])
    socket_path = f"{state}/vswapd.sock"
    generator = random.Random(daemons)
    _systemctl("start", "vswapd")
    clients = []
    for seed in range(4):
        argv = [vswapctl, "run", "--socket", socket_path, "--limit", "24M", "--", verify_memory]
        argv += ["--mib", "48", "--seconds", str(seconds), "--fork", "--seed", str(seed)]
        with Path(f"{state}/err.{seed}").open("wb") as errors:
            clients.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=errors))
    time.sleep(2)  # so that they swap
    kinds = ["daemon"] * daemons + ["supervisor"] * supervisors + ["upgrade"] * upgrades
    generator.shuffle(kinds)
    for kind in kinds:
        time.sleep(generator.uniform(0.0, 0.6))  # a random moment is what is tested
        started = time.monotonic()
        _replace(kind, vswapctl, socket_path)
        print(kind, int((time.monotonic() - started) * 1000), flush=True)
    statuses = [client.wait() for client in clients]
    _systemctl("stop", "vswapd")
    return 0 if statuses == [0] * 4 else 92


if __name__ == "__main__":
    sys.exit(main())
