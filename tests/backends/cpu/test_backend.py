"""The native executor: equal to itself to the bit however it is run, and to the reference within rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.backends.base import Backend
from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.core.errors import BackendError, InvalidRequestError, ModelFileError, UnsupportedModelError
from pellucid.models.spec import tensor_shapes
from pellucid.quant.formats import BlockFormat
from pellucid.weights.loader import open_model
from tests.support.tiny_models import (
    HEADS_OF_32,
    all_logits,
    group_blocks,
    make_batch,
    num_kv_groups,
    write_tiny_model,
)

native = pytest.importorskip("pellucid.backends.cpu._native", reason="the native core is not built")

from pellucid.backends.cpu import backend as cpu  # noqa: E402

ISAS: list[str] = native.instruction_sets()
QUANTIZED = {
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 8,
    "llama.rope.dimension_count": 32,
}
TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, 128, 200)]


def model_file(folder: Path, name: str) -> Path:
    """tiny models: float32 of both families, and one in each of the quantized formats."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        if name in ("llama", "gemma3"):
            write_tiny_model(path, name, vocab_size=131)
        elif name == "llama_32":
            write_tiny_model(path, "llama", metadata=HEADS_OF_32["llama"])
        elif name == "mixed":  # as K-quant files are: formats vary within a layer
            names = tensor_shapes(open_model(model_file(folder, "Q4_K")).spec)
            formats = dict(zip(names, [f for f in BlockFormat for _ in range(2)] * 9, strict=False))
            write_tiny_model(path, "llama", metadata=QUANTIZED, formats=formats, tied=False)
        else:
            write_tiny_model(path, "llama", metadata=QUANTIZED, formats=BlockFormat[name])
    return path


MODELS = ("llama", "gemma3", "Q4_1", "Q6_K", "Q8_0", "mixed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def load(path: Path, **options: Any) -> cpu.CpuBackend:
    with open_model(path) as file:
        return cpu.CpuBackend(file.spec, file.weights(), **options)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("isa", ISAS)
def test_float_models_agree_with_the_reference(folder: Path, name: str, isa: str) -> None:
    path = model_file(folder, name)
    with open_model(path) as file:
        wanted = all_logits(ReferenceBackend(file.spec, file.weights(), kv_cache_dtype="f32"), TOKENS)
    found = all_logits(load(path, kv_cache_dtype="f32", isa=isa), TOKENS)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("isa", ISAS)
def test_q8_keys_and_values_are_those_of_the_reference(folder: Path, isa: str) -> None:
    """One token: its value alone is attended to, and nothing else than Q8_0 stands between the two backends."""
    path = model_file(folder, "gemma3")
    with open_model(path) as file:
        reference = ReferenceBackend(file.spec, file.weights(), kv_cache_dtype="q8")
    found, wanted = (all_logits(each, TOKENS[:1]) for each in (load(path, kv_cache_dtype="q8", isa=isa), reference))
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    exact = all_logits(load(path, kv_cache_dtype="f32", isa=isa), TOKENS[:1])
    assert np.abs(exact - wanted).max() > 1e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "Q8_0", "mixed"])
def test_quantized_models_are_near_the_reference(folder: Path, name: str) -> None:
    path = model_file(folder, name)
    with open_model(path) as file:
        wanted = all_logits(ReferenceBackend(file.spec, file.weights(), kv_cache_dtype="f32"), TOKENS)
    found = all_logits(load(path), TOKENS)
    # Activations are int8 and the KV cache is bf16: 0.05 was seen on these models, whose attention is sharp. One
    # misplaced matrix is of the order of 1.
    assert relative_error(found, wanted) <= 0.1
    with open_model(path) as file:
        weights = dict(file.weights())
        weights["layers.0.mlp.up_proj.weight"] = weights["layers.1.mlp.up_proj.weight"]
        mutant = cpu.CpuBackend(file.spec, weights.items())
    assert relative_error(all_logits(mutant, TOKENS), wanted) > 0.5


