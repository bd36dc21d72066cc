# SPDX-License-Identifier: MIT
"""settings — vswapd.conf: what can stand in it, and what stands in it.

One TOML file and its drop-ins, FILE.d/*.conf in order of their names: a key of a later file replaces
that of an earlier one; [[backend]] of a path and [[group]] of a name are merged key by key. TABLES is the
only description of the keys: checks, defaults, `vswapctl config` and a test of vswapd.conf(5) follow it.
Every mistake is found at once, with file and line. config.py has the constants nobody sets.
"""

from __future__ import annotations

import glob
import ipaddress
import os
import pwd
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vswapd import config, paths, wire
from vswapd.log import LEVELS
from vswapd.sizes import format_size_argument, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Place = tuple[str | int, ...]  # ("backend", 0, "path")

DEFAULT_PATH = "/etc/vswapd/vswapd.conf"
_REQUIRED = None  # as a default


# ---- values ----


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("not a string with something in it")
    return value


def _absolute(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError("not an absolute path in quotes")
    return value


def _absolute_or_none(value: object) -> str:
    return "" if value == "" else _absolute(value)


def _size(value: object) -> int:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError('not a size: write a number of bytes, or "256M" in quotes')


def _limit(value: object) -> int:
    size = _size(value)
    if not config.LIMIT_BYTES_MIN <= size <= config.LIMIT_BYTES_MAX:
        low, high = map(format_size_argument, (config.LIMIT_BYTES_MIN, config.LIMIT_BYTES_MAX))
        raise ValueError(f"not from {low} to {high}")
    return size


def _spill_size(value: object) -> int:
    size = _size(value)
    if 0 < size < config.SPILL_BYTES_MIN:
        raise ValueError("too little: give at least 1M, or 0 for what fits")
    return size


def _rate(value: object) -> int:
    rate = _size(value)
    if 0 < rate < config.RATE_BYTES_MIN:
        raise ValueError("too little: give at least 1M, or 0 for no limit")
    return rate


def _reserve(value: object) -> int:
    if value == "auto":
        return config.HOST_RESERVE_AUTO
    try:
        return _size(value)
    except ValueError:
        raise ValueError('neither "auto" nor a size') from None


def _number(low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"not a whole number from {low} to {high}")
        return value

    return check


def _flag(value: object) -> bool:
    if value is True or value is False:
        return value
    raise ValueError("neither true nor false")


def _level(value: object) -> str:
    if value not in LEVELS:
        raise ValueError(f"not one of {', '.join(LEVELS)}")
    return str(value)


def check_metrics(value: object) -> str:
    """A socket's absolute path, or HOST:PORT of the loopback interface; '': none."""
    text = str(value)
    if not text or text.startswith("/"):
        return text
    host, _, port = text.rpartition(":")
    try:
        is_loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("neither the path of a Unix socket nor a loopback address and port")
    return text


def _group_name(value: object) -> str:
    if not isinstance(value, str) or not value or not wire.is_group_name(value):
        raise ValueError("not a name of up to 31 letters, digits, '.', '_', '-'")
    return value


def _user(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32:
        return value
    try:
        return pwd.getpwnam(_text(value)).pw_uid
    except KeyError:
        raise ValueError("no such user: give a name or a number of one") from None


# ---- keys ----


@dataclass(frozen=True)
class Key:
    """One key. `default` and `example` are as written in the file; `check` gives what the daemon uses."""

    name: str
    check: Callable[[object], Any]
    default: object
    unit: str
    meaning: str
    example: str
    reloads: bool = False  # a change takes effect on SIGHUP


TABLES: dict[str, tuple[Key, ...]] = {
    "daemon": (
        Key(
            "socket",
            _absolute,
            paths.SYSTEM_SOCKET,
            "path",
            "Where clients and vswapctl connect.",
            '"/run/vswapd/vswapd.sock"',
        ),
        Key("log_level", _level, "info", "level", f"What is logged: {', '.join(LEVELS)}.", '"debug"', reloads=True),
        Key(
            "metrics",
            check_metrics,
            "",
            "address",
            "Serve metrics for Prometheus on this Unix socket or loopback port; empty: nowhere.",
            '"127.0.0.1:9841"',
        ),
        Key(
            "fs",
            _absolute_or_none,
            "",
            "path",
            "Show the daemon's state as files, and take writes to them, in this directory; empty: nowhere.",
            '"/run/vswapd/fs"',
        ),
        Key(
            "region_limit",
            _limit,
            "1G",
            "bytes",
            "RAM that the regions of one user may cost, compressed; the rest of them is spilled.",
            '"256M"',
        ),
        Key(
            "region_size",
            _size,
            "64G",
            "bytes",
            "Sum of the sizes of one user's regions, whatever is in them.",
            '"1T"',
        ),
        Key(
            "pool_capacity",
            _size,
            0,
            "bytes",
            "Most that all compressed pools together can ever hold; 0: as much as there is RAM.",
            '"32G"',
        ),
        Key("evictors", _number(0, 64), 0, "threads", "Threads that swap out; 0: one for each CPU, up to 4.", "2"),
        Key(
            "accept_threshold",
            _number(10, 100),
            config.ACCEPT_PERCENT,
            "percent",
            "Writeback that has begun, as a pool is at its cap, goes on until the pool takes this part of it.",
            "80",
        ),
        Key(
            "recompress_age",
            _number(0, 86400),
            config.RECOMPRESS_AGE_SECONDS,
            "seconds",
            "Pages that were out for so long are compressed again, with zstd, when RAM is short; 0: never.",
            "120",
        ),
        Key(
            "host_reserve",
            _reserve,
            "auto",
            "bytes",
            "Below this much available memory of the machine, groups are swapped out below their limits; 0: never.",
            '"1G"',
            reloads=True,
        ),
        Key(
            "tiers",
            _flag,
            False,
            "",
            "Move pages between backends of different priority by their use.",
            "true",
            reloads=True,
        ),
        Key("io_threads", _flag, False, "", "Read spill files with threads even where io_uring works.", "true"),
    ),
    "backend": (
        Key(
            "path",
            _absolute,
            _REQUIRED,
            "path",
            "Spill file (made if absent) or block device.",
            '"/dev/nvme1n1"',
            reloads=True,
        ),
        Key("size", _spill_size, 0, "bytes", "Its size; 0: of a device all, of a file what fits.", '"64G"'),
        Key(
            "priority",
            _number(-32768, 32767),
            0,
            "",
            "Higher ones are filled first; equal ones at the same time.",
            "10",
            reloads=True,
        ),
        Key("encrypt", _flag, False, "", "Encrypt what is written, under a key that is only in memory.", "true"),
        Key(
            "rate",
            _rate,
            0,
            "bytes/s",
            "Write back no more than this to it; 0: no limit.",
            '"100M"',
            reloads=True,
        ),
    ),
    "group": (
        Key("name", _group_name, _REQUIRED, "name", "For vswapctl run --group.", '"batch"', reloads=True),
        Key(
            "limit",
            _limit,
            _REQUIRED,
            "bytes",
            "RAM that all its processes together may cost.",
            '"4G"',
            reloads=True,
        ),
        Key(
            "pool",
            _size,
            0,
            "bytes",
            "Most of it that the compressed pool takes; 0: adapts.",
            '"1G"',
            reloads=True,
        ),
        Key("writeback", _flag, True, "", "Write its pages to backends when its pool is full.", "false", reloads=True),
        Key(
            "spill",
            _spill_size,
            0,
            "bytes",
            "Most that its pages take on backends; 0: no limit.",
            '"16G"',
            reloads=True,
        ),
        Key("recompress", _flag, True, "", "Compress its old pages again (recompress_age).", "false", reloads=True),
        Key("owner", _user, "root", "user", "Who else than root may run programs in it.", '"alice"', reloads=True),
    ),
}
_NAME_OF = {"backend": "path", "group": "name"}  # arrays of tables, and what tells their entries apart


# ---- what they come to ----


@dataclass(frozen=True)
class DaemonSettings:
    """[daemon]"""

    socket: str
    log_level: str
    metrics: str
    fs: str
    region_limit: int
    region_size: int
    pool_capacity: int
    evictors: int
    accept_threshold: int
    recompress_age: int
    host_reserve: int
    tiers: bool
    io_threads: bool


@dataclass(frozen=True)
class BackendSettings:
    """One [[backend]]; size 0: as fits; rate in bytes a second, 0: no limit."""

    path: str
    size: int
    priority: int
    encrypt: bool = False
    rate: int = 0


@dataclass(frozen=True)
class GroupSettings:
    """One [[group]]; sizes in bytes, `owner` a user's number."""

    name: str
    limit: int
    pool: int
    writeback: bool
    spill: int
    recompress: bool
    owner: int


@dataclass(frozen=True)
class Entry:
    """A key as it stands: its value as written, as used, and where it was set ('' : the default)."""

    written: object
    value: Any
    origin: str


@dataclass(frozen=True)
class Settings:
    """Everything, checked. `tables`: (table, entries) in order, for `vswapctl config show`."""

    daemon: DaemonSettings
    backends: tuple[BackendSettings, ...]
    groups: tuple[GroupSettings, ...]
    tables: tuple[tuple[str, dict[str, Entry]], ...] = field(compare=False, default=())


@dataclass(frozen=True)
class Mistake:
    """Something wrong in a file; line 0: with all of it."""

    file: str
    line: int
    text: str
    remedy: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.text}; {self.remedy}"


class SettingsError(Exception):
    """The files cannot be used: every mistake in them."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__("\n".join(map(str, mistakes)))
        self.mistakes = mistakes


# ---- files ----


@dataclass(frozen=True)
class _File:
    path: str
    document: dict[str, Any]
    lines: dict[Place, int]

    def at(self, *place: str | int) -> int:
        """The line where something stands."""
        return self.lines.get(place, 0)


def _walk(value: object, place: Place = ()) -> Iterator[Place]:
    if place:
        yield place
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _walk(part, (*place, name))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _walk(part, (*place, index))


def _lines_of(text: str) -> dict[Place, int]:
    """On which line each thing ends: tomllib does not say, but the first lines that have it do."""
    found: dict[Place, int] = {}
    so_far = ""
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        so_far += line
        try:
            document = tomllib.loads(so_far)
        except tomllib.TOMLDecodeError:
            continue  # within a value of several lines
        for place in _walk(document):
            found.setdefault(place, number)
    return found


def _read(path: str) -> _File:
    """OSError; SettingsError."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        text = data.decode()
        return _File(path, tomllib.loads(text), _lines_of(text))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SettingsError([Mistake(path, line, "not UTF-8", "save it as UTF-8")]) from None
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).rpartition(" (at ")
        words = where.replace(",", "").rstrip(")").split()
        line = int(words[1]) if words[:1] == ["line"] else data.count(b"\n") + 1
        remedy = "write key = value, with text in quotes (https://toml.io)"
        raise SettingsError([Mistake(path, line, f"not TOML: {what or where}", remedy)]) from None


