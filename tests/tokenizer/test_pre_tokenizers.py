"""Splitting text before merging: window by window as all at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from pellucid.tokenizer import pre_tokenizers as module
from pellucid.tokenizer.pre_tokenizers import PRE_TOKENIZERS, Ends, PreTokenizer
from tests.support import texts

DISTINCT = sorted({each.patterns: name for name, each in PRE_TOKENIZERS.items()}.values())


def all_at_once(pre_tokenizer: PreTokenizer) -> Callable[[str], list[str]]:
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre_tokenizer.patterns]
    splitter = pre_tokenizers.Sequence(steps)
    return lambda text: [piece for piece, _ in splitter.pre_tokenize_str(text)]


def repetitive(rng: random.Random) -> str:
    """Long runs of what patterns take together: spaces, line ends, digits, capitals, symbols, contractions."""
    runs = [
        " ",
        "\n",
        " \n",
        "\r\n",
        "1",
        "12",
        "A",
        "aB",
        "字",
        "é",
        "e\u0301",
        "!",
        "!\n",
        "'s",
        "'re",
        "/",
        "\t",
        "x ",
        "ǅ",
    ]
    return "".join(rng.choice(runs) * rng.choice([1, 1, 2, 3, 17, 40, 200]) for _ in range(rng.randrange(1, 30)))


def check(name: str, count: int = 30) -> None:
    split, expected = PRE_TOKENIZERS[name].compile(), all_at_once(PRE_TOKENIZERS[name])
    rng = random.Random(5)
    far = ["a\n" + " " * 400 + "\nb", "a字" + "A" * 400 + "a"]
    for text in [*far, *texts.texts(11, count), *(repetitive(rng) for _ in range(3 * count))]:
        assert list(split(text)) == expected(text), text


@pytest.mark.parametrize("window", [17, 40, 300])
@pytest.mark.parametrize("name", DISTINCT)
def test_windows_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str, window: int) -> None:
    monkeypatch.setattr(module, "WINDOW", window)
    check(name)


SPLITS = {name: (PRE_TOKENIZERS[name].compile(), all_at_once(PRE_TOKENIZERS[name])) for name in ("smollm", "llama3")}


@given(st.text(st.sampled_from(" \n\r\ta1A!'s字\u0301"), max_size=120), st.sampled_from(sorted(SPLITS)))
def test_any_text(text: str, name: str) -> None:
    split, expected = SPLITS[name]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "WINDOW", 20)
        assert list(split(text)) == expected(text)


@pytest.mark.parametrize(("name", "run"), [("llama3", "_is_space"), ("tekken", "_may_be_letter")])
def test_a_mutant_that_cuts_within_a_run_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, run: str) -> None:
    monkeypatch.setattr(module, "WINDOW", 40)
    check(name)
    monkeypatch.setattr(module, run, lambda character: False)
    with pytest.raises(AssertionError):
        check(name)


def test_a_mutant_that_keeps_the_end_of_a_window_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 40)
    monkeypatch.setattr(module, "_settled", lambda text, begin, end: end)
    with pytest.raises(AssertionError):
        check("gpt-2")


LONG = [
    "hello world " * 10_000,
    "1" * 100_000,
    "!" * 100_000,
    "Hello, World! 123\n  f(x) " * 5000,
    "你好,世界。" * 20_000,
    "你好。世界。" * 20_000,
]


@pytest.mark.parametrize("text", LONG)
def test_no_window_is_long(text: str) -> None:
    lengths: list[int] = []

    def ends(part: str) -> Iterable[int]:
        lengths.append(len(part))
        return range(1, len(part) + 1)

    def long_ends(part: str) -> Iterable[int]:
        raise AssertionError("a window was long")

    assert "".join(module._split_in_windows(ends, long_ends, text)) == text
    assert max(lengths) <= module.WINDOW
    assert sum(lengths) < 1.02 * len(text) + module.WINDOW


@pytest.mark.parametrize("text", ["a" * 50_000, "字" * 50_000, " " * 50_000, "1a! " * 5000 + "A" * 50_000 + "1" * 9000])
def test_long_windows_let_other_threads_run(text: str) -> None:
    lengths: dict[str, list[int]] = {"ends": [], "long_ends": []}
    split = PRE_TOKENIZERS["tekken"].compile()
    windows: Any = split.func  # type: ignore[attr-defined]
    ends, long_ends = split.args  # type: ignore[attr-defined]

    def noting(name: str, function: Ends) -> Ends:
        def noted(part: str) -> Iterable[int]:
            lengths[name].append(len(part))
            return function(part)

        return noted

    pieces = list(windows(noting("ends", ends), noting("long_ends", long_ends), text))
    assert pieces == all_at_once(PRE_TOKENIZERS["tekken"])(text)
    assert max(lengths["ends"]) <= module.WINDOW
    assert min(lengths["long_ends"]) > module.WINDOW
    assert sum(lengths["long_ends"]) < 5 * len(text)
