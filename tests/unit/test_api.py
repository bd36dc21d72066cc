# SPDX-License-Identifier: MIT
"""The Python interface without a daemon: light, typed, and clear about what it cannot do."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import vswapd

_ROOT = Path(__file__).resolve().parents[2]


def test_names() -> None:
    assert set(vswapd.__all__) <= set(dir(vswapd))
    for name in vswapd.__all__:
        assert getattr(vswapd, name).__doc__ or name == "__version__"
        assert not inspect.isfunction(getattr(vswapd, name)) or ">>> " in getattr(vswapd, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = vswapd.nosuch


def test_use_imports_nothing_heavy() -> None:
    code = "import sys, vswapd; vswapd.alloc(1); print(*{'numpy', 'trio', 'rich', 'vswapd._engine'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert result.stdout == "\n"


def test_numpy_is_optional() -> None:
    """All but empty() work without, and that says what is missing."""
    code = """
import sys
sys.modules["numpy"] = None
import vswapd
memory = vswapd.alloc("1M")
memory[:3] = b"abc"
vswapd.cold(memory)
vswapd.willneed(memory)
try:
    vswapd.empty(3)
except ImportError as error:
    print(memory[:4], error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "VSWAP_GROUP"}
    environment["PYTHONPATH"] = str(_ROOT)
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert result.stdout == (
        "b'abc\\x00' vswapd.empty() needs NumPy; pip install numpy, or take vswapd.alloc()\n"
    )


def test_alloc() -> None:
    memory = vswapd.alloc("1M")
    assert len(memory) == 1 << 20
    assert memory[:] == bytes(1 << 20)
    memory[5:8] = b"abc"
    assert memory[4:9] == b"\0abc\0"
    for size in (0, -1, "12X", 1 << 62, 1 << 70):
        with pytest.raises(vswapd.Failure, match="; "):
            vswapd.alloc(size)


@pytest.mark.parametrize("shape", [7, (3, 4), (0, 5), (), (1 << 18,)])
def test_empty_is_like_numpys(shape: int | tuple[int, ...]) -> None:
    array, expected = vswapd.empty(shape, "f4"), np.zeros(shape, "f4")
    assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    assert array.flags.c_contiguous
    assert array.flags.writeable
    array[...] = 1
    assert array.sum() == array.size


def test_empty_keeps_its_memory() -> None:
    view = vswapd.empty((1 << 20,), "u1")[5:10]
    view[:] = 3
    assert view.tolist() == [3] * 5


def test_empty_takes_no_references() -> None:
    with pytest.raises(vswapd.Failure, match="holds references"):
        vswapd.empty(3, object)


def test_cold_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSWAP_GROUP", raising=False)
    vswapd.cold(bytearray(10000))
    vswapd.cold(bytearray())
    with pytest.raises(vswapd.Failure, match="writable buffer"):
        vswapd.cold(b"read-only")


def test_willneed() -> None:
    array = vswapd.empty((1 << 20,), "u1")
    array[::4096] = 7
    vswapd.willneed(array[5:77777])
    vswapd.willneed(bytearray(10))
    vswapd.willneed(array[:0])
    assert array[4096] == 7
    for wrong in (array.reshape(1024, 1024)[:, 3], b"read-only", 5):
        with pytest.raises(vswapd.Failure, match="writable buffer"):
            vswapd.willneed(wrong)


# ---- limit ----


def test_limit_refuses_what_it_cannot_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSWAP_GROUP", raising=False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it started again"))
    with pytest.raises(vswapd.Failure, match="not a size"), vswapd.limit("12X"):
        pass
    monkeypatch.setattr(sys, "argv", [""])
    with pytest.raises(vswapd.Failure, match="interactive session"), vswapd.limit("64M"):
        pass
    monkeypatch.setattr(sys, "argv", ["job.py"])
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        with pytest.raises(vswapd.Failure, match="it has threads"), vswapd.limit("64M"):
            pass
    finally:
        end.set()
        thread.join()


def test_limit_starts_the_same_program_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class StartedError(Exception):
        pass

    def execv(path: str, arguments: list[str]) -> None:
        raise StartedError(path, *arguments)

    monkeypatch.delenv("VSWAP_GROUP", raising=False)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["job.py", "x"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-O", "job.py", "x"])
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    with pytest.raises(StartedError) as caught, vswapd.limit("64M"):
        pass
    run = [sys.executable, "-P", "-m", "vswapd", "run", "--limit", "64M", "--"]
    assert list(caught.value.args) == [sys.executable, *run, sys.executable, "-O", "job.py", "x"]


def test_no_daemon_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VSWAPD_SOCKET", str(tmp_path / "none"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("VSWAP_GROUP", "g")
    with pytest.raises(vswapd.Failure, match="no daemon answers"):
        vswapd.status()
    with pytest.raises(vswapd.Failure, match="no daemon answers"), vswapd.limit("64M"):
        pass
