# SPDX-License-Identifier: MIT
"""failure — what ends a command: one line that says what is wrong, and what to do."""

from __future__ import annotations

STATUS_FAILURE = 1
STATUS_USAGE = 2
STATUS_NOT_EXECUTABLE = 126
STATUS_NOT_FOUND = 127


class Failure(Exception):  # noqa: N818 -- what it is to the user
    """`text; remedy` for people, `status` for the shell."""

    def __init__(self, text: str, remedy: str = "", status: int = STATUS_FAILURE) -> None:
        super().__init__(f"{text}; {remedy}" if remedy else text)
        self.text = text
        self.remedy = remedy
        self.status = status
