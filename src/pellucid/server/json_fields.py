"""Reads of a request body's parts. Every refusal names the part by its path, such as `messages[2].content[0].text`.

`null` is as good as leaving a field out.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from pellucid.core.errors import MAX_PARAM_CHARACTERS, InvalidRequestError
from pellucid.core.validation import refusal, shown
from pellucid.tokenizer.tokenizer import check_text

Neutral: TypeAlias = Mapping[str, tuple[object, ...]]
NOTHING: Neutral = MappingProxyType({})


def read_object(path: str, value: Any) -> dict[str, Any]:
    """The fields of an object that are not null.

    Raises:
        InvalidRequestError: it is not an object.
    """
    if not isinstance(value, Mapping):
        raise refusal(path, value, "an object")
    return {name: field for name, field in value.items() if field is not None}


def read_schema(path: str, value: Any) -> dict[str, Any]:
    """An object of fields that are not ours, as it is.

    Raises:
        InvalidRequestError: it is not an object.
    """
    if not isinstance(value, dict):
        raise refusal(path, value, "a JSON schema, an object")
    return value


def read_list(path: str, value: Any, what: str = "a list") -> list[Any]:
    """A list.

    Raises:
        InvalidRequestError: it is not `what`.
    """
    if not isinstance(value, list):
        raise refusal(path, value, what)
    return value


def read_string(path: str, value: Any) -> str:
    """A string.

    Raises:
        InvalidRequestError: it is none, or holds half a character (a lone surrogate).
    """
    if not isinstance(value, str):
        raise refusal(path, value, "a string")
    check_text(value, path)
    return value


def read_choice(path: str, value: Any, choices: Collection[str]) -> str:
    """One of `choices`.

    Raises:
        InvalidRequestError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise refusal(path, value, " or ".join(f'"{choice}"' for choice in choices))
    return value


def required(path: str, fields: Mapping[str, Any], name: str) -> Any:
    """The field `name` of the object at `path`; "" is the body itself.

    Raises:
        InvalidRequestError: it is missing.
    """
    if name not in fields:
        raise InvalidRequestError(f"{join(path, name)} is missing", param=join(path, name))
    return fields[name]


def check_fields(path: str, fields: Mapping[str, Any], known: Collection[str], neutral: Neutral = NOTHING) -> None:
    """Refuse the fields of the object at `path` that are not known.

    Args:
        known: fields that are read elsewhere.
        neutral: fields that are not supported, with the values that ask for nothing.

    Raises:
        InvalidRequestError: `param` is the path of the field.
    """
    for name, value in fields.items():
        if name in neutral:
            check_neutral(join(path, name), value, neutral[name])
        elif name not in known:
            close = difflib.get_close_matches(name[:MAX_PARAM_CHARACTERS], [*known, *neutral], n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            where = f"a field of {path}" if path else "a parameter of this endpoint"
            raise InvalidRequestError(f"{shown(name)} is not {where}{hint}", param=join(path, name))


def check_neutral(path: str, value: Any, neutral: Collection[Any]) -> None:
    """Raises InvalidRequestError unless `value` is one of those that ask for nothing."""
    if not any(isinstance(value, bool) == isinstance(each, bool) and value == each for each in neutral):
        found = f" of {shown(value)}" if neutral else ""
        raise InvalidRequestError(f"{path}{found} is not supported: leave it out", param=path)


def join(path: str, name: str) -> str:
    """The path of the field `name` of the object at `path`."""
    return f"{path}.{name}" if path else name
