from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pellucid.core.errors import ModelFileError, ModelNotFoundError, PellucidError, UnsupportedModelError
from pellucid.models.family import GGUFHeader
from pellucid.models.registry import family_for_architecture
from pellucid.models.spec import tensor_shapes
from pellucid.quant.formats import BlockFormat, dequantize
from pellucid.weights.loader import open_model
from tests.support.gguf_writer import encode, write_gguf
from tests.support.tiny_models import LLAMA, METADATA, random_weights, tiny_spec, write_model, write_tiny_model


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_once_each_in_canonical_order_and_row_order(tmp_path: Path, architecture: str, tied: bool) -> None:
    spec = tiny_spec(METADATA[architecture], tied=tied)
    weights = random_weights(spec)
    path = write_model(tmp_path / "model.gguf", METADATA[architecture], weights, spec)
    with open_model(path) as model_file:
        assert model_file.spec == spec
        assert model_file.path == path
        assert model_file.metadata["general.architecture"] == architecture
        loaded = list(model_file.weights())
    assert [name for name, _ in loaded] == list(tensor_shapes(spec))
    for name, tensor in loaded:
        assert tensor.shape == weights[name].shape
        np.testing.assert_array_equal(dequantize(tensor.data, tensor.format).reshape(tensor.shape), weights[name])


def test_projection_biases_are_loaded_in_row_order(tmp_path: Path) -> None:
    spec = tiny_spec(LLAMA, bias=True)
    weights = random_weights(spec)
    with open_model(write_model(tmp_path / "model.gguf", LLAMA, weights, spec)) as model_file:
        assert model_file.spec.layers[1].attention.bias
        loaded = {name: dequantize(t.data, t.format).reshape(t.shape) for name, t in model_file.weights()}
    for name in ("q_proj", "k_proj", "v_proj"):
        np.testing.assert_array_equal(
            loaded[f"layers.1.attention.{name}.bias"], weights[f"layers.1.attention.{name}.bias"]
        )


def test_rope_factors_go_into_the_spec(tmp_path: Path) -> None:
    spec = tiny_spec(LLAMA)
    factors = np.linspace(1, 8, 8).astype(np.float32)
    extra_tensors = {"rope_freqs.weight": factors}
    path = write_model(tmp_path / "model.gguf", LLAMA, random_weights(spec), spec, extra_tensors=extra_tensors)
    with open_model(path) as model_file:
        scaled = np.array(model_file.spec.layers[0].attention.rope.inv_freq)
        assert "rope_freqs.weight" not in dict(model_file.weights())
    np.testing.assert_allclose(scaled, np.array(spec.layers[0].attention.rope.inv_freq) / factors, rtol=1e-6)


def test_a_norm_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec(LLAMA)
    weights = random_weights(spec)
    weights["layers.1.mlp_norm.weight"][5] = np.inf
    with (
        open_model(write_model(tmp_path / "model.gguf", LLAMA, weights, spec)) as model_file,
        pytest.raises(ModelFileError, match=r"blk\.1\.ffn_norm\.weight \(F32\) holds NaN or infinite"),
    ):
        list(model_file.weights())


@pytest.mark.parametrize("change", ["cut", "overwritten", "appended"])
@pytest.mark.parametrize("when", [0, 3, len(tensor_shapes(tiny_spec(LLAMA)))])
def test_a_file_that_is_written_to_while_it_loads_is_an_error(tmp_path: Path, change: str, when: int) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", "llama")
    os.utime(path, ns=(0, 0))
    with open_model(path) as model_file:
        weights = model_file.weights()
        for _ in range(when):
            next(weights)
        if change == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            with path.open("r+b" if change == "overwritten" else "ab") as file:
                file.write(b"GGUF")
        with pytest.raises(ModelFileError, match=r"model\.gguf was changed while it was being read"):
            next(weights)


