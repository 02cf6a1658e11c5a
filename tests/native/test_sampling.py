"""The native sampler against the numpy oracle: the same survivors, tokens and log-probabilities, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pellucid.core.batch import NOTHING_ALLOWED, SAMPLING_DTYPE, SampledTokens
from pellucid.core.errors import BackendError, InvalidRequestError
from pellucid.decoding import distribution, elementary, mirostat, pipeline, rng, sampler, temperature, truncation
from tests.support.mutants import mutant
from tests.support.random_sampling import (
    TRUNCATIONS,
    VOCAB_SIZES,
    bits,
    check_sampled,
    check_survivors,
    native_sample,
    part_of,
    random_batch,
    random_row,
    random_warping,
)
from tests.support.sampling import chi_squared_bound, make_batch, warped

native = pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")

ISAS = [isa for isa in ("avx512", "avx2", "portable") if isa == "portable" or isa in native.peak_isas()]
NEUTRAL = {name: 1.0 if name in ("top_p", "typical_p") else 0 for name in TRUNCATIONS}


def check_random_batches(isa: str, num_batches: int = 40, *, first_seed: int = 0, threads: int = 1) -> None:
    for seed in range(first_seed, first_seed + num_batches):
        generator = np.random.default_rng(seed)
        vocab_size = int(generator.choice(VOCAB_SIZES))
        logits = np.stack([random_row(generator, vocab_size) for _ in range(6)])
        check_sampled(logits, random_batch(generator, 6, vocab_size), isa, threads)


def check_random_survivors(isa: str, num_cases: int, **fixed: Any) -> None:
    for seed in range(num_cases):
        generator = np.random.default_rng(seed)
        logits = random_row(generator, int(generator.choice(VOCAB_SIZES)))
        check_survivors(logits, make_batch(1, **random_warping(generator) | fixed, seed=seed), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_everything_equals_the_oracle(isa: str) -> None:
    check_random_batches(isa, 120)


@pytest.mark.parametrize("isa", ISAS)
def test_survivors_and_weights_equal_the_oracle(isa: str) -> None:
    check_random_survivors(isa, 150)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("alone", [*TRUNCATIONS, "xtc_probability"])
def test_each_truncation_alone_equals_the_oracle(isa: str, alone: str) -> None:
    neutral = NEUTRAL | {"mirostat": 0, "xtc_probability": 0}
    del neutral[alone]
    check_random_survivors(isa, 40, **neutral)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_equals_the_oracle(isa: str, version: int) -> None:
    neutral = NEUTRAL | {"xtc_probability": 0}
    for mu in (0.1, 1.0, 3.0, 5.0, 8.0):
        check_random_survivors(isa, 15, **neutral, mirostat=version, mirostat_tau=3, mirostat_eta=0.1, mirostat_mu=mu)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_many_random_batches_equal_the_oracle(isa: str) -> None:
    check_random_batches(isa, 500, first_seed=1000, threads=2)


def test_the_record_is_the_same_in_both_languages() -> None:
    fields = SAMPLING_DTYPE.fields
    assert fields is not None
    theirs = [(name, str(fields[name][0]), fields[name][1]) for name in SAMPLING_DTYPE.names or ()]
    assert theirs == native.SAMPLING_FIELDS


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_where_the_sample_of_the_tail_misleads(isa: str, top_p: float) -> None:
    """The tail lies where the native sampler does not look when it guesses, so that its first guess is refuted."""
    logits = np.random.default_rng(7).normal(0, 0.5, 8192).astype(np.float32)
    logits[(np.arange(8192) // 16) % 4 == 0] = -30.0
    logits[3] = 6.0
    check_survivors(logits, make_batch(1, top_p=top_p), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_typical_p_where_distances_tie_as_float32(isa: str) -> None:
    """Ranked by distances in float64, of which many are the same float32."""
    generator = np.random.default_rng(8)
    logits = generator.normal(0, 1e-6, 3000).astype(np.float32)
    logits[::3] -= 5
    for typical_p in (0.1, 0.4, 0.7, 0.95):
        check_survivors(logits, make_batch(1, typical_p=typical_p), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_the_most_probable_token_may_go_before_other_truncations(isa: str) -> None:
    """What stays is weighed anew, relative to the most probable of it."""
    logits = np.random.default_rng(9).normal(0, 2, 2000).astype(np.float32)
    logits[:200] += 4
    logits[7] = 8
    assert warped(logits, typical_p=0.2)[7] == -np.inf
    for others in ({}, {"epsilon_cutoff": 0.004}, {"eta_cutoff": 0.01}, {"xtc_probability": 1, "xtc_threshold": 0.004}):
        check_survivors(logits, make_batch(1, typical_p=0.2, **others), isa)


def test_every_instruction_set_gives_the_same_bits() -> None:
    generator = np.random.default_rng(2)
    vocab_size = 49152
    logits = np.stack([random_row(generator, vocab_size) for _ in range(20)])
    batch = random_batch(generator, 20, vocab_size)
    first, *others = (native_sample(logits, batch, isa) for isa in ISAS)
    for other in others:
        for name in SampledTokens.__slots__:
            assert np.array_equal(bits(getattr(first, name)), bits(getattr(other, name))), name


def test_the_largest_vocabulary_that_models_use() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 4, (8, 262_144)).astype(np.float32)
    check_sampled(logits, random_batch(generator, 8, 262_144), ISAS[0], threads=2)


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 30},
        {"top_p": 0.9},
        {"min_p": 0.02},
        {"typical_p": 0.7},
        {"eta_cutoff": 0.02},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"mirostat": 2, "mirostat_mu": 4.5},
    ],
)
def test_100_000_draws_follow_the_distribution(filters: dict[str, Any]) -> None:
    num_draws = 100_000
    logits = np.random.default_rng(4).normal(0, 1.5, 50).astype(np.float32)
    columns = {"temperature": 0.9} | filters
    batch = make_batch(num_draws, seed=11, **columns)
    tokens = native_sample(np.tile(logits, (num_draws, 1)), batch, threads=2).token_ids
    expected = distribution.probabilities(warped(logits, **columns)) * num_draws
    possible = expected > 0
    counts = np.bincount(tokens, minlength=50)
    assert counts[~possible].sum() == 0
    statistic = np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])
    assert statistic < chi_squared_bound(int(possible.sum()) - 1)


def test_the_distribution_test_catches_a_wrong_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    right = temperature.temperature
    monkeypatch.setattr(temperature, "temperature", lambda logits, value: right(logits, value * 1.05))
    with pytest.raises(AssertionError):
        test_100_000_draws_follow_the_distribution({})


def test_a_row_depends_on_nothing_but_itself() -> None:
    generator = np.random.default_rng(5)
    logits = np.stack([random_row(generator, 3000) for _ in range(64)])
    batch = random_batch(generator, 64, 3000, num_logprobs=3, mirostat=0, seed=5)
    whole = native_sample(logits, batch)
    order = generator.permutation(64)
    for part in (order, order[:7], order[:1]):
        again = native_sample(logits[part], part_of(batch, part))
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            assert np.array_equal(bits(getattr(again, name)), bits(getattr(whole, name)[part])), name


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_give_the_same_bits(threads: int) -> None:
    generator = np.random.default_rng(6)
    logits = np.stack([random_row(generator, 32768) for _ in range(20)])
    logits[::3] *= np.float32(1e-43)  # subnormal: the threads of a model flush those
    check_sampled(logits, random_batch(generator, 20, 32768), ISAS[0], threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 300, 999])
def test_logits_that_cannot_be_sampled(isa: str, value: float, position: int) -> None:
    """Whether or not a penalty, a mask or a ban comes upon them first."""
    logits = np.zeros((2, 1000), dtype=np.float32)
    logits[1, position] = value
    if value == -np.inf:
        logits[1] = value
    seen = np.array([position, 5, position], np.int32)
    mask = np.full(32, 0xFFFFFFFF, np.uint32)
    mask[position // 32] = 0
    edits: list[dict[str, Any]] = [
        {},
        {"tokens": [None, seen]},
        {"bias": [None, (seen[:2], np.float32([1, -1]))]},
        {"masks": [None, mask]},
        {"masks": [None, np.zeros(32, np.uint32)]},
    ]
    for edit in edits:
        for columns in ({}, {"num_logprobs": 2}, {"repetition_penalty": 2}, {"no_repeat_ngram_size": 1}):
            batch = replace(make_batch(2, temperature=[0, 1], **columns), **edit)
            with pytest.raises(BackendError) as theirs:
                sampler.sample(logits, batch)
            with pytest.raises(BackendError) as ours:
                native_sample(logits, batch, isa)
            assert ours.value.message == theirs.value.message


@pytest.mark.parametrize("name", [name for name in SAMPLING_DTYPE.names or () if name not in ("seed", "position")])
def test_parameters_out_of_range(name: str) -> None:
    logits = np.zeros((2, 4), dtype=np.float32)
    is_float = make_batch(1).rows[name].dtype == np.float32
    for value in (-1000, -2, -1, 0, 1, 2, 1.5, np.nan, np.inf) if is_float else (-(2**31), -2, -1, 0, 1, 2, 3):
        if name == "sequence_index" and value < 0:
            continue
        batch = make_batch(2)
        batch.rows[name][1] = value
        refused = []
        for sample in (sampler.sample, native_sample):
            try:
                sample(logits, batch)
            except InvalidRequestError as error:
                refused.append((error.param, error.message.split("; ")[1]))
        assert refused in ([], [(name, refused[0][1] if refused else "")] * 2), (name, value, refused)


def test_other_refusals() -> None:
    logits = np.zeros((2, 4), dtype=np.float32)
    with pytest.raises(BackendError, match=r"shape \(2, 4\), but there are 3 rows"):
        native_sample(logits, make_batch(3))
    with pytest.raises(BackendError, match="vocabulary of 0 tokens"):
        native_sample(logits[:, :0], make_batch(2))
    with pytest.raises(ValueError, match=r"no instruction set 'mmx' on this machine; it has .*portable"):
        native_sample(logits, make_batch(2), isa="mmx")
    with pytest.raises(BackendError, match="the mask of row 1 has 2 words for a vocabulary of 4 tokens"):
        native_sample(logits, replace(make_batch(2), masks=[None, np.zeros(2, np.uint32)]))
    with pytest.raises(ValueError, match="tokens does not have an entry a row"):
        native_sample(logits, replace(make_batch(2), tokens=[None]))
    with pytest.raises(ValueError, match="bias has not as many values as token ids"):
        native_sample(logits, replace(make_batch(2), bias=[None, (np.zeros(2, np.int32), np.zeros(1, np.float32))]))
    with pytest.raises(ValueError, match="dry_breakers are not ascending"):
        native_sample(logits, replace(make_batch(2), dry_breakers=[None, np.array([2, 1], np.int32)]))
    assert native_sample(logits[:0], make_batch(0)).token_ids.shape == (0,)


def test_more_logprobs_than_tokens() -> None:
    out = native_sample(np.zeros((1, 3), dtype=np.float32), make_batch(1, num_logprobs=2**31 - 1))
    assert out.top_ids.tolist() == [[0, 1, 2]]


def test_a_row_without_anything_to_choose_leaves_the_others_alone() -> None:
    logits = np.random.default_rng(1).normal(0, 1, (3, 40)).astype(np.float32)
    batch = make_batch(3, temperature=0, num_logprobs=2)
    alone = native_sample(logits, batch)
    nothing = native_sample(logits, replace(batch, masks=[None, np.zeros(2, np.uint32), None]))
    assert nothing.token_ids.tolist() == [alone.token_ids[0], NOTHING_ALLOWED, alone.token_ids[2]]
    assert nothing.top_ids.tolist() == [alone.top_ids[0].tolist(), [-1, -1], alone.top_ids[2].tolist()]
    assert np.isnan(nothing.logprobs[1])


def test_raw_logprobs_are_of_the_logits_as_they_came() -> None:
    logits = np.random.default_rng(2).normal(0, 1, (1, 500)).astype(np.float32)
    best = int(logits.argmax())
    batch = replace(
        make_batch(1, temperature=0, num_logprobs=3, repetition_penalty=50, num_prompt_tokens=1),
        tokens=[np.array([best], np.int32)],
        bias=[(np.array([9], np.int32), np.float32([60]))],
    )
    out = native_sample(logits, batch)
    assert out.token_ids.tolist() == [9]
    assert out.top_ids[0, 0] == best
    assert out.logprobs[0] == sampler.log_probabilities(logits[0], np.array([9]))[0]


@pytest.mark.parametrize("vocab_size", [49_152, 262_144])
def test_what_a_row_reads_of_the_vocabulary(vocab_size: int) -> None:
    """Costs as counts, which a busy machine does not change: how many numbers go through each kernel."""
    generator = np.random.default_rng(4)
    logits = generator.normal(0, 3, (1, vocab_size)).astype(np.float32)
    logits[0, generator.integers(0, vocab_size, 50)] += 15  # as a language model's

    def work(**columns: Any) -> dict[str, int]:
        batch = replace(make_batch(1, num_prompt_tokens=900, **columns), tokens=[np.arange(1000, dtype=np.int32)])
        counts: dict[str, int] = native.sampling_work(logits.copy(), batch.rows.view(np.uint8), batch.tokens)
        return counts

    once, parts = vocab_size, vocab_size // 16
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
    assert work(temperature=0) == work(temperature=0, **penalties) == {"row_max": once}
    assert work() == {"row_max": once, "exp_weights": once + 1024}  # the chunk of the token once more
    common = work(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, **penalties)
    assert common == {"row_max": once + parts, "collect_by_maxima": once, "exp_weights": 40}
    assert work(top_p=0.9) == {"row_max": once, "exp_weights": once, "estimate_tails": once, "collect": once}
    assert work(min_p=0.05) == {"row_max": once, "exp_weights": once, "collect": once}
    assert work(typical_p=0.9) == work(top_p=0.9) | {"gap_sum": once}
    assert work(temperature=0, num_logprobs=0) == {"row_max": once, "exp_weights": once}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("processed", [0, 1])
def test_xtc_of_the_whole_row(isa: str, processed: int) -> None:
    """With nothing before it that leaves few tokens; raw log-probabilities are still of the logits as they came."""
    for seed in range(30):
        generator = np.random.default_rng(seed)
        logits = random_row(generator, int(generator.choice([17, 1000, 5000])))[None]
        columns = {"temperature": generator.choice([0.5, 1.0, 1.5]), "xtc_threshold": generator.choice([0, 0.01, 0.1])}
        batch = make_batch(1, **columns, xtc_probability=1, num_logprobs=5, processed_logprobs=processed, seed=seed)
        check_sampled(logits, batch, isa)
        check_survivors(logits[0], batch, isa)


def break_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    last_first = lambda logits: np.argsort(logits, kind="stable")[::-1]  # noqa: E731
    monkeypatch.setattr(distribution, "descending", last_first)


def break_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = lambda x: np.exp(x.astype(np.float64)).astype(np.float32)  # noqa: E731
    monkeypatch.setattr(distribution, "exp", exact)


def break_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "_WEYL", (rng._WEYL[1], rng._WEYL[0]))


def breaker(module: Any, name: str, old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, name, mutant(getattr(module, name), old, new))

    mutate.__name__ = f"{name}: {new}"
    return mutate


def check_all() -> None:
    check_random_batches("portable", 200)
    check_random_survivors("portable", 200)
    test_mirostat_equals_the_oracle("portable", 2)


@pytest.mark.parametrize(
    "mutate",
    [
        break_ties,
        break_exp,
        break_key,
        breaker(elementary, "log", "2.0 * s + 2.0 * s * (square * series)", "2.0 * s"),
        breaker(elementary, "exp", "_EXP_SERIES[1:]", "_EXP_SERIES[7:]"),
        breaker(truncation, "top_n_sigma", "mean * mean", "mean"),
        breaker(truncation, "typical_p", "np.argsort(distances, kind=", "np.argsort(-distances, kind="),
        breaker(truncation, "eta_cutoff", "math.sqrt(wide)", "wide"),
        breaker(truncation, "xtc", "num_top < 2", "num_top < 3"),
        breaker(distribution, "mean_gap", "float(integers.sum())", "WEIGHT_ONE"),
        breaker(temperature, "dynamic_temperature", "max(0.0, ", "max(0.01, "),
        breaker(mirostat, "mirostat_v1", "max(1, math.floor(k))", "max(1, math.ceil(k))"),
        breaker(mirostat, "mirostat_v2", "elementary.exp(-mu", "elementary.exp(mu"),
        breaker(mirostat, "next_mu", "mu - ", "mu + "),
    ],
    ids=lambda mutate: mutate.__name__,
)
def test_equality_catches_a_mutant(monkeypatch: pytest.MonkeyPatch, mutate: Callable[..., None]) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_all()


def test_equality_catches_a_changed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ["top_p" if name == "top_k" else "top_k" if name == "top_p" else name for name in pipeline.WARPERS]
    monkeypatch.setattr(pipeline, "WARPERS", {name: pipeline.WARPERS[name] for name in order})
    with pytest.raises(AssertionError):
        check_random_survivors("portable", 200)
