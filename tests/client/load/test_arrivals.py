from __future__ import annotations

import itertools
import math
import statistics

import pytest

from pellucid.client.load.arrivals import Concurrency, Rate


def gaps(rate: Rate, seed: int = 0, count: int = 20_000) -> list[float]:
    return list(itertools.islice(rate.gaps(seed), 1, count))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness: float) -> None:
    found = gaps(Rate(50, burstiness))
    assert statistics.mean(found) == pytest.approx(1 / 50, rel=0.05)
    # A gamma distribution of shape b has a standard deviation of 1 / sqrt(b) times its mean: 1 for a Poisson process.
    assert statistics.stdev(found) / statistics.mean(found) == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_the_first_request_comes_at_once_and_all_do_at_an_infinite_rate() -> None:
    assert next(Rate(0.001).gaps(0)) == 0
    assert set(gaps(Rate(math.inf), count=100)) == {0.0}


def test_the_same_seed_gives_the_same_moments() -> None:
    assert gaps(Rate(3), 5) == gaps(Rate(3), 5) != gaps(Rate(3), 6)


def test_in_words_and_in_json() -> None:
    loads = (Concurrency(4), Rate(0.5), Rate(math.inf))
    assert [str(load) for load in loads] == ["4 at once", "0.5 req/s", "all at once"]
    assert Concurrency(4).as_dict() == {"concurrency": 4}
    assert Rate(math.inf, 2.0).as_dict() == {"requests_per_s": "inf", "burstiness": 2.0}