def _files_of(path: str, *, may_be_absent: bool) -> list[_File]:
    files, mistakes = [], []
    for name in [path, *sorted(glob.glob(os.path.join(glob.escape(path) + ".d", "*.conf")))]:
        try:
            files.append(_read(name))
        except FileNotFoundError as error:
            if name != path or not may_be_absent:
                mistakes.append(Mistake(name, 0, f"cannot be read: {error.strerror}", "name a file that is there"))
        except OSError as error:
            mistakes.append(Mistake(name, 0, f"cannot be read: {error.strerror}", "run as root, or chmod it"))
        except SettingsError as error:
            mistakes += error.mistakes
    if mistakes:
        raise SettingsError(mistakes)
    return files


# ---- checks ----


class _Reader:
    """Collects entries and mistakes over all files."""

    def __init__(self) -> None:
        self.daemon: dict[str, Entry] = {}
        self.arrays: dict[str, dict[str, dict[str, Entry]]] = {name: {} for name in _NAME_OF}
        self.mistakes: list[Mistake] = []

    def add_file(self, file: _File) -> None:
        for table, content in file.document.items():
            if table not in TABLES:
                known = ", ".join(f"[[{name}]]" if name in _NAME_OF else f"[{name}]" for name in TABLES)
                self._mistake(file, file.at(table), f"unknown table or key '{table}'", f"known are {known}")
            elif table not in _NAME_OF:
                if isinstance(content, dict):
                    self.daemon |= self._entries(file, (table,), content)
                else:
                    self._mistake(file, file.at(table), f"'{table}' is not a table", f"write [{table}]")
            elif isinstance(content, list) and all(isinstance(item, dict) for item in content):
                for index, item in enumerate(content):
                    self._add_item(file, (table, index), item)
            else:
                self._mistake(file, file.at(table), f"'{table}' is not an array of tables", f"write [[{table}]]")

    def _add_item(self, file: _File, place: Place, item: dict[str, Any]) -> None:
        table = str(place[0])
        entries = self._entries(file, place, item)
        name = _NAME_OF[table]
        if name in entries:
            self.arrays[table].setdefault(entries[name].value, {}).update(entries)
        elif name not in item:
            self._mistake(file, file.at(*place), f"[[{table}]] without '{name}'", f"add {name} = …")

    def _entries(self, file: _File, place: Place, content: dict[str, Any]) -> dict[str, Entry]:
        keys = {key.name: key for key in TABLES[str(place[0])]}
        entries = {}
        for name, written in content.items():
            line = file.at(*place, name)
            if name not in keys:
                self._mistake(file, line, f"unknown key '{name}'", f"known are {', '.join(keys)}")
                continue
            try:
                value = keys[name].check(written)
            except ValueError as error:
                text = f"{name} = {_toml(written)} is wrong: {error}"
                self._mistake(file, line, text, f"for example {name} = {keys[name].example}")
                continue
            entries[name] = Entry(written, value, f"{file.path}:{line}")
        return entries

    def complete(self, table: str, entries: dict[str, Entry]) -> dict[str, Entry]:
        """With defaults, in the order of TABLES."""
        complete = {}
        for key in TABLES[table]:
            if key.name in entries:
                complete[key.name] = entries[key.name]
            elif key.default is not _REQUIRED:
                complete[key.name] = Entry(key.default, key.check(key.default), "")
            else:
                path, _, line = next(iter(entries.values())).origin.rpartition(":")
                text = f"[[{table}]] without '{key.name}'"
                self.mistakes.append(Mistake(path, int(line), text, f"add for example {key.name} = {key.example}"))
        return complete

    def check(self) -> None:
        """SettingsError when there are mistakes so far."""
        if self.mistakes:
            raise SettingsError(self.mistakes)

    def check_group(self, entries: dict[str, Entry]) -> None:
        """What no key alone shows."""
        if entries["pool"].value >= entries["limit"].value:
            path, _, line = entries["pool"].origin.rpartition(":")
            self.mistakes.append(Mistake(path, int(line), "pool is not less than limit", "make it a part of it"))

    def _mistake(self, file: _File, line: int, text: str, remedy: str) -> None:
        self.mistakes.append(Mistake(file.path, line, text, remedy))


