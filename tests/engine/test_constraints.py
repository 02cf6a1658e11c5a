"""Masks: which tokens they leave, what they are a function of, and requests that they leave nothing."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.core.errors import InvalidRequestError
from pellucid.core.outputs import CompletionOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.decoding.token_mask import apply_mask
from pellucid.engine import constraints as engine_constraints
from pellucid.engine.constraints import ConstraintBook, TokenConstraints, bad_word_token_ids, mask_without
from tests.support.engines import CheckedEngine, make_engine
from tests.support.fake_backend import VOCAB_SIZE
from tests.support.fake_tokenizer import ALPHABET, EOS, FakeTokenizer
from tests.support.mutants import mutant
from tests.support.sequences import make_group

PROMPT = [5, 6, 7]


def ids(text: str) -> list[int]:
    return [ALPHABET.index(character) for character in text]


def allowed(mask: NDArray[np.uint32] | None, vocab_size: int = VOCAB_SIZE) -> set[int]:
    if mask is None:
        return set(range(vocab_size))
    return set(np.flatnonzero(apply_mask(np.zeros(vocab_size, np.float32), mask) == 0).tolist())


def constraints(*, bad_words: list[list[int]] | None = None, vocab_size: int = 100, **params: Any) -> TokenConstraints:
    return TokenConstraints(
        SamplingParams(**params), bad_words or [], {2, 3}, num_prompt_tokens=len(PROMPT), vocab_size=vocab_size
    )


def answer(engine: CheckedEngine | None = None, **params: Any) -> CompletionOutput:
    engine = engine or make_engine()
    engine.add_request("x", PROMPT, SamplingParams(**{"seed": 1, "max_tokens": 60, "ignore_eos": True, **params}))
    engine.run()
    (completion,) = engine.replies["x"].outputs
    return completion


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 100])
def test_a_mask_without_a_token_has_no_bit(vocab_size: int) -> None:
    mask = constraints(banned_token_ids=range(vocab_size), vocab_size=vocab_size).mask(PROMPT)
    assert mask is not None
    assert len(mask) == -(-vocab_size // 32)
    assert not mask.any()


def test_allowed_and_banned() -> None:
    mask = constraints(allowed_token_ids=[1, 2, 40, 99], banned_token_ids=[40, 50]).mask(PROMPT)
    assert allowed(mask, 100) == {1, 2, 99}
    assert allowed(constraints(banned_token_ids=[0, 32]).mask(PROMPT), 100) == set(range(100)) - {0, 32}
    assert constraints().mask(PROMPT) is None


def test_min_tokens_counts_what_was_generated() -> None:
    both = constraints(min_tokens=2, allowed_token_ids=[1, 2, 3])
    assert allowed(both.mask(PROMPT)) == allowed(both.mask([*PROMPT, 1])) == {1}
    assert allowed(both.mask([*PROMPT, 1, 1])) == {1, 2, 3}
    assert constraints(min_tokens=2).mask([*PROMPT, 1, 1]) is None


def test_a_word_is_ruled_out_where_its_end_would_complete_it() -> None:
    words = constraints(bad_words=[[9], [10, 11], [10, 10, 12], [5, 20], [7, 21]])
    everything = set(range(100)) - {9}
    assert allowed(words.mask(PROMPT), 100) == everything  # a word that the prompt began is not the answer's
    assert allowed(words.mask([*PROMPT, 10]), 100) == everything - {11}
    assert allowed(words.mask([*PROMPT, 10, 10]), 100) == everything - {11, 12}
    assert allowed(words.mask([*PROMPT, 10, 4]), 100) == everything


def test_a_mask_is_a_function_of_the_tokens_alone() -> None:
    """In any order, as after a rollback: no count is kept, and no mask given out is written to."""
    rng = random.Random(0)
    watched = constraints(bad_words=[[9], [11, 12], [11, 11, 13]], min_tokens=3)
    texts = [[*PROMPT, *rng.choices([11, 12, 13], k=rng.randrange(8))] for _ in range(200)]
    first = [allowed(watched.mask(text), 100) for text in texts]
    assert len({frozenset(mask) for mask in first}) > 4
    for number in rng.sample(range(200), 200):
        assert allowed(watched.mask(texts[number]), 100) == first[number]


def test_words_are_tokenized_with_and_without_a_space() -> None:
    tokenizer: Any = FakeTokenizer()
    assert bad_word_token_ids(["no", " no", "x", "\n"], tokenizer) == [
        ids("no"),
        ids(" no"),
        ids("x"),
        ids(" x"),
        ids("\n"),
        ids(" \n"),
    ]
    assert bad_word_token_ids([" "], tokenizer) == [ids(" ")]


def test_answers_keep_to_them() -> None:
    only = answer(allowed_token_ids=[4, 8, 15], temperature=2)
    assert set(only.token_ids) == {4, 8, 15}
    plain = answer(max_tokens=300)
    banned = answer(banned_token_ids=plain.token_ids[:10], max_tokens=300)
    assert not {*plain.token_ids[:10]} & {*banned.token_ids}
    assert len(banned.token_ids) == 300
    two = answer(allowed_token_ids=ids("abc"), temperature=1.5, max_tokens=300)
    worded = answer(allowed_token_ids=ids("abc"), temperature=1.5, max_tokens=300, bad_words=["ab", "cca", "x"])
    assert "ab" in two.text
    assert "cca" in two.text
    assert "ab" not in worded.text
    assert "cca" not in worded.text
    assert {*worded.text} == {*"abc"}


def test_mutant_taking_the_prompt_for_the_answer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mutant(TokenConstraints.mask, "token_ids[self._num_prompt_tokens :]", "token_ids")
    monkeypatch.setattr(TokenConstraints, "mask", whole)
    with pytest.raises(AssertionError):
        test_a_word_is_ruled_out_where_its_end_would_complete_it()


def test_mutant_writing_into_a_shared_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_constraints, "mask_without", mutant(mask_without, "mask.copy()", "mask"))
    with pytest.raises(AssertionError):
        test_a_mask_is_a_function_of_the_tokens_alone()


def test_reported_log_probabilities_are_the_models() -> None:
    plain = answer(logprobs=3, temperature=0, max_tokens=1)
    (best,) = plain.token_ids
    other = answer(logprobs=3, temperature=0, max_tokens=1, banned_token_ids=[best])
    assert plain.logprobs is not None
    assert other.logprobs is not None
    assert other.token_ids != [best]
    assert other.logprobs[0].keys() == plain.logprobs[0].keys()
    assert all(other.logprobs[0][token].logprob == item.logprob for token, item in plain.logprobs[0].items())


def test_a_request_with_nothing_to_begin_with_is_refused() -> None:
    engine = make_engine()
    for params in (
        {"allowed_token_ids": [4, 5], "banned_token_ids": [5, 4]},
        {"allowed_token_ids": ids("ab"), "bad_words": ["a", "b"]},
        {"allowed_token_ids": [4], "stop_token_ids": [4], "min_tokens": 1},
    ):
        with pytest.raises(InvalidRequestError, match="rule out every token") as caught:
            engine.add_request("x", PROMPT, SamplingParams(**params))  # type: ignore[arg-type]
        assert caught.value.param == "allowed_token_ids"
    assert not engine.has_unfinished()
    assert not engine._constraints
    assert engine.metrics().counters.requests_received == 0


def test_a_request_that_comes_to_nothing_fails_alone() -> None:
    engine = make_engine()
    lonely = {"allowed_token_ids": [EOS + 1, EOS + 2], "bad_words": ["aa", "ab", "ba", "bb"], "n": 2}
    engine.add_request("other", PROMPT, SamplingParams(max_tokens=20, seed=5, ignore_eos=True))
    engine.add_request("lonely", PROMPT, SamplingParams(max_tokens=20, seed=1, **lonely), stream=True)  # type: ignore[arg-type]
    engine.run()
    reply = engine.replies["lonely"]
    assert isinstance(reply.error, InvalidRequestError)
    assert reply.error.param == "allowed_token_ids"
    assert "allowed_token_ids and bad_words rule out every token after 1 tokens" in reply.error.message
    assert [completion.finish_reason for completion in reply.outputs] == ["error", "error"]
    assert [len(completion.token_ids) for completion in reply.outputs] == [1, 1]
    assert engine.replies["other"].outputs == [answer(max_tokens=20, seed=5)]


def test_the_book_costs_nothing_where_nobody_asks() -> None:
    book = ConstraintBook(FakeTokenizer(), VOCAB_SIZE, num_mask_threads=1)  # type: ignore[arg-type]
    book.open(make_group(PROMPT, SamplingParams(max_tokens=5)))
    assert not book
    group = make_group(PROMPT, SamplingParams(min_tokens=1))
    book.open(group)
    assert book
    book.begin([(make_group(PROMPT).sequences[0], PROMPT), (group.sequences[0], PROMPT)])
    first, second = book.join({})
    assert first is None
    assert second is not None
    book.close(group)
    assert not book


DEAD_ENDS: dict[str, Any] = {"allowed_token_ids": ids("ab"), "bad_words": ["aa", "ab"], "temperature": 0, "seed": None}


def test_beams_that_come_to_nothing_are_left() -> None:
    """Nothing may follow an `a`; only as the last token is one possible."""
    engine = make_engine()
    engine.add_request("x", PROMPT, SamplingParams(max_tokens=6, num_beams=3, n=3, **DEAD_ENDS))
    engine.run()
    reply = engine.replies["x"]
    assert reply.error is None
    texts = [completion.text for completion in reply.outputs]
    assert sorted(texts)[-2:] == ["bbbbba", "bbbbbb"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "search",
    [{"num_beams": 2, "banned_token_ids": ids("b")}, {"penalty_alpha": 0.5, "top_k": 2}, {"guidance_scale": 2.0}],
)
def test_a_search_that_comes_to_nothing_fails_alone(search: dict[str, Any], stream: bool) -> None:
    engine = make_engine()
    engine.add_request("other", PROMPT, SamplingParams(max_tokens=20, seed=5, ignore_eos=True))
    params = SamplingParams(max_tokens=20, logit_bias={ids("a")[0]: 100}, **DEAD_ENDS, **search)
    engine.add_request("x", PROMPT, params, stream=stream)
    engine.run()
    reply = engine.replies["x"]
    assert isinstance(reply.error, InvalidRequestError)
    assert "rule out every token after 1 tokens" in reply.error.message
    (completion,) = reply.outputs
    assert (completion.text, completion.finish_reason) == ("a", "error")
    if stream:
        assert "".join(token.text for token in engine.tokens["x"]) == "a"
    assert engine.replies["other"].outputs == [answer(max_tokens=20, seed=5)]
