"""The transforms against their published definitions, in float64, and against transformers where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.decoding import logits_processors as transforms
from pellucid.decoding.logits_processors import Logits


def random_logits(seed: int, vocab_size: int = 1000, spread: float = 3.0) -> Logits:
    return np.random.default_rng(seed).normal(0, spread, vocab_size).astype(np.float32)


def softmax(logits: Logits) -> NDArray[np.float64]:
    e = np.exp(logits.astype(np.float64) - float(logits.max()))
    return e / e.sum()


def kept(logits: Logits) -> list[int]:
    return np.flatnonzero(logits > -np.inf).tolist()


def test_exp_is_within_one_unit_in_the_last_place() -> None:
    x = np.linspace(-87, 0, 200_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.all(np.abs(transforms.exp(x) - exact) <= np.spacing(exact.astype(np.float32)))
    assert transforms.exp(np.float32([0.0]))[0] == 1.0


@pytest.mark.slow
def test_exp_is_monotonic_over_every_float_that_matters() -> None:
    """What lets the native sampler take weights and logits to have the same order."""
    first, last = (int(np.float32(x).view(np.uint32)) for x in (-(2.0**-25), -28.5))
    assert transforms.exp(np.float32([-(2.0**-25)]))[0] == 1.0  # and all that are nearer to 0
    assert np.rint(transforms.exp(np.float32([-28.5]))[0] * transforms.WEIGHT_ONE) == 0.0
    chunk = 1 << 20
    previous = np.float32(1.0)
    for begin in range(first, last + 1, chunk):
        e = transforms.exp(np.arange(begin, min(begin + chunk, last + 1), dtype=np.uint32).view(np.float32))
        assert e[0] <= previous
        assert np.all(e[1:] <= e[:-1])
        previous = e[-1]


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_equal_softmax(seed: int) -> None:
    logits = random_logits(seed, 50_000, spread=(0.1, 1.0, 3.0, 10.0, 50.0)[seed])
    probabilities = transforms.probabilities(logits)
    assert np.max(np.abs(probabilities - softmax(logits))) < 1e-6
    assert abs(probabilities.sum() - 1.0) < 1e-12


def test_weights_fit_the_largest_vocabulary() -> None:
    total = transforms.weights(np.zeros(transforms.MAX_VOCAB_SIZE, dtype=np.float32)).sum()
    assert total == transforms.MAX_VOCAB_SIZE * transforms.WEIGHT_ONE < 2**63


def test_temperature() -> None:
    logits = random_logits(0)
    for value in (0.1, 0.7, 1.0, 1.5):
        scaled = transforms.temperature(logits, value)
        assert np.max(np.abs(softmax(scaled) - softmax((logits / value).astype(np.float32)))) < 1e-6
    assert scaled.dtype == np.float32


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_temperatures(value: float) -> None:
    logits = np.array([1.0, 3.0e38, -3.0e38, -np.inf, 2.9e38], dtype=np.float32)
    scaled = transforms.temperature(logits, value)
    assert not np.isnan(scaled).any()
    assert scaled[1] == 0.0
    assert scaled[3] == -np.inf
    if value < 1:
        assert transforms.probabilities(scaled)[1] == 1.0


def test_top_k() -> None:
    logits = random_logits(1)
    assert kept(transforms.top_k(logits, 10)) == sorted(np.argsort(logits)[-10:].tolist())
    assert transforms.top_k(logits, 0) is logits
    assert transforms.top_k(logits, 10**6) is logits


def test_ties_fall_to_the_lowest_id() -> None:
    logits = np.array([0, 1, 1, 2, 1, -0.0], dtype=np.float32)
    assert kept(transforms.top_k(logits, 3)) == [1, 2, 3]
    assert kept(transforms.top_p(np.zeros(10, dtype=np.float32), 0.25)) == [0, 1, 2]
    assert transforms.descending(logits).tolist() == [3, 1, 2, 4, 0, 5]


@pytest.mark.parametrize("p", [1e-20, 0.01, 0.5, 0.9, 0.999999])
def test_top_p_keeps_the_smallest_nucleus(p: float) -> None:
    logits = random_logits(2)
    probabilities = softmax(logits)
    order = np.argsort(-logits, kind="stable")
    size = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
    assert kept(transforms.top_p(logits, p)) == sorted(order[:size].tolist())


def test_top_p_of_1_keeps_all() -> None:
    logits = random_logits(3)
    assert transforms.top_p(logits, 1.0) is logits


@pytest.mark.parametrize("p", [1e-10, 0.05, 0.5, 1.0])
def test_min_p(p: float) -> None:
    logits = random_logits(4)
    probabilities = softmax(logits)
    assert kept(transforms.min_p(logits, p)) == np.flatnonzero(probabilities >= p * probabilities.max()).tolist()
    assert transforms.min_p(logits, 0.0) is logits


@pytest.mark.parametrize("seed", range(20))
def test_the_most_probable_token_survives_everything(seed: int) -> None:
    logits = random_logits(seed, 500)
    out = transforms.min_p(transforms.top_p(transforms.top_k(logits, 1 + seed), 1e-6), 1.0)
    assert kept(out) == [int(np.argmax(logits))]


def test_inputs_are_left_alone() -> None:
    logits = random_logits(5)
    logits.flags.writeable = False
    for out in (
        transforms.temperature(logits, 0.5),
        transforms.top_k(logits, 5),
        transforms.top_p(logits, 0.5),
        transforms.min_p(logits, 0.5),
    ):
        assert out is not logits
        assert out.dtype == np.float32


def test_a_wrong_nucleus_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that stops before the nucleus reaches p."""
    monkeypatch.setattr(transforms.math, "ceil", lambda x: int(x * 0.98))
    with pytest.raises(AssertionError):
        test_top_p_keeps_the_smallest_nucleus(0.9)


@pytest.mark.parametrize("seed", range(10))
def test_equal_to_transformers(seed: int) -> None:
    torch = pytest.importorskip("torch", reason="an oracle of the `parity` extra")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(seed, 5000)
    theirs = torch.from_numpy(logits)[None]
    ours = logits
    for their_warper, our_transform in (
        (process.TemperatureLogitsWarper(0.7), lambda x: transforms.temperature(x, 0.7)),
        (process.TopKLogitsWarper(200), lambda x: transforms.top_k(x, 200)),
        (process.TopPLogitsWarper(0.9), lambda x: transforms.top_p(x, 0.9)),
        (process.MinPLogitsWarper(0.02), lambda x: transforms.min_p(x, 0.02)),
    ):
        theirs = their_warper(None, theirs)
        ours = our_transform(ours)
        expected = torch.softmax(theirs.double(), dim=-1)[0].numpy()
        assert kept(ours) == np.flatnonzero(expected > 0).tolist()
        assert np.max(np.abs(transforms.probabilities(ours) - expected)) < 1e-6
