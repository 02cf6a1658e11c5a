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
class SpeculationVerdict:
    """What came of tokens guessed ahead. Arrays of one entry a draft token, and one more where it says so.

    Draft token i is accepted if it is the token chosen in its place, all before it having been accepted: with
    probability `target_probabilities[i]`, which is min(1, target / draft).

    Attributes:
        position: of the first draft token.
        draft_token_ids: what was guessed.
        draft_probabilities: how probable each was to whoever guessed: 1, since a guess is certain.
        target_probabilities: how probable each was in the distribution that the token in its place was drawn from,
            after every transform; greedy decoding gives 1 to the token it takes and 0 to all others.
        draws: the random number in [0, 1) that chose in each place, and after the last; None with greedy decoding.
        chosen_token_ids: what was chosen in each place, and after the last.
        num_accepted: how many were accepted.
    """

    request_id: str
    index: int
    position: int
    draft_token_ids: list[int]
    draft_probabilities: list[float]
    target_probabilities: list[float]
    draws: list[float] | None
    chosen_token_ids: list[int]
    num_accepted: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step.

    Attributes:
        num_scheduled_tokens: tokens computed, draft tokens included.
        num_sequences: sequences they belong to.
        num_sampled_tokens: tokens chosen that are in an output.
        num_draft_tokens: draft tokens computed.
        num_running, num_waiting: sequences after the step.
        free_blocks, cached_blocks, used_blocks: the KV cache after the step.
        times: where its time went.
    """

    num_scheduled_tokens: int
    num_sequences: int
    num_sampled_tokens: int
    num_draft_tokens: int
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


TraceEvent = RequestAdded | SequencePreempted | SpeculationVerdict | StepDone | RequestFinished


class TraceSink(Protocol):
    """Receives events in order, on the engine's thread; must not raise or wait."""

    def emit(self, event: TraceEvent) -> None: ...
