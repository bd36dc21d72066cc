# SPDX-License-Identifier: MIT
"""config — defaults and bounds of the control plane, units in the names.

Bounds of the data plane live in csrc/limits.h and are not repeated here. Constants only: vswapctl
imports this on every start.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_BYTES = 4096

KERNEL_MIN = (6, 12)  # 6.8 to 6.11 have UFFDIO_MOVE, but lose pages in it

# ---- groups ----

LIMIT_BYTES_MIN = 16 * MIB  # below this the command's own start-up does not fit
LIMIT_BYTES_MAX = 1 << 46  # half of the address space: a figure beyond is a mistake
LIMIT_AVAILABLE_SHARE = 0.8  # default limit: this share of the available RAM
GROUP_NAME_CHARACTERS_MAX = 31
SELF_TEST_GROUP = "self-test"
GROUPS_PER_UID_MAX = 64  # of one unprivileged user

REGIONS_PER_UID_MAX = 64
REGION_WORKERS = 4  # threads that read and write regions

# ---- agents (environment of the command; wire.h) ----

MIN_BYTES = 16 * MIB  # smallest process worth managing
MIN_BYTES_TORTURE = 1 * MIB
MIN_LIMIT_SHARE = 1 / 8  # ... but no more than this share of the limit
FILL_BYTES_PER_SECOND = 4_000_000_000  # how fast a process can touch memory between two looks
LOOK_LIMIT_SHARE = 1 / 4  # a process may touch this share of its limit between two looks
LOOK_US_MIN = 1_000
LOOK_US_MAX = 20_000

ACCEPT_PERCENT = 90  # of a pool's cap: writeback that has begun brings it down to that
RATE_BYTES_MIN = 1 * MIB  # a second, of writeback to one backend: a segment
RECOMPRESS_AGE_SECONDS = 30  # pages that were out for so long are compressed again
HOST_RESERVE_AUTO = (1 << 64) - 1  # csrc/engine.h

# ---- spill ----

SPILL_DIRECTORY = "/var/tmp"
SPILL_FREE_SHARE = 0.8  # of the file system's free space
SPILL_LIMIT_FACTOR = 4  # of the larger of limit and RAM
SPILL_BYTES_MIN = 1 * MIB  # one segment
RAM_FILE_SYSTEMS = ("tmpfs", "ramfs")
BACKENDS_MAX = 15  # csrc/limits.h
PRIORITY_MAX = 32767  # as swapon(2)
PROGRESS_SECONDS = 0.2  # between two notices of how far a swapoff is

# ---- socket ----

CONNECTIONS_MAX = 8192
CONNECTIONS_PER_UID_MAX = 2048  # of one unprivileged user
LISTEN_BACKLOG = 4096
ACCEPT_PAUSE_SECONDS = 0.1
HANDSHAKE_SECONDS_MAX = 10.0  # for each message of a handshake
REQUEST_BYTES_MAX = 64 * KIB
REPLY_BYTES_MAX = 64 * MIB  # 4096 clients with everything about them take 2 MiB
SEND_SECONDS_MAX = 30.0
NOTICES_QUEUED_MAX = 64

# ---- groups ----

DOOMED_SECONDS = 0.5  # between two attempts to destroy one
MEMBERS_MAX = 65536
PSS_FROM_BYTES = 1 * MIB  # smaller processes are counted by RSS: cheaper, and the error is small

# ---- command ----

SHELVE_AFTER_SECONDS = 1.0  # of a command: a short one does not pay for shelf.py
SHELVE_WRITE_SECONDS = 0.3  # until some MiB are on the disk
SHELVE_WRITES = 4  # the disk may be busy with what is swapped
LINGER_SECONDS = 2.0  # before `run` says that it still serves processes
PAGE_TIMEOUT_MS = 60_000
PAGE_TIMEOUT_MS_MAX = 3_600_000
STORE_SECONDS = 0.1  # between two looks at what the manager is to keep
DAEMON_START_SECONDS_MAX = 30.0
DAEMON_STOP_SECONDS_MAX = 10.0
TASK_RESTART_SECONDS = 1.0  # after a task of the daemon failed
