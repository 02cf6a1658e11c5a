"""Bias and penalties against their definitions, and against transformers where it has them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from pellucid.decoding import penalties
from pellucid.decoding.distribution import Logits
from pellucid.decoding.penalties import TokenIds
from tests.support.logits import many_logits, random_logits
from tests.support.mutants import mutant

NO_TOKENS = np.empty(0, dtype=np.int32)


def random_text(generator: np.random.Generator, vocab_size: int) -> TokenIds:
    """Tokens with repetitions of every length; one or two ids are not in the vocabulary."""
    text: list[int] = []
    for _ in range(generator.integers(1, 12)):
        if text and generator.random() < 0.6:
            begin = int(generator.integers(len(text)))
            text += text[begin : begin + int(generator.integers(1, 9))]
        else:
            text += generator.integers(0, vocab_size + 1, generator.integers(1, 5)).tolist()
    return np.array(text, dtype=np.int32)


def check_repetition_penalty() -> None:
    generator = np.random.default_rng(0)
    for logits in many_logits(0, 100):
        tokens, penalty = random_text(generator, logits.size), float(np.float32(generator.uniform(0.2, 3)))
        out = penalties.repetition_penalty(logits, tokens, penalty)
        for token in range(logits.size):
            z = float(logits[token])
            expected = (z / penalty if z > 0 else z * penalty) if token in tokens else z
            assert out[token] == pytest.approx(expected, rel=1e-6)


def check_frequency_and_presence() -> None:
    generator = np.random.default_rng(1)
    for logits in many_logits(1, 100):
        tokens = random_text(generator, logits.size)
        frequency, presence = (float(np.float32(x)) for x in generator.uniform(-2, 2, 2))
        out = penalties.frequency_and_presence_penalty(logits, tokens, frequency, presence)
        counts = Counter(tokens.tolist())
        for token in range(logits.size):
            expected = float(logits[token]) - counts[token] * frequency - (presence if counts[token] else 0.0)
            assert out[token] == pytest.approx(expected, rel=1e-6, abs=1e-5)


def naive_dry(
    logits: Logits,
    tokens: TokenIds,
    *,
    multiplier: float,
    base: float,
    allowed_length: int,
    last_n: int,
    breakers: TokenIds,
) -> list[float]:
    """Each token's longest repetition, by trying every length at every place."""
    text = tokens.tolist() if last_n < 0 else tokens.tolist()[max(0, tokens.size - last_n) :]
    out = [float(z) for z in logits]
    for token in set(range(logits.size)) - set(breakers.tolist()):
        longest = -1
        for place in range(1, len(text)):
            if text[place] != token:
                continue
            length = 0
            while (
                length < place and text[place - 1 - length] == text[-1 - length] and text[-1 - length] not in breakers
            ):
                length += 1
            longest = max(longest, length)
        if longest >= allowed_length:
            out[token] -= multiplier * base ** (longest - allowed_length)
    return out


def check_dry() -> None:
    generator = np.random.default_rng(2)
    num_changed = 0
    for row in range(300):
        logits = random_logits(row, int(generator.choice([1, 2, 5, 12])))
        if row % 7 == 0:
            logits[0] = -np.inf
        tokens = random_text(generator, logits.size)
        options: dict[str, Any] = {
            "multiplier": float(np.float32(generator.uniform(0.1, 2))),
            "base": float(np.float32(generator.uniform(1, 2.5))),
            "allowed_length": int(generator.integers(1, 5)),
            "last_n": int(generator.choice([-1, 0, 1, 4, 15, 1000])),
            "breakers": generator.integers(0, logits.size, generator.integers(0, 3)).astype(np.int32),
        }
        out = penalties.dry(logits, tokens, **options)
        assert out.tolist() == pytest.approx(naive_dry(logits, tokens, **options), rel=1e-6, abs=1e-5)
        num_changed += not np.array_equal(out, logits)
    assert num_changed > 50


CHECKS = {
    "repetition_penalty": check_repetition_penalty,
    "frequency_and_presence_penalty": check_frequency_and_presence,
    "dry": check_dry,
}


@pytest.mark.parametrize("name", CHECKS)
def test_equal_to_its_definition(name: str) -> None:
    CHECKS[name]()


