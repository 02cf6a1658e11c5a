"""Bodies of the Anthropic API: what chat each is, and that nothing is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError, ModelNotFoundError
from pellucid.core.sampling_params import SamplingParams
from pellucid.server.anthropic.requests import parse_count_tokens, parse_messages
from pellucid.server.chat.formats import chat_format_of
from pellucid.server.openai import chat_body
from pellucid.server.openai.requests import GenerationRequest, parse_chat_completion
from pellucid.server.served_model import ServedModel
from pellucid.tokenizer import Tokenizer
from tests.server.openai.test_requests import VALUES
from tests.support.chat_bodies import RecordedChats
from tests.support.chat_models import TOKENIZER
from tests.support.served_models import served_model

MODEL = served_model()
HI = [{"role": "user", "content": "hi"}]
LEAST = {"model": "m", "max_tokens": 5, "messages": HI}
TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "default": None}}


def parse(**body: Any) -> GenerationRequest:
    return parse_messages({**LEAST, **body}, MODEL)


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The bodies of chat completions that bodies are rewritten to."""
    recorded = RecordedChats()
    monkeypatch.setattr(chat_body, "parse_chat_completion", recorded)
    return recorded.bodies


def chat_of(chats: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
    """What `body` says beyond the least."""
    parse(**body)
    least = {"model": "m", "max_tokens": 5, "messages": HI, "stream": False}
    return {name: value for name, value in chats[-1].items() if name not in least or value != least[name]}


def test_the_least_body() -> None:
    assert parse() == parse_chat_completion({"model": "m", "max_tokens": 5, "messages": HI}, MODEL)


def test_every_sampling_parameter_can_be_given() -> None:
    values = VALUES | {"n": 1, "prompt_logprobs": None, "max_tokens": 5}
    assert {name for name in VALUES if name != "max_tokens"} - chat_body.EXTENSION_FIELDS == {"prompt_logprobs"}
    stop = values.pop("stop")
    expected = SamplingParams(**values | {"stop": stop, "logit_bias": {5: 1, 7: -100}})
    assert parse(**values, stop_sequences=stop).sampling_params == expected


def test_null_is_as_good_as_nothing() -> None:
    names = ["system", "stop_sequences", "stream", "metadata", "tools", "tool_choice", "thinking", "container", "top_k"]
    assert parse(**dict.fromkeys(names)) == parse()


@pytest.mark.parametrize(
    "body",
    [
        {"metadata": {"user_id": "me"}},
        {"metadata": {"user_id": None}},
        {"service_tier": "standard_only"},
        {"cache_control": {"type": "ephemeral"}},
        {"mcp_servers": []},
        {"output_config": {}},
        {"thinking": {"type": "disabled"}},
        {"thinking": {"type": "adaptive", "display": "summarized"}},
        {"user_profile_id": "me"},
        {"n": 1},
    ],
)
def test_what_asks_for_nothing_is_taken(chats: list[dict[str, Any]], body: dict[str, Any]) -> None:
    assert {name: value for name, value in chat_of(chats, **body).items() if name != "n"} == {}


@pytest.mark.parametrize(
    ("body", "chat"),
    [
        ({"stop_sequences": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stream": True}, {"stream": True}),
        ({"top_k": 5, "min_p": 0.5}, {"top_k": 5, "min_p": 0.5}),
        ({"guided_regex": "a+"}, {"guided_regex": "a+"}),
        ({"priority": 5, "cache_salt": "x"}, {"priority": 5, "cache_salt": "x"}),
        ({"tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        (
            {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"tool_choice": {"type": "tool", "name": "look", "disable_parallel_tool_use": False}},
            {"tool_choice": {"type": "function", "function": {"name": "look"}}, "parallel_tool_calls": True},
        ),
        ({"output_config": {"effort": "high"}}, {}),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"default": None}}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "output", "schema": {"default": None}},
                }
            },
        ),
    ],
)
def test_what_chat_it_is(chats: list[dict[str, Any]], body: dict[str, Any], chat: dict[str, Any]) -> None:
    assert chat_of(chats, **body) == chat


@pytest.mark.parametrize(
    ("fields", "function"),
    [
        ({}, {}),
        ({"type": "custom", "cache_control": {"type": "ephemeral"}, "eager_input_streaming": True}, {}),
        ({"defer_loading": False, "allowed_callers": ["direct"], "input_examples": []}, {}),
        ({"strict": True}, {"strict": True}),
    ],
)
def test_tools(chats: list[dict[str, Any]], fields: dict[str, Any], function: dict[str, Any]) -> None:
    described = {"name": "look", "description": "Looks.", "parameters": TOOL["input_schema"], **function}
    assert chat_of(chats, tools=[{**TOOL, **fields}]) == {"tools": [{"type": "function", "function": described}]}


