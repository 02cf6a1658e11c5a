"""Typed reads of a model's description: GGUF metadata or a config.json, both of which may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pellucid.core.errors import ModelFileError, UnsupportedModelError

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Fields:
    """A mapping whose values are checked as they are read.

    Args:
        values: the description.
        prefix: put before every name, as in `llama.` for GGUF.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def has(self, name: str) -> bool:
        return self._values.get(self._prefix + name) is not None

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int) -> int:
        """An integer in [minimum, maximum].

        Raises:
            ModelFileError: missing without a default, not an integer, or out of range.
            UnsupportedModelError: an array, one value a layer.
        """
        value = self._read(name, default)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self._mistyped(name, value, "an integer")
        if not minimum <= value <= maximum:
            raise self._malformed(name, f"is {value}; expected {minimum} to {maximum}")
        return int(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above zero that a float32 holds.

        Raises:
            ModelFileError: missing without a default, not a number or out of that range.
            UnsupportedModelError: an array, one value a layer.
        """
        value = self._read(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise self._mistyped(name, value, "a number")
        if not SMALLEST <= value <= LARGEST:
            raise self._malformed(name, f"is {value}; expected a number from {SMALLEST:.0e} to {LARGEST:.0e}")
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._read(name, default)
        if not isinstance(value, str):
            raise self._mistyped(name, value, "text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._read(name, default)
        if not isinstance(value, bool | np.bool_):
            raise self._mistyped(name, value, "true or false")
        return bool(value)

    def raw(self, name: str) -> Any:
        """The value unchecked, None where it is missing."""
        return self._values.get(self._prefix + name)

    def refuse_other_than(self, known: frozenset[str], neutral: Mapping[str, Any]) -> None:
        """Refuse a field that may change the arithmetic in a way this family does not know.

        Args:
            known: names that the family reads.
            neutral: further names, each with the one value that changes nothing.

        Raises:
            UnsupportedModelError: another name, or another value of a neutral one.
        """
        for full_name, value in self._values.items():
            name = full_name.removeprefix(self._prefix)
            if not full_name.startswith(self._prefix) or value is None or name in known:
                continue
            if name not in neutral:
                raise UnsupportedModelError(f"{full_name} = {_shown(value)} is not supported", param=full_name)
            if value != neutral[name]:
                raise UnsupportedModelError(
                    f"{full_name} = {_shown(value)} is not supported; only {neutral[name]} is", param=full_name
                )

    def _read(self, name: str, default: Any) -> Any:
        value = self._values.get(self._prefix + name)
        if value is None:
            value = default
        if value is None:
            raise self._malformed(name, "is missing")
        return value

    def _mistyped(self, name: str, value: Any, expected: str) -> ModelFileError | UnsupportedModelError:
        if isinstance(value, list | np.ndarray):
            full_name = self._prefix + name
            return UnsupportedModelError(f"{full_name} differs by layer, which is not supported", param=full_name)
        return self._malformed(name, f"is {_shown(value)}; expected {expected}")

    def _malformed(self, name: str, what: str) -> ModelFileError:
        return ModelFileError(f"{self._prefix}{name} {what}", param=self._prefix + name)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
