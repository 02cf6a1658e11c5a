"""The events of a streamed answer of the OpenAI API: what `response_body` says at once, as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pellucid.core.errors import PellucidError
from pellucid.core.outputs import RequestOutput, TokenOutput
from pellucid.server.chat.events import ToolCallBegin
from pellucid.server.http.replies import json_bytes
from pellucid.server.http.sse import event
from pellucid.server.openai.chat_messages import delta_body, finish_reason_of
from pellucid.server.openai.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from pellucid.server.openai.requests import GenerationRequest
from pellucid.server.openai.responses import error_body, usage
from pellucid.tokenizer.tokenizer import Tokenizer

DONE = event(b"[DONE]")
"""The terminal event, after an error too."""


class CompletionEvents:
    """Makes events of tokens.

    Args:
        name: unique; the `id` of every event is made from it.
        created: seconds since 1970.
    """

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer, *, name: str, created: int) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._envelope: dict[str, Any] = {
            "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{name}",
            "object": "chat.completion.chunk" if request.is_chat else "text_completion",
            "created": created,
            "model": request.model,
        }
        # Every event but the last has the same beginning and end, which is a third of what it would take to make it.
        self._head = b"data: " + json_bytes(self._envelope)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if request.include_usage else b"]}\n\n"
        self._usage = UsageSoFar(request) if request.usage_so_far else None
        choice = _ChatChoice if request.is_chat else _TextChoice
        self._choices = [
            choice(index, request, tokenizer) for index in range(len(request.prompts) * request.sampling_params.n)
        ]

    def events(self, tokens: Iterable[tuple[int, TokenOutput]]) -> bytes:
        """The events that `tokens` make, each with the index of its choice."""
        batches: dict[int, list[TokenOutput]] = {}
        for index, token in tokens:
            batches.setdefault(index, []).append(token)
        return b"".join(
            self._head + json_bytes(delta) + tail
            for index, batch in batches.items()
            for tail in (self._tail if self._usage is None else self._usage.tail(index, batch),)
            for delta in self._choices[index].deltas(batch)
        )

    def end(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The last events, the terminal one among them."""
        if not self._request.include_usage:
            return DONE
        told = usage(self._request, outputs, self._tokenizer)
        return event(json_bytes({**self._envelope, "choices": [], "usage": told})) + DONE

    def tell(self, error: PellucidError) -> bytes:
        """The last events of a stream that failed."""
        return event(json_bytes(error_body(error))) + DONE


class UsageSoFar:
    """How many tokens each choice has taken, for the events that tell it while it goes on."""

    def __init__(self, request: GenerationRequest) -> None:
        params = request.sampling_params
        self._num_prompt = [num for num in request.usage_so_far for _ in range(params.n)]
        self._num = [-num if params.echo else 0 for num in self._num_prompt]  # an echo is none of its tokens

    def tail(self, index: int, tokens: Iterable[TokenOutput]) -> bytes:
        """The end of the events that `tokens`, the next ones of a choice, make."""
        self._num[index] += sum(token.token_id is not None for token in tokens)
        prompt_tokens, completion_tokens = self._num_prompt[index], max(0, self._num[index])
        told = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        return b'],"usage":' + json_bytes(told) + b"}\n\n"


class _TextChoice:
    """One continuation of a completion."""

    def __init__(self, index: int, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        params = request.sampling_params
        self._index = index
        self._request = request
        self._num_characters = 0
        self._logprobs = None if params.logprobs is None else CompletionLogprobs(tokenizer, params)

    def deltas(self, tokens: list[TokenOutput]) -> list[dict[str, Any]]:
        """What `tokens` add to it; nothing as long as their text is held back."""
        text = "".join(token.text for token in tokens)
        last = tokens[-1]
        is_end = last.finish_reason is not None
        logprobs = None
        self._num_characters += len(text)
        if self._logprobs is not None:
            for token in tokens:
                if token.token_id is not None and token.logprobs is not None:
                    self._logprobs.add(token.token_id, token.logprobs)
            logprobs = self._logprobs.take(self._num_characters, is_end=is_end)
        token_ids = [token.token_id for token in tokens if token.token_id is not None]
        if not (text or is_end or logprobs or self._request.return_token_ids):
            return []
        choice: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = token_ids
        _add_prompt(choice, last.request_output, self._request)
        return [choice]


class _ChatChoice:
    """One answer of a chat completion."""

    def __init__(self, index: int, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self._index = index
        self._request = request
        self._tokenizer = tokenizer
        self._parser = request.chat.format.parser(request.chat)
        self._has_begun = False
        self._has_tool_calls = False

    def deltas(self, tokens: list[TokenOutput]) -> list[dict[str, Any]]:
        """What `tokens` add to it; nothing as long as their text is held back."""
        last = tokens[-1]
        pieces = self._parser.push("".join(token.text for token in tokens))
        if last.finish_reason is not None:
            pieces += self._parser.finish()
        self._has_tool_calls |= any(isinstance(piece, ToolCallBegin) for piece in pieces)
        deltas = [self._delta(delta_body(piece)) for piece in pieces]
        self._add_tokens(deltas, tokens)
        if not self._has_begun and (deltas or last.finish_reason is not None):
            self._has_begun = True
            deltas.insert(0, self._delta({"role": "assistant", "content": ""}))
        if last.finish_reason is not None:
            deltas.append(self._delta({}))
            deltas[-1]["finish_reason"] = finish_reason_of(
                last.finish_reason, last.stop_reason, has_tool_calls=self._has_tool_calls
            )
            deltas[-1]["stop_reason"] = last.stop_reason
            _add_prompt(deltas[-1], last.request_output, self._request)
        return deltas

    def _add_tokens(self, deltas: list[dict[str, Any]], tokens: list[TokenOutput]) -> None:
        """What is told of `tokens` themselves, with the first of the deltas that they make, or one of its own."""
        told: dict[str, Any] = {}
        if self._request.sampling_params.logprobs is not None:
            content = [
                chat_logprobs(token.token_id, token.logprobs, self._tokenizer)
                for token in tokens
                if token.token_id is not None and token.logprobs is not None
            ]
            told["logprobs"] = {"content": content, "refusal": None} if content else None
        if self._request.return_token_ids:
            told["token_ids"] = [token.token_id for token in tokens if token.token_id is not None]
        if any(told.values()) and not deltas:
            deltas.append(self._delta({}))
        if deltas:
            deltas[0].update(told)

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}


def _add_prompt(choice: dict[str, Any], output: RequestOutput | None, request: GenerationRequest) -> None:
    """What is told of the prompt, with the last event of the last of its continuations."""
    if output is None:
        return
    if output.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [prompt_logprobs(entry) for entry in output.prompt_logprobs]
    if request.return_token_ids:
        choice["prompt_token_ids"] = output.prompt_token_ids
