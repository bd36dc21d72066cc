# SPDX-License-Identifier: MIT
"""Rows of the operation table without the code that they guard: each must fail then, or it shows nothing.

The package is copied, its extension and its client library are built from sources in which some lines are
missing, and the rows are run with that, as test_operations.py runs them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

import vswapd
from support.driving import LIBRARIES, SOURCES
from support.limited import MIB, run_limited

_SUPPORT = Path(__file__).parent.parent / "support"
_LIMIT = 256 * MIB
_TRIES = 3  # where it takes a race to go wrong
_SECONDS_MAX = 50.0  # a row that does not end is not right either: operations gives it up after 30
_FLAGS = ["-std=gnu11", "-O1", "-fPIC", "-D_CFFI_NO_LIMITED_API"]
_AGENT_FLAGS = ["-ffreestanding", "-fno-stack-protector", "-fno-builtin", "-fno-tree-loop-distribute-patterns"]


@dataclass(frozen=True)
class Guard:
    """Lines of a file, what stands there instead, and a row that cannot be right then."""

    name: str
    file: str
    lines: str
    instead: str
    row: str
    backing: str = "pool"
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


_GUARDS = [
    Guard(
        "shared-clusters-are-copied",
        "slot_table.c",
        "\tif (old->share == 1)\n",
        "\tif (old->share >= 1)\n",
        "fork_parent_writes_first",
    ),
    Guard(
        "wiped-in-the-child",
        "fork.c",
        "\tif (child->record->map.cluster_count == 0)\n",
        "\tif (true || child->record->map.cluster_count == 0)\n",
        "madvise_wipeonfork_while_out",
    ),
    Guard(
        "wiped-where-nothing-is-resident",
        "fork.c",
        "\t\t    !mapping_was_copied(parent, child, &mapping))\n\t\t\treturn false;\n",
        "\t\t    !mapping_was_copied(parent, child, &mapping))\n\t\t\treturn true;\n",
        "madvise_wipeonfork_while_out",
    ),
    Guard(
        "wiped-where-a-page-is-resident",
        "fork.c",
        "return try_page(child, at) == FILL_PRESENT;\n",
        "return try_page(child, at) <= FILL_PRESENT;\n",
        "madvise_wipeonfork_half_out",
    ),
    Guard(
        "not-passed-on-to-the-child",
        "look.c",
        "\tif (!covered)\n",
        "\tif (covered > 1)\n",
        "madvise_dontfork",
    ),
    Guard(
        "unmapped-is-no-region-any-more",
        "remap.c",
        "\tbool armed = is_armed(client, start, end);\n\n\tremap_withdraw(client, start, end);\n",
        "\tbool armed = is_armed(client, start, end);\n\n",
        "munmap_whole",
    ),
    Guard(
        "removed-slots-are-dropped",
        "fault.c",
        "\tclient_forget_slots(client, page_of(start), page_of(end - start));\n\t/* When",
        "\t/* When",
        "madvise_dontneed",
    ),
    Guard(
        "slots-move-with-their-mapping",
        "fault.c",
        "\t\tremap_move(client, message->arg.remap.from, message->arg.remap.to,\n\t\t\t   message->arg.remap.len);\n",
        "",
        "mremap_fixed",
    ),
    Guard(
        "staging-of-each-protection",
        "look.c",
        "mapping.executable ? 1 : 0);\n\t}\n",
        "0);\n\t}\n",
        "mprotect_rwx",
    ),
    Guard(
        "staging-is-not-locked",
        "preload.c",
        "\tif (replacement.engaged)\n\t\t(void)RAW_2(__NR_munlock,",
        "\tif (replacement.engaged && !agent)\n\t\t(void)RAW_2(__NR_munlock,",
        "mlockall_on_fault",
    ),
    Guard(
        "pinned-pages-are-passed-over",
        "evict.c",
        "\tif (client->populated_address == left.command.runs[0].address)\n\t\treturn;\n",
        "",
        "io_uring_registered",
    ),
    Guard(
        "given-up-to-its-own-userfaultfd",
        "preload_userfaultfd.c",
        "\tif (result != -EBUSY || ",
        "\tif (result < 0 || ",
        "own_userfaultfd_while_out",
    ),
    Guard(
        "withdrawn-before-it-is-given-up",
        "yield.c",
        "\tremap_withdraw(client, yield->start, yield->end);\n",
        "",
        "own_userfaultfd_of_a_part",
    ),
    Guard(
        "single-task-namespaces",
        "preload.c",
        "\tif (replacement.engaged)\n\t\treplace_dismiss(&replacement, false);\n\tresult = raw_call(number, a, b",
        "\tresult = raw_call(number, a, b",
        "unshare_user",
    ),
    Guard(
        "agent-ends-before-a-filter",
        "preload.c",
        "\tif (asks_only || !replacement.engaged) {\n",
        "\tif (asks_only || replacement.engaged || !replacement.engaged) {\n",
        "seccomp_tsync",
    ),
    Guard(
        "agent-follows-credentials",
        "preload.c",
        "\t\tif (result == 0)                                                                \\\n\t\t\treplace_agent();",
        "\t\tif (result != 0)                                                                \\\n\t\t\treplace_agent();",
        "setuid_drop",
    ),
    Guard(
        "own-descriptor-table",
        "agent.c",
        "\t\treturn RAW_3(__NR_close_range, 0, ~0u, RAW_CLOSE_RANGE_UNSHARE) == 0;\n",
        "\t\treturn true;\n",
        "close_range_all",
    ),
    Guard(
        "no-signal-is-taken",
        "agent.c",
        "\traw_signals_block(&signals);\n\ttid = raw_clone(",
        "\traw_signals_block(&signals);\n\traw_signals_restore(&signals);\n\ttid = raw_clone(",
        "signal_waited_for",
    ),
]


def _text_without(guard: Guard) -> str:
    """Its file without it."""
    text = (SOURCES / guard.file).read_text(encoding="utf-8")
    assert text.count(guard.lines) == 1, f"{guard.file} has changed: {guard.lines!r}"
    return text.replace(guard.lines, guard.instead)


def _cc(*arguments: str | Path) -> None:
    subprocess.run(["cc", *arguments], check=True)


def _compile(source: Path, name: str, target: Path) -> None:
    flags: list[str | Path] = [*_FLAGS, "-iquote", SOURCES, f"-I{sysconfig.get_path('include')}"]
    if name.startswith("agent"):
        flags += _AGENT_FLAGS
    if name.startswith(("agent", "preload")):
        flags.append("-fvisibility=hidden")
    _cc(*flags, "-c", "-o", target, source)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Source file → what the compiler made of it, with nothing taken out."""
    directory = tmp_path_factory.mktemp("objects")
    binding = directory / "_engine.c"
    subprocess.run(
        [sys.executable, SOURCES / "build_ffi.py", SOURCES / "engine.h", binding, "--", "cc"], check=True
    )
    sources = {path.name: path for path in sorted(SOURCES.glob("*.c")) if path.name != "agent_image.c"}
    made = {}
    for name, source in {**sources, binding.name: binding}.items():
        made[name] = directory / f"{name}.o"
        _compile(source, name, made[name])
    return made


