"""Masks of tokens against sets of tokens, and what puts tokens out against transformers where it has it."""

from __future__ import annotations

import numpy as np
import pytest

from pellucid.decoding import token_mask
from pellucid.decoding.penalties import TokenIds
from tests.support.logits import kept, many_logits, random_logits
from tests.support.mutants import mutant

VOCAB_SIZES = (1, 31, 32, 33, 64, 1000)


def allowed(mask: token_mask.TokenMask, vocab_size: int) -> list[int]:
    return [t for t in range(vocab_size) if int(mask[t // 32]) >> t % 32 & 1]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_masks_are_sets(vocab_size: int) -> None:
    generator = np.random.default_rng(vocab_size)
    ids = generator.integers(0, vocab_size, 20).tolist()
    others = sorted(set(range(vocab_size)) - set(ids))
    mask = token_mask.everything(vocab_size)
    assert mask.size == token_mask.mask_size(vocab_size) == -(-vocab_size // 32)
    assert allowed(mask, vocab_size) == list(range(vocab_size))
    token_mask.ban(mask, ids)
    assert allowed(mask, vocab_size) == others
    assert allowed(token_mask.only(vocab_size, ids), vocab_size) == sorted(set(ids))
    logits = random_logits(0, vocab_size)
    out = token_mask.apply_mask(logits, mask)
    assert kept(out) == others
    assert np.array_equal(out[others], logits[others])
    assert kept(token_mask.apply_mask(out, token_mask.only(vocab_size, ids))) == []


def test_a_read_only_mask_and_masked_logits() -> None:
    for logits in many_logits(0, 20):
        mask = token_mask.everything(logits.size)
        token_mask.ban(mask, [0])
        mask.flags.writeable = False
        assert kept(token_mask.apply_mask(logits, mask)) == [t for t in kept(logits) if t != 0]


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


def test_bad_words() -> None:
    words = [[5], [1, 2], [3, 1, 2], [1, 1, 9], [7, 8]]
    assert token_mask.bad_word_ends([], words) == [5]
    assert token_mask.bad_word_ends([1], words) == [5, 2]
    assert token_mask.bad_word_ends([3, 1], words) == [5, 2, 2]
    assert token_mask.bad_word_ends([1, 1], words) == [5, 2, 9]
    assert token_mask.bad_word_ends([1, 7, 8], words) == [5]


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_transformers(seed: int) -> None:
    torch = pytest.importorskip("torch", reason="an oracle of the `parity` extra")
    process = pytest.importorskip("transformers.generation.logits_process")
    generator = np.random.default_rng(seed)
    logits = random_logits(seed, 20)
    tokens: TokenIds = generator.integers(0, 20, 50).astype(np.int32)
    words = [generator.integers(0, 20, 1 + i % 3).tolist() for i in range(30)] + [[*tokens[-2:].tolist(), 3]]

    def survivors(processor: object) -> list[int]:
        out = processor(torch.from_numpy(tokens.astype(np.int64))[None], torch.from_numpy(logits)[None])  # type: ignore[operator]
        return kept(out[0].numpy())

    def without(ids: list[int]) -> list[int]:
        mask = token_mask.everything(20)
        token_mask.ban(mask, ids)
        return kept(token_mask.apply_mask(logits, mask))

    for size in (1, 2, 3):
        ngrams = token_mask.repeated_ngrams(tokens, size).tolist()
        assert without(ngrams) == survivors(process.NoRepeatNGramLogitsProcessor(size))
    assert without(token_mask.bad_word_ends(tokens.tolist(), words)) == survivors(
        process.NoBadWordsLogitsProcessor(words, eos_token_id=-1)
    )
