# SPDX-License-Identifier: MIT
"""redis-server under a limit: every value right, equal digests, BGSAVE (fork), pageout meanwhile."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Self

import pytest

from support.limited import MIB, LimitedProgram, assert_honest, command_path, need_program
from support.redis_client import RedisClient, RedisError
from support.sampler import tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FILLER = b"some text that a cache would hold, as JSON or HTML, and of which much is alike; "


def _value(index: int, value_bytes: int) -> bytes:
    """A third of it depends on the index in every word, the rest only at its start."""
    head = b"".join(b"%016x" % ((index * 0x9E3779B97F4A7C15 + part) & (2**64 - 1)) for part in range(value_bytes // 48))
    body = _FILLER * (value_bytes // len(_FILLER) + 1)
    return (b"%d:" % index + head + body)[:value_bytes]


def _key(index: int) -> bytes:
    return b"key:%08d" % index


def _server_argv(program: str, directory: Path, *, database: str = "dump.rdb") -> list[str]:
    argv = [program, "--port", "0", "--unixsocket", str(directory / "redis.sock"), "--dir", str(directory)]
    argv += ["--dbfilename", database, "--save", "", "--daemonize", "no", "--enable-debug-command", "yes"]
    return [*argv, "--logfile", str(directory / "redis.log")]


def _connect(directory: Path, process: subprocess.Popen[bytes], seconds_max: float = 120.0) -> RedisClient:
    """Once the server answers and has loaded its data. AssertionError."""
    deadline = time.monotonic() + seconds_max
    while True:
        with contextlib.suppress(OSError, RedisError, EOFError):
            client = RedisClient(str(directory / "redis.sock"))
            try:
                client.command("PING")  # -LOADING is a RedisError
            except BaseException:
                client.__exit__()
                raise
            return client
        log = directory / "redis.log"
        text = log.read_text(errors="replace")[-2000:] if log.exists() else "no log"
        assert process.poll() is None, f"redis-server did not start: {text}"
        assert time.monotonic() < deadline, f"redis-server does not answer: {text}"
        time.sleep(0.05)  # polling another process's state


@contextlib.contextmanager
def _native_server(program: str, directory: Path) -> Iterator[RedisClient]:
    process = subprocess.Popen(_server_argv(program, directory))
    try:
        with _connect(directory, process) as client:
            yield client
    finally:
        process.kill()
        process.wait()


def _load(client: RedisClient, keys: int, value_bytes: int) -> None:
    client.pipeline(("SET", _key(index), _value(index, value_bytes)) for index in range(keys))


def _assert_all_values_right(client: RedisClient, keys: int, value_bytes: int) -> None:
    for start in range(0, keys, 1000):
        indexes = range(start, min(start + 1000, keys))
        found = client.command("MGET", *map(_key, indexes))
        wanted = [_value(index, value_bytes) for index in indexes]
        assert found == wanted, f"wrong values among keys {start} to {start + 999}"


class _Pageout:
    """`vswapctl pageout PID` every second, for as long as the block lasts."""

    def __init__(self, socket_path: str, pid: int, every_seconds: float = 1.0) -> None:
        self._argv = [command_path("vswapctl"), "pageout", "--socket", socket_path, str(pid)]
        self._every_seconds = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.outcomes: list[tuple[int, bytes]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_seconds):
            ended = subprocess.run(self._argv, capture_output=True, check=False)
            self.outcomes.append((ended.returncode, ended.stderr))


def _redis_pid(vswapctl_pid: int) -> int:
    """The managed server: redis has rewritten its name, so by its place in the tree."""
    for pid in tree(vswapctl_pid):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8") as comm:
            if comm.read().startswith("redis-server"):
                return pid
    raise AssertionError("no redis-server below vswapctl")


@pytest.mark.parametrize(
    ("keys", "value_bytes", "limit_mib"),
    [(200_000, 400, 60), pytest.param(1_000_000, 400, 250, marks=pytest.mark.full)],
)
@pytest.mark.parametrize("paging", [False, True], ids=["limit", "pageout"])
def test_redis(tmp_path: Path, keys: int, value_bytes: int, limit_mib: int, paging: bool) -> None:
    program = need_program("redis-server")
    directories = {name: tmp_path / name for name in ("native", "limited", "elsewhere")}
    for directory in directories.values():
        directory.mkdir()

    with _native_server(program, directories["native"]) as client:
        _load(client, keys, value_bytes)
        digest = client.command("DEBUG", "DIGEST")

    directory = directories["limited"]
    with LimitedProgram(limit_mib * MIB, _server_argv(program, directory), seconds_max=1200) as server:
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(_connect(directory, server.process))
            pageout = None
            if paging:
                pageout = stack.enter_context(_Pageout(server.socket_path, _redis_pid(server.process.pid)))
            _load(client, keys, value_bytes)
            _assert_all_values_right(client, keys, value_bytes)
            assert client.command("DEBUG", "DIGEST") == digest
            client.command("BGSAVE")
            # The parent goes on changing what the child saves; then all is as before.
            client.pipeline(("APPEND", _key(index), b"!") for index in range(0, keys, 10))
            client.pipeline(("SET", _key(index), _value(index, value_bytes)) for index in range(0, keys, 10))
            assert client.wait_background_save(600), (directory / "redis.log").read_text()[-2000:]
            assert client.command("DEBUG", "DIGEST") == digest
        if pageout is not None:
            # Whatever was managed at the time; the first ones may come before the server is.
            assert any(status == 0 for status, _ in pageout.outcomes), pageout.outcomes
        with _connect(directory, server.process) as client, contextlib.suppress(EOFError, OSError):
            client.command("SHUTDOWN", "NOSAVE")
        result = server.wait()
    assert result.status == 0, result.describe()
    assert_honest(result, limit_mib * MIB)

    (directory / "dump.rdb").rename(directories["elsewhere"] / "dump.rdb")
    with _native_server(program, directories["elsewhere"]) as client:
        assert client.command("DEBUG", "DIGEST") == digest
