"""Bodies of chats in all three forms in which one thing is not what it should be: they are served, or refused."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.core.errors import PellucidError
from pellucid.server.anthropic.requests import parse_messages
from pellucid.server.chat.formats import chat_format_of
from pellucid.server.openai.requests import parse_chat_completion
from pellucid.server.openai.responses_api_requests import parse_response
from pellucid.tokenizer import Tokenizer
from tests.support.chat_models import CHAT_TEMPLATE, TOKENIZER
from tests.support.served_models import served_model

_TOKENIZER = Tokenizer.from_gguf({**TOKENIZER, "tokenizer.chat_template": CHAT_TEMPLATE + "{# </think> #}"})
MODEL = served_model(tokenizer=_TOKENIZER, chat_format=chat_format_of(_TOKENIZER))
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"name": "look", "description": "Looks.", "parameters": SCHEMA, "strict": True}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}

CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "logprobs": True,
    "top_logprobs": 2,
    "chat_template_kwargs": {"enable_thinking": True},
}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "max_tokens": 2000,
    "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "c1", "name": "look", "input": {"a": "b"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "a cat"}]},
    ],
    "tools": [{"name": "look", "input_schema": SCHEMA}],
    "tool_choice": {"type": "tool", "name": "look"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "stop_sequences": ["a"],
    "metadata": {"user_id": "me"},
}
RESPONSES: dict[str, Any] = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_0", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "a cat"},
    ],
    "tools": [{"type": "function", **FUNCTION}],
    "tool_choice": {"type": "function", "name": "look"},
    "text": {"format": {"type": "text"}},
    "reasoning": {"summary": "auto"},
    "include": ["message.output_text.logprobs"],
    "metadata": {"a": "b"},
}
ODD = st.sampled_from(
    [None, True, False, 0, -1, 2**63, 10**400, 1.5, "", "x", "\0", "user", [], {}, [None], [[]], {"type": 5}, {"": ""}]
)
FORMS = ((parse_chat_completion, CHAT), (parse_messages, MESSAGES), (parse_response, RESPONSES))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all that is in `value`."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in [(*path, key), *places(item, (*path, key))]]
    if isinstance(value, list):
        return [found for key, item in enumerate(value) for found in [(*path, key), *places(item, (*path, key))]]
    return []


def status(parse: Any, body: dict[str, Any]) -> int:
    """The HTTP status that answers `body`."""
    try:
        parse(body, MODEL)
    except PellucidError as error:
        return error.status
    return 200


def test_the_bodies_are_sound() -> None:
    assert [status(parse, body) for parse, body in FORMS] == [200, 200, 200]


@settings(max_examples=400)
@given(st.sampled_from(FORMS), st.data())
def test_one_thing_is_not_what_it_should_be(form: Any, data: st.DataObject) -> None:
    parse, body = form
    *path, last = data.draw(st.sampled_from(places(body)))
    changed = copy.deepcopy(body)
    parent = changed
    for key in path:
        parent = parent[key]
    parent[last] = data.draw(ODD)
    assert status(parse, changed) < 500
