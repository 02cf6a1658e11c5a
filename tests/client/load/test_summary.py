"""Figures that one can work out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pellucid.client.errors import ApiError, ConnectionLostError
from pellucid.client.load import summary
from pellucid.client.load.generator import LoadResult
from pellucid.client.load.own_cost import OwnCost
from pellucid.client.load.record import ABORTED, RequestRecord
from pellucid.client.load.summary import medians, ratios, summarize
from pellucid.client.openai import Usage
from tests.support.mutants import mutant


def completed(start: float, *events: float, end: float, tokens: int | None = None) -> RequestRecord:
    usage = None if tokens is None else Usage(10, tokens)
    return RequestRecord(start, end, list(events), finish_reason="length", usage=usage)


def failed(start: float, error: Any) -> RequestRecord:
    record = RequestRecord(start, start + 1)
    record.fail(error)
    return record


def result(*records: RequestRecord) -> LoadResult:
    return LoadResult(list(records), OwnCost())


def test_a_request() -> None:
    found = summarize(result(completed(10, 10.5, 10.6, 10.8, 11.0, end=11.25, tokens=4)), 4)
    assert found["ttft_s"]["p50"] == pytest.approx(0.5)
    assert found["itl_s"]["mean"] == pytest.approx(0.5 / 3)
    assert found["itl_s"]["count"] == 3
    assert found["tpot_s"]["p99"] == pytest.approx(0.5 / 3)
    assert found["e2e_s"]["p90"] == pytest.approx(1.25)
    assert found["duration_s"] == pytest.approx(1.25)
    assert found["output_tokens_per_s"] == pytest.approx(4 / 1.25)
    assert found["requests_per_s"] == pytest.approx(1 / 1.25)
    assert (found["prompt_tokens"], found["answers_short_of_max_tokens"]) == (10, 0)
    assert found["finish_reasons"] == {"length": 1}


def test_several_tokens_an_event_are_counted_by_usage() -> None:
    found = summarize(result(completed(0, 1, 2, 3, end=4, tokens=9)), 9)
    assert (found["output_tokens"], found["output_events"]) == (9, 3)
    assert found["itl_s"]["mean"] == pytest.approx(1)  # between events
    assert found["tpot_s"]["mean"] == pytest.approx(2 / 8)  # by tokens


def test_without_usage_events_are_counted_and_it_is_said() -> None:
    found = summarize(result(completed(0, 1, 2, end=4)), 128)
    assert (found["output_tokens"], found["answers_without_usage"], found["answers_short_of_max_tokens"]) == (2, 1, 1)


def test_one_token_has_no_tpot_and_none_no_ttft() -> None:
    found = summarize(result(completed(0, 1, end=2, tokens=1), completed(0, end=2, tokens=0)), 128)
    assert found["ttft_s"]["count"] == 1
    assert found["tpot_s"]["count"] == found["itl_s"]["count"] == 0
    assert found["e2e_s"]["count"] == 2


def test_errors_by_kind_and_aborts_apart() -> None:
    aborted = RequestRecord(0, 5, [1.0, 2.0], outcome=ABORTED)
    records = [
        completed(1, 2, 3, end=4, tokens=2),
        aborted,
        failed(0, ApiError("full", http_status=429, retry_after=1.0)),
        failed(0, ApiError("full still", http_status=429)),
        failed(0, ApiError("broke", http_status=200)),
        failed(0, ConnectionLostError("gone")),
    ]
    found = summarize(result(*records), 2)
    assert found["errors"] == {"429": 2, "error_event": 1, "connection_lost": 1}
    assert found["error_messages"]["429"] == "full"
    assert found["refusals_with_retry_after"] == 1
    assert (found["requests"], found["completed"], found["aborted"], found["failed"]) == (6, 1, 1, 4)
    assert found["ttft_s"]["count"] == 1  # of what was answered to its end
    assert found["output_tokens"] == 4  # of all that came


def test_no_request_at_all() -> None:
    found = summarize(result(), 128, {"ttft": 1.0})
    assert (found["requests"], found["duration_s"], found["output_tokens_per_s"]) == (0, 0, 0)
    assert found["goodput"]["share"] is None


GOOD = completed(0, 0.4, 0.45, 0.5, end=1, tokens=3)
LATE = completed(0, 0.6, 0.65, 0.7, end=1, tokens=3)
HALTING = completed(0, 0.4, 0.42, 0.8, end=1, tokens=3)


def check_goodput() -> None:
    limits = {"ttft": 0.5, "itl": 0.1}
    aborted = RequestRecord(0, 5, [4.0], outcome=ABORTED)
    found = summarize(result(GOOD, LATE, HALTING, aborted, failed(0, ConnectionLostError("x"))), 3, limits)
    assert found["goodput"]["requests"] == 1
    assert found["goodput"]["share"] == pytest.approx(1 / 4)  # of all but those that left by themselves
    assert found["goodput"]["requests_per_s"] == pytest.approx(1 / 5)


def test_goodput_wants_all_limits_kept() -> None:
    check_goodput()


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("_goodput", "sum(all(", "sum(any("),
        ("_keeps", "0.99", "0.0"),
    ],
)
def test_a_goodput_that_asks_for_less_is_caught(
    function: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, function, mutant(getattr(summary, function), old, new))
    with pytest.raises(AssertionError):
        check_goodput()


def test_a_client_that_lags_says_so() -> None:
    late = OwnCost()
    late._lags = [0.001] * 50 + [0.5] * 50
    late.cpu_seconds, late.seconds = 1.0, 4.0
    found = summarize(LoadResult([GOOD], late), 3)["client"]
    assert found == pytest.approx(
        {"loop_lag_p99_s": 0.5, "cpu_share": 0.25, "cpu_per_event_s": 1 / 3, "is_bottleneck": True}
    )
    assert not summarize(result(GOOD), 3)["client"]["is_bottleneck"]


def test_medians_and_ratios() -> None:
    rounds = [summarize(result(completed(0, 1, end=seconds, tokens=12)), 12) for seconds in (2, 4, 3)]
    middle = medians(rounds)
    assert middle["output_tokens_per_s"] == pytest.approx(4)
    assert middle["e2e_s.p99"] == pytest.approx(3)
    assert middle["goodput.share"] is None
    other = {**middle, "output_tokens_per_s": 2.0, "requests_per_s": 0.0}
    found = ratios(middle, other)
    assert found["output_tokens_per_s"] == pytest.approx(2)
    assert found["requests_per_s"] is None
    assert found["goodput.share"] is None
