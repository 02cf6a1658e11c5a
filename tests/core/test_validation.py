from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.core import validation
from pellucid.core.validation import shown

texts = st.text(st.characters(exclude_characters="'\""))  # which quotes stand around a string depends on all of it
byte_strings = texts.map(lambda text: text.encode(errors="surrogatepass"))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | texts | byte_strings,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(texts, inner),
    max_leaves=60,
)


@given(values)
def test_what_is_found_is_shown_up_to_a_length(value: Any) -> None:
    text = repr(value)
    assert shown(value) == (text if len(text) <= 80 else text[:77] + "...")


def test_an_integer_that_cannot_be_printed_is_named() -> None:
    assert shown(10**5000) == shown(-(10**21)) == "an integer beyond 10^20"


class Counted:
    """Something that is written as "x", and how often it was."""

    def __init__(self) -> None:
        self.times = 0

    def __repr__(self) -> str:
        self.times += 1
        return "x"


def written(wrap: Any) -> int:
    """How often parts were written to show 10,000 of them."""
    part = Counted()
    text = shown(wrap([part] * 10_000))
    assert len(text) == 80
    return part.times


WRAPPED = [
    lambda parts: parts,
    tuple,
    lambda parts: dict(enumerate(parts)),
    lambda parts: [parts, parts],
    lambda parts: {"a": {"b": parts}},
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_no_more_is_written_than_is_shown(wrap: Any) -> None:
    assert written(wrap) < 500


def test_a_mutant_that_writes_everything_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_beginning", lambda value, room: value)
    assert written(lambda parts: parts) == 10_000
