# SPDX-License-Identifier: MIT
"""`python -m vswapd …` is `vswapctl …`: a way to the command where console scripts are not on the PATH."""

from __future__ import annotations

import sys

from vswapd.cli import main

if __name__ == "__main__":
    sys.exit(main())
