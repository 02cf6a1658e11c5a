"""JSON read strictly: as `json` reads it, or refused with a reason and a parameter."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pellucid.core.errors import InvalidRequestError
from pellucid.server import strict_json
from pellucid.server.strict_json import MAX_CONTAINERS, MAX_DEPTH, decode_json

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0") | st.sampled_from('"\\[]{}\n'))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=20
)


def refused(data: bytes) -> tuple[str | None, str]:
    with pytest.raises(InvalidRequestError) as caught:
        decode_json(data, "the body")
    return caught.value.param, caught.value.message


def nested(depth: int) -> bytes:
    return b'{"a":' * (depth // 2) + b"[" * (depth - depth // 2) + b"]" * (depth - depth // 2) + b"}" * (depth // 2)


@given(DOCUMENTS, st.booleans(), st.sampled_from([None, 1]))
@example('\\"[', False, None)
@example(["\\", "[", '\\"]', '"'], False, None)
def test_reads_what_json_reads(document: Any, ensure_ascii: bool, indent: int | None) -> None:
    text = json.dumps(document, ensure_ascii=ensure_ascii, indent=indent)
    assert decode_json(text.encode(), "it") == document


@given(st.text('[]{}",:\\ab1 ', max_size=40))
@example('"[" ""')
def test_refuses_what_json_refuses(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        assert refused(text.encode())[0] is not None
    else:
        try:
            assert decode_json(text.encode(), "it") == expected
        except InvalidRequestError as error:
            assert "comes twice" in error.message  # noqa: PT017


@pytest.mark.parametrize(
    ("data", "param", "message"),
    [
        (b"{", "body", "the body is not valid JSON: Expecting property name enclosed in double quotes at line 1, "),
        (b"{} {}", "body", "Extra data at line 1, character 4"),
        (b'{"a":\n 1,}', "body", "at line 2, character "),
        (b'{"a": "\0"}', "body", "Invalid control character"),
        (b'{"a": "\xff"}', "body", "the body is not valid UTF-8: invalid start byte at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "body", "not valid UTF-8"),  # a surrogate, as CESU-8 has it
        ("{}".encode("utf-16"), "body", "not valid UTF-8"),
        (b"\xef\xbb\xbf{}", "body", "byte order mark"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "c", "the key 'c' comes twice"),
        (b'{"a": NaN}', "a", "NaN is no number"),
        (b'{"a": [1, {"b": -Infinity}]}', "a[1].b", "-Infinity is no number"),
        (b"[Infinity]", "[0]", "Infinity is no number"),
        (b"NaN", "body", "NaN is no number"),
        (b'{"temperature": 1e400}', "temperature", "beyond the range of a float64"),
        (b'{"a": -1' + b"0" * 4300 + b"}", "a", "an integer of 4,302 digits; at most 4,300"),
        (b'{"messages": [{"content": "x\\ud800y"}]}', "messages[0].content", "a lone surrogate"),
        (b'{"\\uDfff": 1}', "body", "a lone surrogate"),
        (b'{"a": {"\\udc00": 1}}', "a", "a lone surrogate"),
        (b'{"prompt": "a\\u0000b"}', "prompt", "a NUL character"),
        (nested(MAX_DEPTH + 1), "body", "nests too deeply"),
        (b"[" * 100_000, "body", "nests too deeply"),
        (b'{"a":' * 100_000, "body", "nests too deeply"),
        (b"[" + b"[]," * 50_000 + b"[]]", "body", "over 50,000 objects and arrays"),
        (b"]" * 1_000_000, "body", "over 50,000 objects and arrays"),
    ],
)
def test_refusals(data: bytes, param: str, message: str) -> None:
    found_param, found_message = refused(data)
    assert found_param == param
    assert message in found_message
    assert len(found_message) < 300


def test_what_is_just_within_the_limits() -> None:
    assert decode_json(nested(MAX_DEPTH), "it")
    assert len(decode_json(b"[" + b"[]," * (MAX_CONTAINERS - 2) + b"[]]", "it")) == MAX_CONTAINERS - 1
    assert decode_json(b"[1" + b"0" * 400 + b"]", "it") == [10**400]
    assert decode_json(b'["\\ud83d\\ude00 \\\\ud800 [", 1e-400]', "it") == ["\U0001f600 \\ud800 [", 0.0]


def test_any_characters_where_they_are_asked_for() -> None:
    assert decode_json(b'["\\ud800", "\\u0000"]', "it", any_characters=True) == ["\ud800", "\0"]
    with pytest.raises(InvalidRequestError, match="is no number"):
        decode_json(b'["\\ud800", NaN]', "it", any_characters=True)


@pytest.mark.parametrize("character", ["[", "{", '"', "]"])
def test_brackets_in_strings_do_not_nest(character: str) -> None:
    document = [character * 100_000, character * 3 + "\\", {character * 2: ""}]
    assert decode_json(json.dumps(document).encode(), "it") == document


def test_nesting_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *_args, **_kwargs: pytest.fail("it was decoded"))
    for data in (b"[" * 1_000_000, b'{"":' * 500_000, b"[]," * 1_000_000, b'"\\"",' * 10 + b"[" * 200):
        assert refused(data)[0] == "body"


def test_the_check_of_nesting_is_what_keeps_deep_documents_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant without it lets the decoder of `json` recurse until Python stops it."""
    monkeypatch.setattr(strict_json, "_check_nesting", lambda *_: None)
    with pytest.raises(RecursionError):
        decode_json(b"[" * 10 * sys.getrecursionlimit(), "it")


@given(st.lists(st.text(st.characters(), max_size=5), max_size=5))
def test_no_surrogate_comes_through(texts: list[str]) -> None:
    try:
        found = decode_json(json.dumps(texts).encode(), "it")
    except InvalidRequestError:
        assert any("\0" in text or text.encode("utf-8", "replace").decode() != text for text in texts)
    else:
        assert found == json.loads(json.dumps(texts))
        "".join(found).encode()
