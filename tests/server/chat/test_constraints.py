"""Calls hold to the schema of their function, whatever the model: shown with answers drawn at random from what the
grammar of a turn allows, and with a real model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.json_schemas import SchemaMaker, validate
from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.structured_outputs import StructuredOutputsParams
from pellucid.engine.llm import LLM
from pellucid.server.chat.formats import chat_format_of
from pellucid.server.chat.message import ChatMessage
from pellucid.server.chat.parser import read_message
from pellucid.server.chat.tool_formats import base
from pellucid.server.chat.tool_request import MAX_TOOLS
from pellucid.server.chat.tools import ChatTurn, parse_chat_turn, render_chat
from pellucid.server.served_model import ServedModel
from pellucid.tokenizer import Tokenizer
from tests.support import chat_templates
from tests.support.chat_templates import chat_tokenizer
from tests.support.grammars import allowed, compiled
from tests.support.tokenizers import model_path

pytest.importorskip("jsonschema")

USER = [{"role": "user", "content": "Hi"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": CITY}},
    {"type": "function", "function": {"name": "f2"}},
]
FORMATS = {
    "hermes": (chat_templates.HERMES, (), "<tool_call>"),
    "hermes, special": (chat_templates.HERMES, ("<tool_call>", "</tool_call>"), "<tool_call>"),
    "smollm": (chat_templates.SMOLLM, (), "<tool_call>"),
    "llama": (chat_templates.LLAMA, ("<|python_tag|>",), "<|python_tag|>"),
    "llama, in text": (chat_templates.LLAMA, ("<|python_tag|>",), '{"name": "f", "parameters": '),
    "mistral": (chat_templates.MISTRAL, ("[TOOL_CALLS]",), "[TOOL_CALLS]"),
    "mistral, args": (chat_templates.MISTRAL_ARGS, ("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]"),
    "mistral, ids": (chat_templates.MISTRAL_CALL_ID, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), "[TOOL_CALLS]"),
}


def make_tools(count: int, seed: int) -> list[dict[str, Any]]:
    """Functions with random parameters."""
    maker, tools = SchemaMaker(seed), []
    for index in range(count):
        schema = maker.make()
        parameters = {"type": "object", "properties": {"x": schema, "n": {"type": "integer"}}, "required": ["x"]}
        if "$defs" in schema:
            parameters["$defs"] = schema.pop("$defs")
        tools.append({"type": "function", "function": {"name": f"tool_{index}", "parameters": parameters}})
    return tools


def served(tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(("m",), tokenizer, 4096, tokenizer.vocab_size, 8, chat_format=chat_format_of(tokenizer))


def turn_of(model: ServedModel, tools: Any, choice: Any, parallel: bool = True, **kwargs: Any) -> ChatTurn:
    return render_chat(USER, parse_chat_turn(tools, choice, parallel, model.chat_format), model, **kwargs)[1]


def random_answer(
    turn: ChatTurn,
    tokenizer: Tokenizer,
    begin: str,
    seed: int,
    max_tokens: int = 4000,
    asked: StructuredOutputsParams | None = None,
) -> str:
    """The text of an answer that begins so, drawn at random. It may end after half of the calls after which it can."""
    rng = np.random.RandomState(seed)
    params = turn.sampling_params(SamplingParams(structured_outputs=asked))
    assert params.structured_outputs is not None
    matcher = compiled(tokenizer, structural_tag=params.structured_outputs.structural_tag).matcher()
    token_ids = tokenizer.encode(begin, add_special_tokens=False, parse_special=True)
    while len(token_ids) < max_tokens:
        choices = allowed(matcher.masks(token_ids)[0])
        if set(choices) & tokenizer.eos_token_ids and (len(choices) == 2 or rng.rand() < 0.5):
            return tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens, continuation=True)
        token_ids.append(int(rng.choice([each for each in choices if each not in tokenizer.eos_token_ids])))
    raise AssertionError(f"no end: {tokenizer.decode(token_ids)!r}")


def check_calls(message: ChatMessage, tools: list[dict[str, Any]]) -> None:
    """Each call is of a function there is, with arguments that hold to its parameters."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
    for call in message.tool_calls:
        validate(call.arguments, schemas[call.name])


@pytest.mark.parametrize("name", FORMATS)
def test_calls_that_are_triggered_hold_to_their_schema(name: str) -> None:
    template, special, trigger = FORMATS[name]
    model = served(chat_tokenizer(template, *special))
    num_calls = 0
    for seed in range(6):
        tools = make_tools(2, seed) if name != "llama, in text" else TOOLS
        turn = turn_of(model, tools, "auto")
        text = random_answer(turn, model.tokenizer, f"Hm. {trigger}", seed)
        message = read_message(model.chat_format.parser(turn), text)
        check_calls(message, tools)
        num_calls += len(message.tool_calls)
        assert message.text.startswith("Hm."), text
        assert trigger not in message.text, text
    assert num_calls >= (1 if name == "smollm" else 6)


