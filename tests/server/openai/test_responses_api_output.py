"""Output items of the Responses API: as events, and whole."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import ResponseOutputItem, ResponseStreamEvent
from pydantic import TypeAdapter

from pellucid.server.chat.events import ChatEvent, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin
from pellucid.server.openai.responses_api_output import OutputEvents

EVENT = TypeAdapter[Any](ResponseStreamEvent)
ITEM = TypeAdapter[Any](ResponseOutputItem)
PIECES: list[ChatEvent] = [
    ReasoningDelta("let me "),
    ReasoningDelta("see"),
    TextDelta("I'll "),
    TextDelta("look."),
    ToolCallBegin(0, "c0", "look"),
    ToolCallArguments(0, '{"a'),
    ToolCallArguments(0, '": 1}'),
    TextDelta("Done."),
]


def test_items() -> None:
    output = OutputEvents("0")
    for piece in PIECES:
        output.push(piece, [])
    output.end()
    text = {"type": "output_text", "annotations": [], "logprobs": []}
    message = {"type": "message", "status": "completed", "role": "assistant"}
    assert output.items == [
        {
            "type": "reasoning",
            "id": "rs_00",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "let me see"}],
        },
        {**message, "id": "msg_01", "content": [{**text, "text": "I'll look."}]},
        {
            "type": "function_call",
            "id": "fc_02",
            "status": "completed",
            "call_id": "c0",
            "name": "look",
            "arguments": '{"a": 1}',
        },
        {**message, "id": "msg_03", "content": [{**text, "text": "Done."}]},
    ]
    for item in output.items:
        ITEM.validate_python(item)


@pytest.mark.parametrize(
    ("pieces", "kinds"),
    [
        (
            [TextDelta("a"), TextDelta("b")],
            [
                "output_item.added",
                "content_part.added",
                "output_text.delta",
                "output_text.delta",
                "output_text.done",
                "content_part.done",
                "output_item.done",
            ],
        ),
        (
            [ReasoningDelta("a")],
            [
                "output_item.added",
                "content_part.added",
                "reasoning_text.delta",
                "reasoning_text.done",
                "content_part.done",
                "output_item.done",
            ],
        ),
        (
            [ToolCallBegin(0, "c0", "look"), ToolCallArguments(0, "{}")],
            [
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
            ],
        ),
        ([], []),
    ],
)
def test_the_order_of_events(pieces: list[ChatEvent], kinds: list[str]) -> None:
    output = OutputEvents("0")
    events = [event for piece in pieces for event in output.push(piece, [])] + output.end()
    assert [event["type"].removeprefix("response.") for event in events] == kinds


def test_events_name_their_item() -> None:
    output = OutputEvents("0")
    events = [event for piece in PIECES for event in output.push(piece, [])] + output.end()
    ids = [item["id"] for item in output.items]
    for number, event in enumerate(events):
        EVENT.validate_python({**event, "sequence_number": number})
        item_id = event["item"]["id"] if "item" in event else event["item_id"]
        assert ids[event["output_index"]] == item_id
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [item["status"] for item in added] == ["in_progress"] * 4
    assert [item["content"] for item in added if item["type"] != "function_call"] == [[], [], []]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output.items


def test_log_probabilities_are_those_of_the_text() -> None:
    output = OutputEvents("0")
    steps: list[dict[str, Any]] = [{"token": name, "logprob": -1.0, "bytes": [], "top_logprobs": []} for name in "abc"]
    output.push(ReasoningDelta("x"), [steps[2]])
    first = output.push(TextDelta("a"), [steps[0]])
    output.push(TextDelta("b"), [steps[1]])
    done, *_ = output.end(logprobs=[steps[2]])
    assert first[-1]["logprobs"] == [steps[0]]
    assert done["logprobs"] == steps
    assert output.items[1]["content"][0]["logprobs"] == steps


def test_an_item_that_was_cut_short() -> None:
    output = OutputEvents("0")
    output.push(TextDelta("a"), [])
    output.push(ToolCallBegin(0, "c0", "look"), [])
    output.end(status="incomplete")
    assert [item["status"] for item in output.items] == ["completed", "incomplete"]
