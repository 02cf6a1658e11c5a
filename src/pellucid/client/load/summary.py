"""What a load came to, in figures. JSON-ready; times in seconds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pellucid.client.load.generator import LoadResult
from pellucid.client.load.percentiles import distribution, percentile
from pellucid.client.load.record import ABORTED, COMPLETED, RequestRecord

LATENCIES = ("ttft", "itl", "tpot", "e2e")
SATURATION_LAG = 0.02
"""A client whose event loop lags by more, in seconds at the 99th percentile, is said to have been the bottleneck."""


def summarize(result: LoadResult, max_tokens: int, goodput: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The figures of one run.

    Latencies are those of the requests that were answered to their end; tokens and rates are of all that came.

    Args:
        max_tokens: as each request asked.
        goodput: for some of LATENCIES, the seconds that a request must keep to.
    """
    records = result.records
    completed = [record for record in records if record.outcome == COMPLETED]
    failed = [record for record in records if record.outcome not in (COMPLETED, ABORTED)]
    # From the first request to the last answer: the ends, when fewer are under way, are part of it.
    seconds = max((r.ended for r in records), default=0.0) - min((r.started for r in records), default=0.0)
    output_tokens = sum(record.output_tokens for record in records)
    events = sum(len(record.event_times) for record in records)
    return {
        "requests": len(records),
        "completed": len(completed),
        "aborted": len(records) - len(completed) - len(failed),
        "failed": len(failed),
        "errors": dict(Counter(record.outcome for record in failed)),
        "error_messages": {record.outcome: record.error for record in reversed(failed)},
        "finish_reasons": dict(Counter(record.finish_reason or "none" for record in completed)),
        "refusals_with_retry_after": sum(record.has_retry_after for record in failed),
        "duration_s": seconds,
        "requests_per_s": _rate(len(completed), seconds),
        "prompt_tokens": sum(record.usage.prompt_tokens for record in records if record.usage),
        "output_tokens": output_tokens,
        "output_tokens_per_s": _rate(output_tokens, seconds),
        "output_events": events,
        "answers_without_usage": sum(record.usage is None for record in completed),
        "answers_short_of_max_tokens": sum(record.output_tokens < max_tokens for record in completed),
        **{f"{name}_s": distribution(_latencies(name, completed)) for name in LATENCIES},
        "goodput": None if goodput is None else _goodput(goodput, completed, len(completed) + len(failed), seconds),
        "client": _own_cost(result, events),
    }


def _latencies(name: str, records: Sequence[RequestRecord]) -> list[float]:
    if name == "itl":
        return [latency for record in records for latency in record.inter_token_latencies]
    values = (getattr(record, name) for record in records)
    return [value for value in values if value is not None]


def _goodput(
    limits: Mapping[str, float], completed: Sequence[RequestRecord], heard: int, seconds: float
) -> dict[str, Any]:
    good = sum(all(_keeps(record, name, limit) for name, limit in limits.items()) for record in completed)
    return {
        "limits_s": dict(limits),
        "requests": good,
        "share": good / heard if heard else None,
        "requests_per_s": _rate(good, seconds),
    }


def _keeps(record: RequestRecord, name: str, limit: float) -> bool:
    """Whether a request kept to a limit: with its inter-token latencies at their 99th percentile."""
    values = _latencies(name, [record])
    return not values or percentile(sorted(values), 0.99) <= limit


def _own_cost(result: LoadResult, events: int) -> dict[str, Any]:
    cost = result.own_cost
    return {
        "loop_lag_p99_s": cost.lag_p99,
        "cpu_share": cost.cpu_seconds / cost.seconds if cost.seconds else 0.0,
        "cpu_per_event_s": cost.cpu_seconds / events if events else None,
        "is_bottleneck": cost.lag_p99 > SATURATION_LAG,
    }


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


COMPARED = (
    ("output_tokens_per_s",),
    ("requests_per_s",),
    *((f"{name}_s", part) for name in LATENCIES for part in ("mean", "p50", "p90", "p99")),
    ("goodput", "share"),
    ("goodput", "requests_per_s"),
)
"""Where the figures are that are compared."""


def medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The median over the rounds of each figure that is compared, by its path; None where none was measured."""
    found: dict[str, float | None] = {}
    for path in COMPARED:
        values = [value for summary in rounds if (value := _at(summary, path)) is not None]
        found[".".join(path)] = statistics.median(values) if values else None
    return found


def ratios(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> dict[str, float | None]:
    """Each of our medians over theirs; None where there is none to divide by."""
    return {
        name: value / other if value is not None and (other := theirs[name]) else None for name, value in ours.items()
    }


def _at(summary: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = summary
    for name in path:
        value = None if value is None else value[name]
    return value if value is None else float(value)
