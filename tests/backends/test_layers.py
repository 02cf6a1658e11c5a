"""Batches that leave out layers: what they compute, and that what they leave behind is never read as the model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.backends.base import Backend
from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.core.capture import StepCapture
from pellucid.core.errors import BackendError
from pellucid.models.spec import ModelSpec
from pellucid.quant.formats import BlockFormat
from pellucid.weights.loader import open_model
from pellucid.weights.tensor import WeightTensor
from tests.support.tiny_models import HEADS_OF_32, all_logits, group_blocks, make_batch, num_kv_groups, write_tiny_model

TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, 128, 140)]
PROMPT = 115
NUM_LAYERS = 7
CHOICES = [[0], [6], [0, 6], [0, 2, 4, 6], [1, 2, 5], list(range(NUM_LAYERS))]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    metadata = {**HEADS_OF_32[request.param], f"{request.param}.block_count": NUM_LAYERS}
    return write_tiny_model(path, request.param, metadata=metadata, formats=BlockFormat.Q8_0)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def kind(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        return ReferenceBackend
    pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")
    from pellucid.backends.cpu.backend import CpuBackend

    return CpuBackend


def only(
    spec: ModelSpec, weights: Iterator[tuple[str, WeightTensor]], layers: list[int]
) -> tuple[ModelSpec, Iterator[tuple[str, WeightTensor]]]:
    """The model that has no more than these layers."""

    def renamed() -> Iterator[tuple[str, WeightTensor]]:
        for name, tensor in weights:
            parts = name.split(".")
            if parts[0] == "layers":
                if int(parts[1]) not in layers:
                    continue
                parts[1] = str(layers.index(int(parts[1])))
            yield ".".join(parts), tensor

    return replace(spec, layers=tuple(spec.layers[layer] for layer in layers)), renamed()


def load(path: Path, kind: Any, layers: list[int] | None = None, **options: Any) -> Backend:
    with open_model(path) as file:
        model = (file.spec, file.weights()) if layers is None else only(file.spec, file.weights(), layers)
        backend: Backend = kind(*model, **options)
        return backend


class Skipping:
    """A backend that runs `layers` of its model whatever it is asked for."""

    def __init__(self, backend: Backend, layers: list[int]) -> None:
        self.spec = backend.spec
        self.allocate_kv_cache = backend.allocate_kv_cache
        self._backend = backend
        self._layers = np.array(layers, np.int32)

    def forward(self, batch: Any) -> Any:
        return self._backend.forward(replace(batch, layers=self._layers))


@pytest.mark.parametrize("layers", CHOICES)
def test_what_is_left_is_the_model_without_the_others(path: Path, kind: Any, layers: list[int]) -> None:
    without = load(path, kind, layers, threads=2)
    skipping: Any = Skipping(load(path, kind, threads=2), layers)
    for chunk in (1, 40, None):
        assert np.array_equal(all_logits(skipping, TOKENS[:70], chunk), all_logits(without, TOKENS[:70]))
    other: Any = Skipping(load(path, kind), [*layers[:-1], layers[-1] - 1] if layers != [0] else [1])
    if layers[-1] - 1 not in layers:
        assert not np.array_equal(all_logits(other, TOKENS[:70]), all_logits(without, TOKENS[:70]))


@pytest.mark.parametrize(("kv_cache_dtype", "num_drafts"), [("f32", 1), ("f16", 6), ("q8", 6)])
@pytest.mark.parametrize("layers", [[0, 2, 4, 6], [3], [0, 1, 2, 3, 4, 5]])
def test_passes_that_leave_out_layers_do_not_show(
    path: Path, kind: Any, layers: list[int], num_drafts: int, kv_cache_dtype: str
) -> None:
    """Drafts are computed one by one after a prompt, in blocks full of NaN and over the edge of one; then other tokens
    are, by all layers, at once and one by one."""
    backend = load(path, kind, kv_cache_dtype=kv_cache_dtype)
    groups = num_kv_groups(backend)
    wanted = all_logits(backend, TOKENS)[PROMPT:]
    backend.allocate_kv_cache(3 * groups)
    every = np.arange(3 * groups, dtype=np.int32)
    backend.write_blocks(every, np.full((3 * groups, backend.kv_bytes_per_block()), 0xFF, np.uint8))
    backend.forward(make_batch([(TOKENS[:PROMPT], 0, [0, 1, 2])], [], groups=groups))

    def draft(begin: int) -> None:
        for position in range(begin, min(begin + num_drafts, len(TOKENS))):
            token = [(TOKENS[position] + 1) % 128]
            backend.forward(make_batch([(token, position, [0, 1, 2])], groups=groups, layers=layers))

    for chunk in (1 + num_drafts, 1):
        for begin in range(PROMPT, len(TOKENS), chunk):
            draft(begin)
            batch = make_batch([(TOKENS[begin : begin + chunk], begin, [0, 1, 2])], groups=groups)
            assert np.array_equal(backend.forward(batch).logits, wanted[begin - PROMPT : begin - PROMPT + chunk])
    # The mutant: the pass that counts leaves out a layer, and what the draft wrote there stays.
    draft(PROMPT)
    kept = [layer for layer in range(NUM_LAYERS) if layer != layers[0]]
    backend.forward(make_batch([(TOKENS[PROMPT : PROMPT + 1], PROMPT, [0, 1, 2])], groups=groups, layers=kept))
    batch = make_batch([(TOKENS[PROMPT + 1 : PROMPT + 2], PROMPT + 1, [0, 1, 2])], groups=groups)
    assert not np.array_equal(backend.forward(batch).logits, wanted[1:2])


def test_layers_that_are_left_out_keep_their_keys_and_values(path: Path, kind: Any) -> None:
    backend = load(path, kind)
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(groups)
    backend.forward(make_batch([(TOKENS[:30], 0, [0])], groups=groups))
    blocks = group_blocks([0], groups).reshape(-1)
    before = backend.read_blocks(blocks)
    backend.forward(make_batch([([5], 30, [0])], groups=groups, layers=[2]))
    changed = (backend.read_blocks(blocks) != before).any(axis=1)
    assert changed.sum() == 1, "the block of the KV group that has layer 2, and no other"


@pytest.mark.parametrize("layers", [[], [-1], [NUM_LAYERS], [1, 1], [2, 1]])
def test_bad_lists_of_layers_are_refused(path: Path, kind: Any, layers: list[int]) -> None:
    backend = load(path, kind)
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(groups)
    with pytest.raises(BackendError, match="layers"):
        backend.forward(make_batch([([5], 0, [0])], groups=groups, layers=layers))


def test_a_batch_that_leaves_out_layers_captures_nothing(path: Path, kind: Any) -> None:
    backend = load(path, kind)
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(groups)
    batch = make_batch([([5], 0, [0])], groups=groups, layers=[0])
    with pytest.raises(BackendError, match="captures nothing"):
        backend.forward(replace(batch, capture=StepCapture((), None)))
