# SPDX-License-Identifier: MIT
"""doctor — `vswapctl doctor [PROGRAM]`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import sys

from vswapd import doctor, facts, terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from vswapd.doctor import Finding

_COLOURS = {doctor.OK: terminal.GREEN, doctor.NOTE: terminal.YELLOW, doctor.PROBLEM: terminal.RED}
_LEVEL_WIDTH = 9
_NAME_WIDTH = 13


def _show(finding: Finding) -> None:
    level = terminal.paint(finding.level, _COLOURS[finding.level], sys.stdout)
    padding = " " * (_LEVEL_WIDTH - len(finding.level))
    print(f"{level}{padding}{finding.name:{_NAME_WIDTH}}{finding.text}")
    if finding.remedy:
        print(f"{'':{_LEVEL_WIDTH + _NAME_WIDTH}}remedy: {finding.remedy}")


def main(options: argparse.Namespace) -> int:
    """`vswapctl doctor`."""
    findings = doctor.examine(facts.gather(options.program, options.socket))
    for finding in findings:
        _show(finding)
    count = sum(finding.level == doctor.PROBLEM for finding in findings)
    if count:
        print(f"\n{count} problem{'s' if count > 1 else ''}")
    else:
        print("\nno problem: vswapctl run works here")
    return 1 if count else 0
