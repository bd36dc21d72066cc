# SPDX-License-Identifier: MIT
"""What a limit would cost, from what was touched; and the kernel's figures of a real process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vswapd import cli
from vswapd.config import MIB, PAGE_BYTES
from vswapd.working_set import Cost, Look, cost, parse_smaps

_SMAPS = """\
00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/program
Rss:                 320 kB
Referenced:          320 kB
00e03000-00e24000 rw-p 00000000 00:00 0 [heap]
Rss:                 100 kB
Referenced:           40 kB
AnonHugePages:         0 kB
VmFlags: rd wr mr mw me ac
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
Rss:                8192 kB
Referenced:         2048 kB
AnonHugePages:      2048 kB
7f0001000000-7f0001800000 rw-s 00000000 00:01 0 /dev/zero (deleted)
Rss:                8192 kB
Referenced:         8192 kB
7f0002000000-7f0002800000 rw-p 00000000 08:02 99 /lib/library.so
Rss:                8192 kB
Referenced:         8192 kB
"""


def test_private_anonymous_mappings_are_counted() -> None:
    assert parse_smaps(_SMAPS.splitlines(), 1.5) == Look(1.5, (100 + 8192) << 10, (40 + 2048) << 10, 2048 << 10)


_LOOKS = [Look(1.0, 100 * MIB, 40 * MIB, 0), Look(2.0, 100 * MIB, 50 * MIB, 0), Look(4.0, 100 * MIB, 49 * MIB, 0)]


@pytest.mark.parametrize(
    ("room_mib", "out_mib", "mib_per_second", "is_bound"),
    [
        (200, 0, 0, False),
        (100, 0, 0, False),
        (60, 40, 0, False),  # nobody wanted these
        (50, 50, 0, False),
        (45, 55, 10, False),  # what came in from the first to the second second
        (40, 60, 10, False),
        (39, 61, 40, True),  # all of these were touched within the first: again and again, maybe
        (0, 100, 40, True),
    ],
)
def test_cost_is_the_growth_of_the_working_set(
    room_mib: int, out_mib: int, mib_per_second: float, is_bound: bool
) -> None:
    pages_per_second = mib_per_second * MIB / PAGE_BYTES
    assert cost(_LOOKS, room_mib * MIB) == Cost(room_mib * MIB, out_mib * MIB, pages_per_second, is_bound)


_PROGRAM = f"""
import mmap, sys
memory = mmap.mmap(-1, {64 * MIB}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
page = b"x" * {PAGE_BYTES}
for start in range(0, {64 * MIB}, {PAGE_BYTES}):
    memory[start:start + {PAGE_BYTES}] = page
print("ready", flush=True)
while True:
    for start in range(0, {16 * MIB}, {PAGE_BYTES}):
        memory[start]
"""


@pytest.mark.parametrize("as_json", [True, False])
def test_report_of_a_real_process(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    """It holds 64 MiB, and goes over a quarter of it all the time."""
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            options = ["--json"] * as_json + ["--seconds", "2", "--room", "48M", "--room", "8M"]
            assert cli.main(["report", *options, str(process.pid)]) == 0
        finally:
            process.kill()
    out = capsys.readouterr().out
    if not as_json:
        assert out.startswith(f"process {process.pid} (python")
        assert "> " in out.splitlines()[-1]
        return
    document = json.loads(out)
    first, last = document["looks"]
    # Not quite 16: a page whose translation a CPU still had is not marked again.
    assert all(8 * MIB <= item["touched_bytes"] <= 32 * MIB for item in (first, last))
    assert last["resident_bytes"] >= 64 * MIB
    enough, little = document["costs"]
    assert (enough["pages_per_second"], enough["is_bound"]) == (0, False)
    assert little["pages_per_second"] > 0
    assert little["is_bound"]


def test_report_of_a_process_that_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert cli.main(["report", str(process.pid)]) == 1
    assert capsys.readouterr().err == (
        f"vswapctl: no process {process.pid}, or it has ended; give the PID of a running process\n"
    )
