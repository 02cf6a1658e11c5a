"""Varied JSON schemas from a seed: nested objects, $ref, enums, patterns, formats, alternatives, arrays, ranges.

All are bounded, so that even a model of random weights comes to the end of an answer, and one that repeats itself too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import date
from typing import Any

Schema = dict[str, Any]

NAMES = (
    "name", "id", "title", "count", "price", "tags", "address", "created at", "is_active", "owner", "naïve", "größe",
    "日本", "a/b", "quote\"d", "back\\slash", "x-y", "$value", "émoji 😀", "_", "0", "tab\tbed",
)  # fmt: skip
PATTERNS = (
    "^[a-z]{1,8}$", "^[A-Z]{2}-[0-9]{3,5}$", "^(red|green|blue)$", "^\\+?[0-9]{6,12}$", "^[a-z0-9_]{3,16}$",
    "^#[0-9a-fA-F]{6}$", "^(?:[01][0-9]|2[0-3]):[0-5][0-9]$", "^[A-Za-z]+( [A-Za-z]+){0,2}$", "^v[0-9]+\\.[0-9]{1,2}$",
    "^[äöüß]{1,4}$", "^.{2,6}$", "^([ab]c?){1,5}$",
)  # fmt: skip
FORMATS = ("date", "time", "date-time", "ipv4", "ipv6", "uuid")
WORDS = ("alpha", "beta", "Gamma ray", "ñandú", "two words", "x", "", "😀", "tab\there", 'say "hi"', "c:\\dir", "null")


class SchemaMaker:
    """Makes one schema after another from `random.Random(seed)`."""

    def __init__(self, seed: int, max_depth: int = 4) -> None:
        self._random = random.Random(seed)
        self._max_depth = max_depth
        self._definitions: dict[str, Schema] = {}

    def make(self) -> Schema:
        """The next schema; at its root mostly an object."""
        self._definitions = {}
        schema = self._object(0) if self._random.random() < 0.8 else self._any(0)
        if self._definitions:
            schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": self._definitions, **schema}
        if self._random.random() < 0.3:
            schema["description"] = "made from a seed"
        return schema

    def _any(self, depth: int) -> Schema:
        leaves: list[Callable[[], Schema]] = [
            self._string, self._pattern, self._format, self._enum, self._const, self._integer, self._number,
            lambda: {"type": "boolean"}, lambda: {"type": "null"}, self._nullable, self._mixed_enum,
        ]  # fmt: skip
        nodes: list[Callable[[int], Schema]] = [
            self._object, self._object, self._array, self._tuple, self._any_of, self._one_of, self._all_of,
            self._reference, self._list, self._map,
        ]  # fmt: skip
        if depth >= self._max_depth or self._random.random() < 0.55:
            return self._random.choice(leaves)()
        return self._random.choice(nodes)(depth + 1)

    def _string(self) -> Schema:
        low = self._random.choice((0, 0, 1, 3))
        return {"type": "string", "minLength": low, "maxLength": low + self._random.randrange(1, 20)}

    def _pattern(self) -> Schema:
        return {"type": "string", "pattern": self._random.choice(PATTERNS), "maxLength": 24}

    def _format(self) -> Schema:
        schema: Schema = {"type": "string", "format": self._random.choice(FORMATS)}
        return schema | {"maxLength": 36}  # a time may have any number of digits

    def _enum(self) -> Schema:
        return {"type": "string", "enum": self._random.sample(WORDS, self._random.randrange(1, len(WORDS)))}

    def _mixed_enum(self) -> Schema:
        values = [None, True, False, 0, -7, 2.5, "s", [], [1, 2], {}, {"a": None}]
        return {"enum": self._random.sample(values, self._random.randrange(1, 6))}

    def _const(self) -> Schema:
        return {"const": self._random.choice((*WORDS, 3, None, True, [1, "two"], {"k": [0.5]}))}

    def _integer(self) -> Schema:
        low = self._random.choice((-1_000_000, -40, -1, 0, 0, 1, 7, 123))
        high = low + self._random.choice((0, 1, 9, 100, 5_000, 10**9))
        schema: Schema = {"type": "integer", "minimum": low, "maximum": high}
        shape = self._random.random()
        if shape < 0.2:
            return {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1}
        if shape < 0.35 and high - low >= 100:
            return schema | {"multipleOf": self._random.choice((2, 3, 5, 10, 25))}
        return schema

    def _number(self) -> Schema:
        """A multiple, since the digits of any other number may go on for ever."""
        low = self._random.choice((-2.5, 0, 0.25, 10))
        name = self._random.choice(("minimum", "exclusiveMinimum"))
        return {"type": "number", name: low, "maximum": low + self._random.choice((1.5, 99.75)), "multipleOf": 0.25}

    def _nullable(self) -> Schema:
        return {"type": ["string", "null"], "maxLength": self._random.randrange(1, 10)}

    def _array(self, depth: int) -> Schema:
        low = self._random.choice((0, 0, 1, 2))
        return {
            "type": "array",
            "items": self._any(depth),
            "minItems": low,
            "maxItems": low + self._random.randrange(0, 3),
        }

    def _tuple(self, depth: int) -> Schema:
        items = [self._any(depth) for _ in range(self._random.randrange(1, 4))]
        return {
            "type": "array",
            "prefixItems": items,
            "items": False,
            "minItems": self._random.randrange(len(items) + 1),
        }

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(NAMES, self._random.randrange(1, 6))
        return {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": [name for name in names if self._random.random() < 0.6],
            "additionalProperties": False,
        }

    def _map(self, depth: int) -> Schema:
        """Keys that the schema does not list; the same key may come twice, so none is asked for."""
        return {
            "type": "object",
            "patternProperties": {"^k[0-9]{1,2}$": self._any(depth)},
            "additionalProperties": False,
            "maxProperties": 3,
        }

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth) for _ in range(self._random.randrange(2, 4))]}

    def _one_of(self, depth: int) -> Schema:
        """Told apart by a constant."""
        kinds = self._random.sample(("circle", "square", "line"), 2)
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "of": self._any(depth)},
                    "required": ["kind", "of"],
                    "additionalProperties": False,
                }
                for kind in kinds
            ]
        }

    def _all_of(self, depth: int) -> Schema:
        first, second = self._random.sample(NAMES, 2)
        return {
            "allOf": [
                {"type": "object", "properties": {first: self._any(depth)}, "required": [first]},
                {"properties": {second: self._any(depth)}, "required": [second]},
            ],
            "properties": {first: True, second: True},
            "additionalProperties": False,
        }

    def _reference(self, depth: int) -> Schema:
        name = f"def{self._random.randrange(3)}"
        if name not in self._definitions:
            make = self._random.choice((self._object, self._array, self._any))
            self._definitions[name] = make(self._max_depth)  # which refers to nothing further
        return {"$ref": f"#/$defs/{name}"}

    def _list(self, depth: int) -> Schema:
        """Definitions that each refer to the next one: a linked list of up to three."""
        first = len(self._definitions)
        for number in range(first, first + 3):
            after = {"$ref": f"#/$defs/node{number + 1}"} if number < first + 2 else {"type": "null"}
            self._definitions[f"node{number}"] = {
                "type": "object",
                "properties": {"value": self._any(self._max_depth), "next": {"anyOf": [{"type": "null"}, after]}},
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/node{first}"}


def make_schemas(count: int, seed: int = 0) -> list[Schema]:
    """`count` schemas."""
    maker = SchemaMaker(seed)
    return [maker.make() for _ in range(count)]


def validate(text: str, schema: Schema) -> None:
    """Check an answer with the jsonschema package, formats included.

    Raises:
        ValueError: it is no JSON.
        jsonschema.ValidationError: it does not hold to `schema`.
    """
    import jsonschema

    formats = jsonschema.FormatChecker(("ipv4", "ipv6", "uuid"))
    formats.checks("date", ValueError)(_is_date)
    jsonschema.Draft202012Validator(schema, format_checker=formats).validate(json.loads(text))


def _is_date(value: object) -> bool:
    """RFC 3339 has a year 0000, which Python lacks; it is a leap year, as 2000 is."""
    return not isinstance(value, str) or date.fromisoformat(value.replace("0000-", "2000-", 1)) is not None
