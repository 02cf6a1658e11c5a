"""The reference backend against transformers, run side by side: `make parity`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.backends.reference.backend import ReferenceBackend, load
from pellucid.models.registry import family_for_model_type
from pellucid.quant.formats import BlockFormat, quantize
from pellucid.weights.loader import open_model
from pellucid.weights.tensor import WeightTensor
from pellucid.weights.tensor_map import tensor_sources
from tests.parity import goldens
from tests.parity.cases import REAL, TINY, TOLERANCE, tiny_backend, tiny_spec, tiny_tokens, tiny_weights
from tests.support.tiny_models import METADATA, all_logits, random_weights, write_model
from tests.support.tiny_models import tiny_spec as gguf_spec

torch = pytest.importorskip("torch", reason="needs torch: pip install 'pellucid[parity]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'pellucid[parity]'")

from tests.parity.oracle import transformers_logits, transformers_model  # noqa: E402

pytestmark = pytest.mark.parity


def assert_close(computed: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(computed - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"logits differ by {error:.2e} of the largest"


@pytest.mark.parametrize("name", TINY)
def test_tiny_models(name: str) -> None:
    config = TINY[name]
    spec = tiny_spec(config)
    model = transformers_model(config, spec, tiny_weights(spec))
    computed = all_logits(tiny_backend(spec), tiny_tokens(config), chunk=40)
    assert_close(computed, transformers_logits(model, tiny_tokens(config)))
    # In float64 the oracle is free of rounding, so what is left is ours.
    assert_close(computed, transformers_logits(model.double(), tiny_tokens(config)))


@pytest.mark.parametrize("name", TINY)
def test_a_config_that_transformers_wrote_gives_the_same_spec(name: str) -> None:
    spec = tiny_spec(TINY[name])
    written = transformers_model(TINY[name], spec, tiny_weights(spec)).config.to_dict()
    assert family_for_model_type(written["model_type"]).spec_from_config(written) == spec


GGUF_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {}),
    "llama-linear": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "llama-yarn": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
        },
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
    "gemma3": ({}, {}),
    "gemma3-linear": (
        {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_the_way_through_a_gguf_file(name: str, tmp_path: Path) -> None:
    metadata_change, config_change = GGUF_CASES[name]
    architecture = name.partition("-")[0]
    metadata = {**METADATA[architecture], **metadata_change}
    spec = gguf_spec(metadata)
    weights = random_weights(spec, seed=3)
    with open_model(write_model(tmp_path / "model.gguf", metadata, weights, spec)) as model_file:
        backend = load(model_file, threads=1)
    layer = spec.layers[0]
    config = {
        "model_type": {"llama": "llama", "gemma3": "gemma3_text"}[architecture],
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.mlp.intermediate_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": layer.attention.num_attention_heads,
        "num_key_value_heads": layer.attention.num_key_value_heads,
        "head_dim": layer.attention.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": {"llama": 1e-5, "gemma3": 1e-6}[architecture],
        "rope_theta": {"llama": 1e4, "gemma3": 1e6}[architecture],
        "tie_word_embeddings": True,
        **({"sliding_window": 40, "query_pre_attn_scalar": 32} if architecture == "gemma3" else {}),
        **config_change,
    }
    tokens = np.random.RandomState(2).randint(0, spec.vocab_size, 130).tolist()
    model = transformers_model(config, spec, weights)
    assert_close(all_logits(backend, tokens), transformers_logits(model, tokens))


def test_projection_biases(tmp_path: Path) -> None:
    metadata = METADATA["llama"]
    spec = gguf_spec(metadata, bias=True)
    weights = random_weights(spec)
    with open_model(write_model(tmp_path / "model.gguf", metadata, weights, spec)) as model_file:
        backend = load(model_file, threads=1)
    from transformers import Qwen2Config, Qwen2ForCausalLM

    # Llama of transformers puts a bias on o_proj as well; Qwen2 has it on q, k and v alone, and is a Llama otherwise.
    config = Qwen2Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).eval()
    without_bias = tensor_sources(gguf_spec(metadata), family_for_model_type("llama").hf_names)
    state = {}
    for name, values in weights.items():
        module, _, kind = name.rpartition(".")
        theirs = without_bias[f"{module}.weight"].name.removesuffix("weight") + kind
        state[theirs] = torch.from_numpy(values)
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    tokens = np.random.RandomState(2).randint(0, spec.vocab_size, 130).tolist()
    assert_close(all_logits(backend, tokens), transformers_logits(model, tokens))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "repeats"), [("smollm2-135m-instruct", 2), ("gemma-3-270m", 6)])
def test_real_models(name: str, repeats: int) -> None:
    """Gemma's 558 tokens are more than its window of 512."""
    loaded = goldens.real_weights(name)
    if loaded is None:
        pytest.skip(f"{name} is not in the cache: pellucid pull {name}")
    spec, weights = loaded
    encoded = {
        key: WeightTensor(BlockFormat.F32, values.shape, quantize(np.atleast_2d(values), BlockFormat.F32))
        for key, values in weights.items()
    }
    tokens = REAL[name].tokens * repeats
    expected = transformers_logits(transformers_model(REAL[name].config, spec, weights), tokens)
    first = len(tokens) - 60  # they see all the others, and a vocabulary a token is most of the work
    computed = all_logits(ReferenceBackend(spec, encoded.items()), tokens, chunk=256, first=first)
    assert_close(computed, expected[first:])


def test_the_tiny_goldens_are_what_transformers_gives_today() -> None:
    recorded = goldens.read("tiny")
    made = goldens.make_tiny()
    assert recorded.keys() - {"made_by"} == made.keys()
    for name, golden in made.items():
        assert golden["positions"] == recorded[name]["positions"]
        difference = np.abs(np.array(golden["logits"]) - np.array(recorded[name]["logits"])).max()
        assert difference <= TOLERANCE * golden["scale"] / 10


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_real_goldens_are_what_transformers_gives_today(name: str) -> None:
    made = goldens.make_real(name)
    if made is None:
        pytest.skip(f"{name} is not in the cache: pellucid pull {name}")
    recorded = goldens.read(name)
    for row, expected in zip(made["top"], recorded["top"], strict=True):
        assert row["position"] == expected["position"]
        difference = np.abs(np.array(row["logits"]) - np.array(expected["logits"])).max()
        assert difference <= TOLERANCE * made["scale"] / 10
