"""Checks of values that come from outside. Every refusal names the parameter, the range and what was found."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from pellucid.core.errors import InvalidRequestError

INT32_MAX = 2**31 - 1
UINT64_MAX = 2**64 - 1
_SHOWN_CHARACTERS = 80


def shown(value: object) -> str:
    """`value` for an error message, in at most 80 characters."""
    if isinstance(value, int) and abs(value) > 10**20:  # Python may refuse to print such a number at all
        return "an integer beyond 10^20"
    text = repr(_beginning(value, _SHOWN_CHARACTERS + 1))
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _beginning(value: object, room: int) -> object:
    """As much of a document's `value` as fills `room` characters: to write a million of them would take long, and hold
    up every thread meanwhile."""
    if isinstance(value, (str, bytes)):
        return value[: max(0, room)]
    if type(value) is dict:
        fields = {}
        for name, item in value.items():
            if room <= 0:
                break
            name = _beginning(name, room)
            fields[name] = _beginning(item, room - len(repr(name)))
            room -= len(repr(name)) + len(repr(fields[name]))
        return fields
    if type(value) in (list, tuple):
        items: list[object] = []
        for item in value:  # type: ignore[attr-defined]
            if room <= 0:
                break
            items.append(_beginning(item, room))
            room -= len(repr(items[-1]))
        return items if type(value) is list else tuple(items)
    return value


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


@dataclass(frozen=True, slots=True)
class RealRange:
    """The numbers from `low` to `high`; without `low` itself where it is `open`."""

    low: float
    high: float
    open: bool = False

    def __str__(self) -> str:
        if self.open:
            return f"a number over {self.low:g} and up to {self.high:g}"
        return f"a number from {self.low:g} to {self.high:g}"

    def check(self, name: str, value: Any) -> float:
        """`value` as a float.

        Raises:
            InvalidRequestError: it is not a number in this range.
        """
        number = check_real(name, value, str(self))
        # Samplers compute in float32, where 1e-308 is 0.
        if not self.low <= number <= self.high or (self.open and _in_float32(number) == self.low):
            raise refusal(name, value, str(self))
        return number


def _in_float32(number: float) -> float:
    """`number`, which no float32 overflows, rounded to the nearest one. numpy would take most of a command's start."""
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded


def check_strings(name: str, value: Any, max_count: int, max_characters: int) -> tuple[str, ...]:
    """A string, several, or None, as a tuple of strings.

    Raises:
        InvalidRequestError: there are more than `max_count`, or one is not a string of 1 to `max_characters`.
    """
    range_text = f"up to {max_count} strings of 1 to {max_characters} characters each"
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise refusal(name, value, range_text)
    strings = tuple(value)
    if len(strings) > max_count:
        raise InvalidRequestError(f"{name} must be {range_text}, not {len(strings)} of them", param=name)
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= max_characters:
            raise refusal(name, string, range_text)
    return strings


def check_token_ids(name: str, value: Any, max_count: int) -> tuple[int, ...]:
    """Token ids as a tuple.

    Raises:
        InvalidRequestError: there are more than `max_count`, or one is not an integer from 0.
    """
    range_text = f"up to {max_count} token ids"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise refusal(name, value, range_text)
    ids = tuple(value)
    if len(ids) > max_count:
        raise InvalidRequestError(f"{name} must be {range_text}, not {len(ids)} of them", param=name)
    return tuple(check_integer(name, token_id, 0, INT32_MAX) for token_id in ids)


def check_boolean(name: str, value: Any) -> bool:
    """`value`, which must be a bool.

    Raises:
        InvalidRequestError: it is anything else.
    """
    if not isinstance(value, bool):
        raise refusal(name, value, "true or false")
    return value
