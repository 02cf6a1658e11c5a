"""Content blocks of Anthropic messages: as events, and whole."""

from __future__ import annotations

import json
from typing import Any

from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from pellucid.server.anthropic.content import ContentEvents, content_of
from pellucid.server.chat.events import ChatEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin

EVENT = TypeAdapter[Any](RawMessageStreamEvent)
PIECES: list[ChatEvent] = [
    ReasoningDelta("let me "),
    ReasoningDelta("see"),
    TextDelta("I'll "),
    TextDelta("look."),
    ToolCallBegin(0, "c0", "look"),
    ToolCallArguments(0, '{"where": "d'),
    ToolCallArguments(0, 'é"}'),
    ToolCallBegin(1, "c1", "wait"),
    TextDelta("Done."),
]
WHOLE = [
    {"type": "thinking", "thinking": "let me see", "signature": ""},
    {"type": "text", "text": "I'll look."},
    {"type": "tool_use", "id": "c0", "name": "look", "input": {"where": "dé"}},
    {"type": "tool_use", "id": "c1", "name": "wait", "input": {}},
    {"type": "text", "text": "Done."},
]


def events_of(pieces: list[ChatEvent]) -> list[dict[str, Any]]:
    content = ContentEvents()
    return [event for piece in pieces for event in content.push(piece)] + content.end()


def test_each_block_begins_and_ends_once() -> None:
    events = events_of(PIECES)
    assert content_of(events) == WHOLE
    open_blocks: list[int] = []
    for event in events:
        EVENT.validate_python(event)
        if event["type"] == "content_block_start":
            assert not open_blocks
            open_blocks.append(event["index"])
        else:
            assert open_blocks == [event["index"]]
            if event["type"] == "content_block_stop":
                open_blocks.pop()
    assert not open_blocks
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1, 2, 3, 4]


def test_the_deltas_of_each_kind() -> None:
    deltas = [event["delta"] for event in events_of(PIECES) if event["type"] == "content_block_delta"]
    assert deltas[0] == {"type": "thinking_delta", "thinking": "let me "}
    assert deltas[2] == {"type": "text_delta", "text": "I'll "}
    assert json.loads("".join(delta["partial_json"] for delta in deltas[4:6])) == {"where": "dé"}


def test_what_was_in_it() -> None:
    content = ContentEvents()
    assert (content.has_thinking, content.has_tool_use) == (False, False)
    content.push(PIECES[0])
    assert (content.has_thinking, content.has_tool_use) == (True, False)
    content.push(PIECES[4])
    assert (content.has_thinking, content.has_tool_use) == (True, True)


def test_a_call_that_was_cut_short() -> None:
    pieces = [ToolCallBegin(0, "c0", "look"), ToolCallArguments(0, '{"a": [1, true, "b"], "c": "d')]
    (block,) = content_of(events_of(pieces))
    assert block["input"] == {"a": [1, True, "b"]}


def test_an_answer_of_nothing() -> None:
    assert events_of([]) == []
    assert content_of([]) == []
