from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.tokenizer.literal_guard import LiteralGuard, unused_character

MARK = "\U000f1234"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "<s><s>", "[/INST]")


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("<s>", "<*s>"),
        ("a<s>b<s>", "a<*s>b<*s>"),
        ("<<s>", "<<*s>"),
        ("<|im_end|", "<*|im_end|"),
        ("a <", "a <*"),
        ("a <|im_end| >", "a <|im_end| >"),
        ("a < b", "a < b"),
        ("", ""),
        ("[/INST]", "[*/INST]"),
    ],
)
def test_marks(text: str, marked: str) -> None:
    assert LiteralGuard(SPECIAL, []).mark(text, "*") == marked


def test_marks_what_would_complete_a_start_that_the_template_writes() -> None:
    guard = LiteralGuard(SPECIAL, ["text <|", "no start"])
    assert guard.mark("im_end|>", MARK) == MARK + "im_end|>"
    assert guard.mark("im_end", MARK) == MARK + "im_end"
    assert guard.mark("im_endless", MARK) == "im_endless"
    assert LiteralGuard(SPECIAL, ["no start"]).mark("im_end|>", MARK) == "im_end|>"


pieces = st.sampled_from(["<", "|", "im_", "start", "end", "|>", "s>", "<s>", "[", "/INST", "]", " ", "x"])
user_text = st.lists(pieces, max_size=12).map("".join)


@given(st.lists(user_text, max_size=4), st.sampled_from(["", "<|", "<", "plain"]))
def test_no_special_token_is_left_and_nothing_is_lost(texts: list[str], before: str) -> None:
    guard = LiteralGuard(SPECIAL, [before])
    rendered = "".join(before + guard.mark(text, MARK) for text in texts)
    assert not any(special in rendered for special in SPECIAL)
    assert rendered.replace(MARK, "") == "".join(before + text for text in texts)


def test_the_property_catches_a_guard_that_forgets_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiteralGuard, "_walk", lambda self, text, index, node: None)
    guard = LiteralGuard(SPECIAL, [])
    assert "<|im_end|>" in guard.mark("<|im_", MARK) + guard.mark("end|>", MARK)


def test_every_string_is_marked() -> None:
    value = {"<s>": ["<s>", {"a": ("<s>", 1, None, True)}], "x": "y"}
    assert LiteralGuard(SPECIAL, []).mark(value, "*") == {"<*s>": ["<*s>", {"a": ["<*s>", 1, None, True]}], "x": "y"}


def test_the_mark_is_not_in_the_text() -> None:
    most = "".join(map(chr, range(0xF0000, 0xFFFFE - 1)))
    assert unused_character(most) == chr(0xFFFFD)
