from dataclasses import replace

import pytest

from pellucid.cli.timing import Timing
from pellucid.core.metrics import RequestMetrics

METRICS = RequestMetrics(ttft=0.05, prefill=0.04, decode=0.5, prompt_tokens=40, output_tokens=51, decode_tokens=50)


def test_guesses_take_the_place_of_the_bandwidth() -> None:
    """One reading of the weights gave several tokens: how many bytes decoding read a second is not known."""
    timing = Timing(replace(METRICS, draft_tokens=40, accepted_tokens=30), 1e8, 20e9)
    assert timing.bandwidth is None
    assert timing.line().endswith("decode 100 tok/s (51 tokens), 30 of 40 guessed tokens right")


def test_line() -> None:
    assert Timing(METRICS, 1e8, 20e9).line() == (
        "40 prompt tokens, TTFT 50 ms, prefill 1000 tok/s, decode 100 tok/s (51 tokens), "
        "10.0 GB/s, 50% of the 20.0 GB/s measured"
    )


def test_line_without_a_measured_limit() -> None:
    assert Timing(METRICS).line().endswith("decode 100 tok/s (51 tokens)")


def test_line_of_one_token_has_no_decode_speed() -> None:
    line = Timing(RequestMetrics(ttft=0.05, prefill=0.04, prompt_tokens=40, output_tokens=1), 1e8, 20e9).line()
    assert line == "40 prompt tokens, TTFT 50 ms, prefill 1000 tok/s"


def test_cached_tokens_are_said_and_not_counted_as_prefilled() -> None:
    line = Timing(RequestMetrics(ttft=0.01, prefill=0.01, prompt_tokens=40, cached_tokens=30)).line()
    assert line == "40 prompt tokens (30 cached), TTFT 10 ms, prefill 1000 tok/s"


def test_more_than_the_limit_is_a_measurement_error() -> None:
    timing = Timing(METRICS, 1e8, 9e9)
    assert timing.line().endswith("measurement error: 10.0 GB/s beside a measured limit of 9.0 GB/s")
    assert timing.as_dict()["read_bandwidth_share"] is None


def test_dictionary() -> None:
    described = Timing(METRICS, 1e8, 20e9).as_dict()
    assert described["read_bytes_per_s"] == pytest.approx(1e10)
    assert described["read_bandwidth_share"] == pytest.approx(0.5)
    assert described["decode_tokens_per_s"] == pytest.approx(100)
