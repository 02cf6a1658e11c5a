"""Guidance and DoLa against formulas written out, one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pellucid.core.errors import InvalidRequestError
from pellucid.decoding.contrast import dola, guide, log_softmax, premature_layers
from pellucid.engine.constraints import token_mask
from tests.support.mutants import mutant


def rows(count: int, size: int = 300, seed: int = 0, scale: float = 4.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((count, size))).astype(np.float32)


def logs(logits: np.ndarray) -> list[float]:
    """log softmax, with sums that do not round."""
    values = [float(x) for x in logits]
    log_sum = math.log(math.fsum(math.exp(x - max(values)) for x in values))
    return [x - max(values) - log_sum for x in values]


def divergence(p: list[float], q: list[float]) -> float:
    """Mean of KL(m || p) and KL(m || q)."""
    total = []
    for a, b in zip(p, q, strict=True):
        m = (math.exp(a) + math.exp(b)) / 2
        if m:
            total.append(m * (math.log(m) - a) + m * (math.log(m) - b))
    return math.fsum(total) / 2


def test_log_softmax() -> None:
    for row in [*rows(5), *rows(5, 4000, 1, 12.0), np.full(7, 3e38, np.float32)]:
        assert np.abs(log_softmax(row) - logs(row)).max() <= 1e-6


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.5, 7.0, 100.0])
def test_guidance(scale: float) -> None:
    conditional, unconditional = rows(2)
    expected = [u + scale * (c - u) for c, u in zip(logs(conditional), logs(unconditional), strict=True)]
    found = guide(conditional, unconditional, scale)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max())


def test_guidance_by_one_changes_no_probability() -> None:
    conditional, unconditional = rows(2)
    assert np.abs(log_softmax(guide(conditional, unconditional, 1.0)) - logs(conditional)).max() <= 1e-5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_dola(seed: int, num_layers: int) -> None:
    mature, *premature = rows(1 + num_layers, 120, seed, 2.0)
    last = logs(mature)
    divergences = [divergence(last, logs(row)) for row in premature]
    layer = divergences.index(max(divergences))
    found, chosen = dola(mature, np.stack(premature))
    assert chosen == layer
    expected = [
        a - b if math.exp(a) >= 0.1 * math.exp(max(last)) else -math.inf
        for a, b in zip(last, logs(premature[layer]), strict=True)
    ]
    assert np.array_equal(np.isinf(found), np.isinf(expected))
    kept = np.isfinite(expected)
    assert np.abs(found[kept] - np.array(expected)[kept]).max() <= 2e-6


def test_the_most_probable_token_is_never_masked() -> None:
    mature, premature = rows(2, scale=60.0)
    found, _ = dola(mature, premature[None])
    assert np.flatnonzero(np.isfinite(found)).tolist() == [mature.argmax()]


def test_tokens_that_may_not_come_next_make_no_other_implausible() -> None:
    mature, premature = rows(2, scale=3.0)
    plain, _ = dola(mature, premature[None])
    kept = np.flatnonzero(np.isfinite(plain))
    for ruled_out in (kept[:1], kept, np.argsort(mature)[5:]):
        left = np.setdiff1d(np.arange(300), ruled_out)
        found, _ = dola(mature, premature[None], token_mask(left, 300))
        expected = left[mature[left] >= mature[left].max() + math.log(0.1)]
        assert np.setdiff1d(np.flatnonzero(np.isfinite(found)), ruled_out).tolist() == expected.tolist()
        assert np.array_equal(found[kept], plain[kept])
    found, _ = dola(mature, premature[None], token_mask([], 300))
    assert np.isfinite(found).all()  # nothing may come next, which others refuse


def test_a_layer_like_the_last_is_not_chosen() -> None:
    mature, other = rows(2)
    assert dola(mature, np.stack([mature, other, mature]))[1] == 1
    closest = mutant(dola, "np.argmax([", "np.argmin([")
    assert closest(mature, np.stack([mature, other, mature]))[1] == 0


def test_the_bits_do_not_depend_on_where_a_row_lies() -> None:
    mature, premature = rows(2, 1009)
    wanted = guide(mature, premature, 1.7).tobytes(), dola(mature, premature[None])[0].tobytes()
    memory = np.empty(1009 + 16, np.float32)
    for offset in range(16):
        row = memory[offset : offset + 1009]
        row[:] = mature
        assert (guide(row, premature, 1.7).tobytes(), dola(row, premature[None])[0].tobytes()) == wanted


@pytest.mark.parametrize(
    ("num_layers", "tied", "low", "high"),
    [  # what transformers 4.57 takes
        (1, True, [0], [0]),
        (2, True, [1], [1]),
        (2, False, [0], [1]),
        (4, True, [2], [2]),
        (6, True, [2], [3, 5]),
        (6, False, [0, 2], [3, 5]),
        (18, True, [2, 4, 6, 8], [9, 11, 13, 15, 17]),
        (30, True, [2, 4, 6, 8, 10, 12, 14], list(range(15, 30, 2))),
        (32, False, list(range(0, 16, 2)), list(range(16, 32, 2))),
        (80, False, list(range(0, 20, 2)), list(range(60, 80, 2))),
    ],
)
def test_layers_by_name(num_layers: int, tied: bool, low: list[int], high: list[int]) -> None:
    assert premature_layers("low", num_layers, tied) == low
    assert premature_layers("high", num_layers, tied) == high


def test_layers_by_number() -> None:
    assert premature_layers((0, 3, 5), 6, True) == [0, 3, 5]
    with pytest.raises(InvalidRequestError, match=r"dola_layers has 6, but .* 0 \(the embedding\) to 5") as error:
        premature_layers((0, 6), 6, True)
    assert error.value.param == "dola_layers"