def _build(objects: dict[str, Path], directory: Path, guard: Guard | None) -> Path:
    """Where the package is that lacks the guard."""
    used = dict(objects)
    if guard:
        source = directory / guard.file
        source.write_text(_text_without(guard), encoding="utf-8")
        used[guard.file] = directory / f"{guard.file}.o"
        _compile(source, guard.file, used[guard.file])
    package = directory / "site" / "vswapd"
    shutil.copytree(Path(vswapd.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    client = [path for name, path in used.items() if name.startswith(("agent", "preload"))]
    engine = [path for name, path in used.items() if not name.startswith(("agent", "preload"))]
    _cc("-shared", "-o", package / f"_engine{sysconfig.get_config_var('EXT_SUFFIX')}", *engine, *LIBRARIES)
    script = f"-Wl,--version-script,{SOURCES / 'preload.map'}"
    _cc("-shared", script, "-Wl,-z,now", "-o", package / "libvswap.so", *client)
    return package.parent


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = str(tmp_path_factory.mktemp("operations") / "operations")
    _cc("-std=gnu11", "-O2", "-o", program, *sorted(_SUPPORT.glob("operations*.c")), "-pthread")
    return program


def _is_right(operations: str, guard: Guard, site: Path) -> tuple[bool, str]:
    environment = {"PYTHONPATH": str(site), "VSWAP_LIBRARY": ""}
    options = ["--private", *guard.options]
    result = run_limited(
        _LIMIT, [operations, guard.backing, guard.row], options=options, environment=environment, seconds_max=_SECONDS_MAX
    )
    said = (result.stdout + result.stderr).decode(errors="replace")
    return result.status == 0 and f"{guard.row} {guard.backing} ok" in said, said


@pytest.mark.parametrize("guard", _GUARDS, ids=str)
def test_lines_are_there(guard: Guard) -> None:
    """What the tests below take out, whatever else has changed."""
    assert (SOURCES / guard.file).read_text(encoding="utf-8").count(guard.lines) == 1


@pytest.mark.full
def test_rows_pass_when_built_here(objects: dict[str, Path], operations: str, tmp_path: Path) -> None:
    """With nothing taken out: what fails below does not fail for the way it is built."""
    site = _build(objects, tmp_path, None)
    for guard in _GUARDS:
        right, said = _is_right(operations, guard, site)
        assert right, f"{guard.row}: {said}"


@pytest.mark.full
@pytest.mark.parametrize("guard", _GUARDS, ids=str)
def test_row_fails_without_its_guard(
    objects: dict[str, Path], operations: str, tmp_path: Path, guard: Guard
) -> None:
    site = _build(objects, tmp_path, guard)
    for _ in range(_TRIES):
        right, said = _is_right(operations, guard, site)
        if not right:
            print(said)
            return
    pytest.fail(f"{guard.row} is right without {guard.name} in {guard.file}")
