# SPDX-License-Identifier: MIT
"""applications — real programs as workloads: each runs inside the limit and prints a line of JSON for each phase.

    python applications.py NAME --mib N --workloads PROGRAM --directory DIRECTORY [--prepare]

`--mib`: about what it is to hold in memory. With --prepare it makes what all runs share, in DIRECTORY, outside of any
limit. The data is that of the program `workloads` (LZ4 1.6 : 1) but for sort, which gets words, and Python's objects.
A phase has `digest` where every system must come to the same result, and `wrong` where the program can tell itself.

redis    the server with keys of 1,000 bytes; redis-benchmark's GET and SET of random ones; every value compared
sort     GNU sort of lines that come and go through pipes
sqlite   a table in ':memory:': load, point queries, updates, a scan
numpy    one array: fill, arithmetic in place, sums of columns, gathered rows
gc       Python objects that refer to each other: build, collections, churn
compile  `make -j2` of binutils' libbfd and libiberty
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import glob
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MIB = 1 << 20
_PAGE_BYTES = 4096
_VALUE_BYTES = 1000
_KEY_COST_BYTES = 1110  # value, its header, key, hash table
_BATCH = 256
_CLIENTS = 16
_REQUESTS = 200_000
_TICKS = os.sysconf("SC_CLK_TCK")


# ---- phases ----


def _machine_seconds() -> tuple[float, float]:
    """User and system time of the whole machine: daemons and kernel threads work for the program, too."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
    return (user + nice) / _TICKS, (system + irq + softirq) / _TICKS


def _say(phase: str, operations: int, seconds: float, **more: Any) -> None:
    ns = seconds * 1e9 / max(1, operations)
    print(json.dumps({"phase": phase, "accesses": operations, "ns": ns, "seconds": seconds, "wrong": 0, **more}))
    sys.stdout.flush()


@contextlib.contextmanager
def _timed(phase: str, operations: int) -> Iterator[dict[str, Any]]:
    """Time a block; what it puts into the dict is reported with it."""
    more: dict[str, Any] = {}
    user, system = _machine_seconds()
    started = time.monotonic()
    yield more
    seconds = time.monotonic() - started
    user_after, system_after = _machine_seconds()
    count = max(1, operations)
    more.setdefault("user_ns", (user_after - user) * 1e9 / count)
    more.setdefault("system_ns", (system_after - system) * 1e9 / count)
    _say(phase, operations, seconds, **more)


