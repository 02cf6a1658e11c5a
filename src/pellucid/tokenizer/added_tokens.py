"""Tokens that are found in the text as they stand, before byte pair encoding sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode White_Space
_WORD = re.compile(r"\w")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched literally.

    Attributes:
        special: it steers the model (end of turn, ...) and is matched only where the caller says so.
        lstrip, rstrip: it swallows the white space before or after it.
        single_word: it is matched only between non-word characters.
    """

    token_id: int
    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """`token` stands at text[start:end], swallowed white space included."""

    start: int
    end: int
    token: AddedToken


class AddedTokenMatcher:
    """Finds added tokens in text: the leftmost, of these the longest, without overlap.

    Args:
        plain: tokens that are always matched.
        load_special: gives the tokens that are matched only where the caller says so; called when first needed, because
            Gemma has over 6,000 and plain text needs none.
        extra_white_space: characters that count as white space besides Unicode's.
    """

    def __init__(
        self,
        plain: Sequence[AddedToken],
        load_special: Callable[[], Sequence[AddedToken]],
        *,
        extra_white_space: str = "",
    ) -> None:
        self._plain_tokens = plain
        self._load_special = load_special
        self._white_space = f"[{_WHITE_SPACE}{re.escape(extra_white_space)}]"

    @cached_property
    def special(self) -> Sequence[AddedToken]:
        """The tokens matched only where the caller says so."""
        return self._load_special()

    @cached_property
    def swallows(self) -> bool:
        """Whether some token takes in the white space next to it."""
        return any(token.lstrip or token.rstrip for token in (*self._plain_tokens, *self.special))

    @cached_property
    def _plain_trie(self) -> _Trie:
        return _Trie(self._plain_tokens, self._white_space)

    @cached_property
    def _trie(self) -> _Trie:
        return _Trie([*self._plain_tokens, *self.special], self._white_space)

    def matches(self, text: str, *, parse_special: bool) -> Iterator[Match]:
        """Matches in order; special tokens only if `parse_special`."""
        return (self._trie if parse_special else self._plain_trie).matches(text)


class _Trie:
    def __init__(self, tokens: Iterable[AddedToken], white_space: str) -> None:
        # A node maps a character to the next node, and "" to the token that ends there.
        self._root: dict[str, Any] = {}
        for token in tokens:
            if not token.text:
                continue
            node = self._root
            for character in token.text:
                node = node.setdefault(character, {})
            node[""] = token
        first = "".join(re.escape(character) for character in self._root)
        self._candidate = re.compile(f"[{first}]") if first else None
        self._space_after = re.compile(f"{white_space}*")
        self._space_before = re.compile(f"{white_space}*\\Z")

    def matches(self, text: str) -> Iterator[Match]:
        if self._candidate is None:
            return
        position = 0  # everything before it is consumed
        search = self._candidate.search
        candidate = search(text)
        while candidate is not None:
            start = candidate.start()
            token = self._longest(text, start)
            if token is None or (token.single_word and not _stands_alone(text, start, start + len(token.text))):
                candidate = search(text, start + (len(token.text) if token else 1))
                continue
            end = start + len(token.text)
            if token.lstrip:
                stripped = self._space_before.search(text, position, start)
                start = stripped.start() if stripped else start
            if token.rstrip:
                stripped = self._space_after.match(text, end)
                end = stripped.end() if stripped else end
            yield Match(start, end, token)
            position = end
            candidate = search(text, end)

    def _longest(self, text: str, start: int) -> AddedToken | None:
        node, found = self._root, None
        for index in range(start, len(text)):
            if text[index] not in node:
                break
            node = node[text[index]]
            found = node.get("", found)
        return found


def _stands_alone(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start] if start else "", text[end : end + 1]
    return not _WORD.match(before) and not _WORD.match(after)
