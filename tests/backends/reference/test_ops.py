from __future__ import annotations

import math

import numpy as np
import pytest

from pellucid.backends.reference.ops import activate, rms_norm, rope_angles, rotate
from pellucid.models.spec import NormSpec, RopeSpec

RNG = np.random.default_rng(0)


def test_rms_norm_is_its_formula() -> None:
    x, weight = RNG.normal(size=(5, 48)).astype(np.float32), RNG.normal(size=48).astype(np.float32)
    for offset in (0.0, 1.0):
        expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-2) * (weight + offset)
        np.testing.assert_allclose(rms_norm(x, weight, NormSpec(1e-2, offset)), expected, rtol=2e-6, atol=1e-6)


def test_rotation_is_that_of_complex_pairs_and_leaves_the_rest() -> None:
    rope = RopeSpec(inv_freq=(1.0, 0.1, 0.01), attention_factor=1.5)
    positions = np.array([0, 3, 1000], np.int32)
    x = RNG.normal(size=(3, 2, 8)).astype(np.float32)
    rotated = rotate(x, *rope_angles(positions, rope))
    pairs = x[..., :3].astype(np.float64) + 1j * x[..., 3:6]
    turned = 1.5 * pairs * np.exp(1j * positions[:, None, None] * np.array(rope.inv_freq))
    np.testing.assert_allclose(rotated[..., :3], turned.real, atol=1e-4)
    np.testing.assert_allclose(rotated[..., 3:6], turned.imag, atol=1e-4)
    np.testing.assert_array_equal(rotated[..., 6:], x[..., 6:])


@pytest.mark.filterwarnings("error")
def test_activations_are_their_formulas_and_survive_extremes() -> None:
    x = np.concatenate([np.linspace(-12, 12, 101), [-1000, -200, 200, 1000]]).astype(np.float32)
    with np.errstate(over="ignore"):
        silu = [value / (1 + math.exp(-value)) if value > -700 else 0.0 for value in x.tolist()]
    gelu = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.tolist()]
    np.testing.assert_allclose(activate(x, "silu"), silu, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(activate(x, "gelu_tanh"), gelu, rtol=1e-5, atol=1e-6)
