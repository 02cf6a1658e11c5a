"""Random rows of logits and random ways to choose from them, and the native sampler on both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.core.batch import SampledTokens, SamplingBatch
from pellucid.decoding import distribution, pipeline, sampler
from pellucid.decoding.distribution import Logits
from tests.support.sampling import make_batch

VOCAB_SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 5000, 32003)

_VALUES: dict[str, tuple[Any, ...]] = {
    "temperature": (1e-45, 1e-30, 0.1, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.1, 1.2, 1.5, 2.0, 100.0, 1e30),
    "dynatemp_range": (0.1, 0.3, 0.5, 2.0),
    "dynatemp_exponent": (0.0, 0.5, 1.0, 2.0),
    "top_n_sigma": (1e-3, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 1e30),
    "top_k": (1, 2, 3, 5, 10, 20, 40, 100, 200, 1000, 5001),
    "top_p": (0.999999, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.01, 1e-20),
    "min_p": (1e-13, 1e-10, 1e-4, 0.001, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0),
    "typical_p": (0.999999, 0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.2, 1e-10),
    "epsilon_cutoff": (1e-13, 1e-4, 5e-4, 0.001, 0.003, 0.01, 0.3),
    "eta_cutoff": (1e-13, 1e-4, 5e-4, 0.001, 0.003, 0.01, 0.3),
    "xtc_probability": (0.5, 1.0),
    "xtc_threshold": (0.0, 1e-4, 0.01, 0.05, 0.1, 0.2, 0.3, 0.6),
}
_MIROSTAT: dict[str, tuple[Any, ...]] = {
    "mirostat": (1, 2),
    "mirostat_tau": (0.0, 1.0, 5.0),
    "mirostat_eta": (0.1, 1.0),
    "mirostat_mu": (-3.0, 0.0, 0.5, 3.0, 10.0, 2000.0),
}
TRUNCATIONS = ("top_n_sigma", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_PENALTIES: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (0.5, 1.1, 1.3, 99.0, 1e30),
    "presence_penalty": (-2.0, 0.5, 1e30),
    "frequency_penalty": (-2.0, 0.1, 1e30),
    "dry_multiplier": (0.3, 0.8, 1e30),
    "dry_base": (1.0, 1.75, 10.0),
    "dry_allowed_length": (1, 2, 5),
    "dry_penalty_last_n": (-1, 0, 1, 2, 20, 100),
    "no_repeat_ngram_size": (1, 2, 3, 8),
}
_GATES = (("dry_multiplier", "dry_"), ("dynatemp_range", "dynatemp_"), ("xtc_probability", "xtc_"))


def random_row(generator: np.random.Generator, vocab_size: int) -> Logits:
    """Logits of many shapes: flat, peaked, with ties, with masked tokens, a language model's, huge."""
    logits = generator.normal(0, generator.choice([0.1, 1.0, 2.0, 3.0, 10.0]), vocab_size).astype(np.float32)
    kind = generator.integers(10)
    if kind == 1:
        logits = np.round(logits)
    elif kind == 2:
        logits[generator.random(vocab_size) < 0.5] = -np.inf
        logits[generator.integers(vocab_size)] = 1.0
    elif kind == 3:
        logits[:] = 0.0
    elif kind == 4:
        logits[generator.random(vocab_size) < 5 / vocab_size] += 20.0
    elif kind == 5:
        logits *= np.float32(1e36)
    return logits


def random_warping(generator: np.random.Generator) -> dict[str, Any]:
    """Columns for temperature and truncations, each transform there or not."""
    columns = {"temperature": generator.choice(_VALUES["temperature"]), "top_p": 1.0}
    if generator.random() < 0.2:
        return columns | {name: generator.choice(values) for name, values in _MIROSTAT.items()}
    share = generator.choice([0.1, 0.3, 0.3, 0.8])
    for name, values in _VALUES.items():
        gate = next((gate for gate, prefix in _GATES if name.startswith(prefix)), name)
        if gate in columns if gate != name else generator.random() < share:
            columns[name] = generator.choice(values)
    return columns


def random_penalties(generator: np.random.Generator) -> dict[str, Any]:
    """Columns for what looks at tokens, each transform there or not."""
    share = generator.choice([0.2, 0.5])
    columns: dict[str, Any] = {}
    for name, values in _PENALTIES.items():
        if name.startswith("dry_") and name != "dry_multiplier":
            if "dry_multiplier" in columns:
                columns[name] = generator.choice(values)
        elif generator.random() < share:
            columns[name] = generator.choice(values)
    return columns


