"""The order of the transforms: as published, and all of them, each with its own parameters."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.core.batch import SamplingBatch
from pellucid.decoding import penalties, pipeline, rng, sampler, temperature, token_mask, truncation
from pellucid.decoding.distribution import Logits
from tests.support.logits import random_logits
from tests.support.mutants import mutant
from tests.support.sampling import make_batch

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "decoding.md"
VOCAB_SIZE = 60

ALL: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.2,
    "presence_penalty": 0.3,
    "dry_multiplier": 0.8,
    "dry_base": 1.75,
    "dry_allowed_length": 1,
    "dry_penalty_last_n": 30,
    "no_repeat_ngram_size": 3,
    "temperature": 1.5,
    "dynatemp_range": 0.5,
    "dynatemp_exponent": 1.5,
    "top_n_sigma": 4.0,
    "top_k": 30,
    "top_p": 0.99,
    "min_p": 0.001,
    "typical_p": 0.99,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.002,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.15,
    "num_prompt_tokens": 12,
}
STRONG: tuple[dict[str, Any], ...] = (
    {"top_n_sigma": 1.0},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.1},
    {"eta_cutoff": 0.3},
)
"""Each has one truncation that leaves the others little to do."""


def everything(seed: int) -> tuple[Logits, SamplingBatch]:
    """A row and a batch that uses every transform."""
    generator = np.random.default_rng(seed)
    ids = generator.choice(VOCAB_SIZE, 8, replace=False).astype(np.int32)
    batch = replace(
        make_batch(1, seed=seed, position=40, **ALL | STRONG[seed % len(STRONG)]),
        tokens=[generator.integers(0, 6, 40).astype(np.int32)],
        bias=[(ids, generator.normal(0, 3, 8).astype(np.float32))],
        masks=[generator.integers(0, 1 << 32, 2, dtype=np.uint32)],
        dry_breakers=[ids[:2]],
    )
    return random_logits(seed, VOCAB_SIZE, spread=2.0), batch


def one_after_the_other(z: Logits, batch: SamplingBatch, seed: int) -> Logits:
    """The published order, written out."""
    value: Any = ALL | STRONG[seed % len(STRONG)]
    tokens, bias, mask, breakers = (column[0] for column in (batch.tokens, batch.bias, batch.masks, batch.dry_breakers))
    z = penalties.logit_bias(z, *bias)
    z = penalties.repetition_penalty(z, tokens, 1.3)
    z = penalties.frequency_and_presence_penalty(z, tokens[12:], 0.2, 0.3)
    z = penalties.dry(z, tokens, multiplier=0.8, base=1.75, allowed_length=1, last_n=30, breakers=breakers)
    z = token_mask.apply_mask(z, mask)
    z = token_mask.without(z, token_mask.repeated_ngrams(tokens, 3))
    z = temperature.dynamic_temperature(z, 1.5, 0.5, 1.5)
    z = truncation.top_n_sigma(z, value["top_n_sigma"])
    z = truncation.top_k(z, value["top_k"])
    z = truncation.top_p(z, value["top_p"])
    z = truncation.min_p(z, value["min_p"])
    z = truncation.typical_p(z, value["typical_p"])
    z = truncation.epsilon_cutoff(z, value["epsilon_cutoff"])
    z = truncation.eta_cutoff(z, value["eta_cutoff"])
    if rng.uniform(rng.draw_bits(seed, 0, 40, rng.STREAM_XTC)) < 0.5:
        z = truncation.xtc(z, 0.15)
    return z


def check_order() -> None:
    for seed in range(100):
        logits, batch = everything(seed)
        row = pipeline.RowSampling.of(batch, 0)
        final = pipeline.warp(pipeline.constrain(logits, row), row)
        assert np.array_equal(final, one_after_the_other(logits, batch, seed))
        token = sampler.draw(final, rng.draw_bits(seed, 0, 40))
        assert sampler.sample(logits[None], batch).token_ids.tolist() == [token]


def test_the_published_order() -> None:
    check_order()


@pytest.mark.parametrize("swapped", [("repetition_penalty", "frequency_penalty"), ("top_n_sigma", "temperature")])
def test_another_order_is_caught(swapped: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONSTRAINTS", "WARPERS"):
        steps = dict(getattr(pipeline, name))
        if swapped[0] in steps:
            for key, other in (swapped, swapped[::-1]):
                steps[key] = getattr(pipeline, name)[other]
        monkeypatch.setattr(pipeline, name, steps)
    with pytest.raises(AssertionError):
        check_order()


def test_penalties_on_the_prompt_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(pipeline._frequency_and_presence_penalty, 'row["num_prompt_tokens"]', "0")
    monkeypatch.setitem(pipeline.CONSTRAINTS, "frequency_penalty", wrong)
    with pytest.raises(AssertionError):
        check_order()


def test_every_transform_has_a_part_in_it() -> None:
    """Without any one of them, some row comes to another distribution."""
    for steps in (pipeline.CONSTRAINTS, pipeline.WARPERS):
        for name, transform in list(steps.items()):
            try:
                steps[name] = lambda logits, row: logits
                with pytest.raises(AssertionError):
                    check_order()
            finally:
                steps[name] = transform


def test_the_document_has_the_same_order() -> None:
    table = re.findall(r"^\| \d+ \| (.*?) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    documented = [re.findall(r"`(\w+)`", cell)[0] for cell in table]
    code = [*pipeline.CONSTRAINTS, *pipeline.WARPERS, "mirostat"]
    code[code.index("mask")] = "allowed_token_ids"
    elsewhere = ("guidance_scale", "logits_processors", "dynatemp_range", "seed")
    assert [name for name in documented if name not in elsewhere] == code


def test_greedy_takes_the_best_of_what_is_allowed() -> None:
    for seed in range(20):
        logits, batch = everything(seed)
        batch.rows["temperature"] = 0
        allowed = pipeline.constrain(logits, pipeline.RowSampling.of(batch, 0))
        assert sampler.sample(logits[None], batch).token_ids.tolist() == [int(allowed.argmax())]


def test_neutral_values_change_nothing_but_the_maximum() -> None:
    logits = random_logits(0)
    row = pipeline.RowSampling.of(make_batch(1), 0)
    assert pipeline.constrain(logits, row) is logits
    assert np.array_equal(pipeline.warp(logits, row), temperature.temperature(logits, 1.0))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = [everything(seed) for seed in range(10)]
    logits = np.stack([row for row, _ in rows])
    batch = SamplingBatch(
        np.concatenate([batch.rows for _, batch in rows]),
        *([getattr(batch, name)[0] for _, batch in rows] for name in ("tokens", "bias", "masks", "dry_breakers")),
    )
    together = sampler.sample(logits, batch).token_ids.tolist()
    assert together == [sampler.sample(row[None], batch).token_ids[0] for row, batch in rows]