KINDS = [(name, dtype) for name in MODELS for dtype in ("bf16", "f16", "f32", "q8") if (name, dtype) != ("llama", "q8")]


@pytest.mark.parametrize(("name", "kv_cache_dtype"), KINDS)  # llama's heads of 16 are no whole block of q8
def test_chunks_and_threads_do_not_show(folder: Path, name: str, kv_cache_dtype: str) -> None:
    path = model_file(folder, name)
    wanted = all_logits(load(path, threads=1, kv_cache_dtype=kv_cache_dtype), TOKENS)
    for threads in (1, 2, 3):
        backend = load(path, threads=threads, kv_cache_dtype=kv_cache_dtype)
        for chunk in (1, 3, 17, 64, 200):
            assert np.array_equal(all_logits(backend, TOKENS, chunk), wanted), (threads, chunk)


@pytest.mark.parametrize("isa", ISAS)
def test_chunks_do_not_show_on_any_instruction_set(folder: Path, isa: str) -> None:
    backend = load(model_file(folder, "mixed"), isa=isa)
    wanted = all_logits(backend, TOKENS)
    for chunk in (1, 17, 64):
        assert np.array_equal(all_logits(backend, TOKENS, chunk), wanted), chunk


@pytest.mark.parametrize(("name", "kv_cache_dtype"), [*((name, "f16") for name in MODELS), ("gemma3", "q8")])
def test_vector_instruction_sets_agree_to_the_bit(folder: Path, name: str, kv_cache_dtype: str) -> None:
    def logits(isa: str) -> np.ndarray:
        return all_logits(load(model_file(folder, name), isa=isa, kv_cache_dtype=kv_cache_dtype), TOKENS)

    wanted = logits(ISAS[0])
    for isa in ISAS[1:]:
        if isa != "portable":  # without a fused multiply-add it rounds twice
            assert np.array_equal(logits(isa), wanted), isa


