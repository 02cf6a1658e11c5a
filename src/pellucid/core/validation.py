"""Checks of values that come from outside. Every refusal names the parameter, the range and what was found."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from pellucid.core.errors import InvalidRequestError

INT32_MAX = 2**31 - 1
UINT64_MAX = 2**64 - 1


def shown(value: object) -> str:
    """`value` for an error message, in at most 80 characters."""
    if isinstance(value, int) and abs(value) > 10**20:  # Python may refuse to print such a number at all
        return "an integer beyond 10^20"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def refusal(name: str, value: object, range_text: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {range_text}, not {shown(value)}", param=name)


def check_integer(name: str, value: Any, low: int, high: int, range_text: str | None = None) -> int:
    """`value` as an int. A bool is not an integer.

    Raises:
        InvalidRequestError: it is not an integer from `low` to `high`.
    """
    range_text = range_text or f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise refusal(name, value, range_text)
    number = int(value)
    if not low <= number <= high:
        raise refusal(name, number, range_text)
    return number


def check_real(name: str, value: Any, range_text: str) -> float:
    """`value` as a finite float; the caller checks the range that `range_text` tells.

    Raises:
        InvalidRequestError: it is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise refusal(name, value, range_text)
    try:
        number = float(value)
    except OverflowError:
        raise refusal(name, value, range_text) from None
    if not math.isfinite(number):
        raise refusal(name, value, range_text)
    return number


def check_boolean(name: str, value: Any) -> bool:
    """`value`, which must be a bool.

    Raises:
        InvalidRequestError: it is anything else.
    """
    if not isinstance(value, bool):
        raise refusal(name, value, "true or false")
    return value
