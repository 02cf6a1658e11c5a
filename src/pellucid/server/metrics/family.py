"""A metric and its values, handed to prometheus-client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from pellucid.server.metrics.histogram import Histogram

Samples: TypeAlias = Mapping[tuple[str, ...], float | Histogram]
"""Values by the values of the labels."""


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
        if self.kind == "histogram":
            return self._histogram(samples)
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in samples.items():
            assert not isinstance(value, Histogram)
            family.add_metric(labels, value)
        return family

    def _histogram(self, samples: Samples) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        for labels, histogram in samples.items():
            assert isinstance(histogram, Histogram)
            bounds = map(floatToGoString, (*histogram.bounds, float("inf")))
            family.add_metric(labels, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum)
        return family
