# SPDX-License-Identifier: MIT
"""What support/readme.py takes for a command and for the same output; and the messages that README explains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.readme import Example, examples_of, shape_of
from vswapd import events, records

_ROOT = Path(__file__).parents[2]

_TEXT = """
Text with `$ no command`.

```console
$ first --option  # why
12 pages
3 MiB

$ second
```

```python
$ not a command
```

```sh
# a comment
third
```
"""


def test_commands_and_their_output_are_found() -> None:
    assert examples_of(_TEXT) == [
        Example("first --option  # why", ("12 pages", "3 MiB")),
        Example("second"),
        Example("third"),
    ]


def test_output_without_command_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="begins with output"):
        examples_of("```console\nsomething\n```\n")


@pytest.mark.parametrize(
    ("shown", "real"),
    [
        ("swapped 12.3 MiB in 4 ms", "swapped 999 KiB in 1,234 µs"),
        ("spill     1G  50%", "spill 12M 3%"),
        ("/tmp/x7/spill 0 B", "/tmp/x12/spill 64 KiB"),
    ],
)
def test_numbers_and_units_may_differ(shown: str, real: str) -> None:
    assert shape_of(shown) == shape_of(real)


_TROUBLE = re.compile(r"^\| `([^`]*…[^`]*|[^`|]{12,})` \|", re.MULTILINE)


def _messages() -> list[list[str]]:
    """Those that the README explains, cut at each `…`."""
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Troubleshooting, by message")[2].partition("\n## ")[0]
    found = [message.split("…") for message in _TROUBLE.findall(section)]
    assert len(found) == section.count("\n| `")
    return found


def test_messages_that_are_explained_are_said() -> None:
    """All parts of each stand in the source, where `{…}` are names and figures."""
    texts = [path.read_text(encoding="utf-8") for path in (_ROOT / "vswapd").rglob("*.py")]
    source = re.sub(r'"\s*f?"', "", "\n".join(texts))  # literals that go on in the next line
    source = source.replace("{USERFAULTFD}", "/dev/userfaultfd").replace("{kind}", "tmpfs")
    parts = {part.strip(" ,;:") for message in _messages() for part in message}
    assert {part for part in parts if part not in source} == set()


def test_what_a_user_may_be_told_of_is_explained() -> None:
    kinds = [value for name, value in vars(records).items() if name.startswith("EVENT_")]
    assert len(kinds) >= 6
    for kind in kinds:
        notice = events.describe(records.Event(kind, 0, 4711, 1, 2, 3), None, "job")
        if notice.level in ("warning", "error"):
            explained = [re.compile(".*".join(map(re.escape, message))) for message in _messages()]
            assert any(message.match(notice.text) for message in explained), notice.text


@pytest.mark.parametrize(("shown", "real"), [("3 pages out", "3 pages in"), ("limit 3 MiB", "limit none")])
def test_words_may_not(shown: str, real: str) -> None:
    assert shape_of(shown) != shape_of(real)
