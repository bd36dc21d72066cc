# SPDX-License-Identifier: MIT
"""regions/NAME: memory files that any program maps, kept by the daemon's slots and tiers."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.driving import build_drive
from support.limited import MIB
from support.service import Service, serving, wait_until
from vswapd.engine import Engine
from vswapd.records import GROUP_REGIONS, Region

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAGE = 4096


def _more(directory: Path, more: str = "") -> str:
    return f'fs = "{directory}/fs"\nregion_limit = "64M"\n{more}'


def _run(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


@contextmanager
def _memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """The file that a process writes itself to."""
    name = f"vswap-test-{os.getpid()}"
    for root, limit in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        group = Path(root) / name
        with suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                (group / limit).write_text(str(limit_bytes))
                try:
                    yield group / "cgroup.procs"
                finally:
                    wait_until("its processes have ended", lambda: not (group / "cgroup.procs").read_text())
                    group.rmdir()
                return
            group.rmdir()
    pytest.fail("no memory controller: run this where cgroups can be made")


def test_bytes_as_a_model_has_them(tmp_path: Path) -> None:
    """Reads, writes and truncations of any size and place, with a pool that most does not fit into."""
    engine = Engine.create()
    try:
        fd = os.open(tmp_path / "spill", os.O_RDWR | os.O_CREAT, 0o600)
        engine.backend_add(fd, str(tmp_path / "spill"), 256 * MIB, 0)
        group = engine.group_create("regions-0", 2 * MIB, 0, GROUP_REGIONS)
        number = engine.region_create(Region(group=group, name="a"))
        model, chance, noise = bytearray(), random.Random(1), os.urandom(MIB)
        for _ in range(600):
            place = chance.randrange(len(model) + 100_000)
            place -= place % chance.choice((1, _PAGE))
            size = chance.choice((1, 100, _PAGE, 5000, 131072, MIB))
            if place + size > 16 * MIB:
                engine.region_truncate(number, place)
                del model[place:]
                model.extend(bytes(place - len(model)))
                continue
            start = chance.randrange(MIB)
            data = chance.choice((bytes(size), b"12345678" * size, (noise * 2)[start:] + noise))[:size]
            engine.region_write(number, place, data)
            model.extend(bytes(max(0, place + size - len(model))))
            model[place : place + size] = data
            place, size = chance.randrange(len(model)), chance.choice((1, 5000, MIB))
            assert engine.region_read(number, place, size) == model[place : place + size]
        assert engine.region_read(number, 0, 16 * MIB) == model
        assert engine.region(number).spill_pages > 0
        assert engine.is_valid()
        engine.region_destroy(number)
        statistics = engine.statistics()
        assert (statistics.virtual_pages, statistics.pool_bytes, statistics.spill_bytes) == (0, 0, 0)
    finally:
        engine.destroy()


def test_what_finds_no_room_is_an_error_for_ever_after(tmp_path: Path) -> None:
    engine = Engine.create()
    try:
        group = engine.group_create("regions-0", MIB, 0, GROUP_REGIONS)
        number = engine.region_create(Region(group=group, name="a"))
        engine.region_write(number, 0, b"a" * MIB)
        with pytest.raises(OSError, match="space") as caught:
            for place in range(0, 4 * MIB, 256 * 1024):
                engine.region_write(number, place, os.urandom(256 * 1024))
        assert caught.value.errno == errno.ENOSPC
        lost = engine.region(number).poisoned_pages
        assert lost > 0
        with pytest.raises(OSError, match="error") as caught:
            engine.region_read(number, 0, 4 * MIB)
        assert caught.value.errno == errno.EIO
        engine.region_truncate(number, 0)
        engine.region_write(number, 0, b"b" * MIB)
        assert engine.region_read(number, 0, MIB) == b"b" * MIB
    finally:
        engine.destroy()


_OPEN = """
import os, sys, numpy
path, cgroup = sys.argv[1:]
open(cgroup, "w").write(str(os.getpid()))
step = 1 << 20
def content(start):
    return numpy.arange(start, start + step) // 16 * (start // step % 7 + 1)
"""
_FILL = _OPEN + """
array = numpy.memmap(path, "u8", "r+")
for start in range(0, len(array), step):
    array[start:start + step] = content(start)
array.flush()
"""
_CHECK = _OPEN + """
array = numpy.memmap(path, "u8", "r")
for start in range(0, len(array), step):
    assert (array[start:start + step] == content(start)).all(), start
