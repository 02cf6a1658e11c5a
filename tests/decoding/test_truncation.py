"""The truncations against their published definitions, in float64, and against transformers where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.decoding import distribution, temperature, truncation
from pellucid.decoding.distribution import Logits
from tests.support.logits import kept, many_logits, random_logits, softmax
from tests.support.mutants import mutant

Keep = NDArray[np.bool_]


def naive_top_n_sigma(logits: Logits, n: float) -> Keep:
    wide = logits.astype(np.float64)
    return np.asarray(wide >= wide.max() - n * wide[wide > -np.inf].std())


def naive_top_k(logits: Logits, k: int) -> Keep:
    keep = np.zeros(logits.size, dtype=bool)
    keep[sorted(range(logits.size), key=lambda t: (-logits[t], t))[: k or None]] = True
    return keep & (logits > -np.inf)


def first_to_reach(p: NDArray[np.float64], order: list[int], mass: float) -> Keep:
    keep, sum_before = np.zeros(p.size, dtype=bool), 0.0
    for token in order:
        if sum_before >= mass - 1e-12 or p[token] == 0:
            break
        keep[token] = True
        sum_before += p[token]
    return keep


def naive_top_p(logits: Logits, mass: float) -> Keep:
    p = softmax(logits)
    return first_to_reach(p, sorted(range(p.size), key=lambda t: (-p[t], t)), mass)


def naive_min_p(logits: Logits, share: float) -> Keep:
    p = softmax(logits)
    return np.asarray(p >= share * p.max())


def surprises(logits: Logits) -> tuple[NDArray[np.float64], float]:
    """-ln p of each token and its mean, the entropy."""
    wide = logits.astype(np.float64) - float(logits.max())
    surprise = np.log(np.exp(wide).sum()) - wide
    alive = surprise < np.inf
    return surprise, float(np.sum(softmax(logits)[alive] * surprise[alive]))


def naive_typical_p(logits: Logits, mass: float) -> Keep:
    surprise, entropy = surprises(logits)
    distance = np.round(np.abs(surprise - entropy), 9)  # so that equal logits tie
    return first_to_reach(softmax(logits), sorted(range(logits.size), key=lambda t: (distance[t], t)), mass)


def naive_epsilon_cutoff(logits: Logits, epsilon: float) -> Keep:
    p = softmax(logits)
    return np.asarray((p >= epsilon) | (logits == logits.max()))


def naive_eta_cutoff(logits: Logits, epsilon: float) -> Keep:
    return naive_epsilon_cutoff(logits, min(epsilon, np.sqrt(epsilon) * np.exp(-surprises(logits)[1])))


def naive_xtc(logits: Logits, threshold: float) -> Keep:
    p = softmax(logits)
    top = [t for t in sorted(range(p.size), key=lambda t: (-logits[t], t)) if p[t] >= threshold]
    keep = p > (p.max() * 2.0**-41 if len(top) > 1 else 0)  # less has weight 0
    keep[top[:-1]] = False
    return keep


NAIVE: dict[str, Callable[[Logits, Any], Keep]] = {
    "top_n_sigma": naive_top_n_sigma,
    "top_k": naive_top_k,
    "top_p": naive_top_p,
    "min_p": naive_min_p,
    "typical_p": naive_typical_p,
    "epsilon_cutoff": naive_epsilon_cutoff,
    "eta_cutoff": naive_eta_cutoff,
    "xtc": naive_xtc,
}
VALUES: dict[str, tuple[float, ...]] = {
    "top_n_sigma": (0.1, 0.5, 1.0, 1.7, 5.0),
    "top_k": (1, 2, 10, 10_000),
    "top_p": (1e-6, 0.1, 0.5, 0.95),
    "min_p": (1e-6, 0.03, 0.3, 1.0),
    "typical_p": (1e-6, 0.15, 0.5, 0.95),
    "epsilon_cutoff": (1e-6, 0.0003, 0.02, 0.3),
    "eta_cutoff": (1e-6, 0.0006, 0.05, 0.3),
    "xtc": (1e-3, 0.04, 0.1, 0.5),
}
NEUTRAL = {"top_n_sigma": 0, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}


def check(name: str) -> None:
    """What a transform keeps is what its definition keeps, and the probabilities of what is left are softmax's."""
    transform, naive = getattr(truncation, name), NAIVE[name]
    num_dropped = 0
    for row, logits in enumerate(many_logits(7, 300)):
        value = float(np.float32(VALUES[name][row % len(VALUES[name])]))
        logits.flags.writeable = False
        out = transform(logits, int(value) if name == "top_k" else value)
        expected = naive(logits, int(value) if name == "top_k" else value)
        assert kept(out) == [t for t in np.flatnonzero(expected).tolist() if logits[t] > -np.inf], (row, value)
        assert np.array_equal(out[expected], logits[expected])
        assert out.dtype == np.float32
        assert np.max(np.abs(distribution.probabilities(out) - softmax(np.where(expected, logits, -np.inf)))) < 1e-6
        num_dropped += len(kept(logits)) - len(kept(out))
    assert num_dropped > 1000


