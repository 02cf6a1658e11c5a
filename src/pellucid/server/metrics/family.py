"""A metric and its values, handed to prometheus-client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeAlias, cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from pellucid.server.metrics.histogram import Histogram

Value: TypeAlias = float | Histogram
Samples: TypeAlias = Value | Mapping[tuple[str, ...], Value]
"""A value, or values by the values of the labels."""

_CLASSES: Mapping[str, Callable[..., Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A metric.

    Attributes:
        name: with its unit; a counter's ends in `_total`.
        kind: as Prometheus has it.
        help: what it is, in a sentence.
        labels: names of its labels.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()

    def expose(self, samples: Samples) -> Metric:
        """The metric with these values, as prometheus-client has it."""
        family = _CLASSES[self.kind](self.name, self.help, labels=self.labels)
        for labels, value in samples.items() if isinstance(samples, Mapping) else [((), samples)]:
            family.add_metric(labels, *(_buckets(value) if isinstance(value, Histogram) else (value,)))
        return cast(Metric, family)


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, int]], float]:
    bounds = map(floatToGoString, (*histogram.bounds, float("inf")))
    return list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum
