from __future__ import annotations

import numpy as np
import pytest

from pellucid.backends.reference.attention import attend
from pellucid.models.spec import AttentionSpec, RopeSpec

HEAD_DIM, NUM_TOKENS = 16, 200
RNG = np.random.default_rng(0)
KEYS = RNG.normal(size=(2, NUM_TOKENS, HEAD_DIM)).astype(np.float32)
VALUES = RNG.normal(size=(2, NUM_TOKENS, HEAD_DIM)).astype(np.float32)
QUERY = RNG.normal(size=(6, HEAD_DIM)).astype(np.float32) * 3


def spec(sliding_window: int | None) -> AttentionSpec:
    return AttentionSpec(
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        scale=0.25,
        rope=RopeSpec(inv_freq=(1.0,)),
        sliding_window=sliding_window,
    )


def read_block(block: int, tokens: slice) -> tuple[np.ndarray, np.ndarray]:
    start = block * 64
    return KEYS[:, start : start + 64][:, tokens], VALUES[:, start : start + 64][:, tokens]


def exact(position: int, sliding_window: int | None) -> np.ndarray:
    first = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
    out = np.empty((6, HEAD_DIM))
    for head in range(6):
        keys, values = (x[head // 3, first : position + 1].astype(np.float64) for x in (KEYS, VALUES))
        scores = keys @ QUERY[head] * 0.25
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ values
    return out


@pytest.mark.parametrize("position", [0, 1, 62, 63, 64, 65, 127, 128, 199])
@pytest.mark.parametrize("sliding_window", [None, 1, 2, 63, 64, 65, 100, 1000])
def test_the_fold_over_blocks_is_softmax_attention(position: int, sliding_window: int | None) -> None:
    computed = attend(QUERY, position, read_block, spec(sliding_window))
    np.testing.assert_allclose(computed, exact(position, sliding_window), atol=1e-5)


def test_the_comparison_catches_a_window_off_by_one() -> None:
    for window in (63, 64, 65):
        assert np.abs(attend(QUERY, 199, read_block, spec(window + 1)) - exact(199, window)).max() > 1e-4


def test_only_visible_tokens_are_read() -> None:
    read: list[tuple[int, slice]] = []

    def recording(block: int, tokens: slice) -> tuple[np.ndarray, np.ndarray]:
        read.append((block, tokens))
        return read_block(block, tokens)

    attend(QUERY, 130, recording, spec(70))
    assert read == [(0, slice(61, 64)), (1, slice(0, 64)), (2, slice(0, 3))]
