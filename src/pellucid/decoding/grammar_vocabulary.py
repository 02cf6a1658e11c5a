"""The vocabulary of a model as llguidance reads it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from pellucid.core.errors import InvalidRequestError
from pellucid.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

FORCED_CHARACTERS = 256
"""Text that can only go on in one way is looked at so far ahead."""
CACHED_STRETCHES = 4096
SENTINEL = "\x02"
"""A character that no token holds beside others."""


def build_vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """The bytes of every token, as a trie. Takes 0.1 s for 49,152 tokens and 1 s for 262,144, with the GIL held.

    Raises:
        InvalidRequestError: the model has no end-of-sequence token, which the end of a grammar needs.
    """
    from llguidance import LLTokenizer

    if not tokenizer.eos_token_ids:
        raise InvalidRequestError(
            "this model has no end-of-sequence token, so it could not end an answer that follows a grammar",
            param="structured_outputs",
        )
    wrapper = _Wrapper(tokenizer)
    ends = sorted(tokenizer.eos_token_ids)
    return LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=ends)  # type: ignore[arg-type]


class _Wrapper:
    """What llguidance asks of a tokenizer (its TokenizerWrapper): attributes by these names, and to be called."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids | tokenizer.eos_token_ids)
        self._tokenizer = tokenizer
        self._write = lru_cache(CACHED_STRETCHES)(self._written)

    def __call__(self, text: str) -> list[int]:
        """How the model itself would write text that a grammar leaves no choice about; nothing where it cannot.

        Only the first token is used, and it is asked for anew at each token: the beginning of the text is enough, and
        most of what is asked was asked before.
        """
        return self._write(text[:FORCED_CHARACTERS])

    def _written(self, text: str) -> list[int]:
        wanted = text.encode()
        for token_ids in self._attempts(text):
            if b"".join(self.tokens[token_id] for token_id in token_ids) == wanted:
                return token_ids
        return []

    def _attempts(self, text: str) -> Iterator[list[int]]:
        """Encoders of SentencePiece's kind put a space before any text, and some drop what they cannot write."""
        yield self._tokenizer.encode(text, add_special_tokens=False)
        token_ids = self._tokenizer.encode(SENTINEL + text, add_special_tokens=False)
        holds = [SENTINEL.encode() in self.tokens[token_id] for token_id in token_ids]
        yield token_ids[holds.index(True) + 1 :] if True in holds else token_ids
