"""Tokens to text, one at a time."""

from __future__ import annotations

from codecs import utf_8_decode
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pellucid.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class DetokenizerState:
    """Where a detokenizer stands: the bytes of an unfinished character, and whether a leading space is still to go."""

    pending: bytes
    strip_next_space: bool


class IncrementalDetokenizer:
    """Turns a stream of token ids into text, never splitting a UTF-8 sequence.

    The texts of all `push` calls and the last `flush`, joined, are exactly `tokenizer.decode(ids, ...)` with the same
    options. Each push takes time in the size of its token alone.

    Args:
        skip_special_tokens: tokens that stand for no text give none.
        continuation: the text goes on after other text, so a leading space stays where the tokenizer would strip it.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._strip_next_space = tokenizer.strips_leading_space and not continuation
        self._pending = b""

    def push(self, token_id: int) -> str:
        """Text that `token_id` finishes; empty while a character is unfinished.

        Raises:
            InvalidRequestError: `token_id` is not in the vocabulary.
        """
        token = self._tokenizer.token_bytes(token_id)
        if token_id in self._skip:
            return ""
        return self._decode(token, final=False)

    def flush(self) -> str:
        """What is left at the end: an unfinished character becomes U+FFFD, as in the whole decode."""
        return self._decode(b"", final=True)

    def snapshot(self) -> DetokenizerState:
        """The state to go back to with `restore`."""
        return DetokenizerState(self._pending, self._strip_next_space)

    def restore(self, state: DetokenizerState) -> None:
        """Goes back to `state`, as if nothing had been pushed since."""
        self._pending = state.pending
        self._strip_next_space = state.strip_next_space

    def _decode(self, token: bytes, *, final: bool) -> str:
        data = self._pending + token
        text, num_used = utf_8_decode(data, "replace", final)
        self._pending = data[num_used:]
        if text and self._strip_next_space:
            self._strip_next_space = False
            return text.removeprefix(" ")
        return text
