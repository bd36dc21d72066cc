# SPDX-License-Identifier: MIT
"""vswapd.conf: what is read, every mistake with its file and line, and `vswapctl config`."""

from __future__ import annotations

import os
import re
import tomllib
from typing import TYPE_CHECKING

import pytest

from vswapd import cli, config, settings
from vswapd.settings import BackendSettings, GroupSettings, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

_GIB = 1 << 30


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Path of a file that is not there yet; its drop-ins go to conf.d."""
    path = tmp_path / "vswapd.conf"
    (tmp_path / "vswapd.conf.d").mkdir()
    return path


def _mistakes(path: Path) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        settings.load(str(path))
    return [str(mistake).removeprefix(str(path.parent) + "/") for mistake in caught.value.mistakes]


def test_nothing_is_all_defaults(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "DEFAULT_PATH", str(conf))
    loaded = settings.load()
    assert (loaded.daemon.socket, loaded.daemon.log_level) == ("/run/vswapd/vswapd.sock", "info")
    assert (loaded.backends, loaded.groups) == ((), ())
    assert loaded.daemon.host_reserve == config.HOST_RESERVE_AUTO
    assert _mistakes(conf) == ["vswapd.conf: cannot be read: No such file or directory; name a file that is there"]


def test_values(conf: Path) -> None:
    conf.write_text("""
