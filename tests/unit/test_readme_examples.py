# SPDX-License-Identifier: MIT
"""What support/readme.py takes for a command and for the same output."""

from __future__ import annotations

import pytest

from support.readme import Example, examples_of, shape_of

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


@pytest.mark.parametrize(("shown", "real"), [("3 pages out", "3 pages in"), ("limit 3 MiB", "limit none")])
def test_words_may_not(shown: str, real: str) -> None:
    assert shape_of(shown) != shape_of(real)
