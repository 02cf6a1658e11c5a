"""A tokenizer of single characters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pellucid.core.errors import InvalidRequestError

EOS = 0
ALPHABET = "\0abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?\n:;"


class FakeTokenizer:
    """Token i is character i of ALPHABET; token 0 ends the sequence and stands for no text."""

    eos_token_ids = frozenset({EOS})
    special_ids = frozenset({EOS})
    strips_leading_space = False
    has_chat_template = False
    chat_template = None
    vocab_size = len(ALPHABET)

    def prepare(self) -> None:
        """Nothing to do."""

    def token_to_id(self, token: str) -> int | None:
        return ALPHABET.index(token) if len(token) == 1 and token in ALPHABET else None

    def id_to_token(self, token_id: int) -> str:
        return ALPHABET[token_id]

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        parse_special: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        return [max(1, ALPHABET.find(character)) for character in text]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, continuation: bool = False) -> str:
        return "".join(ALPHABET[token_id] for token_id in ids if not (skip_special_tokens and token_id == EOS))

    def token_bytes(self, token_id: int) -> bytes:
        return ALPHABET[token_id].encode()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        max_tokens: int | None = None,
    ) -> list[int]:
        if not all(message.get("content") for message in messages):
            raise InvalidRequestError("a message has no content", param="messages")
        turns = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self.encode(turns + ("assistant: " if add_generation_prompt else ""))