[daemon]
log_level = "debug"
pool_capacity = "1.5GiB"
host_reserve = "1G"
[[backend]]
path = "/a"
size = 1048576
[[backend]]
path = "/b"
priority = -3
encrypt = true
[[group]]
name = "batch"
limit = "4G"
pool = "1G"
owner = 1000
""")
    loaded = settings.load(str(conf))
    assert loaded.daemon.pool_capacity == 3 * _GIB // 2
    assert loaded.daemon.host_reserve == _GIB
    assert loaded.backends == (BackendSettings("/a", 1 << 20, 0), BackendSettings("/b", 0, -3, encrypt=True))
    assert loaded.groups == (GroupSettings("batch", 4 * _GIB, _GIB, True, 0, True, 1000),)


def test_drop_ins_replace_key_by_key_in_order(conf: Path) -> None:
    conf.write_text('[daemon]\nlog_level = "debug"\nevictors = 1\n[[group]]\nname = "g"\nlimit = "1G"\n')
    drop_ins = conf.parent / "vswapd.conf.d"
    (drop_ins / "20.conf").write_text("[daemon]\nevictors = 3\n")
    (drop_ins / "10.conf").write_text('[daemon]\nevictors = 2\n[[group]]\nname = "g"\npool = "64M"\n')
    (drop_ins / "30.txt").write_text("not read")
    loaded = settings.load(str(conf))
    assert (loaded.daemon.log_level, loaded.daemon.evictors) == ("debug", 3)
    assert loaded.groups == (GroupSettings("g", _GIB, 64 << 20, True, 0, True, 0),)
    shown = settings.format_settings(loaded)
    assert re.search(rf"^evictors = 3 +# {drop_ins}/20.conf:2$", shown, re.MULTILINE)
    assert re.search(rf'^limit = "1G" +# {conf}:6$', shown, re.MULTILINE)
    assert re.search(r"^io_threads = false +# default$", shown, re.MULTILINE)
    conf.write_text(shown)
    assert settings.load(str(conf)) == loaded, "what is shown can be read again"


@pytest.mark.parametrize(
    ("text", "mistakes"),
    [
        ("[daemon]\nx = 1\n", ["2: unknown key 'x'; known are socket, log_level"]),
        ("y = 1\n[deamon]\n", ["1: unknown table or key 'y'; known are [daemon], [[backend]]", "2: unknown table"]),
        ("[daemon]\nhost_reserve = 'much'\n", ['2: host_reserve = "much" is wrong: neither "auto" nor a size']),
        ("[daemon]\n\nlog_level = 'loud'\n", ['3: log_level = "loud" is wrong: not one of debug, info']),
        ("[daemon]\nmetrics = '0.0.0.0:80'\n", ['2: metrics = "0.0.0.0:80" is wrong: neither the path']),
        ("[daemon]\nmetrics = '127.0.0.1'\n", ['2: metrics = "127.0.0.1" is wrong: neither the path']),
        ("[daemon]\nsocket = 'x'\n", ['2: socket = "x" is wrong: not an absolute path']),
        ("[daemon]\nevictors = true\n", ["2: evictors = true is wrong: not a whole number from 0 to 64"]),
        ("[daemon]\nevictors = 65\n", ["2: evictors = 65 is wrong"]),
        ("[daemon]\nio_threads = 1\n", ["2: io_threads = 1 is wrong: neither true nor false; for example io_thr"]),
        ("[daemon]\npool_capacity = '1Q'\n", ["2: pool_capacity = \"1Q\" is wrong: '1Q' is not a size"]),
        ("[daemon]\npool_capacity = -1\n", ["2: pool_capacity = -1 is wrong: not a size"]),
        ("[daemon\n", ["1: not TOML: "]),
        ("[daemon]\nlog_level = info\n", ["2: not TOML: "]),
        ("[daemon]\nsocket = '''\n", ["3: not TOML: "]),
        ("daemon = 1\n", ["1: 'daemon' is not a table; write [daemon]"]),
        ("[backend]\npath = '/a'\n", ["1: 'backend' is not an array of tables; write [[backend]]"]),
        ("[[backend]]\nsize = 0\n", ["1: [[backend]] without 'path'; add path"]),
        ("[[backend]]\npath = '/a'\nsize = '1K'\n", ['3: size = "1K" is wrong: too little']),
        ("[[backend]]\npath = '/a'\nrate = '1K'\n", ['3: rate = "1K" is wrong: too little']),
        ("[[group]]\nname = 'g'\n", ["2: [[group]] without 'limit'; add for example limit = "]),
        ("[[group]]\nname = 'g'\nlimit = '1M'\n", ['3: limit = "1M" is wrong: not from 16M to']),
        ("[[group]]\nname = 'a b'\nlimit = '1G'\n", ['2: name = "a b" is wrong: not a name']),
        ("[[group]]\nname = 'g'\nlimit = '1G'\npool = '1G'\n", ["4: pool is not less than limit"]),
        ("[[group]]\nname = 'g'\nlimit = '1G'\nowner = 'no such'\n", ['4: owner = "no such" is wrong: no such user']),
        (
            "[daemon]\nevictors = [\n  1,\n]\n[[group]]\nname = 'g'\n[[group]]\nname = 'h'\nlimt = '1G'\n",
            ["4: evictors = [1] is wrong", "9: unknown key 'limt'; known are name, limit, pool, writeback, spill"],
        ),
    ],
)
def test_mistakes_have_their_line(conf: Path, text: str, mistakes: list[str]) -> None:
    conf.write_text(text)
    found = _mistakes(conf)
    assert len(found) == len(mistakes), found
    for line, expected in zip(found, mistakes, strict=True):
        assert line.startswith(f"vswapd.conf:{expected}"), line
        assert "; " in line, "no remedy"


def test_mistakes_of_all_files_at_once(conf: Path) -> None:
    conf.write_text("[daemon]\nx = 1\n")
    (conf.parent / "vswapd.conf.d/a.conf").write_bytes(b"# \n# \xff\n")
    (conf.parent / "vswapd.conf.d/b.conf").write_text("[\n")
    assert [line.split(": ")[0] for line in _mistakes(conf)] == ["vswapd.conf.d/a.conf:2", "vswapd.conf.d/b.conf:1"]
    (conf.parent / "vswapd.conf.d/a.conf").unlink()
    (conf.parent / "vswapd.conf.d/b.conf").write_text("[daemon]\ny = 1\n")
    assert [line.split(": ")[0] for line in _mistakes(conf)] == ["vswapd.conf:2", "vswapd.conf.d/b.conf:2"]


def test_every_key_has_a_valid_default_and_example() -> None:
    for table, keys in settings.TABLES.items():
        for key in keys:
            assert key.meaning.endswith("."), key.name
            value = tomllib.loads(f"x = {key.example}")["x"]
            if (table, key.name) != ("group", "owner"):  # a user this machine need not have
                key.check(value)
            if key.default is not None:
                key.check(key.default)


def test_example_sets_nothing_and_uncommented_everything(conf: Path) -> None:
    text = settings.format_example()
    assert tomllib.loads(text) == {}
    everything = "\n".join(re.sub(r"^#(?=\S)", "", line) for line in text.splitlines()).replace('"alice"', '"root"')
    conf.write_text(everything)
    loaded = settings.load(str(conf))
    assert [len(entries) for _, entries in loaded.tables] == [len(keys) for keys in settings.TABLES.values()]


# ---- command ----


def test_config_check(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf.write_text("[daemon]\n")
    assert cli.main(["config", "check", str(conf)]) == 0
    assert capsys.readouterr().out == f"{conf} and its drop-ins: no mistake\n"
    conf.write_text("[daemon]\nx = 1\ny = 2\n")
    assert cli.main(["config", "check", str(conf)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{conf}:2", f"{conf}:3"]


def test_config_show_and_example(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf.write_text('[daemon]\nlog_level = "error"\n')
    assert cli.main(["config", "show", str(conf)]) == 0
    assert f'log_level = "error"                              # {conf}:2\n' in capsys.readouterr().out
    assert cli.main(["config", "example"]) == 0
    assert capsys.readouterr().out == settings.format_example()
    assert cli.main(["config", "example", str(conf)]) == 2


def test_unreadable_file_is_a_mistake(conf: Path) -> None:
    os.mkdir(conf)
    assert _mistakes(conf) == ["vswapd.conf: cannot be read: Is a directory; run as root, or chmod it"]
