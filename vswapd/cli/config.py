# SPDX-License-Identifier: MIT
"""config — `vswapctl config check|show|example [FILE]`: vswapd.conf, without asking a daemon."""

from __future__ import annotations

import sys

from vswapd import settings
from vswapd.failure import STATUS_USAGE, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def main(options: argparse.Namespace) -> int:
    """`vswapctl config`."""
    if options.action == "example":
        if options.file is not None:
            raise Failure("config example takes no FILE", "write it with > FILE", STATUS_USAGE)
        sys.stdout.write(settings.format_example())
        return 0
    try:
        loaded = settings.load(options.file)
    except settings.SettingsError as error:
        for mistake in error.mistakes:
            print(mistake, file=sys.stderr)
        return 1
    if options.action == "show":
        sys.stdout.write(settings.format_settings(loaded))
    else:
        print(f"{options.file or settings.DEFAULT_PATH} and its drop-ins: no mistake")
    return 0