@pytest.mark.parametrize("name", FORMATS)
def test_required_answers_are_calls_and_nothing_else(name: str) -> None:
    template, special, _ = FORMATS[name]
    model = served(chat_tokenizer(template, *special))
    for seed in range(6):
        tools = make_tools(3, seed)
        turn = turn_of(model, tools, "required", parallel=seed % 2 == 0)
        text = random_answer(turn, model.tokenizer, "", seed)
        message = read_message(model.chat_format.parser(turn), text)
        check_calls(message, tools)
        assert message.text == "", text
        assert 1 <= len(message.tool_calls) <= (9 if turn.parallel_tool_calls else 1), text


@pytest.mark.parametrize("name", FORMATS)
def test_as_many_functions_as_a_request_may_have(name: str) -> None:
    template, special, trigger = FORMATS[name]
    model = served(chat_tokenizer(template, *special))
    parameters = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name in ("f", *(f"function_{number}" for number in range(MAX_TOOLS - 1)))
    ]
    turn = turn_of(model, tools, "auto", parallel=False)
    message = read_message(model.chat_format.parser(turn), random_answer(turn, model.tokenizer, trigger, 0))
    check_calls(message, tools)


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_function_is_the_one_that_is_called(name: str) -> None:
    template, special, _ = FORMATS[name]
    model = served(chat_tokenizer(template, *special))
    turn = turn_of(model, TOOLS, {"type": "function", "function": {"name": "f2"}}, parallel=False)
    for seed in range(3):
        message = read_message(model.chat_format.parser(turn), random_answer(turn, model.tokenizer, "", seed))
        assert [(call.name, call.arguments) for call in message.tool_calls] == [("f2", "{}")]


def allows(turn: ChatTurn, tokenizer: Tokenizer, text: str, asked: StructuredOutputsParams | None = None) -> bool:
    """Whether the whole answer may be `text`."""
    params = turn.sampling_params(SamplingParams(structured_outputs=asked)).structured_outputs
    assert params is not None
    matcher = compiled(tokenizer, structural_tag=params.structural_tag).matcher()
    try:
        mask = matcher.masks(tokenizer.encode(text, add_special_tokens=False, parse_special=True))[0]
    except InvalidRequestError:
        return False
    return bool(set(allowed(mask)) & tokenizer.eos_token_ids)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_prompt_shows_is_what_an_answer_may_be(name: str) -> None:
    template, special, _ = FORMATS[name]
    model = served(chat_tokenizer(template, *special))
    tools = model.chat_format.tools
    assert tools is not None
    one, two = [("f", '{"city": "Rome"}')], [("f", '{"city": "Rome"}'), ("f2", "{}")]
    if "args" in name or "ids" in name:
        return  # those are written as the list
    for calls in (one, two):
        for choice in ("auto", "required"):
            assert allows(turn_of(model, TOOLS, choice), model.tokenizer, tools.write_calls(calls)), (calls, choice)
    for choice in ("auto", "required"):
        turn = turn_of(model, TOOLS, choice, parallel=False)
        assert allows(turn, model.tokenizer, tools.write_calls(one))
        assert not allows(turn, model.tokenizer, tools.write_calls(two))


def test_other_names_and_arguments_are_not_allowed() -> None:
    model = served(chat_tokenizer(chat_templates.HERMES))
    turn = turn_of(model, TOOLS, "auto")
    call = '<tool_call>\n{"name": "f", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert allows(turn, model.tokenizer, call)
    for old, new in (('"f"', '"g"'), ("Rome", "Oslo"), ("}}", ', "x": 1}}'), ('{"city": "Rome"}', "{}")):
        assert not allows(turn, model.tokenizer, call.replace(old, new))


def test_json_that_has_a_name_is_no_call_of_llamas() -> None:
    model = served(chat_tokenizer(chat_templates.LLAMA, "<|python_tag|>"))
    turn = turn_of(model, TOOLS, "auto")
    for text in ('{"name": "Ada", "age": 36}', '[{"name": "f"}]', '{"name": "f3", "parameters": 1}'):
        assert allows(turn, model.tokenizer, text)
        assert read_message(model.chat_format.parser(turn), text) == ChatMessage(text)


