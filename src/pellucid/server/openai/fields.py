"""What the bodies of all endpoints have in common: names that are known, what null means, who asks, of which model."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pellucid.core.errors import MAX_PARAM_CHARACTERS, InvalidRequestError
from pellucid.core.validation import INT32_MAX, check_integer, refusal, shown
from pellucid.server.served_model import ServedModel

LABELS = frozenset(("user", "safety_identifier", "prompt_cache_key"))
"""Strings that name the caller; no answer depends on them."""


def without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """`null` is as good as leaving a parameter out."""
    return {name: value for name, value in body.items() if value is not None}


def check_names(
    body: Mapping[str, Any], known: Collection[str], neutral: Mapping[str, tuple[object, ...]] | None = None
) -> None:
    """Refuse what is not known by its name.

    Args:
        known: parameters that are checked elsewhere.
        neutral: parameters that are not supported, with the values that ask for nothing.

    Raises:
        InvalidRequestError: `param` is the name.
    """
    neutral = neutral or {}
    for name, value in body.items():
        if name in LABELS:
            if not isinstance(value, str):
                raise refusal(name, value, "a string")
        elif name in neutral:
            if not any(_equal(value, allowed) for allowed in neutral[name]):
                raise InvalidRequestError(f"{name} is not supported: leave it out", param=name)
        elif name not in known:
            close = difflib.get_close_matches(name[:MAX_PARAM_CHARACTERS], [*known, *LABELS, *neutral], n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise InvalidRequestError(f"{shown(name)} is not a parameter of this endpoint{hint}", param=name)


def _equal(value: object, allowed: object) -> bool:
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


def required(body: Mapping[str, Any], name: str) -> Any:
    """Raises InvalidRequestError where it is missing."""
    if name not in body:
        raise InvalidRequestError(f"{name} is missing", param=name)
    return body[name]


def model_name(body: Mapping[str, Any], model: ServedModel) -> str:
    """The name that the body has for the model, or the model's own.

    Raises:
        InvalidRequestError: it is not a string.
        ModelNotFoundError: it is another model's.
    """
    name = body.get("model", model.names[0])
    if not isinstance(name, str):
        raise refusal("model", name, "a string")
    model.check_name(name)
    return name


def priority(body: Mapping[str, Any]) -> int:
    """Lower runs first. Raises InvalidRequestError where it is not an integer in range."""
    return check_integer("priority", body.get("priority", 0), -INT32_MAX, INT32_MAX)


def cache_salt(body: Mapping[str, Any]) -> str:
    """Prefix-cache entries are shared only between requests of the same salt. Raises InvalidRequestError where it is
    not a string."""
    salt = body.get("cache_salt", "")
    if not isinstance(salt, str):
        raise refusal("cache_salt", salt, "a string")
    return salt
