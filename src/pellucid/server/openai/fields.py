"""What the bodies of all endpoints have in common: names that are known, what null means, who asks, of which model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pellucid.core.validation import INT32_MAX, check_integer, refusal
from pellucid.server.json_fields import NOTHING, Neutral, check_fields, read_choice, read_object, read_string
from pellucid.server.served_model import ServedModel

LABELS = frozenset(("user", "safety_identifier", "prompt_cache_key"))
"""Strings that name the caller; no answer depends on them."""
CACHE_RETENTIONS = ("in_memory", "24h")
"""Of `prompt_cache_retention`: how long prefixes stay cached at most. They stay as long as there is room."""
CACHE_OPTIONS: dict[str, tuple[str, ...]] = {"mode": ("implicit", "explicit"), "ttl": ("30m",)}
"""Of `prompt_cache_options`: what OpenAI charges for. Here prefixes are cached without being told, and for nothing."""
MAX_METADATA = 16
"""Entries."""
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512


def without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """`null` is as good as leaving a parameter out."""
    return {name: value for name, value in body.items() if value is not None}


def check_names(body: Mapping[str, Any], known: Collection[str], neutral: Neutral = NOTHING) -> None:
    """Refuse what is not known by its name.

    Args:
        known: parameters that are checked elsewhere.
        neutral: parameters that are not supported, with the values that ask for nothing.

    Raises:
        InvalidRequestError: `param` is the name.
    """
    for name in LABELS & body.keys():
        read_string(name, body[name])
    check_fields("", body, {*known, *LABELS}, neutral)


def model_name(body: Mapping[str, Any], model: ServedModel) -> str:
    """The name that the body has for the model, or the model's own.

    Raises:
        InvalidRequestError: it is not a string.
        ModelNotFoundError: it is another model's.
    """
    name = read_string("model", body.get("model", model.names[0]))
    model.check_name(name)
    return name


def priority(body: Mapping[str, Any]) -> int:
    """Lower runs first. Raises InvalidRequestError where it is not an integer in range."""
    return check_integer("priority", body.get("priority", 0), -INT32_MAX, INT32_MAX)


def cache_salt(body: Mapping[str, Any]) -> str:
    """Prefix-cache entries are shared only between requests of the same salt. Raises InvalidRequestError where it is
    not a string."""
    return read_string("cache_salt", body.get("cache_salt", ""))


def check_cache_options(body: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError where `prompt_cache_options` are not CACHE_OPTIONS."""
    fields = read_object("prompt_cache_options", body.get("prompt_cache_options", {}))
    check_fields("prompt_cache_options", fields, CACHE_OPTIONS)
    for name, value in fields.items():
        read_choice(f"prompt_cache_options.{name}", value, CACHE_OPTIONS[name])


def metadata(body: Mapping[str, Any]) -> dict[str, str]:
    """What the caller notes of the request; no answer depends on it. Raises InvalidRequestError where it is not a few
    short strings."""
    fields = read_object("metadata", body.get("metadata", {}))
    what = (
        f"up to {MAX_METADATA} strings of up to {MAX_METADATA_VALUE} characters, by names of up to {MAX_METADATA_KEY}"
    )
    is_sound = len(fields) <= MAX_METADATA and all(
        len(name) <= MAX_METADATA_KEY and isinstance(value, str) and len(value) <= MAX_METADATA_VALUE
        for name, value in fields.items()
    )
    if not is_sound:
        raise refusal("metadata", body["metadata"], what)
    return fields
