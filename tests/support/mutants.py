"""Defects put in on purpose, to show that a check catches them."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def mutant(function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """`function` with `old`, which its source must hold once, replaced by `new`."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__} holds {old!r} {source.count(old)} times"
    namespace = dict(function.__globals__)
    exec("from __future__ import annotations\n" + source.replace(old, new), namespace)
    changed: Callable[..., Any] = namespace[function.__name__]
    return changed
