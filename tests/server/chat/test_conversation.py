"""Conversations with calls come to the model in the form of its chat template, or as plain turns."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.server.chat.conversation import read_messages
from pellucid.server.chat.formats import chat_format_of
from pellucid.server.chat.tools import ChatTurn, parse_chat_turn, render_chat
from pellucid.server.served_model import ServedModel
from tests.support import chat_templates
from tests.support.chat_templates import chat_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": True,
    },
}
USER = {"role": "user", "content": "Weather?"}
TEXT = {"type": "text", "text": "x"}


def call(call_id: str, city: str = "Paris") -> dict[str, Any]:
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def result(call_id: str, text: str = "sunny") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def calls(*each: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(each), **fields}


ONE = [USER, calls(call("call_1")), result("call_1")]
TWO = [USER, calls(call("c1"), call("c2", "Zürich")), result("c2", "rain"), result("c1", "sun")]


def served(template: str, *special: str, **parsers: str) -> ServedModel:
    tokenizer = chat_tokenizer(template, *special)
    return ServedModel(
        ("m",), tokenizer, 4096, tokenizer.vocab_size, 8, chat_format=chat_format_of(tokenizer, **parsers)
    )


def rendered(
    template: str, messages: Any, tools: Any = None, tool_choice: Any = None, *special: str, **template_kwargs: Any
) -> tuple[str, ChatTurn]:
    model = served(template, *special)
    turn = parse_chat_turn(tools, tool_choice, None, model.chat_format)
    token_ids, turn = render_chat(messages, turn, model, **template_kwargs)
    return model.tokenizer.decode(token_ids, skip_special_tokens=False), turn


def test_a_template_that_takes_tools_gets_them() -> None:
    text, _ = rendered(chat_templates.HERMES, ONE, [TOOL])
    declared = json.loads(text.split("\n")[1])
    assert declared["function"] == {name: value for name, value in TOOL["function"].items() if name != "strict"}  # type: ignore[attr-defined]
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>' in text
    assert text.endswith("<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n")


def test_arguments_are_given_as_the_template_takes_them() -> None:
    for template in (chat_templates.HERMES, chat_templates.TEXT_ARGUMENTS):
        assert '"arguments": {"city": "Paris"}}' in rendered(template, ONE, [TOOL])[0]
        assert '{"city": "Zürich"}' in rendered(template, TWO, [TOOL])[0]


def test_xml_tools_are_functions() -> None:
    text, _ = rendered(chat_templates.XML_TOOLS, [USER], [TOOL])
    assert json.loads(text.split("\n")[1])["name"] == "get_weather"
    with pytest.raises(InvalidRequestError, match="xml_tools is what tools are given as"):
        rendered(chat_templates.XML_TOOLS, [USER], [TOOL], xml_tools=[])


def test_a_template_with_one_call_a_turn_gets_turns_of_one() -> None:
    text, _ = rendered(chat_templates.LLAMA, TWO, [TOOL], None, "<|python_tag|>")
    places = [text.index(each) for each in ('{"city": "Paris"}', "\nsun<", '{"city": "Zürich"}', "\nrain<")]
    assert places == sorted(places)


def test_ids_are_given_as_mistral_takes_them() -> None:
    text, _ = rendered(chat_templates.MISTRAL, ONE, [TOOL])
    (written,) = {part.split('"')[0] for part in text.split('"id": "')[1:]}
    assert len(written) == 9
    assert f"[TOOL_RESULTS] {written} sunny" in text
    own = [USER, calls(call("abcDEF123")), result("abcDEF123")]
    assert '"id": "abcDEF123"' in rendered(chat_templates.MISTRAL, own, [TOOL])[0]


def test_other_templates_get_plain_turns_and_a_system_message() -> None:
    text, _ = rendered(chat_templates.PLAIN, [*TWO, {"role": "user", "content": "And now?"}], [TOOL])
    system, user, assistant, results, opening = text.split("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\n")
    assert json.dumps(TOOL["function"]["parameters"]) in system  # type: ignore[index]
    assert "<tool_call>" in system
    assert user == "<|im_start|>user\nWeather?"
    assert assistant.count("<tool_call>\n{") == 2
    assert results.startswith("<|im_start|>user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n")
    assert results.endswith("</tool_response>\nAnd now?")
    assert opening == "<|im_start|>assistant\n"


def test_a_system_message_of_the_request_stays() -> None:
    knowing = chat_templates.SMOLLM + "{# developer #}"
    for template, role in ((chat_templates.SMOLLM, "system"), (knowing, "developer")):
        text, _ = rendered(template, [{"role": role, "content": "Be brief."}, USER], [TOOL])
        assert text.startswith(f"<|im_start|>{role}\nBe brief.\n\nYou are good at")
        assert text.count("Be brief.") == 1


def test_what_the_developer_says_is_what_the_system_says() -> None:
    said, by_system = ([{"role": role, "content": "Be brief."}, USER] for role in ("developer", "system"))
    text = rendered(chat_templates.PLAIN, said)[0]
    assert text == rendered(chat_templates.PLAIN, by_system)[0]
    assert "developer" not in text
    knowing = chat_templates.PLAIN + "{# developer #}"
    assert "<|im_start|>developer" in rendered(knowing, said)[0]


def test_without_tools_to_call_the_prompt_tells_of_none() -> None:
    for template in (chat_templates.HERMES, chat_templates.PLAIN):
        assert "get_weather" not in rendered(template, [USER], [TOOL], "none")[0]
        assert rendered(template, [USER], [TOOL], "none") == rendered(template, [USER])


def test_special_tokens_in_results_and_tools_are_text() -> None:
    end = 272
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}
    messages = [USER, calls(call("c", "<|im_end|>")), result("c", "<|im_end|>")]
    for template in (chat_templates.HERMES, chat_templates.PLAIN):
        model = served(template)
        turn = parse_chat_turn([tool, TOOL], None, None, model.chat_format)
        token_ids, _ = render_chat(messages, turn, model)
        text = model.tokenizer.decode(token_ids, skip_special_tokens=False)
        assert text.count("<|im_end|>") - token_ids.count(end) == 3


def test_what_clients_send_back_is_taken() -> None:
    answer = calls(call("call_1"), refusal=None, annotations=[], audio=None, function_call=None, reasoning="hm")
    (_, read, _) = read_messages([USER, answer, result("call_1")])
    assert set(read) == {"role", "content", "tool_calls", "reasoning_content"}
    assert read_messages([{"role": "assistant", "content": "x", "tool_calls": []}]) == [
        {"role": "assistant", "content": "x"}
    ]
    parsed = [{"role": "assistant", "content": "{}", "parsed": {"a": 1}, "provider_specific_fields": {"refusal": None}}]
    assert read_messages(parsed) == [{"role": "assistant", "content": "{}"}]
    marked = {**TEXT, "cache_control": {"type": "ephemeral", "ttl": "5m"}}
    assert read_messages([{"role": "user", "content": [marked, TEXT]}]) == [{"role": "user", "content": "x\nx"}]
    joined = {**call("c"), "index": 0}
    joined["function"] = {**joined["function"], "parsed_arguments": {"city": "Paris"}}
    assert read_messages([calls(joined)]) == read_messages([calls(call("c"))])
    empty = {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert read_messages([calls(empty)])[0]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("x", "messages"),
        ([], "messages"),
        (["x"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": "x", "tool_calls": [call("c")]}], "messages[0].tool_calls"),
        ([calls("x")], "messages[0].tool_calls[0]"),  # type: ignore[arg-type]
        ([{"role": "assistant", "content": "x", "tool_calls": {}}], "messages[0].tool_calls"),
        ([calls({**call("c"), "index": "0"})], "messages[0].tool_calls[0].index"),
        ([calls({**call("c"), "place": 0})], "messages[0].tool_calls[0].place"),
        ([calls({**call("c"), "type": "custom"})], "messages[0].tool_calls[0].type"),
        ([calls({**call("c"), "id": None})], "messages[0].tool_calls[0].id"),
        ([calls({**call("c"), "id": "\ud800"})], "messages[0].tool_calls[0].id"),
        ([calls({**call("c"), "function": None})], "messages[0].tool_calls[0].function"),
        ([calls({**call("c"), "function": {"name": 1}})], "messages[0].tool_calls[0].function.name"),
        (
            [calls({**call("c"), "function": {"name": "f", "arguments": "[1]"}})],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [calls({**call("c"), "function": {"name": "f", "arguments": '{"a": '}})],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [calls({**call("c"), "function": {"name": "f", "arguments": "[" * 100_000}})],
            "messages[0].tool_calls[0].function.arguments",
        ),
        ([USER, result("c")], "messages[1].tool_call_id"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([calls(call("c")), {**result("c"), "content": None}], "messages[1].content"),
        ([{"role": "assistant", "content": "x", "refusal": "no"}], "messages[0].refusal"),
        ([{**USER, "parsed": {}}], "messages[0].parsed"),
        ([{"role": "user", "content": [{**TEXT, "detail": "high"}]}], "messages[0].content[0].detail"),
        (
            [{"role": "user", "content": [TEXT, {**TEXT, "cache_control": {}}]}],
            "messages[0].content[1].cache_control.type",
        ),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
    ],
)
def test_malformed_messages_are_refused_by_name(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_messages(messages)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("template", "kwargs", "reasoning"),
    [
        (chat_templates.PLAIN, {}, "off"),
        (chat_templates.THINKING, {}, "possible"),
        (chat_templates.THINKING, {"enable_thinking": True}, "possible"),
        (chat_templates.THINKING, {"enable_thinking": False}, "off"),
        (chat_templates.ALWAYS_THINKING, {}, "begun"),
    ],
)
def test_where_an_answer_begins(template: str, kwargs: dict[str, Any], reasoning: str) -> None:
    user = {"role": "user", "content": "What does </think> or <think> mean?"}
    assert rendered(template, [user], **kwargs)[1].reasoning == reasoning


def test_deepseeks_answers_begin_in_reasoning() -> None:
    model = served(chat_templates.PLAIN, reasoning_parser="deepseek_r1")
    turn = parse_chat_turn(None, None, None, model.chat_format)
    assert render_chat([USER], turn, model)[1].reasoning == "begun"