@pytest.mark.parametrize("name", NAIVE)
def test_equal_to_its_definition(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_value_changes_nothing(name: str) -> None:
    logits = random_logits(3)
    assert getattr(truncation, name)(logits, NEUTRAL[name]) is logits


MUTANTS = {
    "top_n_sigma": ("mean * mean", "mean"),
    "top_k": ("[:k]", "[: k + 1]"),
    "min_p": ("float(np.float32(p)) *", "1.01 * float(np.float32(p)) *"),
    "typical_p": ("- distribution.mean_gap(logits)", "- distribution.entropy(logits)"),
    "epsilon_cutoff": ("float(integers.sum())", "WEIGHT_ONE"),
    "eta_cutoff": ("math.sqrt(wide)", "wide"),
    "xtc": ("[: num_top - 1]", "[:num_top]"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_catches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, name, mutant(getattr(truncation, name), *MUTANTS[name]))
    with pytest.raises((AssertionError, ValueError)):
        check(name)


def test_extreme_logits() -> None:
    logits = np.array([1.0, 3.0e38, -3.0e38, -np.inf, 2.9e38], dtype=np.float32)
    for name in NAIVE:
        out = getattr(truncation, name)(logits, 1 if name == "top_k" else 0.5)
        assert not np.isnan(out).any()
        assert 1 in kept(out)


def test_the_sum_of_weights_0_is_0() -> None:
    """typical-p ranks tokens that no draw chooses before more probable ones; it keeps none of them."""
    logits = np.full(4_000_000, -14.0, dtype=np.float32)
    logits[0], logits[1] = 0.0, -28.6
    assert distribution.mean_gap(logits) > 7.2
    assert kept(truncation.typical_p(logits, 0.99999))[:2] == [0, 2]


def test_xtc_keeps_one_top_choice_and_all_the_others() -> None:
    logits = np.log(np.float32([0.05, 0.3, 0.2, 0.3, 0.15]))
    assert kept(truncation.xtc(logits, 0.25)) == [0, 2, 3, 4]  # of the two that tie, the later one
    assert kept(truncation.xtc(logits, 0.1)) == [0, 4]
    assert truncation.xtc(logits, 0.4) is logits


def test_top_k() -> None:
    logits = random_logits(1)
    assert kept(truncation.top_k(logits, 10)) == sorted(np.argsort(logits)[-10:].tolist())
    assert truncation.top_k(logits, 0) is logits
    assert truncation.top_k(logits, 10**6) is logits


def test_ties_fall_to_the_lowest_id() -> None:
    logits = np.array([0, 1, 1, 2, 1, -0.0], dtype=np.float32)
    assert kept(truncation.top_k(logits, 3)) == [1, 2, 3]
    assert kept(truncation.top_p(np.zeros(10, dtype=np.float32), 0.25)) == [0, 1, 2]
    assert distribution.descending(logits).tolist() == [3, 1, 2, 4, 0, 5]


@pytest.mark.parametrize("p", [1e-20, 0.01, 0.5, 0.9, 0.999999])
def test_top_p_keeps_the_smallest_nucleus(p: float) -> None:
    logits = random_logits(2)
    probabilities = softmax(logits)
    order = np.argsort(-logits, kind="stable")
    size = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
    assert kept(truncation.top_p(logits, p)) == sorted(order[:size].tolist())


@pytest.mark.parametrize("seed", range(20))
def test_the_most_probable_token_survives_everything(seed: int) -> None:
    logits = random_logits(seed, 500)
    out = truncation.min_p(truncation.top_p(truncation.top_k(logits, 1 + seed), 1e-6), 1.0)
    assert kept(out) == [int(np.argmax(logits))]


def test_a_wrong_nucleus_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant that stops before the nucleus reaches p."""
    monkeypatch.setattr(truncation.math, "ceil", lambda x: int(x * 0.98))
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
        (process.TemperatureLogitsWarper(0.7), lambda x: temperature.temperature(x, 0.7)),
        (process.TopKLogitsWarper(1000), lambda x: truncation.top_k(x, 1000)),
        (process.TopPLogitsWarper(0.99), lambda x: truncation.top_p(x, 0.99)),
        (process.MinPLogitsWarper(0.002), lambda x: truncation.min_p(x, 0.002)),
        (process.TypicalLogitsWarper(0.95), lambda x: truncation.typical_p(x, 0.95)),
        (process.EpsilonLogitsWarper(0.002), lambda x: truncation.epsilon_cutoff(x, 0.002)),
        (process.EtaLogitsWarper(0.02), lambda x: truncation.eta_cutoff(x, 0.02)),
    ):
        theirs = their_warper(None, theirs)
        ours = our_transform(ours)
        expected = torch.softmax(theirs.double(), dim=-1)[0].numpy()
        assert kept(ours) == np.flatnonzero(expected > 0).tolist()
        assert np.max(np.abs(distribution.probabilities(ours) - expected)) < 1e-6
