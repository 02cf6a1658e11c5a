"""What a request says about tools is checked, and refused by name where it cannot be served."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.server.chat.formats import PLAIN_TEXT, ChatFormat, chat_format_of
from pellucid.server.chat.tools import ChatTurn, parse_chat_turn
from tests.support import chat_templates
from tests.support.chat_templates import chat_tokenizer
from tests.support.grammars import compiled

HERMES = chat_format_of(chat_tokenizer(chat_templates.HERMES))
WANTED = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed_tools(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def turn_of(tools: Any = None, choice: Any = None, parallel: Any = None, model_format: ChatFormat = HERMES) -> ChatTurn:
    return parse_chat_turn(tools, choice, parallel, model_format)


def test_without_tools_nothing_changes() -> None:
    params = SamplingParams(max_tokens=3, structured_outputs=StructuredOutputsParams(regex="a"))
    for tools, choice in ((None, None), ([], None), (None, "auto"), (None, "none"), ([tool()], "none")):
        turn = turn_of(tools, choice)
        assert (turn.tools, turn.callable_names) == ((), ())
        assert turn.sampling_params(params) == params


@pytest.mark.parametrize(
    ("choice", "names", "required"),
    [
        (None, ("f", "g", "h"), False),
        ("auto", ("f", "g", "h"), False),
        ("required", ("f", "g", "h"), True),
        (named("g"), ("g",), True),
        (allowed_tools("auto", "g", "h"), ("g", "h"), False),
        (allowed_tools("required", "h"), ("h",), True),
    ],
)
def test_what_may_be_called(choice: Any, names: tuple[str, ...], required: bool) -> None:
    turn = turn_of([tool("f"), tool("g"), tool("h")], choice)
    assert [each["name"] for each in turn.tools] == ["f", "g", "h"]
    assert (turn.callable_names, turn.is_required) == (names, required)


def test_a_tool_without_parameters_takes_none() -> None:
    for fields in ({}, {"parameters": None}, {"parameters": {}}, {"parameters": {"type": "object", "properties": {}}}):
        (parsed,) = turn_of([tool(**fields)]).tools
        assert parsed == {"name": "f", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ({}, "tools"),
        ([tool(f"f{number}") for number in range(129)], "tools"),
        (["f"], "tools[0]"),
        ([{"type": "function"}], "tools[0].function"),
        ([tool(), {"type": "custom", "custom": {"name": "x"}}], "tools[1].type"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"function": {"name": "f"}}], "tools[0].type"),
        ([{**tool(), "custom": {}}], "tools[0].custom"),
        ([tool("")], "tools[0].function.name"),
        ([tool("a b")], "tools[0].function.name"),
        ([tool("é")], "tools[0].function.name"),
        ([tool("f\n")], "tools[0].function.name"),
        ([tool("x" * 65)], "tools[0].function.name"),
        ([tool(), tool()], "tools[1].function.name"),
        ([tool(description=3)], "tools[0].function.description"),
        ([tool(strict="yes")], "tools[0].function.strict"),
        ([tool(parameters="{}")], "tools[0].function.parameters"),
        ([tool(parameters={"type": "array"})], "tools[0].function.parameters.type"),
        ([tool(examples=[])], "tools[0].function.examples"),
    ],
)
def test_malformed_tools_are_refused_by_name(tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        turn_of(tools)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("any", "tool_choice"),
        (3, "tool_choice"),
        ({"type": "tool", "name": "f"}, "tool_choice.type"),
        (named("g"), "tool_choice"),
        ({"type": "function"}, "tool_choice.function"),
        ({"type": "function", "name": "f"}, "tool_choice.name"),
        ({"type": "function", "function": {"name": 3}}, "tool_choice.function.name"),
        (allowed_tools("none", "f"), "tool_choice.allowed_tools.mode"),
        (allowed_tools("auto"), "tool_choice.allowed_tools.tools"),
        (allowed_tools("auto", "f", "g"), "tool_choice"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice.mode"),
    ],
)
def test_malformed_choices_are_refused_by_name(choice: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        turn_of([tool()], choice)
    assert caught.value.param == param


@pytest.mark.parametrize("choice", ["required", named("f")])
def test_a_choice_needs_tools(choice: Any) -> None:
    with pytest.raises(InvalidRequestError, match="tool_choice") as caught:
        turn_of(None, choice)
    assert caught.value.param == "tool_choice"


def test_parallel_tool_calls_is_a_boolean() -> None:
    with pytest.raises(InvalidRequestError, match="parallel_tool_calls"):
        turn_of([tool()], parallel=1)


def test_a_model_without_a_format_of_calls_takes_no_tools() -> None:
    with pytest.raises(InvalidRequestError, match="tools is not supported") as caught:
        turn_of([tool()], model_format=PLAIN_TEXT)
    assert caught.value.param == "tools"
    assert turn_of([tool()], "none", model_format=PLAIN_TEXT) == ChatTurn()


def test_a_structural_tag_and_tools_are_two_things() -> None:
    structured = StructuredOutputsParams(structural_tag={"format": {"type": "any_text"}})
    params = SamplingParams(structured_outputs=structured)
    turn = parse_chat_turn([tool()], None, None, HERMES, has_format=True)
    with pytest.raises(InvalidRequestError, match="calls among it") as caught:
        turn.sampling_params(params)
    assert caught.value.param == "structured_outputs"
    assert turn_of([tool()], "none").sampling_params(params) == params


def test_special_tokens_are_kept_where_they_are_markers() -> None:
    params = SamplingParams()
    mistral = chat_format_of(chat_tokenizer(chat_templates.MISTRAL, "[TOOL_CALLS]"))
    assert not turn_of([tool()], model_format=mistral).sampling_params(params).skip_special_tokens
    assert turn_of(model_format=mistral).sampling_params(params).skip_special_tokens
    assert turn_of([tool()], model_format=HERMES).sampling_params(params).skip_special_tokens
    text = chat_format_of(chat_tokenizer(chat_templates.MISTRAL, plain=("[TOOL_CALLS]",)))
    assert turn_of([tool()], model_format=text).sampling_params(params).skip_special_tokens
    gemma = chat_format_of(chat_tokenizer(chat_templates.PLAIN, "<|channel>", "<channel|>"))
    assert gemma.reasoning is not None
    assert not turn_of(model_format=gemma).sampling_params(params).skip_special_tokens


def schema_of(parameters: Any) -> Any:
    """The schema that arguments are held to."""
    params = turn_of([tool(parameters=parameters)], "required").sampling_params(SamplingParams())
    assert params.structured_outputs is not None
    form = json.loads(str(params.structured_outputs.structural_tag))["format"]
    return form["tags"][0]["content"]["json_schema"]


def test_schemas_that_are_too_large_are_refused_by_name() -> None:
    nested: Any = {}
    for _ in range(5000):
        nested = {"items": nested}
    for parameters in (nested, {"description": "x" * 70_000}, {"const": float("nan")}, {"const": "\ud800"}):
        with pytest.raises(InvalidRequestError) as caught:
            turn_of([tool(parameters=parameters)])
        assert caught.value.param == "tools[0].function.parameters"
    turn = turn_of([tool(f"f{number}", parameters={"description": "x" * 60_000}) for number in range(5)])
    with pytest.raises(
        InvalidRequestError, match="held to their parameters: the grammar of the calls is too"
    ) as caught:
        turn.sampling_params(SamplingParams())
    assert caught.value.param == "tools"


def test_arguments_are_those_that_the_schema_lists() -> None:
    assert schema_of(WANTED) == {**WANTED, "additionalProperties": False}
    assert schema_of(None) == {"type": "object", "properties": {}, "additionalProperties": False}
    assert schema_of({"properties": {}})["type"] == "object"
    for keyword in ({"additionalProperties": True}, {"patternProperties": {}}, {"anyOf": [{}]}, {"$ref": "#/$defs/a"}):
        schema = {"type": "object", **keyword}
        assert schema_of(schema) == schema


def test_a_schema_that_cannot_be_held_to_is_blamed_on_tools() -> None:
    turn = turn_of([tool(parameters={"type": "object", "properties": {"a": {"not": {}}}})])
    params = turn.sampling_params(SamplingParams())
    assert params.structured_outputs is not None
    with pytest.raises(InvalidRequestError) as caught:
        compiled(chat_tokenizer(chat_templates.HERMES), structural_tag=params.structured_outputs.structural_tag)
    blamed = turn.blamed(caught.value)
    assert blamed.param == "tools"
    assert blamed.message.endswith(': the grammar of the calls: Unimplemented keys: ["not"]')
    other = InvalidRequestError("x", param="messages")
    assert turn.blamed(other) is other
    assert turn_of().blamed(caught.value) is caught.value
