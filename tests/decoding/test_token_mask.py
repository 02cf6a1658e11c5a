"""Masks of tokens against sets of tokens, and repeated n-grams against their definition and transformers."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid.decoding import token_mask
from tests.support.logits import kept, random_logits
from tests.support.mutants import mutant

VOCAB_SIZES = (1, 31, 32, 33, 64, 1000)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_a_mask_is_a_set(vocab_size: int) -> None:
    generator = np.random.default_rng(vocab_size)
    for logits in (random_logits(0, vocab_size), np.where(generator.random(vocab_size) < 0.5, -np.inf, 1)):
        mask = generator.integers(0, 1 << 32, -(-vocab_size // 32), dtype=np.uint32)
        mask.flags.writeable = False
        allowed = [t for t in range(vocab_size) if int(mask[t // 32]) >> t % 32 & 1]
        out = token_mask.apply_mask(logits.astype(np.float32), mask)
        assert kept(out) == [t for t in allowed if logits[t] > -np.inf]
        assert np.array_equal(out[allowed], logits[allowed].astype(np.float32))


def test_a_mask_may_leave_nothing() -> None:
    assert kept(token_mask.apply_mask(random_logits(0, 40), np.zeros(2, dtype=np.uint32))) == []


def test_without() -> None:
    logits = random_logits(0, 5)
    assert kept(token_mask.without(logits, np.int32([3, 0, 3, 5, -1]))) == [1, 2, 4]
    assert token_mask.without(logits, np.empty(0, dtype=np.int32)) is logits


def naive_repeated_ngrams(tokens: list[int], size: int) -> list[int]:
    """Try every continuation."""
    seen = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
    return [t for t in range(10) if size and tuple([*tokens, t][-size:]) in seen]


def check_repeated_ngrams() -> None:
    generator = np.random.default_rng(0)
    num_banned = 0
    for _ in range(500):
        tokens = generator.integers(0, int(generator.choice([2, 10])), generator.integers(0, 20)).astype(np.int32)
        size = int(generator.integers(0, 6))
        found = token_mask.repeated_ngrams(tokens, size)
        assert found.tolist() == naive_repeated_ngrams(tokens.tolist(), size)
        assert found.dtype == np.int32
        num_banned += found.size
    assert num_banned > 500


def test_repeated_ngrams() -> None:
    check_repeated_ngrams()


def test_a_wrong_ngram_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(token_mask.repeated_ngrams, "windows[:, :-1] == suffix", "windows[:, 1:] == suffix")
    monkeypatch.setattr(token_mask, "repeated_ngrams", wrong)
    with pytest.raises(AssertionError):
        check_repeated_ngrams()


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_transformers(seed: int) -> None:
    torch = pytest.importorskip("torch", reason="an oracle of the `parity` extra")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(seed, 20)
    tokens = np.random.default_rng(seed).integers(0, 20, 50).astype(np.int32)
    for size in (1, 2, 3):
        theirs = process.NoRepeatNGramLogitsProcessor(size)(
            torch.from_numpy(tokens.astype(np.int64))[None], torch.from_numpy(logits)[None]
        )
        assert kept(token_mask.without(logits, token_mask.repeated_ngrams(tokens, size))) == kept(theirs[0].numpy())
