"""JSON from outside, read strictly: what two readers could understand differently is refused (RFC 8259, RFC 7493)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from pellucid.core.errors import MAX_PARAM_CHARACTERS, InvalidRequestError
from pellucid.core.validation import shown

BODY = "body"
"""What errors name as the parameter where a document as a whole is at fault."""
MAX_DEPTH = 128
"""Levels of nesting: so few that whoever walks through a document may recurse."""
MAX_CONTAINERS = 50_000
"""Objects and arrays. More of them keep Python's garbage collector busy, and everything else waiting, for too long."""
MAX_DIGITS = 4300
"""Of an integer: the most that Python reads, since the time that takes grows with their square."""

_BOM = b"\xef\xbb\xbf"
_OUTSIDE_OF_STRINGS = b"[]{}"
_OTHER_BYTES = bytes(byte for byte in range(256) if byte not in _OUTSIDE_OF_STRINGS + b'"')
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SUSPECT_ESCAPE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class _Refused:
    """Stands in a decoded document for a number that cannot be taken."""

    reason: str


def decode_json(data: bytes, name: str, *, any_characters: bool = False) -> Any:
    """What `data`, UTF-8, says.

    Runs mostly without the loops of Python, and gives other threads a turn after every object and number: they wait at
    most 25 ms for 2 MiB, of which a million escapes in one string take the longest.

    Args:
        name: what `data` is, for messages: "the body".
        any_characters: whether strings may hold, by escapes, half a surrogate pair or a NUL.

    Raises:
        InvalidRequestError: it is not JSON; a key comes twice; it has a number that JSON or a float64 does not know,
            an integer of more than 4300 digits, or a character that it may not; it has a byte order mark; it nests
            deeper than 128 levels, or has more than 50,000 objects and arrays. `param` names the field, or is "body".
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _at_fault(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from None
    if data.startswith(_BOM):
        raise _at_fault(f"{name} begins with a byte order mark: leave it out")
    _check_nesting(data, name)
    refused: list[_Refused] = []

    def refuse(reason: str) -> _Refused:
        refused.append(_Refused(reason))
        return refused[-1]

    def read_integer(digits: str) -> int | _Refused:
        if len(digits) > MAX_DIGITS:
            return refuse(f"has an integer of {len(digits):,} digits; at most {MAX_DIGITS:,} are read")
        return int(digits)

    def read_float(digits: str) -> float | _Refused:
        number = float(digits)
        return (
            number if math.isfinite(number) else refuse(f"has {shown(digits)}, which is beyond the range of a float64")
        )

    def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise InvalidRequestError(
                    f"{name} is not valid JSON: the key {shown(key)} comes twice in one object", param=key
                )
            fields[key] = value
        return fields

    try:
        document = json.loads(
            text,
            parse_int=read_integer,
            parse_float=read_float,
            parse_constant=lambda constant: refuse(f"is not valid JSON: {constant} is no number of JSON's"),
            object_pairs_hook=read_object,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}"
        raise _at_fault(f"{name} is not valid JSON: {error.msg} at {place}") from None
    if refused or (not any_characters and _SUSPECT_ESCAPE.search(data)):
        _check_values(document, name, any_characters)
    return document


def _at_fault(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=BODY)


def _check_nesting(data: bytes, name: str) -> None:
    """Before anything is built, in a few passes over the bytes."""
    # A backslash is followed by one more character. Once \\ and \" are gone, every quote opens or closes a string.
    kept = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHER_BYTES)
    # Most strings have no bracket; two quotes side by side can go, since what is outside of strings stays outside.
    brackets = b"".join(kept.replace(b'""', b"").split(b'"')[::2])
    depth = max(accumulate(map(_STEPS.__getitem__, brackets[: 2 * MAX_CONTAINERS])), default=0)
    if depth > MAX_DEPTH:
        raise _at_fault(f"{name} nests too deeply: over {MAX_DEPTH} levels")
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise _at_fault(f"{name} has over {MAX_CONTAINERS:,} objects and arrays, more than are taken")


def _check_values(document: Any, name: str, any_characters: bool) -> None:
    for path, value in _values(document):
        where = path or name
        if isinstance(value, _Refused):
            raise InvalidRequestError(f"{where} {value.reason}", param=path or BODY)
        if isinstance(value, str) and not any_characters:
            if _SURROGATE.search(value):
                raise InvalidRequestError(
                    f"{where} holds a lone surrogate, which is not valid Unicode text", param=path or BODY
                )
            if "\0" in value:
                raise InvalidRequestError(f"{where} holds a NUL character (U+0000)", param=path or BODY)


def _values(document: Any) -> Iterator[tuple[str, Any]]:
    """Whatever is no object or array, keys included, each with its path as in `messages[0].content`."""
    waiting = [("", document)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                inner = f"{path}.{key}" if path else key
                yield path, key
                waiting.append((inner[:MAX_PARAM_CHARACTERS], item))
        elif isinstance(value, list):
            waiting.extend((f"{path}[{place}]"[:MAX_PARAM_CHARACTERS], item) for place, item in enumerate(value))
        else:
            yield path, value