def random_text(generator: np.random.Generator, vocab_size: int) -> NDArray[np.int32]:
    """Tokens that repeat themselves, some of them outside of the vocabulary."""
    size = int(generator.choice([0, 1, 2, 3, 10, 60, 300]))
    text = generator.integers(0, min(vocab_size, int(generator.choice([2, 5, 1000]))), size)
    if size > 20:
        length = int(generator.integers(1, size // 2))
        text[-length:] = text[:length]
    if size and generator.random() < 0.2:
        text[generator.integers(size)] = generator.choice([-1, vocab_size, 2**31 - 1])
    return text.astype(np.int32)


def random_batch(generator: np.random.Generator, num_rows: int, vocab_size: int, **fixed: Any) -> SamplingBatch:
    """Rows of every kind, alone and together: greedy, warped, penalized, biased, masked, with log-probabilities."""
    batch = make_batch(num_rows)
    tokens: list[Any] = [None] * num_rows
    bias: list[Any] = [None] * num_rows
    masks: list[Any] = [None] * num_rows
    breakers: list[Any] = [None] * num_rows
    for row in range(num_rows):
        columns = random_warping(generator)
        if generator.random() < 0.2:
            columns["temperature"] = 0.0
        if generator.random() < 0.5:
            columns |= random_penalties(generator)
            tokens[row] = random_text(generator, vocab_size)
            columns["num_prompt_tokens"] = generator.integers(0, tokens[row].size + 2)
            if generator.random() < 0.5:
                breakers[row] = np.unique(generator.integers(0, vocab_size + 1, 3)).astype(np.int32)
        if generator.random() < 0.3:
            ids = np.unique(generator.integers(0, vocab_size + 2, 5)).astype(np.int32)
            bias[row] = (ids, generator.choice([-100, -1.5, 2, 100, 3.4e38], ids.size).astype(np.float32))
        if generator.random() < 0.3:
            words = generator.integers(0, 2**32, -(-vocab_size // 32), dtype=np.uint32)
            masks[row] = words if generator.random() < 0.8 else words & np.uint32(generator.integers(2))
        columns |= {
            "seed": generator.integers(2**64, dtype=np.uint64),
            "sequence_index": generator.integers(4),
            "position": generator.integers(2**32),
            "num_logprobs": generator.choice([-1, -1, 0, 1, 5, 20]),
            "processed_logprobs": generator.integers(2),
        }
        for name, value in (columns | fixed).items():
            batch.rows[name][row] = value
    return replace(batch, tokens=tokens, bias=bias, masks=masks, dry_breakers=breakers)


def lists_of(batch: SamplingBatch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in ("tokens", "bias", "masks", "dry_breakers")}


def part_of(batch: SamplingBatch, rows: NDArray[np.intp]) -> SamplingBatch:
    """The rows of those numbers alone."""
    lists = {
        name: None if entries is None else [entries[row] for row in rows] for name, entries in lists_of(batch).items()
    }
    return SamplingBatch(batch.rows[rows], **lists)


def native_sample(
    logits: NDArray[np.float32], batch: SamplingBatch, isa: str | None = None, threads: int = 1
) -> SampledTokens:
    """The native sampler on a copy of `logits`."""
    from pellucid.backends.cpu import _native

    rows = batch.rows.view(np.uint8)
    return SampledTokens(*_native.sample(logits.copy(), rows, **lists_of(batch), isa=isa, threads=threads))


def check_sampled(logits: NDArray[np.float32], batch: SamplingBatch, isa: str, threads: int = 1) -> None:
    """Everything that is said of every row, to the bit."""
    ours, oracle = native_sample(logits, batch, isa, threads), sampler.sample(logits, batch)
    for name in SampledTokens.__slots__:
        left, right = getattr(ours, name), getattr(oracle, name)
        if left is None or right is None:
            assert left is right, name
            continue
        wrong = np.flatnonzero((bits(left) != bits(right)).reshape(len(batch.rows), -1).any(axis=1))
        assert not wrong.size, (name, wrong[0], batch.rows[wrong[0]], left[wrong[0]], right[wrong[0]])


def bits(values: NDArray[Any]) -> NDArray[Any]:
    """Values that are compared to the bit, so that NaN equals NaN."""
    return values.view(np.uint32)


def check_survivors(logits: Logits, batch: SamplingBatch, isa: str) -> None:
    """The distribution that one row is drawn from, to the bit. Temperature is above 0."""
    from pellucid.backends.cpu import _native

    row = pipeline.RowSampling.of(batch, 0)
    constrained = pipeline.constrain(logits, row)
    survivors = _native.survivors(logits[None].copy(), batch.rows.view(np.uint8), **lists_of(batch), isa=isa)
    if constrained.max() == -np.inf:
        assert survivors is None
        return
    expected = pipeline.warp(constrained, row)
    ids, weights = survivors
    assert np.array_equal(ids, np.flatnonzero(expected > -np.inf)), batch.rows
    assert np.array_equal(weights, distribution.weights(expected)[ids]), batch.rows
