"""Which continuations come back, and what comes before them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.core.outputs import RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine import replies
from pellucid.engine.replies import returned_sequences
from tests.support.engines import CheckedEngine, make_engine
from tests.support.fake_tokenizer import ALPHABET
from tests.support.mutants import mutant
from tests.support.sequences import make_group

PROMPT = [5, 6, 7, 8]


def answer(stream: bool = False, prompt: list[int] = PROMPT, **params: Any) -> tuple[RequestOutput, CheckedEngine]:
    engine = make_engine(max_num_seqs=16)
    engine.add_request("x", prompt, SamplingParams(**{"max_tokens": 12, "seed": 3, **params}), stream=stream)
    engine.run()
    return engine.replies["x"], engine


def test_the_sum_of_the_logprobs() -> None:
    (plain,), (reported,) = answer()[0].outputs, answer(logprobs=0)[0].outputs
    assert plain.cumulative_logprob is None
    assert reported.logprobs is not None
    expected = sum(step[token_id].logprob for token_id, step in zip(reported.token_ids, reported.logprobs, strict=True))
    assert reported.cumulative_logprob == pytest.approx(expected, abs=1e-9)
    assert reported.cumulative_logprob < 0


def test_the_best_of_many_come_first() -> None:
    params = {"temperature": 1.5, "stop": ["e", "T"], "max_tokens": 40}
    every = answer(n=8, logprobs=0, **params)[0].outputs
    means = {completion.index: completion.cumulative_logprob / len(completion.token_ids) for completion in every}  # type: ignore[operator]
    order = sorted(means, key=lambda index: -means[index])
    assert order != sorted(order)
    assert order != sorted(order, key=lambda index: -every[index].cumulative_logprob)  # type: ignore[operator]
    reply = answer(n=3, best_of=8, **params)[0]
    assert [completion.token_ids for completion in reply.outputs] == [every[index].token_ids for index in order[:3]]
    assert [completion.index for completion in reply.outputs] == [0, 1, 2]
    for completion, index in zip(reply.outputs, order, strict=False):
        assert (completion.text, completion.logprobs) == (every[index].text, None)
        assert completion.cumulative_logprob == every[index].cumulative_logprob
    assert reply.metrics.output_tokens == sum(len(completion.token_ids) for completion in every)


def test_mutant_ranking_by_the_sum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(replies._mean_logprob, " / sequence.num_output_tokens", "")
    monkeypatch.setattr(replies, "_mean_logprob", changed)
    with pytest.raises(AssertionError):
        test_the_best_of_many_come_first()


def test_equals_stay_in_order() -> None:
    group = make_group([1], SamplingParams(n=2, best_of=4))
    for sequence, logprob in zip(group.sequences, (-1.0, -math.inf, -1.0, -1.0), strict=True):
        sequence.token_ids.append(2)
        sequence.cumulative_logprob = logprob
    assert returned_sequences(group) == [group.sequences[0], group.sequences[2]]


def test_best_of_is_not_streamed() -> None:
    with pytest.raises(InvalidRequestError, match="best_of is 2") as caught:
        answer(stream=True, best_of=2)
    assert caught.value.param == "best_of"
    answer(stream=True, n=2, best_of=2)


def test_best_of_takes_places() -> None:
    with pytest.raises(InvalidRequestError, match="best_of is 17, but at most 16") as caught:
        answer(best_of=17)
    assert caught.value.param == "best_of"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front(stream: bool) -> None:
    (plain,) = answer(logprobs=2, prompt_logprobs=2)[0].outputs
    reply, engine = answer(stream=stream, logprobs=2, echo=True)
    prompt_logprobs = answer(prompt_logprobs=2)[0].prompt_logprobs
    assert prompt_logprobs is not None
    assert plain.logprobs is not None
    (completion,) = reply.outputs
    assert completion.token_ids == PROMPT + plain.token_ids
    assert completion.text == "".join(ALPHABET[token] for token in PROMPT) + plain.text
    assert completion.logprobs == [{}, *prompt_logprobs[1:], *plain.logprobs]
    assert completion.cumulative_logprob == plain.cumulative_logprob
    assert reply.prompt_logprobs is None
    if stream:
        tokens = engine.tokens["x"]
        assert [token.token_id for token in tokens] == completion.token_ids
        assert [token.text for token in tokens[:4]] == [ALPHABET[token] for token in PROMPT]
        assert [token.logprobs for token in tokens] == completion.logprobs


def test_each_continuation_has_its_echo() -> None:
    outputs = answer(echo=True, n=3, stream=True)[0].outputs
    assert len({tuple(completion.token_ids) for completion in outputs}) == 3
    assert all(completion.token_ids[:4] == PROMPT for completion in outputs)


def test_nothing_is_echoed_before_an_answer() -> None:
    engine = make_engine()
    engine.add_request("x", PROMPT, SamplingParams(echo=True, logprobs=1), stream=True)
    engine.abort("x")
    (completion,) = engine.replies["x"].outputs
    assert (completion.text, completion.token_ids, completion.logprobs) == ("", [], [])
    assert [token.token_id for token in engine.tokens["x"]] == [None]


def test_each_reports_as_many_alternatives_as_it_asked_for() -> None:
    wide, narrow = answer(prompt_logprobs=5)[0].prompt_logprobs, answer(prompt_logprobs=1)[0].prompt_logprobs
    both = answer(prompt_logprobs=5, logprobs=1, echo=True)[0]
    assert both.prompt_logprobs == wide
    assert narrow is not None
    assert both.outputs[0].logprobs is not None
    assert both.outputs[0].logprobs[1:4] == narrow[1:]
    swapped = answer(prompt_logprobs=1, logprobs=5, echo=True)[0]
    assert swapped.prompt_logprobs == narrow
    assert wide is not None
    for entry, token_id in zip(narrow[1:], PROMPT[1:], strict=True):
        assert entry is not None
        assert next(iter(entry)) == token_id
        assert len(entry) == 1 + (entry[token_id].rank is None)