def _seeded() -> random.Random:
    """The same for everybody."""
    return random.Random(1)  # noqa: S311 # not a secret


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _data(options: argparse.Namespace, mib: int) -> Iterator[Any]:
    """A stream of pages."""
    argv = [options.workloads, "--mib", str(mib), "data"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        yield process.stdout
        process.kill()


# ---- redis ----


class _Redis:
    """A server on a socket of its own."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, f"redis-{os.getpid()}.sock")
        argv = ["redis-server", "--port", "0", "--unixsocket", self.path, "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen([*argv, "--dir", directory], stdout=subprocess.DEVNULL)
        self.socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.socket.connect(self.path)
                break
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.02)  # until it listens
        self._file = self.socket.makefile("rb")

    def send(self, *commands: tuple[bytes, ...]) -> None:
        """RESP arrays, in one write."""
        parts = []
        for command in commands:
            parts.append(b"*%d\r\n" % len(command))
            parts.extend(b"$%d\r\n%s\r\n" % (len(word), word) for word in command)
        self.socket.sendall(b"".join(parts))

    def line(self) -> bytes:
        """Of an answer."""
        return self._file.readline()

    def bulk(self) -> bytes:
        """A string in an answer; b'' for none."""
        length = int(self._file.readline()[1:])
        return self._file.read(length + 2)[:-2] if length >= 0 else b""

    def end(self) -> None:
        """Without saving."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def _key(number: int) -> bytes:
    return b"key:%012d" % number


def _values(stream: Any, count: int) -> Iterator[list[bytes]]:
    """Batches of values: four of a page, each less than a quarter of it."""
    left = count
    while left > 0:
        block = stream.read(_BATCH // 4 * _PAGE_BYTES)
        batch = [block[at : at + _VALUE_BYTES] for at in range(0, len(block), _PAGE_BYTES // 4)][:left]
        left -= len(batch)
        yield batch


def _redis_benchmark(server: _Redis, phase: str, keys: int, value: bytes, *command: str) -> None:
    argv = ["redis-benchmark", "-s", server.path, "-c", str(_CLIENTS), "-n", str(_REQUESTS), "-r", str(keys), "--csv"]
    if value:
        argv.append("-x")
    done = subprocess.run([*argv, *command], check=True, capture_output=True, input=value)
    row = next(csv.DictReader(done.stdout.decode().splitlines()))
    more = {"request_p50_ns": float(row["p50_latency_ms"]) * 1e6, "request_p99_ns": float(row["p99_latency_ms"]) * 1e6}
    _say(phase, _REQUESTS, _REQUESTS / float(row["rps"]), **more)


def _run_redis(options: argparse.Namespace) -> None:
    keys = options.mib * _MIB // _KEY_COST_BYTES
    mib = -(-keys * _PAGE_BYTES // 4 // _MIB)
    server = _Redis(options.directory)
    try:
        with _timed("redis_load", keys), _data(options, mib) as stream:
            number = 0
            for batch in _values(stream, keys):
                server.send(*((b"SET", _key(number + i), value) for i, value in enumerate(batch)))
                number += len(batch)
                if any(server.line() != b"+OK\r\n" for _ in batch):
                    raise SystemExit("redis-server refused a SET")
        _redis_benchmark(server, "redis_get", keys, b"", "GET", "key:__rand_int__")
        with _timed("redis_verify", keys) as more, _data(options, mib) as stream:
            number = wrong = 0
            for batch in _values(stream, keys):
                server.send((b"MGET", *(_key(number + i) for i in range(len(batch)))))
                server.line()
                wrong += sum(server.bulk() != value for value in batch)
                number += len(batch)
            more["wrong"] = wrong
        with _data(options, 1) as stream:
            value = stream.read(_PAGE_BYTES)[16 : 16 + _VALUE_BYTES].replace(b"__rand_int__", b"")
        _redis_benchmark(server, "redis_set", keys, value, "SET", "key:__rand_int__")
    finally:
        server.end()


# ---- sort ----

_LINE_COST = 1.75  # memory of GNU sort for a byte of such lines: the line, and a record of 32 bytes


def _text_path(options: argparse.Namespace) -> str:
    return os.path.join(options.directory, f"lines-{options.mib}")


def _prepare_sort(options: argparse.Namespace) -> None:
    chosen = _seeded()
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(chosen.choices(letters, k=chosen.randint(2, 9))) for _ in range(20000)]
    left = int(options.mib * _MIB / _LINE_COST)
    with open(_text_path(options), "w") as file:
        while left > 0:
            line = " ".join(chosen.choices(words, k=8)) + "\n"
            file.write(line)
            left -= len(line)


def _run_sort(options: argparse.Namespace) -> None:
    """Past the page cache, which some limits count and others do not."""
    read = ["dd", f"if={_text_path(options)}", "iflag=direct,fullblock", "bs=1M", "status=none"]
    sort = ["sort", "--parallel=2", f"--buffer-size={options.mib * 2}M", "-T", options.directory]
    environment = {**os.environ, "LC_ALL": "C"}
    with _timed("sort", os.path.getsize(_text_path(options)) // _PAGE_BYTES) as more:
        reader = subprocess.Popen(read, stdout=subprocess.PIPE)
        sorter = subprocess.Popen(sort, stdin=reader.stdout, stdout=subprocess.PIPE, env=environment)
        assert reader.stdout is not None
        assert sorter.stdout is not None
        reader.stdout.close()
        digest = hashlib.sha256()
        while block := sorter.stdout.read(_MIB):
            digest.update(block)
        if sorter.wait() != 0 or reader.wait() != 0:
            raise SystemExit("sort failed")
        more["digest"] = digest.hexdigest()[:16]


# ---- SQLite ----

_BODY_BYTES = 420


def _run_sqlite(options: argparse.Namespace) -> None:
    import sqlite3

    rows = options.mib * _MIB // (_BODY_BYTES + 40)
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, k INTEGER, body BLOB)")
    chosen = _seeded()

    def bodies(stream: Any) -> Iterator[tuple[int, int, bytes]]:
        for number in range(rows):
            yield number, number * 7919 % rows, stream.read(_BODY_BYTES)

    with _timed("sqlite_load", rows), _data(options, rows * _BODY_BYTES // _MIB + 1) as stream:
        database.execute("BEGIN")
        database.executemany("INSERT INTO t VALUES (?, ?, ?)", bodies(stream))
        database.execute("COMMIT")
    queries = rows // 4
    with _timed("sqlite_select", queries) as more:
        total = 0
        for _ in range(queries):
            found = database.execute("SELECT k, body FROM t WHERE id = ?", (chosen.randrange(rows),)).fetchone()
            total += found[0] + found[1][7]
        more["digest"] = _digest(total)
    with _timed("sqlite_update", queries):
        database.execute("BEGIN")
        for _ in range(queries):
            database.execute("UPDATE t SET k = k + 1 WHERE id = ?", (chosen.randrange(rows),))
        database.execute("COMMIT")
    with _timed("sqlite_scan", rows) as more:
        query = "SELECT count(*), sum(k), sum(length(body)), max(body) FROM t"
        more["digest"] = _digest(database.execute(query).fetchone())


# ---- NumPy ----


def _run_numpy(options: argparse.Namespace) -> None:
    import numpy as np

    pages = options.mib * _MIB // _PAGE_BYTES
    table = np.empty((pages, _PAGE_BYTES // 8), "i8")
    with _timed("numpy_fill", pages), _data(options, options.mib) as stream:
        view = memoryview(table.view("u1").reshape(-1))  # type: ignore[arg-type] # an array is a buffer
        at = 0
        while at < len(view):
            at += stream.readinto(view[at : at + _MIB])
    with _timed("numpy_math", pages) as more:
        table ^= 0x55
        more["digest"] = _digest(int(table[::97].sum()))
    with _timed("numpy_columns", pages) as more:
        more["digest"] = _digest(int(table.sum(axis=0).sum()))
    rows = np.random.default_rng(1).integers(0, pages, pages // 4)
    with _timed("numpy_gather", len(rows)) as more:
        more["digest"] = _digest(sum(int(table[row].sum()) for row in rows))


# ---- Python objects ----

_NODE_BYTES = 520


def _run_gc(options: argparse.Namespace) -> None:
    count = options.mib * _MIB // _NODE_BYTES
    chosen = _seeded()
    nodes: list[dict[str, Any]] = []
    with _timed("gc_build", count):
        for number in range(count):
            other = nodes[number // 2] if nodes else None
            nodes.append({"id": number, "next": other, "name": f"node {number}", "tags": [number, number + 0.5]})
    with _timed("gc_collect", 3 * count) as more:
        more["digest"] = _digest([gc.collect() for _ in range(3)])
    changes = count // 4
    with _timed("gc_churn", changes) as more:
        for _ in range(changes):
            number = chosen.randrange(count)
            nodes[number] = {"id": number, "next": nodes[number]["next"], "name": f"again {number}", "tags": [1, 2.5]}
        more["digest"] = _digest(sum(len(node["name"]) + node["id"] for node in nodes))


# ---- compile ----

_SOURCE_PARTS = "bfd config include libiberty libsframe zlib config-ml.in config.guess config.sub depcomp install-sh"
_SOURCE_PARTS += " ltmain.sh missing mkinstalldirs move-if-change"
_BFD_OBJECTS = "elflink.lo elf.lo elf64-x86-64.lo elf32-i386.lo elfxx-x86.lo dwarf2.lo elf64.lo elf32.lo"


def _fetch_source(directory: str) -> str:
    """Path of the tarball: of the installed package binutils-source, else of the package as apt has it."""
    installed = glob.glob("/usr/src/binutils/binutils-*.tar.xz")
    if installed:
        return installed[0]
    download = ["apt-get", "-q", "download", "binutils-source"]
    if subprocess.run(download, cwd=directory, check=False, capture_output=True).returncode != 0:
        raise SystemExit("no C sources to compile: apt-get install binutils-source")
    package = glob.glob(os.path.join(directory, "binutils-source_*.deb"))[0]
    subprocess.run(["dpkg", "-x", package, "package"], cwd=directory, check=True)
    return glob.glob(os.path.join(directory, "package/usr/src/binutils/binutils-*.tar.xz"))[0]


def _prepare_compile(options: argparse.Namespace) -> None:
    directory = os.path.join(options.directory, "compile")
    os.makedirs(directory, exist_ok=True)
    tarball = _fetch_source(directory)
    top = os.path.basename(tarball).removesuffix(".tar.xz")
    parts = [f"{top}/{part}" for part in _SOURCE_PARTS.split()]
    subprocess.run(["tar", "xJf", tarball, *parts], cwd=directory, check=True)
    for part, more in (("libiberty", []), ("bfd", ["--disable-nls", "--with-system-zlib", "--disable-werror"])):
        build = os.path.join(directory, "build", part)
        os.makedirs(build, exist_ok=True)
        argv = [os.path.join(directory, top, part, "configure"), *more]
        subprocess.run(argv, cwd=build, check=True, capture_output=True)
    subprocess.run(["make", "bfd.h", "elf32-target.h", "elf64-target.h"], cwd=build, check=True, capture_output=True)
    _compile_all(options)  # and every header and program is in the page cache, which nobody is charged for


def _compile_all(options: argparse.Namespace) -> None:
    build = os.path.join(options.directory, "compile/build")
    for part, targets in (("libiberty", []), ("bfd", _BFD_OBJECTS.split())):
        for path in glob.glob(os.path.join(build, part, "**/*.o"), recursive=True) + glob.glob(f"{build}/{part}/*.lo"):
            os.unlink(path)
        argv = ["make", "-j2", *targets]
        subprocess.run(argv, cwd=os.path.join(build, part), check=True, capture_output=True)


def _run_compile(options: argparse.Namespace) -> None:
    with _timed("compile", 1) as more:
        _compile_all(options)
    del more
    digest = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(options.directory, "compile/build/**/*.o"), recursive=True)):
        with open(path, "rb") as file:
            digest.update(file.read())
    _say("objects", 1, 0.0, digest=digest.hexdigest()[:16])


# ---- command line ----

_RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "redis": _run_redis,
    "sort": _run_sort,
    "sqlite": _run_sqlite,
    "numpy": _run_numpy,
    "gc": _run_gc,
    "compile": _run_compile,
}
_PREPARE: dict[str, Callable[[argparse.Namespace], None]] = {"sort": _prepare_sort, "compile": _prepare_compile}
_NEEDS = {"redis": ["redis-server", "redis-benchmark"], "sort": ["sort", "dd"], "compile": ["make", "gcc", "xz"]}


def missing(name: str) -> str:
    """Which program an application lacks; '' for none."""
    return next((program for program in _NEEDS.get(name, []) if shutil.which(program) is None), "")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(_RUN))
    parser.add_argument("--mib", type=int, required=True)
    parser.add_argument("--workloads", required=True)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--prepare", action="store_true")
    options = parser.parse_args()
    if not options.prepare:
        _RUN[options.name](options)
    elif options.name in _PREPARE:
        _PREPARE[options.name](options)


if __name__ == "__main__":
    main()
