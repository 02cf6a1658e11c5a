"""Keeps special tokens that a user writes from taking effect in a rendered chat.

Before rendering, a mark (one character that occurs nowhere in the input) is put into user text after the first
character of every special token. What the template writes itself carries no mark, so after rendering a special token
that still reads as one is the template's. Removing the marks then gives the user's text back, also where the template
trimmed it, split it, repeated it or wrapped it in JSON. (A template that counts characters counts the marks too; of
user text without special tokens it sees no difference.)

Two edges need a mark as well: text that ends like the start of a special token, which the following text could
complete, and text that completes a start which the template writes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import Any

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class LiteralGuard:
    """Marks special tokens in text.

    Args:
        special_texts: spellings of the special tokens.
        template_texts: everything the template writes literally.
    """

    def __init__(self, special_texts: Iterable[str], template_texts: Iterable[str]) -> None:
        # A node maps a character to the next node; "" is there where a special token ends.
        self._root: dict[str, Any] = {}
        for special in special_texts:
            node = self._root
            for character in special:
                node = node.setdefault(character, {})
            node[""] = {}
        self._openings = [node for text in template_texts for node in self._unfinished(text)]

    def mark(self, value: Any, mark: str) -> Any:
        """`value` with the mark in all its strings; containers are rebuilt as lists and dicts."""
        if isinstance(value, str):
            return self._mark_text(value, mark)
        if isinstance(value, Mapping):
            return {self.mark(key, mark): self.mark(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, mark) for item in value]
        return value

    def _mark_text(self, text: str, mark: str) -> str:
        pieces = [mark] if any(self._walk(text, 0, node) is not None for node in self._openings) else []
        position = 0
        for index in self._candidates(text):
            if self._walk(text, index, self._root) is not None:
                pieces.append(text[position : index + 1] + mark)
                position = index + 1
        pieces.append(text[position:])
        return "".join(pieces)

    def _candidates(self, text: str) -> list[int]:
        found = []
        for character in self._root:
            index = text.find(character)
            while index >= 0:
                found.append(index)
                index = text.find(character, index + 1)
        return sorted(found)

    def _walk(self, text: str, index: int, node: dict[str, Any]) -> dict[str, Any] | None:
        """The node where a special token, or the text, ends; None if the text goes another way."""
        while "" not in node and index < len(text):
            if text[index] not in node:
                return None
            node = node[text[index]]
            index += 1
        return node

    def _unfinished(self, text: str) -> list[dict[str, Any]]:
        """Nodes where a special token stands half written at the end of `text`."""
        ends = (self._walk(text, index, self._root) for index in self._candidates(text))
        return [node for node in ends if node is not None and "" not in node]


def unused_character(source: str) -> str:
    """A private-use character that does not occur in `source`, drawn at random."""
    while True:
        character = chr(_PRIVATE_USE.start + secrets.randbelow(len(_PRIVATE_USE)))
        if character not in source:
            return character
