# SPDX-License-Identifier: MIT
"""records.py and the fake engine against csrc/engine.h and the real wrapper."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import vswapd
from support import header
from support.fake_engine import FakeEngine
from vswapd import records

_HEADER = "engine.h"
_ENGINE = Path(vswapd.__file__).parent / "engine.py"


@pytest.mark.parametrize(
    ("struct", "record"),
    [
        ("engine_group_statistics", records.GroupStatistics),
        ("engine_client_statistics", records.ClientStatistics),
        ("engine_client_tiers", records.ClientTiers),
        ("engine_backend_statistics", records.BackendStatistics),
        ("engine_room", records.Room),
    ],
)
def test_records_have_the_structs_fields(struct: str, record: type) -> None:
    names = {item.name for item in dataclasses.fields(record)}
    assert names == set(header.field_names(_HEADER, struct))


def test_event_has_the_structs_fields() -> None:
    names = {item.name for item in dataclasses.fields(records.Event)}
    assert names == set(header.field_names(_HEADER, "engine_event"))


def test_statistics_have_the_structs_fields() -> None:
    names = {item.name for item in dataclasses.fields(records.Statistics)}
    declared = re.search(r"struct engine_statistics \{(.*?)\n\};", header.text(_HEADER), re.DOTALL)
    assert declared
    for name in names:
        assert re.search(rf"\b{name}\b", declared[1]), name


def test_enumerators_are_the_headers() -> None:
    backings = header.enumerators(_HEADER, "engine_backing")
    named = {f"ENGINE_BACKING_{name.upper()}": index for index, name in enumerate(records.BACKINGS)}
    assert backings == named | {"ENGINE_BACKING_COUNT": len(records.BACKINGS)}
    for name, value in header.enumerators(_HEADER, "engine_event_kind").items():
        assert getattr(records, name.removeprefix("ENGINE_")) == value
    defines = header.defines(_HEADER)
    assert defines["ENGINE_GROUP_TORTURE"] == records.GROUP_TORTURE
    assert defines["ENGINE_GROUP_NO_SPILL"] == records.GROUP_NO_SPILL
    assert defines["ENGINE_BACKEND_KEEP_BLOCKS"] == records.BACKEND_KEEP_BLOCKS
    assert defines["ENGINE_BACKEND_ENCRYPT"] == records.BACKEND_ENCRYPT
    jobs = header.enumerators(_HEADER, "engine_backend_job")
    assert list(jobs.values()) == list(range(len(records.JOBS)))


def _methods(tree: ast.Module) -> dict[str, list[str]]:
    """Public methods of the class Engine with their parameters."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Engine"]
    return {
        node.name: [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
        for node in classes[0].body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def test_fake_has_the_wrappers_interface() -> None:
    """Read as text: the extension need not be there."""
    engine = FakeEngine()
    for name, parameters in _methods(ast.parse(_ENGINE.read_text(encoding="utf-8"))).items():
        assert hasattr(engine, name), name
        if callable(getattr(engine, name)) and name != "create":
            assert list(inspect.signature(getattr(engine, name)).parameters) == parameters, name
    engine.destroy()


def test_wrapper_uses_only_what_the_header_declares() -> None:
    text = _ENGINE.read_text(encoding="utf-8")
    declared = header.text(_HEADER)
    declared += header.text("attach.h")
    declared += header.text("shelve.h")
    for name in set(re.findall(r"\blib\.(\w+)", text)) - {"hold_gil_ms", "fork_sharing_descriptors", "supervise_take_descriptors"}:
        assert re.search(rf"\b{name}\(", declared), name


def test_only_engine_imports_the_extension() -> None:
    for path in _ENGINE.parent.rglob("*.py"):
        if path != _ENGINE:
            assert not re.search(r"import.*\b_engine\b|_engine import", path.read_text(encoding="utf-8")), (
                path
            )


def test_extension_where_it_is_built() -> None:
    """Everything that can be called without making an engine."""
    engine = pytest.importorskip(
        "vswapd.engine", reason="the extension is not built here", exc_type=ImportError
    )
    names = {name for name, _ in engine.ffi.typeof("struct engine_counters").fields}
    assert "faults" in names
    bounds = engine.Engine(engine.ffi.NULL).latency_bounds_us()
    assert len(bounds) == engine.ffi.typeof("uint64_t[64]").length
    assert list(bounds) == sorted(set(bounds))
    assert bounds[0] >= 1.0
    struct = engine.ffi.new("struct engine_statistics *")
    struct.counters.faults = 3
    struct.latency[1][2] = 4
    record = engine._record(records.Statistics, struct)
    assert record.counters["faults"] == 3
    assert record.latency[1][2] == 4
    group = engine.ffi.new("struct engine_group_statistics *", {"name": b"run-1", "limit_bytes": 5})
    assert engine._record(records.GroupStatistics, group).name == "run-1"
