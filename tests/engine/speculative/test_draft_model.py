"""A draft model's guesses, held against the same model run over the whole text; and its KV blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence as ListLike
from typing import Any

import numpy as np
import pytest

from pellucid.core.batch import ForwardBatch
from pellucid.core.config import num_blocks_for
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.sequence import Sequence
from pellucid.engine.input_builder import InputBuilder
from pellucid.engine.speculative.draft_model import DraftModelDrafter
from tests.support.fake_backend import VOCAB_SIZE, FakeBackend
from tests.support.mutants import mutant
from tests.support.sequences import make_group, make_sequence

WINDOWS: list[tuple[int | None, ...]] = [(None,), (None, 40)]


class Oracle:
    """What the fake model chooses after a text, computed in one piece."""

    def __init__(self, windows: ListLike[int | None]) -> None:
        self._backend = FakeBackend(windows=windows)

    def __call__(self, sequence: Sequence, text: list[int]) -> int:
        num_tokens, num_groups = len(text), len(self._backend.windows)
        num_blocks = num_blocks_for(num_tokens)
        self._backend.allocate_kv_cache(num_groups * num_blocks)
        batch = ForwardBatch(
            input_ids=np.array(text, np.int32),
            positions=np.arange(num_tokens, dtype=np.int32),
            cu_seqlens=np.array([0, num_tokens], np.int32),
            kv_lens=np.array([num_tokens], np.int32),
            block_tables=np.arange(num_groups * num_blocks, dtype=np.int32).reshape(num_groups, 1, num_blocks),
            logits_rows=np.array([num_tokens - 1], np.int32),
        )
        logits = self._backend.forward(batch).logits
        copy = Sequence(sequence.group, sequence.index, sequence.max_length)
        copy.token_ids = text
        builder = InputBuilder(max_num_seqs=1, max_num_batched_tokens=1, max_model_len=64)
        return int(self._backend.sample(logits, builder.build_sampling([copy])).token_ids[0])


def propose(drafter: DraftModelDrafter, sequences: list[Sequence], max_tokens: list[int]) -> list[list[int]]:
    drafter.prepare(sequences)
    return drafter.propose(sequences, max_tokens)


def check_blocks(drafter: DraftModelDrafter) -> None:
    drafter._cache.check_integrity([shadow.sequence for shadow in drafter._shadows.values()])


def make_drafter(
    windows: ListLike[int | None] = (None,), *, num_blocks: int = 60, max_num_batched_tokens: int = 100, **options: Any
) -> DraftModelDrafter:
    backend = FakeBackend(windows=windows)
    backend.allocate_kv_cache(num_blocks)
    return DraftModelDrafter(
        backend,
        num_blocks=num_blocks,
        max_num_seqs=8,
        max_num_batched_tokens=max_num_batched_tokens,
        **{"max_model_len": 400, **options},
    )


def forked(prompt: ListLike[int], params: SamplingParams, *, seed: int) -> list[Sequence]:
    group = make_group(prompt, params, seed=seed)
    group.is_forked = True
    return group.sequences


def random_sequences(rng: random.Random) -> list[Sequence]:
    begin = [rng.randrange(VOCAB_SIZE) for _ in range(150)]
    params = [
        SamplingParams(temperature=0, max_tokens=300),
        SamplingParams(temperature=0.8, top_k=20, max_tokens=300, n=2),
        SamplingParams(temperature=1.0, repetition_penalty=4.0, presence_penalty=2.0, max_tokens=300),
    ]
    sequences: list[Sequence] = []
    for each in params:
        prompt = begin[: rng.choice([1, 70, 100, 150])] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
        sequences += forked(prompt, each, seed=rng.randrange(2**40))
    return sequences


def follow_random_texts(seed: int, windows: tuple[int | None, ...], **options: Any) -> int:
    """Let texts grow by some of what was guessed of them and by other tokens; the number of guesses, all of which are
    what the model chooses."""
    rng = random.Random(seed)
    oracle = Oracle(windows)
    drafter = make_drafter(windows, **options)
    sequences = random_sequences(rng)
    num_guesses = 0
    for _ in range(25):
        asked = [sequence for sequence in sequences if rng.random() < 0.7]
        limits = [rng.randint(1, 6) for _ in asked]
        guesses = propose(drafter, asked, limits)
        assert len(guesses) == len(asked)
        check_blocks(drafter)
        for sequence, limit, guess in zip(asked, limits, guesses, strict=True):
            assert len(guess) <= limit
            num_guesses += len(guess)
            for place, token_id in enumerate(guess):
                assert token_id == oracle(sequence, sequence.token_ids + guess[:place])
            num_right = rng.randint(0, len(guess))
            sequence.token_ids += guess[:num_right]
            if rng.random() < 0.9:  # and else nothing more than was guessed: what was chosen is not always told
                sequence.token_ids += [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 1, 1, 2, 30]))]
        if rng.random() < 0.1:
            drafter.forget(rng.choice(sequences))
    for sequence in sequences:
        drafter.forget(sequence)
    check_blocks(drafter)
    assert drafter._cache.pool.num_used == 0
    assert not drafter._shadows
    return num_guesses


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("seed", range(3))
def test_guesses_are_what_the_model_chooses(seed: int, windows: tuple[int | None, ...]) -> None:
    assert follow_random_texts(seed, windows) > 50


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize(
    "options",
    [{"num_blocks": 9}, {"max_num_batched_tokens": 17}, {"enable_prefix_caching": False}, {"max_model_len": 120}],
)
def test_they_are_where_room_is_short_too(windows: tuple[int | None, ...], options: dict[str, Any]) -> None:
    assert follow_random_texts(7, windows, **options) > 5


def follow_many_texts() -> None:
    for seed in range(10):
        follow_random_texts(seed, (None,))


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("_follow", "copy.token_ids[num_same] == tokens[num_same]", "True"),
        ("_follow", "self._cache.trim(copy, num_computed)", "copy.num_computed_tokens -= 1"),
        ("_follow", "min(copy.num_buffered_tokens, num_same)", "copy.num_buffered_tokens"),
        ("_guess", "_num_left(copy), guessing)", "0, guessing)"),
        ("_copy_blocks", "self._backend.copy_blocks(np.array(copies, np.int32))", "pass"),
    ],
)
def test_the_check_notices_what_is_kept_wrongly(
    monkeypatch: pytest.MonkeyPatch, method: str, old: str, new: str
) -> None:
    monkeypatch.setattr(DraftModelDrafter, method, mutant(getattr(DraftModelDrafter, method), old, new))
    with pytest.raises((AssertionError, IndexError, ValueError)):
        follow_many_texts()


def forwarded(drafter: DraftModelDrafter) -> list[int]:
    """Notes the tokens of every forward pass from here on."""
    backend: Any = drafter._backend
    forward, sizes = backend.forward, []

    def counted(batch: ForwardBatch) -> Any:
        sizes.append(batch.num_tokens)
        return forward(batch)

    backend.forward = counted
    return sizes


def test_guesses_that_were_right_stay_computed() -> None:
    drafter = make_drafter()
    sequence = make_sequence(range(50))
    guess = propose(drafter, [sequence], [4])[0]
    sizes = forwarded(drafter)
    sequence.token_ids += [*guess[:2], (guess[2] + 1) % VOCAB_SIZE]
    wanted = propose(drafter, [sequence], [3])[0]
    assert sizes == [1, 1, 1]
    assert propose(drafter, [sequence], [3])[0] == wanted
    sequence.token_ids += wanted[:2]
    assert propose(drafter, [sequence], [1])[0] == wanted[2:]


def test_a_long_text_is_computed_in_pieces_behind_what_others_want() -> None:
    drafter = make_drafter(max_num_batched_tokens=60)
    short, long = make_sequence([1, 2, 3]), make_sequence([5] * 150)
    sizes = forwarded(drafter)
    for _ in range(2):
        guesses = propose(drafter, [long, short], [2, 2])
        assert [len(guess) for guess in guesses] == [0, 2]
        short.token_ids.append((guesses[1][0] + 1) % VOCAB_SIZE)
    assert [len(guess) for guess in propose(drafter, [long, short], [2, 2])] == [2, 2]
    assert sizes == [60, 2, 1, 60, 1, 1, 29, 3, 2]


def test_continuations_of_a_prompt_compute_it_once() -> None:
    drafter = make_drafter(max_num_batched_tokens=1000)
    first, second = forked([3] * 200, SamplingParams(n=2, temperature=1.0), seed=1)
    sizes = forwarded(drafter)
    assert [len(guess) for guess in propose(drafter, [first, second], [1, 1])] == [1, 0]
    assert [len(guess) for guess in propose(drafter, [first, second], [1, 1])] == [1, 1]
    assert sum(sizes) < 200 + 64 + 2


def test_texts_that_are_over_wait_for_their_like() -> None:
    """What the cache holds of an ended sequence serves the next one that begins alike."""
    drafter = make_drafter(max_num_batched_tokens=1000)
    first = make_sequence([3] * 200)
    propose(drafter, [first], [1])
    drafter.forget(first)
    sizes = forwarded(drafter)
    propose(drafter, [make_sequence([3] * 200 + [4])], [1])
    assert sum(sizes) <= 9
    propose(drafter, [make_sequence([3] * 200 + [4], salt=b"other")], [1])
    assert sum(sizes) > 200


def test_no_guess_goes_beyond_the_models_context() -> None:
    drafter = make_drafter(max_model_len=20)
    sequence = make_sequence(range(18))
    assert len(propose(drafter, [sequence], [8])[0]) == 2
    sequence.token_ids += [1, 2]
    assert propose(drafter, [sequence], [8]) == [[]]


def test_a_guess_ends_where_the_text_would() -> None:
    drafter = make_drafter()
    wanted = propose(drafter, make_group(range(9), seed=1).sequences, [8])[0]
    assert len(wanted) == 8
    group = make_group(range(9), SamplingParams(max_tokens=100, stop_token_ids=[wanted[2]]), seed=1)
    end = wanted.index(wanted[2]) + 1
    assert propose(drafter, group.sequences, [8]) == [wanted[:end]]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_failure_is_no_guess_and_the_next_one_begins_anew(after: int) -> None:
    backend = FakeBackend()
    backend.allocate_kv_cache(20)
    drafter = DraftModelDrafter(backend, num_blocks=20, max_num_seqs=8, max_num_batched_tokens=100, max_model_len=400)
    sequences = [make_sequence(range(40)), make_sequence(range(20, 50))]
    wanted = propose(make_drafter(), sequences, [3, 3])
    backend.fail_forwards = {after}
    assert propose(drafter, sequences, [3, 3]) == [[], []]
    assert drafter._cache.pool.num_used == 0
    check_blocks(drafter)
    assert propose(drafter, sequences, [3, 3]) == wanted


def test_closing_frees_the_model() -> None:
    drafter = make_drafter()
    propose(drafter, [make_sequence([1, 2])], [2])
    drafter.close()
    assert drafter._backend.closed  # type: ignore[attr-defined]
