# SPDX-License-Identifier: MIT
"""shelf — where a private daemon keeps the memory that it does not use (csrc/shelve.h).

What Python and trio take is most of what such a daemon costs, and hardly any of it is touched once it has started. So
it goes to an unlinked file, of which the page cache holds what is used. Not with --no-spill, which promises no disk.
"""

from __future__ import annotations

import os

from vswapd import config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _shelve(shelve: Callable[[int], int]) -> int:
    directory = os.environ.get("VSWAPD_SPILL_DIR") or config.SPILL_DIRECTORY
    try:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return -1
    try:
        shelve(descriptor)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def shelve_idle_memory() -> int:
    """For a process with one thread that has loaded what it needs. The file's descriptor; -1: nice to have, but there is
    no place for it.
    """
    from vswapd import engine

    return _shelve(engine.shelve_memory)


def wait(descriptors: Sequence[int]) -> None:
    """Until one is readable or a signal has come, with next to nothing mapped: this process has one thread."""
    from vswapd import engine

    engine.wait_shelved(descriptors)


async def page_out(descriptor: int) -> None:
    """Have what was shelved leave RAM: in a daemon that has started, and was forked with it in that file. A process with
    threads cannot unmap it, as one may be writing to it.
    """
    import trio

    from vswapd import engine

    own = -1  # the file of what the start has written to
    for _ in range(config.SHELVE_WRITES):
        own = own if own >= 0 else _shelve(engine.shelve_again)  # not while a thread is at work
        for some in (descriptor, own):
            if some >= 0:
                await trio.to_thread.run_sync(engine.page_out_shelved, some, abandon_on_cancel=True)
        await trio.sleep(config.SHELVE_WRITE_SECONDS)
    if own >= 0:
        os.close(own)
