"""Mirostat against the paper's formulas in float64, and what it is for: a text of the surprise asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pellucid.decoding import distribution, mirostat, rng, sampler
from pellucid.decoding.distribution import Logits
from tests.support.logits import kept, many_logits, random_logits, softmax
from tests.support.mutants import mutant


def naive_k(logits: Logits, mu: float) -> float:
    """Algorithm 1 of the paper, with probabilities."""
    p = np.sort(softmax(logits))[::-1]
    p = p[p > p[0] * 2.0**-41][:100]
    if p.size < 2 or p[0] == p[-1]:
        return math.inf
    t = np.log(np.arange(2, p.size + 1) / np.arange(1, p.size))
    b = np.log(p[:-1] / p[1:])
    s = float((t * b).sum() / (t * t).sum())
    if abs(s - 1) < 1e-12:
        return float(2.0**mu / math.log(logits.size)) ** (1 / s)
    log_k = (math.log((s - 1) / (1 - logits.size ** (1 - s))) + mu * math.log(2)) / s
    return math.inf if log_k > 700 else math.exp(log_k)


def check_v1() -> None:
    num_cut = 0
    for row, logits in enumerate(many_logits(0, 300)):
        k = naive_k(logits, 1.0 + row % 7)
        count = min(logits.size, max(1, math.floor(k))) if k < math.inf else logits.size
        order = sorted(range(logits.size), key=lambda t: (-logits[t], t))[:count]
        expected = sorted(t for t in order if logits[t] > -np.inf)
        assert kept(mirostat.mirostat_v1(logits, 1.0 + row % 7)) == expected
        num_cut += len(expected) < len(kept(logits))
    assert num_cut > 80


def check_v2() -> None:
    num_cut = 0
    for row, logits in enumerate(many_logits(1, 300)):
        mu = -0.7 + row % 9
        p = softmax(logits)
        expected = np.flatnonzero((p >= 2.0**-mu) | (p == p.max())).tolist()
        assert kept(mirostat.mirostat_v2(logits, mu)) == expected
        num_cut += len(expected) < len(kept(logits))
    assert num_cut > 80


def test_version_1_equals_the_paper() -> None:
    check_v1()


def test_version_2_equals_its_definition() -> None:
    check_v2()


@pytest.mark.parametrize(
    ("version", "old", "new"),
    [
        (1, "elementary.LN2) / s)", "elementary.LN2) / a)"),
        (1, "sum_tt += t * t", "sum_tt += t"),
        (2, "float(WEIGHT_ONE)", "math.inf"),
        (2, "elementary.LN2", "1.0"),
    ],
)
def test_the_checks_catch(version: int, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"mirostat_v{version}"
    monkeypatch.setattr(mirostat, name, mutant(getattr(mirostat, name), old, new))
    with pytest.raises((AssertionError, ValueError, ZeroDivisionError)):
        (check_v1, check_v2)[version - 1]()


def test_surprise() -> None:
    for logits in many_logits(2, 50):
        token = int(logits.argmax())
        assert mirostat.surprise(logits, token) == pytest.approx(-np.log2(softmax(logits)[token]), abs=1e-6)


def test_mu_goes_against_the_error() -> None:
    assert mirostat.next_mu(10.0, 7.0, 5.0, 0.5) == 9.0
    assert mirostat.next_mu(10.0, 1.0, 5.0, 0.5) == 12.0
    mu = mirostat.next_mu(1.0, 1.0, 1 / 3, 0.1)
    assert mu == float(np.float32(mu))


@pytest.mark.parametrize("version", [1, 2])
def test_extremes(version: int) -> None:
    cut = getattr(mirostat, f"mirostat_v{version}")
    for logits in (
        np.float32([3e38, -3e38, -np.inf, 3e38]),
        np.float32([5.0]),
        np.zeros(1000, dtype=np.float32),
        -np.log(np.arange(1, 1001, dtype=np.float32)),
        np.float32([0.0, -1e-30, -1e30]),
    ):
        for mu in (-1e6, 0.0, 5.0, 1e6):
            assert int(logits.argmax()) in kept(cut(logits, mu))


@pytest.mark.parametrize("version", [1, 2])
def test_the_surprise_of_many_tokens_is_near_the_target(version: int) -> None:
    cut = getattr(mirostat, f"mirostat_v{version}")
    tau, mu, observed = 3.0, 6.0, []
    for position in range(600):
        logits = random_logits(position, 500, spread=2.0)
        final = cut(logits, mu)
        token = sampler.draw(final, rng.draw_bits(0, 0, position))
        observed.append(mirostat.surprise(final, token))
        mu = mirostat.next_mu(mu, observed[-1], tau, 0.1)
    assert abs(np.mean(observed[100:]) - tau) < 0.1
    untouched = [-np.log2(distribution.probabilities(random_logits(p, 500, spread=2.0))) for p in range(5)]
    assert np.mean(untouched) > tau + 2
