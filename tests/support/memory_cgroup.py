# SPDX-License-Identifier: MIT
"""memory_cgroup — a machine that is short of memory: a memory cgroup of the test's own, with a limit.

What is started inside of it by `command` is all there is of it, and ends with it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from benchmarks.cgroup import Cgroup, find_hierarchy
from benchmarks.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def memory_cgroup(directory: Path, name: str, limit_bytes: int) -> Iterator[Cgroup]:
    """One that is there until the block ends. `directory`: for the journal of what is to be undone."""
    with Journal(str(directory / f"{name}.journal")) as journal:
        cgroup = Cgroup(find_hierarchy(), journal, name)
        cgroup.set_limit(limit_bytes)
        yield cgroup
