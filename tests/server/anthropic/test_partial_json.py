"""Objects that were cut short."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jiter import from_json

from pellucid.server.anthropic.partial_json import read_partial_object

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=4), JSON, max_size=4)


@given(OBJECTS, st.booleans())
def test_a_whole_object_is_itself(value: dict[str, Any], pretty: bool) -> None:
    assert read_partial_object(json.dumps(value, indent=1 if pretty else None)) == value


@given(OBJECTS, st.data())
def test_a_cut_object_is_what_the_anthropic_client_makes_of_it(value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()))
    cut = text[: data.draw(st.integers(1, len(text)))]
    cut = cut.rstrip("-0123456789")  # the client takes what is there for the whole number
    assert read_partial_object(cut) == from_json(cut.encode(), partial_mode=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("{", {}),
        ('{"a": 1, "b": 12', {"a": 1}),
        ('{"a": [1, 2', {"a": [1]}),
        ('{"a": {"b": "c"', {"a": {"b": "c"}}),
        ('{"a": "half', {}),
        ("[1]", {}),
        ("nonsense", {}),
        ('{"a": 1]', {"a": 1}),
        ("{" * 100_000, {}),
        ('{"a":' * 100_000, {}),
    ],
)
def test_edges(text: str, value: dict[str, Any]) -> None:
    assert read_partial_object(text) == value
