"""What the text of an answer must look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """A grammar for the answer: exactly one of these. Names follow vLLM's.

    Attributes:
        json: a JSON schema, as an object or as text; True for any JSON.
        json_object: any JSON object.
        regex: a regular expression that the whole answer matches.
        choice: the answers there are.
        grammar: a context-free grammar in Lark or GBNF.
    """

    json: Mapping[str, Any] | str | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
