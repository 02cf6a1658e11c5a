"""Tokens, their types and their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError, ModelFileError
from pellucid.tokenizer.least_tokens import longest_tokens

SPACE_SYMBOL = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space as this

Alphabet = Literal["byte_level", "sentencepiece"]


class TokenType(IntEnum):
    """Token types of GGUF, which are those of SentencePiece (sentencepiece_model.proto)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_BYTE, _NORMAL = TokenType.BYTE, TokenType.NORMAL  # Python 3.11 takes a microsecond to find a member


def _byte_level_alphabet() -> str:
    """256 printable characters, one a byte (GPT-2, Radford et al., 2019): printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()
_BYTE_OF_CHARACTER = {ord(character): byte for byte, character in enumerate(BYTE_LEVEL_ALPHABET)}


class Vocabulary:
    """The tokens of a model.

    Args:
        tokens: text of each id, in the spelling of `alphabet`.
        types: int array [len(tokens)] of `TokenType`.
        alphabet: how NORMAL tokens spell bytes: GPT-2's byte alphabet, or UTF-8 with U+2581 for a space.

    Raises:
        ModelFileError: two ids have the same text, or a BYTE token is not spelled `<0xNN>`.
    """

    def __init__(self, tokens: Sequence[str], types: NDArray[np.integer], alphabet: Alphabet) -> None:
        self.tokens = tokens
        self.types = types
        self.alphabet = alphabet
        self._bytes: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def _ids(self) -> tuple[dict[str, int], dict[str, int]]:
        """(NORMAL tokens, all others): built on first use, because a large vocabulary takes tens of milliseconds."""
        normal = dict(zip(self.tokens, range(len(self.tokens)), strict=True))
        if len(normal) != len(self.tokens):
            seen: set[str] = set()
            duplicate = next(token for token in self.tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
            raise ModelFileError(f"the vocabulary holds the token {duplicate!r} twice", param="tokenizer.ggml.tokens")
        others = {self.tokens[index]: index for index in self.ids_of_type(*(set(TokenType) - {TokenType.NORMAL}))}
        for token in others:
            del normal[token]
        return normal, others

    @property
    def normal_ids(self) -> dict[str, int]:
        """Id of each NORMAL token: those that byte pair encoding may produce."""
        return self._ids[0]

    @property
    def other_ids(self) -> dict[str, int]:
        """Id of each token that is not NORMAL."""
        return self._ids[1]

    def find(self, token: str) -> int | None:
        """The id of `token`, or None."""
        found = self.normal_ids.get(token)
        return self.other_ids.get(token) if found is None else found

    def ids_of_type(self, *types: TokenType) -> list[int]:
        found: list[int] = np.flatnonzero(np.isin(self.types, types)).tolist()
        return found

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: CONTROL and UNKNOWN."""
        return frozenset(self.ids_of_type(TokenType.CONTROL, TokenType.UNKNOWN))

    @cached_property
    def longest_tokens(self) -> NDArray[np.int64]:
        """For `least_tokens`. Takes 0.1 s for 262,000 tokens."""
        return longest_tokens(self._spell(token_id) for token_id in range(len(self.tokens)))

    def check_id(self, token_id: int) -> None:
        """Raises InvalidRequestError if `token_id` is not an id of this vocabulary."""
        if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
            raise InvalidRequestError(f"a token id is an integer, not {type(token_id).__name__}", param="token_ids")
        if not 0 <= token_id < len(self.tokens):
            raise InvalidRequestError(
                f"token id {token_id} is out of range: this vocabulary has ids 0 to {len(self.tokens) - 1}",
                param="token_ids",
            )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that `token_id` stands for; a character may be spread over several tokens."""
        if type(token_id) is not int:
            self.check_id(token_id)
            token_id = int(token_id)
        found = self._bytes.get(token_id)
        if found is None:
            self.check_id(token_id)
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def _spell(self, token_id: int) -> bytes:
        token, kind = self.tokens[token_id], int(self.types[token_id])
        if kind == _BYTE:
            return bytes([parse_byte_token(token)])
        if kind == _NORMAL and self.alphabet == "byte_level":
            try:
                return bytes([_BYTE_OF_CHARACTER[ord(character)] for character in token])
            except KeyError:  # as the reference does: such a token is spelled plainly
                return token.encode()
        if self.alphabet == "sentencepiece":
            token = token.replace(SPACE_SYMBOL, " ")
        return token.encode()


def parse_byte_token(token: str) -> int:
    """The byte of `<0xNN>`. Raises ModelFileError for another spelling."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            pass
    raise ModelFileError(
        f"the token {token!r} is marked as a byte but is not spelled <0x00> to <0xFF>", param="tokenizer.ggml.tokens"
    )
