from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.core.errors import InvalidRequestError
from pellucid.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.support.texts import texts
from tests.support.tokenizers import VOCABULARIES, gguf_tokenizer, vocabulary_path

Stream = Callable[[Tokenizer, Iterable[int]], list[str]]


def stream(tokenizer: Tokenizer, ids: Iterable[int], **options: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def check(tokenizer: Tokenizer, ids: list[int], streamed: list[str]) -> None:
    assert "".join(streamed) == tokenizer.decode(ids)
    assert all(piece.isascii() or piece.encode().decode() == piece for piece in streamed)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_stream_is_the_whole(name: str) -> None:
    tokenizer = gguf_tokenizer(vocabulary_path(name))
    for text in texts(7, 300):
        ids = tokenizer.encode(text, parse_special=True)
        check(tokenizer, ids, stream(tokenizer, ids))


@cache
def odd_ids(tokenizer: Tokenizer) -> list[int]:
    """Single bytes, most of which are no text alone, and special tokens."""
    return [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1 or tokenizer.is_special(i)]


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("skip_special_tokens", [False, True])
@pytest.mark.parametrize("continuation", [False, True])
def test_any_ids_at_all(name: str, skip_special_tokens: bool, continuation: bool) -> None:
    tokenizer = gguf_tokenizer(vocabulary_path(name))
    rng = random.Random(8)
    odd = odd_ids(tokenizer)
    options = {"skip_special_tokens": skip_special_tokens, "continuation": continuation}
    for _ in range(200):
        ids = [rng.choice(odd) if rng.random() < 0.7 else rng.randrange(tokenizer.vocab_size) for _ in range(30)]
        assert "".join(stream(tokenizer, ids, **options)) == tokenizer.decode(ids, **options)


def each_token_alone(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    return [tokenizer.decode([token_id]) for token_id in ids]


def nothing_held_back_at_the_end(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    return stream(tokenizer, ids)[:-1]


@pytest.mark.parametrize("wrong", [each_token_alone, nothing_held_back_at_the_end])
def test_the_check_catches_a_wrong_stream(wrong: Stream) -> None:
    tokenizer = gguf_tokenizer(vocabulary_path("gpt-2"))
    ids = tokenizer.encode("🦙 日本")[:-1]
    with pytest.raises(AssertionError):
        check(tokenizer, ids, wrong(tokenizer, ids))


def test_a_character_comes_when_it_is_finished() -> None:
    tokenizer = gguf_tokenizer(vocabulary_path("gpt-2"))
    ids = tokenizer.encode("🦙")
    assert len(ids) > 1
    assert stream(tokenizer, ids) == [""] * (len(ids) - 1) + ["🦙", ""]


def test_the_leading_space_goes_only_where_text_starts() -> None:
    tokenizer = gguf_tokenizer(vocabulary_path("llama-spm"))
    ids = tokenizer.encode("Hello world", add_special_tokens=False)
    assert stream(tokenizer, ids) == ["Hello", " world", ""]
    assert stream(tokenizer, ids, continuation=True) == [" Hello", " world", ""]
    assert tokenizer.decode(ids, continuation=True) == " Hello world"
    two_spaces = tokenizer.encode("  x", add_special_tokens=False)
    assert "".join(stream(tokenizer, two_spaces)) == "  x"


@given(st.lists(st.integers(0, 50_256), max_size=30), st.data())
def test_goes_back(ids: list[int], data: st.DataObject) -> None:
    tokenizer = gguf_tokenizer(vocabulary_path("gpt-2"))
    at = data.draw(st.integers(0, len(ids)))
    detokenizer = IncrementalDetokenizer(tokenizer)
    before = [detokenizer.push(token_id) for token_id in ids[:at]]
    state = detokenizer.snapshot()
    for token_id in data.draw(st.lists(st.integers(0, 50_256), max_size=5)):
        detokenizer.push(token_id)
    detokenizer.restore(state)
    after = [detokenizer.push(token_id) for token_id in ids[at:]]
    assert "".join([*before, *after, detokenizer.flush()]) == tokenizer.decode(ids)


def test_goes_back_before_the_leading_space() -> None:
    tokenizer = gguf_tokenizer(vocabulary_path("llama-spm"))
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    state = detokenizer.snapshot()
    assert detokenizer.push(ids[0]) == "Hello"
    detokenizer.restore(state)
    assert detokenizer.push(ids[0]) == "Hello"


@pytest.mark.parametrize("token_id", [-1, 50_257, 2**63])
def test_an_id_out_of_range(token_id: int) -> None:
    detokenizer = IncrementalDetokenizer(gguf_tokenizer(vocabulary_path("gpt-2")))
    with pytest.raises(InvalidRequestError, match=f"token id {token_id} is out of range: .* 0 to 50256"):
        detokenizer.push(token_id)