CALL = '<tool_call>\n{"name": "f2", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "kwargs", "choice", "whole", "not_whole"),
    [
        (
            chat_templates.THINKING,
            {},
            "auto",
            ["x", "<think>a <tool_call> b</think>x", f"<think>a</think>\n\n{CALL}", CALL],
            ["<think>a", "<think>a</think><tool_call> b"],
        ),
        (
            chat_templates.THINKING,
            {},
            "required",
            [CALL, f"<think>\na <tool_call>\n</think>\n\n{CALL}"],
            ["x", "<think>a", "<think>a</think>x"],
        ),
        (chat_templates.THINKING, {"enable_thinking": False}, "required", [CALL], [f"<think></think>\n\n{CALL}"]),
        (
            chat_templates.ALWAYS_THINKING,
            {},
            "auto",
            ["a <tool_call> b", "a</think>x", f"a <tool_call></think>{CALL}"],
            ["a</think><tool_call> b"],
        ),
        (chat_templates.ALWAYS_THINKING, {}, "required", [f"a\n</think>\n\n{CALL}"], ["a", CALL, "a</think>x"]),
    ],
)
def test_reasoning_comes_before_calls(
    template: str, kwargs: dict[str, Any], choice: str, whole: list[str], not_whole: list[str]
) -> None:
    model = served(chat_tokenizer(template))
    turn = turn_of(model, TOOLS, choice, **kwargs)
    for text in whole:
        assert allows(turn, model.tokenizer, text), text
        message = read_message(model.chat_format.parser(turn), text)
        assert len(message.tool_calls) == (CALL in text)
        assert "think>" not in message.text
    for text in not_whole:
        assert not allows(turn, model.tokenizer, text), text


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"json": CITY}, '{"city": "Rome"}'),
        ({"json_object": True}, "{}"),
        ({"json": CITY, "whitespace_pattern": " ?"}, '{ "city":"Rome" }'),
        ({"regex": "a+"}, "aa"),
        ({"choice": ["yes", "no"]}, "no"),
        ({"grammar": 'start: "x"'}, "x"),
    ],
)
def test_what_is_asked_of_an_answer_is_asked_of_what_follows_the_reasoning(asked: dict[str, Any], text: str) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**asked))
    for template, begin in ((chat_templates.ALWAYS_THINKING, "hm\n"), (chat_templates.THINKING, "<think>\nhm\n")):
        model = served(chat_tokenizer(template))
        turn = turn_of(model, None, None)
        wrapped = turn.sampling_params(params)
        assert wrapped.structured_outputs is not None
        matcher = compiled(model.tokenizer, structural_tag=wrapped.structured_outputs.structural_tag).matcher()
        token_ids = model.tokenizer.encode(f"{begin}</think>\n\n{text}", add_special_tokens=False)
        assert set(allowed(matcher.masks(token_ids)[0])) & model.tokenizer.eos_token_ids
        with pytest.raises(InvalidRequestError):
            matcher.masks(model.tokenizer.encode(f"{begin}</think>\n\n?", add_special_tokens=False))
    thoughtless = turn_of(served(chat_tokenizer(chat_templates.THINKING)), None, None, enable_thinking=False)
    assert thoughtless.sampling_params(params) == params


def test_a_defect_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pellucid.server.chat.tool_formats.hermes.json_call",
        lambda tool, **text: base.json_call({**tool, "parameters": {"type": "object"}}, **text),
    )
    with pytest.raises(AssertionError):
        test_other_names_and_arguments_are_not_allowed()


@pytest.mark.slow
def test_a_real_model_calls_functions_by_their_schemas() -> None:
    with LLM(str(model_path("smollm2-135m-instruct")), max_model_len=1024) as llm:
        model = served(llm.tokenizer)
        asked, prompts, params = [], [], []
        for seed in range(12):
            tools = make_tools(1, seed)
            choice = ("required", {"type": "function", "function": {"name": "tool_0"}})[seed % 2]
            turn = parse_chat_turn(tools, choice, seed % 3 > 0, model.chat_format)
            prompt, turn = render_chat([{"role": "user", "content": "Call a tool."}], turn, model)
            if len(prompt) < 700:
                asked.append((tools, turn))
                prompts.append(prompt)
                params.append(turn.sampling_params(SamplingParams(temperature=1.0, seed=seed, max_tokens=200)))
        assert len(prompts) >= 6
        for (tools, turn), output in zip(asked, llm.generate(prompts, params), strict=True):
            (answer,) = output.outputs
            message = read_message(model.chat_format.parser(turn), answer.text)
            assert message.tool_calls or answer.finish_reason == "length", answer.text
            if answer.finish_reason == "length":
                del message.tool_calls[-1:]
            check_calls(message, tools)
