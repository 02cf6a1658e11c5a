"""Answers of a chat whose marks are single characters, so that tests can write what a model would."""

from __future__ import annotations

from typing import Any

from pellucid.core.metrics import RequestMetrics
from pellucid.core.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput, TokenOutput
from pellucid.server.chat.events import ChatEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin
from pellucid.server.chat.tools import ChatTurn


class ScriptedParser:
    """`<` begins reasoning, `>` ends it; `[` begins a call of `look`, whose arguments go up to `]`. The last character
    of a text is held back until more comes."""

    def __init__(self) -> None:
        self._state = "text"
        self._num_calls = 0
        self._held = ""

    def push(self, text: str) -> list[ChatEvent]:
        events: list[ChatEvent] = []
        for character in text:
            if self._state == "text" and character in "<[":
                events += self.finish()
                self._state = "reasoning" if character == "<" else "call"
                if character == "[":
                    events.append(ToolCallBegin(self._num_calls, f"call_{self._num_calls}", "look"))
                    self._num_calls += 1
            elif (self._state, character) in (("reasoning", ">"), ("call", "]")):
                self._state = "text"
            elif self._state == "text":
                events += self.finish()
                self._held = character
            elif self._state == "reasoning":
                events.append(ReasoningDelta(character))
            else:
                events.append(ToolCallArguments(self._num_calls - 1, character))
        return events

    def finish(self) -> list[ChatEvent]:
        held, self._held = self._held, ""
        return [TextDelta(held)] if held else []


class ScriptedFormat:
    """Its ChatFormat."""

    reasoning = None

    def parser(self, turn: object) -> ScriptedParser:
        return ScriptedParser()


class ByteTokenizer:
    """Token i is byte i; 0 ends the sequence and stands for no text."""

    special_ids = frozenset({0})
    strips_leading_space = False
    vocab_size = 256

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


SCRIPTED: Any = ChatTurn(format=ScriptedFormat())  # type: ignore[arg-type]
"""A turn that is answered so."""
TOKENIZER: Any = ByteTokenizer()
"""One token a byte."""


def answer(
    said: str, *, finish_reason: FinishReason = "stop", stop_reason: int | str | None = None, logprobs: bool = False
) -> tuple[RequestOutput, list[TokenOutput]]:
    """The whole answer, and its tokens as they come; one that stopped of itself ends with token 0."""
    token_ids = [*said.encode(), *([0] if finish_reason == "stop" and stop_reason is None else [])]
    steps = [{token_id: Logprob(-0.5, 1, chr(token_id))} for token_id in token_ids] if logprobs else None
    metrics = RequestMetrics(prompt_tokens=7, cached_tokens=3, output_tokens=len(token_ids))
    completion = CompletionOutput(0, said, token_ids, finish_reason, stop_reason, steps)
    output = RequestOutput("r", None, [1] * 7, [completion], metrics)
    tokens = [
        TokenOutput("r", 0, token_id, chr(token_id) if token_id else "", steps[place] if steps else None)
        for place, token_id in enumerate(token_ids)
    ]
    if tokens:
        tokens[-1].finish_reason, tokens[-1].stop_reason = finish_reason, stop_reason
        tokens[-1].request_output = output
    return output, tokens


ANSWERS = (
    "hello",
    "",
    "<so>Yes",
    "<so",
    'I look[{"a": 1}]',
    '<hm>[{"a": "b"}][{}]done',
    "[",
    '[{"a": 1, "b": "c',
)
"""Texts, reasoning and calls, whole and cut short."""
