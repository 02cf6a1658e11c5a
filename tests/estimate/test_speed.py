import pytest

from pellucid.estimate import speed
from pellucid.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec


def make_spec(windows: tuple[int | None, ...] = (None, None)) -> ModelSpec:
    norm = NormSpec(1e-5)
    layers = tuple(
        LayerSpec(
            attention_norm=norm,
            attention=AttentionSpec(4, 2, 8, 8**-0.5, RopeSpec((1.0, 0.1, 0.01, 0.001)), sliding_window=window),
            post_attention_norm=None,
            mlp_norm=norm,
            mlp=MlpSpec(64, "silu"),
            post_mlp_norm=None,
        )
        for window in windows
    )
    return ModelSpec("llama", 100, 32, 4096, layers, norm, tie_word_embeddings=True)


def test_matmul_parameters_counted_by_hand() -> None:
    attention = 32 * (4 * 8) * 2 + 32 * (2 * 8) * 2
    assert speed.matmul_parameters(make_spec()) == (2 * (attention + 3 * 32 * 64), 100 * 32)


def test_prefill_computes_logits_of_one_row_only() -> None:
    spec = make_spec()
    layers, head = speed.matmul_parameters(spec)
    assert speed.prefill_operations(spec, 7) == 2 * 7 * layers + 2 * head


def test_sliding_window_bounds_what_decoding_reads() -> None:
    assert speed.kv_tokens_read(make_spec((None, None)), 1000) == 1000
    assert speed.kv_tokens_read(make_spec((10, None)), 1000) == (10 + 1000) / 2
    assert speed.kv_tokens_read(make_spec((10, None)), 5) == 5


def test_decode_bytes() -> None:
    assert speed.decode_bytes(make_spec(), 5000, 16.0, 100) == 5000 + 1600


@pytest.mark.parametrize(
    ("achieved", "limit", "shown"),
    [(30.0, 40.0, "75%"), (40.0, 40.0, "100%"), (41.0, 40.0, "measurement error"), (1.0, 0.0, "measurement error")],
)
def test_share_is_never_above_the_limit(achieved: float, limit: float, shown: str) -> None:
    assert str(speed.Utilization(achieved, limit)) == shown
