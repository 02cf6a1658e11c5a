"""Splitting text before merging: window by window as all at once."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from pellucid.tokenizer import pre_tokenizers as module
from pellucid.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from tests.support import texts

DISTINCT = sorted({each.patterns: name for name, each in PRE_TOKENIZERS.items()}.values())


def all_at_once(pre_tokenizer: PreTokenizer) -> Callable[[str], list[str]]:
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre_tokenizer.patterns]
    splitter = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
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
        assert split(text) == expected(text), text


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
        assert split(text) == expected(text)


@pytest.mark.parametrize(("name", "run"), [("llama3", "_SPACES"), ("tekken", "_LETTERS")])
def test_a_mutant_that_cuts_within_a_run_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, run: str) -> None:
    monkeypatch.setattr(module, "WINDOW", 40)
    check(name)
    monkeypatch.setattr(module, run, re.compile("(?!)"))
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
]


@pytest.mark.parametrize("text", LONG)
def test_no_window_is_long(text: str) -> None:
    lengths: list[int] = []

    def split(part: str) -> list[tuple[str, tuple[int, int]]]:
        lengths.append(len(part))
        return [(character, (place, place + 1)) for place, character in enumerate(part)]

    assert "".join(module._split_in_windows(split, text)) == text
    assert max(lengths) <= module.WINDOW
    assert sum(lengths) < 1.01 * len(text) + module.WINDOW
