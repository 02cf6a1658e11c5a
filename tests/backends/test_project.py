"""The head on its own: of the last residual it gives the bits of forward, and the final norm is what the head reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pellucid.backends.base import Backend
from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.core.errors import BackendError
from pellucid.quant.formats import BlockFormat
from pellucid.weights.loader import open_model
from tests.support.captures import residuals
from tests.support.tiny_models import ISAS, ODD, load_native, write_tiny_model

TOKENS = np.random.default_rng(3).integers(0, 128, 70).tolist()


def paths(folder: Path) -> Iterator[Path]:
    for architecture in ("llama", "gemma3"):
        yield write_tiny_model(folder / f"{architecture}.gguf", architecture)
    yield write_tiny_model(folder / "odd.gguf", metadata=ODD, tied=False)
    yield write_tiny_model(folder / "quantized.gguf", formats=BlockFormat.Q8_0)


def backends(path: Path) -> Iterator[Backend]:
    with open_model(path) as file:
        yield ReferenceBackend(file.spec, file.weights(), threads=2)
    for isa in ISAS:
        for threads in (1, 3):
            yield load_native(path, isa=isa, threads=threads)


def hidden_states(backend: Backend, tokens: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every token: the last residual, the same after the final norm, and the logits."""
    last = 2 * len(backend.spec.layers)
    (residual, normalized), logits = residuals(backend, tokens, [last, last + 1])
    return residual, normalized, logits


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(paths(tmp_path_factory.mktemp("models")))


def for_every_backend(models: list[Path], check: Callable[[Backend], None]) -> None:
    for path in models:
        for backend in backends(path):
            check(backend)
            backend.close()


def test_the_last_residual_gives_the_bits_of_forward(models: list[Path]) -> None:
    def check(backend: Backend) -> None:
        for count in (1, len(TOKENS)):
            last, normalized, logits = hidden_states(backend, TOKENS[:count])
            found = backend.project(last)
            assert np.array_equal(found, logits), backend.name
            assert np.array_equal(backend.project(normalized, normalize=False), logits), backend.name
            # Mutants: the norm left out, and another token's state.
            assert not np.array_equal(backend.project(last, normalize=False), logits)
            assert not np.array_equal(backend.project(last + 1), logits)

    for_every_backend(models, check)


def test_a_row_depends_on_that_row_alone(models: list[Path]) -> None:
    rows = np.random.default_rng(5).standard_normal((37, 128)).astype(np.float32)

    def check(backend: Backend) -> None:
        hidden = rows[:, : backend.spec.hidden_size]
        for normalize in (True, False):
            together = backend.project(hidden, normalize=normalize)
            assert together.shape == (37, backend.spec.vocab_size)
            alone = [backend.project(hidden[row : row + 1], normalize=normalize)[0] for row in (0, 17, 36)]
            assert np.array_equal(together[[0, 17, 36]], alone)

    for_every_backend(models, check)


def test_projecting_leaves_the_next_step_as_it_is(models: list[Path]) -> None:
    """It shares buffers with forward, and none of their contents."""

    def check(backend: Backend) -> None:
        before = hidden_states(backend, TOKENS)
        backend.project(np.random.default_rng(6).standard_normal((90, backend.spec.hidden_size)).astype(np.float32))
        for array, expected in zip(hidden_states(backend, TOKENS), before, strict=True):
            assert np.array_equal(array, expected)

    for_every_backend(models, check)


def test_none_is_none(models: list[Path]) -> None:
    def check(backend: Backend) -> None:
        empty = backend.project(np.empty((0, backend.spec.hidden_size), np.float32))
        assert empty.shape == (0, backend.spec.vocab_size)

    for_every_backend(models[:1], check)


def test_what_cannot_be_projected_is_refused(models: list[Path]) -> None:
    def check(backend: Backend) -> None:
        with pytest.raises(BackendError, match="hidden states of shape"):
            backend.project(np.zeros((2, backend.spec.hidden_size + 1), np.float32))
        with pytest.raises(BackendError, match="not finite"):
            backend.project(np.full((2, backend.spec.hidden_size), np.nan, np.float32))
        backend.close()
        with pytest.raises(BackendError, match="closed"):
            backend.project(np.zeros((1, backend.spec.hidden_size), np.float32))

    for_every_backend(models, check)
