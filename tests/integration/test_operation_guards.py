# SPDX-License-Identifier: MIT
"""Some rows of the operation table without the code that they guard: each must fail then, or it shows nothing.

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
        "wiped-in-the-child",
        "fault.c",
        "\tstruct address_space_name now;\n\n\treturn child->record",
        "\tstruct address_space_name now;\n\n\treturn true || child->record",
        "madvise_wipeonfork_while_out",
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
        _LIMIT, [operations, guard.backing, guard.row], options=options, environment=environment, seconds_max=120.0
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
