"""What tests of captures share: requests that capture, and buffers for everything there is to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pellucid.backends.base import Backend
from pellucid.core.batch import ForwardBatch
from pellucid.core.capture import Captured, CaptureParams, SequenceCapture, StepCapture
from pellucid.core.config import BLOCK_SIZE, SchedulerConfig
from pellucid.core.outputs import RequestOutput
from pellucid.core.sampling_params import SamplingParams
from tests.support.engines import CheckedEngine
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.tiny_models import make_batch, num_kv_groups

EVERYTHING = CaptureParams(residual=True, mlp=True, attention=True, operations=True)

Request = tuple[Sequence[int], SamplingParams, CaptureParams | None]


def run(
    backend: Backend,
    requests: Sequence[Request],
    *,
    num_blocks: int = 64,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 512,
    **options: Any,
) -> list[RequestOutput]:
    """The replies to `requests`, added at once."""
    backend.allocate_kv_cache(num_blocks)
    config = SchedulerConfig(min(max_num_seqs, max_num_batched_tokens), max_num_batched_tokens)
    engine = CheckedEngine(backend, FakeTokenizer(), config, num_blocks=num_blocks, max_model_len=320, **options)
    for number, (prompt, params, capture) in enumerate(requests):
        engine.add_request(str(number), list(prompt), params, capture=capture)
    engine.run()
    return [engine.replies[str(number)] for number in range(len(requests))]


def captured(backend: Backend, request: Request, **options: Any) -> Captured:
    """What one request, alone, is given."""
    (reply,) = run(backend, [request], **options)
    assert reply.error is None
    assert reply.captured is not None
    return reply.captured


def arrays(captured: Captured | None) -> Iterator[tuple[str, np.ndarray]]:
    """Every array of `captured`, named."""
    assert captured is not None
    yield "num_tokens", np.array(captured.num_tokens)
    for name in ("positions", "residual_points", "residual", "queries", "heads"):
        yield name, np.asarray(getattr(captured, name))
    for name in ("mlp", "attention"):
        for layer, array in getattr(captured, name).items():
            yield f"{name} {layer}", array


def assert_same(found: Captured | None, expected: Captured | None) -> None:
    """AssertionError where an array differs in a bit."""
    found_arrays, expected_arrays = dict(arrays(found)), dict(arrays(expected))
    assert found_arrays.keys() == expected_arrays.keys()
    for name, array in expected_arrays.items():
        assert np.array_equal(found_arrays[name], array), name


def residuals(backend: Backend, tokens: Sequence[int], points: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The residual stream of every token at `points`, float32 [points, tokens, hidden_size], and their logits."""
    groups, blocks = num_kv_groups(backend), range(-(-len(tokens) // BLOCK_SIZE))
    backend.allocate_kv_cache(len(blocks) * groups)
    batch = make_batch([(tokens, 0, blocks)], groups=groups)
    none = np.empty(0, np.int32)
    wanted = SequenceCapture(
        row=0,
        tokens=np.arange(len(tokens), dtype=np.int32),
        residual_points=np.array(points, np.int32),
        residual=_nan(len(points), len(tokens), backend.spec.hidden_size),
        mlp={},
        queries=none,
        heads=none,
        attention={},
    )
    logits = backend.forward(with_capture(batch, wanted)).logits.copy()
    return wanted.residual, logits


def buffers(backend: Backend, batch: ForwardBatch, row: int = 0) -> SequenceCapture:
    """Memory for everything there is to see of one sequence of `batch`, filled with NaN."""
    spec, num_layers = backend.spec, len(backend.spec.layers)
    tokens = np.arange(batch.cu_seqlens[row], batch.cu_seqlens[row + 1], dtype=np.int32)
    heads = np.arange(spec.layers[0].attention.num_attention_heads, dtype=np.int32)
    points = np.arange(2 * num_layers + 1, dtype=np.int32)
    sizes = [layer.mlp.intermediate_size for layer in spec.layers]
    keys = int(batch.kv_lens[row])
    return SequenceCapture(
        row=row,
        tokens=tokens,
        residual_points=points,
        residual=_nan(len(points), len(tokens), spec.hidden_size),
        mlp={layer: _nan(len(tokens), size) for layer, size in enumerate(sizes)},
        queries=tokens,
        heads=heads,
        attention={layer: _nan(len(heads), len(tokens), keys) for layer in range(num_layers)},
    )


def with_capture(batch: ForwardBatch, *wanted: SequenceCapture, seconds: np.ndarray | None = None) -> ForwardBatch:
    """`batch` with a wish."""
    return replace(batch, capture=StepCapture(wanted, seconds))


def _nan(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)
