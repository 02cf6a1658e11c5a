from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.server.metrics.histogram import LAG_SECONDS, SECONDS, TOKEN_SECONDS, TOKENS, Histogram

BOUNDS = (0.0, 1.0, 2.5)
NUMBERS = st.one_of(st.sampled_from([*BOUNDS, math.nextafter(1.0, 2), math.nextafter(1.0, 0)]), st.floats(-1, 4))


def by_hand(values: list[float]) -> list[int]:
    """How many values are within each bound and beyond the one before it."""
    edges = [-math.inf, *BOUNDS, math.inf]
    return [sum(low < value <= high for value in values) for low, high in itertools.pairwise(edges)]


@given(st.lists(NUMBERS, max_size=30))
def test_values_are_counted_one_by_one_as_all_at_once(values: list[float]) -> None:
    single, together = Histogram(BOUNDS), Histogram(BOUNDS)
    for value in values:
        single.observe(value)
    together.observe_all(values)
    assert single.counts.tolist() == together.counts.tolist() == by_hand(values)
    assert single.sum == pytest.approx(together.sum) == pytest.approx(math.fsum(values))


@pytest.mark.parametrize("bounds", [LAG_SECONDS, SECONDS, TOKEN_SECONDS, TOKENS])
def test_bounds_rise(bounds: tuple[float, ...]) -> None:
    assert sorted(set(bounds)) == list(bounds)
