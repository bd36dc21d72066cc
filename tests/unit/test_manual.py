# SPDX-License-Identifier: MIT
"""Man pages and completion: nothing that a parser knows is missing in them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.limited import need_program
from vswapd import cli, daemon, settings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

_ROOT = Path(__file__).parents[2]
_PAGES = sorted((_ROOT / "man").iterdir())


def _rendered(name: str) -> str:
    """As one reads it, in one line."""
    command = [need_program("mandoc"), "-Tascii", str(_ROOT / "man" / name)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return " ".join(re.sub(r".\x08", "", result.stdout).split())


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of a parser and all below it."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for below in action.choices.values():
                yield from _actions(below)


def _documented(parser: argparse.ArgumentParser) -> set[str]:
    """What a page has to have: long options, and the names of verbs and of what they choose from."""
    words = set()
    for action in _actions(parser):
        words |= {option for option in action.option_strings if option.startswith("--")}
        words |= set(map(str, action.choices or ()))
    return words


@pytest.mark.parametrize("page", _PAGES, ids=[page.name for page in _PAGES])
def test_page_is_clean(page: Path) -> None:
    command = [need_program("mandoc"), "-Tlint", "-Wwarning", str(page)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_there_is_a_page_for_everything() -> None:
    assert [page.name for page in _PAGES] == ["libvswap.3", "vswapctl.1", "vswapd.8", "vswapd.conf.5"]
    build = (_ROOT / "meson.build").read_text(encoding="utf-8")
    assert all(f"'{page.name}'" in build for page in _PAGES), "what is not installed is not read"


@pytest.mark.parametrize(("page", "parser"), [("vswapctl.1", cli.make_parser()), ("vswapd.8", daemon._parser())])
def test_every_option_is_documented(page: str, parser: argparse.ArgumentParser) -> None:
    text = _rendered(page)
    missing = [word for word in _documented(parser) if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)]
    assert not missing


def test_every_key_is_documented() -> None:
    page = (_ROOT / "man/vswapd.conf.5").read_text(encoding="utf-8")
    for table, keys in settings.TABLES.items():
        section = page.partition(f"{table}]")[2].partition(".Ss")[0]
        found = re.findall(r"^\.It Cm (\w+)", page, re.MULTILINE)
        for key in keys:
            assert key.name in found
            text = section.partition(f".It Cm {key.name} ")[2].partition(".It Cm")[0] or page
            assert ("Em Reload" in text) or not key.reloads, key.name
    documented = set(re.findall(r"^\.It Cm (\w+)", page, re.MULTILINE))
    assert documented == {key.name for keys in settings.TABLES.values() for key in keys}


def test_example_of_the_configuration_page_is_valid(tmp_path: Path) -> None:
    page = (_ROOT / "man/vswapd.conf.5").read_text(encoding="utf-8")
    example = page.partition(".Bd -literal -offset indent\n")[2].partition(".Ed")[0]
    conf = tmp_path / "vswapd.conf"
    conf.write_text(example.replace('"alice"', '"root"'), encoding="utf-8")
    loaded = settings.load(str(conf))
    assert (len(loaded.backends), len(loaded.groups)) == (1, 1)


def test_environment_of_the_library_is_documented() -> None:
    source = (_ROOT / "csrc/preload.c").read_text(encoding="utf-8")
    variables = set(re.findall(r'"(VSWAP\w*)"', source))
    assert len(variables) >= 4
    page = (_ROOT / "man/libvswap.3").read_text(encoding="utf-8")
    assert {name for name in variables if f"Ev {name}" not in page} == set()


# ---- completion ----


def _complete(script: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    text = f'. {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_vswapctl; printf "%s\\n" "${{COMPREPLY[@]}}"'
    command = ["bash", "-c", text, "bash", *words]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_bash_completes_verbs_options_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    assert _complete(script, "vswapctl", "st") == {"status"}
    assert {"--limit", "--group", "--spill"} <= _complete(script, "vswapctl", "run", "--")
    assert _complete(script, "vswapctl", "config", "") >= {"check", "show", "example"}
    assert _complete(script, "vswapctl", "status", "--w") == {"--watch"}


def test_zsh_script_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef vswapctl\n")
    assert all(f"_shtab_vswapctl_{verb.replace('-', '_')}_options" in script for verb in cli._VERBS)
