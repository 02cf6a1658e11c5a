"""One question in three forms, to a real model: chat completions, messages, responses. All say the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.support.live_server import LiveServer, live_server
from tests.support.tokenizers import model_path

pytestmark = pytest.mark.slow

QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris and in Rome?"}]
SYSTEM = "You look things up."
NAME, DESCRIPTION = "get_weather", "The weather of a city"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
FORECAST: dict[str, Any] = {
    "type": "object",
    "properties": {"sky": {"enum": ["sunny", "cloudy"]}},
    "required": ["sky"],
    "additionalProperties": False,
}
LIMIT = 120


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(str(model_path("smollm2-135m-instruct")), kv_cache_memory=256 << 20) as server:
        yield server


@pytest.fixture(scope="module")
def openai_client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def anthropic_client(server: LiveServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


Answer = tuple[str, list[tuple[str, Any]], int]
"""The text, the calls with their arguments, and how many tokens it took."""


def by_chat(client: openai.OpenAI, choice: str, **options: Any) -> Answer:
    tool = {"type": "function", "function": {"name": NAME, "description": DESCRIPTION, "parameters": SCHEMA}}
    named: Any = {"type": "function", "function": {"name": NAME}}
    completion: Any = client.chat.completions.create(
        model="tiny",
        max_tokens=LIMIT,
        messages=[{"role": "system", "content": SYSTEM}, *QUESTION],
        tools=[tool],  # type: ignore[list-item]
        tool_choice=named if choice == "named" else choice,
        extra_body=options,
    )
    message = completion.choices[0].message
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]
    return message.content or "", calls, completion.usage.completion_tokens


def by_messages(client: anthropic.Anthropic, choice: str, *, stream: bool = False, **options: Any) -> Answer:
    kinds: Any = {"required": {"type": "any"}, "named": {"type": "tool", "name": NAME}}
    asked: Any = {
        "model": "tiny",
        "max_tokens": LIMIT,
        "system": SYSTEM,
        "messages": QUESTION,
        "tools": [{"name": NAME, "description": DESCRIPTION, "input_schema": SCHEMA}],
        "tool_choice": kinds.get(choice, {"type": choice}),
        "extra_body": options,
    }
    if stream:
        with client.messages.stream(**asked) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**asked)
    text = "".join(block.text for block in message.content if block.type == "text")
    calls = [(block.name, block.input) for block in message.content if block.type == "tool_use"]
    assert (message.stop_reason == "tool_use") == bool(calls)
    return text, calls, message.usage.output_tokens


def by_responses(client: openai.OpenAI, choice: str, *, stream: bool = False, **options: Any) -> Answer:
    asked: Any = {
        "model": "tiny",
        "max_output_tokens": LIMIT,
        "instructions": SYSTEM,
        "input": QUESTION,
        "tools": [{"type": "function", "name": NAME, "description": DESCRIPTION, "parameters": SCHEMA}],
        "tool_choice": {"type": "function", "name": NAME} if choice == "named" else choice,
        "extra_body": options,
    }
    response: Any = client.responses.create(**asked, stream=stream)
    if stream:
        *_, last = response
        response = last.response
    calls = [(item.name, json.loads(item.arguments)) for item in response.output if item.type == "function_call"]
    return response.output_text, calls, response.usage.output_tokens


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 0.9, "seed": 11, "min_p": 0.05}, {"temperature": 0, "guided_json": FORECAST}],
)
@pytest.mark.parametrize("choice", ["none", "auto", "required", "named"])
def test_all_say_the_same(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, choice: str, options: dict[str, Any]
) -> None:
    answer = by_chat(openai_client, choice, **options)
    assert bool(answer[1]) or choice in ("none", "auto")
    if "guided_json" in options and not answer[1]:
        assert json.loads(answer[0])["sky"] in ("sunny", "cloudy")
    for stream in (False, True):
        assert by_messages(anthropic_client, choice, stream=stream, **options) == answer
        assert by_responses(openai_client, choice, stream=stream, **options) == answer


def test_results_of_tools(openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic) -> None:
    """What a tool gave goes back in each form; all go on alike."""
    arguments, result = {"city": "Paris", "unit": "c"}, "18 degrees and sunny"
    call = {"id": "call_0", "type": "function", "function": {"name": NAME, "arguments": json.dumps(arguments)}}
    tool = {"type": "function", "function": {"name": NAME, "description": DESCRIPTION, "parameters": SCHEMA}}
    said = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": result},
    ]
    chat: Any = openai_client.chat.completions.create(
        model="tiny",
        max_tokens=40,
        temperature=0,
        messages=[*QUESTION, *said],
        tools=[tool],  # type: ignore[list-item]
    )
    use = {"type": "tool_use", "id": "call_0", "name": NAME, "input": arguments}
    given = {"type": "tool_result", "tool_use_id": "call_0", "content": result}
    message: Any = anthropic_client.messages.create(
        model="tiny",
        max_tokens=40,
        messages=[*QUESTION, {"role": "assistant", "content": [use]}, {"role": "user", "content": [given]}],
        tools=[{"name": NAME, "description": DESCRIPTION, "input_schema": SCHEMA}],
        extra_body={"temperature": 0},
    )
    called = {"type": "function_call", "call_id": "call_0", "name": NAME, "arguments": json.dumps(arguments)}
    response: Any = openai_client.responses.create(
        model="tiny",
        max_output_tokens=40,
        temperature=0,
        input=[*QUESTION, called, {"type": "function_call_output", "call_id": "call_0", "output": result}],
        tools=[{"type": "function", "name": NAME, "description": DESCRIPTION, "parameters": SCHEMA}],  # type: ignore[list-item]
    )
    text = chat.choices[0].message.content
    assert text
    assert [block.text for block in message.content] == [text]
    assert response.output_text == text


def test_a_schema_beside_tools(openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic) -> None:
    """Each form's own field for it means the same."""
    form: Any = {"type": "json_schema", "schema": FORECAST}
    chat = {"type": "json_schema", "json_schema": {"name": "sky", "schema": FORECAST}}
    for seed in range(4):
        options: dict[str, Any] = {"temperature": 1.2, "seed": seed}
        answer = by_chat(openai_client, "auto", response_format=chat, **options)
        assert answer[1] or json.loads(answer[0])["sky"] in ("sunny", "cloudy")
        assert by_messages(anthropic_client, "auto", output_config={"format": form}, **options) == answer
        assert by_responses(openai_client, "auto", text={"format": {**form, "name": "sky"}}, **options) == answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_held_to(openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, stream: bool) -> None:
    form = {"type": "json_schema", "name": "weather", "schema": SCHEMA}
    response: Any = openai_client.responses.create(
        model="tiny",
        temperature=0,
        max_output_tokens=LIMIT,
        input=QUESTION,
        text={"format": form},  # type: ignore[arg-type]
    )
    asked: Any = {"model": "tiny", "max_tokens": LIMIT, "messages": QUESTION}
    asked |= {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "extra_body": {"temperature": 0}}
    if stream:
        with anthropic_client.messages.stream(**asked) as events:
            message = events.get_final_message()
    else:
        message = anthropic_client.messages.create(**asked)
    (block,) = message.content
    assert block.type == "text"
    assert block.text == response.output_text
    assert set(json.loads(block.text)) == {"city", "unit"}
