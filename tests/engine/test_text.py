from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest

from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.text import SequenceText, whole_text
from tests.support.counting import count_steps
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.sequences import make_group


class ByteTokenizer(FakeTokenizer):
    """Token i is byte i."""

    special_ids = frozenset({0})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, continuation: bool = False) -> str:
        return bytes(i for i in ids if i or not skip_special_tokens).decode("utf-8", "replace")


def run(text: str, cut: int | None = None, **params: Any) -> tuple[list[str], SequenceText]:
    sequence_text = SequenceText(SamplingParams(**params), ByteTokenizer())  # type: ignore[arg-type]
    pieces = []
    for token in text.encode()[:cut]:
        pieces.append(sequence_text.push(token, stopped=False))
        if sequence_text.stop_string is not None:
            break
    pieces.append(sequence_text.finish())
    assert "".join(pieces) == sequence_text.text
    return pieces, sequence_text


def test_characters_come_whole() -> None:
    pieces, _ = run("aé漢🦉")
    assert [piece for piece in pieces if piece] == ["a", "é", "漢", "🦉"]
    _, text = run("a漢", cut=3)
    assert text.text == "a\ufffd"


@pytest.mark.parametrize(("include", "expected"), [(False, "one "), (True, "one two")])
def test_stop_string(include: bool, expected: str) -> None:
    pieces, text = run("one twain two three", stop="two", include_stop_str_in_output=include)
    assert text.stop_string == "two"
    assert text.text == ("one twain two" if include else "one twain ")
    assert "t" not in pieces[:5]


def test_what_only_began_like_a_stop_string_is_released_at_the_end() -> None:
    _, text = run("one tw", stop="two")
    assert text.stop_string is None
    assert text.text == "one tw"


def test_min_tokens_lets_the_stop_string_pass() -> None:
    _, text = run("two two", stop="two", min_tokens=4)
    assert (text.text, text.stop_string) == ("two ", "two")


def test_the_stopping_token_is_left_out() -> None:
    for include, expected in ((False, "a"), (True, "ab")):
        text = SequenceText(SamplingParams(include_stop_str_in_output=include), ByteTokenizer())  # type: ignore[arg-type]
        text.push(ord("a"), stopped=False)
        text.push(ord("b"), stopped=True)
        text.finish()
        assert text.text == expected


def test_white_space_goes_at_both_ends() -> None:
    pieces, text = run(" \n  one \t two \n\u3000 ", strip=True)
    assert text.text == "one \t two"
    assert "".join(pieces[:8]) == "one"
    assert run(" \t \n", strip=True)[1].text == ""
    assert run(" a b. c", strip=True, stop=".")[1].text == "a b"
    assert run(" a b . c", strip=True, stop=".", include_stop_str_in_output=True)[1].text == "a b ."


def test_stripping_takes_time_in_proportion() -> None:
    def steps(length: int) -> int:
        return count_steps(lambda: run("a" + " " * length + "b", strip=True))

    assert steps(4000) < 5 * steps(1000)


def test_the_prompt_comes_first_and_stops_nothing() -> None:
    text = SequenceText(SamplingParams(echo=True, stop="b"), ByteTokenizer())  # type: ignore[arg-type]
    assert [text.echo(token) for token in "abé".encode()[:-1]] == ["a", "b", ""]
    assert [text.push(token, stopped=False) for token in [*"é".encode()[1:], *b"cb"]] == ["é", "c", ""]
    assert (text.stop_string, text.text) == ("b", "abéc")


def test_without_detokenizing_there_is_no_text() -> None:
    assert run("abc", detokenize=False)[1].text == ""


def test_special_tokens() -> None:
    assert run("a\0b")[1].text == "ab"
    assert run("a\0b", skip_special_tokens=False)[1].text == "a\0b"


@pytest.mark.parametrize("seed", range(20))
def test_all_at_once_is_what_comes_token_by_token(seed: int) -> None:
    rng = random.Random(seed)
    tokenizer: Any = ByteTokenizer()
    for reason in ("stop", "length", "abort"):
        params = SamplingParams(
            detokenize=rng.random() < 0.9,
            include_stop_str_in_output=rng.random() < 0.5,
            skip_special_tokens=rng.random() < 0.5,
            echo=rng.random() < 0.5,
            strip=rng.random() < 0.5,
        )
        prompt = "".join(rng.choices(" a\0é漢", k=5)).encode()[: rng.randrange(1, 5)]
        (sequence,) = make_group(prompt, params).sequences
        token_ids = "".join(rng.choices("a \n\0é漢🦉", k=rng.randrange(1, 20))).encode()[: rng.randrange(1, 20)]
        sequence.token_ids += token_ids
        sequence.finish_reason = reason  # type: ignore[assignment]
        text = SequenceText(params, tokenizer)
        for token_id in prompt if params.echo else b"":
            text.echo(token_id)
        for number, token_id in enumerate(token_ids, 1):
            text.push(token_id, stopped=reason == "stop" and number == len(token_ids))
        text.finish()
        assert whole_text(sequence, tokenizer) == text.text


def test_all_at_once_of_nothing() -> None:
    (sequence,) = make_group([1, 2, 3]).sequences
    assert whole_text(sequence, ByteTokenizer()) == ""  # type: ignore[arg-type]
