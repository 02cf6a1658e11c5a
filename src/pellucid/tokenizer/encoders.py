"""From text without added tokens to ids, for the two kinds of vocabulary that GGUF files hold."""

from __future__ import annotations

import re
from codecs import charmap_decode
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError, ModelFileError
from pellucid.tokenizer.byte_pair_encoding import BytePairEncoder, merge_symbols
from pellucid.tokenizer.pre_tokenizers import PreTokenizer
from pellucid.tokenizer.vocabulary import BYTE_LEVEL_ALPHABET, SPACE_SYMBOL, TokenType, Vocabulary, parse_byte_token

_TOKENS_AT_ONCE = 1 << 14  # a scan of 262,144 tokens takes 2 MB instead of 18


class TextEncoder(Protocol):
    """What a `Tokenizer` needs of an encoder."""

    def prepare(self, text: str) -> str:
        """Rewrites `text` character by character, before added tokens are looked for. Idempotent."""

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of a stretch of prepared text between added tokens; `at_start` if it opens the whole text."""

    def spelled(self, text: str) -> bytes | None:
        """The bytes that the tokens of prepared text have between them; None where only encoding tells."""


class ByteLevelEncoder:
    """Byte-level BPE (Radford et al., 2019): merges by rank over the bytes of pre-tokenized words.

    A byte that has no token of its own gives no id, as in the `tokenizers` library and llama.cpp. (SmolLM2 lacks six
    control characters, and bytes that occur only beyond U+3FFFF.)

    Args:
        merges: "left right" pairs, first merged first.

    Raises:
        ModelFileError: a merge is not a pair.
    """

    def __init__(self, vocabulary: Vocabulary, merges: Sequence[str], pre_tokenizer: PreTokenizer) -> None:
        if merges and " ".join(merges).count(" ") != 2 * len(merges) - 1:
            wrong = next(merge for merge in merges if merge.count(" ") != 1)
            raise ModelFileError(
                f"the merge {wrong!r} is not two tokens with a space between", param="tokenizer.ggml.merges"
            )
        self._vocabulary = vocabulary
        self._pre_tokenizer = pre_tokenizer
        self._ranks = dict(zip(merges, range(len(merges)), strict=True))
        self._bpe = BytePairEncoder(pre_tokenizer.compile(), self._encode_piece)

    def prepare(self, text: str) -> str:
        return text

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        return self._bpe.encode(text)

    def spelled(self, text: str) -> bytes | None:
        data = text.encode()
        return data if len(data.translate(None, self._bytes_without_token)) == len(data) else None

    @cached_property
    def _bytes_without_token(self) -> bytes:
        ids = self._vocabulary.normal_ids
        return bytes(byte for byte, character in enumerate(BYTE_LEVEL_ALPHABET) if character not in ids)

    def _pair_rank(self, left: str, right: str) -> int | None:
        return self._ranks.get(f"{left} {right}")

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._vocabulary.normal_ids
        data = piece.encode()
        if self._pre_tokenizer.ignore_merges and (whole := ids.get(_spelled(data))) is not None:
            return [whole]
        symbols = _spelled(data.translate(None, self._bytes_without_token))
        try:
            return [ids[symbol] for symbol in merge_symbols(symbols, self._pair_rank)]
        except KeyError as error:
            raise ModelFileError(
                f"the merges build {error.args[0]!r}, which is not a token", param="tokenizer.ggml.merges"
            ) from None


def _spelled(data: bytes) -> str:
    """`data` in the byte-level alphabet."""
    return charmap_decode(data, "strict", BYTE_LEVEL_ALPHABET)[0]


class SentencePieceEncoder:
    """SentencePiece BPE (Kudo & Richardson, 2018): the pair whose merged piece scores highest goes first.

    What has no token is spelled in BYTE tokens, or is the unknown token where there are none.

    Args:
        scores: float32 [vocab_size].
        add_space_prefix: each stretch of text is taken as if a space stood before it.
        remove_extra_whitespaces: spaces at both ends go, and runs of spaces count as one.
        unknown_token_id: the token of what cannot be spelled.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        scores: NDArray[np.float32],
        *,
        add_space_prefix: bool,
        remove_extra_whitespaces: bool,
        unknown_token_id: int | None,
    ) -> None:
        self._vocabulary = vocabulary
        self._ranks = np.ascontiguousarray(-scores, dtype=np.float32).data
        self._add_space_prefix = add_space_prefix
        self._remove_extra_whitespaces = remove_extra_whitespaces
        self._unknown_token_id = unknown_token_id
        byte_tokens = vocabulary.ids_of_type(TokenType.BYTE)
        by_byte = {parse_byte_token(vocabulary.tokens[token_id]): token_id for token_id in byte_tokens}
        self._byte_ids = [by_byte[byte] for byte in range(256)] if len(by_byte) == 256 else None
        words = _word_pattern(_characters_before_space(vocabulary.tokens))
        self._bpe = BytePairEncoder(lambda text: (word.group() for word in words.finditer(text)), self._encode_piece)

    def prepare(self, text: str) -> str:
        return text.replace(" ", SPACE_SYMBOL)

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        if self._remove_extra_whitespaces:
            text = re.sub(f"{SPACE_SYMBOL}+", SPACE_SYMBOL, text.strip(SPACE_SYMBOL))
        if not text:
            return []
        return self._bpe.encode(SPACE_SYMBOL + text if self._add_space_prefix else text)

    def spelled(self, text: str) -> bytes | None:
        if self._remove_extra_whitespaces or self._byte_ids is None:  # spaces, or unknown characters, become one token
            return None
        return text.replace(SPACE_SYMBOL, " ").encode()

    def _pair_rank(self, left: str, right: str) -> float | None:
        token_id = self._vocabulary.normal_ids.get(left + right)
        return None if token_id is None else self._ranks[token_id]

    def _encode_piece(self, piece: str) -> list[int]:
        normal_ids = self._vocabulary.normal_ids
        ids: list[int] = []
        unknown = False  # adjacent unknown symbols are one token
        for symbol in merge_symbols(piece, self._pair_rank):
            token_id = normal_ids.get(symbol)
            if token_id is not None:
                ids.append(token_id)
            elif self._byte_ids is not None:
                ids += [self._byte_ids[byte] for byte in symbol.encode()]
            elif self._unknown_token_id is None:
                raise InvalidRequestError(
                    f"this vocabulary cannot spell {symbol!r}: it has neither byte tokens nor an unknown token",
                    param="prompt",
                )
            elif not unknown:
                ids.append(self._unknown_token_id)
            unknown = token_id is None
        return ids


def _characters_before_space(tokens: Sequence[str]) -> list[str]:
    """Characters that some token holds right before U+2581: the only places where a merge crosses a word's start."""
    found: set[int] = set()
    for start in range(0, len(tokens), _TOKENS_AT_ONCE):
        batch = tokens[start : start + _TOKENS_AT_ONCE]
        joined = "\0".join(batch)
        text = np.frombuffer(joined.encode("utf-32-le"), dtype="<u4")
        before = set(text[:-1][text[1:] == ord(SPACE_SYMBOL)].tolist())
        if joined.count("\0") == len(batch) - 1:  # no token holds the separator
            before.discard(0)
        found |= before
    return [chr(code) for code in sorted(found - {ord(SPACE_SYMBOL)})]


def _word_pattern(crossing: Sequence[str]) -> re.Pattern[str]:
    """A word is a run of U+2581 and what follows up to the next; it goes on across one of the `crossing` characters."""
    space = SPACE_SYMBOL
    if not crossing:
        return re.compile(f"{space}*[^{space}]+|{space}+")
    further = f"(?:(?<=[{''.join(map(re.escape, crossing))}]){space}+[^{space}]*)*"
    return re.compile(f"{space}*[^{space}]+{further}|{space}+")
