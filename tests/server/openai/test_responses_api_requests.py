"""Bodies of the Responses API: what chat each is, and that nothing is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError, ModelNotFoundError
from pellucid.core.sampling_params import SamplingParams
from pellucid.server.openai import chat_body
from pellucid.server.openai.requests import parse_chat_completion
from pellucid.server.openai.responses_api_requests import INCLUDABLE, LOGPROBS, ResponsesRequest, parse_response
from tests.server.openai.test_requests import VALUES
from tests.support.chat_bodies import RecordedChats
from tests.support.served_models import served_model

MODEL = served_model()
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "default": None}


def parse(**body: Any) -> ResponsesRequest:
    return parse_response({"model": "m", "input": "hi", **body}, MODEL)


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The bodies of chat completions that bodies are rewritten to."""
    recorded = RecordedChats()
    monkeypatch.setattr(chat_body, "parse_chat_completion", recorded)
    return recorded.bodies


def chat_of(chats: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
    """What `body` says beyond the least."""
    parse(**body)
    least = {"model": "m", "messages": HI, "stream": False}
    return {name: value for name, value in chats[-1].items() if name not in least or value != least[name]}


def test_the_least_body() -> None:
    assert parse().generation == parse_chat_completion({"model": "m", "messages": HI}, MODEL)
    assert parse_response({"input": "hi"}, MODEL) == parse()


def test_every_sampling_parameter_can_be_given() -> None:
    values = VALUES | {"n": 1, "prompt_logprobs": None}
    max_tokens = values.pop("max_tokens")
    expected = SamplingParams(**values | {"logit_bias": {5: 1, 7: -100}, "max_tokens": max_tokens})
    assert parse(**values, max_output_tokens=max_tokens).generation.sampling_params == expected


def test_null_is_as_good_as_nothing() -> None:
    names = ["instructions", "max_output_tokens", "store", "previous_response_id", "tools", "text", "reasoning", "user"]
    assert parse(**dict.fromkeys(names)) == parse()


@pytest.mark.parametrize(
    "body",
    [
        {"store": False},
        {"store": True},
        {"background": False},
        {"truncation": "disabled"},
        {"service_tier": "auto"},
        {"metadata": {"a": "b"}},
        {"max_tool_calls": 3},
        {"include": list(INCLUDABLE[1:])},
        {"top_logprobs": 0},
        {"text": {}},
        {"text": {"verbosity": "medium"}},
        {"reasoning": {"summary": "auto"}},
        {"user": "me", "safety_identifier": "x", "prompt_cache_key": "y", "prompt_cache_retention": "24h"},
        {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
    ],
)
def test_what_asks_for_nothing_is_taken(chats: list[dict[str, Any]], body: dict[str, Any]) -> None:
    assert chat_of(chats, **body) == {}


@pytest.mark.parametrize(
    ("body", "chat"),
    [
        ({"max_output_tokens": 5}, {"max_tokens": 5}),
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, {"stream": True}),
        ({"top_k": 5, "stop": ["a"], "priority": 1}, {"top_k": 5, "stop": ["a"], "priority": 1}),
        ({"include": [LOGPROBS]}, {"logprobs": True, "top_logprobs": 0}),
        ({"include": [LOGPROBS], "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"reasoning": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ({"text": {"format": {"type": "text"}}}, {"response_format": {"type": "text"}}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
        ),
        (
            {"tools": [{"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}]},
            {"tools": [{"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}}]},
        ),
        (
            {"tools": [{"type": "function", "name": "look", "description": "Looks.", "parameters": None}]},
            {"tools": [{"type": "function", "function": {"name": "look", "description": "Looks."}}]},
        ),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"tool_choice": {"type": "function", "name": "look"}},
            {"tool_choice": {"type": "function", "function": {"name": "look"}}},
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]}},
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "look"}}],
                    },
                }
            },
        ),
    ],
)
def test_what_chat_it_is(chats: list[dict[str, Any]], body: dict[str, Any], chat: dict[str, Any]) -> None:
    assert chat_of(chats, **body) == chat


def test_what_was_asked_for_is_said_again(chats: list[dict[str, Any]]) -> None:
    body = {
        "instructions": "be brief",
        "max_output_tokens": 5,
        "metadata": {"a": "b"},
        "tools": [{"type": "function", "name": "look"}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "text": {"format": {"type": "json_object"}},
        "user": "me",
    }
    echo = parse(**body).echo
    assert {name: echo[name] for name in body} == body
    echo = parse(store=True, reasoning={"summary": "auto"}).echo
    assert echo["store"] is False  # whatever was asked for, nothing is kept
    assert (echo["previous_response_id"], echo["truncation"]) == (None, "disabled")
    assert echo["reasoning"] == {"effort": None, "summary": "auto"}
    assert echo["text"] == {"format": {"type": "text"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"model": 5}, "model"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": HI}, "messages"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"conversation": "conv_0"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"store": "yes"}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {}}, "moderation"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"prompt_cache_retention": "48h"}, "prompt_cache_retention"),
        ({"prompt_cache_options": {"ttl": "31m"}}, "prompt_cache_options.ttl"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"metadata": {"a": 5}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"x" * 65: "a"}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"include": LOGPROBS}, "include"),
        ({"include": ["everything"]}, "include[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": [LOGPROBS], "top_logprobs": 21}, "top_logprobs"),
        ({"n": 2}, "n"),
        ({"user": 5}, "user"),
        ({"tools": {}}, "tools"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "look", "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{"type": "function", "function": {"name": "look"}}]}, "tools[0].function"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tool_choice": {"name": "look"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.mode"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": 5}}, "tool_choice.tools"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
            "tool_choice.tools[0].type",
        ),
        ({"text": []}, "text"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "y": 1}}}, "text.format.y"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
        ({"reasoning": {"budget": 5}}, "reasoning.budget"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(**body)
    assert caught.value.param == param


def test_another_model() -> None:
    with pytest.raises(ModelNotFoundError):
        parse(model="other")
