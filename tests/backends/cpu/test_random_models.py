"""Shapes that no published model has: random tiny models and random schedules, equal to themselves to the bit and to
the reference within rounding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.core.config import BLOCK_SIZE
from pellucid.quant.formats import BlockFormat
from pellucid.weights.loader import open_model
from tests.support.tiny_models import all_logits, make_batch, num_kv_groups, write_tiny_model

native = pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")

from pellucid.backends.cpu import backend as cpu  # noqa: E402

ISAS: list[str] = native.instruction_sets()


@dataclass(frozen=True)
class Shape:
    architecture: str
    metadata: dict[str, Any]
    vocab_size: int
    tied: bool
    format: BlockFormat
    num_tokens: int

    @property
    def is_float(self) -> bool:
        return self.format == BlockFormat.F32


def random_shape(rng: np.random.Generator, *, quantized: bool) -> Shape:
    architecture = str(rng.choice(["llama", "gemma3"]))
    group = int(rng.choice([1, 2, 3, 5, 7, 9]))
    num_kv_heads = int(rng.choice([1, 2, 3]))
    # Rows of quantized matrices are whole blocks of 32; none of these widths is a whole step of 128 of the quantizer.
    head_dim = int(rng.choice([32, 64, 96, 160] if quantized else [2, 10, 34, 80, 96, 100, 130]))
    hidden_size = int(rng.choice([32, 96, 160, 224] if quantized else [20, 36, 75, 150]))
    intermediate_size = int(rng.choice([32, 96, 160, 288] if quantized else [17, 40, 129]))
    prefix = architecture
    metadata = {
        f"{prefix}.embedding_length": hidden_size,
        f"{prefix}.feed_forward_length": intermediate_size,
        f"{prefix}.block_count": int(rng.choice([1, 2, 7] if architecture == "gemma3" else [1, 2])),
        f"{prefix}.attention.head_count": group * num_kv_heads,
        f"{prefix}.attention.head_count_kv": num_kv_heads,
        f"{prefix}.attention.key_length": head_dim,
        f"{prefix}.attention.value_length": head_dim,
    }
    if architecture == "llama":
        metadata["llama.rope.dimension_count"] = head_dim
    else:
        metadata["gemma3.attention.sliding_window"] = int(rng.choice([1, 5, 64, 65, 100]))
    formats = [BlockFormat.Q4_0, BlockFormat.Q4_1, BlockFormat.Q5_0, BlockFormat.Q5_1, BlockFormat.Q8_0]
    return Shape(
        architecture,
        metadata,
        vocab_size=int(rng.integers(100, 180)),
        tied=bool(rng.random() < 0.5),
        format=formats[rng.integers(len(formats))] if quantized else BlockFormat.F32,
        num_tokens=int(rng.integers(70, 330)),
    )


def write(path: Path, shape: Shape, seed: int, **metadata: Any) -> Path:
    return write_tiny_model(
        path,
        shape.architecture,
        metadata={**shape.metadata, **metadata},
        vocab_size=shape.vocab_size,
        tied=shape.tied,
        seed=seed,
        formats=shape.format,
    )


def load(path: Path, **options: Any) -> cpu.CpuBackend:
    with open_model(path) as file:
        return cpu.CpuBackend(file.spec, file.weights(), **options)


def reference_logits(path: Path, tokens: list[int], first: int = 0) -> np.ndarray:
    with open_model(path) as file:
        return all_logits(ReferenceBackend(file.spec, file.weights(), kv_cache_dtype="f32"), tokens, first=first)


def random_schedule(backend: cpu.CpuBackend, sequences: list[list[int]], rng: np.random.Generator) -> list[np.ndarray]:
    """Logits of every token of every sequence, the sequences run together in steps of random sizes, some of them
    decoding alone, in scattered blocks."""
    widths = [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
    blocks = np.split(rng.permutation(sum(widths)), np.cumsum(widths)[:-1])
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(groups * sum(widths))
    done = [0] * len(sequences)
    logits = [np.empty((len(tokens), backend.spec.vocab_size), np.float32) for tokens in sequences]
    while any(count < len(tokens) for count, tokens in zip(done, sequences, strict=True)):
        limit = int(rng.choice([1, 1, 2, 17, 90, 400]))
        chosen, pieces = [], []
        for index, tokens in enumerate(sequences):
            if done[index] < len(tokens) and rng.random() < 0.7:
                piece = tokens[done[index] : done[index] + int(rng.integers(1, limit + 1))]
                chosen.append((index, len(piece)))
                pieces.append((piece, done[index], blocks[index]))
        if not pieces:
            continue
        rows = backend.forward(make_batch(pieces, groups=groups)).logits
        for index, size in chosen:
            logits[index][done[index] : done[index] + size] = rows[:size]
            rows = rows[size:]
            done[index] += size
    return logits


def test_a_random_schedule_notices_a_shifted_row(tmp_path: Path) -> None:
    """The mutant for the comparisons below: the second sequence's logits are one row late."""
    shape = random_shape(np.random.default_rng(0), quantized=False)
    backend = load(write(tmp_path / "model.gguf", shape, 0))
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    first, second = random_schedule(backend, [tokens, tokens[::-1]], np.random.default_rng(1))
    assert np.array_equal(first, all_logits(backend, tokens))
    assert not np.array_equal(np.roll(second, 1, axis=0), all_logits(backend, tokens[::-1]))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_models_and_schedules(tmp_path: Path, seed: int, quantized: bool) -> None:
    rng = np.random.default_rng([seed, quantized])
    shape = random_shape(rng, quantized=quantized)
    path = write(tmp_path / "model.gguf", shape, seed)
    sequences = [
        [int(token) for token in rng.integers(0, shape.vocab_size, size)]
        for size in [shape.num_tokens, *rng.integers(1, 150, rng.integers(0, 4))]
    ]
    isa = ISAS[seed % len(ISAS)]
    dtype = "f32" if shape.is_float else str(rng.choice(["f32", "bf16", "f16", "q8"]))
    alone = load(path, threads=1, kv_cache_dtype=dtype, isa=isa)
    wanted = [all_logits(alone, tokens) for tokens in sequences]
    if shape.is_float:
        found = reference_logits(path, sequences[0])
        assert np.abs(wanted[0] - found).max() <= 1e-4 * np.abs(found).max(), shape
    for threads in (2, 5):
        found_logits = random_schedule(load(path, threads=threads, kv_cache_dtype=dtype, isa=isa), sequences, rng)
        for found, logits in zip(found_logits, wanted, strict=True):
            assert np.array_equal(found, logits), (threads, shape)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_contexts_of_thousands_of_tokens(tmp_path: Path, architecture: str) -> None:
    """Hundreds of KV parts to a decode step, in steps of more than 512 tokens before it; with a window and without."""
    shape = Shape(
        architecture,
        {
            f"{architecture}.context_length": 8192,
            f"{architecture}.embedding_length": 24,
            f"{architecture}.feed_forward_length": 16,
            f"{architecture}.block_count": 1,
            f"{architecture}.attention.head_count": 3,
            f"{architecture}.attention.head_count_kv": 1,
            f"{architecture}.attention.key_length": 20,
            f"{architecture}.attention.value_length": 20,
            **({"llama.rope.dimension_count": 20} if architecture == "llama" else {}),
            **({"gemma3.attention.sliding_window": 1000} if architecture == "gemma3" else {}),
        },
        vocab_size=100,
        tied=True,
        format=BlockFormat.F32,
        num_tokens=5100,
    )
    path = write(tmp_path / "model.gguf", shape, 1)
    tokens = [int(token) for token in np.random.default_rng(2).integers(0, 100, shape.num_tokens)]
    last = len(tokens) - 3
    wanted = all_logits(load(path, threads=1, kv_cache_dtype="f32"), tokens, 2000, first=last)
    reference = reference_logits(path, tokens, first=last)
    assert np.abs(wanted - reference).max() <= 1e-4 * np.abs(reference).max()
    backend = load(path, threads=2, kv_cache_dtype="f32")
    backend.allocate_kv_cache(num_blocks := -(-len(tokens) // BLOCK_SIZE))
    backend.forward(make_batch([(tokens[:last], 0, range(num_blocks))], []))
    for row in range(3):  # decode steps: attention goes by KV block
        found = backend.forward(make_batch([([tokens[last + row]], last + row, range(num_blocks))])).logits
        assert np.array_equal(found[0], wanted[row]), row
