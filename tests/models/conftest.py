# SPDX-License-Identifier: MIT
"""The parts under test, compiled once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.parts.build import PartsLibrary, build
from support.parts.check import ModelCheck
from support.parts.remote import RemotePart

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def parts_library(tmp_path_factory: pytest.TempPathFactory) -> PartsLibrary:
    return build(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def check_model(parts_library: PartsLibrary) -> Iterator[ModelCheck]:
    part = RemotePart(parts_library)
    yield ModelCheck(part)
    part.close()
