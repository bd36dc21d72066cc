# SPDX-License-Identifier: MIT
"""`fake_vswapctl.py ctl|daemon ARGUMENT…`: vswapctl or vswapd over the fake engine, without root."""

from __future__ import annotations

import sys
from pathlib import Path

_SUPPORT = Path(__file__).resolve().parent
sys.path[:0] = [str(_SUPPORT.parents[1]), str(_SUPPORT.parent)]  # the source tree, and `support`
del sys.path[2]  # this directory: its modules are support.…

import vswapd  # noqa: E402
from vswapd import machine  # noqa: E402

vswapd.__path__.insert(0, str(_SUPPORT / "fake_package"))
machine.check_all = lambda: None

if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    if program == "daemon":
        from vswapd import daemon

        sys.exit(daemon.main(arguments))
    from vswapd import cli

    sys.exit(cli.main(arguments))