def _values(entries: dict[str, Entry]) -> dict[str, Any]:
    return {name: entry.value for name, entry in entries.items()}


def load(path: str | None = None) -> Settings:
    """The file at `path` (by default DEFAULT_PATH, which may be absent) and its drop-ins. SettingsError."""
    reader = _Reader()
    for file in _files_of(path or DEFAULT_PATH, may_be_absent=path is None):
        reader.add_file(file)
    reader.check()
    daemon = reader.complete("daemon", reader.daemon)
    arrays = {
        table: [reader.complete(table, entries) for entries in items.values()] for table, items in reader.arrays.items()
    }
    reader.check()
    for entries in arrays["group"]:
        reader.check_group(entries)
    reader.check()
    return Settings(
        DaemonSettings(**_values(daemon)),
        tuple(BackendSettings(**_values(entries)) for entries in arrays["backend"]),
        tuple(GroupSettings(**_values(entries)) for entries in arrays["group"]),
        (("daemon", daemon), *((table, entries) for table, items in arrays.items() for entries in items)),
    )


# ---- as text ----


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return str(value)


def format_settings(settings: Settings) -> str:
    """The effective configuration as one file, each key with where it was set."""
    lines = []
    for table, entries in settings.tables:
        lines.append(f"[[{table}]]" if table in _NAME_OF else f"[{table}]")
        for name, entry in entries.items():
            assignment = f"{name} = {_toml(entry.written)}"
            lines.append(f"{assignment:<48} # {entry.origin or 'default'}")
        lines.append("")
    return "\n".join(lines)


def format_example() -> str:
    """A file that says all there is to say and sets nothing: the one that is installed."""
    lines = [
        "# SPDX-License-Identifier: MIT",
        "#",
        "# vswapd.conf - see vswapd.conf(5). Nothing here is set: the lines show the keys with an example each.",
        "# Better than changing this file: put your own into vswapd.conf.d/NAME.conf.",
        "# After a change: vswapctl config check, then systemctl reload vswapd.",
        "",
    ]
    for table, keys in TABLES.items():
        lines.append(f"#[[{table}]]" if table in _NAME_OF else f"#[{table}]")
        for key in keys:
            default = "required" if key.default is _REQUIRED else f"default {_toml(key.default)}"
            notes = [default, *filter(None, [key.unit]), "reload" if key.reloads else "restart"]
            lines += [f"# {key.meaning} ({', '.join(notes)})", f"#{key.name} = {key.example}"]
        lines.append("")
    return "\n".join(lines)
