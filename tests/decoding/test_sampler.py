"""The sampling oracle: greedy, draws, log-probabilities, extremes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pellucid.core.batch import NOTHING_ALLOWED, SAMPLING_DTYPE, SamplingBatch
from pellucid.core.errors import BackendError, InvalidRequestError
from pellucid.decoding import distribution, mirostat, rng, sampler, temperature
from tests.support.logits import softmax
from tests.support.sampling import chi_squared_bound, make_batch, warped


def test_greedy_takes_the_highest_and_the_lowest_id_on_a_tie() -> None:
    logits = np.array([[0, 5, 5, 1], [7, 5, 5, 7], [-np.inf, -np.inf, -3, -np.inf]], dtype=np.float32)
    assert sampler.sample(logits, make_batch(3, temperature=0)).token_ids.tolist() == [1, 0, 2]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45])
def test_the_smallest_temperatures_choose_as_greedy_does(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 300)).astype(np.float32)
    tokens = sampler.sample(logits, make_batch(5, temperature=temperature)).token_ids
    assert tokens.tolist() == logits.argmax(axis=1).tolist()


def test_huge_logits_and_a_single_possible_token() -> None:
    logits = np.full((2, 9), -np.inf, dtype=np.float32)
    logits[0, 4] = -3.4e38
    logits[1] = [3.4e38, -3.4e38, 3.4e38, 0, 1, 2, 3, 4, 5]
    tokens = sampler.sample(logits, make_batch(2, temperature=1.0)).token_ids
    assert tokens[0] == 4
    assert tokens[1] in (0, 2)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "token 3 has NaN"), (np.inf, r"token 3 has \+inf"), (-np.inf, "every token")]
)
def test_logits_that_cannot_be_sampled(value: float, message: str) -> None:
    logits = np.zeros((2, 8), dtype=np.float32)
    logits[1, 3:] = value
    if value == -np.inf:
        logits[1] = value
    for t in (0.0, 1.0):
        with pytest.raises(BackendError, match=f"row 1 cannot be sampled: {message}"):
            sampler.sample(logits, make_batch(2, temperature=t))


OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "temperature": (-1, np.nan, np.inf),
    "dynatemp_range": (-0.1, np.nan, np.inf),
    "dynatemp_exponent": (-0.1, np.nan, np.inf),
    "top_n_sigma": (-1, np.nan, np.inf),
    "top_k": (-1,),
    "top_p": (0, 1.5, np.nan),
    "min_p": (-0.1, 1.1, np.nan),
    "typical_p": (0, 1.1, np.nan),
    "epsilon_cutoff": (-0.1, 1.1, np.nan),
    "eta_cutoff": (-0.1, 1.1, np.nan),
    "xtc_probability": (-0.1, 1.1, np.nan),
    "xtc_threshold": (-0.1, 1.1, np.nan),
    "mirostat": (-1, 3),
    "mirostat_tau": (-1, np.nan, np.inf),
    "mirostat_eta": (-1, np.nan, np.inf),
    "mirostat_mu": (np.nan, np.inf, -np.inf),
    "repetition_penalty": (0, -1, np.nan, np.inf),
    "presence_penalty": (np.nan, np.inf, -np.inf),
    "frequency_penalty": (np.nan, np.inf, -np.inf),
    "dry_multiplier": (-1, np.nan, np.inf),
    "dry_base": (0.9, np.nan, np.inf),
    "dry_allowed_length": (0, -1),
    "dry_penalty_last_n": (-2,),
    "no_repeat_ngram_size": (-1,),
    "num_prompt_tokens": (-1,),
    "num_logprobs": (-2,),
    "processed_logprobs": (-1, 2),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUT_OF_RANGE for value in OUT_OF_RANGE[name]])
def test_parameters_out_of_range(name: str, value: Any) -> None:
    batch = make_batch(3)
    batch.rows[name][1] = value
    with pytest.raises(InvalidRequestError, match=f"{name} of row 1 is .*; it must be") as error:
        sampler.sample(np.zeros((3, 4), dtype=np.float32), batch)
    assert error.value.param == name


def test_every_column_has_a_range_or_is_unsigned() -> None:
    assert SAMPLING_DTYPE.fields is not None
    signed = {name for name, (dtype, *_) in SAMPLING_DTYPE.fields.items() if dtype.kind != "u"}
    assert signed == OUT_OF_RANGE.keys()


def test_a_mask_of_another_vocabulary() -> None:
    batch = replace(make_batch(2), masks=[None, np.zeros(2, dtype=np.uint32)])
    with pytest.raises(BackendError, match="mask of row 1 has 2 words for a vocabulary of 32 tokens"):
        sampler.sample(np.zeros((2, 32), dtype=np.float32), batch)


def test_mismatched_lengths() -> None:
    with pytest.raises(BackendError, match=r"shape \(3, 4\), but there are 2 rows"):
        sampler.sample(np.zeros((3, 4), dtype=np.float32), make_batch(2))


def test_logprobs_are_those_of_the_raw_softmax() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (3, 1000)).astype(np.float32)
    batch = make_batch(3, temperature=0.5, top_k=3, num_logprobs=[-1, 0, 5])
    out = sampler.sample(logits, batch)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    assert np.isnan(out.logprobs[0])
    for row in (1, 2):
        assert abs(out.logprobs[row] - exact[row, out.token_ids[row]]) < 1e-6
    assert out.top_ids.shape == out.top_logprobs.shape == (3, 5)
    assert (out.top_ids[:2] == -1).all()
    assert np.isnan(out.top_logprobs[:2]).all()
    assert out.top_ids[2].tolist() == np.argsort(-logits[2], kind="stable")[:5].tolist()
    assert np.max(np.abs(out.top_logprobs[2] - exact[2, out.top_ids[2]])) < 1e-6


def test_processed_logprobs_are_those_of_what_is_drawn_from() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (2, 1000)).astype(np.float32)
    masks: list[Any] = [None, np.full(32, 0x55555555, dtype=np.uint32)]
    batch = make_batch(2, temperature=[0.5, 0.0], top_k=3, num_logprobs=5, processed_logprobs=1)
    out = sampler.sample(logits, replace(batch, masks=masks))
    sampled = softmax(warped(logits[0], temperature=0.5, top_k=3))
    best = np.argsort(-sampled)[:3]
    assert out.top_ids[0].tolist() == [*best.tolist(), -1, -1]
    assert np.max(np.abs(out.top_logprobs[0, :3] - np.log(sampled[best]))) < 1e-6
    assert np.isnan(out.top_logprobs[0, 3:]).all()
    assert abs(out.logprobs[0] - np.log(sampled[out.token_ids[0]])) < 1e-6
    even = np.where(np.arange(1000) % 2 == 0, logits[1], -np.inf).astype(np.float32)
    assert out.token_ids[1] == even.argmax() == out.top_ids[1, 0]
    assert np.max(np.abs(out.top_logprobs[1] - np.log(np.sort(softmax(even))[::-1][:5]))) < 1e-6


def test_masks_that_leave_nothing_are_that_row_s_affair() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (4, 40)).astype(np.float32)
    logits[3, 8:] = -np.inf
    nothing, all_but_8 = np.zeros(2, dtype=np.uint32), np.uint32([0xFFFFFF00, 0xFF])
    for t in (0.0, 1.0):
        batch = make_batch(4, temperature=t, num_logprobs=2, mirostat=2)
        alone = sampler.sample(logits[[0, 2]], make_batch(2, temperature=t, num_logprobs=2, position=[0, 2]))
        out = sampler.sample(logits, replace(batch, masks=[None, nothing, None, all_but_8]))
        assert (out.token_ids[[1, 3]] == NOTHING_ALLOWED).all()
        assert np.isnan(out.logprobs[[1, 3]]).all()
        assert (out.top_ids[[1, 3]] == -1).all()
        assert out.top_ids[[0, 2]].tolist() == alone.top_ids.tolist()
    every_token = np.arange(40, dtype=np.int32)
    ngrams = replace(make_batch(1, no_repeat_ngram_size=1), tokens=[every_token])
    assert sampler.sample(logits[:1], ngrams).token_ids.tolist() == [NOTHING_ALLOWED]


def test_mirostat_s_state_goes_in_and_comes_out() -> None:
    logits = np.random.default_rng(2).normal(0, 3, (3, 500)).astype(np.float32)
    batch = make_batch(3, mirostat=[1, 2, 2], mirostat_mu=[4.0, 7.0, 7.0], mirostat_tau=3.0, mirostat_eta=0.25)
    batch.rows["temperature"][2] = 0
    out = sampler.sample(logits, batch)
    assert out.mirostat_mu is not None
    for row, cut in enumerate((mirostat.mirostat_v1, mirostat.mirostat_v2)):
        mu = float(batch.rows["mirostat_mu"][row])
        final = cut(temperature.temperature(logits[row], 1.0), mu)
        token = sampler.draw(final, rng.draw_bits(0, 0, row))
        assert out.token_ids[row] == token
        assert out.mirostat_mu[row] == mirostat.next_mu(mu, mirostat.surprise(final, token), 3.0, 0.25)
    assert out.mirostat_mu[2] == 7.0  # greedy
    assert sampler.sample(logits, make_batch(3)).mirostat_mu is None


def test_xtc_s_coin_is_fair_and_not_the_draw() -> None:
    """Of two equal tokens, XTC leaves the second; without it each is drawn half of the time."""
    logits = np.zeros((4000, 2), dtype=np.float32)
    plain = sampler.sample(logits, make_batch(4000)).token_ids
    out = sampler.sample(logits, make_batch(4000, xtc_probability=0.25, xtc_threshold=0.4)).token_ids
    assert abs(np.mean(out) - 0.625) < 0.03
    assert (out >= plain).all()
    assert abs(np.mean(out[plain == 0]) - 0.25) < 0.04
    for probability, share in ((0.0, np.mean(plain)), (1.0, 1.0)):
        out = sampler.sample(logits, make_batch(4000, xtc_probability=probability, xtc_threshold=0.4)).token_ids
        assert np.mean(out) == share


def test_a_coin_from_the_draw_s_bits_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "STREAM_XTC", rng.STREAM_SAMPLE)
    with pytest.raises(AssertionError):
        test_xtc_s_coin_is_fair_and_not_the_draw()


def test_more_logprobs_than_tokens() -> None:
    out = sampler.sample(np.zeros((1, 3), dtype=np.float32), make_batch(1, num_logprobs=100))
    assert out.top_ids.tolist() == [[0, 1, 2]]


def test_replaying_the_draw_gives_the_token_and_it_survived() -> None:
    logits = np.random.default_rng(2).normal(0, 3, (50, 400)).astype(np.float32)
    batch = make_batch(50, temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, seed=99)
    tokens = sampler.sample(logits, batch).token_ids
    for row, token in enumerate(tokens):
        final = warped(logits[row], temperature=0.8, top_k=20, top_p=0.9, min_p=0.05)
        assert final[token] > -np.inf
        assert sampler.draw(final, rng.draw_bits(99, 0, row)) == token


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 2, (20, 200)).astype(np.float32)
    batch = make_batch(20, temperature=1.0, top_p=0.9, seed=np.arange(20) % 3)
    tokens = sampler.sample(logits, batch).token_ids
    order = generator.permutation(20)
    shuffled = SamplingBatch(batch.rows[order])
    assert sampler.sample(logits[order], shuffled).token_ids.tolist() == tokens[order].tolist()


def test_draws_follow_the_distribution() -> None:
    logits = np.random.default_rng(4).normal(0, 1, 20).astype(np.float32)
    draws = [sampler.draw(logits, rng.draw_bits(5, 0, position)) for position in range(5000)]
    expected = distribution.probabilities(logits) * len(draws)
    statistic = np.sum((np.bincount(draws, minlength=20) - expected) ** 2 / expected)
    assert statistic < chi_squared_bound(19)


def test_the_boundaries_of_a_draw() -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], dtype=np.float32)
    assert sampler.draw(logits, 0) == 1
    assert sampler.draw(logits, 2**63 - 1) == 1
    assert sampler.draw(logits, 2**63) == 3
    assert sampler.draw(logits, 2**64 - 1) == 3


def test_the_boundaries_catch_a_draw_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    search = np.searchsorted
    monkeypatch.setattr(np, "searchsorted", lambda a, v, side: search(a, v, side="left"))
    with pytest.raises(AssertionError):
        test_the_boundaries_of_a_draw()
