# SPDX-License-Identifier: MIT
"""Pages move between backends of different priority by themselves, while a program uses them."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from support.limited import MIB, command_path, python_argv
from support.service import Service, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FAST_MIB = 24
_FILL = f"""
import mmap, random
memory = mmap.mmap(-1, {60 * MIB}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(memory), 4096):
    memory[at : at + 4096] = random.randbytes(4096)
print("filled", flush=True)
"""
_READER = f"""{_FILL}
while True:
    memory[random.randrange(0, len(memory), 4096)]
"""
# One page of eight, always in the same order: between two visits others are waited for as often as there are such pages, and far
# more pages go out than the group's limit has.
_VISITOR = f"""{_FILL}
visits = list(range(0, len(memory), 8 * 4096))
random.shuffle(visits)
while True:
    for at in visits:
        memory[at]
"""


def _write(service: Service, *, tiers: bool, fast: str = "") -> None:
    """The configuration, with `fast` in the table of that backend."""
    directory = service.conf.parent
    service.conf.write_text(
        f'[daemon]\nsocket = "{service.socket_path}"\ntiers = {str(tiers).lower()}\n'
        f'[[backend]]\npath = "{directory}/fast"\nsize = "{_FAST_MIB}M"\npriority = 10\n{fast}'
        f'[[backend]]\npath = "{directory}/slow"\nsize = "512M"\n'
        '[[group]]\nname = "tiered"\nlimit = "24M"\npool = "4M"\n',
        encoding="utf-8",
    )


def _counters(service: Service) -> dict[str, Any]:
    counters: dict[str, Any] = service.status()["counters"]
    return counters


def _backend(service: Service, name: str) -> dict[str, Any]:
    return next(entry for entry in service.status()["backends"] if entry["path"].endswith(name))


@contextmanager
def _verified(service: Service, verify_memory: str) -> Iterator[None]:
    """A program that reads and changes four times its limit at random, and finds every byte right at the end."""
    argv = [command_path("vswapctl"), "run", "--socket", service.socket_path, "--group", "tiered", "--"]
    argv += [verify_memory, "--mib", "96", "--kind", "random", "--order", "random", "--seconds", "20"]
    service.start()
    try:
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as run:
            try:
                yield
                output, _ = run.communicate(timeout=90)
            finally:
                run.terminate()
        assert run.returncode == 0
        assert json.loads(output)["wrong_pages"] == 0
        assert _counters(service)["check_failures"] == 0
    finally:
        status = service.stop()
    assert status == 0, service.log.read_text()


@contextmanager
def _used(tmp_path: Path, program_text: str) -> Iterator[Service]:
    """A service with tiers, and a program in Python that has filled its memory and goes on using it."""
    service = Service(tmp_path)
    _write(service, tiers=True)
    service.start()
    argv = [command_path("vswapctl"), "run", "--socket", service.socket_path, "--group", "tiered", "--"]
    with subprocess.Popen([*argv, *python_argv(program_text)], stdout=subprocess.PIPE) as run:
        try:
            assert run.stdout
            assert run.stdout.readline() == b"filled\n"
            yield service
        finally:
            run.terminate()
    assert service.stop() == 0, service.log.read_text()


def test_pages_move_between_tiers_and_no_more_when_told(verify_memory: str, tmp_path: Path) -> None:
    """Down when the fast one is nearly full, up when they are waited for."""
    service = Service(tmp_path)
    _write(service, tiers=False)
    with _verified(service, verify_memory):
        wait_until("the slow one is in use", lambda: _backend(service, "slow")["live_bytes"] > 16 * MIB)
        before = _counters(service)
        assert before["demoted_pages"] == before["promoted_pages"] == 0
        _write(service, tiers=True)
        service.reload()
        wait_until("pages went down", lambda: _counters(service)["demoted_pages"] > 1000)
        wait_until("pages went up", lambda: _counters(service)["promoted_pages"] > 1000)
        assert _backend(service, "fast")["live_bytes"] > MIB
        shown = [command_path("vswapctl"), "status", "--socket", service.socket_path]
        assert "Tiers: " in subprocess.run(shown, capture_output=True, check=True, text=True).stdout
        _write(service, tiers=False)
        service.reload()
        wait_until("a turn has ended", lambda: _is_still(service))


def test_what_is_waited_for_again_goes_up(tmp_path: Path) -> None:
    """Though it went out long ago: for fewer others than the fast backend has pages somebody has waited since."""
    with _used(tmp_path, _VISITOR) as service:
        wait_until("pages went up", lambda: _counters(service)["promoted_pages"] > 200)


def test_what_is_encrypted_stays_so(verify_memory: str, tmp_path: Path) -> None:
    """Nothing goes down from an encrypted backend to one that is not."""
    service = Service(tmp_path)
    _write(service, tiers=True, fast="encrypt = true\n")
    with _verified(service, verify_memory):
        wait_until("the slow one is in use", lambda: _backend(service, "slow")["written_bytes"] > 48 * MIB)
        assert _backend(service, "fast")["used_bytes"] > _FAST_MIB * MIB // 2
        assert _counters(service)["demoted_pages"] == 0


def test_what_is_only_read_is_not_written_again(tmp_path: Path) -> None:
    """Copies stay on a fast backend that is always nearly full; demotion gives them up before it moves anything."""
    with _used(tmp_path, _READER) as service:
        before = _counters(service)
        wait_until(
            "pages were read", lambda: _counters(service)["spill_read_pages"] > before["spill_read_pages"] + 40000
        )
        after = _counters(service)
    names = ("spill_read_pages", "spill_written_pages", "promoted_pages")
    read, written, promoted = (after[name] - before[name] for name in names)
    told = f"{written} written, {promoted} of them on their way up, {read} read"
    assert written - promoted < read / 7, told


def _is_still(service: Service) -> bool:
    """Nothing is moved any more, while pages are written and read."""
    before = _counters(service)
    while (after := _counters(service))["spill_read_pages"] < before["spill_read_pages"] + 500:
        time.sleep(0.02)  # polling another process's state
    return all(before[name] == after[name] for name in ("demoted_pages", "promoted_pages"))