"""


def test_memmap_larger_than_its_cgroup(tmp_path: Path) -> None:
    size = 2 << 30
    with serving(tmp_path, more=_more(tmp_path)) as service, _memory_cgroup(256 * MIB) as procs:
        path = tmp_path / "fs/regions/large"
        path.touch()
        os.truncate(path, size)
        assert path.stat().st_blocks == 0, "sparse"
        for code in (_FILL, _CHECK):
            result = _run(code, path, procs)
            assert result.returncode == 0, result.stderr
        shown = {region["name"]: region for region in service.status()["regions"]}["large"]
        assert shown["size_bytes"] == size
        assert shown["spill_pages"] + shown["pool_pages"] + shown["same_pages"] > size // _PAGE * 0.99
        assert service.group("regions-0")["usage_bytes_max"] <= 64 * MIB
        path.unlink()
        wait_until("it is freed", lambda: service.status()["virtual_pages"] == 0)


def test_daemon_short_of_memory_goes_on(tmp_path: Path) -> None:
    """In the cgroup whose dirty pages it has to store: it must not wait for itself."""
    size = 512 * MIB
    with _memory_cgroup(160 * MIB) as procs, serving(tmp_path, more=_more(tmp_path)) as service:
        daemon = service.daemon_pid()
        procs.write_text(str(daemon))
        path = tmp_path / "fs/regions/large"
        path.touch()
        os.truncate(path, size)
        for code in (_FILL, _CHECK):
            result = _run(code, path, procs, timeout=120)
            assert result.returncode == 0, result.stderr
        assert service.daemon_pid() == daemon, "it was not killed for want of memory"


_STATIC = r"""
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
int main(int argc, char **argv)
{
	int fd = open(argv[1], O_RDWR);
	unsigned char *at = mmap(NULL, 64 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (argc != 2 || at == MAP_FAILED)
		return 1;
	for (int i = 0; i < 64 << 20; i += 4096)
		at[i + 7] = (unsigned char)(at[i] + i / 4096);
	return msync(at, 64 << 20, MS_SYNC);
}
"""


def test_static_program_and_another_share_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "map.c").write_text(_STATIC)
    subprocess.run(["gcc", "-static", "-O2", "-o", tmp_path / "map", tmp_path / "map.c"], check=True)
    with serving(tmp_path, more=_more(tmp_path)):
        path = tmp_path / "fs/regions/shared"
        with path.open("w+b") as file:
            file.truncate(64 * MIB)
            with mmap.mmap(file.fileno(), 64 * MIB) as mapped:
                mapped[::_PAGE] = b"\3" * (64 * MIB // _PAGE)
                subprocess.run([tmp_path / "map", path], check=True)
                assert all(mapped[page * _PAGE + 7] == (page + 3) % 256 for page in range(64 * MIB // _PAGE))
            path.unlink()
            file.seek(7)
            assert file.read(1) == b"\3", "it lives while it is open"


def test_what_was_written_back_outlives_the_daemon(tmp_path: Path) -> None:
    with serving(tmp_path, more=_more(tmp_path)) as service:
        regions = tmp_path / "fs/regions"
        data = os.urandom(8 * MIB)
        (regions / "kept").write_bytes(data)
        (regions / "gone").write_bytes(data)
        for name in ("kept", "gone"):
            with (regions / name).open("rb") as file:
                os.fsync(file.fileno())
        (regions / "kept").chmod(0o640)
        in_use = os.open(regions / "gone", os.O_RDWR)
        mapped = mmap.mmap(in_use, 8 * MIB)
        (regions / "gone").unlink()
        before = service.daemon_pid()
        os.kill(before, signal.SIGKILL)
        wait_until("another daemon answers", lambda: service.answers() and service.daemon_pid() != before)
        wait_until("its tree is there", lambda: _is_there(regions))
        with pytest.raises(OSError, match=r".") as caught:
            os.pwrite(in_use, b"lost", 0)
            os.fsync(in_use)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED), "said, not swallowed"
        mapped.close()
        with suppress(OSError):  # ENOTCONN
            os.close(in_use)
        assert os.listdir(regions) == ["kept"], "an unlinked one is freed"
        assert (regions / "kept").read_bytes() == data
        assert (regions / "kept").stat().st_mode & 0o777 == 0o640
        assert service.status()["regions"][0]["size_bytes"] == 8 * MIB


def _is_there(path: Path) -> bool:
    try:
        return path.is_dir() and bool(os.listdir(path))
    except OSError:
        return False


# ---- every named moment, and random ones (support/region_deaths.c) ----

_CRASH_POINTS = (
    *("REGION_CREATED", "REGION_STORED", "REGION_SETTLED_ONE", "REGION_WRITTEN", "REGION_RESIZED", "REGION_UNLINKED"),
    *("WRITEBACK_COLLECTED", "WRITEBACK_WRITTEN", "WRITEBACK_SETTLED_ONE", "CLIENT_DEAD"),
    *("DRAIN_STORED", "DRAIN_SETTLED_ONE", "DRAIN_EMPTY", "DRAIN_REMOVED"),
)


@pytest.fixture(scope="module")
def region_deaths(tmp_path_factory: pytest.TempPathFactory) -> str:
    """tests/support/region_deaths.c, built."""
    return build_drive(tmp_path_factory.mktemp("region_deaths") / "region_deaths", name="region_deaths")


def _deaths(program: str, tmp_path: Path, *arguments: object) -> int:
    argv = [program, "--spill", str(tmp_path / "spill"), *map(str, arguments)]
    result = subprocess.run(argv, capture_output=True, check=False, text=True, timeout=100)
    assert result.returncode == 0, f"{' '.join(argv)}: status {result.returncode}\n{result.stderr}"
    return int(result.stdout.split()[0])


@pytest.mark.parametrize("calls", [(1, 3), pytest.param((2, 5, 8, 10, 15, 20), marks=pytest.mark.full)])
def test_every_crash_point(region_deaths: str, tmp_path: Path, calls: tuple[int, ...]) -> None:
    """Every byte is as before the operation that was cut off, or as after it."""
    for point in _CRASH_POINTS:
        died = [_deaths(region_deaths, tmp_path, "--crash", f"{point}:{call}", "--seed", call) for call in calls]
        assert sum(died) > 0, f"never came to {point}"


@pytest.mark.parametrize("deaths", [20, pytest.param(300, marks=pytest.mark.full)])
def test_deaths_at_random_moments(region_deaths: str, tmp_path: Path, deaths: int) -> None:
    """Two writers, the writer of the backends and a drain; each successor compares every byte."""
    assert _deaths(region_deaths, tmp_path, "--deaths", deaths) == deaths


def test_mapping_flushed_before_each_death(tmp_path: Path) -> None:
    """Through the kernel: what msync has returned for is there under each next daemon, most of it in the backend."""
    size, chance = 40 * MIB, random.Random(1)
    model = bytearray(size)
    with serving(tmp_path, more=_more(tmp_path).replace("64M", "16M")) as service:
        path = tmp_path / "fs/regions/mapped"
        path.touch()
        os.truncate(path, size)
        for _ in range(5):
            file = path.open("r+b")  # noqa: SIM115 -- it is in use when the daemon dies
            mapped = mmap.mmap(file.fileno(), size)
            for _ in range(3):
                place = chance.randrange(size - 8 * MIB)
                model[place : place + 8 * MIB] = mapped[place : place + 8 * MIB] = chance.randbytes(8 * MIB)
            mapped.flush()
            before = service.daemon_pid()
            os.kill(before, signal.SIGKILL)
            mapped.close()
            with suppress(OSError):  # ENOTCONN
                file.close()
            wait_until("another daemon answers", lambda: service.answers() and service.daemon_pid() != before)  # noqa: B023
            wait_until("its tree is there", lambda: _is_there(path.parent))
            with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == model
        assert service.status()["regions"][0]["spill_pages"] > 0


def test_users_have_their_own(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    with serving(tmp_path, more=_more(tmp_path, 'region_size = "16M"\n')) as service:
        regions = tmp_path / "fs/regions"
        (regions / "roots").write_bytes(b"x")
        (regions / "roots").chmod(0o600)

        def as_nobody(code: str) -> int:
            text = f"import os, sys\nos.umask(0o77)\ntry:\n  {code}\nexcept OSError as error:\n  sys.exit(error.errno)"
            return _run(text, user=65534, group=65534, extra_groups=()).returncode

        assert as_nobody(f"open('{regions}/roots')") == errno.EACCES
        assert as_nobody(f"os.unlink('{regions}/roots')") == errno.EPERM
        assert as_nobody(f"open('{regions}/own', 'wb').write(bytes(5000))") == 0
        own = (regions / "own").stat()
        assert (own.st_uid, own.st_mode & 0o777, own.st_size, own.st_blocks) == (65534, 0o600, 5000, 0)
        assert as_nobody(f"os.chown('{regions}/own', 0, -1)") == errno.EPERM
        assert as_nobody(f"os.truncate('{regions}/own', {16 * MIB + 1})") == errno.EDQUOT
        assert as_nobody(f"os.truncate('{regions}/own', {16 * MIB})") == 0
        assert as_nobody(f"fd = os.open('{regions}/two', 65, 384); os.write(fd, b'x'); os.fsync(fd)") == errno.EDQUOT
        assert {region["uid"] for region in service.status()["regions"]} == {0, 65534}