def test_a_file_that_is_replaced_or_removed_while_it_loads_is_read_to_its_end(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", "llama")
    other = write_tiny_model(tmp_path / "other.gguf", "llama", seed=1)
    with open_model(path) as model_file:
        wanted = {name: tensor.data.copy() for name, tensor in model_file.weights()}
        weights = model_file.weights()
        found = dict([next(weights)])
        os.replace(other, path)
        found |= dict([next(weights)])
        path.unlink()
        found |= dict(weights)
        assert all(np.array_equal(found[name].data, data) for name, data in wanted.items())


def test_files_that_are_no_supported_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        open_model(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError, match=r"general\.architecture is missing"):
        open_model(write_gguf(tmp_path / "bare.gguf", {"general.name": "x"}, {"a": np.zeros(4)}))
    with pytest.raises(UnsupportedModelError, match="'falcon' is not supported; supported: gemma3, llama"):
        open_model(write_gguf(tmp_path / "falcon.gguf", {"general.architecture": "falcon"}, {"a": np.zeros(4)}))


def test_metadata_and_tensors_must_fit_together(tmp_path: Path) -> None:
    spec = tiny_spec(LLAMA)
    weights = random_weights(spec)
    deeper = write_model(tmp_path / "deeper.gguf", LLAMA, weights, spec, extra_metadata={"llama.block_count": 3})
    with pytest.raises(ModelFileError, match=r"blk\.2\..* and 4 more are missing"):
        open_model(deeper)
    shallower = write_model(tmp_path / "shallower.gguf", LLAMA, weights, spec, extra_metadata={"llama.block_count": 1})
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\..* and 4 more are not part"):
        open_model(shallower)
    wider = write_model(
        tmp_path / "wider.gguf", LLAMA, weights, spec, extra_metadata={"llama.feed_forward_length": 128}
    )
    with pytest.raises(ModelFileError, match=r"has shape \[96, 64\]; the metadata asks for \[128, 64\]"):
        open_model(wider)
    stray = write_model(
        tmp_path / "stray.gguf", LLAMA, weights, spec, extra_tensors={"blk.0.attn_output.bias": np.zeros(64)}
    )
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_output\.bias"):
        open_model(stray)


def test_a_matrix_where_a_vector_belongs_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec(LLAMA)
    extra_tensors = {"output_norm.weight": encode(np.ones((1, 64), np.float32))}
    path = write_model(tmp_path / "model.gguf", LLAMA, random_weights(spec), spec, extra_tensors=extra_tensors)
    with pytest.raises(ModelFileError, match=r"output_norm\.weight has shape \[1, 64\]; the metadata asks for \[64\]"):
        open_model(path)


def test_opening_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", formats=BlockFormat.Q8_0)

    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("pellucid.weights.loader.dequantize", read)
    monkeypatch.setattr("pellucid.weights.loader.is_finite", read)
    with open_model(path) as model_file:
        next_weight = model_file.weights()
        assert next(next_weight)[0] == "embed_tokens.weight"


HOSTILE = [
    0,
    1,
    -1,
    2**31,
    2**63 - 1,
    2**64 - 1,
    0.0,
    1.0,
    -1.0,
    1e-40,
    1e-300,
    1e300,
    np.nan,
    np.inf,
    "",
    "yarn",
    True,
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_hostile_metadata_gives_a_spec_of_finite_numbers_or_a_typed_error(architecture: str, scaling: str) -> None:
    shapes = {"token_embd.weight": (128, 64)}
    spec_from_gguf = family_for_architecture(architecture).spec_from_gguf
    metadata = {
        **METADATA[architecture],
        f"{architecture}.rope.scaling.type": scaling,
        f"{architecture}.rope.scaling.factor": 4.0,
        f"{architecture}.rope.scaling.original_context_length": 128,
        f"{architecture}.rope.scaling.yarn_beta_fast": 32.0,
        f"{architecture}.rope.scaling.yarn_beta_slow": 1.0,
        f"{architecture}.rope.scaling.attn_factor": 1.0,
        f"{architecture}.attention.scale": 1.0,
        f"{architecture}.vocab_size": 128,
    }
    if architecture == "llama":
        del metadata["llama.attention.scale"]
    refused = 0
    for key in metadata:
        for value in [*HOSTILE, np.array([1, 2]), ["a"]]:
            try:
                spec = spec_from_gguf(GGUFHeader({**metadata, key: value}, shapes))
            except PellucidError:
                refused += 1
            else:
                assert all(np.isfinite(layer.attention.rope.inv_freq).all() for layer in spec.layers)
                assert all(np.isfinite(np.float32(layer.attention.scale)) for layer in spec.layers)
                assert np.isfinite(np.float32(spec.layers[0].attention.rope.attention_factor))
    assert refused > len(metadata) * len(HOSTILE) / 2