@pytest.mark.parametrize("neighbours", [0, 1, 7, 20])
@pytest.mark.parametrize(("name", "kv_cache_dtype"), [*((name, "f16") for name in MODELS), ("Q4_1", "q8")])
def test_neighbours_and_block_numbers_do_not_show(
    folder: Path, name: str, kv_cache_dtype: str, neighbours: int
) -> None:
    backend = load(model_file(folder, name), threads=2, kv_cache_dtype=kv_cache_dtype)
    wanted = all_logits(backend, TOKENS)
    rng = np.random.default_rng(neighbours)
    others = [[int(t) for t in rng.integers(0, 128, rng.integers(90, 200))] for _ in range(neighbours)]
    sequences = [*others[: neighbours // 2], TOKENS, *others[neighbours // 2 :]]
    mine = neighbours // 2
    blocks = rng.permutation(4 * len(sequences)).reshape(len(sequences), 4)
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(groups * 4 * len(sequences))
    done = [0] * len(sequences)
    logits = []
    while done[mine] < len(TOKENS):
        pieces, rows, row = [], [], 0
        for index, tokens in enumerate(sequences):
            size = int(rng.choice([1, 2, 30, 70]))
            if index == mine and rng.random() < 0.3:
                size = 1
            piece = tokens[done[index] : done[index] + size]
            if not piece:
                continue
            pieces.append((piece, done[index], blocks[index]))
            if index == mine:
                rows = list(range(row, row + len(piece)))
            row += len(piece)
            done[index] += len(piece)
        logits.append(backend.forward(make_batch(pieces, rows, groups=groups)).logits.copy())
    assert np.array_equal(np.concatenate(logits), wanted)


@pytest.mark.parametrize("kv_cache_dtype", ["f16", "q8"])
def test_a_batch_of_single_tokens_equals_each_alone(folder: Path, kv_cache_dtype: str) -> None:
    """Many decoding sequences take another way through attention than one does."""
    backend = load(model_file(folder, "Q4_1"), threads=2, kv_cache_dtype=kv_cache_dtype)
    backend.allocate_kv_cache(40)
    for seq in range(10):
        backend.forward(make_batch([(TOKENS[seq : seq + 130], 0, range(4 * seq, 4 * seq + 4))], []))
    alone = [backend.forward(make_batch([([7], 130, range(4 * seq, 4 * seq + 4))])).logits.copy() for seq in range(10)]
    together = backend.forward(make_batch([([7], 130, range(4 * seq, 4 * seq + 4)) for seq in range(10)])).logits
    assert np.array_equal(together, np.concatenate(alone))


class WrongBlock:
    """The mutant: a backend that takes a sequence's second block for its first."""

    def __init__(self, backend: Backend) -> None:
        self.spec = backend.spec
        self._backend = backend

    def allocate_kv_cache(self, num_blocks: int) -> None:
        self._backend.allocate_kv_cache(num_blocks)

    def forward(self, batch: Any) -> Any:
        if batch.kv_lens[0] > 100:
            batch.block_tables[0, 0, 0] = batch.block_tables[0, 0, 1]
        return self._backend.forward(batch)


def test_the_equality_notices_a_wrong_block(folder: Path) -> None:
    backend = load(model_file(folder, "Q4_1"))
    mutant: Any = WrongBlock(backend)
    assert not np.array_equal(all_logits(mutant, TOKENS, 64), all_logits(backend, TOKENS, 64))


@pytest.mark.parametrize("kv_cache_dtype", ["f16", "q8"])
def test_copied_blocks_continue_alike(folder: Path, kv_cache_dtype: str) -> None:
    backend = load(model_file(folder, "gemma3"), kv_cache_dtype=kv_cache_dtype)
    wanted = all_logits(backend, TOKENS)[150:]
    groups = num_kv_groups(backend)
    backend.allocate_kv_cache(8 * groups)
    backend.forward(make_batch([(TOKENS[:150], 0, [0, 1, 2, 3])], [], groups=groups))
    backend.copy_blocks(group_blocks([[0, 5], [1, 4], [2, 7]], groups).reshape(-1, 2))
    found = backend.forward(make_batch([(TOKENS[150:], 150, [5, 4, 7, 6])], groups=groups)).logits
    assert np.array_equal(found, wanted)


def test_rows_may_be_asked_for_twice_and_in_any_order(folder: Path) -> None:
    backend = load(model_file(folder, "llama"))
    wanted = all_logits(backend, TOKENS[:20])
    found = backend.forward(make_batch([(TOKENS[:20], 0, [0])], [19, 3, 3, 0])).logits
    assert np.array_equal(found, wanted[[19, 3, 3, 0]])
    single = backend.forward(make_batch([(TOKENS[19:20], 19, [0])], [0, 0])).logits
    assert np.array_equal(single, wanted[[19, 19]])


def test_blocks_behind_every_window_may_be_gone(folder: Path) -> None:
    path = folder / "windowed.gguf"
    write_tiny_model(path, "gemma3", metadata={"gemma3.block_count": 5})  # five local layers, no global one
    backend = load(path)
    wanted = all_logits(backend, TOKENS)[-1:]
    backend.allocate_kv_cache(4)
    backend.forward(make_batch([(TOKENS[:-1], 0, range(4))], []))
    found = backend.forward(make_batch([(TOKENS[-1:], 199, [-1, -1, 2, 3])])).logits
    assert np.array_equal(found, wanted)


def test_each_group_must_have_what_its_window_shows(folder: Path) -> None:
    """Windows of 40: token 199 sees positions 160 and on, in block 2; the layer without a window sees them all."""
    backend = load(model_file(folder, "gemma3"))
    groups = num_kv_groups(backend)
    wanted = all_logits(backend, TOKENS)[-1:]
    backend.allocate_kv_cache(4 * groups)
    backend.forward(make_batch([(TOKENS[:-1], 0, range(4))], [], groups=groups))
    batch = make_batch([(TOKENS[-1:], 199, range(4))], groups=groups)
    for group in range(groups):
        for block in range(4):
            taken, batch.block_tables[group, 0, block] = int(batch.block_tables[group, 0, block]), -1
            if group > 0 and block < 2:
                continue
            with pytest.raises(BackendError, match="KV block -1"):
                backend.forward(batch)
            batch.block_tables[group, 0, block] = taken
    assert (batch.block_tables[1:] == -1).sum() == 2 * (groups - 1)
    assert np.array_equal(backend.forward(batch).logits, wanted)


def test_bad_batches_are_refused(folder: Path) -> None:
    backend = load(model_file(folder, "llama"))
    backend.allocate_kv_cache(2)
    for pieces, rows, message in (
        ([([131], 0, [0])], [0], "token id 131 is outside the vocabulary of 131"),
        ([([-1], 0, [0])], [0], "token id -1"),
        ([([1], 0, [2])], [0], "KV block 2 does not exist; there are 2"),
        ([([1], 64, [0, -1])], [0], "KV block -1"),
        ([([1], 64, [0])], [0], "does not fit"),
        ([([1], 0, [0])], [1], "logits_rows"),
        ([([], 0, [0]), ([1, 2], 0, [1])], [0], "at least one new token"),
    ):
        with pytest.raises(BackendError, match=message):
            backend.forward(make_batch(pieces, rows))
    batch = make_batch([([1], 0, [0]), ([2], 0, [1])])
    batch.cu_seqlens[1] = 60
    batch.kv_lens[0] = 60
    with pytest.raises(BackendError, match="cu_seqlens does not cover"):
        backend.forward(batch)
    with pytest.raises(BackendError, match="a table with contiguous rows for each KV group"):
        backend.forward(make_batch([([1], 0, [0])], groups=2))
    with pytest.raises(ValueError, match="KV block 9"):
        backend.copy_blocks(np.array([[0, 9]], np.int32))


@pytest.mark.parametrize("name", ["llama", "mixed"])
def test_packing_in_slices_changes_no_bit_and_releases_every_row(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_file(folder, name)
    whole = all_logits(load(path), TOKENS)
    monkeypatch.setattr(cpu, "_PACKED_AT_ONCE", 1)
    released: list[np.ndarray] = []
    sliced = all_logits(load(path, release=released.append), TOKENS)
    assert (sliced == whole).all()
    with open_model(path) as file:
        matrices = [tensor.data for _, tensor in file.weights() if len(tensor.shape) == 2]
        assert len(released) == sum(-(-len(data) // 16) for data in matrices)
        assert b"".join(part.tobytes() for part in released) == b"".join(data.tobytes() for data in matrices)


@pytest.mark.parametrize("count", [32, 31, 80])
def test_a_matrix_with_too_few_or_too_many_rows_is_refused(folder: Path, count: int) -> None:
    with open_model(model_file(folder, "llama")) as file:
        weights = dict(file.weights())
        name = "layers.1.attention.q_proj.weight"
        sound = weights[name]
        assert len(sound.data) == 64
        weights[name] = type(sound)(sound.format, sound.shape, np.resize(sound.data, (count, sound.data.shape[1])))
        with pytest.raises(ValueError, match=rf"{name}.*(not whole|size of its shape)"):
            cpu.CpuBackend(file.spec, weights.items())


def test_weights_and_options_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_file(folder, "llama")
    with open_model(path) as file:
        weights = dict(file.weights())
        broken = weights["layers.1.mlp.up_proj.weight"]
        data = broken.data.copy()
        data[3, 4:8] = np.array([np.inf], np.float32).view(np.uint8)
        weights["layers.1.mlp.up_proj.weight"] = type(broken)(broken.format, broken.shape, data)
        with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.up_proj\.weight .*NaN or infinite"):
            cpu.CpuBackend(file.spec, weights.items())
    with pytest.raises(InvalidRequestError, match="kv_cache_dtype must be one of f16, bf16, f32, q8, not 'q3'"):
        load(path, kv_cache_dtype="q3")
    with pytest.raises(InvalidRequestError, match=r"kv_cache_dtype 'q8'.*head_dim 16: use one of f16, bf16, f32"):
        load(path, kv_cache_dtype="q8")
    monkeypatch.setenv(cpu.ISA_VARIABLE, "mmx")
    with pytest.raises(InvalidRequestError, match="no instruction set 'mmx'"):
        load(path)
    monkeypatch.setenv(cpu.ISA_VARIABLE, "portable")
    assert load(path).isa == "portable"


def test_heads_beyond_the_kernels_buffers_are_refused(folder: Path) -> None:
    for head_dim in (native.MAX_HEAD_DIM, native.MAX_HEAD_DIM + 2):
        path = folder / f"head_dim_{head_dim}.gguf"
        sizes = {"llama.attention.key_length": head_dim, "llama.attention.value_length": head_dim}
        write_tiny_model(path, "llama", metadata={**sizes, "llama.rope.dimension_count": head_dim})
        if head_dim <= native.MAX_HEAD_DIM:
            assert np.isfinite(all_logits(load(path), TOKENS[:70])).all()
        else:
            with pytest.raises(UnsupportedModelError, match=f"layer 0 has head_dim {head_dim}.* up to 512"):
                load(path)


def test_a_step_that_does_not_fit_in_memory_is_an_error(folder: Path) -> None:
    backend = load(model_file(folder, "llama"))
    backend.allocate_kv_cache(1)
    wanted = backend.forward(make_batch([([1, 2], 0, [0])])).logits.copy()

    class TooLarge:
        def __init__(self, model: Any) -> None:
            self._model = model

        def forward(self, *_: object) -> bool:
            raise MemoryError("std::bad_alloc")

    model, backend._model = backend._model, TooLarge(backend._model)  # type: ignore[assignment]
    with pytest.raises(BackendError, match="not enough memory for a step of 2 tokens"):
        backend.forward(make_batch([([1, 2], 0, [0])]))
    backend._model = model
    assert np.array_equal(backend.forward(make_batch([([1, 2], 0, [0])])).logits, wanted)


def test_logits_that_are_not_finite_are_an_error(folder: Path) -> None:
    path = folder / "huge.gguf"
    write_tiny_model(path, "llama", seed=1)
    with open_model(path) as file:
        weights = dict(file.weights())
        norm = weights["final_norm.weight"]
        huge = np.full(norm.shape, 3e38, np.float32).view(np.uint8).reshape(norm.data.shape)
        weights["final_norm.weight"] = type(norm)(norm.format, norm.shape, huge)
        backend = cpu.CpuBackend(file.spec, weights.items())
    backend.allocate_kv_cache(1)
    with pytest.raises(BackendError, match="not finite"):
        backend.forward(make_batch([([1, 2], 0, [0])]))


@pytest.mark.parametrize("kv_cache_dtype", ["f16", "q8"])
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_keys_and_values_out_of_range_are_an_error(folder: Path, projection: str, kv_cache_dtype: str) -> None:
    with open_model(model_file(folder, "llama_32")) as file:
        weights = dict(file.weights())
        name = f"layers.0.attention.{projection}.weight"
        sound = weights[name]
        huge = (sound.data.view(np.float32) * np.float32(1e9)).view(np.uint8)
        weights[name] = type(sound)(sound.format, sound.shape, huge)
        backend = cpu.CpuBackend(file.spec, weights.items(), kv_cache_dtype=kv_cache_dtype)
        assert np.isfinite(all_logits(cpu.CpuBackend(file.spec, weights.items(), kv_cache_dtype="bf16"), TOKENS)).all()
    with pytest.raises(BackendError, match=f"not finite.*range of {kv_cache_dtype}: try kv_cache_dtype='bf16'"):
        all_logits(backend, TOKENS)


def test_a_closed_backend_says_so(folder: Path) -> None:
    backend = load(model_file(folder, "llama"))
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.forward(make_batch([([1], 0, [0])]))
