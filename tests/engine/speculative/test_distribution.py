"""The distribution of answers, by a chi-squared test over 100,000 draws: it is the model's, whatever is guessed.

The model is a Markov chain, so that after each token the next ones have a distribution that is known. Leviathan et al.,
2023 (arXiv:2211.17192): speculative sampling does not change it.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.core.batch import ForwardBatch, ForwardOutput, SampledTokens, SamplingBatch
from pellucid.core.config import SchedulerConfig, SpeculativeConfig
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.engine.input_builder import InputBuilder
from pellucid.engine.llm_engine import LLMEngine
from pellucid.engine.speculative import speculation
from tests.support.drafters import ScriptedDrafter
from tests.support.fake_backend import FakeBackend
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.mutants import mutant

native: Any = pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")

VOCAB_SIZE = 8
NUM_SEQUENCES = 32
LENGTH = 3200


class MarkovChain(FakeBackend):
    """What comes next depends on the last token alone.

    Attributes:
        probabilities: float64 [VOCAB_SIZE, VOCAB_SIZE], a row for each token before.
    """

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB_SIZE)
        self._rows = (0.9 * np.random.default_rng(3).standard_normal((VOCAB_SIZE, VOCAB_SIZE))).astype(np.float32)
        shares = np.exp(self._rows.astype(np.float64))
        self.probabilities = shares / shares.sum(axis=1, keepdims=True)

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        return ForwardOutput(self._rows[batch.input_ids[batch.logits_rows]])

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> SampledTokens:
        return SampledTokens(*native.sample(logits, sampling.rows.view(np.uint8), None, None, None, None))


class LikelyDrafter(ScriptedDrafter):
    """Guesses the most probable token after the one before it, and any other now and then."""

    def __init__(self, probabilities: NDArray[np.float64]) -> None:
        super().__init__(VOCAB_SIZE)
        self._likeliest = probabilities.argmax(axis=1).tolist()

    def _guess(self, sequence: Sequence, most: int) -> list[int]:
        guess, last = [], sequence.token_ids[-1]
        for _ in range(most):
            last = self._likeliest[last] if self._rng.random() < 0.8 else self._rng.randrange(VOCAB_SIZE)
            guess.append(last)
        return guess


def p_value() -> float:
    """How probable it is that frequencies are as far from the model's as those of answers with guesses, or further."""
    backend = MarkovChain()
    backend.allocate_kv_cache(NUM_SEQUENCES * 52)
    engine = LLMEngine(
        backend,
        FakeTokenizer(),  # type: ignore[arg-type]
        SchedulerConfig(NUM_SEQUENCES, 512),
        num_blocks=NUM_SEQUENCES * 52,
        max_model_len=LENGTH + 2,
        enable_prefix_caching=False,
        speculative=SpeculativeConfig("ngram", 3, adaptive=False),
        drafter=LikelyDrafter(backend.probabilities),
    )
    for number in range(NUM_SEQUENCES):
        engine.add_request(
            str(number),
            [number % VOCAB_SIZE],
            SamplingParams(temperature=1, seed=number, max_tokens=LENGTH, ignore_eos=True, detokenize=False),
        )
    counts = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    while engine.has_unfinished():
        for reply in engine.step().finished:
            chain = np.array(reply.prompt_token_ids + reply.outputs[0].token_ids)
            np.add.at(counts, (chain[:-1], chain[1:]), 1)
    assert counts.sum() == NUM_SEQUENCES * LENGTH > 100_000
    assert engine.metrics().counters.accepted_tokens > 30_000
    expected = counts.sum(axis=1, keepdims=True) * backend.probabilities
    assert expected.min() > 5
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return chi_squared_tail(statistic, VOCAB_SIZE * (VOCAB_SIZE - 1))


def chi_squared_tail(statistic: float, freedom: int) -> float:
    """The probability of so much or more (Wilson & Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    return 1 - NormalDist().cdf(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


def test_the_distribution_is_the_models() -> None:
    assert p_value() > 0.001


def accept_whatever_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(speculation._is_right, "drafts[offset] == token_id and ", "")
    monkeypatch.setattr(speculation, "_is_right", changed)


def one_random_number_for_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutant(InputBuilder.build_sampling, "+= np.array(draft_offsets, np.uint32)", "+= 0")
    monkeypatch.setattr(InputBuilder, "build_sampling", changed)


@pytest.mark.parametrize("mutate", [accept_whatever_is_guessed, one_random_number_for_all_places])
def test_mutants_are_caught(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    assert p_value() < 1e-9
