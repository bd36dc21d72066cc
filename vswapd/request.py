# SPDX-License-Identifier: MIT
"""request — what is in a control request, checked, and what is answered when it cannot be carried out."""

from __future__ import annotations

from typing import Any

Request = dict[str, Any]
Reply = dict[str, Any]


class RequestError(Exception):
    """A request cannot be carried out. `code` is for programs, text and remedy for people."""

    def __init__(self, code: str, text: str, remedy: str) -> None:
        super().__init__(text)
        self.code = code
        self.remedy = remedy

    def reply(self) -> Reply:
        """The answer to the request."""
        return {"ok": False, "code": self.code, "error": str(self), "remedy": self.remedy}


def take_int(request: Request, key: str, low: int, high: int, default: int | None = None) -> int:
    """A whole number of a request, checked."""
    value = request.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(
            "bad-request", f"'{key}' is not a number from {low} to {high}", "correct the request"
        )
    return value


def take_bool(request: Request, key: str) -> bool:
    """A flag of a request; absent: false."""
    value = request.get(key, False)
    if not isinstance(value, bool):
        raise RequestError("bad-request", f"'{key}' is neither true nor false", "correct the request")
    return value


def take_text(request: Request, key: str) -> str:
    """A string of a request; absent: ''."""
    value = request.get(key, "")
    if not isinstance(value, str):
        raise RequestError("bad-request", f"'{key}' is not a string", "correct the request")
    return value
