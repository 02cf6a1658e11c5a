"""JSON answers, of any length."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.server.http import replies
from pellucid.server.http.replies import json_bytes, long_json_bytes, long_list, long_string

TEXTS = st.text(st.characters(exclude_categories=("Cs",)))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=20
)


@given(DOCUMENTS, st.integers(0, 6))
def test_in_parts_it_is_the_same(document: Any, levels: int) -> None:
    assert long_json_bytes(document, levels) == json_bytes(document)


@pytest.mark.parametrize("count", [0, 1, 9_999, 10_000, 10_001, 25_000])
def test_long_lists(count: int) -> None:
    numbers = list(range(count))
    assert long_list(numbers) == long_json_bytes(numbers) == json_bytes(numbers)


@given(TEXTS, st.integers(1, 5))
def test_long_strings(text: str, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(replies, "_CHARACTERS_AT_ONCE", at_once)
        assert long_string(text) == json_bytes(text)


def test_half_a_character_is_escaped() -> None:
    assert json.loads(long_json_bytes({"a": ["\ud800", "字"]})) == {"a": ["\ud800", "字"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        long_json_bytes({"a": [{"b": float("nan")}]})


def chat_with_logprobs(num_tokens: int) -> dict[str, Any]:
    alternative = {"token": "a", "logprob": -1.5, "bytes": [97]}
    content = [{**alternative, "top_logprobs": [alternative] * 20} for _ in range(num_tokens)]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "a" * num_tokens},
        "logprobs": {"content": content},
    }
    return {"id": "x", "choices": [choice] * 2}


def longest_part(monkeypatch: pytest.MonkeyPatch, document: Any) -> int:
    """The most characters that one call of the encoder wrote."""
    lengths: list[int] = []
    encode = replies._encode

    def noting(value: Any) -> str:
        text = encode(value)
        lengths.append(len(text))
        return text

    with monkeypatch.context() as patched:
        patched.setattr(replies, "_encode", noting)
        assert len(long_json_bytes(document)) == len(json.dumps(document, separators=(",", ":")))
    return max(lengths)


def test_no_part_of_a_long_answer_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a mutant that takes nothing apart is caught."""
    document = chat_with_logprobs(2000)
    assert longest_part(monkeypatch, document) < 5000
    monkeypatch.setattr(replies.long_json_bytes, "__defaults__", (0,))
    assert longest_part(monkeypatch, document) > 1_000_000
