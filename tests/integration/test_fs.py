# SPDX-License-Identifier: MIT
"""`vswapd --fs`: the files as a shell uses them, and no mount left behind on any way out."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from support.limited import MIB
from support.service import Service, program, serving, wait_until

if TYPE_CHECKING:
    from pathlib import Path

_BATCH = '[[group]]\nname = "batch"\nlimit = "64M"\n'


def _fs(directory: Path) -> tuple[Path, str]:
    """(where it is mounted, its line of the configuration)."""
    return directory / "fs", f'fs = "{directory}/fs"\n'


def _shell(text: str, cwd: Path) -> str:
    return subprocess.run(["sh", "-ec", text], cwd=cwd, check=True, capture_output=True, text=True).stdout


def _as_nobody(code: str) -> int:
    """The errno of a program of an unprivileged user; 0: it worked."""
    text = f"import os, sys\ntry:\n  {code}\nexcept OSError as error:\n  sys.exit(error.errno)"
    return subprocess.run([sys.executable, "-Ic", text], check=False, user=65534, group=65534).returncode


def _assert_tiers_are_true(client: Path) -> None:
    """Counted slot by slot they are the sums that the map keeps, if nothing moves between the two."""
    for _ in range(200):
        status = (client / "status").read_text()
        header, *lines = (client / "tiers").read_text().splitlines()
        if status == (client / "status").read_text():
            break
        time.sleep(0.02)
    else:
        pytest.fail("pages move all the time")
    sums = {name: int(value.removesuffix(" kB")) for name, value in re.findall(r"(\w+):\t(\d+ kB)", status)}
    rows = {name: (int(swapped), int(kept)) for name, swapped, kept in (line.split("\t") for line in lines)}
    backends = [row for name, row in rows.items() if name.startswith("backends/")]
    assert header.split("\t") == ["Tier", "Swapped_kB", "Kept_kB"]
    assert (rows["zero"], rows["same"]) == ((sums["Zero"], 0), (sums["SameFilled"], 0))
    assert (rows["pool"][0], sum(swapped for swapped, _ in backends)) == (sums["Pool"], sums["Spill"])
    assert rows["pool"][1] + sum(kept for _, kept in backends) == sums["Kept"]
    assert sums["Pool"] + sums["Spill"] > 0


def test_files_as_a_shell_uses_them(tmp_path: Path) -> None:
    where, line = _fs(tmp_path)
    with serving(tmp_path, _BATCH, more=line) as service, program(service, "batch") as pid:
        client = where / "clients" / str(pid)
        assert _shell("ls", where).split() == ["backends", "clients", "groups", "pressure", "regions", "stat", "swaps"]
        assert _shell("find . -type f | wc -l", where).strip() == "13"
        swapped = next(text for text in _shell("cat status", client).splitlines() if text.startswith("Swapped:"))
        assert int(swapped.split()[1]) > 16 * 1024
        _assert_tiers_are_true(client)
        _shell("echo 128M > limit", where / "groups/batch")
        assert _shell("cat limit", client) == f"{128 * MIB}\n"
        _shell("echo 1 > pagein", client)
        assert "Swapped:\t0 kB" in _shell("cat status", client)
        _shell("echo 1 > pageout; dd if=status bs=1 status=none | cmp - status", client)
        assert "Swapped:\t0 kB" not in _shell("cat status", client)
        assert service.group("batch")["limit_bytes"] == 128 * MIB

        for path, text, number in (
            ("groups/batch/limit", "1M", errno.EINVAL),
            ("groups/batch/limit", "x", errno.EINVAL),
            ("groups/batch/status", "1", errno.EACCES),
            ("swaps", "1", errno.EACCES),
        ):
            with pytest.raises(OSError, match=r".") as caught:
                (where / path).write_text(text)
            assert caught.value.errno == number, path
        with pytest.raises(PermissionError):
            (client / "pageout").read_text()
        with pytest.raises(FileNotFoundError):
            (where / "clients/1").stat()
        with pytest.raises(PermissionError):
            (client / "limit").chmod(0o666)
        (where / "regions/own").touch()
        for command, said in (
            ("echo > new", "Operation not permitted"),
            ("mkdir regions/directory", "Operation not permitted"),
            ("rmdir groups/batch", "Operation not permitted"),
            ("mkfifo regions/fifo", "Operation not permitted"),
            ("ln -s own regions/link", "Operation not permitted"),
            ("ln regions/own regions/link", "Operation not permitted"),
            ("mv regions/own regions/other", "Operation not permitted"),
            ("rm swaps", "Operation not permitted"),
            ("truncate --size 0 swaps", "Permission denied"),
            ("cat backends/9/status", "No such file or directory"),
        ):
            result = subprocess.run(["sh", "-c", command], cwd=where, check=False, capture_output=True, text=True)
            assert (result.returncode != 0, said in result.stderr) == (True, True), f"{command}: {result.stderr}"


def test_swaps_is_read_by_parsers_of_proc_swaps(tmp_path: Path) -> None:
    where, line = _fs(tmp_path)
    with serving(tmp_path, more=line):
        # util-linux reads the file that LIBMOUNT_SWAPS names where it would read /proc/swaps.
        command = ["swapon", "--show=NAME,TYPE,SIZE,USED", "--noheadings", "--raw", "--bytes"]
        environment = {**os.environ, "LIBMOUNT_SWAPS": str(where / "swaps")}
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        for_data = 1024 * MIB // 32 * 31  # the rest is left to compaction
        assert result.stdout.split() == [f"{tmp_path}/spill", "file", str(for_data), "0"]


def test_backend_is_emptied_by_a_write(tmp_path: Path) -> None:
    """What was on it comes to another; nobody is kept waiting."""
    where, line = _fs(tmp_path)
    backend = where / "backends/0"
    more = f'pool = "1M"\n[[backend]]\npath = "{tmp_path}/other"\nsize = "1G"\npriority = -5\n'
    with serving(tmp_path, _BATCH + more, more=line) as service, program(service, "batch"):
        wait_until("pages are on disk", lambda: "Live:\t0 kB" not in (backend / "status").read_text())
        (backend / "priority").write_text("-3\n")
        assert [text.split()[-1] for text in (where / "swaps").read_text().splitlines()] == ["Priority", "-3", "-5"]
        for name in ("priority", "drain"):
            assert _as_nobody(f"open('{backend}/{name}', 'w')") == errno.EACCES
        _shell("echo 1 > drain", backend)
        wait_until("it is gone", lambda: not backend.exists())
        [other] = service.status()["backends"]
        assert (other["path"], other["live_bytes"] > 0) == (f"{tmp_path}/other", True)
        wait_until("the log says so", lambda: "swapoff done" in service.log.read_text())


def test_others_may_look_at_the_whole_and_at_nothing_else(tmp_path: Path) -> None:
    where, line = _fs(tmp_path)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    with serving(tmp_path, _BATCH, more=line) as service, program(service, "batch") as pid:
        assert _as_nobody(f"open('{where}/swaps').read()") == 0
        for path in (f"clients/{pid}/status", "groups/batch/status"):
            assert _as_nobody(f"open('{where}/{path}').read()") == errno.EACCES
        assert _as_nobody(f"open('{where}/groups/batch/limit', 'w')") == errno.EACCES
        service.write(_BATCH + "owner = 65534\n", line)
        service.reload()
        wait_until("the owner may", lambda: _as_nobody(f"open('{where}/groups/batch/limit').read()") == 0)
        assert _as_nobody(f"open('{where}/groups/batch/limit', 'w').write('96M')") == 0
        assert service.group("batch")["limit_bytes"] == 96 * MIB


def _mounts() -> list[str]:
    return [part.mountpoint for part in psutil.disk_partitions(all=True)]


def test_nothing_stays_mounted(tmp_path: Path) -> None:
    where, line = _fs(tmp_path)
    service = Service(tmp_path)
    service.write("", line)
    service.start()
    assert str(where) in _mounts()
    in_use = os.open(where / "swaps", os.O_RDONLY)
    service.stop()
    with contextlib.suppress(OSError):  # ENOTCONN: nobody hears of the close
        os.close(in_use)
    wait_until("it is unmounted", lambda: str(where) not in _mounts())
    service.start()
    assert (where / "swaps").read_text().startswith("Filename")
    service.stop()
    assert str(where) not in _mounts()


def test_successor_of_a_daemon_shows_the_tree_again(tmp_path: Path) -> None:
    where, line = _fs(tmp_path)
    with serving(tmp_path, _BATCH, more=line) as service, program(service, "batch") as pid:
        (where / "groups/batch/limit").write_text("48M")
        before = service.daemon_pid()
        os.kill(before, signal.SIGKILL)
        wait_until("another daemon answers", lambda: service.answers() and service.daemon_pid() != before)
        wait_until("its tree is there", lambda: _reads(where / "swaps"))
        assert _mounts().count(str(where)) == 1
        assert (where / "groups/batch/limit").read_text() == f"{48 * MIB}\n", "not that of the file"
        assert (where / f"clients/{pid}/status").exists()
        service.write(_BATCH.replace("64M", "96M"), line)
        service.reload()
        wait_until("it follows a reload", lambda: service.group("batch")["limit_bytes"] == 96 * MIB)


def _reads(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:  # ENOTCONN: of the daemon before
        return False


def test_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    where, line = _fs(tmp_path)
    (where / "something").mkdir(parents=True)
    service = Service(tmp_path)
    service.write("", line)
    with pytest.raises(AssertionError, match="it is not an empty directory; name another with --fs"):
        service.start()


def test_tree_that_somebody_unmounts_does_not_end_the_daemon(tmp_path: Path) -> None:
    where, line = _fs(tmp_path)
    with serving(tmp_path, more=line) as service:
        # -z: the daemon itself looks at its mount once, after it has begun to answer, and it is busy for so long.
        subprocess.run(["fusermount3", "-u", "-z", str(where)], check=True)
        wait_until("the log says so", lambda: "unmounted by somebody else" in service.log.read_text())
        assert service.answers()
