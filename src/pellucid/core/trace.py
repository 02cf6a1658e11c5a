"""What the engine tells whoever watches. Off costs one check a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pellucid.core.metrics import RequestMetrics, StepTimes
from pellucid.core.outputs import FinishReason


@dataclass(frozen=True, slots=True)
class RequestAdded:
    """A request entered the waiting queue."""

    request_id: str
    num_prompt_tokens: int
    time: float


@dataclass(frozen=True, slots=True)
class SequencePreempted:
    """A sequence gave its blocks back and waits again."""

    request_id: str
    index: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step.

    Attributes:
        num_scheduled_tokens: tokens computed.
        num_sequences: sequences they belong to.
        num_sampled_tokens: tokens chosen.
        num_running, num_waiting: sequences after the step.
        free_blocks, cached_blocks, used_blocks: the KV cache after the step.
        times: where its time went.
    """

    num_scheduled_tokens: int
    num_sequences: int
    num_sampled_tokens: int
    num_running: int
    num_waiting: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    times: StepTimes


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """A request had its terminal reply."""

    request_id: str
    finish_reasons: tuple[FinishReason, ...]
    metrics: RequestMetrics


TraceEvent = RequestAdded | SequencePreempted | StepDone | RequestFinished


class TraceSink(Protocol):
    """Receives events in order, on the engine's thread; must not raise or wait."""

    def emit(self, event: TraceEvent) -> None: ...
