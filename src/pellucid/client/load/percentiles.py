"""Percentiles."""

from __future__ import annotations

from collections.abc import Sequence


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of `ordered`, sorted and not empty, lie below; between two of them in proportion."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, p50, p90, p99 and count; None where there is no value."""
    ordered = sorted(values)
    if not ordered:
        return {"mean": None, "p50": None, "p90": None, "p99": None, "count": 0}
    return {
        "mean": sum(ordered) / len(ordered),
        **{f"p{round(share * 100)}": percentile(ordered, share) for share in (0.5, 0.9, 0.99)},
        "count": len(ordered),
    }
