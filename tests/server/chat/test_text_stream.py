"""Markers are found in text as a search of each would find them; brackets close where JSON says."""

from __future__ import annotations

import json
import random

import pytest

from pellucid.server.chat.text_stream import Brackets, Markers
from tests.support.mutants import mutant


def first(markers: list[str], text: str, position: int) -> tuple[int, str] | None:
    found = [(place, marker) for marker in markers if (place := text.find(marker, position)) >= 0]
    return min(found, key=lambda each: (each[0], -len(each[1]))) if found else None


def check_markers() -> None:
    rng = random.Random(0)
    for _ in range(400):
        markers = ["".join(rng.choice("ab<") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 6))]
        text = "".join(rng.choice("ab<x") for _ in range(rng.randint(0, 12)))
        position = rng.randint(0, len(text))
        found = Markers(markers).find(text, position)
        assert found == first(markers, text, position)
        if found is None and position == 0:
            begun = [n for n in range(1, len(text) + 1) for marker in markers if marker.startswith(text[-n:])]
            assert Markers(markers).held(text) == max(begun, default=0)


def test_markers() -> None:
    check_markers()


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("_at", "text = text[: len(list(takewhile(bool, common)))]", "return None"),
        ("held", "bisect_left(self._sorted, rest)", "0"),
    ],
)
def test_a_defect_is_caught(function: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Markers, function, mutant(getattr(Markers, function), old, new))
    with pytest.raises(AssertionError):
        check_markers()


def test_brackets_close_where_the_value_ends() -> None:
    rng = random.Random(1)
    for value in ({}, [[]], {"a": '"}]\\', "b": [{"\\": "\\\\"}]}, ["{", "\u2028"]):
        text = json.dumps(value)
        brackets, position = Brackets(), 0
        whole = text + " ]} more"
        for end in sorted(rng.randint(0, len(whole)) for _ in range(5)):
            position = brackets.scan(whole[:end], position)
        position = brackets.scan(whole, position)
        assert (brackets.closed, brackets.broken, position) == (True, False, len(text))


@pytest.mark.parametrize("text", ["[}", '{"a": [}', "[{]"])
def test_brackets_that_do_not_match(text: str) -> None:
    brackets = Brackets()
    assert brackets.scan(text, 0) == len(text) - 1
    assert brackets.broken
    assert not brackets.closed