MUTANTS = [
    ("repetition_penalty", "seen > 0", "seen > 1"),
    ("frequency_and_presence_penalty", "- np.float32(presence)", ""),
    ("dry", "float(longest[t] - allowed_length)", "float(longest[t])"),
    ("dry", "- 1 - int(broken[-1])", "- int(broken[-1])"),
    ("dry", "& ~np.isin(followers, breakers)", ""),
    ("_suffix_matches", "if i < end else 0", "if False else 0; length = max(length, matches[i - begin])"),
]


@pytest.mark.parametrize(("name", "old", "new"), MUTANTS)
def test_the_checks_catch(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, name, mutant(getattr(penalties, name), old, new))
    with pytest.raises((AssertionError, IndexError)):
        CHECKS[name if name in CHECKS else "dry"]()


def test_logit_bias() -> None:
    logits = np.array([1.0, -np.inf, 3.0e38, 0.5, -3e38], dtype=np.float32)
    out = penalties.logit_bias(logits, np.int32([4, 1, 0, 2]), np.float32([-3e38, 5.0, -2.5, 3e38]))
    largest = np.finfo(np.float32).max
    assert out.tolist() == [-1.5, -np.inf, largest, 0.5, -largest]


def test_masked_tokens_stay_masked_and_others_finite() -> None:
    logits = np.array([-np.inf, 3e38, -3e38, 1e-3], dtype=np.float32)
    tokens = np.int32([0, 1, 2, 3] * 4)
    for out in (
        penalties.repetition_penalty(logits, tokens, 1e-30),
        penalties.repetition_penalty(logits, tokens, 3e38),
        penalties.frequency_and_presence_penalty(logits, tokens, 3e38, 3e38),
        penalties.frequency_and_presence_penalty(logits, tokens, -3e38, -3e38),
        penalties.dry(logits, tokens, multiplier=3e38, base=3e38, allowed_length=1, last_n=-1, breakers=NO_TOKENS),
    ):
        assert out[0] == -np.inf
        assert np.isfinite(out[1:]).all()


def test_neutral_values_change_nothing() -> None:
    logits, tokens = random_logits(0), np.int32([1, 1, 1, 1])
    assert penalties.repetition_penalty(logits, tokens, 1.0) is logits
    assert penalties.frequency_and_presence_penalty(logits, tokens, 0.0, 0.0) is logits
    off: dict[str, Any] = {"base": 1.75, "allowed_length": 1, "breakers": NO_TOKENS}
    assert penalties.dry(logits, tokens, multiplier=0.0, last_n=-1, **off) is logits
    assert penalties.dry(logits, tokens, multiplier=1.0, last_n=0, **off) is logits


def test_dry_on_an_example() -> None:
    """After "a b c c b c y a b c", c goes on with "a b c", y with "b c", and b with "c"."""
    a, b, c, y = range(4)
    logits = np.zeros(4, dtype=np.float32)
    options: dict[str, Any] = {"multiplier": 1.0, "base": 2.0, "allowed_length": 1, "last_n": -1}
    text = np.int32([a, b, c, c, b, c, y, a, b, c])
    assert penalties.dry(logits, text, **options, breakers=NO_TOKENS).tolist() == [0, -1, -4, -2]
    assert penalties.dry(logits, text, **options, breakers=np.int32([y])).tolist() == [0, -1, -4, 0]
    assert penalties.dry(logits, text, **options, breakers=np.int32([b])).tolist() == [0, 0, -1, -1]
    assert penalties.dry(logits, text, **options, breakers=np.int32([c])).tolist() == [0, 0, 0, 0]


def test_a_long_text_of_one_token_costs_no_more_than_any() -> None:
    """Each token is compared a bounded number of times: 30,000 squared would take minutes."""
    text = np.zeros(30_000, dtype=np.int32)
    out = penalties.dry(
        np.zeros(2, dtype=np.float32), text, multiplier=1.0, base=1.5, allowed_length=2, last_n=-1, breakers=NO_TOKENS
    )
    assert out.tolist() == [-np.finfo(np.float32).max, 0]


@pytest.mark.parametrize("seed", range(5))
def test_repetition_penalty_equals_transformers(seed: int) -> None:
    torch = pytest.importorskip("torch", reason="an oracle of the `parity` extra")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(seed, 500)
    tokens = np.random.default_rng(seed).integers(0, 500, 300).astype(np.int32)
    theirs = process.RepetitionPenaltyLogitsProcessor(1.3)(
        torch.from_numpy(tokens.astype(np.int64))[None], torch.from_numpy(logits)[None]
    )
    assert np.array_equal(penalties.repetition_penalty(logits, tokens, 1.3), theirs[0].numpy())
