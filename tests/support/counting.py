"""Costs as counts, which a busy machine does not change."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def count_steps(function: Callable[[], object]) -> int:
    """Lines of Python run, and functions called in Python and in C.

    The garbage collector waits: it would run finalizers of anything at a moment of its own.
    """
    steps = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += event in ("line", "call")
        return trace

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal steps
        steps += event == "c_call"

    old_trace, old_profile, collects = sys.gettrace(), sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.settrace(old_trace)
        sys.setprofile(old_profile)
        if collects:
            gc.enable()
    return steps


class Clock:
    """A clock that moves by a millisecond each time it is read; put in the place of `time.monotonic`.

    Attributes:
        readings: how often it was read.
    """

    def __init__(self) -> None:
        self.readings = 0

    def monotonic(self) -> float:
        self.readings += 1
        return self.readings / 1000