def test_an_answer_goes_on_from_how_it_begins() -> None:
    begun = parse(messages=[*HI, {"role": "assistant", "content": "well"}])
    (prompt,), (plain,) = begun.prompts, parse().prompts
    assert prompt == [*plain, *MODEL.tokenizer.encode("well")]


def test_counting_tokens() -> None:
    body = {"model": "m", "system": "x", "messages": [*HI, {"role": "assistant", "content": "well"}]}
    (prompt,) = parse(**body).prompts
    assert parse_count_tokens(body, MODEL) == len(prompt)
    with pytest.raises(InvalidRequestError, match="not a parameter") as caught:
        parse_count_tokens({**body, "max_tokens": 5}, MODEL)
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"system": 5}, "system"),
        ({"stream": "yes"}, "stream"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop": ["a"]}, "stop"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": 2**63}, "top_k"),
        ({"n": 2}, "n"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"metadata": {"user_id": 5}}, "metadata.user_id"),
        ({"metadata": {"name": "me"}}, "metadata.name"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"container": "x"}, "container"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"context_management": {}}, "context_management"),
        ({"speed": "fast"}, "speed"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"cache_control": {"type": "x"}}, "cache_control.type"),
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "name": None}]}, "tools[0].name"),
        ({"tools": [{**TOOL, "input_schema": None}]}, "tools[0].input_schema"),
        ({"tools": [{**TOOL, "input_schema": "{}"}]}, "tools[0].input_schema"),
        ({"tools": [{**TOOL, "description": 5}]}, "tools[0].description"),
        ({"tools": [{**TOOL, "strict": 1}]}, "tools[0].strict"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools[0].input_examples"),
        ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers"),
        ({"tools": [{**TOOL, "parameters": {}}]}, "tools[0].parameters"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {}}, "tool_choice.type"),
        ({"tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "auto", "name": "look"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any", "disable_parallel_tool_use": 1}}, "tool_choice.disable_parallel_tool_use"),
        ({"thinking": {}}, "thinking.type"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "disabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1023}, "max_tokens": 5000}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5000}, "max_tokens": 5000}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 5000}, "thinking"),
        ({"output_config": []}, "output_config"),
        ({"output_config": {"effort": 5}}, "output_config.effort"),
        ({"output_config": {"effort": "none"}}, "output_config.effort"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": []}}}, "output_config.format.schema"),
        ({"xyzzy": 1}, "xyzzy"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(**body)
    assert caught.value.param == param
    assert param.rpartition(".")[2] in caught.value.message  # this API has no field for it


def test_another_model() -> None:
    with pytest.raises(ModelNotFoundError):
        parse(model="other")


ENABLED = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000}
DISABLED = {"thinking": {"type": "disabled"}}
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
ALWAYS = "{# up to </think> #}<think>\n"


def thinking_model(opening: str) -> ServedModel:
    """A model whose answers begin with `opening`, a template."""
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}" + opening
    tokenizer = Tokenizer.from_gguf({**TOKENIZER, "tokenizer.chat_template": template})
    return served_model(tokenizer=tokenizer, chat_format=chat_format_of(tokenizer))


def test_thinking_is_switched() -> None:
    model = thinking_model(SWITCH)
    for thinking, switch in ((ENABLED, True), (DISABLED, False)):
        body = {"messages": HI, "chat_template_kwargs": {"enable_thinking": switch}}
        request = parse_messages({**LEAST, **thinking}, model)
        assert request.prompts == parse_chat_completion(body, model).prompts
        assert request.chat.reasoning == ("possible" if switch else "off")
    adaptive = parse_messages({**LEAST, "thinking": {"type": "adaptive"}}, model)
    assert adaptive == parse_messages(LEAST, model)


def test_effort_is_told_to_the_template() -> None:
    model = thinking_model("effort {{ reasoning_effort }}" + SWITCH)
    for thinking in ({}, ENABLED, DISABLED):
        kwargs = {"reasoning_effort": "max"}
        if thinking:
            kwargs["enable_thinking"] = thinking is ENABLED
        request = parse_messages({**LEAST, **thinking, "output_config": {"effort": "max"}}, model)
        assert request.prompts == parse_chat_completion({"messages": HI, "chat_template_kwargs": kwargs}, model).prompts


@pytest.mark.parametrize(
    ("opening", "body", "param"),
    [
        (ALWAYS, DISABLED, "thinking"),
        (
            "{{ reasoning_effort }}",
            {"output_config": {"effort": "low"}, "chat_template_kwargs": {"reasoning_effort": "high"}},
            "output_config.effort",
        ),
        (SWITCH, {**DISABLED, "chat_template_kwargs": {"enable_thinking": True}}, "thinking"),
        (SWITCH, {**ENABLED, "chat_template_kwargs": []}, "chat_template_kwargs"),
        (ALWAYS, {"messages": [*HI, {"role": "assistant", "content": "well"}]}, "messages"),
    ],
)
def test_what_a_model_that_thinks_cannot(opening: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_messages({**LEAST, **body}, thinking_model(opening))
    assert caught.value.param == param
