"""A model that guesses with some of its own layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pellucid.core.batch import ForwardBatch
from pellucid.core.errors import InvalidRequestError
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.engine.input_builder import InputBuilder
from pellucid.engine.speculative.layer_skip import LayerSkipDrafter, default_layers
from pellucid.kvcache.cache_manager import CacheManager
from tests.support.fake_backend import FakeBackend
from tests.support.sequences import make_group, make_sequence

WINDOWS = (None, 100, 70, 1)


class Computed:
    """Sequences of which all but the last token is computed, with the block for that."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.backend = FakeBackend(windows=WINDOWS)
        self.backend.allocate_kv_cache(80)
        self.cache = CacheManager(80, windows=self.backend.windows)
        self.builder = InputBuilder(max_num_seqs=8, max_num_batched_tokens=1000, max_model_len=400, num_groups=4)
        self.sequences = sequences
        for sequence in sequences:
            sequence.num_scheduled_tokens = sequence.num_tokens - 1
            self.compute(sequence)

    def compute(self, sequence: Sequence) -> np.ndarray:
        """Compute what is scheduled of `sequence`, and allot its next token."""
        assert self.cache.allocate(sequence, sequence.num_scheduled_tokens)
        logits = self.backend.forward(self.builder.build([sequence], [])).logits
        sequence.num_computed_tokens += sequence.num_scheduled_tokens
        sequence.num_scheduled_tokens = 1
        assert self.cache.allocate(sequence, 1)
        return logits


def drafter_of(backend: FakeBackend, layers: list[int] | None = None) -> LayerSkipDrafter:
    return LayerSkipDrafter(backend, layers, max_num_seqs=8, max_model_len=400)


@pytest.mark.parametrize(
    ("num_layers", "skipped"),
    [
        (1, []),
        (2, [0]),
        (3, [1]),
        (4, [1]),
        (5, [2]),
        (6, [2, 3]),
        (18, [7, 8, 9, 10]),
        (30, list(range(11, 19))),
    ],
)
def test_the_middle_quarter_is_left_out(num_layers: int, skipped: list[int]) -> None:
    assert default_layers(num_layers) == [layer for layer in range(num_layers) if layer not in skipped]


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="layers has 4, but this model has layers 0 to 3") as info:
        drafter_of(FakeBackend(windows=WINDOWS), [0, 4])
    assert info.value.param == "layers"


def test_guesses_end_with_the_block_and_leave_the_sequence_as_it_is() -> None:
    sequences = [make_sequence([7] * length) for length in (3, 61, 64, 65, 128)]
    computed = Computed(sequences)
    before = [(list(s.token_ids), s.num_computed_tokens, s.num_scheduled_tokens, s.table_stamp) for s in sequences]
    free = computed.cache.pool.num_free
    guesses = drafter_of(computed.backend).propose(sequences, [6, 6, 6, 6, 6])
    assert [len(guess) for guess in guesses] == [6, 4, 1, 6, 1]
    after = [(s.token_ids, s.num_computed_tokens, s.num_scheduled_tokens, s.table_stamp) for s in sequences]
    assert after == before
    assert computed.cache.pool.num_free == free
    computed.cache.check_integrity(sequences)
    guesses = drafter_of(computed.backend).propose(sequences, [1, 2, 3, 4, 5])
    assert [len(guess) for guess in guesses] == [1, 2, 1, 4, 1]


def test_all_sequences_share_the_passes_and_only_some_layers_run() -> None:
    sequences = [make_sequence([number] * 20) for number in range(4)]
    computed = Computed(sequences)
    batches: list[tuple[int, list[int]]] = []
    forward = computed.backend.forward

    def noted(batch: ForwardBatch) -> Any:
        assert batch.layers is not None
        batches.append((batch.num_tokens, batch.layers.tolist()))
        return forward(batch)

    computed.backend.forward = noted  # type: ignore[method-assign]
    together = drafter_of(computed.backend, [0, 3]).propose(sequences, [4, 2, 4, 1])
    assert batches == [(4, [0, 3]), (3, [0, 3]), (2, [0, 3]), (2, [0, 3])]
    alone = [
        drafter_of(computed.backend, [0, 3]).propose([sequence], [limit])[0]
        for sequence, limit in zip(sequences, [4, 2, 4, 1], strict=True)
    ]
    assert alone == together
    assert drafter_of(computed.backend, [0, 1]).propose(sequences, [4, 2, 4, 1]) != together


def test_a_guess_is_drawn_as_its_token_will_be() -> None:
    """By the parameters of the request and the number of the place: of the same logits the same token."""

    def guess(params: SamplingParams, seed: int, salt: int = 0) -> list[int]:
        group = make_group([1, 2, 3, 4 + salt], params, seed=seed)
        computed = Computed(group.sequences)
        return drafter_of(computed.backend).propose(group.sequences, [8])[0]

    hot = SamplingParams(temperature=3.0, max_tokens=50)
    assert guess(hot, 1) == guess(hot, 1)
    assert guess(hot, 1) != guess(hot, 2)
    assert guess(hot, 1) != guess(SamplingParams(temperature=0, max_tokens=50), 1)
    wanted = guess(SamplingParams(temperature=0, max_tokens=50), 1)
    barred = SamplingParams(temperature=0, max_tokens=50, logit_bias={wanted[0]: -100.0})
    assert wanted[0] not in guess(barred, 1)[:1]
    ended = SamplingParams(temperature=0, max_tokens=50, stop_token_ids=[wanted[3]])
    assert guess(ended, 1) == wanted[: wanted.index(wanted[3]) + 1]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_pass_that_fails_is_no_guess(number: int) -> None:
    sequences = [make_sequence([7] * 20), make_sequence([8] * 30)]
    computed = Computed(sequences)
    drafter = drafter_of(computed.backend)
    wanted = drafter.propose(sequences, [3, 3])
    computed.backend.fail_forwards = {computed.backend.num_forwards + number}
    assert drafter.propose(sequences, [3, 3]) == [[], []]
    assert drafter.propose(sequences, [3, 3]) == wanted


def test_a_guess_ends_where_no_token_is_allowed() -> None:
    """Every token once: of 61, 58 are there."""
    params = SamplingParams(temperature=0, max_tokens=50, no_repeat_ngram_size=1)
    sequences = make_group(range(58), params).sequences
    guess = drafter_of(Computed(sequences).backend).propose(sequences, [6])[0]
    assert sorted(guess) == [58, 59, 60]
