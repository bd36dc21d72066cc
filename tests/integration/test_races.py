# SPDX-License-Identifier: MIT
"""Races of the kernel's interface (the gate and the quarantine in csrc/client.h, csrc/fault.c, csrc/evict.c).

A client runs into one of them again and again (support/races.c), while the daemon is late at the moment that
matters. Each is run a second time with its guard taken out of the source: then it must go wrong, or the first run
shows nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from support.driving import SOURCES, build_drive
from support.limited import MIB

if TYPE_CHECKING:
    from pathlib import Path

_SECONDS_MAX = 120.0
_TRIES = 5  # without a guard a round may come out right all the same
_WRONG = (3, 99, -signal.SIGABRT, 128 + signal.SIGBUS)  # a wrong byte, a broken invariant, a page that is lost


@dataclass(frozen=True)
class Guard:
    """Lines of a file, and what stands there when they guard nothing."""

    name: str
    file: str
    replaced: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Race:
    """A scenario of races.c, how to run it, and what it is that keeps it from going wrong."""

    scenario: str
    rounds: int
    options: tuple[tuple[str, ...], ...]  # of drive: a run each
    guards: tuple[Guard, ...]

    def __str__(self) -> str:
        return self.scenario


_UNLOCK = "\tpthread_mutex_unlock(&client->gate);\n"
_LOCK = "\tpthread_mutex_lock(&client->gate);\n"
_COPY = (
    "\t*ret_outcome = sys_userfaultfd_copy(client->events_fd, address_of(page), pages, run->count * PAGE_BYTES, "
    "&done);\n"
)
_COPY_AGAIN = f"\tdo {{\n{_COPY}{_UNLOCK}\tsys_sleep_ms(1);\n{_LOCK}\t}} while (*ret_outcome == FILL_AGAIN);\n"
_ZERO = "\t\toutcome = sys_userfaultfd_zero(client->events_fd, address_of(fault->page), bytes, &done);\n"
_POST = '\t(void)fault_point("evict/post");\n'
_TORTURE = ("--torture", "--limit", str(64 * MIB))

_RACES = [
    # A MOVE after its pages were unmapped takes those of whatever was mapped there since.
    Race(
        "remap",
        100,
        ((*_TORTURE, "--delay", "evict/post:1:3:all"),),
        (Guard("gate", "evict.c", ((_POST, _UNLOCK + _POST + _LOCK),)),),
    ),
    # A COPY of what REMOVE has freed since it was decided on. The kernel says EAGAIN while that is unread: then what
    # was expanded is nothing any more.
    Race(
        "refill",
        30,
        (("--limit", str(4 * MIB), "--delay", "sys/copy:1:3:all"),),
        (
            Guard("gate", "fill.c", ((_COPY, _UNLOCK + _COPY + _LOCK),)),
            Guard("looked-up-again", "fill.c", ((_COPY, _COPY_AGAIN),)),
        ),
    ),
    # The same of a run that was expanded with the gate open: the event is read, and only the slots say so.
    Race(
        "open",
        20,
        (("--limit", str(4 * MIB), "--delay", "fill/open:1:3:all"),),
        (
            Guard(
                "compared",
                "fill_open.c",
                (
                    (
                        "\t       slot_is_equal(word, open->run.words[i]))\n\t\ti++;\n",
                        "\t       (slot_is_equal(word, open->run.words[i]) || true))\n\t\ti++;\n",
                    ),
                ),
            ),
        ),
    ),
    # Who faults on a page of such a run waits for its COPY, which may end before that.
    Race(
        "awaited",
        40,
        (("--limit", str(4 * MIB), "--delay", "fill/open:1:10:all"),),
        (Guard("woken", "fill_open.c", (("\tif (open->is_awaited)\n", "\tif (open->is_awaited && false)\n"),)),),
    ),
    # A MOVE between the event of a REMOVE and its zap captures what is freed.
    Race(
        "zap",
        30,
        (_TORTURE,),
        (Guard("quarantine", "evict.c", (("now - range->value < QUARANTINE_NS)", "now < range->value)"),)),),
    ),
    # ZEROPAGE of a run over a page that is moved out meanwhile.
    Race(
        "sparse",
        8,
        (("--torture", "--limit", str(1024 * MIB), "--delay", "sys/zero:1:2:all"),),
        (
            Guard(
                "gate",
                "fill.c",
                (
                    ("\tif (!zero_page)\n", _UNLOCK + "\tif (!zero_page)\n"),
                    (_ZERO, _ZERO + _LOCK),
                ),
            ),
        ),
    ),
    # Events that a daemon had read when it died are told to nobody again.
    Race(
        "freed",
        20,
        tuple((*_TORTURE, "--crash", f"EVENT_BEGUN:{call}") for call in (20, 100, 200, 300)),
        (Guard("replay", "fault.c", (("\t\tapply_events(client, i, i + 1);\n", ""),)),),
    ),
    # A fork that a daemon had begun with is begun again: what the first one put into the child is no sign of anything.
    Race(
        "wiped",
        6,
        tuple((*_TORTURE, "--crash", f"FORK_{point}:3") for point in ("SHARED", "COMPLETE")),
        (Guard("once", "fork.c", (("!parent->recovering && all_was_copied", "all_was_copied"),)),),
    ),
    # What the parent has unmapped since is in none of its mappings, where the advice would be seen.
    Race(
        "parted",
        10,
        ((*_TORTURE, "--delay", "sys/mapping:1:3:all"),),
        (Guard("unread", "fork.c", (("\t       !has_changed(parent, child->events_fd);\n", "\t       true;\n"),)),),
    ),
    # The same, and the daemon has read that it was unmapped together with the fork.
    Race(
        "beside",
        10,
        ((*_TORTURE, "--delay", "fault/read:1:5:all"),),
        (Guard("behind", "fork.c", (("\tif (is_changed_behind(parent, child_fd))\n\t\treturn true;\n", ""),)),),
    ),
    # A store into a slot that a forked relative has, too.
    Race(
        "fork",
        20,
        (_TORTURE,),
        (Guard("count", "slot_table.c", (("\tif (old->share == 1)\n", "\tif (old->share >= 1)\n"),)),),
    ),
]


def _run(drive: str, races: str, client_library: str, race: Race, options: tuple[str, ...]) -> tuple[int, str]:
    """(exit status, what was said)."""
    command = [drive, "--lib", client_library, *options, "--", races, race.scenario, str(race.rounds)]
    with tempfile.TemporaryFile() as told:  # no pipe: programs outlive a daemon that aborts, and wait for the next
        process = subprocess.Popen(command, stdout=told, stderr=told, start_new_session=True)
        try:
            status = process.wait(_SECONDS_MAX)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        told.seek(0)
        return status, f"{' '.join(command)}: status {status}\n{told.read()[-2000:].decode(errors='replace')}"


def _text_without(guard: Guard) -> str:
    """Its file without it."""
    text = (SOURCES / guard.file).read_text(encoding="utf-8")
    for lines, instead in guard.replaced:
        assert text.count(lines) == 1, f"{guard.file} has changed: {lines!r}"
        text = text.replace(lines, instead)
    return text


@pytest.mark.parametrize("race", _RACES, ids=str)
def test_race(drive: str, races: str, client_library: str, race: Race) -> None:
    """It comes about, and every byte is right."""
    for guard in race.guards:
        _text_without(guard)
    for options in race.options:
        status, told = _run(drive, races, client_library, race, options)
        assert status == 0, told
        if "--crash" in options:
            assert "drive: 1 deaths" in told
        assert "hits 0" not in told


_GUARDS = [
    pytest.param(race, guard, id=f"{race}-{guard.name}", marks=pytest.mark.full)
    for race in _RACES
    for guard in race.guards
]


@pytest.mark.parametrize(("race", "guard"), _GUARDS)
def test_race_without_its_guard(races: str, client_library: str, tmp_path: Path, race: Race, guard: Guard) -> None:
    """It goes wrong: a wrong byte, or bytes that are gone."""
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources)
    (sources / guard.file).write_text(_text_without(guard), encoding="utf-8")
    drive = build_drive(tmp_path / "drive", sources)
    for _ in range(_TRIES):
        for options in race.options:
            status, told = _run(drive, races, client_library, race, options)
            print(told)
            if status in _WRONG:
                return
    pytest.fail(f"without {guard.name} in {guard.file} nothing goes wrong")
