"""The native sampler against the numpy oracle: the same survivors, weights and tokens, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.core.batch import SAMPLING_DTYPE, SampledTokens, SamplingBatch
from pellucid.core.errors import BackendError, InvalidRequestError
from pellucid.decoding import logits_processors, rng, sampler
from pellucid.decoding.logits_processors import Logits
from tests.support.sampling import chi_squared_bound, make_batch, warped

native = pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")

ISAS = [isa for isa in ("avx512", "avx2", "portable") if isa == "portable" or isa in native.peak_isas()]
FIELDS = ("token_ids", "logprobs", "top_ids", "top_logprobs")
VOCAB_SIZES = (1, 2, 15, 16, 17, 255, 256, 257, 1023, 1024, 1025, 5000, 32003)
TEMPERATURES = (1e-45, 1e-30, 0.1, 0.7, 1.0, 1.5, 100.0, 1e30)
TOP_PS = (1.0, 0.999999, 0.95, 0.5, 0.01, 1e-20)
MIN_PS = (0.0, 1e-10, 0.05, 0.5, 1.0)


def native_sample(logits: NDArray[np.float32], batch: SamplingBatch, isa: str | None = None) -> SampledTokens:
    return SampledTokens(*native.sample(logits, batch.rows.view(np.uint8), isa=isa))


def native_survivors(logits: Logits, isa: str, **parameters: Any) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    survivors: tuple[Any, Any] = native.survivors(logits, make_batch(1, **parameters).rows.view(np.uint8), isa=isa)
    return survivors


def test_the_record_is_the_same_in_both_languages() -> None:
    fields = SAMPLING_DTYPE.fields
    assert fields is not None
    assert [(name, str(fields[name][0]), fields[name][1]) for name in SAMPLING_DTYPE.names] == native.SAMPLING_FIELDS


def random_logits(generator: np.random.Generator, vocab_size: int) -> Logits:
    logits = generator.normal(0, generator.choice([0.1, 1.0, 3.0, 10.0]), vocab_size).astype(np.float32)
    kind = generator.integers(6)
    if kind == 1:
        logits = np.round(logits)  # ties
    elif kind == 2:
        logits[generator.random(vocab_size) < 0.5] = -np.inf
        logits[generator.integers(vocab_size)] = 1.0
    elif kind == 3:
        logits[:] = 0.0
    elif kind == 4:
        logits[generator.random(vocab_size) < 5 / vocab_size] += 20.0  # what a language model gives
    elif kind == 5:
        logits *= np.float32(1e36)
    return logits


def random_parameters(generator: np.random.Generator, vocab_size: int) -> dict[str, Any]:
    return {
        "temperature": float(np.float32(generator.choice(TEMPERATURES))),
        "top_k": int(generator.choice([0, 0, 1, 2, 40, 100, 1000, vocab_size, vocab_size + 5])),
        "top_p": float(np.float32(generator.choice(TOP_PS))),
        "min_p": float(np.float32(generator.choice(MIN_PS))),
    }


def check_survivors(isa: str, num_cases: int = 100, **fixed: Any) -> None:
    generator = np.random.default_rng(0)
    for _ in range(num_cases):
        vocab_size = int(generator.choice(VOCAB_SIZES))
        logits = random_logits(generator, vocab_size)
        parameters = random_parameters(generator, vocab_size) | fixed
        expected = warped(logits, **parameters)
        ids, weights = native_survivors(logits, isa, **parameters)
        assert np.array_equal(ids, np.flatnonzero(expected > -np.inf)), (vocab_size, parameters)
        assert np.array_equal(weights, logits_processors.weights(expected)[ids]), (vocab_size, parameters)


@pytest.mark.parametrize("isa", ISAS)
def test_survivors_and_weights_equal_the_oracle(isa: str) -> None:
    check_survivors(isa, 300)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("alone", ["temperature", "top_k", "top_p", "min_p"])
def test_each_transform_equals_the_oracle(isa: str, alone: str) -> None:
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    check_survivors(isa, 60, **{name: value for name, value in neutral.items() if name != alone})


@pytest.mark.parametrize("isa", ISAS)
def test_tokens_and_logprobs_equal_the_oracle(isa: str) -> None:
    generator = np.random.default_rng(1)
    for vocab_size in VOCAB_SIZES:
        num_rows = 24
        logits = np.stack([random_logits(generator, vocab_size) for _ in range(num_rows)])
        rows = [random_parameters(generator, vocab_size) for _ in range(num_rows)]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["temperature"][::6] = [0.0] * len(columns["temperature"][::6])
        batch = make_batch(
            num_rows,
            **columns,
            seed=generator.integers(2**64, size=num_rows, dtype=np.uint64),
            sequence_index=generator.integers(4, size=num_rows),
            position=generator.integers(2**32, size=num_rows),
            num_logprobs=generator.choice([-1, 0, 1, 5, 20], num_rows),
        )
        ours, oracle = native_sample(logits, batch, isa), sampler.sample(logits, batch)
        assert np.array_equal(ours.token_ids, oracle.token_ids)
        assert np.array_equal(ours.top_ids, oracle.top_ids)
        # The one place where the C library's log can differ from Python's: in the last bit of float64.
        np.testing.assert_allclose(ours.logprobs, oracle.logprobs, rtol=2e-7, atol=1e-7)
        np.testing.assert_allclose(ours.top_logprobs, oracle.top_logprobs, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_where_the_sample_of_the_tail_misleads(isa: str, top_p: float) -> None:
    """The tail lies where the native sampler does not look when it guesses, so that its first guess is refuted."""
    logits = np.random.default_rng(7).normal(0, 0.5, 8192).astype(np.float32)
    logits[(np.arange(8192) // 16) % 4 == 0] = -30.0
    logits[3] = 6.0
    expected = warped(logits, temperature=1.0, top_k=0, top_p=top_p, min_p=0.0)
    ids, _ = native_survivors(logits, isa, top_p=top_p)
    assert np.array_equal(ids, np.flatnonzero(expected > -np.inf))


def test_every_instruction_set_gives_the_same_bits() -> None:
    generator = np.random.default_rng(2)
    logits = generator.normal(0, 4, (30, 49152)).astype(np.float32)
    batch = make_batch(30, temperature=0.8, top_p=[0.9, 0.95, 1.0] * 10, min_p=0.001, seed=3, num_logprobs=10)
    first, *others = (native_sample(logits, batch, isa) for isa in ISAS)
    for other in others:
        for name in FIELDS:
            assert np.array_equal(getattr(first, name), getattr(other, name)), name


def test_the_largest_vocabulary_that_models_use() -> None:
    logits = np.random.default_rng(3).normal(0, 4, (6, 262_144)).astype(np.float32)
    batch = make_batch(6, temperature=[0, 1, 1, 1, 1, 1], top_k=[0, 0, 50, 0, 0, 50_000], top_p=[1, 1, 1, 0.9, 1, 0.9])
    assert native_sample(logits, batch).token_ids.tolist() == sampler.sample(logits, batch).token_ids.tolist()


@pytest.mark.parametrize("filters", [{}, {"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.02}])
def test_100_000_draws_follow_the_distribution(filters: dict[str, Any]) -> None:
    num_draws = 100_000
    logits = np.random.default_rng(4).normal(0, 1.5, 50).astype(np.float32)
    batch = make_batch(num_draws, temperature=0.9, seed=11, **filters)
    tokens = native_sample(np.tile(logits, (num_draws, 1)), batch).token_ids
    final = warped(logits, **{"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters)
    expected = logits_processors.probabilities(final) * num_draws
    possible = expected > 0
    counts = np.bincount(tokens, minlength=50)
    assert counts[~possible].sum() == 0
    statistic = np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])
    assert statistic < chi_squared_bound(int(possible.sum()) - 1)


def test_the_distribution_test_catches_a_wrong_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    right = logits_processors.temperature
    monkeypatch.setattr(logits_processors, "temperature", lambda logits, value: right(logits, value * 1.05))
    with pytest.raises(AssertionError):
        test_100_000_draws_follow_the_distribution({})


def test_a_row_depends_on_nothing_but_itself() -> None:
    generator = np.random.default_rng(5)
    logits = generator.normal(0, 2, (64, 3000)).astype(np.float32)
    batch = make_batch(64, temperature=1.0, top_p=0.95, seed=generator.integers(5, size=64), num_logprobs=3)
    whole = native_sample(logits, batch)
    order = generator.permutation(64)
    for part in (order, order[:7], order[:1]):
        again = native_sample(logits[part], SamplingBatch(batch.rows[part]))
        for name in FIELDS:
            assert np.array_equal(getattr(again, name), getattr(whole, name)[part]), name


def test_logits_are_left_unchanged() -> None:
    logits = np.random.default_rng(6).normal(0, 2, (3, 999)).astype(np.float32)
    before = logits.copy()
    logits.flags.writeable = False
    native_sample(logits, make_batch(3, temperature=0.7, top_k=5, num_logprobs=5))
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 300, 999])
def test_logits_that_cannot_be_sampled(isa: str, value: float, position: int) -> None:
    logits = np.zeros((2, 1000), dtype=np.float32)
    logits[1, position] = value
    if value == -np.inf:
        logits[1] = value
    batch = make_batch(2, temperature=[0, 1])
    with pytest.raises(BackendError) as theirs:
        sampler.sample(logits, batch)
    with pytest.raises(BackendError) as ours:
        native_sample(logits, batch, isa)
    assert ours.value.message == theirs.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", np.nan),
        ("temperature", np.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", np.nan),
        ("min_p", 1.1),
        ("num_logprobs", -2),
    ],
)
def test_parameters_out_of_range(name: str, value: Any) -> None:
    logits = np.zeros((2, 4), dtype=np.float32)
    with pytest.raises(InvalidRequestError, match=f"{name} of row 0 is .*; it must be") as error:
        native_sample(logits, make_batch(2, **{name: value}))
    assert error.value.param == name


def test_other_refusals() -> None:
    logits = np.zeros((2, 4), dtype=np.float32)
    with pytest.raises(BackendError, match=r"shape \(2, 4\), but there are 3 rows"):
        native_sample(logits, make_batch(3))
    with pytest.raises(BackendError, match="vocabulary of 0 tokens"):
        native_sample(logits[:, :0], make_batch(2))
    with pytest.raises(ValueError, match=r"no instruction set 'mmx' on this machine; it has .*portable"):
        native_sample(logits, make_batch(2), isa="mmx")
    assert native_sample(logits[:0], make_batch(0)).token_ids.shape == (0,)


def test_more_logprobs_than_tokens() -> None:
    out = native_sample(np.zeros((1, 3), dtype=np.float32), make_batch(1, num_logprobs=2**31 - 1))
    assert out.top_ids.tolist() == [[0, 1, 2]]


def break_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    last_first = lambda logits: np.argsort(logits, kind="stable")[::-1]  # noqa: E731
    monkeypatch.setattr(logits_processors, "descending", last_first)


def break_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = lambda x: np.exp(x.astype(np.float64)).astype(np.float32)  # noqa: E731
    monkeypatch.setattr(logits_processors, "exp", exact)


def break_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "_WEYL", (rng._WEYL[1], rng._WEYL[0]))


@pytest.mark.parametrize("mutate", [break_ties, break_exp, break_key])
def test_equality_catches_a_mutant(monkeypatch: pytest.MonkeyPatch, mutate: Any) -> None:
    mutate(monkeypatch)
    check = test_tokens_and_logprobs_equal_the_oracle if mutate is break_key else check_survivors
    with pytest.raises(AssertionError):
        check("portable")
