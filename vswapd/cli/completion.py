# SPDX-License-Identifier: MIT
"""completion — `vswapctl completion bash|zsh`: a script for the shell, made from the parser itself."""

from __future__ import annotations

import sys

from vswapd import cli

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

_FILES = ("FILE", "PATH", "PATH[:SIZE]", "PROGRAM")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # noqa: SLF001 -- argparse lists them nowhere else, and shtab looks there too
        yield action
        if isinstance(action.choices, dict):
            for below in action.choices.values():
                yield from _actions(below)


def main(options: argparse.Namespace) -> int:
    """`vswapctl completion`."""
    import shtab

    parser = cli.make_parser()
    for action in _actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    sys.stdout.write(shtab.complete(parser, shell=options.shell) + "\n")
    return 0
