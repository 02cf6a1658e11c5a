"""Log-probabilities in the forms of the OpenAI API, and of vLLM for prompts."""

from __future__ import annotations

from collections import deque
from typing import Any

from pellucid.core.outputs import Logprob
from pellucid.core.sampling_params import SamplingParams
from pellucid.tokenizer.detokenizer import IncrementalDetokenizer
from pellucid.tokenizer.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON cannot write."""


def chat_logprobs(token_id: int, step: dict[int, Logprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """A token of a chat completion."""
    ranked = sorted((item.rank, each, item) for each, item in step.items() if item.rank is not None)
    return {
        **_chat_token(token_id, step[token_id], tokenizer),
        "top_logprobs": [_chat_token(each, item, tokenizer) for _, each, item in ranked],
    }


def _chat_token(token_id: int, item: Logprob, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": token_text(token_id, item.decoded_token, tokenizer),
        "logprob": max(item.logprob, LEAST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """Those of a continuation, as its tokens come.

    A token is told of with the text that it begins, and where in the text that is; at the end of the text are those
    that a stop string cut off.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens, continuation=not params.echo
        )
        self._strips = params.strip
        self._text = ""  # as long as it may be white space that is stripped
        self._offset = 0
        self._pending: deque[tuple[int, int, dict[int, Logprob]]] = deque()

    def add(self, token_id: int, step: dict[int, Logprob]) -> None:
        """The next token."""
        self._pending.append((self._offset, token_id, step))
        piece = self._detokenizer.push(token_id)
        self._offset += len(piece)
        if self._strips:
            self._text += piece
            if text := self._text.lstrip():
                self._skip(len(self._text) - len(text))
                self._strips = False

    def _skip(self, num_characters: int) -> None:
        self._offset -= num_characters
        self._pending = deque((offset - num_characters, *rest) for offset, *rest in self._pending)  # type: ignore[misc]

    def take(self, num_characters: int, *, is_end: bool) -> dict[str, Any] | None:
        """What was not told of yet of the first `num_characters` of the text; None if that is nothing."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        text_offset: list[int] = []
        while self._pending and (is_end or self._pending[0][0] < num_characters):
            offset, token_id, step = self._pending.popleft()
            text_offset.append(min(max(0, offset), num_characters))
            if step:
                tokens.append(token_text(token_id, step[token_id].decoded_token, self._tokenizer))
                token_logprobs.append(max(step[token_id].logprob, LEAST_LOGPROB))
                top_logprobs.append(
                    {
                        token_text(each, item.decoded_token, self._tokenizer): max(item.logprob, LEAST_LOGPROB)
                        for each, item in step.items()
                    }
                )
            else:  # the first token of a prompt, which nothing comes before
                decoded = self._tokenizer.decode([token_id], skip_special_tokens=False)
                tokens.append(token_text(token_id, decoded, self._tokenizer))
                token_logprobs.append(None)
                top_logprobs.append(None)
        if not tokens and not is_end:
            return None
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        }


def prompt_logprobs(entry: dict[int, Logprob] | None) -> dict[str, dict[str, Any]] | None:
    """A token of a prompt, in the form of vLLM."""
    if entry is None:
        return None
    return {
        str(token_id): {
            "logprob": max(item.logprob, LEAST_LOGPROB),
            "rank": item.rank,
            "decoded_token": item.decoded_token,
        }
        for token_id, item in entry.items()
    }


def token_text(token_id: int, decoded_token: str, tokenizer: Tokenizer) -> str:
    """The token's text; for a part of a character `bytes:` and the bytes written out, as OpenAI has it."""
    if "\ufffd" in decoded_token:
        data = tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return decoded_token
