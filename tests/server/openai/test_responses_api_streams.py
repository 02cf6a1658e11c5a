"""Streams of the Responses API: their terminal event has the response that is not streamed."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from pellucid.core.errors import EngineError
from pellucid.server.openai import responses_api_streams
from pellucid.server.openai.responses_api_requests import LOGPROBS
from pellucid.server.openai.responses_api_responses import response_body
from pellucid.server.openai.responses_api_streams import ResponseEvents
from tests.server.openai.test_responses_api_responses import request
from tests.support.scripted_formats import ANSWERS, TOKENIZER, answer
from tests.support.sse import read_events

EVENT = TypeAdapter[Any](ResponseStreamEvent)
TERMINAL = ("response.completed", "response.incomplete", "response.failed")


def new_events(**body: Any) -> ResponseEvents:
    return ResponseEvents(request(**body), TOKENIZER, name="0", created=17)


def streamed(said: str, size: int, *, logprobs: bool = False, **ending: Any) -> list[dict[str, Any]]:
    """The events of an answer of which `size` tokens come at a time."""
    output, tokens = answer(said, logprobs=logprobs, **ending)
    events = new_events(**{"include": [LOGPROBS]} if logprobs else {})
    pieces = [
        events.events((0, token) for token in tokens[begin : begin + size]) for begin in range(0, len(tokens), size)
    ]
    read = read_events(b"".join([*pieces, events.end([output])]))
    for number, event in enumerate(read):
        assert event["sequence_number"] == number
        EVENT.validate_python(event)
    assert [event["type"] for event in read[:2]] == ["response.created", "response.in_progress"]
    assert [event["type"] in TERMINAL for event in read] == [False] * (len(read) - 1) + [True]
    return read


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize("said", ANSWERS)
def test_a_stream_ends_with_the_response_that_is_not_streamed(said: str, size: int, finish_reason: Any) -> None:
    events = streamed(said, size, finish_reason=finish_reason)
    output, _ = answer(said, finish_reason=finish_reason)
    whole = response_body(request(), output, TOKENIZER, name="0", created=17)
    response = events[-1]["response"]
    assert {**response, "completed_at": None} == {**whole, "completed_at": None}
    assert events[-1]["type"] == f"response.{response['status']}"
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == whole["output"]


@pytest.mark.parametrize("said", ANSWERS)
def test_deltas_join_to_what_is_done(said: str) -> None:
    joined: dict[str, str] = {}
    for event in streamed(said, 1):
        if event["type"].endswith(".delta"):
            joined[event["item_id"]] = joined.get(event["item_id"], "") + event["delta"]
        elif event["type"].endswith((".text.done", "arguments.done")):
            assert event.get("text", event.get("arguments")) == joined.pop(event["item_id"], "")


@pytest.mark.parametrize("size", [1, 3])
def test_log_probabilities_are_those_of_all_tokens_of_a_text(size: int) -> None:
    events = streamed("hello", size, logprobs=True)
    (part,) = events[-1]["response"]["output"][0]["content"]
    assert [step["token"] for step in part["logprobs"]] == [*"hello", "\0"]
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [step for delta in deltas for step in delta] == part["logprobs"]


def test_log_probabilities_of_a_text_after_reasoning() -> None:
    events = streamed("<so>Yes", 1, logprobs=True)
    (part,) = events[-1]["response"]["output"][1]["content"]
    assert [step["token"] for step in part["logprobs"]] == [*">Yes", "\0"]


def test_a_failure_later() -> None:
    events = new_events()
    begin = events.events((0, token) for token in answer("hello")[1][:2])
    read = read_events(begin + events.tell(EngineError("broken")))
    assert [event["type"] for event in read].count("response.failed") == 1
    assert (read[-1]["type"], read[-1]["response"]["error"]["message"]) == ("response.failed", "broken")
    assert read[-1]["response"]["output"][0]["status"] == "incomplete"
    assert [event["sequence_number"] for event in read] == list(range(len(read)))


def test_a_failure_before_anything_came() -> None:
    read = read_events(new_events().tell(EngineError("broken")))
    assert [event["type"] for event in read] == ["response.created", "response.in_progress", "response.failed"]


def test_what_is_held_back_must_not_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that forgets what the parser holds at the end."""

    def end(self: ResponseEvents, output: Any) -> bytes:
        self._parser.finish()
        return whole_end(self, output)

    whole_end = responses_api_streams.ResponseEvents.end
    monkeypatch.setattr(responses_api_streams.ResponseEvents, "end", end)
    with pytest.raises(AssertionError):
        test_a_stream_ends_with_the_response_that_is_not_streamed("hello", 1, "stop")
