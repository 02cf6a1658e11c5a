from __future__ import annotations

import random

import numpy as np
import pytest

from pellucid.client.load.percentiles import distribution, percentile


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_those_of_numpy(count: int) -> None:
    values = sorted(random.Random(count).random() for _ in range(count))
    for share in (0, 0.01, 0.5, 0.9, 0.99, 1):
        assert percentile(values, share) == pytest.approx(np.percentile(values, share * 100))


def test_distribution() -> None:
    assert distribution([3.0, 1.0, 2.0]) == pytest.approx({"mean": 2, "p50": 2, "p90": 2.8, "p99": 2.98, "count": 3})
    assert distribution([]) == {"mean": None, "p50": None, "p90": None, "p99": None, "count": 0}
