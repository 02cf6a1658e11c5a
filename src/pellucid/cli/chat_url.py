"""Who answers in `pellucid chat --url`: a server that has the OpenAI API."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Generator
from contextlib import AsyncExitStack
from typing import Any

from pellucid.cli.conversation import Piece
from pellucid.cli.parser import DEFAULT_BACKEND, DEFAULT_KV_CACHE_DTYPE
from pellucid.cli.sampling_options import given_params
from pellucid.cli.session import Messages
from pellucid.cli.structured_options import structured_outputs
from pellucid.client.errors import ApiError, ServerError
from pellucid.client.openai import ChunkStream, OpenAIClient, StreamChunk, Usage
from pellucid.core.errors import ContextLengthError, InvalidRequestError, PellucidError

LOCAL_OPTIONS = {
    "session": None,
    "threads": None,
    "max_model_len": None,
    "backend": DEFAULT_BACKEND,
    "kv_cache_dtype": DEFAULT_KV_CACHE_DTYPE,
    "speculative": None,
    "num_draft_tokens": None,
    "draft_model": None,
    "layers": None,
}
"""Options that are about a model in this process, with their defaults."""


class ChatServer:
    """A Partner that asks a server.

    Use as a context manager.

    Raises:
        InvalidRequestError: an option cannot be used with a server.
        ServerError: the server has no model to name.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        check_options(args)
        self._args = args
        self._fields = body_fields(args)
        api_key = args.api_key or os.environ.get("OPENAI_API_KEY")
        self._client = OpenAIClient(args.url, api_key=api_key, headers=args.header, read_timeout=args.timeout)
        self._loop = asyncio.Runner()
        self._interactive = sys.stdin.isatty()
        self._finish_reason: str | None = None
        self._timing = AnswerTiming()

    def __enter__(self) -> ChatServer:
        try:
            if self._args.model is None:
                self._args.model = self._loop.run(self._client.models())[0]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run(self._client.aclose())
        self._loop.close()

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        body = {"model": self._args.model, "messages": messages, **self._fields}
        if self._args.timing:
            body["stream_options"] = {"include_usage": True}
        self._timing = AnswerTiming()
        self._finish_reason = None
        stack = AsyncExitStack()
        try:
            stream = self._loop.run(stack.enter_async_context(self._client.stream("chat", body)))
            while (chunk := self._loop.run(next_chunk(stream))) is not None:
                self._timing.note(chunk)
                self._finish_reason = chunk.finish_reason or self._finish_reason
                if chunk.reasoning:
                    yield Piece(chunk.reasoning, is_reasoning=True)
                if chunk.text:
                    yield Piece(chunk.text)
        except ApiError as error:
            if error.error_code == "context_length_exceeded":
                raise ContextLengthError(error.message, param=error.param) from None
            raise
        finally:
            self._loop.run(stack.aclose())

    def goes_on_after(self, error: PellucidError) -> bool:
        """At a terminal, where one can say something else; what is piped in has nobody who would."""
        return isinstance(error, ContextLengthError) or (self._interactive and isinstance(error, ServerError))

    def report(self) -> None:
        if self._finish_reason == "length":
            print("(cut off at the limit of tokens; --max-tokens sets it)", file=sys.stderr)
        if self._args.timing:
            print(self._timing.line(), file=sys.stderr)

    def keep(self, messages: Messages) -> None:
        pass

    def forget(self) -> None:
        pass


async def next_chunk(stream: ChunkStream) -> StreamChunk | None:
    """The next piece; None at the end."""
    return await anext(stream, None)


def check_options(args: argparse.Namespace) -> None:
    """Raises InvalidRequestError where an option was given that is about a model in this process."""
    for name, default in LOCAL_OPTIONS.items():
        if getattr(args, name) != default:
            option = "draft-layers" if name == "layers" else name.replace("_", "-")
            raise InvalidRequestError(
                f"--{option} is about a model that runs in this process: leave it out with --url", param=name
            )


def body_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, as fields of a request body; what is not given is the server's choice."""
    fields = given_params(args)
    if "logit_bias" in fields:
        fields["logit_bias"] = {str(token_id): bias for token_id, bias in fields["logit_bias"]}
    outputs = structured_outputs(args)
    if outputs is None:
        return fields
    if outputs.json_object:
        return fields | {"response_format": {"type": "json_object"}}
    if outputs.json is not None:
        schema = {"name": "answer", "schema": json.loads(str(outputs.json)), "strict": True}  # it is kept as text
        return fields | {"response_format": {"type": "json_schema", "json_schema": schema}}
    names = ("regex", "choice", "grammar")
    given = {name: value for name in names if (value := getattr(outputs, name)) is not None}
    return fields | {"structured_outputs": given}


class AnswerTiming:
    """When an answer began and how fast it came, at this end of the connection."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None
        self._last = self._start
        self._usage: Usage | None = None

    def note(self, chunk: StreamChunk) -> None:
        """A piece has come."""
        self._usage = chunk.usage or self._usage
        if chunk.has_output:
            self._last = time.perf_counter()
            self._first = self._first or self._last

    def line(self) -> str:
        parts = []
        if self._usage is not None:
            parts.append(f"{self._usage.prompt_tokens} prompt tokens")
        if self._first is not None:
            parts.append(f"TTFT {(self._first - self._start) * 1e3:.0f} ms")
        if self._usage is None:
            parts.append("the server did not count the tokens")
        elif self._first is not None and self._usage.completion_tokens > 1 and self._last > self._first:
            speed = (self._usage.completion_tokens - 1) / (self._last - self._first)
            parts.append(f"{speed:.0f} tok/s ({self._usage.completion_tokens} tokens)")
        return ", ".join(parts)
