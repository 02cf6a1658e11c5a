"""Streams of the Anthropic API: their client makes of them the message that is not streamed."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import RawMessageStreamEvent
from jiter import from_json
from pydantic import TypeAdapter

from pellucid.core.errors import EngineError, QueueFullError
from pellucid.server.anthropic import streams
from pellucid.server.anthropic.responses import message_body
from pellucid.server.anthropic.streams import MessageEvents
from tests.server.anthropic.test_responses import request
from tests.support.scripted_formats import ANSWERS, TOKENIZER, answer
from tests.support.sse import read_events

EVENT = TypeAdapter[Any](RawMessageStreamEvent)


def streamed(said: str, size: int, **ending: Any) -> list[dict[str, Any]]:
    """The events of an answer of which `size` tokens come at a time."""
    output, tokens = answer(said, **ending)
    events = MessageEvents(request(), TOKENIZER, name="0")
    pieces = [
        events.events((0, token) for token in tokens[begin : begin + size]) for begin in range(0, len(tokens), size)
    ]
    return read_events(b"".join([*pieces, events.end([output])]))


def accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of them (tests/server/routes has the real one)."""
    message: dict[str, Any] = {}
    inputs: dict[int, str] = {}
    for event in events:
        if event["type"] == "ping":
            continue
        EVENT.validate_python(event)
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                inputs[event["index"]] = inputs.get(event["index"], "") + delta["partial_json"]
            else:
                field = "text" if delta["type"] == "text_delta" else "thinking"
                message["content"][event["index"]][field] += delta[field]
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    for index, text in inputs.items():
        message["content"][index]["input"] = from_json(text.encode(), partial_mode=True)
    return message


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize("said", ANSWERS)
def test_a_stream_is_the_message_that_is_not_streamed(said: str, size: int) -> None:
    events = streamed(said, size)
    whole = message_body(request(), answer(said)[0], TOKENIZER, name="0")
    assert accumulated(events) == whole


def test_the_order_of_events() -> None:
    kinds = [event["type"] for event in streamed("hi", 1000)]
    block = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", "ping", *block, "message_delta", "message_stop"]
    for said in ANSWERS:
        kinds = [event["type"] for event in streamed(said, 1)]
        assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
        assert kinds.count("message_start") == kinds.count("message_stop") == 1


def test_the_prompt_is_counted_at_the_beginning_and_what_was_cached_at_the_end() -> None:
    events = streamed("hi", 1)
    assert events[0]["message"]["usage"] == {
        "input_tokens": 7,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 0,
    }
    usage = events[-2]["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 7


def test_errors() -> None:
    (event,) = read_events(MessageEvents(request(), TOKENIZER, name="0").tell(QueueFullError("try again")))
    assert event == {"type": "error", "error": {"type": "rate_limit_error", "message": "try again"}}
    (event,) = read_events(MessageEvents(request(), TOKENIZER, name="0").tell(EngineError("broken")))
    assert event["error"]["type"] == "api_error"


def test_what_is_held_back_must_not_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that forgets what the parser holds at the end."""

    def end(self: MessageEvents, output: Any) -> bytes:
        self._parser.finish()
        return whole_end(self, output)

    whole_end = streams.MessageEvents.end
    monkeypatch.setattr(streams.MessageEvents, "end", end)
    with pytest.raises(AssertionError):
        test_a_stream_is_the_message_that_is_not_streamed("hello", 1)
