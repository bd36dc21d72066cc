# SPDX-License-Identifier: MIT
"""check — run a state machine over a part, for as long as is asked for.

By default the examples are always the same ones. VSWAP_HYPOTHESIS=long takes new ones, and many more;
a failure then prints how to repeat it.
"""

from __future__ import annotations

import faulthandler
import os
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.parts.remote import RemotePart

_COMMON = settings(
    deadline=None,  # other processes have the machine too
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
_PROFILES = {
    "": settings(_COMMON, derandomize=True, max_examples=60, stateful_step_count=30),
    "long": settings(_COMMON, max_examples=3000, stateful_step_count=80),
}


class ModelCheck:
    """Each machine is made with the part that it is about, not open yet."""

    def __init__(self, part: RemotePart) -> None:
        self._part = part
        self._profile = _PROFILES[os.environ.get("VSWAP_HYPOTHESIS", "")]

    def __call__(self, machine: Callable[[RemotePart], RuleBasedStateMachine]) -> None:
        # pytest's watchdog looks at frames that change meanwhile, and a search takes as long as it takes.
        # What hangs in C is noticed in RemotePart.
        faulthandler.cancel_dump_traceback_later()
        # It takes any callable that makes a machine, and says so everywhere but in its annotation.
        run_state_machine_as_test(lambda: machine(self._part), settings=self._profile)  # type: ignore[arg-type]
