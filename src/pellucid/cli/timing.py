"""The timing line under an answer: how fast it was, and how near to what the machine's memory allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pellucid.estimate.speed import Utilization

if TYPE_CHECKING:
    from pellucid import LLM
    from pellucid.core.metrics import RequestMetrics


@dataclass(frozen=True, slots=True)
class Timing:
    """One request's speed.

    Attributes:
        metrics: where its time went, in seconds.
        bytes_per_token: bytes that decoding one of its tokens read, on average; None where the backend does not say.
        read_bandwidth: bytes a second this machine reads at most, measured just now; None if not measured.
    """

    metrics: RequestMetrics
    bytes_per_token: float | None = None
    read_bandwidth: float | None = None

    @property
    def bandwidth(self) -> Utilization | None:
        """What decoding read in bytes a second, beside the limit; None where one reading gave several tokens."""
        speed = self.metrics.decode_tokens_per_second
        if self.bytes_per_token is None or self.read_bandwidth is None or speed == 0 or self.metrics.draft_tokens:
            return None
        return Utilization(speed * self.bytes_per_token, self.read_bandwidth)

    def line(self) -> str:
        metrics = self.metrics
        cached = f" ({metrics.cached_tokens} cached)" if metrics.cached_tokens else ""
        parts = [
            f"{metrics.prompt_tokens} prompt tokens{cached}",
            f"TTFT {metrics.ttft * 1e3:.0f} ms",
            f"prefill {metrics.prefill_tokens_per_second:.0f} tok/s",
        ]
        if metrics.decode_tokens_per_second:
            parts.append(f"decode {metrics.decode_tokens_per_second:.0f} tok/s ({metrics.output_tokens} tokens)")
        if metrics.draft_tokens:
            parts.append(f"{metrics.accepted_tokens} of {metrics.draft_tokens} guessed tokens right")
        if (bandwidth := self.bandwidth) is not None:
            achieved, limit = f"{bandwidth.achieved / 1e9:.1f} GB/s", f"{bandwidth.limit / 1e9:.1f} GB/s"
            if bandwidth.share is None:
                parts.append(f"{bandwidth}: {achieved} beside a measured limit of {limit}")
            else:
                parts.append(f"{achieved}, {bandwidth} of the {limit} measured")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; seconds, tokens a second, bytes a second."""
        metrics, bandwidth = self.metrics, self.bandwidth
        return {
            "queue_s": metrics.queue,
            "ttft_s": metrics.ttft,
            "prefill_s": metrics.prefill,
            "decode_s": metrics.decode,
            "prompt_tokens": metrics.prompt_tokens,
            "cached_tokens": metrics.cached_tokens,
            "output_tokens": metrics.output_tokens,
            "draft_tokens": metrics.draft_tokens,
            "accepted_tokens": metrics.accepted_tokens,
            "prefill_tokens_per_s": metrics.prefill_tokens_per_second,
            "decode_tokens_per_s": metrics.decode_tokens_per_second,
            "read_bytes_per_s": bandwidth.achieved if bandwidth else None,
            "read_bandwidth_bytes_per_s": self.read_bandwidth,
            "read_bandwidth_share": bandwidth.share if bandwidth else None,
        }


def measure(llm: LLM, metrics: RequestMetrics) -> Timing:
    """Timing of a finished request, with the read bandwidth measured now (about 0.1 s) where the core is native."""
    from pellucid.cli import limits
    from pellucid.cli.model_cost import ModelCost

    cost = ModelCost.of(llm)
    if cost is None or metrics.output_tokens < 2:
        return Timing(metrics)
    bytes_per_token = cost.decode_bytes(metrics.prompt_tokens, metrics.output_tokens)
    return Timing(metrics, bytes_per_token, limits.read_bandwidth(cost.threads, cost.weight_bytes))
