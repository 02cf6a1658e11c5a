"""The vector kernels against float64 numpy, instruction set against instruction set, and row against row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.quant.formats import BlockFormat, dequantize
from pellucid.quant.formats import quantize as encode

native = pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")

Array = NDArray[Any]
SETS: dict[str, Any] = native.kernels.instruction_sets
EPS = float(np.finfo(np.float32).eps)
KV_TYPES = ("f32", "f16", "bf16", "q8")
BLOCK = 64
F16_NAN = 0x7E00


def head_dims(kv_type: str, *sizes: int) -> list[int]:
    """Those of `sizes` that `kv_type` can store."""
    return [size for size in sizes if kv_type != "q8" or size % 32 == 0]


def kinds(*sizes: int) -> list[tuple[str, int]]:
    return [(kv_type, size) for kv_type in KV_TYPES for size in head_dims(kv_type, *sizes)]


@pytest.fixture(params=list(SETS))
def kernels(request: pytest.FixtureRequest) -> Any:
    return SETS[request.param]


class Altered:
    """A kernel table with one function replaced: how the mutants are made."""

    def __init__(self, kernels: Any, name: str, function: Callable[..., Any]) -> None:
        self._kernels, self._name, self._function = kernels, name, function

    def __getattr__(self, name: str) -> Any:
        return self._function if name == self._name else getattr(self._kernels, name)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def assert_same_bits(a: Array, b: Array) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def assert_close(found: Array, wanted: Array, tolerance: Array | float) -> None:
    error = np.abs(found.astype(np.float64) - wanted)
    assert (error <= tolerance).all(), f"error {(error - tolerance).max():g} over the bound"


# ---- row kernels -----------------------------------------------------------------------------------------------------

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 576, 1000)


@pytest.mark.parametrize("n", LENGTHS)
def test_rms_norm(kernels: Any, n: int) -> None:
    x, weight = normal(n, seed=n, scale=3.0), normal(n, seed=n + 1)
    x64 = x.astype(np.float64)
    wanted = x64 / np.sqrt((x64**2).mean() + 1e-5) * weight
    assert_close(kernels.rms_norm(x, weight, 1e-5), wanted, 4 * EPS * np.abs(wanted))


def test_rms_norm_of_large_activations_does_not_lose_accuracy(kernels: Any) -> None:
    x = normal(4096, scale=1e5)
    x[7] = 3e7
    wanted = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean())
    assert_close(kernels.rms_norm(x, np.ones_like(x), 0.0), wanted, 4 * EPS * np.abs(wanted))


@pytest.mark.parametrize(("n", "half"), [(2, 1), (8, 4), (34, 17), (64, 32), (64, 16), (256, 128), (80, 40)])
def test_rope(kernels: Any, n: int, half: int) -> None:
    x, angle = normal(n, seed=n), np.random.default_rng(half).uniform(0, 1000, half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    first, second = x[:half].astype(np.float64), x[half : 2 * half].astype(np.float64)
    wanted = x.astype(np.float64)
    wanted[:half], wanted[half : 2 * half] = first * cos - second * sin, second * cos + first * sin
    bound = np.full(n, 0.0)
    bound[: 2 * half] = np.tile(EPS * (np.abs(first) + np.abs(second)), 2)
    assert_close(kernels.rope(x, cos, sin), wanted, bound)


@pytest.mark.parametrize("n", LENGTHS)
def test_add_and_scale_round_once(kernels: Any, n: int) -> None:
    x, y = normal(n, seed=1), normal(n, seed=2)
    assert_same_bits(kernels.add(x, y), x + y)
    assert_same_bits(kernels.scale(x, 0.3), x * np.float32(0.3))


def check_silu(kernels: Any) -> None:
    gate = np.concatenate([np.linspace(-86, 100, 4001), [-1e-30, 0.0, 1e-30, 1e-4, -1e-4, 3e38]]).astype(np.float32)
    up = normal(gate.size, seed=3)
    with np.errstate(over="ignore"):
        wanted = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    assert_close(kernels.silu_mul(gate, up), wanted, 4 * EPS * np.abs(wanted) + 1e-37)


def check_gelu(kernels: Any) -> None:
    gate = np.concatenate([np.linspace(-8, 40, 4001), [-1e-30, 0.0, 1e-30, 1e-4, -1e-4, 1e30]]).astype(np.float32)
    up = normal(gate.size, seed=4)
    x = gate.astype(np.float64)
    twice_u = 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    with np.errstate(over="ignore"):
        wanted = x / (1 + np.exp(-twice_u)) * up
    # The exponent's own rounding, |2u| eps, shows in the negative tail.
    bound = EPS * (4 + 3 * np.where(x < 0, np.abs(twice_u), 1)) * np.abs(wanted)
    assert_close(kernels.gelu_tanh_mul(gate, up), wanted, bound + 1e-37)


def test_activations(kernels: Any) -> None:
    check_silu(kernels)
    check_gelu(kernels)
    far = np.array([-np.float32(3e38), -1e4, -200.0], np.float32)
    assert (kernels.silu_mul(far, np.ones(3, np.float32)) == 0).all()
    assert (kernels.gelu_tanh_mul(far, np.ones(3, np.float32)) == 0).all()
    assert np.isnan(kernels.silu_mul(np.full(3, np.nan, np.float32), np.ones(3, np.float32))).all()


def test_activation_checks_catch_a_wrong_function(kernels: Any) -> None:
    with pytest.raises(AssertionError):
        check_silu(Altered(kernels, "silu_mul", kernels.gelu_tanh_mul))
    erf_like = Altered(kernels, "gelu_tanh_mul", lambda g, u: kernels.gelu_tanh_mul(g * np.float32(1 + 1e-5), u))
    with pytest.raises(AssertionError):
        check_gelu(erf_like)


@pytest.mark.parametrize("n", LENGTHS)
def test_all_finite(kernels: Any, n: int) -> None:
    x = normal(n) * np.float32(5e37)
    assert kernels.all_finite(x)
    for bad in (np.inf, -np.inf, np.nan):
        for at in {0, n // 2, n - 1}:
            y = x.copy()
            y[at] = bad
            assert not kernels.all_finite(y)


def test_all_finite_looks_past_the_first_chunk(kernels: Any) -> None:
    x = np.zeros(10_001, np.float32)
    assert kernels.all_finite(x)
    x[10_000] = np.nan
    assert not kernels.all_finite(x)


# ---- quantization ----------------------------------------------------------------------------------------------------


def quantize_reference(x: Array) -> tuple[Array, Array, Array, Array]:
    blocks = x.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1)
    normal_scale = largest >= np.float32(2.0**-118)
    with np.errstate(divide="ignore", over="ignore"):
        d = np.where(normal_scale, largest / np.float32(127), np.float32(0))
        inverse = np.where(normal_scale, np.float32(127) / largest, np.float32(0))
    q = np.rint(blocks * inverse[:, None]).astype(np.int8)
    total = q.sum(axis=1, dtype=np.int32)
    return q.reshape(-1), d, total, d * total.astype(np.float32)


def check_quantize(kernels: Any) -> None:
    for blocks in (1, 2, 3, 4, 5, 18, 48):
        magnitude = np.repeat(np.logspace(-30, 30, blocks), 32)
        x = (normal(32 * blocks, seed=blocks) * magnitude).astype(np.float32)
        for found, wanted in zip(kernels.quantize(x), quantize_reference(x), strict=True):
            assert_same_bits(found, wanted)


def test_quantize_equals_the_definition(kernels: Any) -> None:
    check_quantize(kernels)


def test_quantize_check_catches_a_different_rounding(kernels: Any) -> None:
    def half_away_from_zero(x: Array) -> tuple[Array, Array, Array, Array]:
        q, d, total, scaled = kernels.quantize(x)
        return np.trunc(q.astype(np.float32) * np.float32(0.999)).astype(np.int8), d, total, scaled

    with pytest.raises(AssertionError):
        check_quantize(Altered(kernels, "quantize", half_away_from_zero))


def test_quantize_ties_go_to_even(kernels: Any) -> None:
    x = np.zeros(32, np.float32)
    x[:6] = [127, 0.5, 1.5, 2.5, -0.5, -3.5]
    q, d, total, _ = kernels.quantize(x)
    assert q[:6].tolist() == [127, 0, 2, 2, 0, -4]
    assert d[0] == 1
    assert total[0] == 127


def test_quantize_never_exceeds_127_and_halves_a_step_at_most(kernels: Any) -> None:
    # Every mantissa's rounding of 127 / max, over the whole range of exponents.
    rng = np.random.default_rng(5)
    largest = np.exp2(rng.uniform(-118, 127.99, 20_000)).astype(np.float32)
    x = (rng.uniform(-1, 1, (largest.size, 32)).astype(np.float32) * largest[:, None]).astype(np.float32)
    x[np.arange(largest.size), rng.integers(0, 32, largest.size)] = largest * rng.choice([-1, 1], largest.size)
    q, d, total, scaled = kernels.quantize(x.reshape(-1))
    assert np.abs(q.astype(int)).max() == 127
    assert (np.abs(q.reshape(x.shape).astype(int)).max(axis=1) == 127).all()
    assert (total == q.reshape(x.shape).sum(axis=1, dtype=np.int32)).all()
    error = np.abs(q.reshape(x.shape) * d[:, None].astype(np.float64) - x)
    assert (error <= d[:, None].astype(np.float64) * (0.5 + 256 * EPS)).all()
    with np.errstate(over="ignore"):
        assert_same_bits(scaled, d * total.astype(np.float32))


@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-45, -1e-40, 1e-38, 2.9e-36])
def test_quantize_counts_blocks_below_2_to_minus_118_as_zeros(kernels: Any, tiny: float) -> None:
    x = np.full(64, tiny, np.float32)
    x[32:] = normal(32)
    q, d, total, scaled = kernels.quantize(x)
    assert not q[:32].any()
    assert (d[0], total[0], scaled[0]) == (0, 0, 0)
    for found, wanted in zip((q, d, total, scaled), kernels.quantize(x[32:]), strict=True):
        assert_same_bits(found[found.size // 2 :], wanted)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 15, 16, 31])
def test_quantize_shows_a_fault_in_its_own_block_only(kernels: Any, bad: float, at: int) -> None:
    x = normal(160)
    clean = kernels.quantize(x)
    x[64 + at] = bad
    q, d, total, scaled = kernels.quantize(x)
    assert np.isnan(d[2])
    assert np.isnan(scaled[2])
    assert total[2] == 0
    assert not q[64:96].any()
    others = [0, 1, 3, 4]
    assert_same_bits(d[others], clean[1][others])
    assert_same_bits(q.reshape(5, 32)[others], clean[0].reshape(5, 32)[others])


def test_quantize_rest_equals_the_definition(kernels: Any) -> None:
    for seed, magnitude in enumerate((1e-20, 1e-3, 1.0, 300.0, 1e18)):
        x = (normal(32, seed=seed) * magnitude).astype(np.float32)
        q, d, _, _ = kernels.quantize(x)
        low, total = kernels.quantize_rest(x, q, d[0])
        wanted = np.clip(np.rint((x.astype(np.float64) - q * d[0].astype(np.float64)) * (256 / d[0])), -127, 127)
        # The rest is rounded to float32 before it is rounded to a step: a tie may go either way.
        assert np.abs(low - wanted).max() <= 1
        assert (low != wanted).sum() <= 1
        assert total == low.sum(dtype=np.int32)
        with pytest.raises(AssertionError):  # the mutant: steps of half the size
            assert np.abs(kernels.quantize_rest(x, q, d[0] / 2)[0] - wanted).max() <= 1


# ---- the KV cache ----------------------------------------------------------------------------------------------------


def to_bf16(x: Array) -> NDArray[np.uint16]:
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return cast(NDArray[np.uint16], ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


def narrow(x: Array, kv_type: str) -> Array:
    return to_bf16(x) if kv_type == "bf16" else x.astype(np.float16 if kv_type == "f16" else np.float32)


def to_q8(x: Array) -> tuple[Array, Array]:
    """Scales, uint16 [64, head_dim / 32], and int8 [64, head_dim]: Q8_0, with what that refuses as scale NaN."""
    blocks = x.reshape(-1, 32)
    with np.errstate(invalid="ignore"):
        sound = np.abs(blocks).max(axis=1) / np.float32(127) < 65520
    data = encode(np.where(sound[:, None], blocks, np.float32(0)), BlockFormat.Q8_0)
    scales = np.where(sound, data[:, :2].copy().view(np.uint16)[:, 0], np.uint16(F16_NAN))
    return scales.reshape(len(x), -1), data[:, 2:].copy().view(np.int8).reshape(x.shape)


def stored(x: Array, kv_type: str) -> Array:
    """What is read back, float32."""
    if kv_type == "q8":
        return dequantize(encode(x, BlockFormat.Q8_0), BlockFormat.Q8_0)
    found = narrow(x, kv_type)
    return (found.astype(np.uint32) << 16).view(np.float32) if kv_type == "bf16" else found.astype(np.float32)


def joined(scales: Array, q: Array) -> Array:
    return np.frombuffer(scales.tobytes() + q.tobytes(), np.uint8).copy()


def pack_keys(keys: Array, kv_type: str) -> Array:
    """[64, head_dim] -> the key block's order."""
    if kv_type == "q8":
        return joined(*(part.reshape(4, 16, -1).transpose(0, 2, 1) for part in to_q8(keys)))
    pair = 1 if kv_type == "f32" else 2
    grouped = narrow(keys, kv_type).reshape(4, 16, keys.shape[1] // pair, pair)
    return np.ascontiguousarray(grouped.transpose(0, 2, 1, 3)).reshape(-1)


def pack_values(values: Array, kv_type: str) -> Array:
    if kv_type == "q8":
        return joined(*to_q8(values))
    return np.ascontiguousarray(narrow(values, kv_type)).reshape(-1)


@pytest.mark.parametrize(("kv_type", "head_dim"), kinds(2, 8, 16, 32, 34, 64, 80, 96, 256, 512))
def test_kv_store_writes_one_slot_of_the_documented_layout(kernels: Any, kv_type: str, head_dim: int) -> None:
    keys, values = normal(BLOCK, head_dim, seed=1, scale=100), normal(BLOCK, head_dim, seed=2, scale=1e-4)
    key_block, value_block = pack_keys(np.zeros_like(keys), kv_type), pack_values(np.zeros_like(values), kv_type)
    for count, slot in enumerate(np.random.default_rng(3).permutation(BLOCK)):
        kernels.kv_store(kv_type, key_block, value_block, int(slot), keys[slot], values[slot])
        if count == 20:
            written = np.zeros((BLOCK, 1), np.float32)
            written[np.random.default_rng(3).permutation(BLOCK)[:21]] = 1
            assert_same_bits(key_block, pack_keys(np.where(written, keys, np.float32(0)), kv_type))
    assert_same_bits(key_block, pack_keys(keys, kv_type))
    assert_same_bits(value_block, pack_values(values, kv_type))


@pytest.mark.parametrize("kv_type", ["f16", "bf16"])
def test_kv_store_rounds_as_the_formats_do(kernels: Any, kv_type: str) -> None:
    exact = np.arange(0, 0x7C00, 37, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = np.concatenate([exact, exact * np.float32(1 + 2.0**-11), -exact * np.float32(1 + 2.0**-12), [65519.0, 65520.0]])
    x = np.concatenate([x, [1e5, -1e5, np.inf, -np.inf, 2.0**-25, 1.5 * 2.0**-25, 1e-9], np.zeros(512)])
    x = x[: x.size // 512 * 512].astype(np.float32)
    for row in x.reshape(-1, 512):
        key_block, value_block = np.zeros(BLOCK * 512, np.uint16), np.zeros(BLOCK * 512, np.uint16)
        kernels.kv_store(kv_type, key_block, value_block, 0, row, row)
        with np.errstate(over="ignore"):
            wanted = narrow(row, kv_type).view(np.uint16)
        assert_same_bits(value_block[:512], wanted)
        assert_same_bits(key_block.reshape(4, 256, 16, 2)[0, :, 0].reshape(-1), wanted)


def store_q8(kernels: Any, row: Array) -> tuple[Array, Array]:
    """Scales as uint16 and int8 values of `row` [head_dim], which the key and the value agree on."""
    n, scales = row.size, row.size // 32
    key_block, value_block = np.zeros(BLOCK * scales * 34, np.uint8), np.zeros(BLOCK * scales * 34, np.uint8)
    kernels.kv_store("q8", key_block, value_block, 0, row, row)
    split = 2 * BLOCK * scales
    scale, q = value_block[:split].view(np.uint16)[:scales], value_block[split:].view(np.int8)[:n]
    assert_same_bits(key_block[:split].view(np.uint16).reshape(4, scales, 16)[0, :, 0].copy(), scale)
    assert_same_bits(key_block[split:].view(np.int8).reshape(4, n, 16)[0, :, 0].copy(), q)
    return scale, q


def check_q8_store(kernels: Any) -> None:
    # From scales that vanish in f16, through its subnormal numbers, to its largest; 15.5 puts every level on a half.
    magnitudes = np.exp2(np.linspace(-40, 22.5, 640)).astype(np.float32)
    x = normal(640, 32, seed=6) * magnitudes[:, None]
    halves = (np.arange(-16, 16) + np.float32(0.5)) * np.exp2(np.arange(-20, 12)[:, None]).astype(np.float32)
    halves[:, 0] = 127 * np.exp2(np.arange(-20, 12))
    for row in np.concatenate([x, halves]).astype(np.float32).reshape(-1, 512):
        scales, q = to_q8(row.reshape(1, -1))
        for found, wanted in zip(store_q8(kernels, row), (scales[0], q[0]), strict=True):
            assert_same_bits(found, wanted)


def test_q8_is_stored_as_gguf_does(kernels: Any) -> None:
    check_q8_store(kernels)


def test_q8_check_catches_the_rounding_of_activations(kernels: Any) -> None:
    def to_even(kv_type: str, key_block: Array, value_block: Array, slot: int, key: Array, value: Array) -> None:
        kernels.kv_store(kv_type, key_block, value_block, slot, key, value)
        split = 2 * BLOCK * (key.size // 32)
        q = kernels.quantize(key)[0].view(np.uint8)
        value_block[split : split + key.size] = q
        key_block[split:].reshape(4, key.size, 16)[0, :, 0] = q

    with pytest.raises(AssertionError):
        check_q8_store(Altered(kernels, "kv_store", to_even))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 8.4e6 * 127, -3e38])
def test_q8_marks_what_it_cannot_hold(kernels: Any, bad: float) -> None:
    row = normal(96)
    scale, q = store_q8(kernels, row)
    row[40] = bad
    bad_scale, bad_q = store_q8(kernels, row)
    assert bad_scale[1] == F16_NAN
    assert not bad_q[32:64].any()
    for block in (0, 2):
        assert bad_scale[block] == scale[block]
        assert_same_bits(bad_q[32 * block : 32 * block + 32], q[32 * block : 32 * block + 32])


def test_q8_holds_the_largest_scale_and_zeros(kernels: Any) -> None:
    row = np.zeros(128, np.float32)
    row[0], row[32], row[64] = 127 * 65504, -127 * 65519, 1e-44
    scale, q = store_q8(kernels, row)
    assert scale.view(np.float16).tolist() == [65504, 65504, 0, 0]
    assert q[[0, 32]].tolist() == [127, -127]
    assert not q[64:].any()


# ---- attention -------------------------------------------------------------------------------------------------------


class Case:
    """A KV block and queries with their ranges."""

    def __init__(self, kv_type: str, head_dim: int, num_queries: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.kv_type = kv_type
        self.keys = normal(BLOCK, head_dim, seed=seed + 1)
        self.values = normal(BLOCK, head_dim, seed=seed + 2)
        self.query = normal(num_queries, head_dim, seed=seed + 3, scale=2 * head_dim**-0.5)
        self.end = np.sort(rng.integers(1, BLOCK + 1, num_queries)).astype(np.int32)
        self.begin = (rng.integers(0, BLOCK, num_queries) * rng.integers(0, 2, num_queries)).astype(np.int32)
        self.begin = np.minimum(self.begin, self.end - 1)

    def run(self, kernels: Any, rows: slice = slice(None)) -> tuple[Array, Array, Array]:
        found = kernels.attention_block(
            self.kv_type,
            pack_keys(self.keys, self.kv_type),
            pack_values(self.values, self.kv_type),
            np.ascontiguousarray(self.query[rows]),
            np.ascontiguousarray(self.begin[rows]),
            np.ascontiguousarray(self.end[rows]),
        )
        return cast(tuple[Array, Array, Array], found)

    def wanted(self) -> tuple[Array, Array, Array, Array, Array]:
        """max, sum, out in float64, and error bounds for the scores and the output."""
        keys = stored(self.keys, self.kv_type).astype(np.float64)
        values = stored(self.values, self.kv_type).astype(np.float64)
        query = self.query.astype(np.float64)
        slots = np.arange(BLOCK)
        seen = (slots >= self.begin[:, None]) & (slots < self.end[:, None])
        scores = np.where(seen, query @ keys.T, -np.inf)
        largest = scores.max(axis=1)
        weights = np.where(seen, np.exp(scores - np.where(np.isfinite(largest), largest, 0)[:, None]), 0)
        score_bound = EPS * query.shape[1] ** 0.5 * np.where(seen, np.abs(query) @ np.abs(keys).T, 0).max(axis=1)
        out_bound = (2 * score_bound + 16 * EPS)[:, None] * (weights @ np.abs(values))
        return largest, weights.sum(axis=1), weights @ values, score_bound, out_bound


def check_attention(kernels: Any, case: Case) -> None:
    found_max, found_sum, found_out = case.run(kernels)
    largest, total, out, score_bound, out_bound = case.wanted()
    assert_close(found_max, largest, score_bound)
    assert_close(found_sum, total, (2 * score_bound + 8 * EPS) * total)
    assert_close(found_out, out, out_bound)


@pytest.mark.parametrize(("kv_type", "head_dim"), kinds(2, 8, 16, 24, 32, 64, 80, 96, 128, 256, 512))
def test_attention_block(kernels: Any, kv_type: str, head_dim: int) -> None:
    for num_queries in (1, 2, 3, 4, 5, 6, 7, 16, 35):
        check_attention(kernels, Case(kv_type, head_dim, num_queries, seed=num_queries))


def check_q8_attention(kernels: Any) -> None:
    for head_dim in (32, 64, 96, 256):
        for num_queries in (1, 3, 6, 13, 32, 33, 70):  # beyond 32 rows the block becomes float32 first
            case = Case("q8", head_dim, num_queries, seed=num_queries)
            found = case.run(kernels)
            case.keys, case.values, case.kv_type = stored(case.keys, "q8"), stored(case.values, "q8"), "f32"
            for part, wanted in zip(found, case.run(kernels), strict=True):
                assert_same_bits(part, wanted)


def test_q8_attention_is_that_of_the_decoded_block_to_the_bit(kernels: Any) -> None:
    check_q8_attention(kernels)


def test_q8_check_catches_another_order_of_operations(kernels: Any) -> None:
    def backwards(kv_type: str, keys: Array, values: Array, query: Array, begin: Array, end: Array) -> Any:
        """The same products, added up from the last dimension to the first."""
        if kv_type == "q8":
            head_dim = query.shape[1]
            split = 2 * BLOCK * (head_dim // 32)
            scales = keys[:split].view(np.uint16).reshape(4, -1, 16)[:, ::-1]
            keys = joined(scales, keys[split:].reshape(4, head_dim, 16)[:, ::-1])
            query = np.ascontiguousarray(query[:, ::-1])
        return kernels.attention_block(kv_type, keys, values, query, begin, end)

    with pytest.raises(AssertionError):
        check_q8_attention(Altered(kernels, "attention_block", backwards))


def test_q8_scales_of_nan_show(kernels: Any) -> None:
    case = Case("q8", 64, 3)
    case.keys[5, 40] = np.inf
    case.begin[:], case.end[:] = (0, 6, 0), (6, BLOCK, BLOCK)
    out = case.run(kernels)[2]
    assert np.isnan(out[[0, 2]]).all()


def test_attention_block_unmasked(kernels: Any) -> None:
    case = Case("bf16", 64, 64)
    case.begin[:], case.end[:] = 0, BLOCK
    check_attention(kernels, case)


def test_attention_check_catches_an_ignored_range(kernels: Any) -> None:
    def unmasked(kv_type: str, keys: Array, values: Array, query: Array, begin: Array, end: Array) -> Any:
        return kernels.attention_block(kv_type, keys, values, query, begin, np.minimum(end + 1, BLOCK))

    with pytest.raises(AssertionError):
        check_attention(Altered(kernels, "attention_block", unmasked), Case("f32", 64, 7))


def test_softmax_weights_are_accurate(kernels: Any) -> None:
    # Values that are the identity make each output the weight of one token.
    head_dim = BLOCK
    for low in (0.5, 10.0, 86.8):
        case = Case("f32", head_dim, 1)
        case.keys[:] = 0
        case.keys[:, 0] = -np.linspace(0, low, BLOCK)
        case.values, case.query[:] = np.eye(BLOCK, dtype=np.float32), 0
        case.query[0, 0] = 1
        case.begin[:], case.end[:] = 0, BLOCK
        weights = case.run(kernels)[2][0]
        wanted = np.exp(case.keys[:, 0].astype(np.float64))
        assert weights[0] == 1
        assert_close(weights, wanted, 1.2 * np.spacing(wanted.astype(np.float32)).astype(np.float64))
    case.keys[1:, 0] = [-87.5, -1e3, -1e30, *([-3e38] * 60)]
    assert case.run(kernels)[2][0].tolist() == [1] + [0] * 63


def check_row_independence(kernels: Any) -> None:
    for kv_type in KV_TYPES:
        for head_dim in head_dims(kv_type, 8, 64, 80, 96, 256):
            case = Case(kv_type, head_dim, 37, seed=head_dim)
            whole = case.run(kernels)
            for size in (1, 3, 5, 17):
                parts = [case.run(kernels, slice(i, i + size)) for i in range(0, 37, size)]
                for found, wanted in zip(zip(*parts, strict=True), whole, strict=True):
                    assert_same_bits(np.concatenate(found), wanted)


def test_a_row_does_not_depend_on_its_neighbours(kernels: Any) -> None:
    check_row_independence(kernels)


def test_row_independence_check_catches_a_neighbour(kernels: Any) -> None:
    def order_by_batch(*args: Any) -> Any:
        largest, total, out = kernels.attention_block(*args)
        return largest, total, out if len(out) == 1 else np.nextafter(out, np.float32(np.inf))

    with pytest.raises(AssertionError):
        check_row_independence(Altered(kernels, "attention_block", order_by_batch))


def test_a_zero_output_has_the_same_sign_beside_a_neighbour_that_sees_more(kernels: Any) -> None:
    # Row 0's second product underflows to -0; row 1's further tokens would turn it into +0 in a shared tile.
    case = Case("f32", 16, 2)
    case.keys[:], case.values[:], case.query[:] = 0, 1, 0
    case.query[:, 0], case.keys[1, 0] = 1, -60
    case.values[0], case.values[1] = 0, -1e-38
    case.begin[:], case.end[:] = 0, (2, BLOCK)
    both, alone = case.run(kernels)[2], case.run(kernels, slice(0, 1))[2]
    assert_same_bits(both[:1], alone)
    assert not np.signbit(alone).any()


def check_unseen_slots(kernels: Any, kv_type: str) -> None:
    for head_dim in head_dims(kv_type, 8, 64, 128):
        for num_queries in (1, 5, 23):
            case = Case(kv_type, head_dim, num_queries, seed=num_queries)
            case.begin[:], last = np.maximum(case.begin, 3), case.end.max()
            clean = case.run(kernels)
            case.keys[last:], case.values[last:] = np.nan, np.inf  # never written: anything
            case.keys[:3], case.values[:3] = 6e4, -6e4  # out of a window: stale, finite
            for found, wanted in zip(case.run(kernels), clean, strict=True):
                assert_same_bits(found, wanted)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_slots_that_no_row_sees_do_not_matter(kernels: Any, kv_type: str) -> None:
    check_unseen_slots(kernels, kv_type)


def test_unseen_slots_check_catches_a_read_of_them(kernels: Any) -> None:
    def whole_block(kv_type: str, keys: Array, values: Array, query: Array, begin: Array, end: Array) -> Any:
        query, begin = np.concatenate([query, query[:1]]), np.append(begin, begin[0])
        everything = kernels.attention_block(kv_type, keys, values, query, begin, np.append(end, np.int32(BLOCK)))
        return tuple(part[:-1] for part in everything)

    with pytest.raises(AssertionError):
        check_unseen_slots(Altered(kernels, "attention_block", whole_block), "f32")


@pytest.mark.parametrize("num_queries", [1, 4, 13])
def test_a_row_that_sees_nothing_is_empty(kernels: Any, num_queries: int) -> None:
    case = Case("bf16", 64, num_queries)
    full = case.run(kernels)
    empty = np.arange(num_queries) % 3 == 0
    case.begin[empty], case.end[empty] = 9, (np.arange(num_queries)[empty] % 2) * 9
    largest, total, out = case.run(kernels)
    assert (largest[empty] == -np.inf).all()
    assert not total[empty].any()
    assert not out[empty].view(np.uint32).any()
    for found, wanted in zip((largest, total, out), full, strict=True):
        assert_same_bits(found[~empty], wanted[~empty])


def test_a_nan_query_shows_in_its_own_row_only(kernels: Any) -> None:
    case = Case("bf16", 64, 9)
    clean = case.run(kernels)[2]
    case.query[4, 3] = np.nan
    out = case.run(kernels)[2]
    assert np.isnan(out[4]).all()
    others = np.arange(9) != 4
    assert_same_bits(out[others], clean[others])


# ---- folding blocks --------------------------------------------------------------------------------------------------


def running(num_queries: int, head_dim: int) -> tuple[Array, Array, Array]:
    largest = np.full(num_queries, -np.inf, np.float32)
    return largest, np.zeros(num_queries, np.float32), np.zeros((num_queries, head_dim), np.float32)


def check_fold(kernels: Any, head_dim: int, num_queries: int) -> None:
    state = running(num_queries, head_dim)
    cases = [Case("f32", head_dim, num_queries, seed=100 * i) for i in range(5)]
    for i, case in enumerate(cases):
        case.query = cases[0].query * np.float32(4)
        if i == 2:
            case.begin[::2] = case.end[::2] = 0
        kernels.attention_fold(*state, *case.run(kernels))
    scores, values = [], np.concatenate([case.values for case in cases]).astype(np.float64)
    score_bound = np.max([case.wanted()[3] for case in cases], axis=0)
    for case in cases:
        seen = (np.arange(BLOCK) >= case.begin[:, None]) & (np.arange(BLOCK) < case.end[:, None])
        scores.append(np.where(seen, case.query.astype(np.float64) @ case.keys.T.astype(np.float64), -np.inf))
    weights = np.exp(np.concatenate(scores, axis=1) - np.concatenate(scores, axis=1).max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    found = np.stack([kernels.attention_finish(state[2][i], float(state[1][i])) for i in range(num_queries)])
    assert_close(found, weights @ values, (2 * score_bound + 32 * EPS)[:, None] * (weights @ np.abs(values)))


@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 256])
@pytest.mark.parametrize("num_queries", [1, 3, 16, 21])
def test_fold_and_finish_give_softmax_attention(kernels: Any, head_dim: int, num_queries: int) -> None:
    check_fold(kernels, head_dim, num_queries)


def test_fold_check_catches_a_missing_rescale(kernels: Any) -> None:
    def sum_only(largest: Array, total: Array, out: Array, *block: Array) -> None:
        kept = out.copy()
        kernels.attention_fold(largest, total, out, *block)
        out[:] = kept + block[2]

    with pytest.raises(AssertionError):
        check_fold(Altered(kernels, "attention_fold", sum_only), 64, 3)


def test_folding_an_empty_block_changes_nothing(kernels: Any) -> None:
    state = running(18, 24)
    empty = running(18, 24)
    kernels.attention_fold(*state, *empty)
    for found, wanted in zip(state, running(18, 24), strict=True):
        assert_same_bits(found, wanted)
    kernels.attention_fold(*state, *Case("f32", 24, 18).run(kernels))
    before = [part.copy() for part in state]
    kernels.attention_fold(*state, *empty)
    for found, wanted in zip(state, before, strict=True):
        assert_same_bits(found, wanted)


def test_folding_the_first_block_keeps_its_result(kernels: Any) -> None:
    state, block = running(5, 64), Case("bf16", 64, 5).run(kernels)
    kernels.attention_fold(*state, *block)
    for found, wanted in zip(state, block, strict=True):
        assert_same_bits(found, wanted)


# ---- between instruction sets ----------------------------------------------------------------------------------------


def results(kernels: Any) -> Iterator[Array]:
    """Every kernel on awkward sizes and values."""
    for n in LENGTHS:
        x, y = normal(n, seed=n, scale=5), normal(n, seed=n + 1)
        yield kernels.rms_norm(x, y, 1e-6)
        yield kernels.silu_mul(x, y)
        yield kernels.gelu_tanh_mul(x, y)
        yield kernels.add(x, y)
        yield kernels.scale(x, 1.7)
        yield kernels.rope(x, np.cos(y[: n // 2]), np.sin(y[: n // 2]))
        yield kernels.attention_finish(x, 3.7)
    wide = np.linspace(-100, 100, 20_001, dtype=np.float32)
    yield kernels.silu_mul(wide, np.ones_like(wide))
    yield from kernels.quantize(normal(32 * 77, scale=1e-3))
    x = normal(32, seed=8)
    q, d, _, _ = kernels.quantize(x)
    yield kernels.quantize_rest(x, q, d[0])[0]
    for kv_type in KV_TYPES:
        for head_dim in head_dims(kv_type, 2, 24, 64, 96, 256):
            for num_queries in (1, 6, 19, 40):
                case = Case(kv_type, head_dim, num_queries)
                state, block = running(num_queries, head_dim), case.run(kernels)
                yield from block
                kernels.attention_fold(*state, *block)
                case.query *= np.float32(1.3)
                kernels.attention_fold(*state, *case.run(kernels))
                yield from state
            empty = np.zeros((BLOCK, head_dim), np.float32)
            key_block, value_block = pack_keys(empty, kv_type), pack_values(empty, kv_type)
            for slot in range(0, BLOCK, 7):
                key, value = normal(2, head_dim, seed=slot, scale=1e3)
                kernels.kv_store(kv_type, key_block, value_block, slot, key, value)
            yield key_block
            yield value_block


def check_same_results(a: Any, b: Any) -> None:
    for found, wanted in zip(results(a), results(b), strict=True):
        assert_same_bits(found, wanted)


needs_avx512 = pytest.mark.skipif(not {"avx2", "avx512"} <= SETS.keys(), reason="this machine has no AVX-512")


@needs_avx512
def test_avx512_equals_avx2() -> None:
    check_same_results(SETS["avx512"], SETS["avx2"])


@needs_avx512
def test_equality_check_catches_one_unit_in_the_last_place() -> None:
    def nudged(x: Array, weight: Array, eps: float) -> Array:
        out = SETS["avx2"].rms_norm(x, weight, eps)
        out[-1] = np.nextafter(out[-1], np.float32(0))
        return cast(Array, out)

    with pytest.raises(AssertionError):
        check_same_results(SETS["avx512"], Altered(SETS["avx2"], "rms_norm", nudged))


def test_the_sets_are_ordered_and_named() -> None:
    assert next(iter(SETS)) == "portable"
    assert all(kernels.name == name for name, kernels in SETS.items())


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused(kernels: Any) -> None:
    x, block = normal(64), np.zeros(BLOCK * 64, np.float32)
    one = np.ones(1, np.int32)
    with pytest.raises(ValueError, match="weight has 63 values, expected 64"):
        kernels.rms_norm(x, x[:63], 1e-5)
    with pytest.raises(TypeError):
        kernels.rms_norm(x.astype(np.float64), x, 1e-5)
    with pytest.raises(ValueError, match="multiple of 32"):
        kernels.quantize(x[:33])
    with pytest.raises(ValueError, match="no KV cache type 'q3'; there are f16, bf16, f32, q8"):
        kernels.kv_store("q3", block, block, 0, x, x)
    with pytest.raises(ValueError, match="head_dim is 48, expected a multiple of 32 up to 512"):
        kernels.kv_store("q8", block, block, 0, x[:48], x[:48])
    with pytest.raises(ValueError, match="key_block has 16384 bytes, expected 4352"):
        kernels.kv_store("q8", block, block, 0, x, x)
    with pytest.raises(ValueError, match="slot is 64"):
        kernels.kv_store("f32", block, block, 64, x, x)
    with pytest.raises(ValueError, match="key_block has 16384 bytes, expected 8192"):
        kernels.kv_store("bf16", block, block, 0, x, x)
    with pytest.raises(ValueError, match="head_dim is 3"):
        kernels.attention_block("f32", block, block, x[:3].reshape(1, 3), one * 0, one)
    with pytest.raises(ValueError, match="0 to 64"):
        kernels.attention_block("f32", block, block, x.reshape(1, 64), one * 0, one * 65)
