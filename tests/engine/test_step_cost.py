"""What a step of decoding costs beside the model, counted in lines and calls, which a busy machine does not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.sampling_params import SamplingParams
from pellucid.engine.output_processor import OutputProcessor
from pellucid.engine.scheduler import Scheduler
from tests.support.counting import count_steps
from tests.support.engines import make_engine
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.mutants import mutant

LIMIT = 55
"""Most lines and calls a sequence in a step of decoding, where the answer is wanted whole."""

STREAMED_LIMIT = 115
"""The same where each token is reported as it comes."""


class IdleBackend(FakeBackend):
    """Does nothing, so that what is counted is the engine's."""

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        return ForwardOutput(np.zeros((len(batch.logits_rows), VOCAB_SIZE), np.float32))

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        rows = sampling.num_rows
        nothing = np.zeros((rows, 0), np.float32)
        return SampledTokens(np.full(rows, 5, np.int32), np.zeros(rows, np.float32), nothing, nothing)


def cost_per_sequence(*, stream: bool) -> float:
    """Lines and calls that each further sequence adds to a step."""

    def cost(num_seqs: int) -> int:
        engine = make_engine(num_blocks=200, max_num_seqs=64, backend=IdleBackend())
        for number in range(num_seqs):
            engine.add_request(str(number), [1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True), stream=stream)
        step: Any = super(type(engine), engine).step  # without the checks of CheckedEngine
        for _ in range(10):
            step()
        assert len(engine.scheduler.running) == num_seqs
        return count_steps(step)

    return (cost(64) - cost(32)) / 32


def test_a_sequence_costs_little() -> None:
    assert cost_per_sequence(stream=False) <= LIMIT
    assert cost_per_sequence(stream=True) <= STREAMED_LIMIT


def test_mutant_asking_the_cache_in_every_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "schedule", mutant(Scheduler.schedule, "<= sequence.num_writable_tokens", "< 0"))
    assert cost_per_sequence(stream=False) > LIMIT


def test_mutant_text_that_nobody_reads_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    process = mutant(OutputProcessor.process, "elif group.sampling_params.stop:", "else:")
    monkeypatch.setattr(OutputProcessor, "process", process)
    assert cost_per_sequence(stream=False) > LIMIT
