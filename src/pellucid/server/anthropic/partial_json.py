"""What a JSON object says that was cut short."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_TOKEN = re.compile(
    r'[ \t\n\r]*(?P<token>[{}\[\]:,]|"(?:[^"\\]|\\.)*"|(?:true|false|null)\b|(?P<number>-?\d[\d.eE+-]*))', re.DOTALL
)


class _Brackets(NamedTuple):
    """Open brackets, the innermost first."""

    closing: str
    outer: _Brackets | None


def read_partial_object(text: str) -> dict[str, Any]:
    """The object that `text` is; of one that was cut short the members that were complete, empty if it is no object.

    A number at the very end is not complete: more digits might have followed.
    """
    for candidate in (text, _closed(text)):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


def _closed(text: str) -> str:
    """`text` up to the end of its last complete value, with what was open there closed."""
    open_at_end: _Brackets | None = None
    brackets: _Brackets | None = None
    end, position, previous = 0, 0, ""
    while match := _TOKEN.match(text, position):
        token, position = match["token"], match.end()
        is_value = False
        if token in "{[":
            brackets = _Brackets("}" if token == "{" else "]", brackets)
            is_value = True
        elif token in "}]":
            if brackets is None or brackets.closing != token:
                break
            brackets = brackets.outer
            is_value = True
        elif token not in ":,":
            is_number_at_end = match["number"] is not None and position == len(text)
            is_item = brackets is not None and brackets.closing == "]"
            is_value = (previous == ":" or is_item) and not is_number_at_end
        if is_value:
            end, open_at_end = position, brackets
        previous = token
    closing = ""
    while open_at_end is not None:
        closing += open_at_end.closing
        open_at_end = open_at_end.outer
    return text[:end] + closing
