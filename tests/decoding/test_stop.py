"""The stop-string matcher against a search over the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.core.errors import InvalidRequestError
from pellucid.decoding import stop
from pellucid.decoding.stop import StopMatcher
from tests.support.counting import count_steps

STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=6)
PIECES = st.lists(st.text("abc", max_size=4), max_size=20)


def expected(stops: list[str], text: str, include_stop: bool = False) -> tuple[str, str | None]:
    """By definition: the earliest end, then the longest."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


def run(matcher: StopMatcher, pieces: list[str]) -> str:
    return "".join(matcher.push(piece) for piece in pieces) + matcher.flush()


@given(STOPS, PIECES, st.booleans())
@settings(max_examples=400, deadline=None)
def test_equals_a_search_over_the_whole_text(stops: list[str], pieces: list[str], include_stop: bool) -> None:
    matcher = StopMatcher(stops, include_stop=include_stop)
    text = run(matcher, pieces)
    assert (text, matcher.matched) == expected(stops, "".join(pieces), include_stop)


@given(STOPS, PIECES)
@settings(max_examples=200, deadline=None)
def test_holds_back_exactly_what_may_still_match(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = released = ""
    for piece in pieces:
        seen += piece
        released += matcher.push(piece)
        if matcher.matched is not None:
            break
        prefixes = [n for s in stops for n in range(len(s)) if seen.endswith(s[:n])]
        assert released == seen[: len(seen) - max(prefixes, default=0)]


@given(STOPS, PIECES, PIECES)
@settings(max_examples=200, deadline=None)
def test_rollback(stops: list[str], before: list[str], after: list[str]) -> None:
    matcher = StopMatcher(stops)
    for piece in before:
        matcher.push(piece)
    snapshot = matcher.snapshot()
    first = run(matcher, after), matcher.matched
    matcher.restore(snapshot)
    assert (run(matcher, after), matcher.matched) == first


def test_text_after_a_match_is_dropped() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("one\n") == "one"
    assert matcher.push("\ntwo") == ""
    assert matcher.matched == "\n\n"
    assert matcher.push("three") == ""
    assert matcher.flush() == ""


def test_characters_beyond_the_basic_plane() -> None:
    matcher = StopMatcher(["🛑終"])
    assert matcher.push("go🛑") == "go"
    assert matcher.push("終!") == ""
    assert matcher.matched == "🛑終"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="stop string 1 is empty") as error:
        StopMatcher(["a", ""])
    assert error.value.param == "stop"


def test_ten_thousand_stop_strings_cost_no_more_per_character() -> None:
    text = "ab" * 1000
    few = StopMatcher(["a" * 12 + "x"])
    many = StopMatcher([f"ab{i:05d}" for i in range(10_000)])
    assert count_steps(lambda: many.push(text)) < 2 * count_steps(lambda: few.push(text))


def test_a_leaking_matcher_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant whose failure links are lost forgets a stop string that begins inside another."""
    build = stop._Automaton.__init__

    def broken(self: stop._Automaton, stops: object) -> None:
        build(self, stops)  # type: ignore[arg-type]
        self.failure = [0] * len(self.failure)

    monkeypatch.setattr(stop._Automaton, "__init__", broken)
    matcher = StopMatcher(["aab", "ab"])
    text = run(matcher, ["aaab"])
    assert (text, matcher.matched) != expected(["aab", "ab"], "aaab")
