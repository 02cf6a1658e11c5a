"""Reasoning is parted from the answer the same however the text is cut; no part of a marker gets through."""

from __future__ import annotations

import random

import pytest

from pellucid.server.chat.message import ChatMessage
from pellucid.server.chat.parser import ChatParser
from pellucid.server.chat.reasoning import REASONING_FORMATS, ReasoningReader
from tests.support.answer_pieces import same_however_cut
from tests.support.mutants import mutant

THINK = REASONING_FORMATS["qwen3"]


def read(text: str, *, begun: bool = False, name: str = "qwen3") -> tuple[str | None, str]:
    """The reasoning and the text of an answer."""
    message = same_however_cut(lambda: ChatParser(ReasoningReader(REASONING_FORMATS[name], begun=begun)), text)
    return message.reasoning, message.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (None, "")),
        ("an answer", (None, "an answer")),
        (" \n an answer ", (None, " \n an answer ")),
        ("<think>\nhm\n</think>\n\nan answer\n", ("hm", "an answer\n")),
        ("\n<think>hm</think>x", ("hm", "x")),
        ("<think></think>x", (None, "x")),
        ("<think>\n\n</think>\n\n", (None, "")),
        ("<think>a < b </ </thin </think >\n c</think>x", ("a < b </ </thin </think >\n c", "x")),
        ("<think>a</think>b</think>c <think>d</think>", ("a", "b</think>c <think>d</think>")),
        ("x <think>a</think>", (None, "x <think>a</think>")),
        ("</think>x", (None, "</think>x")),
        ("<thin", (None, "<thin")),
        ("<thinking>", (None, "<thinking>")),
        ("<think>cut o", ("cut o", "")),
        ("<think>cut off</thi", ("cut off", "")),
        ("<think>1 < 2 <", ("1 < 2 <", "")),
        ("<think>é😀 \u2028</think>😀", ("é😀", "😀")),
    ],
)
def test_reasoning_is_parted(text: str, expected: tuple[str | None, str]) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (None, "")),
        ("hm\n</think>\n\nan answer", ("hm", "an answer")),
        ("<think>\nhm</think>x", ("hm", "x")),
        ("\n\n</think>x", (None, "x")),
        ("never closed", ("never closed", "")),
        ("<thi", (None, "")),
        ("<thing> is</think>x", ("<thing> is", "x")),
        ("\n", (None, "")),
    ],
)
def test_an_answer_that_begins_within_reasoning(text: str, expected: tuple[str | None, str]) -> None:
    assert read(text, begun=True) == expected


def test_other_markers() -> None:
    assert read("[THINK]a <think>[/THINK]b", name="mistral") == ("a <think>", "b")
    assert read("<|channel>thought\na\n<channel|>b", name="gemma4") == ("a", "b")


def check_random_texts() -> None:
    rng = random.Random(5)
    fragments = ["<think>", "</think>", "<", "/", "think", ">", "a", " ", "\n", "é", "</thi"]
    for _ in range(300):
        text = "".join(rng.choice(fragments) for _ in range(rng.randint(0, 10)))
        for begun in (False, True):
            reasoning, answer = read(text, begun=begun)
            assert reasoning is None or reasoning == reasoning.strip() != ""
            if reasoning is None and not begun and not text.lstrip().startswith("<think>"):
                assert answer == text


def test_random_texts() -> None:
    check_random_texts()


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("push", "- self._closing.held(self._text)", ""),
        ("push", "self._text[:end].rstrip()", "self._text[:end]"),
    ],
)
def test_a_defect_is_caught(function: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReasoningReader, function, mutant(getattr(ReasoningReader, function), old, new))
    with pytest.raises(AssertionError):
        check_random_texts()


def test_special_tokens_that_are_no_part_of_the_answer_are_dropped() -> None:
    def parser() -> ChatParser:
        return ChatParser(ReasoningReader(THINK, begun=False), None, ["<|im_end|>", "<|im_start|>", "<s>"])

    text = "<|im_start|><think>a<|im_end|>b</think>c<s><|im_en<|im_end|>d<|im_"
    assert same_however_cut(parser, text) == ChatMessage(
        "c<|im_end<|im_".replace("end<", "end") and "c<|im_end<|im_", "ab"
    )
