"""Bias, penalties, masks and repeated n-grams on a row in place, against the numpy oracle to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pellucid.core.batch import SamplingBatch
from pellucid.decoding import penalties, token_mask
from tests.support.mutants import mutant
from tests.support.random_sampling import (
    check_survivors,
    random_penalties,
    random_row,
    random_text,
)
from tests.support.sampling import make_batch

native = pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")

ISAS = [isa for isa in ("avx512", "avx2", "portable") if isa == "portable" or isa in native.peak_isas()]
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier", "no_repeat_ngram_size")
NEUTRAL = {name: 1 if name == "repetition_penalty" else 0 for name in PENALTIES}


def with_tokens(tokens: Any, breakers: Any = (), **columns: Any) -> SamplingBatch:
    text, ends = np.array(tokens, np.int32), np.array(breakers, np.int32)
    return replace(make_batch(1, **columns), tokens=[text], dry_breakers=[ends])


def check_random_penalties(isa: str, num_cases: int, **fixed: Any) -> None:
    for seed in range(num_cases):
        generator = np.random.default_rng(seed)
        vocab_size = int(generator.choice([1, 2, 17, 40, 1000]))
        tokens = random_text(generator, vocab_size)
        columns = random_penalties(generator) | fixed
        breakers = np.unique(generator.integers(0, vocab_size + 1, generator.integers(4)))
        batch = with_tokens(tokens, breakers, num_prompt_tokens=generator.integers(tokens.size + 2), **columns)
        if generator.random() < 0.3:
            ids = np.unique(generator.integers(-1, vocab_size + 2, 5)).astype(np.int32)
            batch = replace(
                batch, bias=[(ids, generator.choice([-100, -1.5, 2, 100, 3e38], ids.size).astype(np.float32))]
            )
        check_survivors(random_row(generator, vocab_size), batch, isa)


@pytest.mark.parametrize("alone", PENALTIES)
def test_each_alone_equals_the_oracle(alone: str) -> None:
    neutral = dict(NEUTRAL)
    del neutral[alone]
    check_random_penalties("portable", 150, **neutral)


@pytest.mark.parametrize("isa", ISAS)
def test_all_together_equal_the_oracle(isa: str) -> None:
    check_random_penalties(isa, 150)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1000])
def test_masks_equal_the_oracle(isa: str, vocab_size: int) -> None:
    generator = np.random.default_rng(vocab_size)
    words = -(-vocab_size // 32)
    for mask in (
        np.zeros(words, np.uint32),
        np.full(words, 0xFFFFFFFF, np.uint32),
        *generator.integers(0, 2**32, (20, words), dtype=np.uint32),
    ):
        check_survivors(random_row(generator, vocab_size), replace(make_batch(1), masks=[mask]), isa)


def test_dry_of_a_long_text_of_one_token_is_linear() -> None:
    """What is quadratic by the definition: every position matches all before it."""
    tokens = np.full(400_000, 3, np.int32)
    columns = {"dry_multiplier": 0.001, "dry_base": 1.0001, "dry_allowed_length": 2, "dry_penalty_last_n": -1}
    logits = np.zeros(10, np.float32)
    batch = with_tokens(tokens, **columns)
    assert native.survivors(logits[None].copy(), batch.rows.view(np.uint8), batch.tokens)[0].tolist() != [3]
    check_survivors(logits, with_tokens(tokens[:4000], **columns), "portable")


def test_breakers_end_a_repetition() -> None:
    logits = np.zeros(10, np.float32)
    columns = {"dry_multiplier": 1.0, "dry_base": 2.0, "dry_allowed_length": 1, "dry_penalty_last_n": -1}
    for tokens in ([1, 2, 3, 4, 1, 2, 3], [1, 2, 9, 3, 4, 1, 2, 9, 3], [9, 9, 9], [1, 9, 1, 9], [9, 1, 2, 1]):
        for breakers in ([], [9], [2, 9], [4], [3]):
            check_survivors(logits, with_tokens(tokens, breakers, **columns), "portable")


def test_what_overflows_is_held_at_the_largest_float() -> None:
    logits = np.float32([3e38, -3e38, 1, -np.inf])
    ids, values = np.arange(4, dtype=np.int32), np.float32([3e38, -3e38, 3.4e38, 3e38])
    for columns in ({}, {"repetition_penalty": 1e-30}, {"presence_penalty": -3e38}, {"dry_multiplier": 3e38}):
        batch = replace(with_tokens([0, 1, 2, 0, 1], **columns), bias=[(ids, values)])
        check_survivors(logits, batch, "portable")


def check_all() -> None:
    test_what_overflows_is_held_at_the_largest_float()
    check_random_penalties("portable", 200)
    test_breakers_end_a_repetition()
    for vocab_size in (31, 33, 1000):
        test_masks_equal_the_oracle("portable", vocab_size)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the mutant that lets logits overflow
@pytest.mark.parametrize(
    ("module", "name", "old", "new"),
    [
        (penalties, "repetition_penalty", "seen > 0", "seen >= 1"),
        (penalties, "frequency_and_presence_penalty", "- by_count - np.float32(presence)", "- np.float32(presence)"),
        (penalties, "dry", "window.size - 1 - int(broken[-1])", "window.size - int(broken[-1])"),
        (penalties, "dry", "longest >= allowed_length", "longest > allowed_length"),
        (penalties, "_suffix_matches", "if i < end else 0", "if i < end else 1"),
        (penalties, "_replaced", "np.clip(values, -_LARGEST, _LARGEST)", "values"),
        (token_mask, "repeated_ngrams", "size - 1", "size"),
        (token_mask, "apply_mask", 'bitorder="little"', 'bitorder="big"'),
    ],
)
def test_equality_catches_a_mutant(module: Any, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: Callable[..., Any] = mutant(getattr(module, name), old, new)
    monkeypatch.setattr(module, name, changed)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        check_all()
