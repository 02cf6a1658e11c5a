"""Calls are read from text the same however it is cut; what is no call is text, whole."""

from __future__ import annotations

import json
import random
import re

import pytest

from pellucid.server.chat.call_reader import CallReader
from pellucid.server.chat.events import TextDelta, ToolCallArguments, ToolCallBegin
from pellucid.server.chat.text_stream import Markers
from pellucid.server.chat.tool_formats.base import ToolFormat
from pellucid.server.chat.tool_formats.hermes import HermesFormat
from pellucid.server.chat.tool_formats.llama3_json import Llama3JsonFormat
from pellucid.server.chat.tool_formats.mistral import MistralFormat
from pellucid.server.chat.tool_formats.smollm import SmolLMFormat
from tests.support.answer_pieces import message_of, same_however_cut
from tests.support.mutants import mutant

HERMES, SMOLLM, LLAMA, MISTRAL = HermesFormat(), SmolLMFormat(), Llama3JsonFormat(), MistralFormat()
FORMATS: list[ToolFormat] = [HERMES, SMOLLM, LLAMA, MISTRAL]
NAMES = ("f", "get_weather", "a-b_C")
TRICKY = '{"t": "</tool_call> }{ \\" \\\\", "é": [1, {"x": "]"}], "e": {}}'
BLOCK = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def read(tool_format: ToolFormat, text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an answer."""
    message = same_however_cut(lambda: tool_format.reader(NAMES), text)
    return message.text, [(call.name, call.arguments) for call in message.tool_calls]


@pytest.mark.parametrize(
    ("tool_format", "text", "content", "calls"),
    [
        (HERMES, "", "", []),
        (HERMES, "  just text\n", "  just text\n", []),
        (HERMES, BLOCK, "", [("f", '{"a": 1}')]),
        (HERMES, f"{BLOCK}\n{BLOCK}\n", "", [("f", '{"a": 1}')] * 2),
        (HERMES, f"Let me see.\n\n{BLOCK}", "Let me see.", [("f", '{"a": 1}')]),
        (HERMES, f"one {BLOCK} two\n", "one  two", [("f", '{"a": 1}')]),
        (HERMES, f'<tool_call>{{"name":"f","arguments":{TRICKY}}}</tool_call>', "", [("f", TRICKY)]),
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        (HERMES, '<tool_call>{"id": 7, "name": "f", "arguments": {}, "x": [1, "y"]}</tool_call>', "", [("f", "{}")]),
        (HERMES, '<tool_call> {"name" : "\\u0066" ,\n"arguments" : {"a" : 1} } </tool_call>', "", [("f", '{"a" : 1}')]),
        (SMOLLM, '<tool_call>[{"name":"f","arguments":{"a":[]}}]</tool_call>', "", [("f", '{"a":[]}')]),
        (
            SMOLLM,
            '<tool_call>[\n{"name": "f", "arguments": {}},\n{"name": "a-b_C", "arguments": {"b": null}}\n]</tool_call>',
            "",
            [("f", "{}"), ("a-b_C", '{"b": null}')],
        ),
        (SMOLLM, "<tool_call>[]</tool_call> Sorry.", " Sorry.", []),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        (LLAMA, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        (LLAMA, '{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
        (LLAMA, '{"name":"f","parameters":{}};{"name":"f","parameters":{"a":2}}', "", [("f", "{}"), ("f", '{"a":2}')]),
        (
            LLAMA,
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "get_weather", "arguments": {}}',
            "",
            [("f", "{}"), ("get_weather", "{}")],
        ),
        (LLAMA, '{"name": "f", "parameters": {}}; and on', "; and on", [("f", "{}")]),
        (LLAMA, 'See {"name": "f", "parameters": {}}.', "See .", [("f", "{}")]),
        (LLAMA, '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),
        (LLAMA, '{"name": "f", "age": 3}', '{"name": "f", "age": 3}', []),
        (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "x"}]', "", [("f", '{"a": 1}')]),
        (
            MISTRAL,
            '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]',
            "",
            [("f", "{}")] * 2,
        ),
        (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
        (MISTRAL, '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]a-b_C[ARGS]{}', "", [("f", '{"a": 1}'), ("a-b_C", "{}")]),
        (MISTRAL, 'Hm.[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{"a": 1}', "Hm.", [("f", '{"a": 1}')]),
    ],
)
def test_calls_are_read(tool_format: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(tool_format, text) == (content, calls)


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_what_a_format_writes_it_reads(tool_format: ToolFormat) -> None:
    calls = [("f", "{}"), ("get_weather", TRICKY)]
    assert read(tool_format, tool_format.write_calls(calls)) == ("", calls)


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (HERMES, "<tool_call>"),
        (HERMES, "<tool_call>\n</tool_call>"),
        (HERMES, "a <tool_call>nothing</tool_call> b"),
        (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {"a": [}, "name": "f"}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f" "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f\\q", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>["f"]</tool_call>'),
        (HERMES, "<tool_call>[] x"),
        (HERMES, '<tool_call>\n{"name": "f", "argum'),
        (HERMES, "text <tool_c"),
        (HERMES, "</tool_call>"),
        (LLAMA, "<|python_tag|>print(1)"),
        (LLAMA, '{"name": "f", "parameters": 1}'),
        (LLAMA, '{"name": "f", "para'),
        (MISTRAL, "[TOOL_CALLS]"),
        (MISTRAL, "[TOOL_CALLS]other[ARGS]{}"),
        (MISTRAL, "[TOOL_CALLS]f[ARGS]1"),
        (MISTRAL, "[TOOL_CALLS][1]"),
        (MISTRAL, "[TOOL_CA"),
    ],
)
def test_what_is_no_call_is_text(tool_format: ToolFormat, text: str) -> None:
    assert read(tool_format, text) == (text, [])


def test_a_call_after_what_is_none_is_read() -> None:
    assert read(HERMES, f"<tool_call><tool_call>x{BLOCK}") == ("<tool_call><tool_call>x", [("f", '{"a": 1}')])


@pytest.mark.parametrize("length", range(len(BLOCK)))
def test_an_answer_that_is_cut_off(length: int) -> None:
    text, calls = read(HERMES, BLOCK[:length])
    told = BLOCK.index('{"a"')
    if length <= told:
        assert (text, calls) == (BLOCK[:length], [])
    else:
        assert (text, calls) == ("", [("f", '{"a": 1}'[: length - told])])


def test_what_follows_broken_arguments_is_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": [}]}</tool_call> more'
    assert read(HERMES, text) == ("}]}</tool_call> more", [("f", '{"a": [')])


def test_what_follows_a_call_and_belongs_to_none_is_text() -> None:
    assert read(HERMES, '<tool_call>{"name": "f", "arguments": {}} x</tool_call>') == (
        "x</tool_call>",
        [("f", "{}")],
    )
    second = '{"name": "other", "arguments": {}}]</tool_call>'
    assert read(SMOLLM, f'<tool_call>[{{"name": "f", "arguments": {{}}}}, {second}') == (f", {second}", [("f", "{}")])


def test_arguments_are_passed_on_as_they_come() -> None:
    reader = HERMES.reader(NAMES)
    assert reader.push('Hm. <tool_call>\n{"name": "f", "arguments": ') == [TextDelta("Hm.")]
    begin, piece = reader.push('{"a": "')
    assert isinstance(begin, ToolCallBegin)
    assert (begin.index, begin.name) == (0, "f")
    assert piece == ToolCallArguments(0, '{"a": "')
    assert reader.push("xy") == [ToolCallArguments(0, "xy")]
    assert reader.push('"}}\n</tool') == [ToolCallArguments(0, '"}')]
    assert reader.push("_call>") == reader.finish() == []


def test_text_is_passed_on_as_it_comes() -> None:
    reader = LLAMA.reader(NAMES)
    assert reader.push('a {"name": ') == [TextDelta("a")]
    assert reader.push('"x"') == [TextDelta(' {"name": "x"')]


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_call_ids_are_unique_and_of_their_form(tool_format: ToolFormat) -> None:
    reader = tool_format.reader(NAMES)
    text = "\n".join([tool_format.write_calls([("f", "{}")])] * 20) if tool_format is not LLAMA else ""
    text = text or tool_format.write_calls([("f", "{}")] * 20)
    ids = [event.call_id for event in [*reader.push(text), *reader.finish()] if isinstance(event, ToolCallBegin)]
    assert len(ids) == len(set(ids)) == 20
    pattern = "[A-Za-z0-9]{9}" if tool_format is MISTRAL else "call_[A-Za-z0-9]{24}"
    assert all(re.fullmatch(pattern, call_id) for call_id in ids)


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<", "[TOOL", "x" * 30,
    '{"name": "f", "arguments": ', '{"name": "f", "parameters": ', '{"name":"f","parameters":', '{"a": "b"}', "{}",
    '"name"', '"arguments"', '"f"', "f", "{", "}", "[", "]", ",", ":", ";", '"', "\\", "\n", " ",
    "text", "é", "😀", "\u2028",
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(0, 14)))


def check_nothing_is_lost(tool_format: ToolFormat, text: str) -> None:
    """Without calls, the text is the answer. With some, what is told of occurs in it, in order."""
    content, calls = read(tool_format, text)
    if not calls:
        assert content in (text, re.sub(r"<tool_call>\s*\[\s*\]\s*</tool_call>", "", text)), text
    place = 0
    for name, arguments in calls:
        assert name in NAMES
        if arguments != "{}":
            place = text.index(arguments, place) + len(arguments)
            assert arguments.startswith("{")


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_random_texts(tool_format: ToolFormat) -> None:
    rng = random.Random(3)
    for _ in range(150):
        check_nothing_is_lost(tool_format, random_text(rng))


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_random_calls(tool_format: ToolFormat) -> None:
    rng = random.Random(4)

    def value(depth: int) -> object:
        kinds = [rng.randint(-9, 9), rng.choice(FRAGMENTS), None, True, 0.5]
        if depth < 3:
            kinds += [[value(depth + 1) for _ in range(rng.randint(0, 3))], obj(depth + 1)]
        return rng.choice(kinds)

    def obj(depth: int = 0) -> dict[str, object]:
        return {rng.choice(FRAGMENTS): value(depth) for _ in range(rng.randint(0, 3))}

    for _ in range(30):
        calls = [
            (rng.choice(NAMES), json.dumps(obj(), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])))
            for _ in range(rng.randint(1, 3))
        ]
        assert read(tool_format, tool_format.write_calls(calls)) == ("", calls)


@pytest.mark.parametrize("tool_format", FORMATS, ids=lambda each: each.name)
def test_huge_arguments(tool_format: ToolFormat) -> None:
    arguments = json.dumps({"a": ['{"\\"}' * 30_000, "[" * 1000], "deep": 1})
    text = tool_format.write_calls([("f", arguments)])
    pieces = [text[begin : begin + 7] for begin in range(0, len(text), 7)]
    message = message_of(tool_format.reader(NAMES), pieces)
    assert [(call.name, call.arguments) for call in message.tool_calls] == [("f", arguments)]


@pytest.mark.parametrize(
    ("owner", "function", "old", "new", "text"),
    [
        (Markers, "held", "len(rest)\n", "len(rest) - 1\n", BLOCK),
        (CallReader, "_read", "self._tell_text(marker)", "pass", "<tool_call>x"),
        (CallReader, "_read", "stream.position = 0", "pass", '<tool_call>{"name": "f", "arguments": {}, "q" !'),
    ],
)
def test_a_defect_is_caught(
    owner: type, function: str, old: str, new: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_nothing_is_lost(HERMES, text)
    expected = message_of(HERMES.reader(NAMES), [text])
    monkeypatch.setattr(owner, function, mutant(getattr(owner, function), old, new))
    with pytest.raises(AssertionError):
        assert read(HERMES, text)[0] == expected.text
