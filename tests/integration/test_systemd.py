# SPDX-License-Identifier: MIT
"""The service under a real systemd: the daemon dies, the supervisor dies, and its clients go on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support.limited import command_path

_SUPPORT = Path(__file__).parent.parent / "support"
_UNIT = Path(__file__).parent.parent.parent / "systemd" / "vswapd.service"

_PING = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(5)
    sock.connect(sys.argv[1])
    sock.sendall(b'{"op": "ping"}\\n')
    print(json.loads(sock.makefile().readline())["pid"])
"""

# In the sandbox: $1 state directory, $2 vswapctl, $3 verify_memory, $4 deaths of the daemon, $5 of the
# supervisor, $6 seconds that the clients run, $7 _PING.
_SCRIPT = """
set -u
state=$1 vswapctl=$2 verify=$3 ping=$7
$SYSTEMCTL start vswapd || { $SYSTEMCTL status vswapd; exit 90; }
pids=
for seed in 1 2 3 4; do
	"$vswapctl" run --socket "$state/vswapd.sock" --limit 24M -- \
		"$verify" --mib 48 --seconds "$6" --fork --seed $seed >"$state/out.$seed" 2>"$state/err.$seed" &
	pids="$pids $!"
done
main() { $SYSTEMCTL show -P MainPID vswapd; }
answers() { # until the daemon that answers is not $1, which is printed
	for _ in $(seq 400); do
		pid=$(python3 -c "$ping" "$state/vswapd.sock" 2>/dev/null)
		[ -n "$pid" ] && [ "$pid" != "$1" ] && { echo "$pid"; return; }
		sleep 0.02
	done
	exit 91
}
pid=$(answers 0) || exit 91
sleep 2
for kind in $(printf 'daemon %.0s' $(seq "$4")) $(printf 'supervisor %.0s' $(seq "$5")); do
	sleep "0.$((RANDOM % 4))"
	started=$(date +%s%N)
	[ $kind = daemon ] && kill -9 "$pid" || kill -9 "$(main)"
	pid=$(answers "$pid") || exit 91
	echo "$kind $((($(date +%s%N) - started) / 1000000))"
done
status=0
for client in $pids; do wait "$client" || status=92; done
"$vswapctl" status --socket "$state/vswapd.sock" --json >"$state/status.json" || status=93
$SYSTEMCTL stop vswapd || status=94
exit $status
"""


def _unit(directory: Path, state: Path) -> None:
    text = _UNIT.read_text(encoding="utf-8")
    command = f"{command_path('vswapd')} --socket {state}/vswapd.sock --spill {state}/spill:1G"
    assert "ExecStart=/usr/bin/vswapd\n" in text
    (directory / "vswapd.service").write_text(
        text.replace("ExecStart=/usr/bin/vswapd\n", f"ExecStart={command}\n"), encoding="utf-8"
    )


@pytest.mark.parametrize(("daemons", "supervisors"), [(6, 2), pytest.param(50, 10, marks=pytest.mark.full)])
def test_daemon_and_supervisor_die(verify_memory: str, tmp_path: Path, daemons: int, supervisors: int) -> None:
    """Four clients verify what they have, through all of it."""
    units, state = tmp_path / "units", tmp_path / "state"
    units.mkdir()
    state.mkdir()
    _unit(units, state)
    program = shutil.copy(verify_memory, state)  # the sandbox has a /tmp of its own
    seconds = 8 + (daemons + supervisors) * 3 // 2
    result = subprocess.run(
        [
            str(_SUPPORT / "systemd-sandbox"),
            *("--units", str(units), "--state", str(state), "--timeout", str(seconds * 4 + 60), "--"),
            *("bash", "-c", _SCRIPT, "script", str(state), command_path("vswapctl"), program),
            *(str(daemons), str(supervisors), str(seconds), _PING),
        ],
        capture_output=True,
        check=False,
        text=True,
    )
    told = "".join(path.read_text(errors="replace") for path in sorted(state.glob("err.*")))
    log = (state / "systemd.log").read_text(errors="replace")[-4000:]
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{told}\n{log}"
    pauses = {kind: _pauses(result.stdout, kind) for kind in ("daemon", "supervisor")}
    assert (len(pauses["daemon"]), len(pauses["supervisor"])) == (daemons, supervisors)
    for kind, ms in pauses.items():
        print(f"{kind}: {len(ms)} deaths, pause p50 {ms[len(ms) // 2]} ms, longest {ms[-1]} ms")


def _pauses(output: str, kind: str) -> list[int]:
    return sorted(int(line.split()[1]) for line in output.splitlines() if line.startswith(f"{kind} "))


def test_unit_is_sound(tmp_path: Path) -> None:
    """As the manager reads it."""
    unit = tmp_path / "vswapd.service"
    text = _UNIT.read_text(encoding="utf-8")
    # Before systemd 254 the descriptor store is preserved over restarts anyway.
    text = text.replace("FileDescriptorStorePreserve=yes\n", "")
    unit.write_text(text.replace("/usr/bin/vswapd", command_path("vswapd")), encoding="utf-8")
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, check=False, text=True
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
